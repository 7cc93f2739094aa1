"""What decides how a model is trained, and what is told while it is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from gradbench.method import Method, Scale
from gradbench.settings import Architecture, Budget, Optimizer, Precision


@dataclass(frozen=True)
class Recipe:
    """All that decides how a model is trained, beside its data."""

    method: Method
    method_name: str
    scale: Scale
    auxiliary_weight: float
    optimizer: Optimizer
    budget: Budget
    architecture: Architecture
    precision: Precision
    seed: int


@dataclass(frozen=True)
class Epoch:
    """What is known when an epoch has ended."""

    phase: str
    epoch: int  # of the phase, from 1
    epochs: int  # of the phase, at most
    step: int  # of the run
    losses: dict[str, float]  # mean training loss by objective
    diagnostics: dict[str, float]
    validation: dict[str, float]
    best: bool
    steps_per_second: float


@dataclass(frozen=True)
class Selection:
    """The state that was kept: the last one of its phase, or the best on validation."""

    phase: str
    epoch: int
    step: int
    value: float | None  # of the primary validation metric; None where it did not select


class Observer(Protocol):
    """Is told how far a run has got."""

    def plan(self, steps: int, done: int) -> None:
        """Learn how many steps the run has at most, and how many are behind it."""

    def step(self, phase: str) -> None:
        """Count one step of a phase."""

    def epoch(self, epoch: Epoch) -> None:
        """Take in one epoch."""


@dataclass
class Place:
    """Where the run is, for whoever has to say where it failed."""

    phase: str | None = None
    step: int | None = None
    objective: str | None = None
