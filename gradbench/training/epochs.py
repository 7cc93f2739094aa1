"""The epochs of one phase, trained in joint steps unless a method does it otherwise."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from gradbench.errors import NonFiniteLossError
from gradbench.method import Phase, Scalarization
from gradbench.model import training_mode
from gradbench.step import Step
from gradbench.surgery import Surgery
from gradbench.training.ledger import Ledger, StepClock
from gradbench.training.optimization import (
    clip_head,
    clip_shared,
    learning_rate,
    make_optimizer,
)

if TYPE_CHECKING:
    from gradbench.training.loop import Training


class TrainedEpoch(NamedTuple):
    """What is known of one epoch of training."""

    means: dict[str, float]  # of losses, as "loss 0" for row 0, and of diagnostics
    seconds: list[float]  # a step


class EpochTrainer(ABC):
    """Trains the epochs of one phase, which is the ``position``-th and begins at step ``start``."""

    def __init__(self, training: Training, phase: Phase, position: int, start: int) -> None:
        self.training, self.phase, self.position, self.start = training, phase, position, start
        self.heads = [training.model.own_head(k) for k in phase.objectives]
        self.clock = StepClock(training.device)

    @abstractmethod
    def train(self, epoch: int) -> TrainedEpoch:
        """Train one epoch, the first after ``epoch`` others of the phase.

        Raises:
            NonFiniteLossError: if a loss became NaN or infinite.
        """

    @abstractmethod
    def state(self) -> dict[str, Any]:
        """Return tensors and plain values for a checkpoint."""

    @abstractmethod
    def load(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint; the model is as it was then."""

    def new_optimizer(self) -> torch.optim.Optimizer:
        """Return an optimizer of all that the phase trains."""
        parameters = [p for head in self.heads for p in head.parameters()]
        return make_optimizer(
            self.training.recipe.optimizer,
            [*self.training.model.shared.parameters(), *parameters],
        )

    def set_rate(self, optimizer: torch.optim.Optimizer, index: int) -> None:
        """Set the learning rate of a step of the run; past the last one it stays."""
        recipe, epochs = self.training.recipe, self.phase.epochs
        step = min(index - self.start, epochs * recipe.budget.steps_per_epoch - 1)
        rate = learning_rate(recipe.optimizer, recipe.budget, step, epochs, self.position > 0)
        for group in optimizer.param_groups:
            group["lr"] = rate

    def fail(self, step: int, row: int) -> NonFiniteLossError:
        """Return the error of the objective in a row whose loss is not finite at a step."""
        name = self.training.objectives[self.phase.objectives[row]].name
        return NonFiniteLossError(self.phase.name, step, name)


class JointSteps(EpochTrainer):
    """In each step a batch of every objective, one direction, one move of the optimizer."""

    def __init__(self, training: Training, phase: Phase, position: int, start: int) -> None:
        super().__init__(training, phase, position, start)
        self.surgery = self._make_surgery()
        self.optimizer = self.new_optimizer()
        self.ledger = Ledger(len(phase.objectives), training.device)

    def _make_surgery(self) -> Surgery:
        recipe, acts = self.training.recipe, method_acts(self.phase)
        surgery = Surgery(
            recipe.method if acts else Sum(),
            self.training.model.shared,
            self.heads,
            objectives=len(self.phase.objectives),
            steps_per_epoch=recipe.budget.steps_per_epoch,
            seed=recipe.seed,
            scale=recipe.scale if acts else "paper",
            name=recipe.method_name,
        )
        surgery.index = self.start
        return surgery

    def train(self, epoch: int) -> TrainedEpoch:
        """Train one epoch."""
        recipe = self.training.recipe
        training_mode(self.training.model, recipe.architecture.batch_norm)
        self.clock.mark()
        for _ in range(recipe.budget.steps_per_epoch):
            self._take_step()
            self.clock.mark()
        seconds = self.clock.close_epoch()
        means, bad = self.ledger.close_epoch()
        if bad is not None:
            raise self.fail(*bad)
        return TrainedEpoch(means, seconds)

    def state(self) -> dict[str, Any]:
        """Return optimizer and memory of the method."""
        return {"optimizer": self.optimizer.state_dict(), "surgery": self.surgery.state_dict()}

    def load(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint."""
        self.optimizer.load_state_dict(state["optimizer"])
        self.surgery.load_state_dict(state["surgery"])

    def _take_step(self) -> None:
        training, surgery, losses = self.training, self.surgery, self.training.losses
        index = surgery.index
        training.place.step = index
        training.observer.step(self.phase.name)
        self.set_rate(self.optimizer, index)
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


@dataclass(frozen=True)
class Sum(Scalarization):
    """The plain sum, for phases in which there is nothing to protect."""

    def weights_from_losses(self, losses: Tensor, step: Step) -> Tensor:
        """Return ones."""
        return torch.ones_like(losses)


def method_acts(phase: Phase) -> bool:
    """Say whether a phase has a primary to protect from others."""
    return 0 in phase.objectives and len(phase.objectives) > 1
