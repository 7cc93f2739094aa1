"""The losses of one step, as closures that can be called again."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn

from gradbench import seeding
from gradbench.errors import ContractError
from gradbench.gradients import seed_generators, unmoved_statistics
from gradbench.heldout import HeldOutExamples
from gradbench.losses import ExampleLosses, Scored
from gradbench.model import Model, has_batch_norm, statistics_for
from gradbench.surgery import Closure
from gradbench.task import Objective, TrainingSplits
from gradbench.training.batches import Batches, to_device
from gradbench.training.evaluation import autocast
from gradbench.training.ledger import Costs
from gradbench.training.recipe import Place, Recipe


class Losses:
    """Makes the losses of any objective at any step, a pure function of seed and weights."""

    def __init__(
        self,
        model: Model,
        objectives: tuple[Objective, ...],
        splits: TrainingSplits,
        recipe: Recipe,
        device: torch.device,
        costs: Costs,
        place: Place,
    ) -> None:
        self.model, self.objectives, self.recipe = model, objectives, recipe
        self.device, self.costs, self.place = device, costs, place
        self.dtype = torch.float64 if recipe.precision == "fp64" else torch.float32
        self._normalises = has_batch_norm(model)
        size, seed = recipe.budget.batch_size, recipe.seed
        self._streams = [
            Batches(objective, examples, k, seed, size)
            for k, (objective, examples) in enumerate(
                zip(objectives, (splits.train, *splits.auxiliaries), strict=True)
            )
        ]
        self._meta = None
        if splits.meta is not None:
            self._meta = Batches(objectives[0], splits.meta, 0, seed, size)

    def closure(self, k: int, index: int, batch: int, with_primary: bool) -> Closure:
        """Return what computes the losses of objective ``k`` at a step, as often as asked.

        ``with_primary`` says whether the phase trains the primary, whose batches running
        statistics follow.
        """
        recipe, stream = self.recipe, self._streams[k]
        position = index * recipe.method.batches + batch
        made: list[Any] = []

        def losses() -> ExampleLosses:
            self.place.objective = self.objectives[k].name
            if not made:
                made.append(to_device(stream.at(position), self.device, self.dtype))
                self.costs.examples += stream.size
            dropout = seeding.derive(recipe.seed, "dropout", index, k, batch)
            seed_generators(dropout, self.device)
            with self._statistics(k, with_primary):
                found = self._forward(k, made[0])
            return found if k == 0 else _times(found, recipe.auxiliary_weight)

        return losses

    def sketch(self, samples: int, index: int) -> ExampleLosses:
        """Return the losses of up to ``samples`` primary training examples drawn for a step."""
        inputs, target = self._streams[0].draw(samples, "sketch", index)
        self.costs.examples += len(target)
        return self._forward(0, to_device((inputs, target), self.device, self.dtype))

    def heldout(self, index: int) -> HeldOutDraws | None:
        """Return what gives held-out batches in a step, where there is a meta split."""
        return None if self._meta is None else HeldOutDraws(self, self._meta, index)

    def _forward(self, k: int, batch: tuple[Any, Any]) -> ExampleLosses:
        self.costs.forward_passes += 1
        inputs, target = batch
        with autocast(self.device, self.recipe.precision):
            return self.objectives[k].loss(self.model(inputs, k), target)

    def _statistics(self, k: int, with_primary: bool) -> AbstractContextManager[None]:
        if not self._normalises:
            return nullcontext()
        policy = self.recipe.architecture.batch_norm
        return statistics_for(self.model, policy, k, with_primary)


class HeldOutDraws:
    """Gives the two disjoint halves of the meta split that a step may look at."""

    def __init__(self, losses: Losses, meta: Batches, index: int) -> None:
        self._losses, self._meta, self._index = losses, meta, index
        self._calls = 0

    def __call__(self) -> HeldOutExamples:
        """Return the next half.

        Raises:
            ContractError: at the third call in a step.
        """
        if self._calls == 2:
            raise ContractError("Expected at most two calls of step.heldout() in a step.")
        losses, model = self._losses, self._losses.model
        inputs, target = to_device(
            self._meta.half(self._calls, "heldout", self._index), losses.device, losses.dtype
        )
        self._calls += 1

        def forward() -> Any:
            losses.costs.forward_passes += 1
            precision = losses.recipe.precision
            with unmoved_statistics(model), autocast(losses.device, precision):
                return model.backbone(inputs)

        def loss(features: Any, head: nn.Module) -> ExampleLosses:
            with autocast(losses.device, losses.recipe.precision):
                return losses.objectives[0].loss(head(features), target)

        return HeldOutExamples(
            forward=forward,
            loss=loss,
            new_head=model.new_primary_head,
            head=model.head(0),
        )


def _times(losses: ExampleLosses, weight: float) -> ExampleLosses:
    if isinstance(losses, Scored):
        return Scored(losses.losses * weight, losses.weight)
    return losses * weight
