from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from gradbench.testing import (
    MakeMethod,
    NonConflicting,
    PermutationInvariant,
    PositivelyHomogeneous,
    direction,
    random_jacobian,
)
from gradbench_methods.pcgrad_asymmetric import PCGradAsymmetric

PARAMETERS = 4


def oracle(jacobian: Tensor) -> Tensor:
    primary = jacobian[0]
    total = primary.clone()
    for auxiliary in jacobian[1:]:
        along = auxiliary @ primary
        if along < 0:
            total += auxiliary - along / (primary @ primary) * primary
        else:
            total += auxiliary
    return total


class TestProperties(NonConflicting, PermutationInvariant, PositivelyHomogeneous):
    @pytest.fixture
    def make_method(self) -> MakeMethod:
        return PCGradAsymmetric


@pytest.mark.parametrize("objectives", [2, 3, 5])
@pytest.mark.parametrize("seed", range(5))
def test_projects_the_auxiliaries_off_the_primary(objectives: int, seed: int) -> None:
    jacobian = random_jacobian(objectives, PARAMETERS, seed=seed)
    assert_close(direction(PCGradAsymmetric(), jacobian), oracle(jacobian))


def test_a_case_by_hand() -> None:
    # (-1, 1) loses what points against (1, 0), (1, 2) keeps what points along it
    jacobian = torch.tensor([[1.0, 0.0], [-1.0, 1.0], [1.0, 2.0]], dtype=torch.float64)
    assert_close(direction(PCGradAsymmetric(), jacobian), torch.tensor([2.0, 3.0]).double())


@pytest.mark.parametrize("objectives", [2, 3, 5])
@pytest.mark.parametrize("seed", range(5))
def test_the_primary_gains_at_least_what_it_gains_alone(objectives: int, seed: int) -> None:
    jacobian = random_jacobian(objectives, PARAMETERS, seed=seed)
    alone = jacobian[0] @ jacobian[0]
    assert direction(PCGradAsymmetric(), jacobian) @ jacobian[0] >= alone * (1 - 1e-12)  # round-off


def test_without_a_conflict_it_is_the_sum() -> None:
    jacobian = random_jacobian(3, PARAMETERS).abs()
    assert_close(direction(PCGradAsymmetric(), jacobian), jacobian.sum(0), rtol=0, atol=0)


def test_an_opposite_auxiliary_leaves_the_primary() -> None:
    primary = random_jacobian(1, PARAMETERS)[0]
    found = direction(PCGradAsymmetric(), torch.stack([primary, -3.0 * primary]))
    assert_close(found, primary)


def test_a_primary_without_gradient_protects_nothing() -> None:
    jacobian = random_jacobian(3, PARAMETERS)
    jacobian[0] = 0.0
    assert_close(direction(PCGradAsymmetric(), jacobian), jacobian.sum(0), rtol=0, atol=0)
