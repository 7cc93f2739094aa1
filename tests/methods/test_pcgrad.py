from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from gradbench import seeding
from gradbench.testing import (
    LinearLoop,
    MakeMethod,
    PositivelyHomogeneous,
    direction,
    random_jacobian,
)
from gradbench_methods.pcgrad import PCGrad

PARAMETERS = 4  # few, so that gradients conflict after other projections too


def oracle(jacobian: Tensor, *, seed: int = 0, index: int = 0) -> Tensor:
    """Algorithm 1 on the gradients themselves; an order an objective, the objectives in turn."""
    name = LinearLoop(PCGrad(), 1, 1).surgery.name
    rng = seeding.rng(seed, "method", name, index)
    total = torch.zeros_like(jacobian[0])
    for i in range(len(jacobian)):
        projected = jacobian[i].clone()
        for j in rng.permutation(len(jacobian)):
            other = jacobian[int(j)]  # as it was before any projection
            if j != i and projected @ other < 0:
                projected = projected - (projected @ other) / (other @ other) * other
        total += projected
    return total


def pair(angle: float, first: float = 1.0, second: float = 1.0) -> Tensor:
    """Return two gradients of the given lengths at an angle."""
    return torch.tensor(
        [[first, 0.0], [second * math.cos(angle), second * math.sin(angle)]], dtype=torch.float64
    )


class TestProperties(PositivelyHomogeneous):
    @pytest.fixture
    def make_method(self) -> MakeMethod:
        return PCGrad


@pytest.mark.parametrize("objectives", [2, 3, 5])
@pytest.mark.parametrize("seed", range(5))
def test_follows_the_algorithm(objectives: int, seed: int) -> None:
    jacobian = random_jacobian(objectives, PARAMETERS, seed=seed)
    for index in range(3):
        found = direction(PCGrad(), jacobian, seed=seed, index=index)
        assert_close(found, oracle(jacobian, seed=seed, index=index))


def test_the_order_is_drawn_anew_in_every_step_and_matters() -> None:
    jacobian = random_jacobian(5, PARAMETERS)
    found = torch.stack([direction(PCGrad(), jacobian, index=index) for index in range(8)])
    assert not torch.equal(found, found[:1].expand_as(found))


def test_a_case_by_hand() -> None:
    # (1, 0) loses its half along (-1, 1), which in turn loses all that points along (1, 0)
    jacobian = torch.tensor([[1.0, 0.0], [-1.0, 1.0]], dtype=torch.float64)
    assert_close(direction(PCGrad(), jacobian), torch.tensor([0.5, 1.5]).double())


@pytest.mark.parametrize("angle", [1.7, 2.2, 3.0])
@pytest.mark.parametrize("length", [0.1, 1.0, 10.0])
def test_two_in_conflict_gain_their_length_times_the_sine_squared(
    angle: float, length: float
) -> None:
    jacobian = pair(angle, second=length)
    gains = jacobian @ direction(PCGrad(), jacobian)
    assert_close(gains, jacobian.square().sum(1) * math.sin(angle) ** 2)


@pytest.mark.parametrize("angle", [0.0, 0.5, math.pi / 2 - 1e-9])
def test_without_a_conflict_it_is_the_sum(angle: float) -> None:
    jacobian = pair(angle, second=3.0)
    assert_close(direction(PCGrad(), jacobian), jacobian.sum(0), rtol=0, atol=0)


@pytest.mark.parametrize("length", [0.1, 1.0, 10.0])
def test_two_opposite_gradients_cancel(length: float) -> None:
    first = random_jacobian(1, PARAMETERS)[0]
    found = direction(PCGrad(), torch.stack([first, -length * first]))
    assert_close(found, torch.zeros_like(first))


def test_a_zero_gradient_changes_nothing() -> None:
    jacobian = pair(2.5)
    padded = torch.cat([jacobian, torch.zeros(1, 2).double()])
    assert_close(direction(PCGrad(), padded), direction(PCGrad(), jacobian))


def test_a_gradient_whose_square_is_zero_is_not_projected_on() -> None:
    jacobian = torch.tensor([[1.0, 0.0], [-1e-25, 1e-25]])  # float32: overlap -1e-25, square 0
    assert_close(direction(PCGrad(), jacobian), torch.tensor([1.0, 1e-25]), rtol=1e-6, atol=0)


def test_two_objectives_are_treated_alike() -> None:
    jacobian = pair(2.0, second=3.0)
    assert_close(direction(PCGrad(), jacobian), direction(PCGrad(), jacobian.flip(0)))


def test_heads_get_their_own_gradients() -> None:
    loop = LinearLoop(PCGrad(), 2, 2)
    loop.backward(pair(2.5))
    assert_close(loop.head_weights, torch.ones(2).double(), rtol=0, atol=0)
