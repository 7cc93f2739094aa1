"""PCGrad, the symmetric form."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from gradbench.method import Weighting
from gradbench.step import Step


@dataclass(frozen=True)
class PCGrad(Weighting):
    r"""Project every gradient off the gradients that it conflicts with, then sum.

    .. math::

        h_i \leftarrow g_i, \quad
        h_i \leftarrow h_i - \frac{\min(0, h_i \cdot g_j)}{\|g_j\|^2} g_j
        \ \text{ for } j \ne i \text{ in random order}, \quad d = \sum_i h_i

    Every h is a combination of the g, so its coefficients (K,) are all that is kept. The primary
    is treated like any other objective: with two in conflict both are projected. From three
    objectives on the result depends on the order and may still conflict with one of them.

    Source: Yu et al. 2020, arXiv:2001.06782, Algorithm 1.
    Departs from it: a zero gradient is never projected on. (The public code of the authors draws
    one order a step instead of one an objective; the paper is followed here.)
    """

    host = True  # K(K-1) dependent scalar updates: one copy beats as many kernels

    def weights_from_gramian(self, gramian: Tensor, step: Step) -> Tensor:
        products = gramian.numpy()  # (K, K)
        rows = np.eye(len(products))  # row i holds h_i in terms of the gradients
        for i, row in enumerate(rows):
            for j in step.rng.permutation(len(products)):
                overlap = products[j] @ row
                if j != i and overlap < 0 and products[j, j] > 0:
                    row[j] -= overlap / products[j, j]
        return torch.from_numpy(rows.sum(axis=0))
