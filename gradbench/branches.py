"""What a :class:`~gradbench.method.Branching` method may see of one epoch."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gradbench import seeding
from gradbench.gradients import FlatGradients, evaluation_mode
from gradbench.losses import ExampleLosses, mean_loss

Tensors = Mapping[str, Tensor]  # by name


@dataclass(frozen=True)
class Branch:
    """The weights and buffers of a model, trunk and heads, as copies that nobody writes to."""

    parameters: Tensors
    buffers: Tensors
    optimizer: dict[str, Any] | None = None  # what goes on under the name given to ``train``


class Branches(ABC):
    """Branches of the weights, from ``start``: those that the last ``commit`` left.

    ``objectives`` is K; ``state`` is the method's memory; ``rng`` a function of (seed, method,
    epoch). All branches of an epoch draw the same batches. A run that was interrupted calls
    :meth:`Branching.epoch` again, with the state and the random numbers of the epoch's
    beginning, and answers from its checkpoint what was already answered: an epoch may depend on
    nothing else. Vectors (P,) have the order of ``step.jacobian``.
    """

    def __init__(
        self,
        model: nn.Module,
        shared: nn.Module,
        heads: Sequence[nn.Module],
        *,
        steps_per_epoch: int,
        state: dict[str, Any] | None = None,
        seed: int = 0,
        name: str = "method",
    ) -> None:
        self.model, self.objectives, self.steps_per_epoch = model, len(heads), steps_per_epoch
        self.state: dict[str, Any] = {} if state is None else state
        self.recorded: dict[str, Tensor] = {}
        self._seed, self._name = seed, name
        self._flat = FlatGradients([p for p in shared.parameters() if p.requires_grad])
        name_of = {parameter: key for key, parameter in model.named_parameters()}
        self._shared = [name_of[parameter] for parameter in self._flat.parameters]
        self._heads = [[name_of[p] for p in head.parameters()] for head in heads]
        self.start = self.snapshot()
        self.begin(0)

    def begin(self, epoch: int) -> None:
        """Begin an epoch; the training loop calls this before the method's own ``epoch``."""
        self.epoch = epoch
        self.rng = seeding.rng(self._seed, "method", self._name, "epoch", epoch)

    @abstractmethod
    def train(self, weights: Tensor, steps: int, *, optimizer: str | None = None) -> Branch:
        """Train from ``start`` on the losses weighted by ``weights`` (K,); 0 skips an objective.

        The optimizer is a new one, or that which last trained under the name ``optimizer``,
        in this epoch or an earlier one.
        """

    @abstractmethod
    def evaluate(self, branch: Branch) -> float:
        """Return the primary metric on the meta split, negated where lower is better."""

    @abstractmethod
    def gradient(self, branch: Branch) -> Tensor:
        """Return the (P,) gradient of the primary loss on a batch of the meta split.

        Dropout is off; each call of an epoch may get another batch.
        """

    def commit(self, branch: Branch) -> None:
        """Make ``branch`` the weights to go on from."""
        self.start = branch
        self.load(branch)

    def merge(self, branches: Sequence[Branch], coefficients: Sequence[float]) -> Branch:
        """Return the weighted sum of branches; integer buffers are those of the first one."""
        parts = [b.parameters for b in branches], [b.buffers for b in branches]
        return Branch(*(_total(part, coefficients) for part in parts))

    def vector(self, branch: Branch) -> Tensor:
        """Return the shared parameters (P,) of ``branch``."""
        out = self._flat.new()
        for part, key in zip(self._flat.slices(out), self._shared, strict=True):
            part.copy_(branch.parameters[key])
        return out

    def at(self, vector: Tensor, heads: Sequence[Branch]) -> Branch:
        """Return the branch with shared parameters ``vector`` (P,) and head k of ``heads[k]``.

        Buffers are those of ``heads[0]``; the benchmark's loop estimates batch norm's anew.
        """
        parameters = dict(self.start.parameters)
        for part, key in zip(self._flat.slices(vector.contiguous()), self._shared, strict=True):
            parameters[key] = part.clone()
        for keys, branch in zip(self._heads, heads, strict=True):
            parameters.update({key: branch.parameters[key] for key in keys})
        return Branch(parameters, heads[0].buffers)

    def record(self, **diagnostics: Tensor) -> None:
        """Keep scalars for the run's record."""
        self.recorded.update(diagnostics)

    def snapshot(self, optimizer: dict[str, Any] | None = None) -> Branch:
        """Return a copy of the model as it is."""
        return Branch(
            {key: value.detach().clone() for key, value in self.model.named_parameters()},
            {key: value.clone() for key, value in self.model.named_buffers()},
            optimizer,
        )

    def load(self, branch: Branch) -> None:
        """Copy ``branch`` into the model."""
        with torch.no_grad():
            for key, parameter in self.model.named_parameters():
                parameter.copy_(branch.parameters[key])
            for key, buffer in self.model.named_buffers():
                buffer.copy_(branch.buffers[key])


