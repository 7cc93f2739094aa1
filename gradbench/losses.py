"""The mean of per-example losses, of which some may have nothing to score."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from gradbench.errors import ContractError


class Scored(NamedTuple):
    """Losses an example, and a weight an example: 0 where there is nothing to score, else 1."""

    losses: Tensor  # (B,)
    weight: Tensor  # (B,)


ExampleLosses = Tensor | Scored


def per_example(losses: ExampleLosses) -> Tensor:
    """Return the losses (B,), zero where there is nothing to score, in float32 at least.

    Raises:
        ContractError: if they are no floating-point vector, or their weights are of another shape.
    """
    values = losses.losses if isinstance(losses, Scored) else losses
    if not isinstance(values, Tensor) or not values.is_floating_point() or values.dim() != 1:
        found = f"a tensor of shape {tuple(values.shape)}" if isinstance(values, Tensor) else values
        raise ContractError(
            f"Expected losses an example, a floating-point tensor (B,), found {found!r}; "
            "use reduction='none' and average over all but the first dimension."
        )
    if values.dtype in (torch.bfloat16, torch.float16):
        values = values.float()  # a sum over a batch needs more digits than these have
    if not isinstance(losses, Scored):
        return values
    if losses.weight.shape != values.shape:
        raise ContractError(
            f"Expected a weight an example, a tensor of shape {tuple(values.shape)}, "
            f"found one of shape {tuple(losses.weight.shape)}."
        )
    weight = losses.weight.to(values.dtype)
    return torch.where(weight > 0, values, 0.0) * weight  # what is not scored may be NaN


def mean_loss(losses: ExampleLosses) -> Tensor:
    """Return the mean over the examples that have something to score, 0 where none has."""
    values = per_example(losses)
    if isinstance(losses, Scored):
        return values.sum() / losses.weight.to(values.dtype).sum().clamp_min(1)
    return values.mean()
