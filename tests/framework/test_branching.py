"""Methods that train branches, in the benchmark's own loop."""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from gradbench.branches import Branch, Branches
from gradbench.errors import ContractError, MissingInputError, NonFiniteLossError
from gradbench.method import Branching, Method, Phase, Plan, Scalarization, Setup, State
from gradbench.model import Features, Model
from gradbench.objectives import Classification
from gradbench.seeding import ExampleRandom
from gradbench.settings import Architecture, BatchNormPolicy, Budget, Optimizer
from gradbench.step import Step
from gradbench.task import Examples, TensorSet, TrainingSplits
from gradbench.training import answers
from gradbench.training.loop import Training
from gradbench.training.recipe import Epoch, Recipe

WIDTH, CLASSES, OBJECTIVES = 6, 2, 3
CPU = torch.device("cpu")
BUDGET = Budget(epochs=2, fine_tune_epochs=1, steps_per_epoch=2, batch_size=8)
ONE_EPOCH = dataclasses.replace(BUDGET, epochs=1)
PLAIN = Optimizer(name="sgd", lr=0.1, momentum=0.0, weight_decay=0.0, warmup_epochs=0, clip=0)
PLAIN_CONSTANT = dataclasses.replace(PLAIN, schedule="constant")


class Killed(BaseException):
    """What ends a run at a moment of one's choice."""


class Points(Classification):
    """Tell clouds of points apart; writes down which examples it trained on."""

    def __init__(self, name: str, head_name: str | None = None) -> None:
        super().__init__(name, CLASSES, margin=0.1, head_name=head_name)
        self.seen: list[tuple[int, ...]] = []
        self.poisoned_from: float = np.inf  # how many losses it has before they become NaN
        self.calls = 0

    def batch(self, examples: Examples, random: ExampleRandom | None) -> tuple[Tensor, Tensor]:
        if random is not None:
            self.seen.append(tuple(examples["id"].tolist()))
        return examples["input"], examples["label"]

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        self.calls += 1
        return super().loss(output, target) * (np.nan if self.calls > self.poisoned_from else 1.0)


class Trunk(nn.Module):
    """Two layers with batch norm and dropout; counts its forwards in training."""

    steps: Tensor

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.norm, self.dropout = nn.BatchNorm1d(WIDTH), nn.Dropout(dropout)
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

    def forward(self, inputs: Tensor) -> Features:
        self.steps += self.training
        pooled = self.second(self.dropout(self.norm(self.first(inputs)).relu()))
        return Features(pooled, tokens=pooled[:, None])


def points(first: int, count: int) -> TensorSet:
    draw = np.random.default_rng(first)
    labels = np.arange(count) % CLASSES
    inputs = draw.normal(size=(count, WIDTH)) + labels[:, None]
    examples = {
        "id": torch.arange(first, first + count),
        "input": torch.from_numpy(inputs),
        "label": torch.from_numpy(labels),
    }
    return TensorSet([str(i) for i in range(first, first + count)], examples, labels)


@dataclass
class Watcher:
    """Keeps what the loop tells."""

    rows: list[dict[str, Any]] = field(default_factory=list)
    steps: int = 0

    def plan(self, steps: int, done: int) -> None:
        self.steps = done

    def step(self, phase: str) -> None:
        self.steps += 1

    def epoch(self, epoch: Epoch) -> None:
        row = dataclasses.asdict(epoch)
        assert row.pop("steps_per_second") >= 0
        self.rows.append(row)


