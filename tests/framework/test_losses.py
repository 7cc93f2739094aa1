from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from gradbench.errors import ContractError
from gradbench.losses import Scored, mean_loss, per_example

VALUES = torch.tensor([1.0, 2.0, 4.0, 9.0])


def equal(found: Tensor, expected: Tensor | float) -> None:
    torch.testing.assert_close(found, torch.as_tensor(expected), rtol=0, atol=0)


def test_mean_is_over_all_examples() -> None:
    equal(mean_loss(VALUES), 4.0)
    equal(per_example(VALUES), VALUES)


def test_mean_is_over_the_examples_with_something_to_score() -> None:
    losses = Scored(VALUES, torch.tensor([1.0, 0.0, 1.0, 0.0]))
    equal(mean_loss(losses), 2.5)
    equal(per_example(losses), torch.tensor([1.0, 0.0, 4.0, 0.0]))


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float32])
def test_weights_may_be_of_any_type(dtype: torch.dtype) -> None:
    losses = Scored(VALUES, torch.tensor([1, 0, 1, 0]).to(dtype))
    equal(mean_loss(losses), 2.5)


def test_nothing_to_score_is_zero_with_a_zero_gradient() -> None:
    values = VALUES.clone().requires_grad_()
    loss = mean_loss(Scored(values, torch.zeros(4)))
    equal(loss.detach(), 0.0)
    (gradient,) = torch.autograd.grad(loss, values)
    equal(gradient, torch.zeros(4))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_scored_may_be_anything(bad: float) -> None:
    values = torch.tensor([1.0, bad, 3.0], requires_grad=True)
    losses = Scored(values, torch.tensor([1.0, 0.0, 1.0]))
    equal(per_example(losses).detach(), torch.tensor([1.0, 0.0, 3.0]))
    (gradient,) = torch.autograd.grad(mean_loss(losses), values)
    equal(gradient, torch.tensor([0.5, 0.0, 0.5]))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_scored_is_not_hidden(bad: float) -> None:
    losses = torch.tensor([1.0, bad])
    assert not bool(mean_loss(losses).isfinite())
    assert not bool(mean_loss(Scored(losses, torch.ones(2))).isfinite())


def test_gradient_is_that_of_the_mean() -> None:
    values = VALUES.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(mean_loss(values), values)
    equal(gradient, torch.full((4,), 0.25))


@pytest.mark.parametrize("scored", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_means_of_lower_precision_are_taken_in_float32(dtype: torch.dtype, scored: bool) -> None:
    values = torch.full((1001,), 1.0, dtype=dtype)
    values[0] = 0.5
    found = mean_loss(Scored(values, torch.ones(1001)) if scored else values)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, torch.tensor(1 - 0.5 / 1001))


def test_float64_stays_float64() -> None:
    assert mean_loss(VALUES.double()).dtype == torch.float64
    assert mean_loss(Scored(VALUES.double(), torch.ones(4))).dtype == torch.float64


@pytest.mark.parametrize(
    ("losses", "words"),
    [
        (torch.tensor(1.0), r"shape \(\)"),
        (torch.ones(4, 2), r"shape \(4, 2\)"),
        (torch.ones(4, dtype=torch.int64), r"shape \(4,\)"),
        (1.0, "found 1.0"),
        (None, "found None"),
        (Scored(torch.tensor(1.0), torch.ones(1)), r"shape \(\)"),
        (Scored(torch.ones(4), torch.ones(4, 1)), r"weight an example.*shape \(4, 1\)"),
        (Scored(torch.ones(4), torch.ones(3)), r"weight an example.*shape \(3,\)"),
    ],
)
def test_what_is_no_vector_is_refused(losses: Any, words: str) -> None:
    for function in (per_example, mean_loss):
        with pytest.raises(ContractError, match=words):
            function(losses)
