"""A training loop whose gradients are rows of one's choice, run by Surgery itself."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from gradbench.heldout import HeldOutExamples
from gradbench.method import Method, Scale, State
from gradbench.surgery import Closure, Surgery
from gradbench.testing.inputs import random_batch
from gradbench.testing.steps import Shift

RATE = 1e-2  # of gradient descent: losses move, but not below zero within a test


class LinearLoop:
    """A training loop in which the loss of an example with gradient g is ``g·θ + a constant``.

    The parameters θ (P,) start at 0. A gradient is the given row to the bit, wherever θ is, and
    the losses at the start are the given ones to the bit. The trunk has two modules, so that
    there are blocks; a head adds one number of its own, so that its gradient is its weight.
    """

    def __init__(
        self,
        method: Method,
        objectives: int,
        parameters: int,
        *,
        dtype: torch.dtype = torch.float64,
        steps_per_epoch: int | None = None,
        seed: int = 0,
        scale: Scale = "paper",
    ) -> None:
        self.trunk = _LinearTrunk(parameters, dtype)
        self.heads = [Shift(dtype) for _ in range(objectives)]
        self.surgery = Surgery(
            method,
            self.trunk,
            self.heads,
            objectives=objectives,
            steps_per_epoch=steps_per_epoch,
            seed=seed,
            scale=scale,
        )

    def backward(
        self,
        jacobian: Tensor,
        losses: Tensor | None = None,
        *,
        sketch_gradients: Tensor | None = None,
        heldout_gradients: Tensor | None = None,
    ) -> Tensor:
        """Return the direction (P,) that the method makes of ``jacobian``.

        That is (K, P), the same in every batch, or (batches, K, P). ``losses`` (K,) are 1
        unless given. The other two are gradients of primary examples, (m, P) each; a method that
        asks for what is not given raises MissingInputError, as in any loop.
        """
        method = self.surgery.method
        rows = jacobian.expand(method.batches, -1, -1)
        constants = torch.ones_like(rows[0, :, 0]) if losses is None else losses
        for head in self.heads:
            head.shift.grad = None
        self.surgery.backward(
            *(
                [self._closure(k, row[None], constant) for row in rows[:, k]]
                for k, constant in enumerate(constants)
            ),
            sketch=None if sketch_gradients is None else self._closure(0, sketch_gradients),
            heldout=None if heldout_gradients is None else lambda: self._heldout(heldout_gradients),
        )
        return self.surgery.direction.clone()

    def descend(self, rate: float = RATE) -> None:
        """Move θ against the direction, then let the method look back."""
        with torch.no_grad():
            for parameter in self.trunk.parameters():
                assert parameter.grad is not None
                parameter.sub_(parameter.grad, alpha=rate)
        self.surgery.after_step()

    @property
    def head_weights(self) -> Tensor:
        """(K,), what the gradient of each head was multiplied by."""
        grads = [head.shift.grad for head in self.heads]
        return torch.stack([torch.zeros(()) if grad is None else grad for grad in grads])

    def _closure(self, k: int, rows: Tensor, constant: Tensor | float = 0.0) -> Closure:
        def losses() -> Tensor:
            output: Tensor = self.heads[k](self.trunk(rows)) + constant
            return output

        return losses

    def _heldout(self, rows: Tensor) -> HeldOutExamples:
        return HeldOutExamples(
            forward=lambda: self.trunk(rows),
            loss=lambda features, head: head(features),
            new_head=lambda: Shift(rows.dtype),
            head=self.heads[0],
        )


def direction(
    method: Method,
    jacobian: Tensor,
    *,
    losses: Tensor | None = None,
    seed: int = 0,
    index: int = 0,
    state: State | None = None,
    sketch_gradients: Tensor | None = None,
    heldout_gradients: Tensor | None = None,
    steps_per_epoch: int | None = None,
    scale: Scale = "paper",
) -> Tensor:
    """Return the direction (P,) that ``method`` makes of ``jacobian`` in step ``index``.

    See :meth:`LinearLoop.backward` for the tensors. ``state`` is the method's memory, which is
    written to; without it the memory is that before the first step.
    """
    loop = LinearLoop(
        method,
        *jacobian.shape[-2:],
        dtype=jacobian.dtype,
        seed=seed,
        steps_per_epoch=steps_per_epoch,
        scale=scale,
    )
    loop.surgery.index = index
    if state is not None:
        loop.surgery.state = state
    return loop.backward(
        jacobian,
        losses,
        sketch_gradients=sketch_gradients,
        heldout_gradients=heldout_gradients,
    )


def train(loop: LinearLoop, indices: Sequence[int], *, seed: int = 0) -> list[Tensor]:
    """Take the steps ``indices`` on drawn gradients; return the directions, (P,) each."""
    directions = []
    for index in indices:
        parameter = next(loop.trunk.parameters())
        batch = random_batch(
            index,
            loop.surgery.objectives,
            sum(p.numel() for p in loop.trunk.parameters()),
            batches=loop.surgery.method.batches,
            seed=seed,
            dtype=parameter.dtype,
        )
        directions.append(
            loop.backward(
                batch.jacobian,
                batch.losses,
                sketch_gradients=batch.sketch_gradients,
                heldout_gradients=batch.heldout_gradients,
            )
        )
        loop.descend()
    return directions


def trajectory(
    method: Method,
    steps: int,
    *,
    objectives: int = 3,
    parameters: int = 40,
    dtype: torch.dtype = torch.float32,
    steps_per_epoch: int | None = None,
    seed: int = 0,
) -> list[Tensor]:
    """Return the directions, (P,) each, of the first ``steps`` steps on drawn gradients."""
    loop = LinearLoop(
        method, objectives, parameters, dtype=dtype, steps_per_epoch=steps_per_epoch, seed=seed
    )
    return train(loop, range(steps))


class _LinearTrunk(nn.Module):
    """Map rows (B, P) to their products with θ, which two modules hold."""

    def __init__(self, parameters: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.split = parameters // 2
        self.front = _Front(self.split, dtype) if self.split else None
        # on the meta device, for initialising it would draw from the global generator
        self.back = nn.Linear(parameters - self.split, 1, bias=False, dtype=dtype, device="meta")
        self.back.to_empty(device="cpu")
        nn.init.zeros_(self.back.weight)

    def forward(self, rows: Tensor) -> Tensor:
        """Return (B,)."""
        front = 0.0 if self.front is None else self.front(rows[:, : self.split])
        output: Tensor = front + self.back(rows[:, self.split :])[:, 0]
        return output


class _Front(nn.Module):
    """Map rows to their products with a vector."""

    def __init__(self, parameters: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(parameters, dtype=dtype))

    def forward(self, rows: Tensor) -> Tensor:
        """Return (B,)."""
        return rows @ self.weight
