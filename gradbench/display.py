"""What a person sees while a run trains: a live line at a terminal, plain lines elsewhere."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.progress import Progress

    from gradbench.training.recipe import Epoch


class Display:
    """Passes on lines of text; steps are not shown."""

    def __init__(self, say: Callable[[str], None] = lambda line: None) -> None:
        self._say = say

    def say(self, line: str) -> None:
        """Show a line that stays."""
        self._say(line)

    def plan(self, steps: int, done: int) -> None:
        """Learn how many steps the run has at most, and how many are behind it."""

    def step(self, phase: str) -> None:
        """Count one step."""

    def epoch(self, epoch: Epoch, metric: str) -> None:
        """Take in an epoch whose line has been shown."""


class Live(Display):
    """Keeps a line with phase, progress, losses and metric below the lines that stay."""

    def __init__(self, progress: Progress) -> None:
        super().__init__(progress.console.print)
        self._progress = progress
        self._task = progress.add_task("preparing", total=None, state="")
        self._best = ""

    def say(self, line: str) -> None:
        """Show a line that stays, above the live one."""
        self._progress.console.print(line, markup=False, highlight=False, soft_wrap=True)

    def plan(self, steps: int, done: int) -> None:
        """Show a bar of so many steps."""
        self._progress.reset(self._task, total=steps, completed=done)

    def step(self, phase: str) -> None:
        """Move the bar on."""
        self._progress.update(self._task, advance=1, description=phase)

    def epoch(self, epoch: Epoch, metric: str) -> None:
        """Show losses and metric of the last epoch, and the best metric so far."""
        value = epoch.validation[metric]
        if epoch.best:
            self._best = f", best {value:.3f}"
        losses = " | ".join(f"{loss:.3f}" for loss in epoch.losses.values())
        state = f"loss {losses}  {metric} {value:.3f}{self._best}"
        behind = epoch.step if epoch.epoch == epoch.epochs else None
        self._progress.update(self._task, completed=behind, state=state)


@contextlib.contextmanager
def display() -> Iterator[Display]:
    """Show a run on standard error: live where that is a terminal."""
    if not sys.stderr.isatty():
        yield Display(lambda line: print(line, file=sys.stderr, flush=True))
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        ProgressColumn,
        Task,
        TextColumn,
        TimeRemainingColumn,
    )
    from rich.text import Text

    class Rate(ProgressColumn):
        """Steps a second."""

        def render(self, task: Task) -> Text:
            return Text(f"{task.speed:.1f} steps/s" if task.speed else "")

    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=20),
        MofNCompleteColumn(),
        Rate(),
        TextColumn("{task.fields[state]}"),
        TextColumn("ETA"),
        TimeRemainingColumn(compact=True),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        yield Live(progress)
