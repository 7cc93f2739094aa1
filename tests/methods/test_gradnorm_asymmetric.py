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
from gradbench_methods.gradnorm import LEAST
from gradbench_methods.gradnorm_asymmetric import GradNormAsymmetric

PARAMETERS = 10
HALF = PARAMETERS // 2  # the second half of the parameters is the layer that GradNorm reads
STEPS = 15
ROUND_OFF = 1e-12  # float64, after as many steps of Adam as above


class TestProperties(PermutationInvariant, PositivelyHomogeneous):
    @pytest.fixture
    def make_method(self) -> MakeMethod:
        return GradNormAsymmetric


def batches(objectives: int) -> list[Batch]:
    return [random_batch(index, objectives, PARAMETERS) for index in range(STEPS)]


def weights_of(method: GradNormAsymmetric, steps: list[Batch]) -> Iterator[Tensor]:
    """Yield the weights (K,) of every step, as the heads feel them."""
    loop = LinearLoop(method, len(steps[0].losses), PARAMETERS)
    for batch in steps:
        found = loop.backward(batch.jacobian, batch.losses)
        assert_close(found, loop.head_weights @ batch.jacobian[0], rtol=ROUND_OFF, atol=ROUND_OFF)
        yield loop.head_weights


def with_norms(*norms: float) -> Batch:
    """Return orthogonal gradients with these norms in the layer."""
    back = torch.eye(len(norms), HALF, dtype=torch.float64) * torch.tensor(norms)[:, None]
    return batch_of(torch.cat([torch.zeros_like(back), back], dim=1))


def oracle(steps: list[Batch], alpha: float, lr: float) -> Iterator[Tensor]:
    """The definition, with automatic differentiation and the library's own Adam."""
    objectives = len(steps[0].losses)
    auxiliary = torch.ones(objectives - 1, dtype=torch.float64, requires_grad=True)
    adam = torch.optim.Adam([auxiliary], lr=lr)
    for batch in steps:
        yield torch.cat([torch.ones(1, dtype=torch.float64), auxiliary.detach()])
        norms = [row[HALF:].norm() for row in batch.jacobian[0]]
        ratios = batch.losses / steps[0].losses
        total = torch.zeros((), dtype=torch.float64)
        for k in range(1, objectives):
            rate = ratios[k] / ratios.mean()
            total = total + (auxiliary[k - 1] * norms[k] - norms[0] * rate**alpha).abs()
        adam.zero_grad()
        total.backward()  # type: ignore[no-untyped-call]
        adam.step()
        with torch.no_grad():
            auxiliary.clamp_(min=LEAST)


@pytest.mark.parametrize("objectives", [2, 3, 5])
@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.5])
def test_agrees_with_its_definition_written_out(objectives: int, alpha: float) -> None:
    steps = batches(objectives)
    found = list(weights_of(GradNormAsymmetric(alpha=alpha, lr=0.1), steps))
    expected = list(oracle(steps, alpha, lr=0.1))
    assert_close(found, expected, rtol=ROUND_OFF, atol=ROUND_OFF)


def test_the_first_step_by_hand() -> None:
    loop = LinearLoop(GradNormAsymmetric(lr=0.025), 3, PARAMETERS)
    batch = with_norms(2, 4, 0.5)
    loop.backward(batch.jacobian, batch.losses)
    state = loop.surgery.state
    assert state is not None
    gradient = torch.tensor([0, 4, -0.5], dtype=torch.float64)
    assert_close(state["first_moment"] / (1 - 0.9), gradient)
    assert_close(state["weights"], torch.tensor([1, 0.975, 1.025], dtype=torch.float64))


def test_the_weight_of_the_primary_stays_1() -> None:
    for found in weights_of(GradNormAsymmetric(lr=0.1), batches(4)):
        assert_close(found[0], torch.ones((), dtype=torch.float64), rtol=0, atol=0)


@pytest.mark.parametrize("alpha", [0.0, 1.5])
def test_rests_where_all_norms_are_that_of_the_primary(alpha: float) -> None:
    lr = 0.01
    *_, found = weights_of(GradNormAsymmetric(alpha=alpha, lr=lr), [with_norms(1, 4, 0.5)] * 200)
    expected = torch.tensor([1, 0.25, 2], dtype=torch.float64)
    assert_close(found, expected, rtol=0, atol=2 * lr)  # it swings by its rate


def test_with_alpha_1_rests_at_training_rate_over_norm() -> None:
    lr, ratios = 0.01, torch.tensor([0.5, 1.5, 1.0], dtype=torch.float64)
    first = with_norms(1, 4, 0.5)
    later = batch_of(first.jacobian[0], ratios)
    *_, found = weights_of(GradNormAsymmetric(alpha=1.0, lr=lr), [first] + [later] * 200)
    expected = torch.tensor([1, 1.5 / 4, 1 / 0.5], dtype=torch.float64)
    assert_close(found, expected, rtol=0, atol=2 * lr)


def test_auxiliaries_fade_with_the_primary_gradient_and_stay_positive() -> None:
    *_, found = weights_of(GradNormAsymmetric(lr=0.1), [with_norms(0, 4, 0.5)] * 50)
    assert_close(found, torch.tensor([1, LEAST, LEAST], dtype=torch.float64))


def test_a_learning_rate_of_zero_is_the_plain_sum() -> None:
    for weights in weights_of(GradNormAsymmetric(lr=0.0), batches(3)):
        assert_close(weights, torch.ones(3, dtype=torch.float64))
