"""Training, seen through runs of small plug-ins that write down what happens to them."""

from __future__ import annotations

import dataclasses
import importlib
import json
import math
import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

import gradbench
from gradbench import seeding
from gradbench.backbones import Backbone, BackboneProvider
from gradbench.config import Request
from gradbench.display import Display
from gradbench.errors import ContractError, DataError, NonFiniteLossError, PluginError
from gradbench.fields import Valid
from gradbench.method import Aggregation, Phase, Plan, Scalarization, Weighting
from gradbench.model import Features
from gradbench.objectives import Classification
from gradbench.runner import Outcome, execute
from gradbench.seeding import ExampleRandom
from gradbench.settings import Budget, Optimizer
from gradbench.step import Step
from gradbench.task import (
    Examples,
    ExampleSet,
    Indices,
    Input,
    Objective,
    Preset,
    Source,
    Splits,
    TaskPair,
    TensorSet,
    TrainingSplits,
)
from gradbench.testing import batch_of, step_over
from gradbench.training.batches import Batches
from gradbench.training.ledger import Ledger
from gradbench.training.optimization import (
    clip_head,
    clip_shared,
    learning_rate,
    make_optimizer,
)

WIDTH = 4
CLASSES = 2
ROUND_OFF = 1e-4  # relative, of losses after three steps of Adam in float32


@dataclass
class Batch:
    """What was drawn in training, and how the trunk's weights were then."""

    objective: str
    ids: tuple[int, ...]
    weights: Tensor


@dataclass
class Log:
    """What the plug-ins of this module saw in one run."""

    batches: list[Batch] = field(default_factory=list)
    takes: list[str] = field(default_factory=list)  # names of the sets that were read, in order
    epochs: list[dict[str, Tensor]] = field(default_factory=list)  # the trunk after each
    lines: list[str] = field(default_factory=list)
    rates: list[float] = field(default_factory=list)
    dtypes: set[torch.dtype] = field(default_factory=set)
    found: list[Any] = field(default_factory=list)  # what methods looked at
    heads: dict[str, nn.Module] = field(default_factory=dict)
    initial: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    trunk: nn.Module = field(default_factory=nn.Identity)
    values: list[float] = field(default_factory=list)  # validation metrics to come

    def ids(self, objective: str) -> list[tuple[int, ...]]:
        return [batch.ids for batch in self.batches if batch.objective == objective]

    def started(self, objective: str) -> list[Tensor]:
        return [batch.weights for batch in self.batches if batch.objective == objective]


LOG = Log()


def copies(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in module.state_dict().items()}


# What is installed for these tests: a task pair, backbones, methods


class Watched(TensorSet):
    """A set that writes down when it is read."""

    def __init__(self, name: str, first: int, count: int, classes: Indices | None = None) -> None:
        draw = np.random.default_rng(first)
        labels = np.arange(count) % CLASSES if classes is None else classes
        inputs = draw.normal(size=(count, WIDTH)) + labels[:, None]
        examples = {
            "id": torch.arange(first, first + count),
            "input": torch.from_numpy(inputs.astype(np.float32)),
            "label": torch.from_numpy(labels),
        }
        super().__init__([f"example {i}" for i in range(first, first + count)], examples, labels)
        self.name = name

    def take(self, indices: Indices) -> Examples:
        LOG.takes.append(self.name)
        return super().take(indices)


class Scripted:
    """A metric whose values were decided before."""

    def update(self, score: Tensor, target: Tensor) -> None:
        pass

    def compute(self) -> float:
        return LOG.values.pop(0) if LOG.values else 0.0


class Head(nn.Module):
    """A linear head, and an offset whose gradient is ``factor`` times what it would be."""

    def __init__(self, width: int, dropout: float, factor: float) -> None:
        super().__init__()
        self.dropout = nn.Dropout(dropout)
        self.linear = nn.Linear(width, CLASSES)
        self.offset = nn.Parameter(torch.zeros(CLASSES))
        self.factor = factor

    def forward(self, features: Features) -> Tensor:
        output: Tensor = self.linear(self.dropout(features.pooled)) + self.factor * self.offset
        return output


class Points(Classification):
    """Tell clouds of points apart."""

    def __init__(self, name: str, task: Toy) -> None:
        super().__init__(name, CLASSES, margin=0.1)
        self.task, self.calls = task, 0
        self.higher_is_better = not task.lower_is_better
        self.head_name = "one" if task.one_head else None

    def head(self, width: int, dropout: float) -> nn.Module:
        factor = self.task.head_factor if self.name == "auxiliary 1" else 1.0
        head = Head(width, dropout, factor)
        LOG.heads.setdefault(self.name, head)
        LOG.initial.setdefault(self.name, copies(head))
        return head

    def batch(self, examples: Examples, random: ExampleRandom | None) -> tuple[Tensor, Tensor]:
        if random is not None:
            weights = LOG.trunk.get_parameter("linear.weight").detach().clone()
            LOG.batches.append(Batch(self.name, tuple(examples["id"].tolist()), weights))
        return examples["input"], examples["label"]

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        losses = super().loss(output, target)
        poisoned = self.task.poisoned == self.name and self.calls >= self.task.poisoned_from
        self.calls += 1
        return losses * math.nan if poisoned else losses

    def metrics(self) -> dict[str, Any]:
        return {"scripted": Scripted()} if self.task.scripted else super().metrics()


