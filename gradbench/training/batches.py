"""Batches as a pure function of seed, objective and position."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from gradbench import seeding
from gradbench.seeding import ExampleRandom
from gradbench.task import ExampleSet, Indices, Objective


class Batches:
    """The endless stream of training batches of one objective.

    The examples are gone through in passes, each in its own random order; a batch keeps its size
    and runs over the end of a pass.
    """

    def __init__(
        self, objective: Objective, examples: ExampleSet, k: int, seed: int, size: int
    ) -> None:
        self._objective, self._examples = objective, examples
        self._k, self._seed, self.size = k, seed, size
        self._key = seeding.derive(seed, "augmentation", k)
        self._order = lru_cache(maxsize=2)(self._draw_order)

    def _draw_order(self, passage: int) -> Indices:
        return seeding.rng(self._seed, "order", self._k, passage).permutation(len(self._examples))

    def at(self, position: int) -> tuple[Any, Any]:
        """Return input and target of the batch at ``position`` in the stream."""
        places = np.arange(position * self.size, (position + 1) * self.size)
        passes, offsets = np.divmod(places, len(self._examples))
        indices = np.empty_like(places)
        for passage in np.unique(passes):
            now = passes == passage
            indices[now] = self._order(int(passage))[offsets[now]]
        random = ExampleRandom(self._key, passes, indices)
        return self._objective.batch(self._examples.take(indices), random)

    def draw(self, count: int, *axes: str | int) -> tuple[Any, Any]:
        """Return ``count`` different examples, drawn apart from the stream for ``axes``."""
        return self._make(self._shuffled(axes)[:count], axes)

    def half(self, which: int, *axes: str | int) -> tuple[Any, Any]:
        """Return a batch of one of two disjoint halves of the examples, drawn for ``axes``."""
        return self._make(np.array_split(self._shuffled(axes), 2)[which][: self.size], axes)

    def _shuffled(self, axes: tuple[str | int, ...]) -> Indices:
        return seeding.rng(self._seed, *axes).permutation(len(self._examples))

    def _make(self, indices: Indices, axes: tuple[str | int, ...]) -> tuple[Any, Any]:
        random = ExampleRandom(seeding.derive(self._key, *axes), np.zeros_like(indices), indices)
        return self._objective.batch(self._examples.take(indices), random)


def to_device(batch: Any, device: torch.device, dtype: torch.dtype) -> Any:
    """Move the tensors of a nested batch; floating-point ones become ``dtype``."""

    def move(tensor: Tensor) -> Tensor:
        wanted = dtype if tensor.is_floating_point() else None
        return tensor.to(device=device, dtype=wanted, non_blocking=True)

    return pytree.tree_map_only(Tensor, move, batch)
