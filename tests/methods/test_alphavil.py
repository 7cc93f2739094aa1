from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

import gradbench
from gradbench.branches import Branch, MemoryBranches
from gradbench.method import Setup
from gradbench_methods.alphavil import AlphaVIL

Loss = Callable[[Tensor, Tensor, int], Tensor]  # θ (P,), a head's number, step -> a scalar

RATE = 0.1  # of gradient descent in a branch


def vector(*numbers: float) -> Tensor:
    return torch.tensor(numbers, dtype=torch.float64)


class Trunk(nn.Module):
    def __init__(self, theta: Tensor) -> None:
        super().__init__()
        self.theta = nn.Parameter(theta.clone())


class Head(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.number = nn.Parameter(vector(1.0))


class World:
    """Parameters θ and a number a head, with a loss a task; plain descent with momentum."""

    def __init__(
        self,
        theta: Sequence[float],
        losses: Sequence[Loss],
        meta_loss: Callable[[Tensor, Tensor], Tensor],
        *,
        steps: int = 1,
        momentum: float = 0.0,
    ) -> None:
        self.trunk = Trunk(vector(*theta))
        self.heads = [Head() for _ in losses]
        self.branches = MemoryBranches(
            nn.ModuleList([self.trunk, *self.heads]),
            self.trunk,
            self.heads,
            losses=[partial(self.loss, k, loss) for k, loss in enumerate(losses)],
            meta_loss=lambda: meta_loss(self.trunk.theta, self.heads[0].number)[None],
            metric=lambda: 0.0,
            optimizer=lambda parameters: torch.optim.SGD(parameters, lr=RATE, momentum=momentum),
            steps_per_epoch=steps,
            state=AlphaVIL().initial_state(
                Setup(len(losses), len(theta), torch.device("cpu"), torch.float64)
            ),
        )

    def loss(self, k: int, loss: Loss, step: int) -> Tensor:
        return loss(self.trunk.theta, self.heads[k].number, step)[None]

    @property
    def theta(self) -> Tensor:
        return self.trunk.theta.detach().clone()

    @property
    def numbers(self) -> Tensor:
        return torch.cat([head.number.detach() for head in self.heads])

    @property
    def weights(self) -> Tensor:
        weights: Tensor = self.branches.state["weights"]
        return weights

    def train(self, method: AlphaVIL, epochs: int = 1) -> World:
        for epoch in range(epochs):
            self.branches.begin(epoch)
            method.epoch(self.branches)
        return self


def distance(target: Sequence[float]) -> Callable[[Tensor, Tensor], Tensor]:
    wanted = vector(*target)
    return lambda theta, number: 0.5 * (theta - wanted).square().sum()


def linear(row: Sequence[float]) -> Loss:
    """Return the loss ``h g·θ``, whose gradient in θ is h times the row g."""
    return lambda theta, number, step: (number * (theta @ vector(*row))).sum()


def curved(draw: torch.Generator) -> tuple[Loss, Tensor, Tensor]:
    """Return a loss with curvature, whose data change from step to step."""
    inputs = torch.randn(20, 6, 4, generator=draw, dtype=torch.float64)
    targets = torch.randn(20, 6, generator=draw, dtype=torch.float64)

    def loss(theta: Tensor, number: Tensor, step: int) -> Tensor:
        return 0.5 * (number * (inputs[step] @ theta).tanh() - targets[step]).square().mean()

    return loss, inputs, targets


# the paper, as far as it is known, written out


def oracle(
    theta: Tensor,
    losses: Sequence[Loss],
    meta_loss: Callable[[Tensor, Tensor], Tensor],
    method: AlphaVIL,
    epochs: int,
    steps: int,
    momentum: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return θ (P,), the heads' numbers (K,) and the weights (K,) after some epochs."""
    weights = [1.0] * len(losses)
    numbers = [vector(1.0) for _ in losses]
    for epoch in range(epochs):
        changes: list[Tensor] = []
        for task, loss in enumerate(losses):
            body = theta.clone().requires_grad_()
            head = numbers[task].clone().requires_grad_()
            speed = [torch.zeros_like(body), torch.zeros_like(head)]
            for step in range(round(method.share * steps)):
                value = weights[task] * loss(body, head, epoch * steps + step)
                gradients = torch.autograd.grad(value, [body, head])
                with torch.no_grad():
                    for i, parameter in enumerate((body, head)):
                        speed[i] = momentum * speed[i] + gradients[i]
                        parameter -= RATE * speed[i]
            changes.append(body.detach() - theta)
            numbers[task] = head.detach()
        alphas = [1.0] * len(losses)
        for _ in range(method.alpha_steps):
            leaves = [vector(alpha).requires_grad_() for alpha in alphas]
            mixed = theta + sum(
                (leaf * change for leaf, change in zip(leaves, changes, strict=True)),
                torch.zeros_like(theta),
            )
            mixed.retain_grad()
            meta_loss(mixed, numbers[0]).backward()  # type: ignore[no-untyped-call]
            assert mixed.grad is not None
            for task, leaf in enumerate(leaves):
                assert leaf.grad is not None
                unit = changes[task].norm() * mixed.grad.norm()
                alphas[task] -= method.alpha_rate * float(leaf.grad / unit)
        for task, alpha in enumerate(alphas):
            theta = theta + alpha * changes[task]
            weights[task] = max(method.floor, weights[task] + alpha - 1)
    return theta, torch.cat(numbers), vector(*weights)


@pytest.mark.parametrize("objectives", [1, 2, 4])
@pytest.mark.parametrize(
    "method",
    [
        AlphaVIL(),
        AlphaVIL(share=0.5, alpha_steps=3, alpha_rate=0.3),
        AlphaVIL(alpha_steps=20, alpha_rate=0.1, floor=0.7),
    ],
)
def test_agrees_with_the_method_written_out(method: AlphaVIL, objectives: int) -> None:
    draw = torch.Generator().manual_seed(objectives)
    losses = [curved(draw)[0] for _ in range(objectives)]
    held_out = curved(draw)[0]

    def meta_loss(theta: Tensor, number: Tensor) -> Tensor:
        return held_out(theta, number, 0)

    start = torch.randn(4, generator=draw, dtype=torch.float64)
    world = World(start.tolist(), losses, meta_loss, steps=4, momentum=0.9)
    world.train(method, epochs=3)
    theta, numbers, weights = oracle(start, losses, meta_loss, method, 3, 4, 0.9)
    assert_close(world.theta, theta)
    assert_close(world.numbers, numbers)
    assert_close(world.weights, weights)
    assert (weights - 1).abs().max() > 0.05


# by hand


@pytest.mark.parametrize("rate", [0.01, 0.1, 0.5])
def test_one_step_along_a_change_that_is_too_short(rate: float) -> None:
    """L = ½ (θ - 2)², θ = 0, δ = 1.2: the gradient at 1.2 is -0.8, its cosine with δ is -1."""
    world = World([0.0], [linear([-1.2 / RATE])], distance([2.0]))
    world.train(AlphaVIL(alpha_steps=1, alpha_rate=rate))
    assert_close(world.weights, vector(1 + rate))
    assert_close(world.theta, vector(1.2 * (1 + rate)))


def test_many_short_steps_come_to_rest_at_the_best_mixture() -> None:
    world = World([0.0], [linear([-1.2 / RATE])], distance([2.0]))
    world.train(AlphaVIL(alpha_steps=200, alpha_rate=0.01))
    assert_close(world.weights, vector(2 / 1.2), rtol=0, atol=0.01)  # it swings by a step
    assert_close(world.theta, vector(2.0), rtol=0, atol=0.012)


def test_a_change_that_hurts_can_be_left_out_altogether() -> None:
    world = World([0.0], [linear([-1.2 / RATE])], distance([-1.0]))  # the cosine is 1
    world.train(AlphaVIL(alpha_steps=1, alpha_rate=1.0))
    assert_close(world.theta, vector(0.0), rtol=0, atol=0)
    assert_close(world.weights, vector(0.0), rtol=0, atol=0)


def test_each_coefficient_is_moved_by_the_cosine_of_its_own_change() -> None:
    """Changes (1, 0) and (0, 1), target (1, 5): the gradient at (1, 1) is (0, -4)."""
    rows = [-1 / RATE, 0.0], [0.0, -1 / RATE]
    world = World([0.0, 0.0], [linear(row) for row in rows], distance([1.0, 5.0]))
    world.train(AlphaVIL(alpha_steps=1, alpha_rate=0.1))
    assert_close(world.theta, vector(1.0, 1.1))
    assert_close(world.weights, vector(1.0, 1.1))


# what must hold


def three_tasks(target: Sequence[float] = (0.0, 3.0, 0.0)) -> World:
    rows = [1.0, 0.0, 2.0], [0.5, -1.0, 0.0], [0.0, 1.0, 1.0]
    return World([1.0, 1.0, 1.0], [linear(row) for row in rows], distance(target))


def test_without_steps_of_alpha_the_changes_are_added_up() -> None:
    world = three_tasks()
    branches, start = world.branches, world.theta
    changes = [branches.vector(branches.train(row, 1)) - start for row in torch.eye(3)]
    world.train(AlphaVIL(alpha_steps=0))
    assert_close(world.theta, start + sum(changes, torch.zeros(3)))
    assert_close(world.weights, torch.ones(3, dtype=torch.float64), rtol=0, atol=0)


def test_one_step_a_task_is_a_weighted_sum_of_gradients() -> None:
    world = three_tasks()
    world.weights.copy_(vector(0.5, 2.0, 1.0))
    before, start = world.weights.clone(), world.theta
    world.train(AlphaVIL(alpha_steps=5, alpha_rate=0.03))
    alphas = world.weights - before + 1
    assert (alphas - 1).abs().min() > 1e-3
    rows = torch.stack([vector(1, 0, 2), vector(0.5, -1, 0), vector(0, 1, 1)])
    assert_close(world.theta, start - RATE * (alphas * before) @ rows)
    assert_close(world.numbers, 1 - RATE * before * (rows @ start))  # each by its own branch


def test_a_head_moves_in_its_own_branch_whatever_its_coefficient() -> None:
    few, many = three_tasks(), three_tasks()
    few.train(AlphaVIL(alpha_steps=0))
    many.train(AlphaVIL(alpha_steps=9, alpha_rate=0.3))
    assert_close(few.numbers, many.numbers, rtol=0, atol=0)
    assert not torch.equal(few.theta, many.theta)


def test_the_derivative_of_a_coefficient_is_a_product_with_the_gradient() -> None:
    draw = torch.Generator().manual_seed(0)
    loss = curved(draw)[0]
    start, *changes = torch.randn(4, 4, generator=draw, dtype=torch.float64)
    deltas, alphas = torch.stack(changes), torch.ones(3, dtype=torch.float64, requires_grad=True)
    loss(start + alphas @ deltas, vector(1.0), 0).backward()  # type: ignore[no-untyped-call]
    mixed = (start + deltas.sum(0)).requires_grad_()
    loss(mixed, vector(1.0), 0).backward()  # type: ignore[no-untyped-call]
    assert alphas.grad is not None
    assert mixed.grad is not None
    assert_close(alphas.grad, deltas @ mixed.grad)


def test_a_task_of_which_the_weight_is_zero_stays_out() -> None:
    world = three_tasks()
    world.weights.copy_(vector(1.0, 0.0, 1.0))
    world.train(AlphaVIL(), epochs=3)
    assert world.weights[1] == 0
    assert world.numbers[1] == 1
    assert world.theta.isfinite().all()


def test_no_weight_falls_below_the_floor() -> None:
    world = three_tasks(target=[50.0, 50.0, 50.0])
    world.train(AlphaVIL(alpha_rate=0.1, floor=0.25), epochs=4)
    assert world.weights.min() == 0.25


def test_a_gradient_of_zero_moves_nothing() -> None:
    world = World([0.0], [linear([-1.0])], lambda theta, number: 0.0 * theta.sum())
    world.train(AlphaVIL())
    assert_close(world.weights, vector(1.0), rtol=0, atol=0)


@pytest.mark.parametrize(("share", "steps"), [(1.0, 10), (0.5, 5), (0.25, 2), (0.35, 4), (0.01, 1)])
def test_a_share_of_the_steps_of_an_epoch_at_least_one(
    share: float, steps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    world, asked = World([0.0], [linear([1.0])] * 2, distance([1.0]), steps=10), []
    train = world.branches.train

    def watched(weights: Tensor, count: int, *, optimizer: str | None = None) -> Branch:
        asked.append((weights.tolist(), count, optimizer))
        return train(weights, count, optimizer=optimizer)

    monkeypatch.setattr(world.branches, "train", watched)
    world.train(AlphaVIL(share=share))
    assert asked == [([1.0, 0.0], steps, None), ([0.0, 1.0], steps, None)]


def test_it_looks_at_held_out_examples_as_often_as_it_says() -> None:
    calls = []

    def meta_loss(theta: Tensor, number: Tensor) -> Tensor:
        calls.append(theta.detach().clone())
        return theta.sum()

    World([0.0], [linear([1.0])], meta_loss).train(AlphaVIL(alpha_steps=7), epochs=2)
    assert len(calls) == 14


# in the benchmark


def test_it_runs_in_the_benchmark(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRADBENCH_HOME", str(tmp_path))
    settings = {
        "budget.steps_per_epoch": 4,
        "budget.batch_size": 8,
        "budget.fine_tune_epochs": 1,
        "method.share": 0.5,
        "method.alpha_steps": 3,
    }
    result = gradbench.run(
        "alphavil", "digits", backbone="test_resnet", epochs=2, device="cpu", settings=settings
    )
    assert (result.status, result.method.kind) == ("ok", "branching")
    assert (result.task.sizes.train, result.task.sizes.meta) == (80, 20)
    assert result.cost.backward_passes == 2 * (2 * 2 + 3) + 4
    statistics = 2 * 4  # of batch norm, once an epoch
    assert result.cost.forward_passes == 2 * (2 * 2 + 3) + 4 + statistics
