"""A batch of primary examples that the gradients of a step have not seen."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from gradbench.gradients import FlatGradients
from gradbench.losses import ExampleLosses, mean_loss


@dataclass(frozen=True)
class HeldOutExamples:
    """What a training loop gives of one held-out batch."""

    forward: Callable[[], Any]  # the trunk's features of the batch, with a graph
    loss: Callable[[Any, nn.Module], ExampleLosses]  # (features, head) -> losses an example
    new_head: Callable[[], nn.Module]  # a freshly initialised primary head


class HeldOutBatch:
    """A held-out batch as methods see it; see :class:`gradbench.step.HeldOut`."""

    def __init__(self, examples: HeldOutExamples, flat: FlatGradients, seed: int) -> None:
        self._examples = examples
        self._flat = flat
        self._seed = seed

    @cached_property
    def features(self) -> Any:
        """What the trunk makes of the batch, without a graph; computed once."""
        with torch.no_grad():
            return self._examples.forward()

    def loss(self, features: Any, head: nn.Module) -> Tensor:
        """Return the mean loss of ``head`` on ``features``, a scalar with a graph."""
        with torch.enable_grad():
            return mean_loss(self._examples.loss(features, head))

    def gradient(self, head: nn.Module) -> Tensor:
        """Return the (P,) gradient of the mean loss in the shared parameters."""
        with torch.enable_grad():
            loss = mean_loss(self._examples.loss(self._examples.forward(), head))
        out = self._flat.new()
        self._flat.accumulate(self._flat.slices(out), [loss], [torch.ones_like(loss)])
        return out

    def new_head(self) -> nn.Module:
        """Return a head initialised from the step's seed, not from the global generator."""
        with torch.random.fork_rng(devices=[]):
            torch.random.default_generator.manual_seed(self._seed)
            head = self._examples.new_head()
        return head.to(self._flat.device)
