"""Labels of image files, from a folder of class folders or from a CSV."""

from __future__ import annotations

import csv
import io
import math
import os
import posixpath
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath

import numpy as np
from numpy.typing import NDArray

from gradbench.data.images import image_tree, listed
from gradbench.errors import DataError
from gradbench.task import Indices

PATH, CLASS, GROUP = "path", "label", "group"  # columns of a CSV
VALUES = {"0": 0.0, "0.0": 0.0, "1": 1.0, "1.0": 1.0, "": np.nan}  # of a label's column
ROWS = 100  # that one error lists for one fault

Row = tuple[int, list[str]]  # its number, the header being row 1, and its cells


@dataclass(frozen=True)
class Table:
    """Which images there are and what they show; none of them has been opened.

    ``names`` are the classes, with ``targets`` (N,) int64, or the labels, with ``targets`` (N, L)
    float32, each 0, 1, or NaN where it is blank. ``ids`` are paths from ``root``, sorted.
    """

    root: Path
    ids: tuple[str, ...]
    names: tuple[str, ...]
    targets: NDArray[np.int64] | NDArray[np.float32]
    groups: tuple[str, ...] | None

    @property
    def is_multilabel(self) -> bool:
        """Say whether an example has labels and no class."""
        return self.targets.ndim == 2

    def paths(self, indices: Indices) -> list[Path]:
        """Return where some of the images are."""
        return [self.root / self.ids[i] for i in indices]

    def places(self) -> list[str]:
        """Return where the images are, one text for one place; no image is touched."""
        root = os.path.realpath(self.root)
        return [os.path.normpath(os.path.join(root, name)) for name in self.ids]

    def marks(self) -> list[tuple[int, ...]]:
        """Return what to spread evenly: the class, or for each known label which way it is."""
        if not self.is_multilabel:
            return [(label,) for label in self.targets.tolist()]
        return [
            tuple(2 * i + int(value) for i, value in enumerate(row) if not math.isnan(value))
            for row in self.targets.tolist()
        ]

    def scored(self, indices: Indices) -> set[str]:
        """Return the labels of which both 0 and 1 are among some of the images."""
        columns = zip(self.names, self.targets[indices].T.tolist(), strict=True)
        return {name for name, column in columns if {0.0, 1.0} <= set(column)}

    def described(self) -> Iterator[str]:
        """Yield all that is known without opening an image, a line each."""
        yield "\0".join(("labels" if self.is_multilabel else "classes", *self.names))
        groups = self.groups or [""] * len(self.ids)
        for name, target, group in zip(self.ids, self.targets.tolist(), groups, strict=True):
            yield f"{name}\0{target}\0{group}"


def read_table(location: Path, labels: Sequence[str] = ()) -> Table:
    """Return what a folder of class folders or a CSV says of its images.

    Of ``labels`` a CSV's columns are chosen; where it has none of them, it says itself what they
    are: the class in ``label``, or else a label in each column but ``path`` and ``group``.

    Raises:
        DataError: if it says nothing, or contradicts itself.
    """
    if location.is_file():
        if location.suffix.lower() != ".csv":
            raise DataError(f"Expected a folder or a .csv file, found the file {location}.")
        return _read_csv(location, labels)
    if not location.exists():
        raise DataError(f"Expected a folder or a .csv file at {location}, found nothing there.")
    classes, paths, targets = image_tree(location)
    ids = tuple(path.relative_to(location).as_posix() for path in paths)
    return Table(location, ids, classes, targets, None)


def _read_csv(file: Path, labels: Sequence[str]) -> Table:
    header, rows = _rows(file)
    columns = [name for name in labels if name in header]
    advice = ""
    if not columns and CLASS in header:
        columns = [CLASS]
    elif not columns:
        columns = [name for name in header if name not in (PATH, GROUP)]
        advice = f" Read as labels are {listed(columns)}; `labels` chooses among them."
    found = _examples(file, header, rows, columns, advice)
    ids = tuple(sorted(found))
    cells = [[found[name][column] for column in columns] for name in ids]
    groups = tuple(found[name][GROUP] for name in ids) if GROUP in header else None
    if columns == [CLASS]:
        classes, targets = _classes([only for (only,) in cells], file)
        return Table(file.parent, ids, classes, targets, groups)
    return Table(file.parent, ids, tuple(columns), _labels(cells, columns, file), groups)


