"""The tables of CheXpert: which films there are, of which patients, with which findings."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from gradbench import seeding
from gradbench.data.images import listed
from gradbench.errors import DataError
from gradbench.task import Indices

LABELS = ("Atelectasis", "Cardiomegaly", "Consolidation", "Edema", "Pleural Effusion")
UNCERTAIN = -1

VIEW, FRONTAL, LATERAL = "Frontal/Lateral", "Frontal", "Lateral"
VALUES = {"": 0, "0": 0, "0.0": 0, "1": 1, "1.0": 1, "-1": -1, "-1.0": -1}  # blank: not mentioned
EXAMPLE = "CheXpert-v1.0-small/train/patient00001/study1/view1_frontal.jpg"
FAULTS = 100  # that one error lists


@dataclass(frozen=True)
class Films:
    """What a table says of its films; none of them has been opened."""

    ids: tuple[str, ...]  # paths below the folder of the release
    patients: tuple[str, ...]
    is_frontal: NDArray[np.bool_]  # (N,)
    labels: NDArray[np.int64]  # (N, 5): 1, 0, or -1 for uncertain

    def subset(self, indices: Indices) -> Films:
        """Return some of the films."""
        ids, patients = (tuple(each[i] for i in indices) for each in (self.ids, self.patients))
        return Films(ids, patients, self.is_frontal[indices], self.labels[indices])

    def of_views(self, views: str) -> Films:
        """Return the frontal films, or all."""
        return self if views == "all" else self.subset(np.flatnonzero(self.is_frontal))


def read_films(file: Path, split: str) -> Films:
    """Read ``train.csv`` or ``valid.csv`` of a release.

    Raises:
        DataError: naming every row that can not be used.
    """
    try:
        text = file.read_text("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"Expected to read {file} as text in UTF-8, found: {error}.") from error
    reader = csv.reader(text.splitlines())
    header = next(reader, [])
    if absent := [name for name in ("Path", VIEW, *LABELS) if name not in header]:
        raise DataError(
            f"Expected the columns of CheXpert in {file}, found none named {listed(absent)}; "
            "use the table of the release as it is."
        )
    places = [header.index(name) for name in ("Path", VIEW, *LABELS)]
    pattern = re.compile(rf"[^/]+/({split}/(patient\d+)/study\d+/[^/]+\.(?:jpg|jpeg|png))")
    rows: list[tuple[str, str, bool, list[int]]] = []
    faults: list[str] = []
    seen: set[str] = set()
    for number, cells in enumerate(reader, start=2):
        if len(cells) != len(header):
            faults.append(f"row {number}: {len(cells)} cells instead of {len(header)}")
            continue
        path, view, *labels = (cells[place].strip() for place in places)
        match = pattern.fullmatch(path)
        wrong = [
            f"{name} {label!r}"
            for name, label in zip(LABELS, labels, strict=True)
            if label not in VALUES
        ]
        wrong += [] if match else [f"Path {path!r}"]
        wrong += [] if view in (FRONTAL, LATERAL) else [f"{VIEW} {view!r}"]
        wrong += [f"Path {path!r} a second time"] if path in seen else []
        if wrong or not match:
            faults.append(f"row {number}: {', '.join(wrong)}")
            continue
        seen.add(path)
        rows.append((match[1], match[2], view == FRONTAL, [VALUES[label] for label in labels]))
    if faults:
        raise DataError(
            f"Expected rows like those of CheXpert in {file} ({EXAMPLE}, "
            "each once, labels 1.0, 0.0, -1.0 or blank), found "
            f"{len(faults)} that are not: {listed(faults, FAULTS, '; ')}."
        )
    if not rows:
        raise DataError(f"Expected a row a film in {file}, found none.")
    ids, patients, is_frontal, values = zip(*rows, strict=True)
    return Films(ids, patients, np.array(is_frontal), np.array(values))


def draw_patients(
    table: Films, held_out: set[str], sizes: Mapping[str, int], seed: int
) -> dict[str, Indices]:
    """Draw patients with the seed until each split has its films; no patient is in two of them.

    A split's last patient gives only as many films as are wanted, the others are not used.

    Raises:
        DataError: if there are too few films.
    """
    of_patient: dict[str, list[int]] = {}
    for place, patient in enumerate(table.patients):
        if patient not in held_out:
            of_patient.setdefault(patient, []).append(place)
    members = list(of_patient.values())
    order: Iterator[int] = iter(seeding.rng(seed, "split").permutation(len(members)).tolist())
    drawn: dict[str, Indices] = {}
    for name, size in sizes.items():
        chosen: list[int] = []
        while len(chosen) < size:
            if (which := next(order, None)) is None:
                wanted = " and ".join(f"{count} for {split}" for split, count in sizes.items())
                raise DataError(
                    f"Expected films of enough patients for {wanted}, found {len(members)} "
                    f"patients with {sum(map(len, members))} films that fit; choose a smaller "
                    "preset, or --set task.views=all."
                )
            chosen += members[which]
        drawn[name] = np.sort(np.array(chosen[:size]))
    return drawn
