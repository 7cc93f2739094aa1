"""Random numbers that are a pure function of a seed and of where they are used.

Nothing here keeps a position in a stream: a number drawn for (seed, axis, ...) is the same
whatever else was drawn before it, in this process or in another one.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

Axis = str | int

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)  # 2^64 / golden ratio, the increment of SplitMix64
_MIX_1, _MIX_2 = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)


def derive(seed: int, *axes: Axis) -> int:
    """Return a 63-bit seed for the place ``axes`` under ``seed``.

    Source: the first eight bytes of SHA-256 over the decimal or text form of each part, parts
    separated by a zero byte, strings told from integers by a letter.
    """
    parts = [f"{'s' if isinstance(part, str) else 'i'}{part}" for part in (seed, *axes)]
    digest = hashlib.sha256("\0".join(parts).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def rng(seed: int, *axes: Axis) -> np.random.Generator:
    """Return a numpy generator for the place ``axes`` under ``seed``."""
    return np.random.Generator(np.random.Philox(derive(seed, *axes)))


@dataclass(frozen=True)
class ExampleRandom:
    """Random numbers an example, a pure function of (seed, axis, objective, pass, example).

    Row ``b`` of every draw depends on the ``b``-th example and its pass alone, not on its place
    in the batch, so that a batch that runs over the end of a pass augments as two batches would.

    Source: SplitMix64, Steele et al. 2014, doi:10.1145/2660193.2660195, keyed by counters.
    """

    key: int
    passes: NDArray[np.int64]  # (B,)
    examples: NDArray[np.int64]  # (B,)

    def uniform(self, stream: str, count: int) -> NDArray[np.float64]:
        """Return (B, count) numbers in [0, 1); ``stream`` tells independent draws apart."""
        with np.errstate(over="ignore"):  # arithmetic modulo 2^64 is the algorithm
            state = np.full(self.passes.shape, derive(self.key, stream), dtype=np.uint64)
            for part in (self.passes, self.examples):
                state = _mix(state ^ _mix(part.astype(np.uint64) + _GOLDEN))
            counters = np.arange(1, count + 1, dtype=np.uint64) * _GOLDEN
            bits = _mix(state[:, None] + counters[None, :])
        return (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53

    def integers(self, stream: str, high: int) -> NDArray[np.int64]:
        """Return (B,) integers in [0, high)."""
        return np.floor(self.uniform(stream, 1)[:, 0] * high).astype(np.int64)


def _mix(state: NDArray[np.uint64]) -> NDArray[np.uint64]:
    state = (state ^ (state >> np.uint64(30))) * _MIX_1
    state = (state ^ (state >> np.uint64(27))) * _MIX_2
    return state ^ (state >> np.uint64(31))