class MemoryBranches(Branches):
    """Branches of a model that fits in memory a few times, trained by closures.

    ``losses[k]`` maps a step of the run to the losses an example of objective k on its batch;
    ``meta_loss`` and ``metric`` look at the primary's meta split.
    """

    def __init__(
        self,
        model: nn.Module,
        shared: nn.Module,
        heads: Sequence[nn.Module],
        *,
        losses: Sequence[Callable[[int], ExampleLosses]],
        meta_loss: Callable[[], ExampleLosses],
        metric: Callable[[], float],
        optimizer: Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer],
        **options: Any,
    ) -> None:
        super().__init__(model, shared, heads, **options)
        self._losses, self._meta_loss, self._metric = losses, meta_loss, metric
        self._new_optimizer = optimizer
        self._optimizers: dict[str, dict[str, Any]] = {}

    def train(self, weights: Tensor, steps: int, *, optimizer: str | None = None) -> Branch:
        """Train from ``start``; see :meth:`Branches.train`."""
        self.load(self.start)
        made = self._new_optimizer(self.model.parameters())
        if optimizer in self._optimizers:
            made.load_state_dict(copy.deepcopy(self._optimizers[optimizer]))  # it would be shared
        first = self.epoch * self.steps_per_epoch
        for step in range(first, first + steps):
            made.zero_grad()
            with torch.enable_grad():
                for weight, losses in zip(weights.tolist(), self._losses, strict=True):
                    if weight:
                        (weight * mean_loss(losses(step))).backward()
            made.step()
        if optimizer is None:
            return self.snapshot()
        self._optimizers[optimizer] = made.state_dict()
        return self.snapshot(self._optimizers[optimizer])

    def evaluate(self, branch: Branch) -> float:
        """Return ``metric`` at the weights of ``branch``."""
        self.load(branch)
        with torch.no_grad(), evaluation_mode(self.model):
            return self._metric()

    def gradient(self, branch: Branch) -> Tensor:
        """Return the (P,) gradient of ``meta_loss`` at the weights of ``branch``."""
        self.load(branch)
        out = self._flat.new()
        with torch.enable_grad(), evaluation_mode(self.model):
            loss = mean_loss(self._meta_loss())
            self._flat.accumulate(self._flat.slices(out), [loss], [torch.ones_like(loss)])
        return out


def _total(parts: Sequence[Tensors], coefficients: Sequence[float]) -> dict[str, Tensor]:
    total = {key: value.clone() for key, value in parts[0].items()}
    for key in (key for key, value in total.items() if value.is_floating_point()):
        total[key].zero_()
        for part, coefficient in zip(parts, coefficients, strict=True):
            if coefficient:  # 0 times a branch that diverged is not 0
                total[key].add_(part[key], alpha=coefficient)
    return total