class World:
    """A training of small clouds of points, in float64."""

    def __init__(
        self,
        method: Method,
        *,
        objectives: tuple[Points, ...] | None = None,
        save: Callable[[dict[str, Any]], None] = lambda state: None,
        policy: BatchNormPolicy = "primary",
        optimizer: Optimizer | None = None,
        budget: Budget = BUDGET,
        dropout: float = 0.3,
        meta: bool = True,
    ) -> None:
        self.objectives = objectives or tuple(Points(name) for name in ("primary", "one", "two"))
        torch.manual_seed(0)
        self.trunk = Trunk(dropout)
        model = Model(self.trunk, self.objectives, WIDTH, dropout).double()
        recipe = Recipe(
            method=method,
            method_name="method",
            scale="paper",
            auxiliary_weight=1.0,
            optimizer=optimizer or Optimizer(),
            budget=budget,
            architecture=Architecture(batch_norm=policy),
            precision="fp64",
            seed=0,
        )
        splits = TrainingSplits(
            points(0, 40),
            points(100, 10),
            tuple(points(1000 * k, 30) for k in range(1, len(self.objectives))),
            points(200, 12) if meta else None,
        )
        self.meta, self.watcher = splits.meta, Watcher()
        self.training = Training(model, self.objectives, splits, recipe, CPU, self.watcher, save)
        self.model = model

    def run(self, checkpoint: dict[str, Any] | None = None) -> World:
        self.selection = self.training.run(checkpoint)
        return self

    def weights(self) -> dict[str, Tensor]:
        return {key: value.clone() for key, value in self.model.state_dict().items()}


Script = Callable[[Branches], Any]


def scripted(script: Script) -> Branching:
    """Return a method that does in every epoch what a test wants; FOUND gets what it returns."""

    @dataclass(frozen=True)
    class Scripted(Branching):
        def epoch(self, branches: Branches) -> None:
            FOUND.append(script(branches))
            branches.commit(branches.start)

        def phases(self, plan: Plan) -> tuple[Phase, ...]:
            return (Phase("joint", tuple(range(plan.objectives)), plan.epochs, select="last"),)

    return Scripted()


FOUND: list[Any] = []


@pytest.fixture(autouse=True)
def _no_findings() -> None:
    FOUND.clear()


def once(script: Script, **options: Any) -> Any:
    """Return what ``script`` finds in an epoch of two steps."""
    World(scripted(script), budget=ONE_EPOCH, **options).run()
    return FOUND[0]


def only(k: int) -> Tensor:
    return torch.eye(OBJECTIVES)[k]


def same(one: Branch, other: Branch) -> bool:
    return all(
        torch.equal(value, other.parameters[key]) for key, value in one.parameters.items()
    ) and all(torch.equal(value, other.buffers[key]) for key, value in one.buffers.items())


# a run that is cut off


@dataclass(frozen=True)
class Everything(Branching):
    """Like ForkMerge, with a memory, draws, a gradient and two commits."""

    needs_meta = True

    def initial_state(self, setup: Setup) -> State:
        zeros = torch.zeros(setup.parameters, dtype=setup.dtype)
        return {"past": zeros, "adam": torch.optim.Adam([zeros]), "epochs": 0}

    def epoch(self, branches: Branches) -> None:
        branches.state["epochs"] += 1
        steps = branches.steps_per_epoch
        mixtures = [torch.tensor(row) for row in ([1.0, 0, 0], [1.0, 0.5, 0], [1.0, 0, 2.0])]
        mixtures = [mixtures[i] for i in branches.rng.permutation(3)]
        forks = [branches.train(row, steps, optimizer=f"{i}") for i, row in enumerate(mixtures)]
        forks.sort(key=branches.evaluate, reverse=True)
        shares = [0.5, 0.3, 0.2]
        branches.commit(branches.merge(forks, shares))
        branches.state["past"].grad = branches.gradient(branches.start).mul_(2)
        branches.state["adam"].step()
        alone = branches.train(torch.tensor([0.0, 1, 0]), 1)
        branches.record(value=torch.tensor(branches.evaluate(alone)), odd=torch.tensor(np.nan))
        moved = branches.vector(alone) + 0.01 * branches.state["past"]
        branches.commit(branches.at(moved, [*forks[:1], alone, alone]))


CALLS = 3 + 3 + 1 + 1 + 1 + 1 + 1  # of an epoch; each is followed by a checkpoint
SAVES = 2 * (CALLS + 1) + 1  # and each epoch too, that of fine-tuning among them


@dataclass
class Saved:
    """A run with all the checkpoints that it made."""

    world: World
    checkpoints: list[bytes] = field(default_factory=list)

    def checkpoint(self, after: int) -> Any:
        return torch.load(io.BytesIO(self.checkpoints[after - 1]), weights_only=True)


