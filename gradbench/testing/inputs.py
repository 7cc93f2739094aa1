"""Gradients to try a method on: drawn ones, and the awkward ones."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gradbench import seeding

EXAMPLES = 24  # primary examples a step, more than the default rank of any basis

# The squares of a Gramian's entries reach (P · scale²)². In float64 all of 1e-10 … 1e10 fit; in
# float32, which ends at 3e38 and begins at 1e-38, nothing beyond these does.
SCALES = {
    torch.float64: (1e-10, 1e-5, 1.0, 1e5, 1e10),
    torch.float32: (1e-8, 1e-4, 1.0, 1e4, 1e8),
}


def generator(seed: int, *axes: str | int) -> torch.Generator:
    """Return a generator on the CPU for the place ``axes`` under ``seed``."""
    return torch.Generator().manual_seed(seeding.derive(seed, "testing", *axes))


def random_jacobian(
    objectives: int, parameters: int, *, seed: int = 0, dtype: torch.dtype = torch.float64
) -> Tensor:
    """Return (K, P) independent normal numbers."""
    draw = generator(seed, "jacobian")
    return torch.randn(objectives, parameters, generator=draw, dtype=dtype)


def example_gradients(mean: Tensor, *, examples: int = EXAMPLES, seed: int = 0) -> Tensor:
    """Return (m, P) normal gradients of primary examples, of about the length of ``mean`` (P,).

    Up to round-off their average is ``mean``, as the primary gradient is that of its examples.
    """
    draw = generator(seed, "examples")
    spread = torch.randn(examples, len(mean), generator=draw, dtype=mean.dtype)
    length = mean.norm() / len(mean) ** 0.5
    gradients: Tensor = mean + (spread - spread.mean(0)) * length
    return gradients


@dataclass(frozen=True)
class Batch:
    """What one step of training hands to a method."""

    jacobian: Tensor  # (batches, K, P)
    losses: Tensor  # (K,)
    sketch_gradients: Tensor  # (m, P), of primary training examples
    heldout_gradients: Tensor  # (m, P), of held-out primary examples


def random_batch(
    index: int,
    objectives: int,
    parameters: int,
    *,
    batches: int = 1,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
) -> Batch:
    """Return what step ``index`` hands over: independent normal rows, losses in [0.5, 1.5)."""
    rows = random_jacobian(
        batches * objectives, parameters, seed=seeding.derive(seed, index), dtype=dtype
    ).view(batches, objectives, parameters)
    losses = 0.5 + torch.rand(objectives, generator=generator(seed, "losses", index), dtype=dtype)
    return batch_of(rows, losses, seed=seeding.derive(seed, index))


def batch_of(jacobian: Tensor, losses: Tensor | None = None, *, seed: int = 0) -> Batch:
    """Return a batch with these rows (K, P) or (batches, K, P); losses are 1 unless given."""
    rows = jacobian if jacobian.dim() == 3 else jacobian[None]
    primary = rows[0, 0]
    return Batch(
        jacobian=rows,
        losses=torch.ones_like(rows[0, :, 0]) if losses is None else losses,
        sketch_gradients=example_gradients(primary, seed=seeding.derive(seed, "sketch")),
        heldout_gradients=example_gradients(primary, seed=seeding.derive(seed, "heldout")),
    )


def awkward_jacobians(parameters: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """Return jacobians (3, P) on which a division by zero lies in wait, by name."""
    plain = random_jacobian(3, parameters, dtype=dtype)
    zeros = torch.zeros_like(plain)
    first, second, third = plain
    return {
        "zero primary": torch.stack([zeros[0], second, third]),
        "zero auxiliary": torch.stack([first, second, zeros[0]]),
        "all zero": zeros,
        "only the primary": torch.stack([first, zeros[0], zeros[0]]),
        "duplicates": torch.stack([first, first, second]),
        "all the same": torch.stack([first, first, first]),
        "exact conflict": torch.stack([first, -first, second]),
        "exact conflict of the auxiliaries": torch.stack([first, second, -second]),
        "sum of zero": torch.stack([first, second, -first - second]),
        "orthogonal": torch.eye(3, parameters, dtype=dtype),
        "one coordinate": plain * torch.eye(1, parameters, dtype=dtype),
        "tiny primary": torch.stack([first * 1e-8, second, third]),
        "huge primary": torch.stack([first * 1e8, second, third]),
        # in float32 the square of such a row is 0, its products with the others are not
        "primary without square": torch.stack([first * 1e-25, second, third]),
        "auxiliary without square": torch.stack([first, second * 1e-25, third]),
    }