@dataclass(frozen=True)
class Toy(TaskPair):
    """Clouds of points in four dimensions."""

    version = "1.0"
    citation = "none"
    licence = "CC0"
    sources: ClassVar[tuple[Source, ...]] = ("real",)
    presets: ClassVar[Mapping[str, Preset]] = {
        "default": Preset(
            backbone="toy:plain",
            sizes={"train": 10},
            budget=Budget(epochs=2, fine_tune_epochs=1, steps_per_epoch=3, batch_size=8),
            optimizer=Optimizer(),
        )
    }

    auxiliaries: Annotated[int, Valid(1, 9), "auxiliary objectives"] = 1
    head_factor: Annotated[float, "of the gradient of the auxiliary head's offset"] = 1.0
    poisoned: Annotated[str, "the objective whose losses become NaN"] = ""
    poisoned_from: Annotated[int, "how many losses it has before that"] = 0
    scripted: Annotated[bool, "take validation metrics from the log"] = False
    lower_is_better: Annotated[bool, "of the metric"] = False
    few: Annotated[bool, "let a class have five training examples"] = False
    one_head: Annotated[bool, "let all objectives share one head"] = False

    @property
    def input(self) -> Input:
        return Input(channels=1, size=2)

    def objectives(self) -> tuple[Objective, ...]:
        names = ("primary", *(f"auxiliary {k}" for k in range(1, self.auxiliaries + 1)))
        return tuple(Points(name, self) for name in names)

    def splits(self, source: Source, folder: Path, preset: Preset, seed: int) -> Splits:
        classes = np.array([0] * 15 + [1] * 5) if self.few else None
        return Splits(
            train=Watched("train", 0, 20, classes),
            validation=Watched("validation", 100, 8),
            test=Watched("test", 200, 300),  # more than one evaluation batch
            auxiliaries=tuple(
                Watched(f"auxiliary {k}", 1000 * k, 30) for k in range(1, self.auxiliaries + 1)
            ),
            data_digest="toy",
        )


class Trunk(nn.Module):
    """Batch norm if wanted, and one linear layer."""

    def __init__(self, norm: bool) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(WIDTH) if norm else nn.Identity()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, inputs: Tensor) -> Features:
        output = self.linear(self.norm(inputs))
        LOG.dtypes.add(output.dtype)
        return Features(output, output[:, None])


class Trunks(BackboneProvider):
    def names(self, pattern: str) -> list[str]:
        return ["plain", "norm"]

    def create(self, name: str, spec: Input, weights: str) -> Backbone:
        LOG.trunk = Trunk(norm=name == "norm")
        LOG.initial["trunk"] = copies(LOG.trunk)
        return Backbone(LOG.trunk, WIDTH)


@dataclass(frozen=True)
class PretrainFinetune(Scalarization):
    """The auxiliaries alone, then the primary alone."""

    def weights_from_losses(self, losses: Tensor, step: Step) -> Tensor:
        return torch.ones_like(losses)

    def phases(self, plan: Plan) -> tuple[Phase, ...]:
        auxiliaries = tuple(range(1, plan.objectives))
        return (
            Phase("pretrain", auxiliaries, plan.epochs, select="last"),
            Phase("fine-tune", (0,), plan.fine_tune_epochs),
        )


@dataclass(frozen=True)
class Nothing(PretrainFinetune):
    """A method without a phase."""

    def phases(self, plan: Plan) -> tuple[Phase, ...]:
        return ()


@dataclass(frozen=True)
class Watcher(Aggregation):
    """The sum; writes down what it is given."""

    batches = 2

    def combine(self, jacobian: Tensor, step: Step, out: Tensor) -> None:
        LOG.found.append((jacobian.dtype, step.losses.dtype, step.index, step.epoch))
        torch.sum(jacobian, 0, out=out)


@dataclass(frozen=True)
class Peeking(Weighting):
    """The sum; looks at held-out examples, and once too often."""

    needs_meta = True

    def weights_from_gramian(self, gramian: Tensor, step: Step) -> Tensor:
        before = len(LOG.batches)
        sets = [step.heldout() for _ in range(2)]
        drawn = [set(batch.ids) for batch in LOG.batches[before:]]
        lengths = [float(held.gradient(held.head).norm()) for held in sets]
        loss = float(sets[0].loss(sets[0].features, sets[0].new_head()))
        try:
            step.heldout()
        except ContractError as error:
            refusal = str(error)
        LOG.found.append((drawn, lengths, loss, refusal))
        return torch.ones_like(gramian[0])


@dataclass(frozen=True)
class Broken(Weighting):
    """Raises in its fifth step."""

    def weights_from_gramian(self, gramian: Tensor, step: Step) -> Tensor:
        if step.index == 4:
            raise RuntimeError("no way out")
        return torch.ones_like(gramian[0])


@dataclass(frozen=True)
class Loud(Weighting):
    """Draws from the global generators, and records what is no number."""

    def weights_from_gramian(self, gramian: Tensor, step: Step) -> Tensor:
        torch.rand(3)
        random.seed(0)
        np.random.seed(0)  # noqa: NPY002 - what a careless plug-in does
        step.record(captured_energy=torch.tensor(math.inf if step.index < 3 else 0.5))
        return torch.ones_like(gramian[0])


@dataclass(frozen=True)
class Vain(Weighting):
    """Weighs the gradients with what is no number in its sixth step."""

    def weights_from_gramian(self, gramian: Tensor, step: Step) -> Tensor:
        weights = torch.ones_like(gramian[0])
        return weights * math.nan if step.index == 5 else weights


@pytest.fixture(scope="module", autouse=True)
def _plugins(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    site = tmp_path_factory.mktemp("site")
    folder = site / "toys-2.5.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: toys\nVersion: 2.5\n")
    methods = (PretrainFinetune, Nothing, Watcher, Peeking, Broken, Loud, Vain)
    lines = [
        "[gradbench.tasks]",
        f"toy = {__name__}:Toy",
        "[gradbench.backbones]",
        f"toy = {__name__}:Trunks",
        "[gradbench.methods]",
        *(f"toy-{method.__name__.lower()} = {__name__}:{method.__name__}" for method in methods),
    ]
    (folder / "entry_points.txt").write_text("\n".join(lines) + "\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(site)
        importlib.invalidate_caches()
        yield


@pytest.fixture(autouse=True)
def log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Log]:
    monkeypatch.setenv("GRADBENCH_HOME", str(tmp_path))
    monkeypatch.setenv("GRADBENCH_TRACKING_URI", "none")
    LOG.__init__()  # type: ignore[misc]
    handle = register_optimizer_step_pre_hook(
        lambda optimizer, *_: LOG.rates.append(optimizer.param_groups[0]["lr"])
    )
    yield LOG
    handle.remove()


