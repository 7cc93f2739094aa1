"""Anybody's own images, from folders or CSV files."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar, Self

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from gradbench import seeding
from gradbench.data.division import divide
from gradbench.data.images import ImageFiles, digests, listed
from gradbench.data.tables import Table, read_table
from gradbench.errors import DataError, FieldError
from gradbench.fields import Location, Valid
from gradbench.objectives import Classification, MultiLabel, image_input
from gradbench.seeding import ExampleRandom
from gradbench.settings import Budget
from gradbench.task import (
    Examples,
    Indices,
    Input,
    Objective,
    Preset,
    Source,
    Splits,
    TaskPair,
)

MARGIN = 0.02  # of accuracy and of AUROC: small sets can not tell less apart
SHIFT = 1 / 16  # of the side, how far an image is moved at most
SPLITS = ("training", "validation", "test")
EXAMPLE = 20  # images a class of the example, so that a fifth of its training images is two


class FromFiles:
    """How a batch is made of images in files."""

    size: int
    mirror: bool

    def batch(self, examples: Examples, random: ExampleRandom | None) -> tuple[Tensor, Tensor]:
        """Return images (B, 3, H, W) and targets."""
        pixels = round(self.size * SHIFT)
        images = image_input(examples["image"], random, pixels=pixels, mirror=self.mirror)
        return images, examples["target"]


class FolderClasses(FromFiles, Classification):
    """Tell the classes of images apart."""

    def __init__(self, name: str, classes: tuple[str, ...], size: int, mirror: bool) -> None:
        super().__init__(name, len(classes), margin=MARGIN, labels=classes)
        self.size, self.mirror = size, mirror


class FolderLabels(FromFiles, MultiLabel):
    """Find the labels of images."""

    def __init__(self, name: str, labels: tuple[str, ...], size: int, mirror: bool) -> None:
        super().__init__(name, labels, margin=MARGIN)
        self.size, self.mirror = size, mirror


@dataclass(frozen=True)
class Folder(TaskPair):
    """Images of your own: little data in one folder or CSV, plenty in another.

    A folder holds a folder of images a class, at any depth. A CSV has a column ``path``, relative
    to the CSV, and either a column ``label`` with the class, or a column a label with 0, 1, or
    blank where it is not known; a column ``group`` keeps images of one patient, place or film
    together. The metric is accuracy, or the mean AUROC of the labels.

    Training, validation and test images are drawn from the primary with the seed: whole groups,
    every class in proportion. With fewer than 200 images one of five folds is the test. Auxiliary
    images are for training alone; those that are also validation or test images of the primary,
    or of a group of theirs, are left out. Test images are not touched before training has ended.
    """

    version = "1.0"
    citation = "the data is yours"
    licence = "that of your data"
    sources: ClassVar[tuple[Source, ...]] = ("real",)
    presets: ClassVar[Mapping[str, Preset]] = {
        "default": Preset(
            backbone="timm:test_vit",
            sizes={"folds": 5, "below": 200},  # so many folds below so many primary examples
            budget=Budget(epochs=20, fine_tune_epochs=10, steps_per_epoch=20, batch_size=64),
        )
    }

    primary: Annotated[
        str, Location(), "folder of class folders, or CSV, of the task you care about"
    ] = ""
    auxiliary: Annotated[
        str, Location(), "folder of class folders, or CSV, of the task with plenty of data"
    ] = ""
    labels: Annotated[
        str, "columns of a CSV to read as labels, as a,b,c; none is all, or the class in `label`"
    ] = ""
    size: Annotated[int, Valid(8, 2048), "pixels a side that images are scaled to"] = 64
    mirror: Annotated[
        bool, "mirror training images by chance; not for writing, films or whatever has sides"
    ] = True
    validation_share: Annotated[float, Valid(0.01, 0.9), "of the primary examples"] = 0.2
    test_share: Annotated[
        float, Valid(0.01, 0.9), "of the primary examples, where they are not in folds"
    ] = 0.3
    folds: Annotated[
        int, Valid(0, 100), "parts of which one is the test; 1 is one split, 0 folds if few"
    ] = 0
    fold: Annotated[int, Valid(0, 99), "which of the folds is the test, from 0"] = 0

    @classmethod
    def example(cls, folder: Path) -> Self:
        draw = seeding.rng(0, "example")
        for task, brightness in (("primary", (60, 180)), ("auxiliary", (30, 120, 210))):
            for level in brightness:
                place = folder / task / f"{task} {level}"
                place.mkdir(parents=True, exist_ok=True)
                noise = draw.integers(-20, 21, (EXAMPLE, 16, 16, 3))
                for number, pixels in enumerate((level + noise).astype(np.uint8)):
                    Image.fromarray(pixels).save(place / f"{number:02d}.png")
        return cls(primary=str(folder / "primary"), auxiliary=str(folder / "auxiliary"))

    @property
    def input(self) -> Input:
        return Input(channels=3, size=self.size)

    def objectives(self) -> tuple[Objective, ...]:
        return tuple(
            FolderLabels(name, table.names, self.size, self.mirror)
            if table.is_multilabel
            else FolderClasses(name, table.names, self.size, self.mirror)
            for name, table in zip(("primary", "auxiliary"), self._tables, strict=True)
        )

    def missing(self, folder: Path) -> str | None:
        """Say which of the two places is not set, or is none; ``folder`` is not looked into."""
        places = self._locations()
        unset = [name for name in ("primary", "auxiliary") if name not in places]
        if unset:
            return (
                f"Say where they are: {' '.join(f'--set task.{name}=PATH' for name in unset)}, a "
                "folder with a folder of images a class, or a CSV with the columns path and label."
            )
        absent = [f"{place} (task.{name})" for name, place in places.items() if not place.exists()]
        return f"There is nothing at {' and '.join(absent)}." if absent else None

    def _locations(self) -> dict[str, Path]:
        """Return the places that are set."""
        given = {"primary": self.primary, "auxiliary": self.auxiliary}
        return {name: Path(text).expanduser() for name, text in given.items() if text.strip()}

    def read(self, files: Sequence[Path]) -> ImageFiles:
        primary = self._tables[0]
        unknown = torch.zeros(len(files), dtype=torch.int64)
        if primary.is_multilabel:
            unknown = torch.full((len(files), len(primary.names)), torch.nan)
        names = [str(file) for file in files]
        return ImageFiles(names, files, {"target": unknown}, size=self.size)

    def splits(self, source: Source, folder: Path, preset: Preset, seed: int) -> Splits:
        primary, auxiliary = self._tables
        folds, note = self._folds(len(primary.ids), preset)
        parts = self._divide(primary, folds, seed)
        _check_parts(primary, parts, folds)
        kept = _kept_apart(primary, np.concatenate(parts[1:]), auxiliary)
        notes = [note, *_left_out(len(auxiliary.ids) - len(kept)), *_unscored(primary, parts)]
        train, validation, test = (self._examples(primary, part) for part in parts)
        seen = np.sort(np.concatenate(parts[:2]))
        return Splits(
            train=train,
            validation=validation,
            test=test,
            auxiliaries=(self._examples(auxiliary, kept, "auxiliary/"),),
            data_digest=_digest([*primary.described(), *auxiliary.described()]),
            files_digest=_digest(digests([*primary.paths(seen), *auxiliary.paths(kept)])),
            notes=tuple(notes),
        )

    @functools.cached_property
    def _tables(self) -> tuple[Table, Table]:
        """What the primary and the auxiliary data are; read once, for heads and for splits."""
        if missing := self.missing(Path()):
            raise FieldError(f"Expected your own images, found none. {missing}")
        labels = [name.strip() for name in self.labels.split(",") if name.strip()]
        primary, auxiliary = (read_table(place, labels) for place in self._locations().values())
        known = [
            name for table in (primary, auxiliary) if table.is_multilabel for name in table.names
        ]
        if unknown := [name for name in labels if name not in known]:
            raise FieldError(
                f"Expected task.labels to name columns of {self.primary} or {self.auxiliary}, "
                f"found {listed(unknown)}; there are {listed(known) or 'no labels'}."
            )
        return primary, auxiliary

    def _folds(self, count: int, preset: Preset) -> tuple[int, str]:
        """Return how many folds there are, and say so."""
        few = count < preset.sizes["below"]
        folds = self.folds or (preset.sizes["folds"] if few else 1)
        if self.fold >= folds:
            raise FieldError(
                f"Expected task.fold to be one of {folds} folds, 0 to {folds - 1}, found "
                f"{self.fold}; choose another or set task.folds."
            )
        test_share = 1 / folds if folds > 1 else self.test_share
        if self.validation_share + test_share >= 0.999:  # nothing but round-off is left to train
            raise FieldError(
                f"Expected something to be left for training, found task.validation_share "
                f"{self.validation_share:g} beside a test of {test_share:g}; choose less."
            )
        size = "fewer" if few else "not fewer"
        why = f", for there are {size} than {preset.sizes['below']} primary images"
        why = "" if self.folds else why
        if folds == 1:
            return 1, f"one, drawn with the seed{why}; --set task.folds=… makes folds"
        return folds, (
            f"the test is fold {self.fold} of 0 … {folds - 1}{why}; "
            "--set task.fold=… takes another, task.folds=1 makes one split"
        )

    def _divide(self, table: Table, folds: int, seed: int) -> tuple[Indices, Indices, Indices]:
        """Return the training, validation and test examples of the primary."""
        marks = table.marks()
        _check_counts(table, folds)
        everything = np.arange(len(marks))
        if folds == 1:
            train = 1 - self.validation_share - self.test_share
            shares = (train, self.validation_share, self.test_share)
            part = divide(marks, table.groups, shares, seeding.rng(seed, "split"))
            return everything[part == 0], everything[part == 1], everything[part == 2]
        draw = seeding.rng(seed, "split", "folds", folds)
        in_test = divide(marks, table.groups, [1 / folds] * folds, draw) == self.fold
        rest = everything[~in_test]
        share = self.validation_share * folds / (folds - 1)  # of the rest
        groups = None if table.groups is None else [table.groups[i] for i in rest]
        draw = seeding.rng(seed, "split", "fold", folds, self.fold)
        part = divide([marks[i] for i in rest], groups, (1 - share, share), draw)
        return rest[part == 0], rest[part == 1], everything[in_test]

    def _examples(self, table: Table, indices: Indices, prefix: str = "") -> ImageFiles:
        targets = table.targets[indices]
        return ImageFiles(
            [prefix + table.ids[i] for i in indices],
            table.paths(indices),
            {"target": torch.from_numpy(targets)},
            size=self.size,
            strata=None if table.is_multilabel else targets.astype(np.int64),
        )


def _check_counts(table: Table, folds: int) -> None:
    """Check that every class has as many examples, or groups, as there are parts.

    Raises:
        DataError: naming the classes that have fewer.
    """
    parts = max(folds, len(SPLITS))
    unit = "image" if table.groups is None else "group"
    owners: Sequence[object] = range(len(table.ids)) if table.groups is None else table.groups
    folding = folds >= parts
    why = f"one for each of {folds} folds" if folding else "one each for training, validation, test"
    fewer = ["choose fewer folds with --set task.folds=…, 1 for none"] if folding else []
    if (found := len(set(owners))) < parts:
        raise DataError(
            f"Expected at least {parts} {unit}s in {table.root}, {why}, found {found}; "
            f"{' or '.join([f'add {unit}s', *fewer])}."
        )
    if table.is_multilabel:
        return
    few = []
    for label, name in enumerate(table.names):
        count = len({owners[i] for i in np.flatnonzero(table.targets == label).tolist()})
        if count < parts:
            few.append(f"class {name!r} with {count}")
    if few:
        raise DataError(
            f"Expected at least {parts} {unit}s of every class in {table.root}, {why}, found "
            f"{listed(few)}; {' or '.join(['add images', *fewer, 'leave the class out'])}."
        )


def _check_parts(table: Table, parts: Sequence[Indices], folds: int) -> None:
    """Check that no split is empty, has no example of a class, or no label to score.

    Raises:
        DataError: naming the split.
    """
    cause = "" if table.groups is None else " The groups are too few or too large to be divided."
    advice = f"{cause} Add images, choose other shares, or another {'fold or ' * (folds > 1)}seed."
    for name, part in zip(SPLITS, parts, strict=True):
        if not len(part):
            raise DataError(f"Expected images in the {name} split, found none.{advice}")
        if table.is_multilabel:
            if name != "training" and not table.scored(part):
                raise DataError(
                    f"Expected a label with both 0 and 1 in the {name} split, found none in "
                    f"{len(part)} images.{advice}"
                )
            continue
        if absent := set(range(len(table.names))) - set(table.targets[part].tolist()):
            classes = listed([f"{table.names[label]!r}" for label in sorted(absent)])
            raise DataError(
                f"Expected every class in the {name} split, found none of {classes}.{advice}"
            )


def _unscored(table: Table, parts: Sequence[Indices]) -> list[str]:
    """Say which labels have no AUROC in which split."""
    if not table.is_multilabel:
        return []
    found = []
    for name, part in zip(SPLITS[1:], parts[1:], strict=True):
        scored = table.scored(part)
        if unscored := [label for label in table.names if label not in scored]:
            found.append(f"without AUROC, for lack of 0 or of 1 in {name}: {listed(unscored)}")
    return found


def _kept_apart(primary: Table, held_out: Indices, auxiliary: Table) -> Indices:
    """Return the auxiliary examples that are no held-out image, nor of a held-out group.

    Raises:
        DataError: if there are none.
    """
    places = primary.places()
    images = {places[i] for i in held_out}
    groups = set() if primary.groups is None else {primary.groups[i] for i in held_out}
    kept = [
        i
        for i, place in enumerate(auxiliary.places())
        if place not in images and (auxiliary.groups is None or auxiliary.groups[i] not in groups)
    ]
    if not kept:
        raise DataError(
            "Expected auxiliary images beside the primary's validation and test images and their "
            "groups, found none; choose other auxiliary data."
        )
    return np.array(kept, dtype=np.int64)


def _left_out(count: int) -> list[str]:
    if not count:
        return []
    return [f"{count} auxiliary images left out: they, or their groups, are held out"]


def _digest(lines: Iterable[str]) -> str:
    found = hashlib.sha256()
    for line in lines:
        found.update(f"{line}\n".encode())
    return found.hexdigest()
