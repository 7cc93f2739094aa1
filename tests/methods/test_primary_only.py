from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from gradbench.method import Phase, Plan
from gradbench.testing import (
    LinearLoop,
    MakeMethod,
    NonConflicting,
    PermutationInvariant,
    PositivelyHomogeneous,
    direction,
    random_jacobian,
)
from gradbench_methods.primary_only import PrimaryOnly
from gradbench_methods.weighted_sum import WeightedSum

PLAN = Plan(objectives=3, steps_per_epoch=10, epochs=4, fine_tune_epochs=2)


class TestProperties(NonConflicting, PermutationInvariant, PositivelyHomogeneous):
    @pytest.fixture
    def make_method(self) -> MakeMethod:
        return PrimaryOnly


@pytest.mark.parametrize("objectives", [1, 2, 3, 5])
def test_is_the_primary_gradient(objectives: int) -> None:
    jacobian = random_jacobian(objectives, 7)
    assert_close(direction(PrimaryOnly(), jacobian), jacobian[0], rtol=0, atol=0)


def test_a_case_by_hand() -> None:
    jacobian = torch.tensor([[1.0, 0.0], [-1.0, 1.0]], dtype=torch.float64)
    assert_close(direction(PrimaryOnly(), jacobian), torch.tensor([1.0, 0.0]).double())


def test_no_head_of_an_auxiliary_moves() -> None:
    loop = LinearLoop(PrimaryOnly(), 3, 7)
    loop.backward(random_jacobian(3, 7))
    assert_close(loop.head_weights, torch.tensor([1.0, 0.0, 0.0]).double(), rtol=0, atol=0)


def test_no_phase_has_an_auxiliary() -> None:
    assert [phase.objectives for phase in PrimaryOnly().phases(PLAN)] == [(0,), (0,)]


def test_trains_as_long_as_a_joint_method() -> None:
    def lengths(phases: tuple[Phase, ...]) -> list[tuple[int, str]]:
        return [(phase.epochs, phase.select) for phase in phases]

    assert lengths(PrimaryOnly().phases(PLAN)) == lengths(WeightedSum().phases(PLAN))
