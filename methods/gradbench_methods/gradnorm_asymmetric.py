"""GradNorm in the form that measures the auxiliaries by the primary."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from torch import Tensor

from gradbench.fields import Choice, LogUniform, Valid
from gradbench.method import Setup, State, Weighting
from gradbench.step import Step
from gradbench_methods.gradnorm import (
    LEAST,
    adam_step,
    last_layer_norms,
    learned_weights,
    training_rates,
)


@dataclass(frozen=True)
class GradNormAsymmetric(Weighting):
    r"""Weigh the auxiliary losses so that their gradients are as long as the primary one.

    With :math:`n_i` the norm of :math:`g_i` in the last shared layer and :math:`r_i` the training
    rates of GradNorm,

    .. math::

        d = g_0 + \sum_{k > 0} w_k g_k, \qquad w_k \leftarrow
        \text{Adam}\big(w_k,\ \operatorname{sign}(w_k n_k - n_0 r_k^\alpha)\, n_k\big)

    The weight of the primary is 1 and stays there; nothing is scaled to a sum. Where all
    objectives train equally fast the weights rest at :math:`w_k = n_0 / n_k`; when the primary is
    learned and its gradient vanishes, so do the auxiliaries.

    Source: a variant of our own of Chen et al. 2018, arXiv:1711.02257, Algorithm 1.
    Departs from it: the primary's weight is not learned; the target is the primary's norm instead
    of the mean; weights are not scaled to the sum K; the layer's bias counts in its norms; a weight
    is at least 0.001; a first loss of zero waits for the first that is positive, and losses below
    zero count as zero.
    """

    heads = "weighted"
    absorbs_auxiliary_weight = True  # n_k grows with it, and w_k rests at its inverse

    alpha: Annotated[
        float,
        Valid(0, 10),
        Choice(0.0, 0.5, 1.0, 1.5, 3.0),
        "how strongly an auxiliary that trains slowly is pulled along; 0 evens out norms alone",
    ] = 1.5
    lr: Annotated[
        float, Valid(0, 1), LogUniform(1e-3, 0.1), "learning rate of the weights; 0 keeps them at 1"
    ] = 0.025

    def initial_state(self, setup: Setup) -> State:
        return learned_weights(setup)

    def weights_from_gramian(self, gramian: Tensor, step: Step) -> Tensor:
        weights: Tensor = step.state["weights"]
        norms = last_layer_norms(step)
        target = norms[0] * training_rates(step) ** self.alpha
        gradient = (weights * norms - target).sign() * norms
        gradient[:1] = 0.0  # gradient[0] = … copies the number from the host, and waits
        step.state["weights"] = adam_step(step.state, gradient, self.lr).clamp_min(LEAST)
        if len(weights) > 1:
            step.record(auxiliary_weight=weights[1:].mean(), least_weight=weights[1:].min())
        return weights
