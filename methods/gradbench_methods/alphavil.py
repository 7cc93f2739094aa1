"""αVIL: a branch of the weights for each task, mixed so that the primary gains."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor

from gradbench.branches import Branches
from gradbench.fields import IntUniform, LogUniform, Uniform, Valid
from gradbench.method import TINY, Branching, Setup, State


@dataclass(frozen=True)
class AlphaVIL(Branching):
    r"""Train a branch for each task, mix their changes by what helps the primary, weigh by that.

    From the weights θ at the beginning of an epoch a copy is trained on each task t alone, its
    loss times :math:`w_t`. Of the changes :math:`\delta_t` of the shared parameters

    .. math::

        \theta(\alpha) = \theta + \sum_t \alpha_t \delta_t, \qquad
        \alpha_t \leftarrow \alpha_t - \rho \cos(\delta_t, \nabla L_0(\theta(\alpha)))

    for some steps from :math:`\alpha = 1`, :math:`L_0` the primary loss on held-out examples. The
    epoch ends in :math:`\theta(\alpha)`, each head as its own branch left it, and in
    :math:`w_t \leftarrow \max(floor, w_t + \alpha_t - 1)`. At first :math:`w = 1`.

    A branch takes ``share`` of an epoch's steps, rounded, with one batch each: with 1 all
    branches together see the examples that a joint epoch sees. Each has a new optimizer.

    Source: Kourdis, Gordon-Hall, Gorinski 2024, arXiv:2405.07769.
    Departs from it: this is a RECONSTRUCTION from the abstract and from summaries by others, for
    the full text could not be read and no code is public. That α begins at 1 and that
    :math:`\alpha_t - 1` is added to the weight are from memory; the normalised step, the floor,
    the meta split, the new optimizers and all defaults are ours.
    """

    needs_meta = True
    absorbs_auxiliary_weight = True  # the weights are learned, and begin at 1

    share: Annotated[
        float, Valid(1e-6, 1), Uniform(0.25, 1.0), "of an epoch's steps that each branch takes"
    ] = 1.0
    alpha_steps: Annotated[
        int, Valid(0, 10**4), IntUniform(1, 20), "steps of α an epoch; 0 keeps α and weights at 1"
    ] = 10
    alpha_rate: Annotated[
        float, Valid(0, 10), LogUniform(0.01, 0.1), "most that a step moves an α, the ρ"
    ] = 0.05
    floor: Annotated[float, Valid(0, 1), "least weight of a task; one at 0 stays there"] = 0.0

    def initial_state(self, setup: Setup) -> State:
        return {"weights": torch.ones(setup.objectives, dtype=setup.dtype, device=setup.device)}

    def epoch(self, branches: Branches) -> None:
        weights: Tensor = branches.state["weights"]
        steps = max(1, round(self.share * branches.steps_per_epoch))
        start = branches.vector(branches.start)
        forks = [branches.train(row, steps) for row in weights.diag()]
        deltas = torch.stack([branches.vector(fork) for fork in forks]) - start  # (K, P)
        lengths = torch.linalg.vector_norm(deltas, dim=1)
        alphas = torch.ones_like(weights)
        for _ in range(self.alpha_steps):
            gradient = branches.gradient(branches.at(start + alphas @ deltas, forks))
            products = lengths * torch.linalg.vector_norm(gradient)
            alphas -= self.alpha_rate * (deltas @ gradient) / products.clamp_min(TINY)
        branches.state["weights"] = (weights + alphas - 1).clamp_min(self.floor)
        branches.record(primary_weight=weights[0], least_weight=weights.min())
        branches.commit(branches.at(start + alphas @ deltas, forks))
