from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from gradbench.errors import DataError
from gradbench.objectives import Classification, shift
from gradbench.seeding import ExampleRandom
from gradbench.task import (
    META_SHARE,
    Examples,
    ExampleSet,
    Splits,
    TensorSet,
    draw_by_class,
)

Indices = NDArray[np.int64]


def indices(*values: int) -> Indices:
    return np.array(values, dtype=np.int64)


def examples(count: int, first: int = 0, classes: int | None = 2) -> TensorSet:
    """Return examples that hold their own number, named after it."""
    numbers = torch.arange(first, first + count)
    return TensorSet(
        [f"example-{number}" for number in numbers],
        {"number": numbers, "square": numbers.square()},
        None if classes is None else (numbers % classes).numpy(),
    )


def splits(train: ExampleSet | None = None) -> Splits:
    return Splits(
        train=examples(20) if train is None else train,
        validation=examples(10, first=20),
        test=examples(30, first=30),
        auxiliaries=(examples(40, first=60), examples(40, first=60)),
        data_digest="0",
    )


def changed(whole: Splits, name: str, part: ExampleSet) -> Splits:
    parts: dict[str, Any] = {name: part}
    return replace(whole, **parts)


class TestExampleSet:
    def test_gives_examples_in_the_order_asked_for(self) -> None:
        found = examples(10).take(indices(3, 0, 3))
        assert found["number"].tolist() == [3, 0, 3]
        assert found["square"].tolist() == [9, 0, 9]

    def test_a_part_of_a_part_keeps_names_and_classes(self) -> None:
        part = examples(10).subset(indices(9, 7, 5, 3)).subset(indices(2, 0))
        assert len(part) == 2
        assert list(part.ids) == ["example-5", "example-9"]
        assert part.take(indices(1, 0))["number"].tolist() == [9, 5]
        assert part.strata is not None
        assert part.strata.tolist() == [1, 1]

    def test_a_part_without_classes_has_none(self) -> None:
        assert examples(10, classes=None).subset(indices(1)).strata is None


class TestSplits:
    def test_sizes(self) -> None:
        expected = {"train": 20, "validation": 10, "test": 30, "meta": 0}
        assert splits().sizes() == expected
        assert splits().with_meta(0).sizes() == {**expected, "train": 16, "meta": 4}

    def test_training_does_not_see_the_test(self) -> None:
        whole = splits().with_meta(0)
        part = whole.for_training()
        assert not hasattr(part, "test")
        assert part.train is whole.train
        assert part.validation is whole.validation
        assert part.auxiliaries is whole.auxiliaries
        assert part.meta is whole.meta

    def test_disjoint_splits_pass(self) -> None:
        splits().check()
        splits().with_meta(0).check()

    @pytest.mark.parametrize("name", ["train", "validation", "test", "meta"])
    def test_an_example_in_two_splits_is_named(self, name: str) -> None:
        whole = splits().with_meta(0)
        part = getattr(whole, name)
        other = "test" if name != "test" else "train"
        both = TensorSet([*getattr(whole, other).ids, part.ids[0]], {})
        with pytest.raises(DataError, match=rf"'{part.ids[0]}' in ({name}|{other})"):
            changed(whole, other, both).check()

    @pytest.mark.parametrize("name", ["train", "validation", "test", "meta"])
    def test_an_empty_split_is_named(self, name: str) -> None:
        with pytest.raises(DataError, match=f"the {name} split, found none"):
            changed(splits(), name, examples(0)).check()

    def test_the_digest_says_who_is_where(self) -> None:
        whole = splits()
        others = [
            replace(whole, train=examples(19)),
            replace(whole, train=examples(20).subset(np.arange(20)[::-1])),
            replace(whole, train=whole.validation, validation=whole.train),
            replace(whole, auxiliaries=whole.auxiliaries[:1]),
            replace(whole, auxiliaries=(whole.auxiliaries[0], examples(39, first=60))),
            replace(whole, meta=examples(1, first=200)),
            whole.with_meta(0),
            whole.with_meta(1),
        ]
        digests = {each.digest() for each in (whole, *others)}
        assert len(digests) == 1 + len(others)
        assert splits().digest() == whole.digest()
        assert replace(whole, data_digest="1").digest() == whole.digest()


class TestMeta:
    def test_is_a_fifth_of_each_class_of_train(self) -> None:
        numbers = torch.arange(60)
        strata = np.repeat([0, 1, 2], [10, 20, 30])
        train = TensorSet([str(n) for n in numbers.tolist()], {"number": numbers}, strata)
        found = replace(splits(), train=train).with_meta(3)
        assert found.meta is not None
        assert found.meta.strata is not None
        assert np.bincount(found.meta.strata).tolist() == [2, 4, 6]
        assert {*found.meta.ids, *found.train.ids} == set(train.ids)
        assert not {*found.meta.ids} & {*found.train.ids}
        taken = found.meta.take(np.arange(len(found.meta)))["number"]
        assert [str(n) for n in taken.tolist()] == list(found.meta.ids)

    def test_leaves_the_other_splits(self) -> None:
        whole = splits()
        found = whole.with_meta(3)
        assert found.validation is whole.validation
        assert found.test is whole.test
        assert found.auxiliaries is whole.auxiliaries

    def test_is_a_function_of_the_seed(self) -> None:
        found = [splits(examples(200)).with_meta(seed).meta for seed in (1, 1, 2)]
        ids = [tuple(each.ids) for each in found if each is not None]
        assert ids[0] == ids[1] != ids[2]

    def test_without_classes_is_a_fifth_of_all(self) -> None:
        found = splits(examples(20, classes=None)).with_meta(0)
        assert found.meta is not None
        assert len(found.meta) == META_SHARE * 20

    def test_too_small_a_class_is_named(self) -> None:
        strata = np.repeat([0, 1], [20, 7])
        train = TensorSet([str(n) for n in range(27)], {}, strata)
        with pytest.raises(DataError, match=r"found class 1 with 7"):
            splits(train).with_meta(0)
        enough = TensorSet([str(n) for n in range(28)], {}, np.repeat([0, 1], [20, 8]))
        assert splits(enough).with_meta(0).sizes()["meta"] == 6


class TestDrawByClass:
    labels = np.array([0] * 6 + [1] * 8 + [7] * 9)[np.random.default_rng(0).permutation(23)]
    sizes: ClassVar = {"train": 3, "validation": 2}

    def test_draws_as_many_of_each_class(self) -> None:
        found = draw_by_class(self.labels, self.sizes, "test", 0)
        assert list(found) == ["train", "validation", "test"]
        for name, count in self.sizes.items():
            drawn = self.labels[found[name]]
            assert sorted(drawn.tolist()) == sorted([0, 1, 7] * count)
        assert sorted(self.labels[found["test"]].tolist()) == [0] + [1] * 3 + [7] * 4

    def test_gives_every_example_to_one_split(self) -> None:
        found = draw_by_class(self.labels, self.sizes, "test", 0)
        everything = np.concatenate(list(found.values()))
        assert sorted(everything.tolist()) == list(range(23))
        assert all((np.diff(part) > 0).all() for part in found.values())

    def test_is_a_function_of_the_seed(self) -> None:
        draws = [draw_by_class(self.labels, self.sizes, "test", seed) for seed in (1, 1, 2)]
        found = [{name: part.tolist() for name, part in draw.items()} for draw in draws]
        assert found[0] == found[1] != found[2]

    def test_does_not_draw_from_the_global_generator(self) -> None:
        before = np.random.get_state()  # noqa: NPY002 - it is the one that must not move
        draw_by_class(self.labels, self.sizes, "test", 0)
        after = np.random.get_state()  # noqa: NPY002
        assert (before[1] == after[1]).all()  # type: ignore[index]

    def test_too_small_a_class_is_named(self) -> None:
        with pytest.raises(DataError, match=r"more than 6 examples of class 0.*found 6"):
            draw_by_class(self.labels, {"train": 4, "validation": 2}, "test", 0)
        found = draw_by_class(self.labels, {"train": 3, "validation": 2}, "test", 0)
        assert (self.labels[found["test"]] == 0).sum() == 1


class Naming(Classification):
    """Tell classes apart."""

    def batch(self, examples: Examples, random: ExampleRandom | None) -> tuple[Tensor, Tensor]:
        return examples["image"], examples["label"]


class TestClassification:
    objective = Naming("naming", 3, margin=0.02)
    logits = torch.tensor([[2.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 3.0], [0.0, 0.0, 1.0]])
    target = torch.tensor([0, 1, 2, 0])

    def test_loss_is_that_of_the_softmax(self) -> None:
        found = self.objective.loss(self.logits, self.target)
        probabilities = self.logits.double().softmax(1)
        expected = -probabilities[torch.arange(4), self.target].log()
        torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=0)

    def test_metric_is_the_share_of_hits(self) -> None:
        metric = self.objective.metrics()["accuracy"]
        metric.update(self.objective.scores(self.logits[:2]), self.target[:2])
        metric.update(self.objective.scores(self.logits[2:]), self.target[2:])
        assert float(metric.compute()) == 0.75

    def test_metrics_are_new_each_time(self) -> None:
        first = self.objective.metrics()["accuracy"]
        first.update(self.objective.scores(self.logits), torch.tensor([1, 0, 0, 0]))
        second = self.objective.metrics()["accuracy"]
        second.update(self.objective.scores(self.logits), self.target)
        assert float(second.compute()) == 0.75

    def test_scores_are_probabilities_in_float32(self) -> None:
        found = self.objective.scores(self.logits.bfloat16())
        assert found.dtype == torch.float32
        torch.testing.assert_close(found.sum(1), torch.ones(4))

    def test_head_has_an_output_a_class(self) -> None:
        head = self.objective.head(5, 0.25)
        assert head.get_parameter("linear.weight").shape == (3, 5)
        assert head.get_submodule("dropout").p == 0.25


def random_of(count: int) -> ExampleRandom:
    return ExampleRandom(3, np.zeros(count, dtype=np.int64), np.arange(count, dtype=np.int64))


class TestShift:
    def test_moves_whole_images_and_repeats_their_edge(self) -> None:
        ramp = torch.arange(25.0).view(1, 5, 5)
        images = torch.cat([ramp, -ramp])[None].repeat(200, 1, 1, 1)
        found = shift(images, random_of(200), 2)
        assert found.shape == images.shape
        assert found.is_contiguous()
        padded = torch.nn.functional.pad(images[:1], (2, 2, 2, 2), mode="replicate")
        windows = {
            (row, column): padded[0, :, row : row + 5, column : column + 5]
            for row in range(5)
            for column in range(5)
        }
        seen = {
            next(place for place, window in windows.items() if torch.equal(window, image))
            for image in found
        }
        assert seen == set(windows)

    def test_depends_on_the_example_alone(self) -> None:
        images = torch.rand(8, 1, 6, 6)
        together = shift(images, random_of(8), 2)
        random = ExampleRandom(3, indices(0), indices(5))
        assert torch.equal(shift(images[5:6], random, 2)[0], together[5])

    def test_of_nothing_is_nothing(self) -> None:
        images = torch.rand(4, 3, 5, 7)
        assert torch.equal(shift(images, random_of(4), 0), images)
