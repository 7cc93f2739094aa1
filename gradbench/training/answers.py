"""What the calls of an epoch in branches were answered, so that it can go on from there."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from gradbench.branches import Branch
from gradbench.errors import ContractError

WORTH = 10  # a checkpoint inside an epoch saves at least so many times the work of making one


@dataclass(frozen=True)
class Moved(Branch):
    """A branch whose weights have moved without their running statistics.

    These are estimated on the primary's training batches when it is evaluated or committed.
    """


class Answers:
    """What the calls of an epoch were answered so far; ``save`` makes a checkpoint.

    One is made after a call, unless making the last one took more than a tenth of the time since.
    """

    def __init__(self, save: Callable[[], None]) -> None:
        self._save = save
        self._given: list[tuple[str, Any]] = []
        self._position = 0
        self._took = self._ended = 0.0  # seconds that the last checkpoint took, and its end

    def get(self, call: str, compute: Callable[[], Any]) -> Any:
        """Return what this call was answered before the run was cut off, or compute it.

        Raises:
            ContractError: if another call was made then.
        """
        if self._position < len(self._given):
            before, answer = self._given[self._position]
            if before != call:
                raise ContractError(
                    f"Expected an epoch that begins again to make the same calls, {before!r} now, "
                    f"found {call!r}; it may depend on its state and branches.rng alone."
                )
            self._position += 1
            return answer
        answer = compute()
        self._given.append((call, answer))
        self._position += 1
        began = time.perf_counter()
        if began - self._ended >= WORTH * self._took:
            self._save()
            self._ended = time.perf_counter()
            self._took = self._ended - began
        return answer

    def have(self, call: str) -> bool:
        """Say whether such a call was made in this epoch."""
        return any(made == call for made, _ in self._given)

    def state(self) -> list[tuple[str, Any]]:
        """Return tensors and plain values for a checkpoint."""
        return [
            (call, {"moved": isinstance(answer, Moved), **vars(answer)})
            if call == "train"
            else (call, answer)
            for call, answer in self._given
        ]

    def load(self, state: Sequence[tuple[str, Any]]) -> None:
        """Begin an epoch with these answers."""
        self._given = [
            (call, _branch(**answer) if call == "train" else answer) for call, answer in state
        ]
        self._position = 0


def _branch(moved: bool, **parts: Any) -> Branch:
    return Moved(**parts) if moved else Branch(**parts)
