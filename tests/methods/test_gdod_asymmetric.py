from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from gradbench.testing import (
    LinearLoop,
    MakeMethod,
    NonConflicting,
    PermutationInvariant,
    PositivelyHomogeneous,
    direction,
    random_jacobian,
)
from gradbench_methods.gdod_asymmetric import GDODAsymmetric

ROUND_OFF = 1e-9  # the Gramian has the squares of the singular values
SHAPES = [(2, 2), (2, 20), (3, 8), (4, 40), (6, 200)]  # (K, P)


class TestDefault(NonConflicting, PermutationInvariant, PositivelyHomogeneous):
    @pytest.fixture
    def make_method(self) -> MakeMethod:
        return GDODAsymmetric


class TestNormalized(NonConflicting, PermutationInvariant, PositivelyHomogeneous):
    @pytest.fixture
    def make_method(self) -> MakeMethod:
        return lambda: GDODAsymmetric(normalize=True)


def rows(*gradients: list[float]) -> Tensor:
    return torch.tensor(gradients, dtype=torch.float64)


def oracle(jacobian: Tensor, *, normalize: bool = False) -> Tensor:
    basis = jacobian
    if normalize:
        basis = torch.stack([gradient / gradient.norm() for gradient in jacobian])
    _, _, directions = torch.linalg.svd(basis, full_matrices=False)
    found = jacobian[0].clone()
    for auxiliary in jacobian[1:]:
        for v in directions:
            if (jacobian[0] @ v) * (auxiliary @ v) >= 0:
                found += (auxiliary @ v) * v
    return found


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize(("objectives", "parameters"), SHAPES)
def test_agrees_with_the_singular_value_decomposition(
    objectives: int, parameters: int, normalize: bool
) -> None:
    for seed in range(10):
        jacobian = random_jacobian(objectives, parameters, seed=seed)
        jacobian *= 2.0 ** torch.arange(objectives)[:, None]
        found = direction(GDODAsymmetric(normalize=normalize), jacobian)
        expected = oracle(jacobian, normalize=normalize)
        assert_close(found, expected, rtol=ROUND_OFF, atol=ROUND_OFF)


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize(("objectives", "parameters"), SHAPES)
def test_the_primary_step_is_never_undone(
    objectives: int, parameters: int, normalize: bool
) -> None:
    for seed in range(30):
        jacobian = random_jacobian(objectives, parameters, seed=seed)
        primary = jacobian[0]
        found = direction(GDODAsymmetric(normalize=normalize), jacobian)
        assert found @ primary >= (1 - ROUND_OFF) * (primary @ primary)


@pytest.mark.parametrize(
    ("gradients", "expected"),
    [
        (rows([1, 0], [-1, 1]), [1.17082, 0.27639]),  # v is (0.52573, 0.85065), v·g 0.32492
        (rows([3, 4], [3, 4]), [6, 8]),
        (rows([3, 4], [-6, -8]), [3, 4]),
        (rows([1, 0], [0, 2]), [1, 2]),
        (rows([3, 4], [0, 0]), [3, 4]),
        (rows([0, 0], [3, 4]), [3, 4]),  # where the primary has nothing to say
    ],
)
def test_pairs_by_hand(gradients: Tensor, expected: list[float]) -> None:
    assert_close(direction(GDODAsymmetric(), gradients), rows(expected)[0], rtol=0, atol=1e-4)


def test_a_coordinate_of_round_off_opposes_nothing() -> None:
    nearly = rows([1, 1e-8], [0, 2])
    assert_close(direction(GDODAsymmetric(), nearly), nearly.sum(0), rtol=0, atol=1e-7)


def test_shares_of_the_auxiliary_gradient_are_recorded() -> None:
    jacobian = random_jacobian(4, 30)
    loop = LinearLoop(GDODAsymmetric(), 4, 30)
    loop.backward(jacobian)
    shares = loop.surgery.step.diagnostics()
    assert_close(shares["good_share"] + shares["bad_share"], torch.ones_like(shares["bad_share"]))
    one = LinearLoop(GDODAsymmetric(), 2, 2)
    one.backward(rows([3, 4], [-6, -8]))
    assert one.surgery.step.diagnostics()["bad_share"] == 1
