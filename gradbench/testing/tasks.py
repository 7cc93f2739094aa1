"""What every task pair must satisfy, as tests that its author subclasses."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close
from torch.utils._pytree import tree_leaves, tree_map

from gradbench.errors import DataError
from gradbench.fields import check_definition
from gradbench.losses import ExampleLosses, Scored, mean_loss, per_example
from gradbench.model import Features, initialised_from
from gradbench.seeding import ExampleRandom
from gradbench.task import (
    META_LEAST,
    META_SHARE,
    Examples,
    ExampleSet,
    Indices,
    Objective,
    Preset,
    Source,
    Splits,
    TaskPair,
)
from gradbench.testing import generators
from gradbench.testing.checks import PluginChecks, checks_of, known_failures

MakeTask = Callable[[], TaskPair]
Trunk = Callable[[Any], Features]

SEED, OTHER_SEED = 3, 4
BATCH = 8
SCORED = 64  # test examples for the metrics, enough to have every class among them
WIDTH, TOKENS = 8, 4  # of the tiny trunk's features
# One float32 forward of a batch and one of each of its examples sum in different orders.
ALONE = 1e-5


class TinyTrunk(nn.Module):
    """Flatten whatever an example is and map it linearly to features."""

    def __init__(self, inputs: Tensor) -> None:
        super().__init__()
        with initialised_from(SEED, "tiny trunk"):
            self.linear = nn.Linear(inputs[0].numel(), TOKENS * WIDTH)

    def forward(self, inputs: Tensor) -> Features:
        """Return features of one vector and of ``TOKENS`` ones."""
        tokens = self.linear(inputs.flatten(1).float()).view(-1, TOKENS, WIDTH)
        return Features(pooled=tokens.mean(1), tokens=tokens)


class TaskContract(PluginChecks):
    """Subclass it and define a ``make_task`` fixture that returns a zero-argument factory::

        class TestMine(TaskContract):
            @pytest.fixture
            def make_task(self) -> MakeTask:
                return Mine

    The drawn sample is used where there is one, else the real data; without its files the checks
    are skipped. What a general check can not know, a subclass overrides: :meth:`make_trunk`
    and :meth:`best_and_worst_scores`.
    """

    def make_trunk(self, task: TaskPair, inputs: Any) -> Trunk:
        """Return a small trunk for batches like ``inputs``, the same in every call."""
        return TinyTrunk(inputs)

    def best_and_worst_scores(
        self, objective: Objective, scores: Tensor, target: Any
    ) -> tuple[Tensor, Tensor]:
        """Return scores, in the form of ``scores``, that no others beat, and bad ones."""
        if not isinstance(target, Tensor):
            pytest.fail("override best_and_worst_scores for targets that are no tensor")
        if target.is_floating_point() and target.shape == scores.shape:
            best = target.nan_to_num().to(scores.dtype)
            is_binary = bool(((best == 0) | (best == 1)).all())
            return best, 1 - best if is_binary else best + 1 + best.abs()
        if not target.is_floating_point() and scores.dim() == target.dim() + 1:
            classes = scores.shape[1]
            one_hot = nn.functional.one_hot(target.clamp_min(0), classes).movedim(-1, 1)
            best = one_hot.to(scores.dtype)
            return best, best.roll(1, dims=1)
        pytest.fail(f"override best_and_worst_scores for scores of shape {tuple(scores.shape)}")

    @pytest.fixture
    def make_task(self) -> MakeTask:
        """Return what makes the task; a class whose fields have defaults will do."""
        raise NotImplementedError(f"{type(self).__name__} needs a fixture make_task.")

    @pytest.fixture
    def plugin(self, make_task: MakeTask) -> type:
        """Return the class of the task."""
        return type(make_task())

    @pytest.fixture
    def task(self, make_task: MakeTask) -> TaskPair:
        """Return the task."""
        return make_task()

    @pytest.fixture
    def source(self, task: TaskPair) -> Source:
        """Return where the data comes from."""
        return "sample" if "sample" in task.sources else "real"

    @pytest.fixture
    def preset(self, task: TaskPair, source: Source) -> Preset:
        """Return the preset that is checked."""
        sample = source == "sample" and "sample" in task.presets
        return task.presets["sample" if sample else "default"]

    @pytest.fixture
    def folder(
        self, task: TaskPair, source: Source, tmp_path_factory: pytest.TempPathFactory
    ) -> Path:
        """Return the folder with the data; a sample is drawn once a session."""
        digest = hashlib.sha256(repr(task).encode()).hexdigest()[:8]
        folder = tmp_path_factory.getbasetemp() / f"{source}-{type(task).__name__}-{digest}"
        if source == "sample":
            if not folder.exists():
                folder.mkdir()
                task.draw_sample(folder)
        elif (missing := task.missing(folder)) is not None:
            pytest.skip(missing)
        return folder

    @pytest.fixture
    def splits(self, task: TaskPair, source: Source, folder: Path, preset: Preset) -> Splits:
        """Return the data of one run."""
        return task.splits(source, folder, preset, SEED)

    def test_definition_is_accepted(self, task: TaskPair) -> None:
        cls = type(task)
        check_definition(cls)
        text = inspect.cleandoc(cls.__doc__ or "")
        assert text.partition("\n")[0].endswith(".")
        assert all(
            isinstance(said, str) and said for said in (cls.version, cls.citation, cls.licence)
        )
        assert isinstance(cls.revision, int)
        assert cls.revision >= 1
        assert set(cls.sources) <= {"real", "sample"}
        assert cls.sources
        assert "default" in cls.presets
        for preset in cls.presets.values():
            assert ":" in preset.backbone, "a backbone is provider:name"
            assert all(count > 0 for count in preset.sizes.values())

    def test_known_failures_name_checks_and_reasons(self, task: TaskPair) -> None:
        declared = known_failures(type(task))
        assert {name.partition("[")[0] for name in declared} <= checks_of(type(self))
        assert all(reason.strip() for reason in declared.values())

    def test_objectives_are_well_formed(self, task: TaskPair) -> None:
        objectives = task.objectives()
        assert len(objectives) >= 2
        assert len({objective.name for objective in objectives}) == len(objectives)
        for objective in objectives:
            assert objective.margin > 0
            assert objective.metrics().keys(), "there is no metric to select by"

    def test_splits_are_disjoint(self, task: TaskPair, splits: Splits) -> None:
        splits.check()
        assert len(splits.auxiliaries) == len(task.objectives()) - 1
        parts = (splits.train, splits.validation, splits.test, *splits.auxiliaries)
        for part in parts:
            assert len(part) > 0
            assert len(set(part.ids)) == len(part)
            assert part.strata is None or part.strata.shape == (len(part),)

    def test_auxiliaries_hold_no_held_out_example(self, splits: Splits) -> None:
        kept_apart = {*splits.validation.ids, *splits.test.ids}
        for part in splits.auxiliaries:
            assert not kept_apart & set(part.ids)

    def test_same_seed_gives_the_same_splits(
        self, task: TaskPair, source: Source, folder: Path, preset: Preset, splits: Splits
    ) -> None:
        with generators.seeded_by(1):
            before = generators.positions()
            again = task.splits(source, folder, preset, SEED)
            assert generators.positions() == before, "a global generator was drawn from"
        assert again.digest() == splits.digest()
        assert again.data_digest == splits.data_digest

    def test_another_seed_draws_other_splits(
        self, task: TaskPair, source: Source, folder: Path, preset: Preset, splits: Splits
    ) -> None:
        other = task.splits(source, folder, preset, OTHER_SEED)
        assert other.data_digest == splits.data_digest
        assert (other.digest() != splits.digest()) == bool(preset.sizes)

    def test_a_sample_is_drawn_the_same_again(
        self,
        task: TaskPair,
        source: Source,
        preset: Preset,
        splits: Splits,
        tmp_path: Path,
    ) -> None:
        if source != "sample":
            pytest.skip("has no sample")
        with generators.seeded_by(1):
            task.draw_sample(tmp_path)
        again = task.splits(source, tmp_path, preset, SEED)
        assert (again.digest(), again.data_digest) == (splits.digest(), splits.data_digest)

    def test_examples_do_not_depend_on_their_company(self, task: TaskPair, splits: Splits) -> None:
        for k in range(len(task.objectives())):
            part = _training_set(splits, k)
            indices = _spread(len(part), BATCH)
            together = part.take(indices)
            for place, index in enumerate(indices):
                alone = part.take(np.array([index]))
                assert alone.keys() == together.keys()
                for name, values in together.items():
                    assert len(values) == len(indices)
                    assert_close(alone[name][0], values[place], rtol=0, atol=0, equal_nan=True)

    def test_batch_is_a_function_of_examples_and_their_random_numbers(
        self, task: TaskPair, splits: Splits
    ) -> None:
        for k, objective in enumerate(task.objectives()):
            examples, random = _batch_of(_training_set(splits, k))
            before = {name: values.clone() for name, values in examples.items()}
            with generators.seeded_by(1):
                stood = generators.positions()
                first = objective.batch(examples, random)
                assert generators.positions() == stood, "a global generator was drawn from"
            with generators.seeded_by(2):
                _assert_same(objective.batch(examples, random), first)
            _assert_same(examples, before)
            assert all(len(leaf) == len(random.examples) for leaf in tree_leaves(first))

    @pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
    def test_augmentation_does_not_depend_on_the_place_in_the_batch(
        self, task: TaskPair, splits: Splits, training: bool
    ) -> None:
        for k, objective in enumerate(task.objectives()):
            examples, random = _batch_of(_training_set(splits, k))
            together = objective.batch(examples, random if training else None)
            turned = np.arange(len(random.examples))[::-1].copy()
            backwards = objective.batch(*_pick(examples, random, turned, training))
            _assert_same(_rows(backwards, turned), together)
            for place in turned:
                one = np.array([place])
                alone = objective.batch(*_pick(examples, random, one, training))
                _assert_same(alone, _rows(together, one))

    def test_loss_of_a_batch_is_that_of_its_examples(self, task: TaskPair, splits: Splits) -> None:
        for k, objective in enumerate(task.objectives()):
            inputs, target = _made(objective, splits, k)
            trunk, head = self.make_trunk(task, inputs), _head(objective)
            together = objective.loss(head(trunk(inputs)), target)
            assert per_example(together).shape == (BATCH,)
            assert per_example(together).isfinite().all()
            assert ((_weight(together) == 0) | (_weight(together) == 1)).all()
            for place in range(BATCH):
                row = _rows((inputs, target), np.array([place]))
                alone = objective.loss(head(trunk(row[0])), row[1])
                assert_close(
                    per_example(alone)[0], per_example(together)[place], rtol=ALONE, atol=ALONE
                )
                assert_close(_weight(alone)[0], _weight(together)[place], rtol=0, atol=0)

    def test_gradient_reaches_features_and_head(self, task: TaskPair, splits: Splits) -> None:
        for k, objective in enumerate(task.objectives()):
            inputs, target = _made(objective, splits, k)
            with torch.no_grad():
                features = self.make_trunk(task, inputs)(inputs)
            features = Features(*(part.detach().requires_grad_() for part in features))
            head = _head(objective)
            torch.autograd.backward(mean_loss(objective.loss(head(features), target)))
            assert any(_is_nonzero(part.grad) for part in features), objective.name
            assert any(_is_nonzero(p.grad) for p in head.parameters()), objective.name

    def test_best_scores_beat_bad_ones(self, task: TaskPair, splits: Splits) -> None:
        objective = task.objectives()[0]
        indices = _spread(len(splits.test), SCORED)
        inputs, target = objective.batch(splits.test.take(indices), None)
        with torch.no_grad():
            scores = objective.scores(_head(objective)(self.make_trunk(task, inputs)(inputs)))
        assert len(scores) == len(indices)
        assert scores.isfinite().all()
        found = []
        for candidate in self.best_and_worst_scores(objective, scores, target):
            metric = next(iter(objective.metrics().values()))
            metric.update(candidate, target)
            value = metric.compute()
            assert value.shape == ()
            found.append(float(value) if objective.higher_is_better else -float(value))
        assert found[0] > found[1]

    def test_metrics_are_new_in_every_call(self, task: TaskPair) -> None:
        for objective in task.objectives():
            first, second = objective.metrics(), objective.metrics()
            assert list(first) == list(second)
            assert all(first[name] is not second[name] for name in first)

    def test_meta_is_a_fifth_of_every_class_of_train(self, splits: Splits) -> None:
        counts = [round(META_SHARE * count) for count in _members(splits.train).values()]
        if min(counts) < META_LEAST:
            with pytest.raises(DataError):
                splits.with_meta(SEED)
            return
        divided = splits.with_meta(SEED)
        divided.check()
        assert divided.meta is not None
        assert list(_members(divided.meta).values()) == counts
        assert {*divided.meta.ids, *divided.train.ids} == set(splits.train.ids)
        assert len(divided.meta) + len(divided.train) == len(splits.train)
        for part in ("validation", "test", "auxiliaries"):
            assert getattr(divided, part) is getattr(splits, part)
        assert divided.digest() == splits.with_meta(SEED).digest()
        assert divided.digest() != splits.digest()

    def test_meta_of_too_few_examples_is_refused(self, splits: Splits) -> None:
        strata = _strata(splits.train)
        kept = [np.flatnonzero(strata == each)[: META_LEAST + 1] for each in np.unique(strata)]
        few = replace(splits, train=splits.train.subset(np.sort(np.concatenate(kept))))
        with pytest.raises(DataError, match="class"):
            few.with_meta(SEED)


def _training_set(splits: Splits, k: int) -> ExampleSet:
    return splits.train if k == 0 else splits.auxiliaries[k - 1]


def _spread(count: int, wanted: int) -> Indices:
    """Return ``wanted`` indices below ``count``, far apart; with repetitions if need be."""
    return np.linspace(0, count - 1, wanted).round().astype(np.int64)


def _batch_of(part: ExampleSet) -> tuple[Examples, ExampleRandom]:
    indices = _spread(len(part), BATCH)
    # two passes, as in a batch that runs over the end of one
    passes = (np.arange(BATCH) >= BATCH // 2).astype(np.int64)
    return part.take(indices), ExampleRandom(SEED, passes, indices)


def _made(objective: Objective, splits: Splits, k: int) -> tuple[Any, Any]:
    return objective.batch(*_batch_of(_training_set(splits, k)))


def _pick(
    examples: Examples, random: ExampleRandom, places: Indices, training: bool
) -> tuple[Examples, ExampleRandom | None]:
    picked = ExampleRandom(random.key, random.passes[places], random.examples[places])
    return _rows(examples, places), picked if training else None


def _rows(tree: Any, places: Indices) -> Any:
    rows = torch.from_numpy(places)
    return tree_map(lambda leaf: leaf[rows], tree)


def _assert_same(found: object, expected: object) -> None:
    for one, other in zip(tree_leaves(found), tree_leaves(expected), strict=True):
        assert_close(one, other, rtol=0, atol=0, equal_nan=True)


def _head(objective: Objective) -> nn.Module:
    with initialised_from(SEED, objective.name):
        return objective.head(WIDTH, 0.0)


def _weight(losses: ExampleLosses) -> Tensor:
    if isinstance(losses, Scored):
        return losses.weight
    return torch.ones_like(losses)


def _is_nonzero(grad: Tensor | None) -> bool:
    return grad is not None and bool((grad != 0).any())


def _strata(part: ExampleSet) -> Indices:
    return np.zeros(len(part), dtype=np.int64) if part.strata is None else part.strata


def _members(part: ExampleSet) -> dict[int, int]:
    """Return the number of examples a class."""
    classes, counts = np.unique(_strata(part), return_counts=True)
    return dict(zip(classes.tolist(), counts.tolist(), strict=True))