def saved_run(last: float = np.inf) -> Saved:
    """Return a run that saves after every call, and is killed in the ``last`` save, if any."""

    def save(state: dict[str, Any]) -> None:
        buffer = io.BytesIO()
        torch.save(state, buffer)
        found.checkpoints.append(buffer.getvalue())
        if len(found.checkpoints) == last:
            raise Killed

    found = Saved(World(Everything(), save=save))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(answers, "WORTH", 0)
        if last < np.inf:
            with pytest.raises(Killed):
                found.world.run()
        else:
            found.world.run()
    return found


@pytest.fixture(scope="module")
def undisturbed() -> Saved:
    return saved_run()


def outcome(world: World, rows: list[dict[str, Any]]) -> dict[str, Any]:
    costs = world.training.costs
    return {
        "rows": rows,
        "selection": world.selection,
        "diagnostics": world.training.diagnostics,
        "costs": (costs.forward_passes, costs.backward_passes, costs.examples, len(costs.steps)),
        "shown": world.watcher.steps,
    }


@pytest.mark.parametrize("after", range(1, SAVES + 1))
def test_going_on_after_any_call_ends_with_the_same_bits(after: int, undisturbed: Saved) -> None:
    checkpoint = undisturbed.checkpoint(after)
    rows = undisturbed.world.watcher.rows
    world = World(Everything()).run(checkpoint)
    found = outcome(world, rows[: checkpoint["epochs_seen"]] + world.watcher.rows)
    assert found == outcome(undisturbed.world, rows)
    assert len(rows) == 3
    assert_close(world.weights(), undisturbed.world.weights(), rtol=0, atol=0)


@pytest.mark.parametrize("after", [2, CALLS + 6])
def test_a_run_that_is_killed_leaves_what_one_that_was_not_left(
    after: int, undisturbed: Saved
) -> None:
    killed, world = saved_run(after).checkpoint(after), World(Everything())
    world.run(killed)
    assert_close(world.weights(), undisturbed.world.weights(), rtol=0, atol=0)


def test_there_is_a_checkpoint_after_every_call(undisturbed: Saved) -> None:
    assert len(undisturbed.checkpoints) == SAVES
    calls = []
    for after in range(1, SAVES):
        phase = undisturbed.checkpoint(after)["phase"]
        if phase["epoch"] < BUDGET.epochs:
            calls.append((phase["epoch"], len(phase["trainer"]["answers"])))
    assert calls == [*((0, n) for n in range(1, CALLS + 1)), *((1, n) for n in range(CALLS + 1))]


def test_what_was_answered_is_not_done_again(undisturbed: Saved) -> None:
    world = World(Everything()).run(undisturbed.checkpoint(7))  # until the first commit
    done, all_of_it = (len(each.objectives[2].seen) for each in (world, undisturbed.world))
    assert done == all_of_it - BUDGET.steps_per_epoch


def test_checkpoints_cost_little_beside_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(answers, "WORTH", 1e9)
    saved: list[int] = []
    World(Everything(), save=lambda state: saved.append(state["epochs_seen"])).run()
    assert saved == [0, 1, 2, 3]  # the first call and the ends of three epochs


def test_an_epoch_that_begins_again_in_another_way_is_found(undisturbed: Saved) -> None:
    @dataclass(frozen=True)
    class Fickle(Everything):
        def epoch(self, branches: Branches) -> None:
            branches.evaluate(branches.start)

    with pytest.raises(ContractError, match="'train' now, found 'evaluate'"):
        World(Fickle()).run(undisturbed.checkpoint(4))


# training


@dataclass(frozen=True)
class WeightedSum(Scalarization):
    """Three times the first auxiliary."""

    def weights_from_losses(self, losses: Tensor, step: Step) -> Tensor:
        return torch.tensor([1.0, 3.0, 1.0], dtype=losses.dtype)


@dataclass(frozen=True)
class OneBranch(Branching):
    """The same in one branch."""

    def epoch(self, branches: Branches) -> None:
        weights, steps = torch.tensor([1.0, 3.0, 1.0]), branches.steps_per_epoch
        branches.commit(branches.train(weights, steps, optimizer="the only one"))


