"""The reference without any auxiliary data."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gradbench.method import Phase, Plan, Scalarization
from gradbench.step import Step


@dataclass(frozen=True)
class PrimaryOnly(Scalarization):
    r"""Train on the primary objective alone.

    .. math:: d = g_0

    Its first phase has as many steps as that of every other method, and the same fine-tuning
    phase follows, so that a difference to it is the auxiliaries' doing and not the budget's.

    Source: the single-task reference of any comparison.
    Departs from it: nothing.
    """

    absorbs_auxiliary_weight = True  # no auxiliary loss is ever computed in a run

    def weights_from_losses(self, losses: Tensor, step: Step) -> Tensor:
        weights = torch.zeros_like(losses)
        weights[:1] = 1.0  # weights[0] = … copies the number from the host, and waits
        return weights

    def phases(self, plan: Plan) -> tuple[Phase, ...]:
        return (
            Phase("primary", (0,), plan.epochs),
            Phase("fine-tune", (0,), plan.fine_tune_epochs),
        )
