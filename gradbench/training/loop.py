"""The loop: phases of steps, validation after each epoch, the best state at the end."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from gradbench.errors import ContractError
from gradbench.method import Branching, Phase, Plan
from gradbench.model import Model
from gradbench.task import Objective, TrainingSplits
from gradbench.training.batch_norm import reestimate_statistics
from gradbench.training.branching import BranchedEpochs
from gradbench.training.epochs import EpochTrainer, JointSteps, TrainedEpoch, method_acts
from gradbench.training.evaluation import evaluate
from gradbench.training.ledger import Costs
from gradbench.training.recipe import Epoch, Observer, Place, Recipe, Selection
from gradbench.training.steps import Losses

Save = Callable[[dict[str, Any]], None]


class Training:
    """Trains a model on the training splits of a task pair; the model ends in its best state.

    ``save`` gets a checkpoint after each epoch, and inside one where a method trains branches, of
    tensors and plain values; ``run`` goes on from one.
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
        self.model, self.objectives = model, objectives
        self.validation, self.meta = splits.validation, splits.meta
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
        """Return what a run needs to go on from where a phase is."""
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
        self.trainer = self._make_trainer()

    def _make_trainer(self) -> EpochTrainer:
        training, method = self.training, self.training.recipe.method
        place = training, self.phase, self.position, self.start
        if isinstance(method, Branching) and method_acts(self.phase):
            return BranchedEpochs(*place, method, self._save)
        return JointSteps(*place)

    def run(self) -> Selection:
        """Train until the epochs or the patience end; the model is then in the state kept."""
        training, phase = self.training, self.phase
        while not self._over():
            trained = self.trainer.train(self.epoch)
            self.epoch += 1
            self._close_epoch(trained)
            self._save()
        training.model.load_state_dict(self.kept)
        if 0 not in phase.objectives:
            training.reestimate_statistics()
        assert self.best is not None  # a phase has an epoch, and its first state is kept
        if phase.select == "best":
            return self.best
        return dataclasses.replace(self.best, value=None)

    def state(self) -> dict[str, Any]:
        """Return what this phase needs to go on."""
        return {
            "epoch": self.epoch,
            "since_best": self.since_best,
            "best": None if self.best is None else dataclasses.asdict(self.best),
            "kept": None if self.kept_is_current else self.kept,
            "trainer": self.trainer.state(),
        }

    def load(self, state: dict[str, Any]) -> None:
        """Go on from where ``state`` was made; the model is as it was then."""
        self.epoch, self.since_best = state["epoch"], state["since_best"]
        self.best = None if state["best"] is None else Selection(**state["best"])
        self.kept_is_current = state["kept"] is None
        self.kept = self._snapshot() if self.kept_is_current else state["kept"]
        self.trainer.load(state["trainer"])

    def _over(self) -> bool:
        patient = self.phase.select == "last" or (
            self.since_best < self.training.recipe.budget.patience
        )
        return self.epoch >= self.phase.epochs or not patient

    def _save(self) -> None:
        self.training.save(self.training.checkpoint(self))

    def _close_epoch(self, trained: TrainedEpoch) -> None:
        training, phase, recipe = self.training, self.phase, self.training.recipe
        means, seconds = trained
        training.costs.steps += seconds
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
            if f"loss {row}" in means  # a method need not train every objective in branches
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
                steps_per_second=len(seconds) / sum(seconds) if seconds else 0.0,
            )
        )

    def _select(self, now: Selection, primary: Objective) -> bool:
        """Keep the present state if it is to be kept; say whether it is.

        Of states that validation can not tell apart the later one is kept, for small validation
        sets have many ties and the first epochs have seen little; patience counts them all the
        same.
        """
        if self.phase.select == "last" or self.best is None or self.best.value is None:
            lead = 1.0
        else:
            assert now.value is not None  # an epoch that is being closed has been validated
            difference = now.value - self.best.value
            lead = difference if primary.higher_is_better else -difference
        self.kept_is_current = lead >= 0
        if self.kept_is_current:
            self.best, self.kept = now, self._snapshot()
        self.since_best = 0 if lead > 0 else self.since_best + 1
        return self.kept_is_current

    def _snapshot(self) -> dict[str, Tensor]:
        state = self.training.model.state_dict()
        return {name: value.detach().clone() for name, value in state.items()}
