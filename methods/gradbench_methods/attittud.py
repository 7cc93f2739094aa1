"""ATTITTUD: the auxiliary gradient in the light of the primary examples' own gradients."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from torch import Tensor

from gradbench.fields import Choice, IntUniform, LogUniform, Valid
from gradbench.linalg import orthonormal_rows, right_singular_rows
from gradbench.method import TINY, Aggregation
from gradbench.step import BatchNorm, Step

Basis = Literal["svd", "gram_schmidt", "random", "canonical", "mean", "primary"]


@dataclass(frozen=True)
class ATTITTUD(Aggregation):
    r"""Split each auxiliary gradient by a subspace of primary gradients, weigh the parts.

    The rows of V (R, P) are an orthonormal basis of combinations :math:`\Omega J` of the
    gradients of m primary examples. With :math:`p = V g_0` and :math:`a = V g_k`,

    .. math::

        g_k^+ = \sum_{c:\, a_c p_c \ge 0} a_c v_c, \quad
        g_k^- = \sum_{c:\, a_c p_c < 0} a_c v_c, \quad
        g_k^\perp = g_k - g_k^+ - g_k^-

        d = \eta_{primary} g_0
            + \sum_{k > 0} \eta_{good} g_k^+ + \eta_{bad} g_k^- + \eta_{neutral} g_k^\perp

    The default weights 1, -1, 1 turn what hurts the primary around and keep the rest: the setting
    of the paper's best MultiCIFAR100 result, and of its public CheXpert command.

    Source: Dery, Dauphin, Grangier 2021, arXiv:2108.11346, Algorithm 1.
    Departs from it: several auxiliaries are decomposed one by one; ``svd`` takes the singular
    vectors of the sketch, for those of J itself would need R further passes; p comes from the
    batch of the step instead of from J; heads get their own objective's gradient. See the method
    page for the public code's own departures.
    """

    rebuildable = frozenset({"basis"})
    joint_search: ClassVar[Mapping[str, Choice]] = {
        "eta": Choice(
            {"eta_good": 1.0, "eta_bad": -1.0, "eta_neutral": 1.0},
            {"eta_good": 1.0, "eta_bad": 0.0, "eta_neutral": 1.0},
            {"eta_good": 0.0, "eta_bad": -1.0, "eta_neutral": 1.0},
            {"eta_good": 0.0, "eta_bad": 0.0, "eta_neutral": 1.0},
        )
    }

    rank: Annotated[int, Valid(1, 4096), IntUniform(1, 20), "rows R of the basis"] = 10
    samples: Annotated[int, Valid(1, 65536), "primary examples m behind the basis"] = 32
    refresh_every: Annotated[
        int, Valid(1), "steps between two bases, from the first step of each epoch"
    ] = 10
    eta_good: Annotated[float, Valid(-100, 100), "weight of the part that helps"] = 1.0
    eta_bad: Annotated[float, Valid(-100, 100), "weight of the part that hurts"] = -1.0
    eta_neutral: Annotated[float, Valid(-100, 100), "weight of the part outside the basis"] = 1.0
    eta_primary: Annotated[
        float, Valid(0, 100), LogUniform(0.01, 1.0), "weight of the primary gradient"
    ] = 1.0
    basis: Annotated[Basis, "how the rows of V are made"] = "svd"
    anchor_probe: Annotated[bool, "make the mean primary gradient the first probe"] = False
    batch_norm: Annotated[
        BatchNorm, "statistics that batch norm uses for the basis: of the samples, or running"
    ] = "batch"

    def combine(self, jacobian: Tensor, step: Step, out: Tensor) -> None:
        basis = self._current_basis(jacobian, step)  # (R, P)
        inside = jacobian @ basis.T  # (K, R)
        primary, auxiliary = inside[0], inside[1:]
        good = torch.where(auxiliary * primary >= 0, auxiliary, 0.0)
        bad = auxiliary - good
        weights = torch.full_like(step.losses, self.eta_neutral)
        weights[:1] = self.eta_primary  # weights[0] = … copies the number from the host, and waits
        turned = (self.eta_good - self.eta_neutral) * good + (self.eta_bad - self.eta_neutral) * bad
        torch.mv(jacobian.T, weights, out=out)
        out.addmv_(basis.T, turned.sum(0))
        self._record(jacobian, primary, good, bad, step)

    def _record(
        self, jacobian: Tensor, primary: Tensor, good: Tensor, bad: Tensor, step: Step
    ) -> None:
        energy = torch.linalg.vector_norm(jacobian, dim=1).square().clamp_min(TINY)  # (K,)
        step.record(captured_energy=primary.square().sum() / energy[0])
        if len(energy) > 1:
            good_share = (good.square().sum(1) / energy[1:]).mean()
            bad_share = (bad.square().sum(1) / energy[1:]).mean()
            neutral_share = 1 - good_share - bad_share
            step.record(good_share=good_share, bad_share=bad_share, neutral_share=neutral_share)

    def _current_basis(self, jacobian: Tensor, step: Step) -> Tensor:
        if self.basis == "primary":
            length = torch.linalg.vector_norm(jacobian[:1], dim=1, keepdim=True)
            unit: Tensor = jacobian[:1] / length.clamp_min(TINY)
            return unit
        if "basis" not in step.state or step.index_in_epoch % self.refresh_every == 0:
            step.state["basis"] = self._new_basis(jacobian, step)
        basis: Tensor = step.state["basis"]
        return basis

    def _new_basis(self, jacobian: Tensor, step: Step) -> Tensor:
        if self.basis == "random":
            return orthonormal_rows(self._gaussian(jacobian, step, self.rank, jacobian.shape[1]))
        if self.basis == "canonical":
            rows = jacobian.new_zeros(self.rank, jacobian.shape[1])
            axes = torch.randint(
                rows.shape[1], (self.rank, 1), generator=step.generator, device=rows.device
            )
            return orthonormal_rows(rows.scatter_(1, axes, 1.0))  # an axis drawn twice counts once
        probes = step.sketch(
            lambda m: self._probes(jacobian, step, m),
            samples=self.samples,
            batch_norm=self.batch_norm,
        )
        return right_singular_rows(probes) if self.basis == "svd" else orthonormal_rows(probes)

    def _probes(self, like: Tensor, step: Step, m: int) -> Tensor:
        """Return Ω (R, m)."""
        if self.basis == "mean":
            return like.new_full((1, m), 1 / m)
        probes = self._gaussian(like, step, min(self.rank, m), m)
        if self.anchor_probe:
            probes[0] = 1.0
        return probes

    def _gaussian(self, like: Tensor, step: Step, rows: int, columns: int) -> Tensor:
        return torch.randn(
            rows, columns, generator=step.generator, dtype=like.dtype, device=like.device
        )