def _examples(
    file: Path, header: Sequence[str], rows: Sequence[Row], columns: Sequence[str], advice: str
) -> dict[str, dict[str, str]]:
    """Return the cells of every row by column, under the path of its image.

    Raises:
        DataError: listing every row that can not be used.
    """
    faults = _Faults()
    found: dict[str, dict[str, str]] = {}
    first: dict[str, int] = {}
    for number, values in rows:
        if len(values) != len(header):
            faults.add(number, f"{len(values)} cells instead of {len(header)}")
            continue
        cells = dict(zip(header, values, strict=True))
        path = _path(cells[PATH])
        if path is None:
            faults.add(number, f"{cells[PATH]!r} instead of a relative path")
        elif first.setdefault(path, number) != number:
            faults.add(number, f"{path!r} again, as in row {first[path]}")
        else:
            found[path] = cells
        if cells.get(GROUP) == "":
            faults.add(number, f"no {GROUP}")
        for column in columns:
            if column == CLASS and not cells[column]:
                faults.add(number, f"no {CLASS}")
            elif column != CLASS and cells[column] not in VALUES:
                faults.add(number, f"{column} {cells[column]!r} instead of 0, 1 or blank")
    faults.report(file, advice)
    if not found:
        raise DataError(f"Expected a row an image in {file}, found a header alone.")
    return found


def _classes(cells: Sequence[str], file: Path) -> tuple[tuple[str, ...], NDArray[np.int64]]:
    """Return the names of the classes, and the class of each example (N,)."""
    classes, targets = np.unique(np.array(cells), return_inverse=True)
    if len(classes) < 2:
        raise DataError(
            f"Expected two or more classes in column {CLASS!r} of {file}, found one, "
            f"{cells[0]!r}; a yes-or-no label goes into a column of its own name, as 0 and 1."
        )
    return tuple(classes.tolist()), targets.astype(np.int64)


def _labels(
    cells: Sequence[Sequence[str]], columns: Sequence[str], file: Path
) -> NDArray[np.float32]:
    """Return the labels of each example (N, L), NaN where they are blank."""
    targets = np.array([[VALUES[cell] for cell in row] for row in cells], dtype=np.float32)
    if not any({0.0, 1.0} <= set(column) for column in targets.T.tolist()):
        raise DataError(
            f"Expected a label with both 0 and 1 in {file}, found none among {listed(columns)}."
        )
    return targets


def _rows(file: Path) -> tuple[list[str], list[Row]]:
    """Return the header and the other rows of a CSV that are not empty.

    Raises:
        DataError: if there is no header that can be used, or the text can not be read.
    """
    try:
        text = file.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        row = error.object[: error.start].count(b"\n") + 1
        raise DataError(
            f"Expected text in UTF-8 in {file}, found byte 0x{error.object[error.start]:02x} in "
            f"row {row}; save it as “CSV UTF-8”."
        ) from error
    except OSError as error:
        raise DataError(f"Expected to read {file}, found: {error.strerror}.") from error
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    rows: list[Row] = []
    try:
        for cells in reader:
            stripped = [cell.strip() for cell in cells]
            if any(stripped):
                rows.append((reader.line_num, stripped))
    except csv.Error as error:
        raise DataError(
            f"Expected a CSV in {file}, found in row {reader.line_num}: {error}."
        ) from error
    if not rows:
        raise DataError(f"Expected a header and a row an image in {file}, found an empty file.")
    header = rows[0][1]
    _check_header(header, file)
    return header, rows[1:]


def _check_header(header: Sequence[str], file: Path) -> None:
    if twice := sorted({name for name in header if header.count(name) > 1}):
        raise DataError(f"Expected each column of {file} once, found more of {listed(twice)}.")
    if "" in header:
        raise DataError(
            f"Expected a name for every column of {file}, found none for column "
            f"{header.index('') + 1}."
        )
    if PATH not in header:
        close = [name for name in header if name.lower() == PATH]
        advice = f"rename {close[0]!r}" if close else "name it so, and separate columns by commas"
        raise DataError(
            f"Expected a column {PATH!r} in {file}, found the columns {listed(header)}; {advice}."
        )
    if not {*header} - {PATH, GROUP}:
        raise DataError(
            f"Expected a column {CLASS!r}, or a column a label, in {file}, found the columns "
            f"{listed(header)}."
        )


def _path(cell: str) -> str | None:
    """Return the normal form of a relative path, or None where there is none."""
    path = cell.replace("\\", "/")
    if not path or PurePosixPath(path).is_absolute() or PureWindowsPath(path).drive:
        return None
    return posixpath.normpath(path)


class _Faults:
    """What is wrong with which rows."""

    def __init__(self) -> None:
        self._rows: dict[str, list[int]] = {}

    def add(self, row: int, fault: str) -> None:
        """Note a fault."""
        self._rows.setdefault(fault, []).append(row)

    def report(self, file: Path, advice: str) -> None:
        """Raise an error if there are faults.

        Raises:
            DataError: listing all of them.
        """
        if not self._rows:
            return
        count = len({row for rows in self._rows.values() for row in rows})
        faults = [
            f"{'rows' if len(rows) > 1 else 'row'} {listed([str(row) for row in rows], ROWS)}: "
            f"{fault}"
            for fault, rows in self._rows.items()
        ]
        raise DataError(
            f"Expected rows as the header of {file} promises, found {count} that are not: "
            f"{listed(faults, ROWS, '; ')}.{advice}"
        )
