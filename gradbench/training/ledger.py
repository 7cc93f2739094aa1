"""What is measured while training, kept on the device until an epoch ends."""

from __future__ import annotations

import itertools
import math
import resource
import statistics
import sys
import time
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from gradbench.method import TINY
from gradbench.result import Cost
from gradbench.step import Step

NEVER = 2**62  # larger than any step
COUNTS = ("forward_passes", "backward_passes", "examples")
WARM_UP_STEPS = 5  # left out of step times: the first steps allocate and compile


class Ledger:
    """Sums losses and diagnostics of an epoch, and finds the first loss that is not finite."""

    def __init__(self, objectives: int, device: torch.device) -> None:
        self._columns = torch.arange(objectives, device=device)
        self._first_bad = torch.full((), NEVER, dtype=torch.int64, device=device)
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}

    def note(self, step: Step, has_gradients: bool) -> None:
        """Take in one step, without waiting for the device."""
        objectives = len(self._columns)
        bad = ~torch.isfinite(step.losses)
        places = torch.where(bad, self._columns + step.index * objectives, NEVER)
        torch.minimum(self._first_bad, places.min(), out=self._first_bad)
        for k, loss in enumerate(step.losses.unbind()):
            self._add(f"loss {k}", loss)
        if has_gradients and objectives > 1:
            gramian = step.gramian
            squares = gramian.diagonal()
            lengths = (squares[0] * squares[1:]).sqrt().clamp_min(TINY)
            self._add("cosine", (gramian[0, 1:] / lengths).mean())
            self._add("conflict_rate", (gramian[0, 1:] < 0).to(gramian.dtype).mean())
        for name, value in step.diagnostics().items():
            self._add(name, value)

    def _add(self, name: str, value: Tensor) -> None:
        self._sums[name] = self._sums[name] + value if name in self._sums else value.clone()
        self._counts[name] = self._counts.get(name, 0) + 1

    def close_epoch(self) -> tuple[dict[str, float], tuple[int, int] | None]:
        """Return the epoch's means by name, and (step, objective) of the first bad loss.

        A mean that is NaN or infinite, as of a product that overflowed, is left out.
        """
        names = list(self._sums)
        values = torch.stack([self._sums[name].double() for name in names]).tolist()
        means = {
            name: value / self._counts[name]
            for name, value in zip(names, values, strict=True)
            if math.isfinite(value)
        }
        first = int(self._first_bad)
        self._sums, self._counts = {}, {}
        objectives = len(self._columns)
        return means, None if first == NEVER else divmod(first, objectives)


@dataclass
class Costs:
    """Time, memory and passes of a run."""

    forward_passes: int = 0
    backward_passes: int = 0
    examples: int = 0
    steps: list[float] = field(default_factory=list)  # seconds
    started: float = field(default_factory=time.perf_counter)

    def state(self) -> dict[str, Any]:
        """Return plain values for a checkpoint."""
        values = {name: getattr(self, name) for name in COUNTS}
        return {**values, "steps": list(self.steps), "elapsed": time.perf_counter() - self.started}

    def load(self, state: dict[str, Any]) -> None:
        """Go on counting from a checkpoint."""
        for name in COUNTS:
            setattr(self, name, state[name])
        self.steps = list(state["steps"])
        self.started = time.perf_counter() - state["elapsed"]

    def summary(self, device: torch.device) -> Cost:
        """Return the record's ``cost`` up to now."""
        timed = self.steps[WARM_UP_STEPS:] or self.steps
        return Cost(
            wall_seconds=time.perf_counter() - self.started,
            step_milliseconds_p50=statistics.median(timed) * 1e3 if timed else None,
            peak_memory_mb=peak_memory(device),
            forward_passes=self.forward_passes,
            backward_passes=self.backward_passes,
            examples=self.examples,
        )


class StepClock:
    """Times steps; on a GPU by events that are read when an epoch ends."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._events: list[torch.cuda.Event] = []
        self._seconds: list[float] = []

    def mark(self) -> None:
        """Mark the end of one step and the start of the next."""
        if self._cuda:
            event: torch.cuda.Event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            event.record()
            self._events.append(event)
        else:
            self._seconds.append(time.perf_counter())

    def close_epoch(self) -> list[float]:
        """Return the seconds between the marks, and start anew."""
        if self._cuda:
            torch.cuda.synchronize()
            first = self._events[0]
            self._seconds = [first.elapsed_time(event) / 1e3 for event in self._events]
        between = [b - a for a, b in itertools.pairwise(self._seconds)]
        self._events, self._seconds = [], []
        return between


def peak_memory(device: torch.device) -> float:
    """Return MiB: the most that CUDA allocated, on a CPU the largest resident set so far."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    unit = 2**20 if sys.platform == "darwin" else 2**10  # ru_maxrss is in bytes there
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit
