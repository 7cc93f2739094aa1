from __future__ import annotations

import copy
import functools
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pytest
import timm
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss

import gradbench
from gradbench.errors import (
    ContractError,
    FieldError,
    MissingInputError,
    PluginNotFoundError,
    UnknownKeyError,
)
from gradbench.gradients import FlatGradients
from gradbench.heldout import HeldOutBatch, HeldOutExamples
from gradbench.losses import Scored
from gradbench.method import (
    Aggregation,
    Branching,
    Scalarization,
    Scale,
    Setup,
    State,
    Weighting,
    Weights,
)
from gradbench.step import Step
from gradbench.surgery import Surgery

ROUND_OFF = 1e-12  # float64 sums in another order, of values near 1
MODELS = ["conv", "test_vit", "test_resnet", "test_convnext"]
CONV_MODELS = ["conv", "test_resnet", "test_convnext"]
CLASSES = 3
Losses = Callable[[], Tensor]


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def equal(found: Tensor | None, expected: Tensor | None) -> None:
    assert found is not None
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def close(found: Tensor | None, expected: Tensor | None) -> None:
    assert found is not None
    torch.testing.assert_close(found, expected, rtol=ROUND_OFF, atol=ROUND_OFF)


@dataclass(frozen=True)
class Total(Weighting):
    """The sum of the gradients, row by row."""

    def weights_from_gramian(self, gramian: Tensor, step: Step) -> Tensor:
        return torch.ones_like(gramian[0])


class Asking(Aggregation):
    """The sum of the gradients; keeps what ``question`` makes of each step."""

    def __init__(self, question: Callable[[Step], Any]) -> None:
        self.question = question
        self.answers: list[Any] = []

    def combine(self, jacobian: Tensor, step: Step, out: Tensor) -> None:
        self.answers.append(self.question(step))
        torch.sum(jacobian, 0, out=out)


class LookingBack(Aggregation):
    """The sum of the gradients; keeps what ``question`` makes of each step after it."""

    def __init__(self, question: Callable[[Step], Any]) -> None:
        self.question = question
        self.answers: list[Any] = []

    def combine(self, jacobian: Tensor, step: Step, out: Tensor) -> None:
        torch.sum(jacobian, 0, out=out)

    def after_step(self, step: Step) -> None:
        self.answers.append(self.question(step))


def conv_net(dropout: float = 0.0) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, stride=2, padding=1),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.Dropout(dropout),
        nn.Conv2d(6, 8, 3, stride=2, bias=False),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
    )


def perceptron(dropout: float = 0.0) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(4, 6), nn.Tanh(), nn.Dropout(dropout), nn.Linear(6, 5), nn.Tanh()
    ).double()


class Bench(NamedTuple):
    """A trunk, two heads and a batch for each."""

    trunk: nn.Module
    heads: tuple[nn.Module, nn.Module]
    inputs: tuple[Tensor, Tensor]
    targets: tuple[Tensor, Tensor]

    def losses(self, k: int) -> Tensor:
        """Return the losses of objective ``k`` on its own batch."""
        output = self.heads[k](self.trunk(self.inputs[k]))
        return cross_entropy(output, self.targets[k], reduction="none")

    def closures(self) -> tuple[Losses, Losses]:
        return (lambda: self.losses(0), lambda: self.losses(1))

    def both(self) -> tuple[Tensor, Tensor]:
        """Return the losses of two heads on one input, which share a forward."""
        features = self.trunk(self.inputs[0])
        found = [
            cross_entropy(head(features), target, reduction="none")
            for head, target in zip(self.heads, self.targets, strict=True)
        ]
        return found[0], found[1]

    def parameters(self) -> list[nn.Parameter]:
        modules = (self.trunk, *self.heads)
        return [parameter for module in modules for parameter in module.parameters()]

    def copy(self) -> Bench:
        trunk, *heads = copy.deepcopy((self.trunk, *self.heads))
        return Bench(trunk, (heads[0], heads[1]), self.inputs, self.targets)


def bench(name: str, dtype: torch.dtype = torch.float32, *, channels_last: bool = False) -> Bench:
    """Return a bench of images and a convolution net or a timm model."""
    if name == "conv":
        trunk: nn.Module = conv_net()
        width = 8
    else:
        size: dict[str, Any] = {"img_size": 32} if "vit" in name else {}
        trunk = timm.create_model(name, num_classes=0, **size)
        width = trunk.num_features  # type: ignore[assignment]
    inputs = [torch.randn(4, 3, 32, 32, dtype=dtype) for _ in range(2)]
    if channels_last:
        trunk = trunk.to(memory_format=torch.channels_last)
        inputs = [each.contiguous(memory_format=torch.channels_last) for each in inputs]
    return Bench(
        trunk.to(dtype),
        (nn.Linear(width, CLASSES).to(dtype), nn.Linear(width, CLASSES).to(dtype)),
        (inputs[0], inputs[1]),
        (torch.tensor([0, 1, 2, 0]), torch.tensor([2, 2, 1, 0])),
    )


def small_bench(dropout: float = 0.0) -> Bench:
    """Return a bench of a perceptron in float64."""
    return Bench(
        perceptron(dropout),
        (nn.Linear(5, CLASSES).double(), nn.Linear(5, CLASSES).double()),
        (torch.randn(6, 4).double(), torch.randn(6, 4).double()),
        (torch.arange(6) % CLASSES, torch.arange(6).flip(0) % CLASSES),
    )


def autograd_rows(trunk: nn.Module, losses: Sequence[Tensor]) -> list[list[Tensor]]:
    """Return the gradients of the mean losses in the parameters, as torch gives them."""
    parameters = [p for p in trunk.parameters() if p.requires_grad]
    return [
        list(torch.autograd.grad(each.mean(), parameters, None, True, materialize_grads=True))
        for each in losses
    ]


def flat(trunk: nn.Module, losses: Tensor) -> Tensor:
    """Return the gradient (P,) of the mean loss; parameters must be contiguous."""
    return torch.cat([grad.flatten() for grad in autograd_rows(trunk, [losses])[0]])


def assert_rows(surgery: Surgery, expected: Sequence[Sequence[Tensor]]) -> None:
    parameters = [p for p in surgery.trunk.parameters() if p.requires_grad]
    layout = FlatGradients(parameters)
    jacobian = surgery.step.jacobian
    assert jacobian.shape == (len(expected), layout.size)
    assert jacobian.dtype == parameters[0].dtype
    for row, grads in zip(jacobian, expected, strict=True):
        for found, grad in zip(layout.slices(row), grads, strict=True):
            equal(found, grad)


class TestRows:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    @pytest.mark.parametrize("name", MODELS)
    def test_of_separate_batches_are_autograds_own(self, name: str, dtype: torch.dtype) -> None:
        made = bench(name, dtype)
        expected = autograd_rows(made.trunk, [made.losses(0), made.losses(1)])
        surgery = Surgery(Total(), made.trunk)
        for _ in range(2):  # the second step finds the buffer of the first one
            surgery.backward(*made.closures())
        assert_rows(surgery, expected)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    @pytest.mark.parametrize("name", MODELS)
    def test_of_one_forward_are_autograds_own(self, name: str, dtype: torch.dtype) -> None:
        made = bench(name, dtype)
        losses = made.both()
        expected = autograd_rows(made.trunk, losses)
        surgery = Surgery(Total(), made.trunk)
        surgery.backward(*losses)
        assert_rows(surgery, expected)

    @pytest.mark.parametrize("name", MODELS)
    def test_in_lower_precision_are_autograds_own(self, name: str) -> None:
        made = bench(name)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert made.heads[0](made.trunk(made.inputs[0])).dtype == torch.bfloat16
            losses = made.both()
            expected = autograd_rows(made.trunk, losses)
            surgery = Surgery(Total(), made.trunk)
            surgery.backward(*losses)
        assert_rows(surgery, expected)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            separate = autograd_rows(made.trunk, [made.losses(0), made.losses(1)])
        with torch.autocast("cpu", dtype=torch.bfloat16):
            surgery.backward(*made.closures())
        assert_rows(surgery, separate)

    @pytest.mark.parametrize("name", CONV_MODELS)
    def test_with_channels_last_are_autograds_own(self, name: str) -> None:
        made = bench(name, channels_last=True)
        losses = made.both()
        expected = autograd_rows(made.trunk, losses)
        surgery = Surgery(Total(), made.trunk)
        surgery.backward(*losses)
        assert_rows(surgery, expected)
        for parameter, *grads in zip(made.trunk.parameters(), *expected, strict=True):
            equal(parameter.grad, grads[0] + grads[1])

    def test_of_unused_parameters_are_zero(self) -> None:
        made = small_bench()
        trunk = nn.ModuleDict({"used": made.trunk, "unused": nn.Linear(3, 2).double()})
        expected = autograd_rows(trunk, [made.losses(0), made.losses(1)])
        surgery = Surgery(Total(), trunk)
        surgery.backward(*made.closures())
        assert_rows(surgery, expected)
        equal(surgery.step.jacobian[:, -8:], torch.zeros(2, 8).double())

    def test_leave_frozen_parameters_out(self) -> None:
        made = small_bench()
        first = made.trunk.get_submodule("0").requires_grad_(False)
        surgery = Surgery(Total(), made.trunk)
        losses = made.both()
        expected = autograd_rows(made.trunk, losses)
        surgery.backward(*losses)
        assert_rows(surgery, expected)
        assert surgery.direction.numel() == 35
        assert all(parameter.grad is None for parameter in first.parameters())

    def test_count_tied_parameters_once(self) -> None:
        trunk = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4)).double()
        trunk[2].weight = trunk[0].weight
        losses = [trunk(torch.randn(3, 4).double()).square().mean(1) for _ in range(2)]
        expected = autograd_rows(trunk, losses)
        surgery = Surgery(Total(), trunk)
        surgery.backward(*losses)
        assert_rows(surgery, expected)
        assert surgery.direction.numel() == 16 + 4 + 4

    @pytest.mark.parametrize("method", [Total(), "weighted-sum", "pcgrad"])
    def test_of_an_objective_without_a_graph_are_zero(self, method: str | Total) -> None:
        made = small_bench()
        surgery = Surgery(method, made.trunk)
        for _ in range(2):
            primary = made.losses(0)
            grads = flat(made.trunk, primary)
            surgery.backward(primary, torch.zeros(6))
            equal(surgery.direction, grads)
        surgery.backward(torch.zeros(6), lambda: torch.zeros(6))
        equal(surgery.direction, torch.zeros_like(surgery.direction))
        equal(surgery.step.losses, torch.zeros(2).double())

    def test_of_examples_without_anything_to_score_are_zero(self) -> None:
        made = small_bench()
        weight = torch.tensor([1.0, 1.0, 0.0, 0.0, 1.0, 0.0])
        surgery = Surgery(Total(), made.trunk)
        losses = made.losses(1)
        expected = flat(made.trunk, losses[weight > 0])
        surgery.backward(Scored(made.losses(0), torch.zeros(6)), Scored(losses, weight))
        equal(surgery.step.jacobian[0], torch.zeros_like(expected))
        close(surgery.step.jacobian[1], expected)

    @pytest.mark.parametrize("method", [Total(), "weighted-sum", "pcgrad", "attittud"])
    def test_of_one_objective(self, method: str | Total) -> None:
        made = small_bench()
        surgery = Surgery(method, made.trunk)
        losses = made.losses(0)
        expected = flat(made.trunk, losses)
        surgery.backward(losses, sketch=lambda: made.losses(0))
        equal(surgery.direction, expected)
        equal(surgery.step.losses, losses.mean()[None].detach())

    def test_of_independent_batches_are_apart(self) -> None:
        class Two(Total):
            batches = 2

        made = small_bench()
        chunks = [
            [losses[:3], losses[3:]] for losses in (made.losses(0), made.losses(1))
        ]  # (K, batches)
        expected = [[flat(made.trunk, chunk) for chunk in row] for row in chunks]
        surgery = Surgery(Two(), made.trunk)
        surgery.backward(*chunks)
        found = surgery.step.jacobians  # (batches, K, P)
        assert found.shape[:2] == (2, 2)
        for k in range(2):
            for b in range(2):
                equal(found[b, k], expected[k][b])
        equal(surgery.step.jacobian, found[0])
        equal(surgery.step.losses, torch.stack([row[0].mean() for row in chunks]).detach())

    def test_heads_learn_from_the_first_of_independent_batches(self) -> None:
        class Two(Total):
            batches = 2

        made = small_bench()
        losses = made.losses(0)
        expected = autograd_rows(made.heads[0], [losses[:3]])[0]
        Surgery(Two(), made.trunk).backward([losses[:3], losses[3:]])
        for parameter, grad in zip(made.heads[0].parameters(), expected, strict=True):
            equal(parameter.grad, grad)


def adamw(**options: Any) -> Callable[[list[nn.Parameter]], torch.optim.Optimizer]:
    return lambda parameters: torch.optim.AdamW(parameters, lr=1e-2, **options)


def sgd(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9, nesterov=True)


OPTIMIZERS = {
    "fused": adamw(fused=True),
    "foreach": adamw(foreach=True),
    "for-loop": adamw(foreach=False),
    "sgd": sgd,
}


class TestOptimizers:
    @pytest.mark.parametrize("method", ["weighted-sum", Total()])
    @pytest.mark.parametrize("optimizer", OPTIMIZERS)
    @pytest.mark.parametrize("name", CONV_MODELS)
    def test_move_channels_last_parameters_as_without_surgery(
        self, name: str, optimizer: str, method: str | Total
    ) -> None:
        stock = bench(name, channels_last=True)
        ours = stock.copy()
        makers = [OPTIMIZERS[optimizer](made.parameters()) for made in (stock, ours)]
        surgery = Surgery(method, ours.trunk)
        for _ in range(5):
            for each in makers:
                each.zero_grad()
            torch.autograd.backward(stock.losses(0).mean() + stock.losses(1).mean())
            surgery.backward(*ours.closures())
            for made, each in zip((stock, ours), makers, strict=True):
                if optimizer == "sgd":
                    norm = nn.utils.clip_grad_norm_(made.trunk.parameters(), 0.01)
                    assert float(norm) > 0.01  # so that clipping does something
                each.step()
            surgery.after_step()
        assert any(not p.is_contiguous() for p in ours.trunk.parameters())
        for found, expected in zip(ours.parameters(), stock.parameters(), strict=True):
            equal(found, expected)
        for name_, value in ours.trunk.named_buffers():
            equal(value, stock.trunk.get_buffer(name_))

    @pytest.mark.parametrize("to_none", [True, False])
    @pytest.mark.parametrize("method", ["weighted-sum", Total()])
    def test_may_zero_gradients_either_way(self, method: str | Total, to_none: bool) -> None:
        stock = bench("conv")
        ours = stock.copy()
        makers = [sgd(made.parameters()) for made in (stock, ours)]
        surgery = Surgery(method, ours.trunk)
        for _ in range(3):
            for each in makers:
                each.zero_grad(set_to_none=to_none)
            torch.autograd.backward(stock.losses(0).mean() + stock.losses(1).mean())
            surgery.backward(*ours.closures())
            for each in makers:
                each.step()
        for found, expected in zip(ours.parameters(), stock.parameters(), strict=True):
            equal(found, expected)


class TestGradients:
    @pytest.mark.parametrize("method", ["weighted-sum", Total()])
    def test_of_the_trunk_are_overwritten_and_of_heads_added_to(self, method: str | Total) -> None:
        made = small_bench()
        surgery = Surgery(method, made.trunk)
        expected = [autograd_rows(made.heads[k], [made.losses(k)])[0] for k in range(2)]
        direction = flat(made.trunk, made.losses(0)) + flat(made.trunk, made.losses(1))
        for round_ in (1, 2):
            surgery.backward(*made.closures())
            found = [p.grad.flatten() for p in made.trunk.parameters() if p.grad is not None]
            equal(torch.cat(found), direction)
            for head, grads in zip(made.heads, expected, strict=True):
                for parameter, grad in zip(head.parameters(), grads, strict=True):
                    equal(parameter.grad, round_ * grad)

    def test_direction_is_the_memory_of_the_trunks_gradients(self) -> None:
        made = small_bench()
        surgery = Surgery(Total(), made.trunk)
        surgery.backward(*made.closures())
        surgery.direction.mul_(2)
        found = [p.grad.flatten() for p in made.trunk.parameters() if p.grad is not None]
        equal(torch.cat(found), surgery.direction)

    @pytest.mark.parametrize("source", ["tensors", "closures"])
    @pytest.mark.parametrize("method", ["weighted-sum", "pcgrad", "pcgrad-asymmetric"])
    def test_of_accumulated_parts_equal_those_of_the_whole(self, method: str, source: str) -> None:
        made = small_bench()
        whole = made.copy()
        reference = Surgery(method, whole.trunk)
        surgery = Surgery(method, made.trunk, objectives=2)
        for _ in range(2):
            reference.backward(*whole.closures())
            for part in (slice(0, 2), slice(2, 4), slice(4, 6)):
                for k in range(2):
                    losses = functools.partial(lambda k, part: made.losses(k)[part] / 3, k, part)
                    surgery.add(k, losses if source == "closures" else losses())
            surgery.apply()
            close(surgery.direction, reference.direction)
            close(surgery.step.losses, reference.step.losses)
            for found, expected in zip(made.parameters(), whole.parameters(), strict=True):
                close(found.grad, expected.grad)

    def test_of_a_step_that_failed_do_not_count(self) -> None:
        made = small_bench()
        surgery = Surgery("attittud", made.trunk)
        with pytest.raises(MissingInputError):
            surgery.backward(*made.closures())

        def fails() -> Tensor:
            raise ZeroDivisionError

        with pytest.raises(ZeroDivisionError):
            surgery.backward(made.closures()[0], fails, sketch=made.closures()[0])
        expected = [flat(made.trunk, made.losses(k)) for k in range(2)]
        surgery.backward(*made.closures(), sketch=made.closures()[0])
        equal(surgery.step.jacobian, torch.stack(expected))
        equal(surgery.step.losses, torch.stack([made.losses(k).mean() for k in range(2)]).detach())


class Weighed(Weighting):
    """Fixed weights, of the heads too."""

    heads = "weighted"

    def weights_from_gramian(self, gramian: Tensor, step: Step) -> Tensor:
        return gramian.new_tensor([2.0, -3.0])[: len(gramian)]


class Apart(Weighed):
    """Weights of the heads that differ from those of the trunk."""

    def weights_from_gramian(self, gramian: Tensor, step: Step) -> Weights:  # type: ignore[override]
        return Weights(gramian.new_tensor([1.0, 1.0]), gramian.new_tensor([2.0, -3.0]))


class Combining(Aggregation):
    """The primary gradient, and weights for the heads."""

    heads = "weighted"

    def combine(self, jacobian: Tensor, step: Step, out: Tensor) -> Tensor:
        out.copy_(jacobian[0])
        return jacobian.new_tensor([2.0, -3.0])


class WeighedLosses(Scalarization):
    """Fixed weights of the losses."""

    def weights_from_losses(self, losses: Tensor, step: Step) -> Tensor:
        return losses.new_tensor([2.0, -3.0])


class TestHeads:
    @pytest.mark.parametrize("method", [Weighed(), Apart(), Combining(), WeighedLosses()])
    @pytest.mark.parametrize("source", ["tensors", "closures"])
    def test_weighted_get_their_gradient_times_the_weight(
        self, method: Weighting | Aggregation | Scalarization, source: str
    ) -> None:
        made = small_bench()
        losses = (made.losses(0), made.losses(1))
        expected = [autograd_rows(made.heads[k], [losses[k]])[0] for k in range(2)]
        kept = torch.ones_like(made.heads[1].get_parameter("weight"))
        made.heads[1].get_parameter("weight").grad = kept
        surgery = Surgery(method, made.trunk, made.heads)
        surgery.backward(*(losses if source == "tensors" else made.closures()))
        close(made.heads[0].get_parameter("weight").grad, 2 * expected[0][0])
        close(made.heads[0].get_parameter("bias").grad, 2 * expected[0][1])
        close(made.heads[1].get_parameter("weight").grad, 1 - 3 * expected[1][0])
        close(made.heads[1].get_parameter("bias").grad, -3 * expected[1][1])
        assert made.heads[1].get_parameter("weight").grad is kept

    @pytest.mark.parametrize(
        ("method", "weights"),
        [(Weighed(), [2.0, -3.0]), (Apart(), [1.0, 1.0]), (Combining(), [1.0, 0.0])],
    )
    def test_do_not_change_what_the_trunk_gets(
        self, method: Weighting | Aggregation, weights: list[float]
    ) -> None:
        made = small_bench()
        surgery = Surgery(method, made.trunk, made.heads)
        rows = torch.stack([flat(made.trunk, made.losses(k)) for k in range(2)])
        surgery.backward(*made.closures())
        close(surgery.direction, torch.tensor(weights).double() @ rows)

    def test_weighted_of_accumulated_parts(self) -> None:
        made = small_bench()
        expected = autograd_rows(made.heads[1], [made.losses(1)])[0]
        surgery = Surgery(Weighed(), made.trunk, made.heads, objectives=2)
        for part in (slice(0, 3), slice(3, 6)):
            for k in range(2):
                surgery.add(k, made.losses(k)[part] / 2)
        surgery.apply()
        for parameter, grad in zip(made.heads[1].parameters(), expected, strict=True):
            close(parameter.grad, -3 * grad)

    def test_weighted_without_a_gradient_keep_what_they_had(self) -> None:
        made = small_bench()
        kept = torch.ones_like(made.heads[1].get_parameter("weight"))
        made.heads[1].get_parameter("weight").grad = kept
        Surgery(Weighed(), made.trunk, made.heads).backward(made.losses(0), torch.zeros(6))
        assert made.heads[1].get_parameter("weight").grad is kept
        equal(kept, torch.ones_like(kept))
        assert made.heads[1].get_parameter("bias").grad is None

    def test_weighted_keep_what_they_had_when_a_step_fails(self) -> None:
        made = small_bench()
        weight = made.heads[0].get_parameter("weight")
        kept = weight.grad = torch.ones_like(weight)

        def fails() -> Tensor:
            raise ZeroDivisionError

        surgery = Surgery(Weighed(), made.trunk, made.heads)
        with pytest.raises(ZeroDivisionError):
            surgery.backward(made.closures()[0], fails)
        assert weight.grad is kept
        equal(kept, torch.ones_like(kept))

    def test_weighted_are_needed(self) -> None:
        with pytest.raises(ContractError, match="heads="):
            Surgery(Weighed(), small_bench().trunk)

    def test_weighted_are_one_an_objective(self) -> None:
        made = small_bench()
        with pytest.raises(ContractError, match=r"2 heads.*found 1"):
            Surgery(Weighed(), made.trunk, made.heads[:1]).backward(*made.closures())

    @pytest.mark.parametrize("shared", ["head", "trunk"])
    def test_weighted_share_no_parameters(self, shared: str) -> None:
        made = small_bench()
        other = made.heads[0] if shared == "head" else made.trunk
        with pytest.raises(ContractError, match="shared"):
            Surgery(Weighed(), made.trunk, (made.heads[0], other))


class Mean(Weighting):
    """The mean of the gradients, weighing heads alike."""

    heads = "weighted"
    scale = "mean"

    def weights_from_gramian(self, gramian: Tensor, step: Step) -> Tensor:
        return torch.full_like(gramian[0], 1 / len(gramian))


class MeanLoss(Scalarization):
    """The mean of the losses."""

    scale = "mean"

    def weights_from_losses(self, losses: Tensor, step: Step) -> Tensor:
        return torch.full_like(losses, 1 / len(losses))


class Unit(Aggregation):
    """The primary gradient at length one; zero stays zero."""

    scale = "unit"

    def combine(self, jacobian: Tensor, step: Step, out: Tensor) -> None:
        torch.div(jacobian[0], jacobian[0].norm().clamp_min(1e-30), out=out)


class TestScale:
    @pytest.mark.parametrize("method", [Mean(), MeanLoss(), Total(), "weighted-sum"])
    def test_sum_of_a_mean_or_sum_is_the_sum(self, method: str | Weighting | Scalarization) -> None:
        made = small_bench()
        surgery = Surgery(method, made.trunk, made.heads, scale="sum")
        surgery.backward(*made.closures())
        close(
            surgery.direction, flat(made.trunk, made.losses(0)) + flat(made.trunk, made.losses(1))
        )
        expected = autograd_rows(made.heads[1], [made.losses(1)])[0]
        for parameter, grad in zip(made.heads[1].parameters(), expected, strict=True):
            close(parameter.grad, grad)

    @pytest.mark.parametrize("method", [Mean(), MeanLoss()])
    def test_paper_leaves_a_mean(self, method: Weighting | Scalarization) -> None:
        made = small_bench()
        surgery = Surgery(method, made.trunk, made.heads)
        surgery.backward(*made.closures())
        close(
            2 * surgery.direction,
            flat(made.trunk, made.losses(0)) + flat(made.trunk, made.losses(1)),
        )

    def test_sum_of_a_unit_vector_has_the_length_of_the_sum(self) -> None:
        made = small_bench()
        rows = [flat(made.trunk, made.losses(k)) for k in range(2)]
        lengths = {}
        scales: tuple[Scale, ...] = ("paper", "sum")
        for scale in scales:
            surgery = Surgery(Unit(), made.trunk, scale=scale)
            surgery.backward(*made.closures())
            lengths[scale] = surgery.direction.norm()
            close(surgery.direction / lengths[scale], rows[0] / rows[0].norm())
        close(lengths["paper"], torch.tensor(1.0).double())
        close(lengths["sum"], (rows[0] + rows[1]).norm())

    @pytest.mark.parametrize("method", [Mean(), MeanLoss(), Unit()])
    def test_zero_stays_zero(self, method: Weighting | Scalarization | Aggregation) -> None:
        made = small_bench()
        surgery = Surgery(method, made.trunk, made.heads, scale="sum")
        losses = made.losses(0)
        for pair in ((torch.zeros(6), torch.zeros(6)), (0 * losses, 0 * losses)):
            surgery.backward(*pair)
            equal(surgery.direction, torch.zeros_like(surgery.direction))

    def test_a_direction_out_of_what_cancels_stays_zero(self) -> None:
        made = small_bench()
        losses = made.losses(0)
        surgery = Surgery(Unit(), made.trunk, scale="sum")
        surgery.backward(losses, -losses)
        equal(surgery.direction, torch.zeros_like(surgery.direction))