@pytest.mark.parametrize("policy", ["primary", "shared", "frozen"])
@pytest.mark.parametrize("optimizer", [Optimizer(clip=0.1), Optimizer(name="sgd", clip=0.1)])
def test_one_branch_is_the_weighted_sum(policy: BatchNormPolicy, optimizer: Optimizer) -> None:
    budget = dataclasses.replace(BUDGET, epochs=3, steps_per_epoch=4)
    one, other = (
        World(method, policy=policy, optimizer=optimizer, budget=budget).run()
        for method in (OneBranch(), WeightedSum())
    )
    assert_close(one.weights(), other.weights())
    for row, expected in zip(one.watcher.rows, other.watcher.rows, strict=True):
        assert row["losses"] == pytest.approx(expected.pop("losses"))
        assert {**row, "losses": {}} == {**expected, "losses": {}}
    assert one.watcher.steps == other.watcher.steps == 4 * budget.steps_per_epoch
    for name in ("forward_passes", "examples"):
        assert getattr(one.training.costs, name) == getattr(other.training.costs, name)


def test_all_branches_of_an_epoch_see_the_same_batches_and_dropout() -> None:
    def script(branches: Branches) -> bool:
        first = branches.train(torch.ones(OBJECTIVES), 2)
        branches.evaluate(first)
        branches.gradient(branches.merge([first, branches.start], [0.5, 0.5]))
        torch.manual_seed(branches.epoch)
        branches.train(only(1), 2)
        return same(first, branches.train(torch.ones(OBJECTIVES), 2))

    world = World(scripted(script)).run()
    assert FOUND == [True, True]
    drawn = world.objectives[1].seen
    assert drawn[:2] == drawn[2:4] == drawn[4:6]
    assert drawn[6:8] == drawn[8:10] == drawn[10:12]
    assert len(drawn) == 12
    assert set(drawn[:2]).isdisjoint(drawn[6:8])


def test_an_objective_without_weight_is_left_alone() -> None:
    def script(branches: Branches) -> tuple[Branch, Branch]:
        return branches.start, branches.train(only(1), 2)

    world = World(scripted(script), budget=ONE_EPOCH).run()
    start, fork = FOUND[0]
    assert [len(objective.seen) for objective in world.objectives] == [0, 2, 0]
    moved = {
        key.rpartition(".")[0]
        for key, value in fork.parameters.items()
        if not torch.equal(value, start.parameters[key])
    }
    assert {key.rpartition(".")[0] for key in fork.parameters} - moved == {
        "own.head0.linear",
        "own.head2.linear",
    }
    assert set(world.watcher.rows[0]["losses"]) == {"one"}


def test_a_branch_of_nothing_is_the_start() -> None:
    def script(branches: Branches) -> bool:
        return same(branches.start, branches.train(torch.zeros(OBJECTIVES), 2))

    assert once(script)


def test_an_optimizer_goes_on_under_its_name_alone() -> None:
    def script(branches: Branches) -> list[Branch]:
        names = (None, "a", "b", None, "a")
        return [branches.train(torch.ones(OBJECTIVES), 2, optimizer=name) for name in names]

    momentum = dataclasses.replace(PLAIN_CONSTANT, momentum=0.9)
    World(scripted(script), optimizer=momentum).run()
    new, a, b, again, a_again = FOUND[0]
    assert same(new, a)
    assert same(new, b)
    assert same(new, again)
    assert not same(new, a_again)
    assert [fork.optimizer is None for fork in FOUND[0]] == [True, False, False, True, False]
    buffers = [fork.optimizer["state"][0]["momentum_buffer"] for fork in (a, a_again)]
    assert not torch.equal(*buffers)  # nobody wrote into the state that the first branch left
    new, a, b, *_ = FOUND[1]  # an epoch later both names have a past, of other lengths
    assert not same(new, b)
    assert not same(a, b)


def test_a_branch_leaves_no_trace_in_what_follows() -> None:
    def with_branches(count: int) -> Callable[[Branches], object]:
        def script(branches: Branches) -> None:
            fork = branches.train(torch.ones(OBJECTIVES), 2, optimizer="main")
            for _ in range(count):
                branches.gradient(branches.train(only(0), 1, optimizer="aside"))
            branches.commit(fork)

        return script

    one, other = (World(scripted(with_branches(count))).run() for count in (0, 2))
    assert_close(one.weights(), other.weights(), rtol=0, atol=0)


