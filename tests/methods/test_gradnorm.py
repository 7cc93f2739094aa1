from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from gradbench.testing import (
    Batch,
    LinearLoop,
    MakeMethod,
    PermutationInvariant,
    PositivelyHomogeneous,
    batch_of,
    random_batch,
)
from gradbench_methods.gradnorm import LEAST, GradNorm

PARAMETERS = 10
HALF = PARAMETERS // 2  # the second half of the parameters is the layer that GradNorm reads
STEPS = 15
ROUND_OFF = 1e-12  # float64, after as many steps of Adam as above


class TestProperties(PermutationInvariant, PositivelyHomogeneous):
    @pytest.fixture
    def make_method(self) -> MakeMethod:
        return GradNorm


def batches(objectives: int, steps: int = STEPS) -> list[Batch]:
    return [random_batch(index, objectives, PARAMETERS) for index in range(steps)]


def weights_of(method: GradNorm, steps: list[Batch]) -> Iterator[Tensor]:
    """Yield the weights (K,) of every step, as the heads feel them."""
    loop = LinearLoop(method, len(steps[0].losses), PARAMETERS)
    for batch in steps:
        found = loop.backward(batch.jacobian, batch.losses)
        assert_close(found, loop.head_weights @ batch.jacobian[0], rtol=ROUND_OFF, atol=ROUND_OFF)
        yield loop.head_weights


def with_norms(*norms: float, rest: float = 0.0) -> Batch:
    """Return orthogonal gradients with these norms in the layer, and ``rest`` in front of it."""
    back = torch.eye(len(norms), HALF, dtype=torch.float64) * torch.tensor(norms)[:, None]
    return batch_of(torch.cat([torch.full_like(back, rest), back], dim=1))


def oracle(steps: list[Batch], alpha: float, lr: float) -> Iterator[Tensor]:
    """Algorithm 1, with automatic differentiation and the library's own Adam."""
    objectives = len(steps[0].losses)
    weights = torch.ones(objectives, dtype=torch.float64, requires_grad=True)
    adam = torch.optim.Adam([weights], lr=lr)
    for batch in steps:
        yield weights.detach().clone()
        layer = batch.jacobian[0, :, HALF:]
        lengths = [(weight * row).norm() for weight, row in zip(weights, layer, strict=True)]
        mean = sum(lengths) / objectives
        ratios = [
            now / first for now, first in zip(batch.losses, steps[0].losses, strict=True)
        ]  # the inverse training rates
        total = torch.zeros((), dtype=torch.float64)
        for length, ratio in zip(lengths, ratios, strict=True):
            target = mean * (ratio / (sum(ratios) / objectives)) ** alpha
            total = total + (length - target.detach()).abs()
        adam.zero_grad()
        total.backward()  # type: ignore[no-untyped-call]
        adam.step()
        with torch.no_grad():
            weights.clamp_(min=LEAST)
            weights.mul_(objectives / weights.sum())


@pytest.mark.parametrize("objectives", [2, 3, 5])
@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.5])
def test_agrees_with_the_paper_written_out(objectives: int, alpha: float) -> None:
    steps = batches(objectives)
    found = list(weights_of(GradNorm(alpha=alpha, lr=0.1), steps))
    expected = list(oracle(steps, alpha, lr=0.1))
    assert_close(found, expected, rtol=ROUND_OFF, atol=ROUND_OFF)


def test_the_first_step_by_hand() -> None:
    loop = LinearLoop(GradNorm(lr=0.025), 3, PARAMETERS)
    batch = with_norms(1, 4, 0.5)  # their mean is 11/6, above the first and the third
    loop.backward(batch.jacobian, batch.losses)
    assert_close(loop.head_weights, torch.ones(3, dtype=torch.float64), rtol=0, atol=0)
    state = loop.surgery.state
    assert state is not None
    gradient = torch.tensor([-1, 4, -0.5], dtype=torch.float64)
    assert_close(state["first_moment"] / (1 - 0.9), gradient)
    moved = torch.tensor([1.025, 0.975, 1.025], dtype=torch.float64)  # Adam first moves by its rate
    assert_close(state["weights"], moved * 3 / 3.025)


