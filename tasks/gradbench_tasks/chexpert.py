"""Chest films with little data, beside small pictures with plenty."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from gradbench.data.images import ImageFiles, image_tree, listed
from gradbench.errors import DataError
from gradbench.fields import Location, Valid
from gradbench.objectives import Classification, MultiLabel, image_input
from gradbench.seeding import ExampleRandom
from gradbench.settings import Budget, Optimizer
from gradbench.task import (
    Examples,
    Input,
    Objective,
    Preset,
    Source,
    Splits,
    TaskPair,
)
from gradbench_tasks._chexpert_sample import draw_films, draw_pictures
from gradbench_tasks._chexpert_table import (
    LABELS,
    UNCERTAIN,
    Films,
    draw_patients,
    read_films,
)

RELEASES = ("CheXpert-v1.0-small", "CheXpert-v1.0")  # the first that is there is used
PICTURES = ("tiny-imagenet-200", "auxiliary")  # likewise
SHIFT = 1 / 32  # of the side, how far a training image is moved at most
MARGIN = 0.01  # of AUROC: what the paper's five runs leave undecided (half-widths 0.007 to 0.013)

POLICIES = {"ones": 1.0, "zeros": 0.0, "ignore": np.nan}  # what an uncertain label counts as


class Findings(MultiLabel):
    """Find the labels of the CheXpert competition on a film; left and right stay what they are."""

    def __init__(self, size: int) -> None:
        super().__init__("findings", LABELS, margin=MARGIN)
        self.size = size

    def batch(self, examples: Examples, random: ExampleRandom | None) -> tuple[Tensor, Tensor]:
        pixels = round(self.size * SHIFT)
        films = image_input(examples["image"], random, pixels=pixels, mirror=False)
        return films, examples["target"]


class Pictures(Classification):
    """Tell classes of small pictures apart."""

    def __init__(self, classes: int, size: int) -> None:
        super().__init__("pictures", classes, margin=MARGIN)
        self.size = size

    def batch(self, examples: Examples, random: ExampleRandom | None) -> tuple[Tensor, Tensor]:
        pixels = round(self.size * SHIFT)
        images = image_input(examples["image"], random, pixels=pixels, mirror=True)
        return images, examples["target"]


@dataclass(frozen=True)
class CheXpert(TaskPair):
    """Five findings on chest films of few patients, beside the classes of Tiny-ImageNet.

    CheXpert-5k of Dery, Dauphin, Grangier 2021, arXiv:2108.11346, with splits by patient: training
    and validation films are drawn with the seed from the training patients of the release, the
    test is the official validation set, which radiologists have read. The metric is the mean AUROC
    of the five labels of the competition.
    """

    version = "1.0"
    citation = (
        "J. Irvin et al., CheXpert: A Large Chest Radiograph Dataset with Uncertainty Labels and "
        "Expert Comparison, AAAI 2019, arXiv:1901.07031"
    )
    licence = (
        "Stanford University Dataset Research Use Agreement (films, not to be passed on); "
        "ImageNet's terms of access (pictures); Apache-2.0 (the drawn sample)"
    )
    presets: ClassVar[Mapping[str, Preset]] = {
        "default": Preset(
            backbone="timm:test_vit",
            sizes={"train": 400, "validation": 100},  # films
            budget=Budget(epochs=20, fine_tune_epochs=10, steps_per_epoch=16, batch_size=64),
        ),
        "paper": Preset(
            backbone="timm:resnet18",
            sizes={"train": 5000, "validation": 100},
            # an epoch goes once through the films
            budget=Budget(epochs=100, fine_tune_epochs=100, steps_per_epoch=78, batch_size=64),
            optimizer=Optimizer(lr=1e-4, weight_decay=0.0, warmup_epochs=0.0, schedule="constant"),
            settings={"task.size": 224, "task.views": "all", "model.dropout": 0.2},
        ),
    }

    u_policy: Annotated[
        Literal["ones", "zeros", "ignore"],
        "what an uncertain label (-1) counts as; ignore: nothing",
    ] = "ones"
    views: Annotated[Literal["frontal", "all"], "which films are used, of all splits"] = "frontal"
    size: Annotated[int, Valid(16, 1024), "pixels a side that images are scaled to"] = 64
    auxiliary_classes: Annotated[
        int, Valid(2, 100_000), "outputs of the auxiliary head; no fewer than there are classes"
    ] = 200
    films: Annotated[str, Location(), "folder of the release, if it is elsewhere"] = ""
    auxiliary: Annotated[str, Location(), "folder of class folders of pictures, if elsewhere"] = ""

    @property
    def input(self) -> Input:
        return Input(channels=3, size=self.size)

    def objectives(self) -> tuple[Objective, ...]:
        return Findings(self.size), Pictures(self.auxiliary_classes, self.size)

    def missing(self, folder: Path) -> str | None:
        films, pictures = self._places("real", folder)
        wanted = [
            (films / "train.csv", films.joinpath("train.csv").is_file()),
            (films / "valid.csv", films.joinpath("valid.csv").is_file()),
            (films / "train", films.joinpath("train").is_dir()),
            (pictures, pictures.is_dir()),
        ]
        absent = [
            str(path.relative_to(folder) if path.is_relative_to(folder) else path)
            for path, is_there in wanted
            if not is_there
        ]
        if not absent:
            return None
        return (
            f"Missing in {folder}: {listed(absent)}. Films: request access to {RELEASES[0]} from "
            "the Stanford AIMI Center's shared datasets, unpack it there, in a folder of that "
            "name, or say --set task.films=FOLDER. Pictures: unpack tiny-imagenet-200.zip, of "
            "Stanford's course CS231n, there, or say --set task.auxiliary=FOLDER for any folder "
            "of class folders."
        )

    def draw_sample(self, folder: Path) -> None:
        draw_films(folder / RELEASES[0])
        draw_pictures(folder / PICTURES[0])

    def read(self, files: Sequence[Path]) -> ImageFiles:
        unknown = torch.full((len(files), len(LABELS)), torch.nan)
        return ImageFiles([str(file) for file in files], files, {"target": unknown}, size=self.size)

    def splits(self, source: Source, folder: Path, preset: Preset, seed: int) -> Splits:
        root, pictures = self._places(source, folder)
        table, test = (read_films(root / f"{split}.csv", split) for split in ("train", "valid"))
        held_out = set(test.patients)
        table, test = (films.of_views(self.views) for films in (table, test))
        drawn = draw_patients(table, held_out, preset.sizes, seed)
        parts = {name: table.subset(indices) for name, indices in drawn.items()}
        classes, paths, targets = image_tree(pictures)
        if len(classes) > self.auxiliary_classes:
            raise DataError(
                f"Expected at most {self.auxiliary_classes} classes in {pictures}, found "
                f"{len(classes)}; say --set task.auxiliary_classes={len(classes)}."
            )
        ids = [path.relative_to(pictures).as_posix() for path in paths]
        seen = [root / path for part in parts.values() for path in part.ids]
        return Splits(
            train=self._examples(root, parts["train"]),
            validation=self._examples(root, parts["validation"]),
            test=self._examples(root, test),
            auxiliaries=(
                ImageFiles(
                    [f"auxiliary/{path}" for path in ids],
                    paths,
                    {"target": torch.from_numpy(targets)},
                    size=self.size,
                    strata=targets,
                ),
            ),
            data_digest=_digest(
                *((root / f"{split}.csv").read_bytes() for split in ("train", "valid")),
                *(
                    f"{each} {path.stat().st_size}".encode()
                    for each, path in zip(ids, paths, strict=True)
                ),
            ),
            files_digest=_digest(*map(_content, seen)),
            notes=(*self._notes(source, parts["train"]),),
        )

    def _places(self, source: Source, folder: Path) -> tuple[Path, Path]:
        """Return the folder of ``train.csv`` and that of the pictures' class folders."""
        is_elsewhere = source == "real" and bool(self.films.strip())
        films = Path(self.films).expanduser() if is_elsewhere else folder
        if not (films / "train.csv").is_file():
            films = _first([films / name for name in RELEASES])
        if source == "real" and self.auxiliary.strip():
            pictures = Path(self.auxiliary).expanduser()
        else:
            pictures = _first([folder / name for name in PICTURES])
        is_tiny_imagenet = pictures.name == PICTURES[0] or (pictures / "wnids.txt").is_file()
        return films, pictures / "train" if is_tiny_imagenet else pictures

    def _examples(self, root: Path, part: Films) -> ImageFiles:
        targets = np.where(part.labels == UNCERTAIN, POLICIES[self.u_policy], part.labels)
        return ImageFiles(
            part.ids,
            [root / path for path in part.ids],
            {"target": torch.from_numpy(targets.astype(np.float32))},
            size=self.size,
        )

    def _notes(self, source: Source, train: Films) -> Iterable[str]:
        count = int((train.labels == UNCERTAIN).sum())
        meaning = "left out" if self.u_policy == "ignore" else f"taken as {self.u_policy}"
        yield f"{len(set(train.patients))} patients, {count} uncertain training labels {meaning}"
        if source == "sample" and (self.films or self.auxiliary):
            yield "task.films and task.auxiliary are not used: the sample has its own"


def _first(places: Sequence[Path]) -> Path:
    return next((place for place in places if place.is_dir()), places[0])


def _content(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b"can not be read"  # who decodes it says so, of all such files at once


def _digest(*parts: bytes) -> str:
    found = hashlib.sha256()
    for part in parts:
        found.update(hashlib.sha256(part).digest())
    return found.hexdigest()
