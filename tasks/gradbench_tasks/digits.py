"""Handwritten digits, five with few labels, five with many."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from gradbench.objectives import Classification, shift
from gradbench.seeding import ExampleRandom
from gradbench.settings import Budget
from gradbench.task import (
    Examples,
    Input,
    Objective,
    Preset,
    Source,
    Splits,
    TaskPair,
    TensorSet,
    draw_by_class,
)

SIZE = 32  # pixels a side, four times that of the scans
SHIFT = 2  # pixels, half of one pixel of the scans
MEAN, SPREAD = 0.305, 0.376  # of all 1,797 scans on a scale of 0 to 1
FULL_SCALE = 16.0  # the scans count the ink in 4×4 fields of a larger bitmap
AUXILIARY_FROM = 5  # digits 0–4 are the primary classes, 5–9 the auxiliary ones


class DigitClassification(Classification):
    """Tell five digits apart, from scans of 8×8 pixels scaled up."""

    def batch(self, examples: Examples, random: ExampleRandom | None) -> tuple[Tensor, Tensor]:
        scans = examples["scan"][:, None] / FULL_SCALE  # (B, 1, 8, 8)
        images = nn.functional.interpolate(scans, size=SIZE, mode="bilinear", align_corners=False)
        if random is not None:
            images = shift(images, random, SHIFT)
        return ((images - MEAN) / SPREAD).expand(-1, 3, -1, -1).contiguous(), examples["label"]


@dataclass(frozen=True)
class Digits(TaskPair):
    """Digits 0–4 from 20 scans a class, beside all scans of 5–9.

    Real images that come with scikit-learn, so the pair needs neither network nor files: 1,797
    scans of 8×8 pixels. The split follows the form of MultiCIFAR100 (Dery et al.
    2021, arXiv:2108.11346): a five-way primary, the other classes as one auxiliary. Training and
    validation examples are drawn with the seed; all other scans of the five digits are the test.
    """

    version = "1.0"
    citation = (
        "E. Alpaydin and C. Kaynak, Optical Recognition of Handwritten Digits, "
        "UCI Machine Learning Repository, 1998, doi:10.24432/C50P49"
    )
    licence = "CC BY 4.0"
    sources: ClassVar[tuple[Source, ...]] = ("real",)
    presets: ClassVar[Mapping[str, Preset]] = {
        "default": Preset(
            backbone="timm:test_vit",
            sizes={"train": 20, "validation": 10},  # examples a class
            budget=Budget(epochs=20, fine_tune_epochs=10, steps_per_epoch=20, batch_size=64),
        )
    }

    @property
    def input(self) -> Input:
        return Input(channels=3, size=SIZE)

    def objectives(self) -> tuple[Objective, ...]:
        return (
            DigitClassification("digits 0–4", AUXILIARY_FROM, margin=0.02),
            DigitClassification("digits 5–9", AUXILIARY_FROM, margin=0.02),
        )

    def splits(self, source: Source, folder: Path, preset: Preset, seed: int) -> Splits:
        bundle = load_digits()
        scans, labels = bundle.images.astype(np.float32), bundle.target.astype(np.int64)
        primary = np.flatnonzero(labels < AUXILIARY_FROM)
        auxiliary = np.flatnonzero(labels >= AUXILIARY_FROM)
        everything = TensorSet(
            ids=[f"scan-{position:04d}" for position in range(len(labels))],
            examples={
                "scan": torch.from_numpy(scans),
                "label": torch.from_numpy(labels % AUXILIARY_FROM),
            },
            strata=labels,
        )
        drawn = draw_by_class(labels[primary], preset.sizes, "test", seed)
        digest = hashlib.sha256(scans.tobytes() + labels.tobytes()).hexdigest()
        return Splits(
            train=everything.subset(primary[drawn["train"]]),
            validation=everything.subset(primary[drawn["validation"]]),
            test=everything.subset(primary[drawn["test"]]),
            auxiliaries=(everything.subset(auxiliary),),
            data_digest=digest,
        )
