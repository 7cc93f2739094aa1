"""The loop: phases of steps, validation after each epoch, the best state at the end."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from gradbench import seeding
from gradbench.errors import ContractError, NonFiniteLossError
from gradbench.gradients import seed_generators, unmoved_statistics
from gradbench.heldout import HeldOutExamples
from gradbench.losses import ExampleLosses, Scored
from gradbench.method import Method, Phase, Plan, Scalarization, Scale
from gradbench.model import Model, has_batch_norm, statistics_for, training_mode
from gradbench.settings import Architecture, Budget, Optimizer, Precision
from gradbench.step import Step
from gradbench.surgery import Closure, Surgery
from gradbench.task import Objective, TrainingSplits
from gradbench.training.batches import Batches, to_device
from gradbench.training.evaluation import autocast, evaluate
from gradbench.training.ledger import Costs, Ledger, StepClock
from gradbench.training.optimization import (
    clip_head,
    clip_shared,
    learning_rate,
    make_optimizer,
)


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
    value: float | None  # of the primary validation metric; None where nothing was measured


class Observer(Protocol):
    """Is told of every epoch."""

    def epoch(self, epoch: Epoch) -> None:
        """Take in one epoch."""


@dataclass
class Place:
    """Where the run is, for whoever has to say where it failed."""

    phase: str | None = None
    step: int | None = None
    objective: str | None = None


@dataclass(frozen=True)
class Sum(Scalarization):
    """The plain sum, for phases in which there is nothing to protect."""

    def weights_from_losses(self, losses: Tensor, step: Step) -> Tensor:
        """Return ones."""
        return torch.ones_like(losses)


class Training:
    """Trains a model on the training splits of a task pair; the model ends in its best state."""

    def __init__(
        self,
        model: Model,
        objectives: tuple[Objective, ...],
        splits: TrainingSplits,
        recipe: Recipe,
        device: torch.device,
        observer: Observer,
    ) -> None:
        self.model, self.objectives, self.splits = model, objectives, splits
        self.recipe, self.device, self.observer = recipe, device, observer
        self.costs, self.place = Costs(), Place()
        self.diagnostics: dict[str, float] = {}  # means over the epochs that have them
        self._epochs_of: dict[str, int] = {}
        self._dtype = torch.float64 if recipe.precision == "fp64" else torch.float32
        self._clock = StepClock(device)
        self._normalises = has_batch_norm(model)
        budget, seed = recipe.budget, recipe.seed
        self._streams = [
            Batches(objective, examples, k, seed, budget.batch_size)
            for k, (objective, examples) in enumerate(
                zip(objectives, (splits.train, *splits.auxiliaries), strict=True)
            )
        ]
        self._meta = None
        if splits.meta is not None:
            self._meta = Batches(objectives[0], splits.meta, 0, seed, budget.batch_size)

    def run(self) -> Selection:
        """Run all phases.

        Raises:
            NonFiniteLossError: if a loss became NaN or infinite.
        """
        budget = self.recipe.budget
        plan = Plan(
            len(self.objectives), budget.steps_per_epoch, budget.epochs, budget.fine_tune_epochs
        )
        best: Selection | None = None
        start = 0
        for position, phase in enumerate(self.recipe.method.phases(plan)):
            if phase.epochs:
                best = self._run_phase(phase, position, start, best)
            start += phase.epochs * budget.steps_per_epoch
        if best is None:
            raise ContractError("Expected a phase of at least one epoch, found none.")
        return best

    def _run_phase(
        self, phase: Phase, position: int, start: int, best: Selection | None
    ) -> Selection:
        """Train one phase; ``best`` is what the one before ended in, if it may be kept."""
        self.place = Place(phase=phase.name)
        surgery = self._surgery(phase, start)
        heads = [self.model.own_head(k) for k in phase.objectives]
        optimizer = make_optimizer(
            self.recipe.optimizer,
            [*self.model.shared.parameters(), *(p for head in heads for p in head.parameters())],
        )
        ledger = Ledger(len(phase.objectives), self.device)
        keep = phase.select == "best"
        best = best if keep else None
        kept = self._snapshot()
        since_best, steps = 0, self.recipe.budget.steps_per_epoch
        for epoch in range(1, phase.epochs + 1):
            training_mode(self.model, self.recipe.architecture.batch_norm)
            self._clock.mark()
            for i in range(steps):
                in_phase = (epoch - 1) * steps + i
                self._set_rate(optimizer, phase, in_phase, position > 0)
                self._take_step(surgery, optimizer, heads, phase, start + in_phase)
                has_gradients = not isinstance(surgery.method, Scalarization)
                ledger.note(surgery.step, has_gradients)
                self._clock.mark()
            here = start + epoch * steps
            selection, better = self._close_epoch(phase, epoch, here, ledger, best)
            if better or not keep:
                best, since_best, kept = selection, 0, self._snapshot()
            else:
                since_best += 1
            if keep and since_best >= self.recipe.budget.patience:
                break
        self.model.load_state_dict(kept)
        assert best is not None
        return best if keep else Selection(best.phase, best.epoch, best.step, None)

    def _surgery(self, phase: Phase, start: int) -> Surgery:
        recipe = self.recipe
        acts = 0 in phase.objectives and len(phase.objectives) > 1
        surgery = Surgery(
            recipe.method if acts else Sum(),
            self.model.shared,
            [self.model.own_head(k) for k in phase.objectives],
            objectives=len(phase.objectives),
            steps_per_epoch=recipe.budget.steps_per_epoch,
            seed=recipe.seed,
            scale=recipe.scale if acts else "paper",
            name=recipe.method_name,
        )
        surgery.index = start
        return surgery

    def _set_rate(
        self, optimizer: torch.optim.Optimizer, phase: Phase, step: int, fine_tuning: bool
    ) -> None:
        rate = learning_rate(
            self.recipe.optimizer, self.recipe.budget, step, phase.epochs, fine_tuning
        )
        for group in optimizer.param_groups:
            group["lr"] = rate

    def _take_step(
        self,
        surgery: Surgery,
        optimizer: torch.optim.Optimizer,
        heads: list[nn.Module],
        phase: Phase,
        index: int,
    ) -> None:
        self.place.step = index
        optimizer.zero_grad()
        surgery.backward(
            *(
                [self._closure(k, index, b, phase) for b in range(surgery.method.batches)]
                for k in phase.objectives
            ),
            sketch=lambda samples: self._sketch_losses(samples, index),
            heldout=None if self._meta is None else _HeldOutDraws(self, self._meta, index),
        )
        self.place.objective = None
        clip_shared(surgery.direction, self.recipe.optimizer.clip)
        for head in heads:
            clip_head(head, self.recipe.optimizer.clip)
        optimizer.step()
        surgery.after_step()
        self.costs.backward_passes += surgery.backward_passes
        surgery.backward_passes = 0

    def _closure(self, k: int, index: int, batch: int, phase: Phase) -> Closure:
        """Return what computes the losses of objective ``k`` in one step, as often as asked."""
        recipe, stream = self.recipe, self._streams[k]
        position = index * recipe.method.batches + batch
        made: list[Any] = []

        def losses() -> ExampleLosses:
            self.place.objective = self.objectives[k].name
            if not made:
                made.append(to_device(stream.at(position), self.device, self._dtype))
                self.costs.examples += stream.size
            dropout = seeding.derive(recipe.seed, "dropout", index, k, batch)
            seed_generators(dropout, self.device)
            with self._statistics(k, phase):
                found = self._losses(k, made[0], self.model.head(k))
            return found if k == 0 else _times(found, recipe.auxiliary_weight)

        return losses

    def _statistics(self, k: int, phase: Phase) -> AbstractContextManager[None]:
        if not self._normalises:
            return nullcontext()
        policy = self.recipe.architecture.batch_norm
        return statistics_for(self.model, policy, k, 0 in phase.objectives)

    def _losses(self, k: int, batch: tuple[Any, Any], head: nn.Module) -> ExampleLosses:
        self.costs.forward_passes += 1
        inputs, target = batch
        with autocast(self.device, self.recipe.precision):
            return self.objectives[k].loss(head(self.model.backbone(inputs)), target)

    def _sketch_losses(self, samples: int, index: int) -> ExampleLosses:
        batch = self._streams[0].draw(samples, "sketch", index)
        self.costs.examples += min(samples, len(self.splits.train))
        moved = to_device(batch, self.device, self._dtype)
        return self._losses(0, moved, self.model.head(0))

    def _close_epoch(
        self, phase: Phase, epoch: int, step: int, ledger: Ledger, best: Selection | None
    ) -> tuple[Selection, bool]:
        seconds = self._clock.close_epoch()
        self.costs.steps += seconds
        means, bad = ledger.close_epoch()
        if bad is not None:
            name = self.objectives[phase.objectives[bad[1]]].name
            raise NonFiniteLossError(phase.name, bad[0], name)
        primary = self.objectives[0]
        found = evaluate(
            self.model, primary, self.splits.validation, self.device, self.recipe.precision
        )
        value = next(iter(found.metrics.values()))
        better = best is None or best.value is None or _beats(value, best.value, primary)
        losses = {
            self.objectives[k].name: means.pop(f"loss {position}")
            for position, k in enumerate(phase.objectives)
        }
        self._keep_diagnostics(means)
        self.observer.epoch(
            Epoch(
                phase=phase.name,
                epoch=epoch,
                epochs=phase.epochs,
                step=step,
                losses=losses,
                diagnostics=means,
                validation=found.metrics,
                best=better and phase.select == "best",
                steps_per_second=len(seconds) / sum(seconds),
            )
        )
        return Selection(phase.name, epoch, step, value), better

    def _keep_diagnostics(self, means: dict[str, float]) -> None:
        """Fold the means of one more epoch into those of the run."""
        for name, value in means.items():
            count = self._epochs_of.get(name, 0) + 1
            self._epochs_of[name] = count
            before = self.diagnostics.get(name, 0.0)
            self.diagnostics[name] = before + (value - before) / count

    def _snapshot(self) -> dict[str, Tensor]:
        return {name: value.detach().clone() for name, value in self.model.state_dict().items()}


class _HeldOutDraws:
    """Gives the two disjoint halves of the meta split that a step may look at."""

    def __init__(self, training: Training, meta: Batches, index: int) -> None:
        self._training, self._meta, self._index = training, meta, index
        self._calls = 0

    def __call__(self) -> HeldOutExamples:
        if self._calls == 2:
            raise ContractError("Expected at most two calls of step.heldout() in a step.")
        training = self._training
        batch = self._meta.half(self._calls, "heldout", self._index)
        self._calls += 1
        moved = to_device(batch, training.device, training._dtype)

        def forward() -> Any:
            with (
                unmoved_statistics(training.model),
                autocast(training.device, training.recipe.precision),
            ):
                return training.model.backbone(moved[0])

        return HeldOutExamples(
            forward=forward,
            loss=lambda features, head: training.objectives[0].loss(head(features), moved[1]),
            new_head=training.model.new_primary_head,
        )


def _beats(value: float, other: float, objective: Objective) -> bool:
    return value > other if objective.higher_is_better else value < other


def _times(losses: ExampleLosses, weight: float) -> ExampleLosses:
    if isinstance(losses, Scored):
        return Scored(losses.losses * weight, losses.weight)
    return losses * weight
