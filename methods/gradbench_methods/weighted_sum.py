"""The plain weighted sum of losses."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gradbench.method import Scalarization
from gradbench.step import Step


@dataclass(frozen=True)
class WeightedSum(Scalarization):
    r"""Sum the losses, those of the auxiliaries times one weight.

    .. math:: d = g_0 + w \sum_{k > 0} g_k

    The weight is ``task.auxiliary_weight``: losses arrive multiplied by it, so the method has no
    field of its own. A head is trained on its own loss times its weight.

    Source: linear scalarization; as a tuned baseline, Kurin et al. 2022, arXiv:2201.04122.
    Departs from it: nothing.
    """

    def weights_from_losses(self, losses: Tensor, step: Step) -> Tensor:
        return torch.ones_like(losses)