@pytest.mark.parametrize("alpha", [0.0, 1.5])
def test_rests_at_the_inverse_of_the_norms_where_all_train_alike(alpha: float) -> None:
    lr = 0.01
    *_, found = weights_of(GradNorm(alpha=alpha, lr=lr), [with_norms(1, 4, 0.5)] * 200)
    inverse = 1 / torch.tensor([1, 4, 0.5], dtype=torch.float64)
    assert_close(found, 3 * inverse / inverse.sum(), rtol=0, atol=2 * lr)  # it swings by its rate


def test_with_alpha_1_rests_at_training_rate_over_norm() -> None:
    lr, ratios = 0.01, torch.tensor([0.5, 1.5, 1.0], dtype=torch.float64)
    first = with_norms(1, 4, 0.5)
    later = batch_of(first.jacobian[0], ratios)
    *_, found = weights_of(GradNorm(alpha=1.0, lr=lr), [first] + [later] * 200)
    inverse = ratios / torch.tensor([1, 4, 0.5], dtype=torch.float64)
    assert_close(found, 3 * inverse / inverse.sum(), rtol=0, atol=2 * lr)


@pytest.mark.parametrize("lr", [0.025, 1.0])
def test_weights_are_positive_and_sum_to_the_number_of_objectives(lr: float) -> None:
    for found in weights_of(GradNorm(lr=lr), batches(4)):
        assert (found > 0).all()
        assert_close(found.sum(), torch.tensor(4.0, dtype=torch.float64))


def test_reads_the_last_layer_alone() -> None:
    plain = weights_of(GradNorm(), [with_norms(1, 4, 0.5)] * 5)
    longer = weights_of(GradNorm(), [with_norms(1, 4, 0.5, rest=7.0)] * 5)
    assert_close(list(longer), list(plain), rtol=0, atol=0)


def test_weights_follow_their_objectives_through_a_permutation() -> None:
    order = torch.tensor([2, 0, 1])
    turned = [batch_of(b.jacobian[0, order], b.losses[order]) for b in batches(3)]
    expected = [weights[order] for weights in weights_of(GradNorm(), batches(3))]
    assert_close(list(weights_of(GradNorm(), turned)), expected, rtol=1e-9, atol=1e-9)


def test_the_length_of_the_gradients_makes_no_difference_to_the_weights() -> None:
    longer = [batch_of(100 * b.jacobian[0], b.losses) for b in batches(3)]
    found, expected = weights_of(GradNorm(), longer), weights_of(GradNorm(), batches(3))
    assert_close(list(found), list(expected), rtol=1e-6, atol=0)  # but for Adam's epsilon, 1e-8


def test_the_first_loss_decides_who_is_behind() -> None:
    longer = with_norms(2, 1).jacobian[0]  # by norms alone the weight of the first has to fall
    for first, falls in (([1.0, 1.0], True), ([0.01, 1.0], False)):
        start = batch_of(longer, torch.tensor(first, dtype=torch.float64))
        *_, found = weights_of(GradNorm(), [start] + [batch_of(longer)] * 20)
        assert (found[0] < found[1]) == falls


def test_a_first_loss_of_zero_waits_for_one_to_compare_with() -> None:
    nothing = batch_of(with_norms(1, 4).jacobian[0], torch.tensor([1.0, 0.0], dtype=torch.float64))
    loop = LinearLoop(GradNorm(), 2, PARAMETERS)
    for batch in (nothing, with_norms(1, 4), nothing):
        assert loop.backward(batch.jacobian, batch.losses).isfinite().all()
    assert loop.surgery.state is not None
    assert_close(loop.surgery.state["first_losses"], torch.ones(2, dtype=torch.float64))


def test_a_learning_rate_of_zero_is_the_plain_sum() -> None:
    for weights in weights_of(GradNorm(lr=0.0), batches(3)):
        assert_close(weights, torch.ones(3, dtype=torch.float64))