def test_rates_follow_the_schedule_of_the_phase_in_every_branch() -> None:
    def script(branches: Branches) -> list[float]:
        lengths = []
        for steps in (1, 2, 5):
            fork = branches.train(only(0), steps, optimizer=f"{steps}")
            assert fork.optimizer is not None
            lengths.append(fork.optimizer["param_groups"][0]["lr"])
        return lengths

    World(scripted(script), optimizer=dataclasses.replace(PLAIN, schedule="cosine")).run()
    cosine = [0.05 * (1 + np.cos(np.pi * step / 4)) for step in range(4)]
    assert FOUND[0] == pytest.approx([cosine[0], cosine[1], cosine[3]])
    assert FOUND[1] == pytest.approx([cosine[2], cosine[3], cosine[3]])  # past the end it stays


def test_heads_and_trunk_are_clipped_apart() -> None:
    def script(branches: Branches) -> list[float]:
        fork = branches.train(1e3 * torch.ones(OBJECTIVES), 1)
        groups = ("shared", *(f"own.head{k}" for k in range(OBJECTIVES)))
        return [
            float(
                torch.cat(
                    [
                        (value - branches.start.parameters[key]).flatten()
                        for key, value in fork.parameters.items()
                        if key.startswith(group)
                    ]
                ).norm()
            )
            for group in groups
        ]

    lengths = once(script, optimizer=dataclasses.replace(PLAIN_CONSTANT, clip=0.5))
    assert lengths == pytest.approx([0.1 * 0.5] * (1 + OBJECTIVES), rel=1e-4)


def test_an_epoch_ends_where_it_was_committed_whatever_is_looked_at_then() -> None:
    @dataclass(frozen=True)
    class Curious(OneBranch):
        def epoch(self, branches: Branches) -> None:
            super().epoch(branches)
            branches.evaluate(branches.train(only(1), 1))

    one, other = (World(method).run() for method in (OneBranch(), Curious()))
    assert_close(one.weights(), other.weights(), rtol=0, atol=0)


# batch norm, and other buffers


def primary_means(world: World, branch: Branch) -> Tensor:
    """Return what the batch norm of a branch sees on the primary's first batches, on average."""
    train, weights = points(0, 40), branch.parameters
    batches = [
        train.take(np.array(ids))["input"] for ids in world.objectives[0].seen[-2:]
    ]  # those that were looked at last
    first = [
        nn.functional.linear(
            batch,
            weights["shared.backbone.first.weight"],
            weights["shared.backbone.first.bias"],
        )
        for batch in batches
    ]
    return torch.stack([batch.mean(0) for batch in first]).mean(0)


@pytest.mark.parametrize("policy", ["primary", "shared"])
@pytest.mark.parametrize("how", ["merged", "at", "without the primary"])
def test_statistics_are_estimated_anew_where_weights_moved_without_them(
    how: str, policy: BatchNormPolicy
) -> None:
    def script(branches: Branches) -> Branch:
        forks = [branches.train(row, 2) for row in torch.eye(OBJECTIVES)]
        made = {
            "merged": branches.merge(forks, [0.5, 0.3, 0.2]),
            "at": branches.at(branches.vector(forks[1]), forks),
            "without the primary": forks[2],
        }[how]
        branches.commit(made)
        return branches.start

    budget = ONE_EPOCH
    world = World(scripted(script), policy=policy, budget=budget).run()
    committed = FOUND[0]
    mean = committed.buffers["shared.backbone.norm.running_mean"]
    assert_close(mean, primary_means(world, committed))
    assert_close(world.trunk.norm.running_mean, mean, rtol=0, atol=0)
    assert committed.buffers["shared.backbone.norm.num_batches_tracked"] == 2


def test_a_branch_with_the_primary_keeps_its_running_statistics() -> None:
    def script(branches: Branches) -> tuple[Branch, Branch, Branch]:
        forks = [branches.train(row, 2) for row in (torch.ones(OBJECTIVES), only(0))]
        branches.commit(forks[0])
        alone = branches.merge(forks[::-1], [0.0, 1.0])
        return forks[0], branches.start, alone

    fork, committed, alone = once(script)
    assert same(fork, committed)
    assert same(fork, alone)
    assert fork.buffers["shared.backbone.norm.num_batches_tracked"] == 2


