"""What a method may see of one training step, computed only when asked for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal, Protocol

from gradbench import seeding
from gradbench.errors import MissingInputError

if TYPE_CHECKING:
    import numpy as np
    import torch
    from torch import Tensor, nn

BatchNorm = Literal["batch", "frozen"]
Draw = Callable[[int], "Tensor"]  # m -> (R, m)


class HeldOut(Protocol):
    """A batch of primary examples that no gradient of the step has seen; dropout is off."""

    @property
    def features(self) -> Any:
        """What the trunk makes of the batch, without a graph."""

    @property
    def head(self) -> nn.Module:
        """The primary head as it is; a method leaves it so."""

    def loss(self, features: Any, head: nn.Module) -> Tensor:
        """Return the mean loss of ``head`` on ``features``, a scalar with a graph."""

    def gradient(self, head: nn.Module) -> Tensor:
        """Return the (P,) gradient of the mean loss in the shared parameters."""

    def new_head(self) -> nn.Module:
        """Return a freshly initialised primary head."""


class StepSource(Protocol):
    """Where a :class:`Step` gets what a method asks for: a training loop, or a test."""

    @property
    def device(self) -> torch.device:
        """Where the gradients are."""

    def jacobians(self) -> Tensor:
        """Return (batches, K, P)."""

    def blocks(self) -> tuple[tuple[slice, ...], int]:
        """Return the slices of P, one a module, and which one is the last weight block."""

    def sketch(self, draw: Draw, samples: int, batch_norm: BatchNorm) -> Tensor:
        """Return (R, P)."""

    def reevaluate(self) -> Tensor:
        """Return (K,)."""

    def heldout(self) -> HeldOut:
        """Return a batch of the meta split."""

    def hvp(self, vector: Tensor, weights: Tensor) -> Tensor:
        """Return (P,)."""

    def generator(self, seed: int) -> torch.Generator:
        """Return a seeded generator on ``device``."""


class Step:
    """One step: K losses, their gradients on request, and the method's own memory.

    ``index`` counts the steps of the run from 0, ``index_in_epoch`` those of the epoch.
    All tensors are float32 (float64 where the parameters are), detached, on one device; a method
    leaves them as they are.
    """

    def __init__(
        self,
        source: StepSource,
        losses: Tensor,
        *,
        index: int = 0,
        steps_per_epoch: int | None = None,
        seed: int = 0,
        name: str = "method",
        state: dict[str, Any] | None = None,
    ) -> None:
        self.losses = losses  # (K,)
        self.index = index
        self.state: dict[str, Any] = {} if state is None else state
        self.recorded: dict[str, Tensor] = {}
        self._source = source
        self._steps_per_epoch = steps_per_epoch
        self._seed = seed
        self._name = name

    @property
    def epoch(self) -> int:
        """The number of epochs completed.

        Raises:
            MissingInputError: in a loop that did not say how many steps make an epoch.
        """
        if self._steps_per_epoch is None:
            raise MissingInputError(
                "Expected to know how many steps make an epoch, which this method reads; "
                "pass steps_per_epoch=… to Surgery."
            )
        return self.index // self._steps_per_epoch

    @property
    def index_in_epoch(self) -> int:
        """The number of steps since the epoch began; a loop without epochs is one long epoch."""
        return self.index % self._steps_per_epoch if self._steps_per_epoch else self.index

    @property
    def jacobians(self) -> Tensor:
        """(batches, K, P), the rows of every independent batch."""
        return self._source.jacobians()

    @property
    def jacobian(self) -> Tensor:
        """(K, P), row k the gradient of the mean loss k in the shared parameters."""
        return self.jacobians[0]

    @cached_property
    def gramian(self) -> Tensor:
        """(K, K), the inner products of the rows of the jacobian."""
        jacobian = self.jacobian
        return jacobian @ jacobian.T

    @property
    def blocks(self) -> tuple[slice, ...]:
        """The slices of P, one a module that owns parameters, in the order of the forward."""
        return self._source.blocks()[0]

    @property
    def last_weight_block(self) -> int:
        """The index of the last block with the weight of a Linear or convolution layer."""
        return self._source.blocks()[1]

    @cached_property
    def block_gramians(self) -> Tensor:
        """(L, K, K), the Gramian of each block."""
        import torch

        jacobian = self.jacobian
        grams = [jacobian[:, block] @ jacobian[:, block].T for block in self.blocks]
        return torch.stack(grams)

    def sketch(self, draw: Draw, *, samples: int, batch_norm: BatchNorm = "batch") -> Tensor:
        """Return (R, P): R combinations of the gradients of m primary training examples.

        ``draw(m)`` makes the (R, m) combinations. ``samples`` asks for m; a small training set or
        somebody's own loop may give fewer or more. Dropout is off and running statistics stay
        unmoved; batch norm uses the statistics of these examples, or its frozen ones.
        """
        return self._source.sketch(draw, samples, batch_norm)

    def reevaluate(self) -> Tensor:
        """Return the (K,) losses of the same batches under the same dropout, as of now."""
        return self._source.reevaluate()

    def heldout(self) -> HeldOut:
        """Return a batch of held-out primary examples; two calls give disjoint batches."""
        return self._source.heldout()

    def hvp(self, vector: Tensor, weights: Tensor) -> Tensor:
        """Return (P,): the Hessian of the weighted sum of losses times ``vector`` (P,).

        It is the Hessian in the shared parameters, on the batches and under the dropout of the
        step; the heads stand still.
        """
        return self._source.hvp(vector, weights)

    @cached_property
    def rng(self) -> np.random.Generator:
        """Random numbers on the host, a function of (seed, method, step)."""
        return seeding.rng(self._seed, "method", self._name, self.index)

    @cached_property
    def generator(self) -> torch.Generator:
        """Random numbers on the device, a function of (seed, method, step)."""
        return self._source.generator(
            seeding.derive(self._seed, "method", self._name, self.index, "device")
        )

    def record(self, **diagnostics: Tensor) -> None:
        """Keep scalars, on the device, for the run's record; names are the record's."""
        self.recorded.update(diagnostics)

    def diagnostics(self) -> Mapping[str, Tensor]:
        """Return what was recorded, detached."""
        return {name: value.detach() for name, value in self.recorded.items()}
