from __future__ import annotations

from collections.abc import Callable
from functools import partial
from unittest.mock import Mock

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

import gradbench.training.loop as loop
from gradbench import registry
from gradbench.method import Phase, Plan, Scalarization
from gradbench.model import Features, Model
from gradbench.settings import Architecture, BatchNormPolicy, Budget, Optimizer
from gradbench.step import Step
from gradbench.task import TaskPair
from gradbench.training.batch_norm import reestimate_statistics
from gradbench.training.recipe import Observer, Recipe

BUDGET = Budget(epochs=1, fine_tune_epochs=1, steps_per_epoch=3, batch_size=16)


class Trunk(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Flatten(), nn.Linear(3 * 32 * 32, 4), nn.Dropout(0.5), nn.BatchNorm1d(4)
        )

    def forward(self, images: Tensor) -> Features:
        pooled = self.layers(images)
        return Features(pooled, tokens=pooled[:, None])

    @property
    def norm(self) -> nn.BatchNorm1d:
        found = self.layers[-1]
        assert isinstance(found, nn.BatchNorm1d)
        return found


class OneAfterTheOther(Scalarization):
    """The auxiliary alone, then nothing more."""

    def weights_from_losses(self, losses: Tensor, step: Step) -> Tensor:
        return torch.ones_like(losses)

    def phases(self, plan: Plan) -> tuple[Phase, ...]:
        return (Phase("auxiliary", (1,), plan.epochs, select="last"),)


class Together(OneAfterTheOther):
    def phases(self, plan: Plan) -> tuple[Phase, ...]:
        return (Phase("joint", (0, 1), plan.epochs, select="last"),)


def trained(method: Scalarization, policy: BatchNormPolicy) -> loop.Training:
    """Return a finished training on digits, in float64."""
    task: TaskPair = registry.load_class(registry.TASKS, "digits", TaskPair).obj()
    objectives = task.objectives()
    splits = task.splits("real", None, task.presets["default"], 0)  # type: ignore[arg-type]
    torch.manual_seed(0)
    model = Model(Trunk(), objectives, 4, dropout=0.0).double()
    recipe = Recipe(
        method=method,
        method_name="method",
        scale="paper",
        auxiliary_weight=1.0,
        optimizer=Optimizer(),
        budget=BUDGET,
        architecture=Architecture(batch_norm=policy),
        precision="fp64",
        seed=0,
    )
    cpu = torch.device("cpu")
    training = loop.Training(
        model, objectives, splits.for_training(), recipe, cpu, Mock(spec=Observer)
    )
    training.run()
    return training


def primary_statistics(training: loop.Training) -> tuple[Tensor, Tensor]:
    """Return the mean over the primary's first batches of each batch's mean and variance."""
    trunk = training.model.backbone
    assert isinstance(trunk, Trunk)
    trunk.eval()
    seen: list[Tensor] = []
    hook = trunk.norm.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        for index in range(BUDGET.steps_per_epoch):
            training.losses.closure(0, index, 0, with_primary=True)()
    hook.remove()
    means = torch.stack([batch.mean(0) for batch in seen]).mean(0)
    variances = torch.stack([batch.var(0) for batch in seen]).mean(0)
    return means, variances


def norm_of(training: loop.Training) -> nn.BatchNorm1d:
    trunk = training.model.backbone
    assert isinstance(trunk, Trunk)
    return trunk.norm


@pytest.mark.parametrize("policy", ["primary", "shared"])
def test_a_phase_without_the_primary_ends_with_the_statistics_of_its_batches(
    policy: BatchNormPolicy,
) -> None:
    training = trained(OneAfterTheOther(), policy)
    mean, variance = primary_statistics(training)
    norm = norm_of(training)
    assert norm.running_mean is not None
    assert norm.running_var is not None
    assert_close(norm.running_mean, mean)
    assert_close(norm.running_var, variance)
    assert norm.momentum == 0.1


def test_a_phase_with_the_primary_keeps_its_running_statistics() -> None:
    norm = norm_of(trained(Together(), "primary"))
    assert norm.num_batches_tracked == BUDGET.steps_per_epoch
    mean, _ = primary_statistics(trained(Together(), "primary"))
    assert norm.running_mean is not None
    assert not torch.allclose(norm.running_mean, mean)


def test_frozen_statistics_stay_frozen() -> None:
    norm = norm_of(trained(OneAfterTheOther(), "frozen"))
    assert_close(norm.running_mean, torch.zeros(4, dtype=torch.float64), rtol=0, atol=0)
    assert norm.num_batches_tracked == 0


def test_weights_and_modes_are_left_as_they_are() -> None:
    trunk = Trunk().train()
    trunk.norm.eval()
    before = [parameter.clone() for parameter in trunk.parameters()]
    reestimate_statistics([trunk], forwards(trunk, 5))
    assert_close(list(trunk.parameters()), before, rtol=0, atol=0)
    assert all(parameter.grad is None for parameter in trunk.parameters())
    assert [part.training for part in trunk.layers] == [True, True, True, False]


def test_it_draws_nothing_and_gives_the_same_bits() -> None:
    torch.manual_seed(0)
    trunk = Trunk()
    given = forwards(trunk, 5)
    state = torch.get_rng_state()
    reestimate_statistics([trunk], given)
    found = [buffer.clone() for buffer in trunk.buffers()]
    reestimate_statistics([trunk], given)
    assert_close(list(trunk.buffers()), found, rtol=0, atol=0)
    assert torch.equal(torch.get_rng_state(), state)


def test_without_batch_norm_no_batch_is_looked_at() -> None:
    def fail() -> None:
        raise AssertionError

    reestimate_statistics([nn.Linear(1, 1), nn.LayerNorm(1)], [fail])


def test_modes_come_back_when_a_forward_fails() -> None:
    trunk = Trunk()

    def fail() -> None:
        raise OSError("gone")

    with pytest.raises(OSError, match="gone"):
        reestimate_statistics([trunk], [fail])
    assert trunk.norm.training
    assert trunk.norm.momentum == 0.1


def forwards(trunk: Trunk, count: int) -> list[Callable[[], object]]:
    draw = torch.Generator().manual_seed(0)
    images = [torch.randn(8, 3, 32, 32, generator=draw) for _ in range(count)]
    return [partial(trunk, batch) for batch in images]