class TestStep:
    def test_gramian_is_that_of_the_rows(self) -> None:
        made = small_bench()
        method = Asking(lambda step: (step.gramian, step.jacobian.clone()))
        Surgery(method, made.trunk).backward(*made.closures())
        gramian, jacobian = method.answers[0]
        for i in range(2):
            for j in range(2):
                close(gramian[i, j], (jacobian[i] * jacobian[j]).sum())

    @pytest.mark.parametrize("when", ["combine", "after"])
    def test_gramian_is_exact_under_autocast(self, when: str) -> None:
        made = bench("conv")
        method = (Asking if when == "combine" else LookingBack)(lambda step: step.gramian)
        surgery = Surgery(method, made.trunk)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            surgery.backward(*made.closures())
            jacobian = surgery.step.jacobian.double()
            surgery.after_step()
        assert method.answers[0].dtype == torch.float32
        expected = (jacobian @ jacobian.T).float()
        torch.testing.assert_close(method.answers[0], expected, rtol=1e-5, atol=1e-7)

    def test_gramian_arrives_on_the_host_in_float64_where_wanted(self) -> None:
        class Host(Total):
            host = True

            def weights_from_gramian(self, gramian: Tensor, step: Step) -> Tensor:
                assert gramian.dtype == torch.float64
                return torch.tensor([1.0, 2.0], dtype=torch.float64)

        made = bench("conv")
        surgery = Surgery(Host(), made.trunk)
        surgery.backward(*made.closures())
        expected = surgery.step.jacobian[0] + 2 * surgery.step.jacobian[1]
        torch.testing.assert_close(surgery.direction, expected)

    @pytest.mark.parametrize("name", MODELS)
    def test_gramians_of_blocks_sum_to_the_gramian(self, name: str) -> None:
        made = bench(name, torch.float64)
        method = Asking(lambda step: (step.block_gramians, step.gramian, step.blocks))
        Surgery(method, made.trunk).backward(*made.closures())
        grams, gramian, blocks = method.answers[0]
        assert grams.shape == (len(blocks), 2, 2)
        assert len(blocks) > 2
        close(grams.sum(0) / gramian.abs().max(), gramian / gramian.abs().max())

    def test_last_weight_block_may_come_before_a_norm(self) -> None:
        made = bench("test_convnext")
        method = Asking(lambda step: (step.blocks, step.last_weight_block))
        Surgery(method, made.trunk).backward(*made.closures())
        blocks, last = method.answers[0]
        sizes = [block.stop - block.start for block in blocks]
        assert 0 < last < len(blocks) - 1
        assert sizes[last] > 64 * 64  # the last linear layer, of width 64
        assert all(size <= 2 * 64 for size in sizes[last + 1 :])  # norms and per-channel scales

    def test_blocks_survive_a_move_before_the_first_step(self) -> None:
        made = bench("conv")
        method = Asking(lambda step: step.blocks)
        surgery = Surgery(method, made.trunk)
        made.trunk.to(memory_format=torch.channels_last)
        losses = made.both()
        expected = autograd_rows(made.trunk, losses)
        surgery.backward(*losses)
        assert_rows(surgery, expected)
        assert sum(block.stop - block.start for block in method.answers[0]) == len(
            surgery.direction
        )

    def test_knows_where_it_is(self) -> None:
        made = small_bench()
        method = Asking(lambda step: (step.index, step.epoch, step.index_in_epoch))
        surgery = Surgery(method, made.trunk, steps_per_epoch=2)
        for _ in range(3):
            surgery.backward(*made.closures())
        assert method.answers == [(0, 0, 0), (1, 0, 1), (2, 1, 0)]

    def test_randomness_is_a_function_of_seed_method_and_step(self) -> None:
        def found(seed: int, name: str, before: int) -> list[float]:
            made = small_bench()
            method = Asking(
                lambda step: (float(torch.rand((), generator=step.generator)), step.rng.random())
            )
            surgery = Surgery(method, made.trunk, seed=seed, name=name)
            torch.manual_seed(before)
            for _ in range(2):
                surgery.backward(*made.closures())
            return [number for pair in method.answers for number in pair]

        reference = found(3, "a", 0)
        assert len(set(reference)) == 4
        assert found(3, "a", 1) == reference
        assert not set(found(4, "a", 0)) & set(reference)
        assert not set(found(3, "b", 0)) & set(reference)


def batch_norm_bench() -> Bench:
    """Return a bench whose trunk and heads hold dropout and batch norm, in float64."""
    heads = [
        nn.Sequential(nn.Dropout(0.3), nn.BatchNorm1d(8), nn.Linear(8, CLASSES)).double()
        for _ in range(2)
    ]
    made = bench("conv", torch.float64)
    trunk = conv_net(dropout=0.4).double()
    found = Bench(trunk, (heads[0], heads[1]), made.inputs, made.targets)
    found.both()  # so that running statistics are not those of a new layer
    return found


def buffers(*modules: nn.Module) -> list[Tensor]:
    return [value.clone() for module in modules for value in module.buffers()]


def modes(*modules: nn.Module) -> list[bool]:
    return [part.training for module in modules for part in module.modules()]


def without_dropout(made: Bench, *, batch_statistics: bool) -> Bench:
    """Return a copy in evaluation mode, in which batch norm may use the batch's statistics."""
    copied = made.copy()
    for module in (copied.trunk, *copied.heads):
        module.eval()
        for part in module.modules():
            if batch_statistics and isinstance(part, nn.BatchNorm1d | nn.BatchNorm2d):
                part.track_running_stats = False
                part.running_mean = part.running_var = None
    return copied


class TestSketch:
    @pytest.mark.parametrize("batch_norm", ["batch", "frozen"])
    def test_is_the_combination_of_gradients_an_example(self, batch_norm: Any) -> None:
        made = batch_norm_bench()
        omega = torch.randn(3, 4).double()
        method = Asking(lambda step: step.sketch(lambda m: omega, samples=4, batch_norm=batch_norm))
        surgery = Surgery(method, made.trunk, made.heads)
        oracle = without_dropout(made, batch_statistics=batch_norm == "batch")
        jacobian = torch.stack([flat(oracle.trunk, loss) for loss in oracle.losses(0)])
        surgery.backward(torch.zeros(4), torch.zeros(4), sketch=lambda: made.losses(0))
        close(method.answers[0], omega @ jacobian)

    @pytest.mark.parametrize("batch_norm", ["batch", "frozen"])
    def test_leaves_statistics_modes_generators_and_gradients_alone(self, batch_norm: Any) -> None:
        made = batch_norm_bench()
        made.trunk.get_submodule("1").eval()
        method = Asking(
            lambda step: step.sketch(
                lambda m: torch.ones(2, m).double(), samples=4, batch_norm=batch_norm
            )
        )
        surgery = Surgery(method, made.trunk, made.heads, objectives=2)
        for k in range(2):
            surgery.add(k, made.losses(k))
        modules = (made.trunk, *made.heads)
        before, mode, state = buffers(*modules), modes(*modules), torch.get_rng_state()
        heads = [parameter.grad for head in made.heads for parameter in head.parameters()]
        copied = [None if grad is None else grad.clone() for grad in heads]
        surgery.apply(sketch=lambda: made.losses(0))
        for found, expected in zip(buffers(*modules), before, strict=True):
            equal(found, expected)
        assert modes(*modules) == mode
        equal(torch.get_rng_state(), state)
        for grad, value in zip(heads, copied, strict=True):
            equal(grad, value)
        equal(surgery.direction, surgery.step.jacobian.sum(0))

    def test_puts_modes_back_after_a_failure(self) -> None:
        made = batch_norm_bench()
        made.heads[0].eval()
        before = modes(made.trunk, *made.heads)

        def fails() -> Tensor:
            raise ZeroDivisionError

        surgery = Surgery("attittud", made.trunk, made.heads)
        with pytest.raises(ZeroDivisionError):
            surgery.backward(*made.closures(), sketch=fails)
        assert modes(made.trunk, *made.heads) == before
        assert all(
            norm.track_running_stats
            for norm in (*made.trunk.modules(), *made.heads[0].modules())
            if isinstance(norm, nn.BatchNorm1d | nn.BatchNorm2d)
        )

    def test_runs_under_the_loops_autocast(self) -> None:
        made = bench("conv")
        method = Asking(
            lambda step: step.sketch(lambda m: torch.eye(m), samples=4, batch_norm="batch")
        )
        seen: list[torch.dtype] = []

        def losses() -> Tensor:
            seen.append(made.trunk(made.inputs[0]).dtype)
            return made.losses(0)

        with torch.autocast("cpu", dtype=torch.bfloat16):
            Surgery(method, made.trunk).backward(*made.closures(), sketch=losses)
        assert seen == [torch.bfloat16]
        assert method.answers[0].dtype == torch.float32

    def test_may_be_told_how_many_examples_are_wanted(self) -> None:
        made = small_bench()
        asked: list[int] = []

        class Source:
            def method(self, samples: int) -> Tensor:
                asked.append(samples)
                return made.losses(0)[:samples]

        def by_keyword(samples: int, *, extra: int = 0) -> Tensor:
            return Source().method(samples)

        sources: list[Callable[[int], Tensor]] = [
            Source().method,
            by_keyword,
            functools.partial(by_keyword, extra=1),
            lambda samples: by_keyword(samples),
        ]
        for source in sources:
            method = Asking(lambda step: step.sketch(lambda m: torch.eye(m), samples=4))
            Surgery(method, made.trunk).backward(made.losses(0), sketch=source)
            assert method.answers[0].shape[0] == 4
        assert asked == [4, 4, 4, 4]

    def test_may_ignore_how_many_examples_are_wanted(self) -> None:
        made = small_bench()

        class Source:
            def method(self) -> Tensor:
                return made.losses(0)

            def __call__(self) -> Tensor:
                return made.losses(0)

        def with_default(inputs: Tensor = made.inputs[0]) -> Tensor:
            return cross_entropy(
                made.heads[0](made.trunk(inputs)), made.targets[0], reduction="none"
            )

        sources: list[Callable[[], Tensor]] = [
            Source().method,
            Source(),
            with_default,
            functools.partial(with_default, made.inputs[0]),
            functools.partial(made.losses, 0),
        ]
        for source in sources:
            method = Asking(lambda step: step.sketch(lambda m: torch.eye(m), samples=4))
            Surgery(method, made.trunk).backward(made.losses(0), sketch=source)
            assert method.answers[0].shape[0] == 6


