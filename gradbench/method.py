"""A method: a way of turning the gradients of K objectives into one update.

A method is a frozen dataclass that keeps nothing on itself. Its hyper-parameters are its fields;
its memory is the dict that :meth:`Method.initial_state` makes; all it may see of a step is the
:class:`~gradbench.step.Step` that it is given. Row 0 is the primary objective everywhere.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple

from gradbench.fields import Checked

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from gradbench.branches import Branches
    from gradbench.step import Step

State = dict[str, Any]
Scale = Literal["paper", "sum"]

TINY = 1e-30  # keeps 0 / 0 at 0 in float32 (its smallest normal number is 1.2e-38)


@dataclass(frozen=True)
class Setup:
    """What is known before the first step, for :meth:`Method.initial_state`."""

    objectives: int
    parameters: int  # P, of the shared parameters
    device: torch.device
    dtype: torch.dtype  # of the gradients: float32, or float64 where the parameters are


@dataclass(frozen=True)
class Plan:
    """The budget of a run, from which :meth:`Method.phases` makes phases."""

    objectives: int
    steps_per_epoch: int
    epochs: int  # of the first phase
    fine_tune_epochs: int


@dataclass(frozen=True)
class Phase:
    """A stretch of training with its own optimizer and schedule.

    A phase of one objective trains it plainly; the method acts where there are two or more.
    The next phase starts from the best state on the primary validation metric, or from the last.
    """

    name: str
    objectives: tuple[int, ...]
    epochs: int
    select: Literal["best", "last"] = "best"


class Weights(NamedTuple):
    """Weights of the shared gradients and, apart from them, of the heads' gradients."""

    shared: Tensor  # (K,)
    heads: Tensor  # (K,)


@dataclass(frozen=True)
class Method(Checked, ABC):
    """The root of the four kinds; subclass one of those.

    Class attributes declare what the framework has to know:

    ``heads``: ``"own"``, a head gets the gradient of its own objective; ``"weighted"``, times
    the objective's weight. ``scale``: the length of what the paper returns, ``"sum"`` or
    ``"mean"`` of the gradients, or a ``"unit"`` vector. ``batches``: independent batches an
    objective. ``needs_meta``: a fifth of the primary training examples is set apart for
    ``step.heldout``. ``absorbs_auxiliary_weight``: ``task.auxiliary_weight`` would have no
    effect beside the method's own weights, so it is 1. ``rebuildable``: keys of the state that
    the method makes again at the first step of an epoch, so no checkpoint holds them.
    ``revision``: raised whenever results may move.
    """

    heads: ClassVar[Literal["own", "weighted"]] = "own"
    scale: ClassVar[Literal["sum", "mean", "unit"]] = "sum"
    batches: ClassVar[int] = 1
    needs_meta: ClassVar[bool] = False
    absorbs_auxiliary_weight: ClassVar[bool] = False
    rebuildable: ClassVar[frozenset[str]] = frozenset()
    revision: ClassVar[int] = 1

    def initial_state(self, setup: Setup) -> State:
        """Return the memory at the first step.

        Values are tensors, JSON scalars, or objects with ``state_dict`` and ``load_state_dict``.
        """
        return {}

    def after_step(self, step: Step) -> None:
        """Look back at a step after the optimizer moved the parameters."""
        return

    def phases(self, plan: Plan) -> tuple[Phase, ...]:
        """Return the phases of a run: jointly, then fine-tuning on the primary alone."""
        everything = tuple(range(plan.objectives))
        return (
            Phase("joint", everything, plan.epochs),
            Phase("fine-tune", (0,), plan.fine_tune_epochs),
        )


def saved_state(method: Method, state: State) -> dict[str, Any]:
    """Return copies of what a checkpoint holds of a method's memory: not what it can rebuild."""
    kept = {key: value for key, value in state.items() if key not in method.rebuildable}
    return {
        key: copy.deepcopy(value.state_dict() if hasattr(value, "state_dict") else value)
        for key, value in kept.items()
    }


def load_state(state: State, saved: Mapping[str, Any]) -> None:
    """Put a checkpoint into the memory that ``initial_state`` made.

    Tensors are overwritten in place, so that an optimizer in the memory goes on with its own.
    """
    import torch

    for key, value in saved.items():
        held: Any = state.get(key)
        if hasattr(held, "load_state_dict"):
            held.load_state_dict(copy.deepcopy(value))
        elif isinstance(held, torch.Tensor) and held.shape == value.shape:
            with torch.no_grad():
                held.copy_(value)
        else:
            state[key] = copy.deepcopy(value)


class Scalarization(Method):
    """A weighted sum of losses: one backward pass, weights from the losses alone."""

    heads = "weighted"  # by construction: the one backward pass weighs everything below the losses

    @abstractmethod
    def weights_from_losses(self, losses: Tensor, step: Step) -> Tensor:
        """Return the (K,) weights of the (K,) detached mean losses."""


class Weighting(Method):
    """A weighted sum of gradients whose weights are a function of their Gramian.

    With ``host = True`` the Gramian arrives on the CPU in float64, at the price of one copy each
    way a step: for methods with an eigen-decomposition or a small program.
    """

    host: ClassVar[bool] = False

    @abstractmethod
    def weights_from_gramian(self, gramian: Tensor, step: Step) -> Tensor | Weights:
        """Return the (K,) weights of the rows, from the (K, K) matrix of their inner products."""


class Aggregation(Method):
    """Any map from the K gradients to one direction."""

    @abstractmethod
    def combine(self, jacobian: Tensor, step: Step, out: Tensor) -> Tensor | None:
        """Write the direction (P,) into ``out``; ``jacobian`` (K, P) must stay as it is.

        With ``heads = "weighted"`` the (K,) weights of the heads are returned, else None.
        """


class Branching(Method):
    """Training in branches of the weights, merged once an epoch."""

    @abstractmethod
    def epoch(self, branches: Branches) -> None:
        """Train one epoch, ending in ``branches.commit``."""


KINDS: tuple[type[Method], ...] = (Scalarization, Weighting, Aggregation, Branching)


def kind_of(method: type[Method] | Method) -> str:
    """Return ``scalarization``, ``weighting``, ``aggregation`` or ``branching``."""
    cls = method if isinstance(method, type) else type(method)
    return next(kind.__name__.lower() for kind in KINDS if issubclass(cls, kind))