def test_frozen_statistics_stay_frozen() -> None:
    def script(branches: Branches) -> Branch:
        forks = [branches.train(row, 2) for row in torch.eye(OBJECTIVES)]
        branches.commit(branches.merge(forks, [0.7, 0.2, 0.1]))
        branches.evaluate(branches.start)
        return branches.start

    buffers = once(script, policy="frozen").buffers
    ones = torch.ones(WIDTH, dtype=torch.float64)
    assert_close(buffers["shared.backbone.norm.running_var"], ones, rtol=0, atol=0)
    assert buffers["shared.backbone.norm.num_batches_tracked"] == 0


def test_what_counts_is_copied() -> None:
    def script(branches: Branches) -> tuple[Branch, Branch]:
        forks = [branches.train(torch.ones(OBJECTIVES), steps) for steps in (1, 4)]
        return branches.merge(forks, [0.5, 0.5]), branches.merge(forks[::-1], [0.5, 0.5])

    few, many = once(script)
    found = [branch.buffers["shared.backbone.steps"].item() for branch in (few, many)]
    assert found == [OBJECTIVES * 1, OBJECTIVES * 4]
    assert few.buffers["shared.backbone.steps"].dtype == torch.int64


# judging


def test_a_branch_is_judged_by_the_primary_metric_on_the_meta_split() -> None:
    def script(branches: Branches) -> tuple[float, Branch]:
        fork = branches.train(torch.ones(OBJECTIVES), 2)
        return branches.evaluate(fork), fork

    world = World(scripted(script), budget=ONE_EPOCH).run()
    value, fork = FOUND[0]
    world.model.load_state_dict({**fork.parameters, **fork.buffers})
    assert world.meta is not None
    held = world.meta.take(np.arange(12))
    with torch.no_grad():
        right = world.model.eval()(held["input"]).argmax(1) == held["label"]
    assert value == pytest.approx(right.double().mean().item())


def test_a_mixture_is_judged_with_statistics_of_its_own() -> None:
    worlds: list[World] = []

    def script(branches: Branches) -> int:
        forks = [branches.train(row, 2) for row in torch.eye(OBJECTIVES)]
        before = worlds[0].training.costs.forward_passes
        branches.evaluate(branches.merge(forks, [0.5, 0.3, 0.2]))
        return worlds[0].training.costs.forward_passes - before

    worlds.append(World(scripted(script), budget=ONE_EPOCH))
    worlds[0].run()
    assert FOUND == [2 + 1]  # two batches of the primary, one of the meta split


def test_what_is_recorded_belongs_to_its_epoch() -> None:
    def script(branches: Branches) -> bool:
        branches.record(**{f"in_epoch_{branches.epoch}": torch.tensor(2.0)})
        branches.train(only(0), 1)
        return torch.is_grad_enabled()

    world = World(scripted(script)).run()
    assert [row["diagnostics"] for row in world.watcher.rows] == [
        {"in_epoch_0": 2.0},
        {"in_epoch_1": 2.0},
    ]
    assert FOUND == [False, False]  # a method computes without graphs


def test_a_metric_that_should_be_low_is_negated() -> None:
    objectives = tuple(Points(name) for name in ("primary", "one", "two"))
    objectives[0].higher_is_better = False
    assert once(lambda branches: branches.evaluate(branches.start), objectives=objectives) < 0


def gradient_by_hand(world: World, branch: Branch, ids: tuple[int, ...]) -> Tensor:
    """Return the gradient of the primary loss on meta examples, batch norm by their statistics."""
    model = world.model
    model.load_state_dict({**branch.parameters, **branch.buffers})
    model.train()
    for part in model.modules():
        if isinstance(part, nn.Dropout):
            part.eval()
    assert world.meta is not None
    held = world.meta.take(np.array(ids) - 200)
    loss = nn.functional.cross_entropy(model(held["input"]), held["label"])
    grads = torch.autograd.grad(loss, list(model.shared.parameters()))
    return torch.cat([grad.flatten() for grad in grads])


