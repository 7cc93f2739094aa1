"""GradNorm: weights that even out the lengths of the gradients."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor

from gradbench.fields import Choice, LogUniform, Valid
from gradbench.method import TINY, Setup, State, Weighting
from gradbench.step import Step

FIRST_DECAY, SECOND_DECAY, EPSILON = 0.9, 0.999, 1e-8  # Adam's, as its paper has them
LEAST = 1e-3  # of a weight; below 0 a loss would be maximised, and Adam's steps can lead there


@dataclass(frozen=True)
class GradNorm(Weighting):
    r"""Weigh the losses so that their gradients have the lengths that training rates ask for.

    With :math:`n_i` the norm of :math:`g_i` in the last shared layer, :math:`G_i = w_i n_i`, and
    :math:`r_i` the loss relative to that of the first step, divided by the mean of these ratios,

    .. math::

        d = \sum_i w_i g_i, \qquad
        w \leftarrow \text{Adam}\big(w,\ \operatorname{sign}(G_i - \bar G r_i^\alpha)\, n_i\big),
        \qquad w \leftarrow K w / \textstyle\sum_i w_i

    The second factor is the gradient of :math:`\sum_i |G_i - \bar G r_i^\alpha|` in w, the target
    held fixed. Where all objectives train equally fast the weights rest at
    :math:`w_i \propto 1 / n_i`. The primary is treated like any other objective.

    Source: Chen et al. 2018, arXiv:1711.02257, Algorithm 1.
    Departs from it: the layer's bias counts in its norms; a weight is at least 0.001 before they
    are scaled to the sum K; a first loss of zero waits for the first that is positive, and losses
    below zero count as zero.
    """

    heads = "weighted"
    absorbs_auxiliary_weight = True  # n_i grows with it, and w_i rests at its inverse

    alpha: Annotated[
        float,
        Valid(0, 10),
        Choice(0.0, 0.5, 1.0, 1.5, 3.0),
        "how strongly an objective that trains slowly is pulled along; 0 evens out norms alone",
    ] = 1.5
    lr: Annotated[
        float, Valid(0, 1), LogUniform(1e-3, 0.1), "learning rate of the weights; 0 keeps them at 1"
    ] = 0.025

    def initial_state(self, setup: Setup) -> State:
        return learned_weights(setup)

    def weights_from_gramian(self, gramian: Tensor, step: Step) -> Tensor:
        weights: Tensor = step.state["weights"]
        norms = last_layer_norms(step)
        lengths = weights * norms  # (K,), the G
        target = lengths.mean() * training_rates(step) ** self.alpha
        learned = adam_step(step.state, (lengths - target).sign() * norms, self.lr)
        learned = learned.clamp_min(LEAST)
        step.state["weights"] = learned * (len(learned) / learned.sum())
        step.record(primary_weight=weights[0], least_weight=weights.min())
        return weights


def learned_weights(setup: Setup) -> State:
    """Return the memory of Adam on weights (K,) that start at 1, and of the first losses."""
    zeros = torch.zeros(setup.objectives, dtype=setup.dtype, device=setup.device)
    names = ("first_losses", "first_moment", "second_moment")
    return {"weights": zeros + 1, "updates": 0, **{name: zeros.clone() for name in names}}


def last_layer_norms(step: Step) -> Tensor:
    """Return (K,), the norms of the gradients in the last shared layer with a weight matrix."""
    layer = step.jacobian[:, step.blocks[step.last_weight_block]]
    norms: Tensor = torch.linalg.vector_norm(layer, dim=1)
    return norms


def training_rates(step: Step) -> Tensor:
    """Return (K,), each loss relative to its first one, divided by the mean of these ratios."""
    first: Tensor = step.state["first_losses"]
    losses = step.losses.clamp_min(0)
    first = step.state["first_losses"] = torch.where(first > 0, first, losses)
    ratios = losses / first.clamp_min(TINY)
    rates: Tensor = ratios / ratios.mean().clamp_min(TINY)
    return rates


def adam_step(state: State, gradient: Tensor, lr: float) -> Tensor:
    """Return the weights (K,) one step of Adam on; its moments are kept in ``state``."""
    state["updates"] += 1
    first, second = state["first_moment"], state["second_moment"]
    first = state["first_moment"] = first.lerp(gradient, 1 - FIRST_DECAY)
    second = state["second_moment"] = second.lerp(gradient.square(), 1 - SECOND_DECAY)
    first = first / (1 - FIRST_DECAY ** state["updates"])
    second = second / (1 - SECOND_DECAY ** state["updates"])
    weights: Tensor = state["weights"] - lr * first / (second.sqrt() + EPSILON)
    return weights