class TestHvp:
    def test_equals_the_explicit_hessian_of_the_weighted_sum(self) -> None:
        made = small_bench()
        parameters = list(made.trunk.parameters())
        weights = torch.tensor([0.5, -2.0]).double()
        vector = torch.randn(sum(p.numel() for p in parameters)).double()
        total = weights[0] * made.losses(0).mean() + weights[1] * made.losses(1).mean()
        grads = torch.autograd.grad(total, parameters, create_graph=True)
        rows = [
            torch.cat([g.flatten() for g in torch.autograd.grad(entry, parameters, None, True)])
            for entry in torch.cat([grad.flatten() for grad in grads])
        ]
        method = Asking(lambda step: step.hvp(vector, weights))
        surgery = Surgery(method, made.trunk)
        surgery.backward(*made.closures())
        close(method.answers[0], torch.stack(rows) @ vector)
        equal(surgery.direction, surgery.step.jacobian.sum(0))

    def test_goes_through_attention_and_leaves_heads_alone(self) -> None:
        made = bench("test_vit")
        method = Asking(lambda step: step.hvp(torch.ones_like(step.jacobian[0]), step.losses))
        Surgery(method, made.trunk).backward(*made.closures())
        assert bool(method.answers[0].isfinite().all())
        assert float(method.answers[0].norm()) > 0
        expected = autograd_rows(made.heads[0], [made.losses(0)])[0]
        for parameter, grad in zip(made.heads[0].parameters(), expected, strict=True):
            equal(parameter.grad, grad)

    def test_weighs_exactly_under_autocast(self) -> None:
        trunk = nn.ParameterList([torch.tensor([1.0, 2.0])])  # no product in lower precision
        vector, weights = torch.tensor([1.0, -1.0]), torch.tensor([1 / 3, 2 / 3])
        method = Asking(lambda step: step.hvp(vector, weights))
        surgery = Surgery(method, trunk)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            surgery.backward(lambda: trunk[0].pow(3), lambda: trunk[0].pow(2))
        theta = trunk[0].detach()  # the Hessian is diagonal
        expected = (weights[0] * 3 * theta + weights[1]) * vector
        torch.testing.assert_close(method.answers[0], expected)


class TestReevaluate:
    def test_sees_the_same_batches_and_the_same_dropout(self) -> None:
        made = batch_norm_bench()
        for part in made.trunk.modules():
            assert not isinstance(part, nn.Dropout) or part.p > 0
        method = LookingBack(lambda step: step.reevaluate())
        surgery = Surgery(method, made.trunk, made.heads)
        for _ in range(2):
            surgery.backward(*made.closures())
            torch.rand(3)  # the loop draws on
            modules = (made.trunk, *made.heads)
            before, state = buffers(*modules), torch.get_rng_state()
            surgery.after_step()
            equal(method.answers[-1], surgery.step.losses)
            assert not method.answers[-1].requires_grad
            equal(torch.get_rng_state(), state)
            for found, expected in zip(buffers(*modules), before, strict=True):
                equal(found, expected)
        assert not torch.equal(method.answers[0], method.answers[1])  # dropout was on

    @pytest.mark.parametrize("lower", [True, False])
    def test_sees_the_new_parameters(self, lower: bool) -> None:
        made = bench("conv")
        method = LookingBack(lambda step: step.reevaluate())
        surgery = Surgery(method, made.trunk)
        optimizer = torch.optim.SGD(made.parameters(), lr=0.5)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=lower):
            surgery.backward(*made.closures())
            optimizer.step()
            surgery.after_step()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=lower):
            expected = torch.stack([made.losses(k).mean().detach() for k in range(2)])
        equal(method.answers[0], expected)
        assert float((expected - surgery.step.losses).abs().min()) > 1e-3

    def test_adds_up_the_parts_of_a_batch(self) -> None:
        made = small_bench(dropout=0.5)
        method = LookingBack(lambda step: step.reevaluate())
        surgery = Surgery(method, made.trunk, objectives=2)
        for part in (slice(0, 3), slice(3, 6)):
            for k in range(2):
                surgery.add(k, functools.partial(lambda k, part: made.losses(k)[part] / 2, k, part))
        surgery.apply()
        surgery.after_step()
        equal(method.answers[0], surgery.step.losses)

    def test_never_takes_the_closures_of_another_step(self) -> None:
        made = small_bench()
        surgery = Surgery(LookingBack(lambda step: step.reevaluate()), made.trunk)
        surgery.backward(*made.closures())  # a loop that calls no after_step
        surgery.backward(*made.both())
        with pytest.raises(MissingInputError, match="closures"):
            surgery.after_step()


def held_out(made: Bench, new_head: Callable[[], nn.Module] | None = None) -> HeldOutExamples:
    return HeldOutExamples(
        forward=lambda: made.trunk(made.inputs[1]),
        loss=lambda features, head: cross_entropy(
            head(features), made.targets[1], reduction="none"
        ),
        new_head=new_head or (lambda: nn.Linear(8, CLASSES)),
    )


