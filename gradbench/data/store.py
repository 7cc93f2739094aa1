"""Finds the real data of a task pair, or draws its sample."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock

from gradbench.errors import DataError, HomeError
from gradbench.fields import identity_of
from gradbench.task import Source, TaskPair


def data_root() -> Path:
    """Return the folder that holds data sets."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(os.environ.get("GRADBENCH_DATA") or cache / "gradbench")


def real_folder(name: str) -> Path:
    """Return where the real files of a task pair are looked for."""
    return data_root() / name


def sample_folder(task: TaskPair, name: str) -> Path:
    """Return where the drawn sample of a task pair is kept, one a version."""
    settings = {k: v for k, v in identity_of(task).items() if k in task.sample_fields}
    text = json.dumps([task.version, task.revision, settings], sort_keys=True)
    return data_root() / "samples" / f"{name}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def locate(
    task: TaskPair, name: str, wanted: str, say: Callable[[str], None]
) -> tuple[Source, Path]:
    """Return where the data of ``auto``, ``real`` or ``sample`` is; a sample is drawn if need be.

    Raises:
        DataError: if what is wanted can not be had.
    """
    real = real_folder(name)
    missing = task.missing(real) if "real" in task.sources else f"{name} is drawn, never real."
    has_sample = "sample" in task.sources
    if wanted == "real" or (wanted == "auto" and (missing is None or not has_sample)):
        if missing is not None:
            raise DataError(f"Expected the real data of {name!r}. {missing}")
        return "real", real
    if not has_sample:
        reason = missing or "Its real data is always there: leave --data out."
        raise DataError(f"Expected a task with sample data, found {name!r}. {reason}")
    if wanted == "auto":
        say(f"NOTICE: this is the drawn SAMPLE of {name}, not real data. {missing}")
    return "sample", _drawn(task, sample_folder(task, name))


def _drawn(task: TaskPair, folder: Path) -> Path:
    """Return ``folder`` with the sample in it, whole; two processes draw it once."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.with_name(f".{folder.name}.lock")):
            if not folder.exists():
                unfinished = folder.with_name(f".{folder.name}.part")
                shutil.rmtree(unfinished, ignore_errors=True)
                unfinished.mkdir()
                task.draw_sample(unfinished)
                unfinished.rename(folder)
    except OSError as error:
        raise HomeError(
            f"Expected to write the sample into {folder}, found {error.strerror or error}. "
            "Set GRADBENCH_DATA to a folder of yours."
        ) from error
    return folder
