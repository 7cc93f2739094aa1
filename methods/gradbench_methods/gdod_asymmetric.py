"""GDOD in the form that protects the primary; built on a reconstruction."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import numpy as np
import torch
from torch import Tensor

from gradbench.fields import Choice, Valid
from gradbench.method import Weighting
from gradbench.step import Step
from gradbench_methods.gdod import decompose


@dataclass(frozen=True)
class GDODAsymmetric(Weighting):
    r"""Keep of each auxiliary gradient the singular directions that do not oppose the primary.

    With the singular directions v of all gradients and the coordinates :math:`C = J V` (K, R),

    .. math:: d = g_0 + \sum_{k > 0} \sum_{r:\, C_{0r} C_{kr} \ge 0} C_{kr} v_r

    The direction never undoes the primary step: :math:`d \cdot g_0 \ge \|g_0\|^2`, up to
    ``tolerance`` times the lengths. Each auxiliary is compared with the primary alone, so there is
    always a direction and nothing to fall back on.

    Source: a variant of our own ("GDOD-A") of a reconstruction of Dong et al. 2022,
    arXiv:2301.13465; see ``gdod``.
    Departs from it: the primary gradient is kept whole; a direction is judged for each auxiliary by
    the primary's sign instead of by the agreement of all; there are no coefficients.
    """

    host = True

    tolerance: Annotated[
        float,
        Valid(0, 0.1),
        "what counts as zero, of the largest singular value and of a gradient's length",
    ] = 1e-6
    normalize: Annotated[
        bool, Choice(False, True), "take the directions from gradients of length one"
    ] = False

    def weights_from_gramian(self, gramian: Tensor, step: Step) -> Tensor:
        found = decompose(gramian.numpy(), self.tolerance, normalize=self.normalize)
        opposed = found.signs[:1] * found.signs[1:] < 0  # (K - 1, R)
        good = np.where(opposed, 0.0, found.coordinates[1:])
        weights = good.sum(axis=0) @ found.directions
        weights[0] += 1
        if len(opposed):
            whole = np.square(found.coordinates[1:]).sum(axis=1)  # (K - 1,)
            share = np.square(good).sum(axis=1) / np.where(whole > 0, whole, 1.0)
            like = step.losses[0]
            step.record(
                good_share=torch.full_like(like, share.mean()),
                bad_share=torch.full_like(like, (whole > 0).mean() - share.mean()),
            )
        return torch.from_numpy(weights)
