"""Files that are whole or absent."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from gradbench.errors import HomeError


def home() -> Path:
    """Return the folder that holds everything that GradBench keeps, except data sets."""
    return Path(os.environ.get("GRADBENCH_HOME") or ".gradbench")


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a temporary path whose content takes the place of ``path`` at once, or not at all."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        yield temporary
        with temporary.open("rb") as written:
            os.fsync(written.fileno())
        temporary.replace(path)
        _sync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` as JSON; NaN and infinity are refused."""
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2, allow_nan=False) + "\n", encoding="utf-8")


def make_folder(path: Path) -> None:
    """Make a folder that can be written to.

    Raises:
        HomeError: if it can not be.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        probe = path / f".probe.{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise HomeError(
            f"Expected a folder that can be written at {path}, found {error.strerror}. "
            "Set GRADBENCH_HOME to a folder of yours."
        ) from error


def _sync_folder(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
