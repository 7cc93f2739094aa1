"""GDOD: keep the directions in which all gradients point the same way; a reconstruction."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gradbench.fields import Choice, Valid
from gradbench.method import Weighting
from gradbench.step import Step

Matrix = NDArray[np.float64]


@dataclass(frozen=True)
class GDOD(Weighting):
    r"""Sum what the gradients have along the singular directions on whose sign all agree.

    With the singular value decomposition :math:`J = U S V^\top` and the coordinates
    :math:`C = J V` (K, R), direction r is *shared* where all :math:`C_{ir} \ge 0` or all
    :math:`C_{ir} \le 0`, and else in *conflict*:

    .. math::

        s_i = \sum_{r\ \text{shared}} C_{ir} v_r, \quad c_i = g_i - s_i, \quad
        d = \sum_i \kappa_{shared} s_i + \kappa_{conflict} c_i

    All of it is a function of the Gramian :math:`J J^\top = U S^2 U^\top`. With the default
    coefficients 1, 0 no objective gets worse to first order wherever a direction is shared. The
    rows of U are orthogonal, so there is seldom more than one, and from three objectives on there
    may be none; then, if nothing is kept of the conflict, ``fallback`` says what is done.

    Source: a reconstruction from the abstract and summaries of Dong et al. 2022, arXiv:2301.13465.
    Departs from it: unknown. Assumed are the sign rule, the coefficients, a single decomposition of
    all shared parameters, the tolerance, the fallback and the normalisation.
    """

    host = True

    tolerance: Annotated[
        float,
        Valid(0, 0.1),
        "what counts as zero, of the largest singular value and of a gradient's length",
    ] = 1e-6
    shared: Annotated[float, Valid(0, 100), "weight of the parts on which all agree"] = 1.0
    conflict: Annotated[
        float, Valid(-100, 100), Choice(0.0, 0.1, 0.3), "weight of all other parts"
    ] = 0.0
    normalize: Annotated[
        bool, Choice(False, True), "take the directions from gradients of length one"
    ] = False
    fallback: Annotated[
        Literal["sum", "primary", "skip"],
        "direction where none is shared and conflict is 0: the sum, the primary gradient or zero",
    ] = "sum"

    def weights_from_gramian(self, gramian: Tensor, step: Step) -> Tensor:
        found = decompose(gramian.numpy(), self.tolerance, normalize=self.normalize)
        signs = found.signs
        agreed = (signs >= 0).all(axis=0) | (signs <= 0).all(axis=0)  # (R,)
        lost = not agreed.any() and self.conflict == 0
        if lost:
            weights = self._fall_back(len(gramian))
        else:
            kept = found.coordinates.sum(axis=0) * agreed  # (R,)
            weights = self.conflict + (self.shared - self.conflict) * (kept @ found.directions)
        step.record(fallback_rate=torch.full_like(step.losses[0], float(lost)))
        return torch.from_numpy(weights)

    def _fall_back(self, objectives: int) -> Matrix:
        weights = np.zeros(objectives)
        weights[{"sum": slice(None), "primary": slice(1), "skip": slice(0)}[self.fallback]] = 1.0
        return weights


class Decomposition(NamedTuple):
    """The gradients along R orthonormal directions of their span."""

    coordinates: Matrix  # (K, R), of each gradient in each direction
    directions: Matrix  # (R, K), each as a combination of the gradients
    signs: Matrix  # (K, R), -1, 0 or 1; 0 for a coordinate within the tolerance


def decompose(gramian: Matrix, tolerance: float, *, normalize: bool) -> Decomposition:
    """Return the gradients along the singular directions of theirs, or of their unit vectors.

    The coordinates are those of the gradients as they are, also where the directions come from
    unit vectors. A direction is left out whose singular value is within ``tolerance`` of the
    largest one's; a coordinate is zero within ``tolerance`` of its gradient's length.
    """
    lengths = np.sqrt(gramian.diagonal())
    units = np.where(lengths > 0, lengths, 1.0) if normalize else np.ones_like(lengths)
    values, vectors = np.linalg.eigh(gramian / np.outer(units, units))  # ascending
    kept = (values > 0) & (values > tolerance**2 * values[-1])
    singular, vectors = np.sqrt(values[kept]), vectors[:, kept]
    coordinates = units[:, None] * vectors * singular
    zero = np.abs(coordinates) <= tolerance * lengths[:, None]
    return Decomposition(
        coordinates,
        directions=(vectors / singular / units[:, None]).T,
        signs=np.where(zero, 0.0, np.sign(coordinates)),
    )
