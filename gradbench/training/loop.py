"""The loop: phases of steps, validation after each epoch, the best state at the end."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gradbench.errors import ContractError, NonFiniteLossError
from gradbench.method import Phase, Plan, Scalarization
from gradbench.model import Model, training_mode
from gradbench.step import Step
from gradbench.surgery import Surgery
from gradbench.task import Objective, TrainingSplits
from gradbench.training.batch_norm import reestimate_statistics
from gradbench.training.evaluation import evaluate
from gradbench.training.ledger import Costs, Ledger, StepClock
from gradbench.training.optimization import (
    clip_head,
    clip_shared,
    learning_rate,
    make_optimizer,
)
from gradbench.training.recipe import Epoch, Observer, Place, Recipe, Selection
from gradbench.training.steps import Losses

Save = Callable[[dict[str, Any]], None]


@dataclass(frozen=True)
class Sum(Scalarization):
    """The plain sum, for phases in which there is nothing to protect."""

    def weights_from_losses(self, losses: Tensor, step: Step) -> Tensor:
        """Return ones."""
        return torch.ones_like(losses)


class Training:
    """Trains a model on the training splits of a task pair; the model ends in its best state.

    ``save`` gets a checkpoint after each epoch, of tensors and plain values; ``run`` goes on from
    one.
    """

    def __init__(
        self,
        model: Model,
        objectives: tuple[Objective, ...],
        splits: TrainingSplits,
        recipe: Recipe,
        device: torch.device,
        observer: Observer,
        save: Save = lambda state: None,
    ) -> None:
        self.model, self.objectives, self.validation = model, objectives, splits.validation
        self.recipe, self.device, self.observer, self.save = recipe, device, observer, save
        self.costs, self.place = Costs(), Place()
        self.diagnostics: dict[str, float] = {}  # means over the epochs that have them
        self.epochs_seen = 0
        self._epochs_of: dict[str, int] = {}
        self.losses = Losses(model, objectives, splits, recipe, device, self.costs, self.place)

    def run(self, checkpoint: dict[str, Any] | None = None) -> Selection:
        """Run all phases, or those that are left after a checkpoint.

        Raises:
            NonFiniteLossError: if a loss became NaN or infinite.
        """
        budget = self.recipe.budget
        plan = Plan(
            len(self.objectives), budget.steps_per_epoch, budget.epochs, budget.fine_tune_epochs
        )
        reached = -1 if checkpoint is None else self._restore(checkpoint)
        total = sum(phase.epochs for phase in self.recipe.method.phases(plan))
        self.observer.plan(
            total * budget.steps_per_epoch, self.epochs_seen * budget.steps_per_epoch
        )
        best: Selection | None = None
        start = 0
        for position, phase in enumerate(self.recipe.method.phases(plan)):
            if phase.epochs and position >= reached:
                under_way = PhaseRun(self, phase, position, start, best)
                if checkpoint is not None and position == reached:
                    under_way.load(checkpoint["phase"])
                best = under_way.run()
            start += phase.epochs * budget.steps_per_epoch
        if best is None:
            raise ContractError("Expected a phase of at least one epoch, found none.")
        return best

    def checkpoint(self, under_way: PhaseRun) -> dict[str, Any]:
        """Return what a run needs to go on after an epoch."""
        return {
            "position": under_way.position,
            "phase": under_way.state(),
            "model": self.model.state_dict(),
            "diagnostics": dict(self.diagnostics),
            "epochs_of": dict(self._epochs_of),
            "epochs_seen": self.epochs_seen,
            "costs": self.costs.state(),
        }

    def reestimate_statistics(self) -> None:
        """Give batch norm the statistics of the primary's batches, which a phase never saw."""
        if self.recipe.architecture.batch_norm != "frozen":
            reestimate_statistics(
                [self.model.backbone, self.model.head(0)],
                (
                    self.losses.closure(0, index, 0, with_primary=True)
                    for index in range(self.recipe.budget.steps_per_epoch)
                ),
            )

    def _restore(self, checkpoint: dict[str, Any]) -> int:
        self.model.load_state_dict(checkpoint["model"])
        self.diagnostics = dict(checkpoint["diagnostics"])
        self._epochs_of = dict(checkpoint["epochs_of"])
        self.epochs_seen = checkpoint["epochs_seen"]
        self.costs.load(checkpoint["costs"])
        return int(checkpoint["position"])

    def keep_diagnostics(self, means: dict[str, float]) -> None:
        """Fold the means of one more epoch into those of the run."""
        for name, value in means.items():
            count = self._epochs_of.get(name, 0) + 1
            self._epochs_of[name] = count
            before = self.diagnostics.get(name, 0.0)
            self.diagnostics[name] = before + (value - before) / count


