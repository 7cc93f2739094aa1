"""Objectives that many task pairs share."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics import Metric
from torchmetrics.classification import MulticlassAccuracy

from gradbench.model import LinearHead
from gradbench.seeding import ExampleRandom
from gradbench.task import Examples, Objective


class Classification(Objective):
    """One of C classes: a linear head, cross-entropy, accuracy in [0, 1], higher is better."""

    def __init__(
        self, name: str, classes: int, *, margin: float, head_name: str | None = None
    ) -> None:
        self.name, self.classes = name, classes
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
