"""Optimizer, learning-rate schedule and clipping of one phase."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from gradbench.settings import Budget, Optimizer

CLIP_FLOOR = 1e-6  # as in torch.nn.utils.clip_grad_norm_: keeps a zero gradient at zero


def make_optimizer(
    settings: Optimizer, parameters: Iterable[nn.Parameter]
) -> torch.optim.Optimizer:
    """Return the optimizer; weights decay, norms and biases (one dimension or none) do not."""
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    groups = [
        {"params": [p for p in trained if p.dim() > 1], "weight_decay": settings.weight_decay},
        {"params": [p for p in trained if p.dim() <= 1], "weight_decay": 0.0},
    ]
    fused = all(parameter.device.type in ("cpu", "cuda") for parameter in trained)
    if settings.name == "adamw":
        return torch.optim.AdamW(groups, lr=settings.lr, fused=fused)
    return torch.optim.SGD(groups, lr=settings.lr, momentum=settings.momentum, fused=fused)


def learning_rate(
    settings: Optimizer, budget: Budget, step: int, epochs: int, fine_tuning: bool
) -> float:
    """Return the learning rate of a step, counted from the start of its phase."""
    top = settings.lr * (settings.fine_tune_factor if fine_tuning else 1.0)
    total = epochs * budget.steps_per_epoch
    warm_up = min(settings.warmup_epochs * budget.steps_per_epoch, total - 1)
    if step < warm_up:
        return top * (step + 1) / (warm_up + 1)
    if settings.schedule == "constant":
        return top
    progress = (step - warm_up) / (total - warm_up)
    return top * 0.5 * (1 + math.cos(math.pi * progress))


def clip_shared(direction: Tensor, limit: float) -> None:
    """Shorten the direction (P,) in place to at most ``limit``, without asking how long it is."""
    if limit:
        norm = torch.linalg.vector_norm(direction)
        direction.mul_((limit / (norm + CLIP_FLOOR)).clamp_(max=1.0))


def clip_head(head: nn.Module, limit: float) -> None:
    """Shorten the gradient of one head to at most ``limit``."""
    parameters = list(head.parameters())  # none where objectives share a head
    if limit and parameters:
        nn.utils.clip_grad_norm_(parameters, limit)
