"""A task pair: one primary objective, the auxiliary ones beside it, and their data."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from gradbench import seeding
from gradbench.errors import DataError
from gradbench.fields import Checked, LogUniform, Valid
from gradbench.losses import ExampleLosses
from gradbench.seeding import ExampleRandom
from gradbench.settings import Budget, Optimizer

if TYPE_CHECKING:
    from torchmetrics import Metric

Examples = Mapping[str, Tensor]  # what an example is made of, by name; first dimension B
Indices = NDArray[np.int64]
Source = Literal["real", "sample"]

META_SHARE = 0.2  # of the training examples, set apart for methods that need them
META_LEAST = 2  # a class: one for each of two disjoint batches


class ExampleSet(ABC):
    """A fixed, ordered set of examples, read when they are taken.

    ``ids`` are stable names of the examples; ``strata`` (N,) are classes to keep in proportion
    when the set is divided, or None.
    """

    ids: Sequence[str]
    strata: Indices | None = None

    def __len__(self) -> int:
        return len(self.ids)

    @abstractmethod
    def take(self, indices: Indices) -> Examples:
        """Return the examples at ``indices`` (B,), in that order."""

    def subset(self, indices: Indices) -> ExampleSet:
        """Return the set of the examples at ``indices``."""
        return Subset(self, indices)


class Subset(ExampleSet):
    """Some examples of another set."""

    def __init__(self, parent: ExampleSet, indices: Indices) -> None:
        self._parent, self._indices = parent, indices
        self.ids = tuple(parent.ids[i] for i in indices)
        self.strata = None if parent.strata is None else parent.strata[indices]

    def take(self, indices: Indices) -> Examples:
        """Return the examples at ``indices`` (B,), in that order."""
        return self._parent.take(self._indices[indices])


class TensorSet(ExampleSet):
    """Examples that are in memory."""

    def __init__(
        self, ids: Sequence[str], examples: Examples, strata: Indices | None = None
    ) -> None:
        self.ids, self.strata = tuple(ids), strata
        self._examples = examples

    def take(self, indices: Indices) -> Examples:
        """Return the examples at ``indices`` (B,), in that order."""
        rows = torch.from_numpy(indices)
        return {name: values[rows] for name, values in self._examples.items()}


@dataclass(frozen=True)
class Splits:
    """The data of one run, disjoint by construction.

    ``train``, ``validation`` and ``test`` hold examples of the primary, ``auxiliaries`` one
    training set an auxiliary objective. ``meta`` is taken out of ``train`` for the methods that
    need held-out examples in training.

    ``data_digest`` is of the data set, the same for every seed. Where test files may not be opened
    before training has ended, it is of names and labels, and ``files_digest`` of the bytes of the
    others, which differ from seed to seed. ``notes`` say what was chosen, a line each.
    """

    train: ExampleSet
    validation: ExampleSet
    test: ExampleSet
    auxiliaries: tuple[ExampleSet, ...]
    data_digest: str
    meta: ExampleSet | None = None
    files_digest: str | None = None
    notes: tuple[str, ...] = ()

    def sizes(self) -> dict[str, int]:
        """Return the number of primary examples a split."""
        return {
            "train": len(self.train),
            "validation": len(self.validation),
            "test": len(self.test),
            "meta": 0 if self.meta is None else len(self.meta),
        }

    def for_training(self) -> TrainingSplits:
        """Return all but the test."""
        return TrainingSplits(self.train, self.validation, self.auxiliaries, self.meta)

    def digest(self) -> str:
        """Return a SHA-256 of which example is in which split."""
        found = hashlib.sha256()
        parts = [("train", self.train), ("validation", self.validation), ("test", self.test)]
        parts += [] if self.meta is None else [("meta", self.meta)]
        parts += [(f"auxiliary {k}", part) for k, part in enumerate(self.auxiliaries, start=1)]
        for name, part in parts:
            found.update("\0".join((name, *part.ids, "\n")).encode())
        return found.hexdigest()

    def check(self) -> None:
        """Check that no example is in two splits and that no split is empty.

        Raises:
            DataError: naming the splits.
        """
        parts = {"train": self.train, "validation": self.validation, "test": self.test}
        if self.meta is not None:
            parts["meta"] = self.meta
        owner: dict[str, str] = {}
        for name, part in parts.items():
            if not len(part):
                raise DataError(f"Expected examples in the {name} split, found none.")
            for example in part.ids:
                if owner.setdefault(example, name) != name:
                    raise DataError(
                        f"Expected disjoint splits, found example {example!r} in "
                        f"{owner[example]} and in {name}."
                    )

    def with_meta(self, seed: int) -> Splits:
        """Return the splits with a meta split, a fifth of every class of ``train``.

        Raises:
            DataError: if a class has too few training examples to give two.
        """
        strata = self.train.strata
        if strata is None:
            strata = np.zeros(len(self.train), dtype=np.int64)
        draw = seeding.rng(seed, "split", "meta")
        chosen: list[Indices] = []
        for stratum in np.unique(strata):
            members = np.flatnonzero(strata == stratum)
            count = round(META_SHARE * len(members))
            if count < META_LEAST:
                raise DataError(
                    f"Expected at least {META_LEAST} held-out examples a class for this method, "
                    f"which take {META_SHARE:.0%} of the training examples; found class {stratum} "
                    f"with {len(members)}. Use more training examples or another method."
                )
            chosen.append(draw.permutation(members)[:count])
        meta = np.sort(np.concatenate(chosen))
        rest = np.setdiff1d(np.arange(len(self.train)), meta)
        return replace(self, train=self.train.subset(rest), meta=self.train.subset(meta))


@dataclass(frozen=True)
class TrainingSplits:
    """What the training loop may see: the splits without the test."""

    train: ExampleSet
    validation: ExampleSet
    auxiliaries: tuple[ExampleSet, ...]
    meta: ExampleSet | None


class Objective(ABC):
    """One task: its head, how a batch is made, its loss an example, its metrics.

    ``margin`` is the difference in the first metric below which two results are practically
    equal. Objectives with the same ``head_name`` share one head, which is then part of the shared
    parameters; by default a head is an objective's own. ``labels`` name the columns of the scores;
    ``exclusive`` says that the largest is the prediction.
    """

    name: str
    higher_is_better: bool = True
    margin: float
    head_name: str | None = None
    labels: tuple[str, ...] = ()
    exclusive: bool = False

    @abstractmethod
    def head(self, width: int, dropout: float) -> nn.Module:
        """Return a new head: a module from :class:`~gradbench.model.Features` to an output.

        ``width`` is that of the pooled features and of each token; ``dropout`` in [0, 1).
        """

    @abstractmethod
    def batch(self, examples: Examples, random: ExampleRandom | None) -> tuple[Any, Any]:
        """Return the trunk's input and the target, from examples as they were stored.

        ``random`` gives augmentation, masking or rotation its numbers an example; it is None in
        evaluation.
        """

    @abstractmethod
    def loss(self, output: Any, target: Any) -> ExampleLosses:
        """Return the losses an example (B,), or :class:`~gradbench.losses.Scored` ones."""

    @abstractmethod
    def metrics(self) -> dict[str, Metric]:
        """Return new metrics by name; the first one selects, stops and is compared."""

    def scores(self, output: Any) -> Tensor:
        """Return what metrics and stored predictions are computed from, (B, …)."""
        scores: Tensor = output
        return scores


@dataclass(frozen=True)
class Input:
    """What a trunk is fed: an image of this many channels and pixels a side."""

    channels: int
    size: int


@dataclass(frozen=True)
class Preset:
    """A task's fixed sizes and budget; another preset is another board.

    ``settings`` are keys and values as ``--set`` takes them, for what else belongs to the preset:
    the size of images, the dropout. A user's own settings go before them.
    """

    backbone: str
    sizes: Mapping[str, int]  # of the drawn splits, in units that the task names
    budget: Budget = field(default_factory=Budget)
    optimizer: Optimizer = field(default_factory=Optimizer)
    settings: Mapping[str, object] = field(default_factory=dict)


@dataclass(frozen=True)
class TaskPair(Checked, ABC):
    """One primary objective with one or more auxiliary ones, and their data.

    Fields are settings of the task. Class attributes: ``version`` of the pair as a benchmark,
    ``revision``, raised when results may move, ``citation``, ``licence``, ``presets`` by name
    with ``default`` among them, ``sources``, where its data can come from, and
    ``sample_fields``, on which the drawn sample depends.
    """

    version: ClassVar[str]
    revision: ClassVar[int] = 1
    citation: ClassVar[str]
    licence: ClassVar[str]
    presets: ClassVar[Mapping[str, Preset]]
    sources: ClassVar[tuple[Source, ...]] = ("real", "sample")
    sample_fields: ClassVar[frozenset[str]] = frozenset()

    auxiliary_weight: Annotated[
        float,
        Valid(0, 1e6),
        LogUniform(0.01, 3.0),
        "multiplies every auxiliary loss before the method sees it",
    ] = 1.0

    @classmethod
    def example(cls, folder: Path) -> Self:
        """Return the pair as it is tested; one that needs a user's files writes some first."""
        return cls()

    @property
    @abstractmethod
    def input(self) -> Input:
        """What the trunk is fed."""

    @abstractmethod
    def objectives(self) -> tuple[Objective, ...]:
        """Return the objectives, the primary first."""

    def missing(self, folder: Path) -> str | None:
        """Say which real files are missing in ``folder`` and how to get them, or None."""
        return None

    def draw_sample(self, folder: Path) -> None:
        """Write a small, deterministic stand-in into ``folder``, in the real on-disk format."""
        raise DataError(f"Expected a task with sample data, found {type(self).__name__}.")

    def read(self, files: Sequence[Path]) -> ExampleSet:
        """Return files that are not part of the data as examples; targets are placeholders.

        Raises:
            DataError: if the task has no examples in files.
        """
        raise DataError(
            f"Expected a task whose examples are files, found {type(self).__name__}; "
            "use gradbench.load and feed the model yourself."
        )

    @abstractmethod
    def splits(self, source: Source, folder: Path, preset: Preset, seed: int) -> Splits:
        """Return the data of one run; drawn splits are a function of ``seed``.

        ``folder`` holds the real files or the drawn sample, in the same layout.

        Raises:
            DataError: if the data can not give every split its examples.
        """


def draw_by_class(
    labels: Indices, sizes: Mapping[str, int], rest: str, seed: int
) -> dict[str, Indices]:
    """Draw ``sizes`` examples a class for each named split, all others for ``rest``.

    ``labels`` (N,) are classes; returns sorted indices into them.

    Raises:
        DataError: if a class is too small to leave one example for ``rest``.
    """
    draw = seeding.rng(seed, "split")
    found: dict[str, list[Indices]] = {name: [] for name in (*sizes, rest)}
    for label in np.unique(labels):
        members = draw.permutation(np.flatnonzero(labels == label))
        wanted = sum(sizes.values())
        if len(members) <= wanted:
            raise DataError(
                f"Expected more than {wanted} examples of class {label} "
                f"({', '.join(f'{n} for {name}' for name, n in sizes.items())}, some for {rest}), "
                f"found {len(members)}; choose a smaller preset or add data."
            )
        start = 0
        for name, count in sizes.items():
            found[name].append(members[start : start + count])
            start += count
        found[rest].append(members[start:])
    return {name: np.sort(np.concatenate(parts)) for name, parts in found.items()}
