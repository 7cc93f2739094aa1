"""PCGrad in the form that protects the primary."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gradbench.method import TINY, Weighting
from gradbench.step import Step


@dataclass(frozen=True)
class PCGradAsymmetric(Weighting):
    r"""Project the auxiliary gradients off the primary one where they conflict with it.

    .. math:: d = g_0 + \sum_{k > 0} g_k - \frac{\min(0, g_k \cdot g_0)}{\|g_0\|^2} g_0

    The direction never undoes the primary step: :math:`d \cdot g_0 \ge \|g_0\|^2`. Nothing is
    drawn at random, and the order of the auxiliaries does not matter.

    Source: the projection of Yu et al. 2020, arXiv:2001.06782, applied to the auxiliaries only, as
    "PriPCGrad" in the code of ForkMerge (Jiang et al. 2023, arXiv:2301.12618).
    Departs from it: auxiliaries are not projected off each other.
    """

    def weights_from_gramian(self, gramian: Tensor, step: Step) -> Tensor:
        conflict = gramian[0, 1:].clamp(max=0).sum()
        weights = torch.ones_like(gramian[0])
        weights[0] -= conflict / gramian[0, 0].clamp_min(TINY)
        return weights
