"""Metrics and predictions of the primary objective on a split."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from gradbench.errors import DataError, NonFiniteLossError
from gradbench.model import Model
from gradbench.settings import Precision
from gradbench.task import ExampleSet, Objective
from gradbench.training.batches import to_device

BATCH = 256  # examples a forward; no result depends on it beyond round-off


@dataclass(frozen=True)
class Evaluation:
    """What the primary head makes of a split."""

    metrics: dict[str, float]
    ids: Sequence[str]
    targets: Tensor  # (N, …)
    scores: Tensor  # (N, …), float32


def autocast(device: torch.device, precision: Precision) -> torch.autocast:
    """Return the context in which a forward runs at the given precision."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bf16")


def evaluate(
    model: Model,
    objective: Objective,
    examples: ExampleSet,
    device: torch.device,
    precision: Precision,
    split: str = "validation",
    *,
    phase: str = "evaluation",
    step: int = 0,
) -> Evaluation:
    """Score every example of ``split``; the model is left in evaluation mode.

    ``phase`` and ``step`` say what the model was last trained in, for errors. A metric that is NaN
    is not defined on these examples and is left out.

    Raises:
        NonFiniteLossError: if a score is NaN or infinite.
        DataError: if the first metric is not defined on these examples.
    """
    metrics = objective.metrics()
    dtype = torch.float64 if precision == "fp64" else torch.float32
    scores, targets = [], []
    model.eval()
    with torch.inference_mode(), autocast(device, precision):
        for start in range(0, len(examples), BATCH):
            indices = np.arange(start, min(start + BATCH, len(examples)))
            batch = to_device(objective.batch(examples.take(indices), None), device, dtype)
            scores.append(objective.scores(model(batch[0])).float().cpu())
            targets.append(batch[1].cpu())
    score, target = torch.cat(scores), torch.cat(targets)
    if not bool(torch.isfinite(score).all()):
        raise NonFiniteLossError(phase, step, objective.name)
    for metric in metrics.values():
        metric.update(score, target)
    values = {name: float(metric.compute()) for name, metric in metrics.items()}
    first = next(iter(values))
    if math.isnan(values[first]):
        raise DataError(
            f"Expected a {split} split on which {first} of {objective.name!r} is defined, found "
            f"{len(examples)} examples on which it is not; they need other labels, or more."
        )
    found = {name: value for name, value in values.items() if not math.isnan(value)}
    return Evaluation(found, examples.ids, target, score)
