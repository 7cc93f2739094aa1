"""Metrics and predictions of the primary objective on a split."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from gradbench.errors import NonFiniteLossError
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
) -> Evaluation:
    """Score every example of a split; the model is left in evaluation mode.

    Raises:
        NonFiniteLossError: if a score is NaN or infinite.
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
        raise NonFiniteLossError("evaluation", 0, objective.name)
    found = {}
    for name, metric in metrics.items():
        metric.update(score, target)
        found[name] = float(metric.compute())
    return Evaluation(found, examples.ids, target, score)