class TestHeldOut:
    def test_gradient_is_autograds_own(self) -> None:
        made = bench("conv")
        method = Asking(lambda step: step.heldout().gradient(made.heads[0]))
        surgery = Surgery(method, made.trunk)
        output = made.heads[0](made.trunk(made.inputs[1]))
        expected = flat(made.trunk, cross_entropy(output, made.targets[1], reduction="none"))
        surgery.backward(torch.zeros(4), torch.zeros(4), heldout=lambda: held_out(made))
        equal(method.answers[0], expected)
        assert all(parameter.grad is None for parameter in made.heads[0].parameters())

    def test_a_head_can_be_fitted_to_features_without_a_graph(self) -> None:
        made = bench("conv")

        def fit(step: Step) -> tuple[float, float, Tensor]:
            batch = step.heldout()
            head = batch.new_head()
            optimizer = torch.optim.SGD(head.parameters(), lr=1.0)
            found = []
            for _ in range(20):
                optimizer.zero_grad()
                loss = batch.loss(batch.features, head)
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
                found.append(float(loss))
            return found[0], found[-1], batch.features

        method = Asking(fit)
        surgery = Surgery(method, made.trunk)
        surgery.backward(*made.closures(), heldout=lambda: held_out(made))
        first, last, features = method.answers[0]
        assert last < 0.9 * first
        assert not features.requires_grad
        equal(surgery.direction, surgery.step.jacobian.sum(0))

    def test_features_have_no_graph_wherever_they_are_asked_for(self) -> None:
        made = bench("conv")
        batch = HeldOutBatch(held_out(made), FlatGradients(list(made.trunk.parameters())), 0)
        assert not batch.features.requires_grad
        assert batch.features is batch.features
        with torch.no_grad():
            assert batch.loss(batch.features, made.heads[0]).requires_grad

    def test_new_heads_depend_on_the_seed_alone(self) -> None:
        made = bench("conv")

        def ask(step: Step) -> list[Tensor]:
            batches = step.heldout(), step.heldout()
            heads = [batches[0].new_head(), batches[0].new_head(), batches[1].new_head()]
            return [head.get_parameter("weight").detach() for head in heads]

        found = []
        for seed, present in ((1, 0), (1, 5), (2, 0)):
            method = Asking(ask)
            torch.manual_seed(present)
            state = torch.get_rng_state()
            Surgery(method, made.trunk, seed=seed).backward(
                *made.closures(), heldout=lambda: held_out(made)
            )
            equal(torch.get_rng_state(), state)
            found.append(method.answers[0])
        equal(found[0][0], found[0][1])
        assert not torch.equal(found[0][0], found[0][2])
        for one, other in zip(found[0], found[1], strict=True):
            equal(one, other)
        assert not torch.equal(found[0][0], found[2][0])

    def test_new_heads_have_the_type_of_the_trunk(self) -> None:
        made = bench("conv", torch.float64)
        method = Asking(lambda step: (batch := step.heldout()).gradient(batch.new_head()))
        Surgery(method, made.trunk).backward(*made.closures(), heldout=lambda: held_out(made))
        assert method.answers[0].dtype == torch.float64

    def test_two_calls_ask_for_two_batches(self) -> None:
        made = bench("conv")
        calls: list[int] = []

        def source() -> HeldOutExamples:
            calls.append(len(calls))
            return held_out(made)

        method = Asking(lambda step: (step.heldout(), step.heldout()))
        Surgery(method, made.trunk).backward(*made.closures(), heldout=source)
        assert calls == [0, 1]
        assert method.answers[0][0] is not method.answers[0][1]

    def test_leaves_statistics_and_generators_alone(self) -> None:
        made = batch_norm_bench()

        def ask(step: Step) -> Any:
            batch = step.heldout()
            return batch.features, batch.gradient(made.heads[0])

        surgery = Surgery(Asking(ask), made.trunk, made.heads, objectives=1)
        surgery.add(0, made.losses(0))
        before, state = buffers(made.trunk, *made.heads), torch.get_rng_state()
        surgery.apply(heldout=lambda: held_out(made))
        for found, expected in zip(buffers(made.trunk, *made.heads), before, strict=True):
            equal(found, expected)
        equal(torch.get_rng_state(), state)

    def test_runs_under_the_loops_autocast(self) -> None:
        made = bench("conv")
        method = Asking(
            lambda step: (step.heldout().features, step.heldout().gradient(made.heads[0]))
        )
        with torch.autocast("cpu", dtype=torch.bfloat16):
            Surgery(method, made.trunk).backward(*made.closures(), heldout=lambda: held_out(made))
        assert method.answers[0][0].dtype == torch.bfloat16
        assert method.answers[0][1].dtype == torch.float32


