"""A batch of primary examples that the gradients of a step have not seen."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from gradbench.errors import MissingInputError
from gradbench.gradients import FlatGradients, evaluation_mode
from gradbench.losses import ExampleLosses, mean_loss


@dataclass(frozen=True)
class HeldOutExamples:
    """What a training loop gives of one held-out batch."""

    forward: Callable[[], Any]  # the trunk's features of the batch, with a graph
    loss: Callable[[Any, nn.Module], ExampleLosses]  # (features, head) -> losses an example
    new_head: Callable[[], nn.Module]  # a freshly initialised primary head
    head: nn.Module | None = None  # the primary head as it is


class HeldOutBatch:
    """A held-out batch as methods see it; see :class:`gradbench.step.HeldOut`.

    Every pass runs inside ``around()``: the trunk's mode and precision, which the batch does not
    know. A head has its dropout off.
    """

    def __init__(
        self,
        examples: HeldOutExamples,
        flat: FlatGradients,
        seed: int,
        around: Callable[[], AbstractContextManager[object]] = nullcontext,
    ) -> None:
        self._examples = examples
        self._flat = flat
        self._seed = seed
        self._around = around

    @cached_property
    def features(self) -> Any:
        """What the trunk makes of the batch, without a graph; computed once."""
        with self._around(), torch.no_grad():
            return self._examples.forward()

    @property
    def head(self) -> nn.Module:
        """The primary head as it is.

        Raises:
            MissingInputError: in a loop that did not give it.
        """
        if self._examples.head is None:
            raise MissingInputError(
                "Expected the primary head beside the held-out examples, which this method reads; "
                "pass HeldOutExamples(…, head=…)."
            )
        return self._examples.head

    def loss(self, features: Any, head: nn.Module) -> Tensor:
        """Return the mean loss of ``head`` on ``features``, a scalar with a graph."""
        with self._around(), torch.enable_grad(), evaluation_mode(head):
            return mean_loss(self._examples.loss(features, head))

    def gradient(self, head: nn.Module) -> Tensor:
        """Return the (P,) gradient of the mean loss in the shared parameters."""
        with self._around(), torch.enable_grad(), evaluation_mode(head):
            loss = mean_loss(self._examples.loss(self._examples.forward(), head))
        out = self._flat.new()
        self._flat.accumulate(self._flat.slices(out), [loss], [torch.ones_like(loss)])
        return out

    def new_head(self) -> nn.Module:
        """Return a head initialised from the step's seed, not from the global generator."""
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(self._seed)
            head = self._examples.new_head()
        return head.to(self._flat.device, self._flat.dtype)
