"""A Step over matrices, with no model and no training loop behind it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gradbench.method import State
from gradbench.step import BatchNorm, Draw, HeldOut, Step
from gradbench.testing.inputs import Batch


@dataclass(frozen=True)
class MatrixSource:
    """Answers what a method asks of a step out of a batch's matrices.

    The losses are taken to be linear in the parameters, so a second look finds them unmoved and
    the Hessian is zero. The generator is on the CPU, as fake tensors on any device accept.
    """

    batch: Batch

    @property
    def device(self) -> torch.device:
        """Where the gradients are."""
        return self.batch.jacobian.device

    def jacobians(self) -> Tensor:
        """Return (batches, K, P)."""
        return self.batch.jacobian

    def blocks(self) -> tuple[tuple[slice, ...], int]:
        """Return two halves of P, of which the second ends in a weight."""
        parameters = self.batch.jacobian.shape[-1]
        half = parameters // 2
        halves = (slice(0, half), slice(half, parameters)) if half else (slice(0, parameters),)
        return halves, len(halves) - 1

    def sketch(self, draw: Draw, samples: int, batch_norm: BatchNorm) -> Tensor:
        """Return (R, P), combinations of all the examples that there are."""
        examples = self.batch.sketch_gradients
        return draw(len(examples)) @ examples

    def reevaluate(self) -> Tensor:
        """Return (K,), the losses as they were."""
        return self.batch.losses.clone()

    def heldout(self) -> HeldOut:
        """Return the held-out examples of the batch."""
        return _HeldOutMatrix(self.batch.heldout_gradients)

    def hvp(self, vector: Tensor, weights: Tensor) -> Tensor:
        """Return (P,) zeros."""
        return torch.zeros_like(vector)

    def generator(self, seed: int) -> torch.Generator:
        """Return a seeded generator on the CPU."""
        return torch.Generator().manual_seed(seed)


def step_over(
    batch: Batch,
    *,
    index: int = 0,
    steps_per_epoch: int | None = None,
    seed: int = 0,
    name: str = "method",
    state: State | None = None,
) -> Step:
    """Return a step whose gradients are the matrices of ``batch``."""
    return Step(
        MatrixSource(batch),
        batch.losses,
        index=index,
        steps_per_epoch=steps_per_epoch,
        seed=seed,
        name=name,
        state=state,
    )


@dataclass(frozen=True)
class _HeldOutMatrix:
    """Held-out examples with these gradients (m, P); a head adds one number to what it gets."""

    gradients: Tensor

    @property
    def features(self) -> Tensor:
        return torch.zeros_like(self.gradients[:, 0])

    @property
    def head(self) -> nn.Module:
        return self.new_head()

    def loss(self, features: Tensor, head: nn.Module) -> Tensor:
        with torch.enable_grad():
            loss: Tensor = head(features).mean()
        return loss

    def gradient(self, head: nn.Module) -> Tensor:
        return self.gradients.mean(0)

    def new_head(self) -> nn.Module:
        return Shift(self.gradients.dtype, self.gradients.device)


class Shift(nn.Module):
    """Add one number, which starts at 0."""

    def __init__(self, dtype: torch.dtype, device: torch.device | None = None) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.zeros((), dtype=dtype, device=device))

    def forward(self, outputs: Tensor) -> Tensor:
        """Return (B,)."""
        return outputs + self.shift