class PhaseRun:
    """One phase under way."""

    def __init__(
        self, training: Training, phase: Phase, position: int, start: int, best: Selection | None
    ) -> None:
        """Set out from the model as it is; ``best`` is what the phase before ended in."""
        self.training, self.phase, self.position, self.start = training, phase, position, start
        training.place.phase, training.place.step = phase.name, None
        self.epoch = self.since_best = 0
        self.best = best if phase.select == "best" else None
        self.kept = self._snapshot()
        self.kept_is_current = True
        model, recipe = training.model, training.recipe
        self.heads = [model.own_head(k) for k in phase.objectives]
        self.surgery = self._make_surgery()
        self.optimizer = make_optimizer(
            recipe.optimizer,
            [*model.shared.parameters(), *(p for head in self.heads for p in head.parameters())],
        )
        self.ledger = Ledger(len(phase.objectives), training.device)
        self.clock = StepClock(training.device)

    def _make_surgery(self) -> Surgery:
        recipe, objectives = self.training.recipe, self.phase.objectives
        acts = 0 in objectives and len(objectives) > 1
        surgery = Surgery(
            recipe.method if acts else Sum(),
            self.training.model.shared,
            self.heads,
            objectives=len(objectives),
            steps_per_epoch=recipe.budget.steps_per_epoch,
            seed=recipe.seed,
            scale=recipe.scale if acts else "paper",
            name=recipe.method_name,
        )
        surgery.index = self.start
        return surgery

    def run(self) -> Selection:
        """Train until the epochs or the patience end; the model is then in the state kept."""
        training, phase = self.training, self.phase
        while not self._over():
            training_mode(training.model, training.recipe.architecture.batch_norm)
            self.clock.mark()
            for _ in range(training.recipe.budget.steps_per_epoch):
                self._take_step()
                self.clock.mark()
            self.epoch += 1
            self._close_epoch()
            training.save(training.checkpoint(self))
        training.model.load_state_dict(self.kept)
        if 0 not in phase.objectives:
            training.reestimate_statistics()
        assert self.best is not None  # a phase has an epoch, and its first state is kept
        if phase.select == "best":
            return self.best
        return dataclasses.replace(self.best, value=None)

    def state(self) -> dict[str, Any]:
        """Return what this phase needs to go on after an epoch."""
        return {
            "epoch": self.epoch,
            "since_best": self.since_best,
            "best": None if self.best is None else dataclasses.asdict(self.best),
            "kept": None if self.kept_is_current else self.kept,
            "optimizer": self.optimizer.state_dict(),
            "surgery": self.surgery.state_dict(),
        }

    def load(self, state: dict[str, Any]) -> None:
        """Go on after the epoch that ``state`` was made at; the model is as it was then."""
        self.epoch, self.since_best = state["epoch"], state["since_best"]
        self.best = None if state["best"] is None else Selection(**state["best"])
        self.kept_is_current = state["kept"] is None
        self.kept = self._snapshot() if self.kept_is_current else state["kept"]
        self.optimizer.load_state_dict(state["optimizer"])
        self.surgery.load_state_dict(state["surgery"])

    def _over(self) -> bool:
        patient = self.phase.select == "last" or (
            self.since_best < self.training.recipe.budget.patience
        )
        return self.epoch >= self.phase.epochs or not patient

    def _take_step(self) -> None:
        training, surgery, losses = self.training, self.surgery, self.training.losses
        index = surgery.index
        training.place.step = index
        training.observer.step(self.phase.name)
        self._set_rate(index - self.start)
        self.optimizer.zero_grad()
        with_primary = 0 in self.phase.objectives
        surgery.backward(
            *(
                [losses.closure(k, index, b, with_primary) for b in range(surgery.method.batches)]
                for k in self.phase.objectives
            ),
            sketch=lambda samples: losses.sketch(samples, index),
            heldout=losses.heldout(index),
        )
        training.place.objective = None
        limit = training.recipe.optimizer.clip
        clip_shared(surgery.direction, limit)
        for head in self.heads:
            clip_head(head, limit)
        self.optimizer.step()
        surgery.after_step()
        training.costs.backward_passes += surgery.backward_passes
        surgery.backward_passes = 0
        self.ledger.note(surgery.step, not isinstance(surgery.method, Scalarization))

    def _set_rate(self, step: int) -> None:
        recipe = self.training.recipe
        rate = learning_rate(
            recipe.optimizer, recipe.budget, step, self.phase.epochs, self.position > 0
        )
        for group in self.optimizer.param_groups:
            group["lr"] = rate

    def _close_epoch(self) -> None:
        training, phase, recipe = self.training, self.phase, self.training.recipe
        seconds = self.clock.close_epoch()
        training.costs.steps += seconds
        means, bad = self.ledger.close_epoch()
        if bad is not None:
            name = training.objectives[phase.objectives[bad[1]]].name
            raise NonFiniteLossError(phase.name, bad[0], name)
        primary = training.objectives[0]
        here = self.start + self.epoch * recipe.budget.steps_per_epoch
        found = evaluate(
            training.model,
            primary,
            training.validation,
            training.device,
            recipe.precision,
            phase=phase.name,
            step=here - 1,
        )
        value = next(iter(found.metrics.values()))
        better = self._select(Selection(phase.name, self.epoch, here, value), primary)
        losses = {
            training.objectives[k].name: means.pop(f"loss {row}")
            for row, k in enumerate(phase.objectives)
        }
        training.keep_diagnostics(means)
        training.epochs_seen += 1
        training.observer.epoch(
            Epoch(
                phase=phase.name,
                epoch=self.epoch,
                epochs=phase.epochs,
                step=here,
                losses=losses,
                diagnostics=means,
                validation=found.metrics,
                best=better and phase.select == "best",
                steps_per_second=len(seconds) / sum(seconds),
            )
        )

    def _select(self, now: Selection, primary: Objective) -> bool:
        """Keep the present state if it is to be kept; say whether it is."""
        better = (
            self.phase.select == "last"
            or self.best is None
            or self.best.value is None
            or _beats(now.value, self.best.value, primary)
        )
        if better:
            self.best, self.kept, self.since_best = now, self._snapshot(), 0
        else:
            self.since_best += 1
        self.kept_is_current = better
        return better

    def _snapshot(self) -> dict[str, Tensor]:
        state = self.training.model.state_dict()
        return {name: value.detach().clone() for name, value in state.items()}


def _beats(value: float | None, other: float, objective: Objective) -> bool:
    if value is None:
        return False
    return value > other if objective.higher_is_better else value < other
