"""Every check of the contract fails for a task pair that breaks just what it checks."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torchmetrics import Metric

from gradbench.errors import ContractError, DataError, PluginError
from gradbench.fields import Uniform, Valid
from gradbench.losses import ExampleLosses, Scored
from gradbench.model import Features, LinearHead
from gradbench.objectives import Classification
from gradbench.seeding import ExampleRandom
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
    draw_by_class,
)
from gradbench.testing import MakeTask, TaskContract
from gradbench.testing.checks import checks_of
from gradbench.testing.tasks import SEED

CLASSES, SIZE = 3, 4  # pixels a side
EACH = 40  # examples a class


class Blobs(Classification):
    """Tell apart squares of different brightness."""

    def batch(self, examples: Examples, random: ExampleRandom | None) -> tuple[Tensor, Tensor]:
        images = examples["image"]
        if random is not None:
            noise = torch.from_numpy(random.uniform("noise", SIZE * SIZE)).float()
            images = images + noise.view(-1, 1, SIZE, SIZE)
        return images, examples["label"]


@dataclass(frozen=True)
class Sound(TaskPair):
    """Squares of three shades, which break nothing."""

    version = "1.0"
    citation = "these tests"
    licence = "Apache-2.0"
    sources: ClassVar[tuple[Source, ...]] = ("sample",)
    presets: ClassVar[Mapping[str, Preset]] = {
        "default": Preset(backbone="timm:test_vit", sizes={"train": 10, "validation": 5})
    }

    @property
    def input(self) -> Input:
        return Input(channels=1, size=SIZE)

    def objectives(self) -> tuple[Objective, ...]:
        return Blobs("shade", CLASSES, margin=0.01), Blobs("another shade", CLASSES, margin=0.01)

    def draw_sample(self, folder: Path) -> None:
        labels = np.repeat(np.arange(CLASSES), EACH)
        noise = np.random.Generator(np.random.Philox(1)).random((len(labels), 1, SIZE, SIZE))
        np.savez(folder / "shades.npz", images=noise + labels[:, None, None, None], labels=labels)

    def splits(self, source: Source, folder: Path, preset: Preset, seed: int) -> Splits:
        with np.load(folder / "shades.npz") as stored:
            images, labels = stored["images"].astype(np.float32), stored["labels"]
        everything = TensorSet(
            [f"square-{place}" for place in range(len(labels))],
            {"image": torch.from_numpy(images), "label": torch.from_numpy(labels)},
            strata=labels,
        )
        return self.divided(everything, preset, seed)

    def divided(self, everything: ExampleSet, preset: Preset, seed: int) -> Splits:
        assert everything.strata is not None
        drawn = draw_by_class(everything.strata, preset.sizes, "test", seed)
        return Splits(
            train=everything.subset(drawn["train"]),
            validation=everything.subset(drawn["validation"]),
            test=everything.subset(drawn["test"]),
            auxiliaries=(everything.subset(drawn["train"]),),
            data_digest="of the squares",
        )


@dataclass(frozen=True)
class SearchedOutsideItsRange(Sound):
    """Squares with a field."""

    c: Annotated[float, Valid(0, 1), Uniform(0, 2)] = 0.5


@dataclass(frozen=True)
class CitesNothing(Sound):
    """Squares from nowhere."""

    citation = ""


@dataclass(frozen=True)
class DeclaresUnknownFailure(Sound):
    known_failures: ClassVar[Mapping[str, str]] = {"test_of_patience": "it has none"}


@dataclass(frozen=True)
class HasOneObjectiveTwice(Sound):
    def objectives(self) -> tuple[Objective, ...]:
        return (Blobs("shade", CLASSES, margin=0.01),) * 2


@dataclass(frozen=True)
class ValidatesOnTrain(Sound):
    def divided(self, everything: ExampleSet, preset: Preset, seed: int) -> Splits:
        splits = super().divided(everything, preset, seed)
        return replace(splits, validation=splits.train)


@dataclass(frozen=True)
class TrainsOnTheTest(Sound):
    def divided(self, everything: ExampleSet, preset: Preset, seed: int) -> Splits:
        return replace(super().divided(everything, preset, seed), auxiliaries=(everything,))


@dataclass(frozen=True)
class DrawsFromTheGlobalGenerator(Sound):
    def divided(self, everything: ExampleSet, preset: Preset, seed: int) -> Splits:
        return super().divided(everything, preset, int(torch.randint(1000, ())))


@dataclass(frozen=True)
class DrawsTheSameForAllSeeds(Sound):
    def divided(self, everything: ExampleSet, preset: Preset, seed: int) -> Splits:
        return super().divided(everything, preset, 0)


@dataclass(frozen=True)
class HasANewDigestForEachSeed(Sound):
    def divided(self, everything: ExampleSet, preset: Preset, seed: int) -> Splits:
        return replace(super().divided(everything, preset, seed), data_digest=str(seed))


@dataclass(frozen=True)
class DrawsAnotherSample(Sound):
    def draw_sample(self, folder: Path) -> None:
        super().draw_sample(folder)
        np.savez(folder / "digest.npz", number=np.random.rand())  # noqa: NPY002

    def splits(self, source: Source, folder: Path, preset: Preset, seed: int) -> Splits:
        with np.load(folder / "digest.npz") as stored:
            digest = str(stored["number"])
        return replace(super().splits(source, folder, preset, seed), data_digest=digest)


class Centred(ExampleSet):
    """Examples minus the mean of those that are taken with them."""

    def __init__(self, parent: ExampleSet) -> None:
        self.parent, self.ids, self.strata = parent, parent.ids, parent.strata

    def take(self, indices: Indices) -> Examples:
        taken = self.parent.take(indices)
        return {**taken, "image": taken["image"] - taken["image"].mean(0)}


@dataclass(frozen=True)
class CentresWhatItTakes(Sound):
    def divided(self, everything: ExampleSet, preset: Preset, seed: int) -> Splits:
        splits = super().divided(everything, preset, seed)
        return replace(splits, train=Centred(splits.train))


class HoldsOutAThird(Splits):
    """Splits with a meta split that is too large."""

    def with_meta(self, seed: int) -> Splits:
        return replace(
            self,
            meta=self.train.subset(np.arange(0, len(self.train), 3)),
            train=self.train.subset(
                np.flatnonzero(np.arange(len(self.train)) % 3)  # the rest
            ),
        )


@dataclass(frozen=True)
class HoldsOutMore(Sound):
    def divided(self, everything: ExampleSet, preset: Preset, seed: int) -> Splits:
        return HoldsOutAThird(**vars(super().divided(everything, preset, seed)))


@dataclass(frozen=True)
class With(Sound):
    """Squares with another primary objective."""

    objective: ClassVar[type[Blobs]]

    def objectives(self) -> tuple[Objective, ...]:
        primary = self.objective("shade", CLASSES, margin=0.01)
        return primary, Blobs("another shade", CLASSES, margin=0.01)


class NoisyBlobs(Blobs):
    def batch(self, examples: Examples, random: ExampleRandom | None) -> tuple[Tensor, Tensor]:
        images, labels = super().batch(examples, random)
        return images + torch.rand_like(images), labels


class OverwrittenBlobs(Blobs):
    def batch(self, examples: Examples, random: ExampleRandom | None) -> tuple[Tensor, Tensor]:
        examples["image"].clamp_(max=1.0)
        return super().batch(examples, random)


class BlobsByPlace(Blobs):
    def batch(self, examples: Examples, random: ExampleRandom | None) -> tuple[Tensor, Tensor]:
        images, labels = super().batch(examples, random)
        return images + torch.arange(len(images)).view(-1, 1, 1, 1), labels


class BlobsOfTheMean(Blobs):
    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        losses = super().loss(output, target)
        return losses.mean().expand_as(losses)


class BlobsOfOneLoss(Blobs):
    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        return super().loss(output, target).mean()


class BlobsOfHalfWeight(Blobs):
    def loss(self, output: Tensor, target: Tensor) -> ExampleLosses:  # type: ignore[override]
        losses = super().loss(output, target)
        return Scored(losses, torch.full_like(losses, 0.5))


class DetachedHead(LinearHead):
    def forward(self, features: Features) -> Tensor:
        return super().forward(Features(*(part.detach() for part in features)))


class DetachedBlobs(Blobs):
    def head(self, width: int, dropout: float) -> nn.Module:
        return DetachedHead(width, CLASSES, dropout)


class FrozenBlobs(Blobs):
    def head(self, width: int, dropout: float) -> nn.Module:
        return super().head(width, dropout).requires_grad_(False)


class BlobsUpsideDown(Blobs):
    higher_is_better = False


class BlobsOfOneMetric(Blobs):
    def __init__(self, name: str, classes: int, *, margin: float) -> None:
        super().__init__(name, classes, margin=margin)
        self.only = super().metrics()

    def metrics(self) -> dict[str, Metric]:
        return self.only


class BlobsWithoutMargin(Blobs):
    def __init__(self, name: str, classes: int, *, margin: float) -> None:
        super().__init__(name, classes, margin=0.0)


def given(primary: type[Blobs]) -> type[Sound]:
    return dataclass(frozen=True)(type(f"With{primary.__name__}", (With,), {"objective": primary}))


contract = TaskContract()

# the check, a task pair that breaks it, what it raises, the case of the check
BROKEN: list[tuple[Callable[..., None], type[Sound], type[BaseException], dict[str, Any]]] = [
    (contract.test_definition_is_accepted, SearchedOutsideItsRange, PluginError, {}),
    (contract.test_definition_is_accepted, CitesNothing, AssertionError, {}),
    (
        contract.test_known_failures_name_checks_and_reasons,
        DeclaresUnknownFailure,
        AssertionError,
        {},
    ),
    (contract.test_objectives_are_well_formed, HasOneObjectiveTwice, AssertionError, {}),
    (contract.test_objectives_are_well_formed, given(BlobsWithoutMargin), AssertionError, {}),
    (contract.test_splits_are_disjoint, ValidatesOnTrain, DataError, {}),
    (contract.test_auxiliaries_hold_no_held_out_example, TrainsOnTheTest, AssertionError, {}),
    (
        contract.test_same_seed_gives_the_same_splits,
        DrawsFromTheGlobalGenerator,
        AssertionError,
        {},
    ),
    (contract.test_another_seed_draws_other_splits, DrawsTheSameForAllSeeds, AssertionError, {}),
    (contract.test_another_seed_draws_other_splits, HasANewDigestForEachSeed, AssertionError, {}),
    (contract.test_a_sample_is_drawn_the_same_again, DrawsAnotherSample, AssertionError, {}),
    (contract.test_examples_do_not_depend_on_their_company, CentresWhatItTakes, AssertionError, {}),
    (
        contract.test_batch_is_a_function_of_examples_and_their_random_numbers,
        given(NoisyBlobs),
        AssertionError,
        {},
    ),
    (
        contract.test_batch_is_a_function_of_examples_and_their_random_numbers,
        given(OverwrittenBlobs),
        AssertionError,
        {},
    ),
    (
        contract.test_augmentation_does_not_depend_on_the_place_in_the_batch,
        given(BlobsByPlace),
        AssertionError,
        {"training": True},
    ),
    (
        contract.test_augmentation_does_not_depend_on_the_place_in_the_batch,
        given(BlobsByPlace),
        AssertionError,
        {"training": False},
    ),
    (
        contract.test_loss_of_a_batch_is_that_of_its_examples,
        given(BlobsOfTheMean),
        AssertionError,
        {},
    ),
    (
        contract.test_loss_of_a_batch_is_that_of_its_examples,
        given(BlobsOfOneLoss),
        ContractError,
        {},
    ),
    (
        contract.test_loss_of_a_batch_is_that_of_its_examples,
        given(BlobsOfHalfWeight),
        AssertionError,
        {},
    ),
    (contract.test_gradient_reaches_features_and_head, given(DetachedBlobs), AssertionError, {}),
    (contract.test_gradient_reaches_features_and_head, given(FrozenBlobs), AssertionError, {}),
    (contract.test_best_scores_beat_bad_ones, given(BlobsUpsideDown), AssertionError, {}),
    (contract.test_metrics_are_new_in_every_call, given(BlobsOfOneMetric), AssertionError, {}),
    (contract.test_meta_is_a_fifth_of_every_class_of_train, HoldsOutMore, AssertionError, {}),
    (contract.test_meta_of_too_few_examples_is_refused, HoldsOutMore, pytest.fail.Exception, {}),
]


def respond(check: Callable[..., None], made: TaskPair, folder: Path, case: dict[str, Any]) -> None:
    """Run a check with the arguments that it asks for."""
    made.draw_sample(folder)
    preset = made.presets["default"]
    available: dict[str, Any] = {
        "task": made,
        "source": "sample",
        "folder": folder,
        "preset": preset,
        "tmp_path": folder / "again",
    }
    wanted = inspect.signature(check).parameters
    if "splits" in wanted:
        available["splits"] = made.splits("sample", folder, preset, SEED)
    available["tmp_path"].mkdir()
    check(**{name: available[name] for name in wanted if name in available}, **case)


@pytest.mark.parametrize(
    ("check", "broken", "error", "case"),
    BROKEN,
    ids=[f"{check.__name__}-{broken.__name__}" for check, broken, *_ in BROKEN],
)
def test_a_broken_task_fails(
    check: Callable[..., None],
    broken: type[Sound],
    error: type[BaseException],
    case: dict[str, Any],
    tmp_path: Path,
) -> None:
    folders = tmp_path / "sound", tmp_path / "broken"
    for folder in folders:
        folder.mkdir()
    respond(check, Sound(), folders[0], case)
    with pytest.raises(error):
        respond(check, broken(), folders[1], case)


def test_every_check_is_broken_once() -> None:
    assert {check.__name__ for check, *_ in BROKEN} == checks_of(TaskContract)


class TestSound(TaskContract):
    @pytest.fixture
    def make_task(self) -> MakeTask:
        return Sound
