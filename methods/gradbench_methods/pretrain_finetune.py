"""The reference that trains on the auxiliary data first, then on the primary."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gradbench.errors import FieldError
from gradbench.method import Phase, Plan, Scalarization
from gradbench.step import Step


@dataclass(frozen=True)
class PretrainFinetune(Scalarization):
    r"""Train on the auxiliary objectives alone, then on the primary alone.

    .. math:: d = \sum_{k > 0} g_k \ \text{in the first phase}, \quad d = g_0 \ \text{in the second}

    Each phase has as many steps as that of every other method, so the primary is trained in the
    second one only, which needs an epoch at least. It starts from the last state of the first:
    no primary example decides when pre-training ends. Without phases, in a training loop of one's
    own, this is the plain sum.

    Source: "post-train" of Jiang et al. 2023, arXiv:2301.12618; "pre-training" of Dery et al. 2021,
    arXiv:2108.11346.
    Departs from it: the first phase leaves the primary out (that of post-train trains on all
    objectives); both phases have the lengths of this benchmark.
    """

    absorbs_auxiliary_weight = True  # in the first phase there is nothing to weigh against

    def weights_from_losses(self, losses: Tensor, step: Step) -> Tensor:
        return torch.ones_like(losses)

    def phases(self, plan: Plan) -> tuple[Phase, ...]:
        if not plan.fine_tune_epochs:
            raise FieldError(
                "Expected budget.fine_tune_epochs of at least 1 with a method that trains on the "
                "primary in its second phase alone, found 0; raise it, or take another method."
            )
        auxiliaries = tuple(range(1, plan.objectives))
        return (
            Phase("pretrain", auxiliaries, plan.epochs, select="last"),
            Phase("fine-tune", (0,), plan.fine_tune_epochs),
        )