def train(
    method: str = "weighted-sum",
    *,
    task: str = "toy",
    precision: str = "fp32",
    seed: int = 0,
    **settings: Any,
) -> Outcome:
    """Run ``method``; the keys of settings are written with ``__`` for a dot."""

    def say(line: str) -> None:
        LOG.lines.append(line)
        if "steps/s" in line:
            LOG.takes.append("end of an epoch")
            LOG.epochs.append(copies(LOG.trunk))

    request = Request(
        method=method,
        task=task,
        seed=seed,
        device="cpu",
        precision=precision,
        settings={key.replace("__", "."): value for key, value in settings.items()},
    )
    return execute(request, Display(say))


def rows(outcome: Outcome) -> list[dict[str, Any]]:
    lines = outcome.folder.metrics.read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def places(outcome: Outcome) -> list[tuple[str, int, int]]:
    assert outcome.error is None
    return [(row["phase"], row["epoch"], row["step"]) for row in rows(outcome)]


def same(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    return all(torch.equal(value, other[name]) for name, value in one.items())


@dataclass
class Numbered(ExampleSet):
    """Examples 0, …, N - 1, of which an example is its number."""

    count: int

    def __post_init__(self) -> None:
        self.ids = [str(i) for i in range(self.count)]

    def take(self, indices: Indices) -> Examples:
        return {"id": torch.from_numpy(indices)}


class Plain(Classification):
    """Gives the numbers of its examples, and what they are augmented by."""

    def batch(self, examples: Examples, random: ExampleRandom | None) -> tuple[Any, Any]:
        assert random is not None
        return examples["id"].tolist(), random.uniform("shift", 1)[:, 0].tolist()


def stream(count: int, size: int, *, k: int = 0, seed: int = 0) -> Batches:
    return Batches(Plain("plain", 2, margin=0.1), Numbered(count), k, seed, size)


class TestBatches:
    def test_a_batch_depends_on_seed_objective_and_position_alone(self) -> None:
        forwards, backwards = stream(10, 4), stream(10, 4)
        assert [forwards.at(i) for i in range(9)] == [backwards.at(i) for i in range(8, -1, -1)][
            ::-1
        ]
        order, shifts = stream(10, 10).at(0)
        for other in (stream(10, 10, k=1), stream(10, 10, seed=1)):
            assert other.at(0)[0] != order
            assert sorted(other.at(0)[1]) != sorted(shifts)

    @pytest.mark.parametrize(("count", "size"), [(10, 4), (10, 10), (10, 25), (7, 1), (1, 3)])
    def test_batches_keep_their_size_and_every_pass_is_a_permutation(
        self, count: int, size: int
    ) -> None:
        batches = [stream(count, size).at(i)[0] for i in range(4 * count)]
        assert {len(batch) for batch in batches} == {size}
        flat = [i for batch in batches for i in batch]
        passes = [flat[start : start + count] for start in range(0, len(flat), count)]
        assert all(sorted(each) == list(range(count)) for each in passes)
        if count > 5:
            assert len({tuple(each) for each in passes}) > 1

    def test_an_example_is_augmented_anew_in_every_pass_wherever_it_stands(self) -> None:
        def shifts(size: int) -> dict[tuple[int, int], float]:
            seen: dict[int, int] = {}
            found = {}
            for position in range(20 // size):
                for example, shift in zip(*stream(10, size).at(position), strict=True):
                    found[example, seen.get(example, 0)] = shift
                    seen[example] = seen.get(example, 0) + 1
            return found

        assert shifts(5) == shifts(4)  # 4 does not divide 10: a batch runs over the end
        assert len(set(shifts(5).values())) == 20

    def test_draws_for_other_purposes_are_apart_from_the_stream(self) -> None:
        batches = stream(10, 4)
        drawn, _ = batches.draw(6, "sketch", 3)
        assert len(set(drawn)) == 6
        assert drawn == stream(10, 4).draw(6, "sketch", 3)[0]
        assert drawn != batches.draw(6, "sketch", 4)[0]
        assert sorted(batches.draw(99, "sketch", 3)[0]) == list(range(10))

    def test_two_halves_are_disjoint_and_no_larger_than_a_batch(self) -> None:
        batches = stream(11, 4)
        halves = [set(batches.half(which, "heldout", 5)[0]) for which in (0, 1)]
        assert [len(half) for half in halves] == [4, 4]
        assert not halves[0] & halves[1]
        assert halves[0] != set(batches.half(0, "heldout", 6)[0])
        sizes = [len(stream(5, 4).half(which, "heldout", 5)[0]) for which in (0, 1)]
        assert sizes == [3, 2]

    def test_all_methods_see_the_same_batches(self, log: Log) -> None:
        train("weighted-sum")
        seen = {name: log.ids(name) for name in ("primary", "auxiliary 1")}
        assert len(seen["primary"]) == 9  # of three epochs
        assert len(seen["auxiliary 1"]) == 6  # of two
        for method in ("pcgrad", "primary-only"):
            log.batches.clear()
            train(method)
            assert log.ids("primary") == seen["primary"]
            if method != "primary-only":
                assert log.ids("auxiliary 1") == seen["auxiliary 1"]
        log.batches.clear()
        train("weighted-sum", seed=1)
        assert log.ids("primary") != seen["primary"]

    def test_several_batches_a_step_are_different_batches(self, log: Log) -> None:
        train("toy-watcher", budget__epochs=1, budget__fine_tune_epochs=0)
        plain = stream(20, 8)
        assert log.ids("primary") == [tuple(plain.at(i)[0]) for i in range(6)]


class TestPhases:
    def test_a_joint_phase_then_one_of_the_primary(self) -> None:
        assert places(train()) == [("joint", 1, 3), ("joint", 2, 6), ("fine-tune", 1, 9)]

    @pytest.mark.parametrize("method", ["weighted-sum", "pcgrad", "attittud", "primary-only"])
    def test_every_method_takes_the_same_steps(self, method: str, log: Log) -> None:
        outcome = train(method, budget__epochs=3, budget__fine_tune_epochs=2)
        assert [row["step"] for row in rows(outcome)] == [3, 6, 9, 12, 15]
        assert len(log.rates) == 15

    def test_epochs_set_the_first_phase_and_none_of_the_second_is_none(self) -> None:
        outcome = train(budget__epochs=1, budget__fine_tune_epochs=0)
        assert places(outcome) == [("joint", 1, 3)]

    def test_a_method_without_a_phase_is_refused(self) -> None:
        outcome = train("toy-nothing")
        assert isinstance(outcome.error, ContractError)
        assert outcome.result.status == "failed"

    def test_a_phase_starts_from_the_best_state_of_the_one_before(self, log: Log) -> None:
        log.values += [0.5, 0.9, 0.3, 0.8, 0.95, 0.1]
        outcome = train(task__scripted=True, budget__epochs=3, budget__fine_tune_epochs=3)
        starts = log.started("primary")
        assert torch.equal(starts[9], log.epochs[1]["linear.weight"])  # not log.epochs[2]
        assert outcome.result.selection is not None
        assert outcome.result.selection.model_dump() == {
            "phase": "fine-tune",
            "epoch": 2,
            "step": 15,
        }
        assert same(log.trunk.state_dict(), log.epochs[4])

    def test_a_phase_that_never_gets_better_keeps_what_it_started_from(self, log: Log) -> None:
        log.values += [0.5, 0.9, 0.3, 0.1, 0.8]
        outcome = train(task__scripted=True, budget__epochs=3, budget__fine_tune_epochs=2)
        assert outcome.result.selection is not None
        assert outcome.result.selection.model_dump() == {"phase": "joint", "epoch": 2, "step": 6}
        assert same(log.trunk.state_dict(), log.epochs[1])
        assert [row["best"] for row in rows(outcome)] == [True, True, False, False, False]

    def test_of_states_that_are_as_good_the_later_is_kept(self, log: Log) -> None:
        log.values += [0.5, 0.9, 0.9, 0.1, 0.9]
        outcome = train(task__scripted=True, budget__epochs=3, budget__fine_tune_epochs=2)
        assert outcome.result.selection is not None
        assert outcome.result.selection.step == 15
        assert same(log.trunk.state_dict(), log.epochs[4])
        assert torch.equal(log.started("primary")[9], log.epochs[2]["linear.weight"])

    def test_patience_counts_what_is_only_as_good(self, log: Log) -> None:
        log.values += [0.9, 0.9, 0.9, 0.95]
        settings: dict[str, Any] = {
            "budget__epochs": 9,
            "budget__patience": 2,
            "budget__fine_tune_epochs": 0,
        }
        outcome = train(task__scripted=True, **settings)
        assert len(places(outcome)) == 3
        assert same(log.trunk.state_dict(), log.epochs[2])

    def test_lower_may_be_better(self, log: Log) -> None:
        log.values += [0.5, 0.9, 0.3, 0.4]
        settings: dict[str, Any] = {"task__scripted": True, "task__lower_is_better": True}
        outcome = train(**settings, budget__epochs=3)
        assert outcome.result.selection is not None
        assert outcome.result.selection.step == 9
        assert outcome.result.metric.higher_is_better is False

    def test_patience_ends_a_phase_and_the_next_has_its_own(self, log: Log) -> None:
        log.values += [0.5, 0.9, 0.8, 0.9, 0.7, 0.6, 0.95, 0.7, 0.7, 0.7]
        outcome = train(
            task__scripted=True,
            budget__epochs=5,
            budget__fine_tune_epochs=9,
            budget__patience=2,
        )
        assert places(outcome) == [
            *(("joint", epoch, 3 * epoch) for epoch in (1, 2, 3, 4)),
            # counted as if the first phase had had all its epochs, so that batches stay paired
            *(("fine-tune", epoch, 15 + 3 * epoch) for epoch in (1, 2)),
        ]

    def test_batches_of_a_phase_do_not_depend_on_when_the_one_before_ended(self, log: Log) -> None:
        log.values += [0.9, 0.1]
        train(task__scripted=True, budget__epochs=3, budget__patience=1)
        early = log.ids("primary")[-3:]
        log.batches.clear()
        train(budget__epochs=3)
        assert log.ids("primary")[-3:] == early

    def test_a_state_that_is_worse_at_the_end_is_not_tested(self, log: Log) -> None:
        log.values += [0.9, 0.1]
        train(task__scripted=True, budget__fine_tune_epochs=0)
        assert same(log.trunk.state_dict(), log.epochs[0])
        assert not same(log.epochs[0], log.epochs[1])


class TestPretrainFinetune:
    def test_the_auxiliaries_come_alone_and_the_last_state_goes_on(self, log: Log) -> None:
        log.values += [0.9, 0.1, 0.1, 0.2, 0.1]  # validation decides nothing in the first phase
        outcome = train(
            "toy-pretrainfinetune",
            task__scripted=True,
            task__auxiliaries=2,
            budget__epochs=3,
            budget__fine_tune_epochs=2,
            budget__patience=1,
        )
        assert places(outcome) == [
            *(("pretrain", epoch, 3 * epoch) for epoch in (1, 2, 3)),
            *(("fine-tune", epoch, 9 + 3 * epoch) for epoch in (1, 2)),
        ]
        assert [set(row["losses"]) for row in rows(outcome)] == [
            *[{"auxiliary 1", "auxiliary 2"}] * 3,
            *[{"primary"}] * 2,
        ]
        assert len(log.ids("primary")) == 6
        assert torch.equal(log.started("primary")[0], log.epochs[2]["linear.weight"])
        assert outcome.result.selection is not None
        assert outcome.result.selection.model_dump() == {
            "phase": "fine-tune",
            "epoch": 1,
            "step": 12,
        }
        assert same(log.trunk.state_dict(), log.epochs[3])

    def test_the_primary_head_waits(self, log: Log) -> None:
        outcome = train("toy-pretrainfinetune", budget__fine_tune_epochs=0)
        assert outcome.error is None
        assert same(log.heads["primary"].state_dict(), log.initial["primary"])
        assert not same(log.heads["auxiliary 1"].state_dict(), log.initial["auxiliary 1"])


PLAIN_DESCENT: dict[str, Any] = {
    "optimizer__name": "sgd",
    "optimizer__lr": 1.0,
    "optimizer__momentum": 0.0,
    "optimizer__weight_decay": 0.0,
    "optimizer__warmup_epochs": 0.0,
    "optimizer__schedule": "constant",
    "budget__epochs": 1,
    "budget__fine_tune_epochs": 0,
    "budget__steps_per_epoch": 1,
    "model__dropout": 0.0,
}


def length(module: nn.Module, before: Mapping[str, Tensor]) -> float:
    """Return how far the parameters of a module moved."""
    state = module.state_dict()
    return math.sqrt(sum(float((state[name] - before[name]).square().sum()) for name in before))


class TestClipping:
    @pytest.mark.parametrize("method", ["weighted-sum", "pcgrad", "attittud"])
    def test_a_steep_head_shortens_nothing_but_itself(self, method: str, log: Log) -> None:
        moved = []
        for factor in (0.0, 1e6):
            train(method, **PLAIN_DESCENT, optimizer__clip=0.5, task__head_factor=factor)
            moved.append([copies(log.trunk), copies(log.heads["primary"])])
            reached = length(log.heads["auxiliary 1"], log.initial["auxiliary 1"])
            log.heads.clear()
            log.initial.clear()
        assert reached == pytest.approx(0.5, rel=1e-4)
        assert all(same(one, other) for one, other in zip(*moved, strict=True))

    def test_the_shared_gradient_is_clipped_as_one(self, log: Log) -> None:
        lengths = []
        for clip in (0.0, 1e-2):
            outcome = train(**PLAIN_DESCENT, optimizer__clip=clip)
            assert outcome.error is None
            lengths.append(length(log.trunk, log.initial["trunk"]))
        assert lengths[0] > 0.1
        assert lengths[1] == pytest.approx(1e-2, rel=1e-3)

    def test_a_short_gradient_is_left_alone(self) -> None:
        direction = torch.tensor([0.3, 0.4])
        clip_shared(direction, 1.0)
        assert direction.tolist() == torch.tensor([0.3, 0.4]).tolist()

    def test_a_long_gradient_keeps_its_direction(self) -> None:
        direction = torch.tensor([30.0, 40.0])
        clip_shared(direction, 1.0)
        torch.testing.assert_close(direction, torch.tensor([0.6, 0.8]))

    def test_zero_stays_zero_and_no_limit_is_none(self) -> None:
        direction = torch.zeros(3)
        clip_shared(direction, 1.0)
        assert not direction.any()
        steep = torch.full((3,), 1e8)
        clip_shared(steep, 0.0)
        assert torch.equal(steep, torch.full((3,), 1e8))

    def test_a_shared_head_is_clipped_with_the_trunk(self, log: Log) -> None:
        outcome = train(**PLAIN_DESCENT, optimizer__clip=0.5, task__one_head=True)
        assert outcome.error is None
        head = length(log.heads["primary"], log.initial["primary"])
        trunk = length(log.trunk, log.initial["trunk"])
        assert 0 < head < 0.5
        assert math.hypot(head, trunk) == pytest.approx(0.5, rel=1e-4)

    def test_a_head_is_clipped_like_the_shared_gradient(self) -> None:
        head = nn.Linear(1, 1, bias=False)
        for limit, expected in ((0.0, 7.0), (9.0, 7.0), (1.0, 1.0)):
            head.weight.grad = torch.tensor([[7.0]])
            clip_head(head, limit)
            torch.testing.assert_close(head.weight.grad, torch.tensor([[expected]]))
        clip_head(nn.Identity(), 1.0)  # an objective without a head of its own


class TestLearningRate:
    def test_rises_then_falls_along_a_cosine(self) -> None:
        settings = Optimizer(lr=1.0, warmup_epochs=1)
        budget = Budget(steps_per_epoch=4)
        rates = [learning_rate(settings, budget, step, 3, False) for step in range(12)]
        cosine = [0.5 * (1 + math.cos(math.pi * step / 8)) for step in range(8)]
        assert rates == pytest.approx([0.2, 0.4, 0.6, 0.8, *cosine])

    def test_stays_where_it_is_if_wanted(self) -> None:
        settings = Optimizer(lr=0.3, warmup_epochs=0.5, schedule="constant")
        rates = [learning_rate(settings, Budget(steps_per_epoch=4), s, 2, False) for s in range(8)]
        assert rates == pytest.approx([0.1, 0.2] + [0.3] * 6)

    @pytest.mark.parametrize("warm_up", [0, 1, 100])
    @pytest.mark.parametrize("schedule", ["cosine", "constant"])
    @pytest.mark.parametrize(("epochs", "steps"), [(1, 1), (1, 2), (2, 3)])
    def test_is_never_zero_or_above_the_setting(
        self, warm_up: float, schedule: Any, epochs: int, steps: int
    ) -> None:
        settings = Optimizer(lr=1.0, warmup_epochs=warm_up, schedule=schedule)
        budget = Budget(steps_per_epoch=steps)
        rates = [learning_rate(settings, budget, s, epochs, False) for s in range(epochs * steps)]
        assert all(0 < rate <= 1 for rate in rates)

    def test_every_phase_has_its_own_schedule_and_fine_tuning_a_lower_one(self, log: Log) -> None:
        train(optimizer__lr=1.0, optimizer__warmup_epochs=0, optimizer__fine_tune_factor=0.25)
        joint = [0.5 * (1 + math.cos(math.pi * step / 6)) for step in range(6)]
        fine = [0.25 * 0.5 * (1 + math.cos(math.pi * step / 3)) for step in range(3)]
        assert log.rates == pytest.approx([*joint, *fine])

    def test_the_same_schedule_where_the_primary_is_alone(self, log: Log) -> None:
        train("weighted-sum")
        rates = list(log.rates)
        log.rates.clear()
        train("primary-only")
        assert log.rates == rates


class TestOptimizer:
    def test_weights_decay_and_biases_and_norms_do_not(self) -> None:
        module = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
        made = make_optimizer(Optimizer(weight_decay=0.5), module.parameters())
        decay = {
            id(parameter): group["weight_decay"]
            for group in made.param_groups
            for parameter in group["params"]
        }
        found = {name: decay[id(parameter)] for name, parameter in module.named_parameters()}
        assert found == {"0.weight": 0.5, "0.bias": 0, "1.weight": 0, "1.bias": 0}

    def test_what_is_frozen_is_left_out(self) -> None:
        module = nn.Linear(3, 3)
        module.bias.requires_grad_(False)
        made = make_optimizer(Optimizer(), module.parameters())
        assert [p for group in made.param_groups for p in group["params"]] == [module.weight]

    @pytest.mark.parametrize(
        ("name", "cls"), [("adamw", torch.optim.AdamW), ("sgd", torch.optim.SGD)]
    )
    def test_the_setting_chooses_it(self, name: Any, cls: type) -> None:
        settings = Optimizer(name=name, lr=0.5, momentum=0.25)
        made = make_optimizer(settings, nn.Linear(1, 1).parameters())
        assert type(made) is cls
        assert made.param_groups[0]["lr"] == 0.5
        assert made.param_groups[0].get("momentum", 0.25) == 0.25


def batch_mean(ids: tuple[int, ...], name: str) -> Tensor:
    """Return the mean input (4,) of a batch."""
    first, count = (0, 20) if name == "primary" else (1000, 30)
    inputs = TensorSet.take(Watched(name, first, count), np.array(ids) - first)["input"]
    return inputs.mean(0)


class TestBatchNorm:
    def statistics(self, log: Log) -> tuple[Tensor, int]:
        norm = log.trunk.get_submodule("norm")
        assert isinstance(norm, nn.BatchNorm1d)
        assert norm.running_mean is not None
        assert norm.num_batches_tracked is not None
        return norm.running_mean, int(norm.num_batches_tracked)

    def run(self, method: str, policy: str, **settings: Any) -> None:
        outcome = train(
            method,
            model__backbone="toy:norm",
            model__batch_norm=policy,
            **{**PLAIN_DESCENT, **settings},
        )
        assert outcome.error is None

    @pytest.mark.parametrize("method", ["weighted-sum", "pcgrad", "attittud"])
    def test_primary_follows_the_batches_of_the_primary_alone(self, method: str, log: Log) -> None:
        self.run(method, "primary")
        mean, count = self.statistics(log)
        assert count == 1
        torch.testing.assert_close(mean, 0.1 * batch_mean(log.ids("primary")[0], "primary"))

    def test_shared_follows_all_batches(self, log: Log) -> None:
        self.run("weighted-sum", "shared")
        mean, count = self.statistics(log)
        assert count == 2
        primary = batch_mean(log.ids("primary")[0], "primary")
        auxiliary = batch_mean(log.ids("auxiliary 1")[0], "auxiliary 1")
        torch.testing.assert_close(mean, 0.9 * 0.1 * primary + 0.1 * auxiliary)

    def test_a_sketch_moves_nothing(self, log: Log) -> None:
        self.run("attittud", "shared")
        assert self.statistics(log)[1] == 2

    @pytest.mark.parametrize("method", ["weighted-sum", "attittud"])
    def test_frozen_stays_where_it_was(self, method: str, log: Log) -> None:
        self.run(method, "frozen", budget__epochs=2, budget__steps_per_epoch=3)
        mean, count = self.statistics(log)
        assert count == 0
        assert not mean.any()

    def test_a_phase_without_the_primary_follows_the_auxiliaries(self, log: Log) -> None:
        self.run("toy-pretrainfinetune", "primary")
        auxiliary = batch_mean(log.ids("auxiliary 1")[0], "auxiliary 1")
        torch.testing.assert_close(log.epochs[0]["norm.running_mean"], 0.1 * auxiliary)

    @pytest.mark.parametrize("policy", ["primary", "shared"])
    def test_at_its_end_such_a_phase_gets_the_statistics_of_the_primary(
        self, policy: str, log: Log
    ) -> None:
        self.run("toy-pretrainfinetune", policy, budget__steps_per_epoch=2, model__dropout=0.5)
        mean, count = self.statistics(log)
        assert count == 2
        batches = [batch_mean(ids, "primary") for ids in log.ids("primary")]
        assert len(batches) == 2
        torch.testing.assert_close(mean, (batches[0] + batches[1]) / 2)
        assert all(module.training is False for module in log.trunk.modules())  # as evaluated

    def test_looking_at_held_out_examples_moves_nothing(self, log: Log) -> None:
        self.run("toy-peeking", "primary")
        assert self.statistics(log)[1] == 1


class TestTestData:
    def test_the_trainer_has_no_argument_for_it(self) -> None:
        names = {each.name for each in dataclasses.fields(TrainingSplits)}
        assert names == {"train", "validation", "auxiliaries", "meta"}

    @pytest.mark.parametrize("method", ["attittud", "primary-only", "toy-pretrainfinetune"])
    def test_it_is_read_once_and_only_when_training_has_ended(self, method: str, log: Log) -> None:
        train(method)
        first = log.takes.index("test")
        assert log.takes[:first].count("end of an epoch") == 3
        assert {"train", "auxiliary 1", "end of an epoch"}.isdisjoint(log.takes[first:])
        assert log.takes.count("test") == 2  # 300 examples, 256 at a time

    def test_a_run_that_fails_never_reads_it(self, log: Log) -> None:
        train("toy-broken")
        assert "train" in log.takes
        assert "test" not in log.takes


class TestPrecision:
    def test_float64_reaches_the_method_and_the_weights(self, log: Log) -> None:
        outcome = train("toy-watcher", precision="fp64")
        assert outcome.error is None
        assert {found[:2] for found in log.found} == {(torch.float64, torch.float64)}
        assert {value.dtype for value in log.trunk.state_dict().values()} == {torch.float64}
        assert log.dtypes == {torch.float64}

    def test_bfloat16_is_for_the_forward_alone(self, log: Log) -> None:
        outcome = train("toy-watcher", precision="bf16")
        assert outcome.error is None
        assert log.dtypes == {torch.bfloat16}
        assert {found[:2] for found in log.found} == {(torch.float32, torch.float32)}
        assert {value.dtype for value in log.trunk.state_dict().values()} == {torch.float32}

    @pytest.mark.parametrize("method", ["attittud", "pcgrad", "weighted-sum", "toy-peeking"])
    @pytest.mark.parametrize("precision", ["bf16", "fp64"])
    def test_methods_run_at_every_precision(self, method: str, precision: str) -> None:
        assert train(method, precision=precision).error is None

    def test_float64_and_float32_are_close(self) -> None:
        single, double = (
            rows(train("pcgrad", precision=precision))[0]["losses"]
            for precision in ("fp32", "fp64")
        )
        assert single == pytest.approx(double, rel=1e-5)
        assert single != double


class TestMeta:
    def test_two_disjoint_batches_that_training_never_sees(self, log: Log) -> None:
        outcome = train("toy-peeking", budget__fine_tune_epochs=1)
        assert outcome.error is None
        assert outcome.result.task.sizes.model_dump() == {
            "train": 16,
            "validation": 8,
            "test": 300,
            "meta": 4,
        }
        assert len(log.found) == 6  # joint steps
        meta = set()
        for drawn, lengths, loss, refusal in log.found:
            assert [len(ids) for ids in drawn] == [2, 2]
            assert not drawn[0] & drawn[1]
            meta |= drawn[0] | drawn[1]
            assert all(each > 0 for each in lengths)
            assert loss > 0
            assert "at most two calls" in refusal
        assert len(meta) == 4
        assert len({tuple(sorted(drawn[0])) for drawn, *_ in log.found}) > 1
        trained = {i for ids in log.ids("primary") if len(ids) == 8 for i in ids}
        assert trained | meta == set(range(20))
        assert not trained & meta

    def test_others_train_on_everything(self, log: Log) -> None:
        outcome = train("weighted-sum")
        assert outcome.result.task.sizes.meta == 0
        assert {i for ids in log.ids("primary") for i in ids} == set(range(20))

    def test_the_held_out_examples_are_a_function_of_the_seed(self) -> None:
        splits = [Toy().splits("real", Path(), Toy.presets["default"], 0) for _ in range(2)]
        assert splits[0].with_meta(3).digest() == splits[1].with_meta(3).digest()
        assert splits[0].with_meta(3).digest() != splits[0].with_meta(4).digest()

    def test_digits_give_a_fifth_of_every_class(self) -> None:
        short: dict[str, Any] = {
            "budget__epochs": 1,
            "budget__steps_per_epoch": 1,
            "budget__fine_tune_epochs": 0,
        }
        sizes = train("toy-peeking", task="digits", **short).result.task.sizes
        assert (sizes.train, sizes.meta, sizes.validation, sizes.test) == (80, 20, 50, 751)

    def test_too_few_examples_are_the_users_to_mend(self) -> None:
        with pytest.raises(DataError, match="class 1 with 5") as caught:
            train("toy-peeking", task__few=True)
        assert caught.value.exit_code == 2
        assert train("weighted-sum", task__few=True).error is None


class TestFailure:
    @pytest.mark.parametrize(
        ("objective", "first", "phase"),
        [("auxiliary 1", 4, "joint"), ("primary", 4, "joint"), ("primary", 7, "fine-tune")],
    )
    @pytest.mark.parametrize("method", ["weighted-sum", "pcgrad"])
    def test_a_loss_that_is_no_number_is_named_with_its_first_step(
        self, method: str, objective: str, first: int, phase: str
    ) -> None:
        outcome = train(method, task__poisoned=objective, task__poisoned_from=first)
        assert isinstance(outcome.error, NonFiniteLossError)
        record = outcome.folder.read()
        assert record is not None
        assert record.status == "nan"
        assert record.error is not None
        assert record.error.type == "NonFiniteLossError"
        assert (record.error.phase, record.error.step, record.error.objective) == (
            phase,
            first,
            objective,
        )
        assert (record.metrics, record.selection) == (None, None)
        assert record.cost.forward_passes
        assert not outcome.folder.predictions.exists()

    def test_weights_that_blow_up_are_found(self) -> None:
        settings = {**PLAIN_DESCENT, "optimizer__lr": 1e6, "optimizer__clip": 0}
        settings |= {"budget__epochs": 9, "budget__steps_per_epoch": 9}
        outcome = train("pcgrad", **settings, task__head_factor=1e6)
        assert outcome.result.status == "nan"
        assert outcome.result.error is not None
        assert outcome.result.error.step is not None
        assert outcome.result.error.objective in ("primary", "auxiliary 1")

    def test_scores_that_are_no_numbers_are_found_after_the_step_they_come_from(self) -> None:
        outcome = train("toy-vain", budget__epochs=2)  # spoils the weights in the last joint step
        error = outcome.result.error
        assert outcome.result.status == "nan"
        assert error is not None
        assert (error.phase, error.step, error.objective) == ("joint", 5, "primary")
        assert [row["step"] for row in rows(outcome)] == [3]

    def test_a_method_that_raises_is_named_with_its_distribution(self) -> None:
        outcome = train("toy-broken")
        assert isinstance(outcome.error, PluginError)
        assert outcome.error.exit_code == 1
        message = str(outcome.error)
        assert "RuntimeError: no way out" in message
        assert "toy-broken (toys 2.5)" in message
        record = outcome.folder.read()
        assert record is not None
        assert record.status == "failed"
        assert record.error is not None
        assert (record.error.type, record.error.phase, record.error.step) == (
            "RuntimeError",
            "joint",
            4,
        )
        assert [row["step"] for row in rows(outcome)] == [3]


class TestGenerators:
    def test_those_of_the_caller_are_left_alone(self) -> None:
        torch.manual_seed(3)
        random.seed(3)
        np.random.seed(3)  # noqa: NPY002 - the generator that is compared
        before = torch.get_rng_state(), random.getstate()
        expected = np.random.RandomState(3).rand()
        gradbench.run("attittud", "toy", device="cpu", settings={"model.dropout": 0.5})
        assert torch.equal(torch.get_rng_state(), before[0])
        assert random.getstate() == before[1]
        assert np.random.rand() == expected  # noqa: NPY002

    def test_they_decide_about_nothing(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        found = []
        for seed in (1, 2):
            torch.manual_seed(seed)
            monkeypatch.setenv("GRADBENCH_HOME", str(tmp_path / str(seed)))
            found.append(train("attittud", model__dropout=0.5))
        assert found[0].result.same_bits() == found[1].result.same_bits()
        assert rows(found[0])[0]["losses"] == rows(found[1])[0]["losses"]

    def test_a_method_that_draws_from_them_changes_no_dropout(self) -> None:
        settings: dict[str, Any] = {"model__dropout": 0.5, "budget__epochs": 1}
        quiet, loud = (rows(train(m, **settings)) for m in ("weighted-sum", "toy-loud"))
        assert quiet[0]["losses"] == pytest.approx(loud[0]["losses"], rel=ROUND_OFF)
        plain = rows(train("weighted-sum", budget__epochs=1, model__dropout=0.0))
        assert quiet[0]["losses"] != pytest.approx(plain[0]["losses"], rel=ROUND_OFF)

    def test_initial_weights_are_those_of_the_seed_alone(self, log: Log) -> None:
        starts = []
        for method, seed in (("weighted-sum", 0), ("attittud", 0), ("weighted-sum", 1)):
            log.batches.clear()
            train(method, seed=seed)
            starts.append(log.started("primary")[0])
        assert torch.equal(starts[0], starts[1])
        assert not torch.equal(starts[0], starts[2])


class TestDiagnostics:
    def found(self, method: str, **settings: Any) -> dict[str, float | None]:
        outcome = train(method, **settings)
        assert outcome.error is None
        values: dict[str, float | None] = outcome.result.diagnostics.model_dump()
        return values

    @pytest.mark.parametrize("method", ["weighted-sum", "primary-only", "toy-pretrainfinetune"])
    def test_a_sum_of_losses_has_none(self, method: str) -> None:
        assert set(self.found(method).values()) == {None}

    def test_gradients_have_a_cosine_and_a_rate_of_conflict(self) -> None:
        found = self.found("pcgrad", task__auxiliaries=2)
        cosine, conflict = found.pop("cosine"), found.pop("conflict_rate")
        assert cosine is not None
        assert conflict is not None
        assert -1 <= cosine <= 1
        assert 0 <= conflict <= 1
        assert set(found.values()) == {None}

    def test_a_basis_has_shares(self) -> None:
        found = self.found("attittud", method__rank=2)
        shares = [found[f"{name}_share"] for name in ("good", "bad", "neutral")]
        assert all(share is not None and 0 <= share <= 1 for share in shares)
        assert sum(share for share in shares if share is not None) == pytest.approx(1)
        energy = found["captured_energy"]
        assert energy is not None
        assert 0 <= energy <= 1 + 1e-6

    def test_what_is_no_number_is_not_known(self) -> None:
        outcome = train("toy-loud")
        assert outcome.result.status == "ok"
        assert "Infinity" not in outcome.folder.metrics.read_text(encoding="utf-8")
        assert outcome.result.diagnostics.captured_energy == 0.5  # of the second epoch
        assert train("toy-loud", budget__epochs=1).result.diagnostics.captured_energy is None

    def test_means_are_over_the_epochs_that_have_them(self) -> None:
        outcome = train("pcgrad")
        joint = [row["diagnostics"]["cosine"] for row in rows(outcome)[:2]]
        assert outcome.result.diagnostics.cosine == pytest.approx(sum(joint) / 2)

    def test_equal_gradients_have_cosine_one(self, log: Log) -> None:
        ledger = Ledger(3, torch.device("cpu"))
        jacobians = ([[1.0, 0.0], [2.0, 0.0], [0.0, 3.0]], [[1.0, 1.0], [-1.0, -1.0], [0.0, 0.0]])
        for jacobian in jacobians:
            ledger.note(step_over(batch_of(torch.tensor(jacobian))), has_gradients=True)
        means, bad = ledger.close_epoch()
        assert bad is None
        assert means["cosine"] == pytest.approx((0.5 + -0.5) / 2)  # a zero row has cosine 0
        assert means["conflict_rate"] == pytest.approx((0 + 0.5) / 2)


class TestStep:
    def test_counts_steps_and_epochs_of_the_run(self, log: Log) -> None:
        train("toy-watcher", budget__epochs=2)
        assert [found[2:] for found in log.found] == [
            *((index, 0) for index in range(3)),
            *((index, 1) for index in range(3, 6)),
        ]

    def test_a_weight_of_the_auxiliaries_reaches_their_losses(self) -> None:
        full, half = (
            rows(train("pcgrad", task__auxiliary_weight=weight, budget__steps_per_epoch=1))[0]
            for weight in (1, 0.5)
        )
        assert half["losses"]["auxiliary 1"] == 0.5 * full["losses"]["auxiliary 1"]
        assert half["losses"]["primary"] == full["losses"]["primary"]

    def test_dropout_is_drawn_for_seed_step_and_objective(self, log: Log) -> None:
        """The primary's dropout does not depend on what else is trained."""
        rates: dict[str, Any] = {"model__dropout": 0.5, "budget__steps_per_epoch": 1}
        joint, alone = (rows(train(m, **rates))[0] for m in ("weighted-sum", "primary-only"))
        assert joint["losses"]["primary"] == alone["losses"]["primary"]
        assert seeding.derive(0, "dropout", 0, 0, 0) != seeding.derive(0, "dropout", 0, 1, 0)