def blobs(count: int, classes: int, seed: int) -> tuple[Tensor, Tensor]:
    """Return images (N, 3, 8, 8) of which a corner tells the class."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % classes
    images = torch.randn(count, 3, 8, 8, generator=generator)
    for label in range(classes):
        images[labels == label, label % 3, : 4 + label // 3] += 1.5
    return images, labels


def ce(output: Tensor, target: Tensor) -> Tensor:
    return cross_entropy(output, target, reduction="none")


class TestLibrary:
    """The documented use, in a plain loop."""

    def test_one_input_with_two_heads(self) -> None:
        trunk = nn.Sequential(nn.Conv2d(3, 8, 3, stride=2), nn.ReLU(), nn.Flatten())
        classify, rebuild = nn.Linear(72, 3), nn.Linear(72, 3 * 8 * 8)
        modules = nn.ModuleList([trunk, classify, rebuild])
        images, labels = blobs(30, 3, seed=1)
        sampled, sampled_labels = blobs(16, 3, seed=2)
        optimizer = torch.optim.AdamW(modules.parameters(), lr=1e-2)
        surgery = gradbench.Surgery("attittud", trunk, rank=10)
        history = []
        for _ in range(30):
            optimizer.zero_grad()
            features = trunk(images)
            primary = ce(classify(features), labels)
            auxiliary = mse_loss(rebuild(features), images.flatten(1), reduction="none").mean(1)
            surgery.backward(
                primary, auxiliary, sketch=lambda: ce(classify(trunk(sampled)), sampled_labels)
            )
            optimizer.step()
            surgery.after_step()
            history.append(surgery.step.losses.tolist())
        assert history[-1][0] < 0.3 * history[0][0]
        assert history[-1][1] < 0.9 * history[0][1]

    def test_two_inputs(self) -> None:
        trunk = nn.Sequential(
            nn.Conv2d(3, 8, 3, stride=2),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.Flatten(),
            nn.Dropout(0.1),
        )
        heads = [nn.Linear(72, 3), nn.Linear(72, 5)]
        modules = nn.ModuleList([trunk, *heads])
        (few, few_labels), (many, many_labels) = blobs(12, 3, seed=1), blobs(40, 5, seed=2)
        optimizer = torch.optim.SGD(modules.parameters(), lr=0.05, momentum=0.9)
        surgery = gradbench.Surgery("attittud", trunk, rank=3, samples=12, refresh_every=5)
        history = []
        for _ in range(30):
            optimizer.zero_grad(set_to_none=False)
            surgery.backward(
                lambda: ce(heads[0](trunk(few)), few_labels),
                lambda: ce(heads[1](trunk(many)), many_labels),
                sketch=lambda: ce(heads[0](trunk(few)), few_labels),
            )
            optimizer.step()
            surgery.after_step()
            history.append(surgery.step.losses.tolist())
        assert history[-1][0] < 0.3 * history[0][0]
        assert history[-1][1] < 0.8 * history[0][1]
        assert 0 < float(surgery.step.diagnostics()["captured_energy"]) <= 1

    @pytest.mark.parametrize("method", ["attittud", "pcgrad", "weighted-sum"])
    def test_global_generators_are_left_alone(self, method: str) -> None:
        made = small_bench()
        states = (torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy())  # type: ignore[index]  # noqa: NPY002
        surgery = Surgery(method, made.trunk, made.heads)
        for _ in range(2):
            surgery.backward(*made.closures(), sketch=lambda: made.losses(0))
            surgery.after_step()
        equal(torch.get_rng_state(), states[0])
        assert random.getstate() == states[1]
        assert (np.random.get_state()[1] == states[2]).all()  # type: ignore[index]  # noqa: NPY002

    def test_a_checkpoint_holds_memory_but_no_basis(self) -> None:
        class Counting(Total):
            def initial_state(self, setup: Setup) -> State:
                return {"steps": 0, "sum": torch.zeros(setup.parameters)}

            def weights_from_gramian(self, gramian: Tensor, step: Step) -> Tensor:
                step.state["steps"] += 1
                step.state["sum"] += step.jacobian[0].float()
                return torch.ones_like(gramian[0])

        made = small_bench()
        surgery = Surgery(Counting(), made.trunk)
        surgery.backward(*made.closures())
        saved = copy.deepcopy(surgery.state_dict())
        surgery.backward(*made.closures())
        other = Surgery(Counting(), made.trunk, objectives=2)
        other.load_state_dict(saved)
        other.backward(*made.closures())
        assert other.state is not None
        assert surgery.state is not None
        assert other.index == surgery.index == 2
        assert other.state["steps"] == 2
        equal(other.state["sum"], surgery.state["sum"])
        basis = Surgery("attittud", made.trunk)
        basis.backward(*made.closures(), sketch=made.closures()[0])
        assert basis.state is not None
        assert "basis" in basis.state
        assert "basis" not in basis.state_dict()["state"]


class Branched(Branching):
    """Trains branches of the weights."""

    def epoch(self, branches: Any) -> None:
        return


class Reading(Total):
    """Reads the epoch."""

    def weights_from_gramian(self, gramian: Tensor, step: Step) -> Tensor:
        return torch.full_like(gramian[0], step.epoch)


class TestErrors:
    @pytest.mark.parametrize(
        ("method", "words"),
        [
            ("attittud", "'attittud' asks for step.sketch.*sketch=lambda"),
            (Asking(lambda step: step.heldout()), "step.heldout.*heldout=lambda"),
            (Asking(lambda step: step.reevaluate()), "step.reevaluate.*closures"),
            (
                Asking(lambda step: step.hvp(step.jacobian[0], step.losses)),
                "step.hvp.*closures",
            ),
            (Reading(), "steps_per_epoch="),
        ],
    )
    def test_missing_inputs_are_named(self, method: Any, words: str) -> None:
        made = small_bench()
        with pytest.raises(MissingInputError, match=words):
            Surgery(method, made.trunk).backward(*made.both())

    def test_another_number_of_objectives_is_refused(self) -> None:
        made = small_bench()
        surgery = Surgery(Total(), made.trunk)
        surgery.backward(*made.both())
        with pytest.raises(ContractError, match=r"2 objectives.*found 1"):
            surgery.backward(made.losses(0))

    def test_another_number_of_batches_is_refused(self) -> None:
        made = small_bench()
        with pytest.raises(ContractError, match=r"1 independent batch.*found 2"):
            Surgery(Total(), made.trunk).backward([made.losses(0), made.losses(0)])

    def test_parts_need_the_number_of_objectives(self) -> None:
        made = small_bench()
        with pytest.raises(ContractError, match="objectives=K"):
            Surgery(Total(), made.trunk).add(0, made.losses(0))

    @pytest.mark.parametrize("method", [Total(), "weighted-sum"])
    def test_parts_of_every_objective_are_needed(self, method: str | Total) -> None:
        made = small_bench()
        surgery = Surgery(method, made.trunk, objectives=2)
        surgery.add(0, made.losses(0))
        with pytest.raises(ContractError, match=r"none of \[1\]"):
            surgery.apply()

    def test_an_objective_beyond_the_last_is_refused(self) -> None:
        made = small_bench()
        surgery = Surgery(Total(), made.trunk, objectives=2)
        with pytest.raises(ContractError, match="from 0 to 1, found 2"):
            surgery.add(2, made.losses(0))

    def test_no_objective_is_refused(self) -> None:
        with pytest.raises(ContractError, match="at least one objective"):
            Surgery(Total(), small_bench().trunk).backward()

    def test_an_unknown_field_is_met_with_the_nearest(self) -> None:
        with pytest.raises(UnknownKeyError, match=r"Did you mean 'attittud\.rank'"):
            Surgery("attittud", small_bench().trunk, rnak=3)

    def test_a_field_outside_its_range_is_refused(self) -> None:
        with pytest.raises(FieldError, match=r"attittud\.rank.*1 to 4096, found 0"):
            Surgery("attittud", small_bench().trunk, rank=0)

    def test_fields_beside_a_made_method_are_refused(self) -> None:
        with pytest.raises(FieldError, match="rank"):
            Surgery(Total(), small_bench().trunk, rank=3)

    def test_an_unknown_method_is_met_with_the_nearest(self) -> None:
        with pytest.raises(PluginNotFoundError, match="Did you mean 'attittud'"):
            Surgery("atittud", small_bench().trunk)

    def test_an_unknown_scale_is_refused(self) -> None:
        with pytest.raises(FieldError, match="'paper' or 'sum', found 'mean'"):
            Surgery(Total(), small_bench().trunk, scale="mean")  # type: ignore[arg-type]

    def test_parameters_in_half_precision_are_refused(self) -> None:
        with pytest.raises(ContractError, match="autocast"):
            Surgery(Total(), conv_net().bfloat16())

    def test_a_trunk_without_trainable_parameters_is_refused(self) -> None:
        with pytest.raises(ContractError, match="found none"):
            Surgery(Total(), conv_net().requires_grad_(False))

    @pytest.mark.parametrize(
        "move",
        [lambda m: m.double(), lambda m: m.to(memory_format=torch.channels_last)],
        ids=["type", "memory format"],
    )
    def test_a_moved_model_is_refused_after_the_first_step(
        self, move: Callable[[nn.Module], object]
    ) -> None:
        made = bench("conv")
        surgery = Surgery(Total(), made.trunk)
        surgery.backward(*made.closures())
        move(made.trunk)
        with pytest.raises(ContractError, match="new Surgery"):
            surgery.backward(torch.zeros(4), torch.zeros(4))

    @pytest.mark.parametrize("thaw", [True, False])
    def test_other_trainable_parameters_are_refused_after_the_first_step(self, thaw: bool) -> None:
        made = small_bench()
        first = made.trunk.get_submodule("0").requires_grad_(not thaw)
        surgery = Surgery(Total(), made.trunk)
        surgery.backward(*made.closures())
        first.requires_grad_(thaw)
        with pytest.raises(ContractError, match="new Surgery"):
            surgery.backward(*made.closures())

    @pytest.mark.parametrize("thaw", [True, False])
    def test_other_trainable_parameters_are_fine_before_the_first_step(self, thaw: bool) -> None:
        made = small_bench()
        first = made.trunk.get_submodule("0").requires_grad_(not thaw)
        surgery = Surgery(Asking(lambda step: step.blocks), made.trunk)
        first.requires_grad_(thaw)
        losses = made.both()
        expected = autograd_rows(made.trunk, losses)
        surgery.backward(*losses)
        assert_rows(surgery, expected)

    def test_branching_methods_are_refused(self) -> None:
        with pytest.raises(ContractError, match="gradbench run"):
            Surgery(Branched(), small_bench().trunk)

    def test_the_step_needs_a_step(self) -> None:
        with pytest.raises(ContractError, match="call backward first"):
            _ = Surgery(Total(), small_bench().trunk).step

    def test_losses_that_were_averaged_already_are_refused(self) -> None:
        made = small_bench()
        with pytest.raises(ContractError, match="reduction='none'"):
            Surgery(Total(), made.trunk).backward(made.losses(0).mean())