def test_a_gradient_is_that_of_the_primary_on_held_out_examples() -> None:
    def script(branches: Branches) -> tuple[Branch, list[Tensor]]:
        fork = branches.train(torch.ones(OBJECTIVES), 2)
        return fork, [branches.gradient(fork) for _ in range(2)]

    world = World(scripted(script), budget=ONE_EPOCH).run()
    fork, gradients = FOUND[0]
    drawn = [ids for ids in world.objectives[0].seen if min(ids) >= 200]
    assert [len(set(ids)) for ids in drawn] == [8, 8]  # a batch, of twelve
    assert drawn[0] != drawn[1]
    for gradient, ids in zip(gradients, drawn, strict=True):
        assert_close(gradient, gradient_by_hand(world, fork, ids))


def test_a_shared_head_of_auxiliaries_has_no_gradient() -> None:
    names = ("primary", None), ("one", "both"), ("two", "both")
    objectives = tuple(Points(name, head) for name, head in names)

    def script(branches: Branches) -> tuple[Tensor, int]:
        return branches.gradient(branches.start), CLASSES * WIDTH + CLASSES

    gradient, head = once(script, objectives=objectives)
    assert gradient[:-head].any()
    assert not gradient[-head:].any()


def test_looking_changes_nothing_but_the_costs() -> None:
    def looking(count: int) -> Callable[[Branches], object]:
        def script(branches: Branches) -> None:
            fork = branches.train(torch.ones(OBJECTIVES), 2)
            for _ in range(count):
                branches.evaluate(fork)
                branches.gradient(fork)
            branches.commit(branches.merge([fork, branches.start], [0.9, 0.1]))

        return script

    none, two = (World(scripted(looking(count))).run() for count in (0, 2))
    assert_close(none.weights(), two.weights(), rtol=0, atol=0)
    costs = [world.training.costs for world in (none, two)]
    spent = {
        name: [getattr(cost, name) for cost in costs]
        for name in ("forward_passes", "backward_passes", "examples")
    }
    epochs, steps, size, held = 2, 2, 8, 12
    forwards = epochs * (OBJECTIVES * steps + steps)  # the branch, and the mixture's statistics
    backwards = epochs * OBJECTIVES * steps
    assert spent == {
        "forward_passes": [forwards, forwards + epochs * 2 * 2],
        "backward_passes": [backwards, backwards + epochs * 2],
        "examples": [forwards * size, forwards * size + epochs * 2 * (held + size)],
    }
    assert [len(cost.steps) for cost in costs] == [epochs * steps] * 2


# what goes wrong


@pytest.mark.parametrize(("name", "first", "step"), [("primary", 3, 1), ("two", 3, 3)])
def test_a_loss_that_is_no_number_ends_the_run_with_its_place(
    name: str, first: int, step: int
) -> None:
    objectives = tuple(Points(each) for each in ("primary", "one", "two"))
    row = [each.name for each in objectives].index(name)
    objectives[row].poisoned_from = first

    def script(branches: Branches) -> None:
        for row in torch.eye(OBJECTIVES):
            branches.train(row, 2)
        branches.train(only(0), 2)

    with pytest.raises(NonFiniteLossError) as caught:
        World(scripted(script), objectives=objectives).run()
    assert (caught.value.phase, caught.value.step, caught.value.objective) == ("joint", step, name)


def test_weights_that_are_no_numbers_are_found_when_they_are_judged() -> None:
    def script(branches: Branches) -> None:
        vector = branches.vector(branches.start) * np.nan
        branches.evaluate(branches.at(vector, [branches.start] * OBJECTIVES))

    with pytest.raises(NonFiniteLossError) as caught:
        once(script)
    assert (caught.value.phase, caught.value.step, caught.value.objective) == (
        "joint",
        1,
        "primary",
    )


@dataclass(frozen=True)
class Undecided(Branching):
    def epoch(self, branches: Branches) -> None:
        branches.train(only(0), 1)


def test_an_epoch_without_a_commit_is_refused() -> None:
    with pytest.raises(ContractError, match="to end an epoch in"):
        World(Undecided()).run()


@pytest.mark.parametrize("look", ["evaluate", "gradient"])
def test_judging_needs_a_meta_split(look: str) -> None:
    with pytest.raises(MissingInputError, match="needs_meta"):
        once(lambda branches: getattr(branches, look)(branches.start), meta=False)
