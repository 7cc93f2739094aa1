"""Objectives that many task pairs share."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics import Metric
from torchmetrics.classification import MulticlassAccuracy
from torchmetrics.functional.classification import binary_auroc

from gradbench.losses import Scored
from gradbench.model import LinearHead
from gradbench.seeding import ExampleRandom
from gradbench.task import Examples, Objective

# Of the photographs of ImageNet, red, green and blue on a scale of 0 to 1: what weights from a hub
# were trained with.
MEAN, SPREAD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Classification(Objective):
    """One of C classes: a linear head, cross-entropy, accuracy in [0, 1], higher is better."""

    exclusive = True

    def __init__(
        self,
        name: str,
        classes: int,
        *,
        margin: float,
        head_name: str | None = None,
        labels: tuple[str, ...] = (),
    ) -> None:
        self.name, self.classes, self.labels = name, classes, labels
        self.margin, self.head_name = margin, head_name

    @abstractmethod
    def batch(self, examples: Examples, random: ExampleRandom | None) -> tuple[Any, Any]:
        """Return the trunk's input and the classes (B,)."""

    def head(self, width: int, dropout: float) -> nn.Module:
        """Return dropout and a linear layer on the pooled features."""
        return LinearHead(width, self.classes, dropout)

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        """Return the cross-entropy (B,) of logits (B, C) with classes (B,)."""
        return nn.functional.cross_entropy(output, target, reduction="none")

    def metrics(self) -> dict[str, Metric]:
        """Return the accuracy over all examples."""
        return {"accuracy": MulticlassAccuracy(self.classes, average="micro")}

    def scores(self, output: Tensor) -> Tensor:
        """Return the class probabilities (B, C), in float32."""
        return output.float().softmax(dim=1)


class MultiLabel(Objective):
    """Any of L labels, each present, absent or unknown: a logit each, binary cross-entropy.

    A target is 1, 0, or NaN where it is not known, which is not scored. The metric is the mean of
    the labels' areas under the ROC curve, in [0, 1], higher is better.
    """

    def __init__(
        self,
        name: str,
        labels: tuple[str, ...],
        *,
        margin: float,
        head_name: str | None = None,
    ) -> None:
        self.name, self.labels = name, labels
        self.margin, self.head_name = margin, head_name

    @abstractmethod
    def batch(self, examples: Examples, random: ExampleRandom | None) -> tuple[Any, Any]:
        """Return the trunk's input and the targets, floating point (B, L)."""

    def head(self, width: int, dropout: float) -> nn.Module:
        """Return dropout and a linear layer on the pooled features."""
        return LinearHead(width, len(self.labels), dropout)

    def loss(self, output: Tensor, target: Tensor) -> Scored:
        """Return the mean of the binary cross-entropies of an example's scored labels (B,).

        An example without any has weight 0.
        """
        is_scored = ~target.isnan()
        losses = nn.functional.binary_cross_entropy_with_logits(
            output.to(target.dtype), target.nan_to_num(), reduction="none"
        )  # (B, L)
        count = is_scored.sum(1)
        mean = (losses * is_scored).sum(1) / count.clamp_min(1)
        return Scored(mean, (count > 0).to(mean.dtype))

    def metrics(self) -> dict[str, Metric]:
        """Return the mean area over the labels, and that of each; one without both classes has none."""
        columns = range(len(self.labels))
        single = {f"auroc {self.labels[i]}": MeanAUROC([i]) for i in columns}
        return {"auroc": MeanAUROC(columns), **single}

    def scores(self, output: Tensor) -> Tensor:
        """Return the probability of each label (B, L), in float32."""
        return output.float().sigmoid()


class MeanAUROC(Metric):
    """The mean over some labels of the area under the ROC curve, in [0, 1], higher is better.

    Entries whose target is NaN are left aside. A label of which only one class is left has no
    area and is no part of the mean; where none has one, the result is NaN.
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False
    score: list[Tensor]
    target: list[Tensor]

    def __init__(self, columns: Sequence[int]) -> None:
        super().__init__()
        self.columns = tuple(columns)
        self.add_state("score", [], dist_reduce_fx="cat")
        self.add_state("target", [], dist_reduce_fx="cat")

    def update(self, score: Tensor, target: Tensor) -> None:
        """Take in scores in [0, 1] and targets, both (B, L)."""
        self.score.append(score)
        self.target.append(target)

    def compute(self) -> Tensor:
        """Return the mean, a scalar."""
        score, target = torch.cat(self.score), torch.cat(self.target)
        areas = []
        for i in self.columns:
            known = ~target[:, i].isnan()
            truth = target[known, i].long()
            if 0 < int(truth.sum()) < len(truth):
                areas.append(binary_auroc(score[known, i], truth))
        return torch.stack(areas).mean() if areas else torch.tensor(torch.nan)


def image_input(
    images: Tensor, random: ExampleRandom | None, *, pixels: int, mirror: bool
) -> Tensor:
    """Return images (B, 3, H, W), uint8, as a trunk is fed: of mean 0 and spread 1, about.

    In training each is moved by up to ``pixels`` and, if ``mirror``, mirrored or not by chance.
    """
    if random is not None:
        images = shift(images, random, pixels)
        images = flip(images, random) if mirror else images
    mean, spread = (torch.tensor(values)[:, None, None] for values in (MEAN, SPREAD))
    return (images / 255 - mean) / spread


def flip(images: Tensor, random: ExampleRandom) -> Tensor:
    """Mirror each image (B, C, H, W) left to right with a probability of one half."""
    turned = torch.from_numpy(random.integers("mirror", 2) == 1)
    return torch.where(turned[:, None, None, None], images.flip(3), images)


def shift(images: Tensor, random: ExampleRandom, pixels: int) -> Tensor:
    """Move each image (B, C, H, W) by up to ``pixels`` along both axes, repeating its edge."""
    moves = [
        torch.from_numpy(random.integers(f"shift {axis}", 2 * pixels + 1) - pixels)
        for axis in ("rows", "columns")
    ]
    height, width = images.shape[-2:]
    rows = (torch.arange(height) + moves[0][:, None]).clamp(0, height - 1)  # (B, H)
    columns = (torch.arange(width) + moves[1][:, None]).clamp(0, width - 1)  # (B, W)
    batch = torch.arange(len(images))[:, None, None]
    moved = images.movedim(1, -1)[batch, rows[:, :, None], columns[:, None, :]]  # (B, H, W, C)
    return moved.movedim(-1, 1).contiguous()
