from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from gradbench.testing import (
    LinearLoop,
    MakeMethod,
    PermutationInvariant,
    PositivelyHomogeneous,
    direction,
    random_jacobian,
)
from gradbench_methods.weighted_sum import WeightedSum


def oracle(jacobian: Tensor) -> Tensor:
    found = torch.zeros_like(jacobian[0])
    for row in jacobian:
        found += row
    return found


class TestProperties(PermutationInvariant, PositivelyHomogeneous):
    @pytest.fixture
    def make_method(self) -> MakeMethod:
        return WeightedSum


@pytest.mark.parametrize("objectives", [2, 3, 5])
@pytest.mark.parametrize("seed", range(3))
def test_is_the_sum(objectives: int, seed: int) -> None:
    jacobian = random_jacobian(objectives, 7, seed=seed)
    assert_close(direction(WeightedSum(), jacobian), oracle(jacobian))


def test_a_case_by_hand() -> None:
    jacobian = torch.tensor([[1.0, 0.0], [-1.0, 1.0], [0.5, 0.5]], dtype=torch.float64)
    assert_close(direction(WeightedSum(), jacobian), torch.tensor([0.5, 1.5]).double())


def test_losses_make_no_difference() -> None:
    jacobian = random_jacobian(3, 7)
    large = torch.tensor([1.0, 1e6, 1e-6], dtype=torch.float64)
    found = direction(WeightedSum(), jacobian, losses=large)
    assert_close(found, direction(WeightedSum(), jacobian), rtol=0, atol=0)


def test_a_weight_on_a_loss_is_a_weight_on_its_head_too() -> None:
    loop = LinearLoop(WeightedSum(), 3, 7)
    loop.backward(random_jacobian(3, 7))
    assert_close(loop.head_weights, torch.ones(3).double(), rtol=0, atol=0)
