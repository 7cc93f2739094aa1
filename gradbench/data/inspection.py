"""What is there of a task pair's data, and whether all of it can be read."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from gradbench.data.store import real_folder, sample_folder
from gradbench.errors import DataError
from gradbench.task import ExampleSet, Splits, TaskPair

CHUNK = 256  # examples that are read at once


def status(task: TaskPair, name: str) -> dict[str, Any]:
    """Return where data is looked for, what is missing, and whether a sample exists, as JSON."""
    found: dict[str, Any] = {"task": name, "sources": list(task.sources)}
    found["real"] = found["sample"] = None
    if "real" in task.sources:
        folder = real_folder(name)
        found["real"] = {"folder": str(folder), "missing": task.missing(folder)}
    if "sample" in task.sources:
        folder = sample_folder(task, name)
        is_drawn = folder.is_dir()
        size = size_of(folder) if is_drawn else None
        found["sample"] = {"folder": str(folder), "drawn": is_drawn, "bytes": size}
    return found


def size_of(folder: Path) -> int:
    """Return the bytes of all files below a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def open_all(splits: Splits, say: Callable[[str], None]) -> None:
    """Read every training, validation and auxiliary example; the test is left alone.

    Raises:
        DataError: of all examples that can not be read.
    """
    parts = {"train": splits.train, "validation": splits.validation}
    parts |= {f"auxiliary {k}": part for k, part in enumerate(splits.auxiliaries, start=1)}
    faults = []
    for name, part in parts.items():
        found = _faults(part)
        faults += [f"{name}: {fault}" for fault in found]
        say(f"{name}: {len(part)} examples, {'not all' if found else 'all'} can be read")
    say(f"test: {len(splits.test)} examples, left unopened until a run has trained")
    if faults:
        raise DataError(" ".join(faults))


def _faults(part: ExampleSet) -> list[str]:
    """Return what reading the examples complains of."""
    faults: list[str] = []
    for start in range(0, len(part), CHUNK):
        try:
            part.take(np.arange(start, min(start + CHUNK, len(part))))
        except DataError as error:
            if str(error) in faults:  # the set is read as a whole, and has been
                return faults
            faults.append(str(error))
    return faults
