"""`gradbench data status`, `prepare` and `preview`."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gradbench.cli.runs import parse_settings

if TYPE_CHECKING:
    from gradbench.task import Source, Splits, TaskPair

app = typer.Typer(no_args_is_help=True, help="See, check and look at the data of a task pair.")

TaskName = Annotated[str, typer.Argument(metavar="TASK", help="As `gradbench tasks` lists them.")]
Data = Annotated[str, typer.Option(help="auto, real or sample.")]
PresetName = Annotated[str, typer.Option("--preset", help="The task's sizes and budget.")]
Seed = Annotated[int, typer.Option(help="Decides which examples are drawn.")]
Set = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="task.…, as `gradbench info` shows."),
]
Debug = Annotated[bool, typer.Option(help="Show tracebacks.")]

MEGABYTE = 1e6


@app.command()
def status(
    name: TaskName,
    preset_name: PresetName = "default",
    settings: Set = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print a JSON object.")] = False,
    debug: Debug = False,
) -> None:
    """Say where data is looked for, what is missing, and whether a sample exists."""
    given = parse_settings(settings or [])
    from gradbench.config import resolve_task
    from gradbench.data import inspection

    task, _ = resolve_task(name, preset_name, given)
    found = inspection.status(task, name)
    print(json.dumps(found) if as_json else "\n".join(_lines(found)))


@app.command()
def prepare(
    name: TaskName,
    data: Data = "auto",
    preset_name: PresetName = "default",
    seed: Seed = 0,
    settings: Set = None,
    debug: Debug = False,
) -> None:
    """Draw the sample or find the real files, then read all of them but the test."""
    from gradbench.data import inspection

    _, _, splits = _splits(name, data, preset_name, seed, settings or [])
    inspection.open_all(splits, print)


@app.command()
def preview(
    name: TaskName,
    data: Data = "auto",
    preset_name: PresetName = "default",
    seed: Seed = 0,
    out: Annotated[
        Path | None, typer.Option(help="The PNG to write. Default: TASK.png here.")
    ] = None,
    count: Annotated[int, typer.Option(help="Examples of each objective.", min=1, max=1000)] = 16,
    settings: Set = None,
    debug: Debug = False,
) -> None:
    """Write a contact sheet of training examples with their targets."""
    from gradbench.data.preview import contact_sheet
    from gradbench.errors import HomeError

    task, source, splits = _splits(name, data, preset_name, seed, settings or [])
    title = f"{name} {task.version}, {source} data, seed {seed}"
    sheet = contact_sheet(task.objectives(), splits, title=title, count=count, seed=seed)
    path = out or Path(f"{name}.png")
    try:
        sheet.save(path, format="PNG")
    except OSError as error:
        raise HomeError(f"Expected to write {path}, found: {error.strerror or error}.") from error
    print(path)


def _splits(
    name: str, data: str, preset_name: str, seed: int, settings: list[str]
) -> tuple[TaskPair, Source, Splits]:
    """Return the task pair, where its data came from, and the data of one run."""
    given = parse_settings(settings)
    from gradbench.config import DATA, SEED, resolve_task
    from gradbench.data.inspection import size_of
    from gradbench.data.store import locate, sample_folder

    task, preset = resolve_task(name, preset_name, given)
    was_drawn = sample_folder(task, name).is_dir()
    start = time.monotonic()
    source, folder = locate(task, name, DATA.convert(data), _say)
    if source == "sample":
        how = "there" if was_drawn else f"drawn in {time.monotonic() - start:.0f} s"
        _say(f"sample data in {folder}, {size_of(folder) / MEGABYTE:.0f} MB, {how}")
    else:
        _say(f"real data in {folder}" if folder.is_dir() else "real data, which needs no files")
    splits = task.splits(source, folder, preset, SEED.convert(seed))
    splits.check()
    for note in splits.notes:
        _say(note)
    return task, source, splits


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _lines(found: dict[str, Any]) -> list[str]:
    """Return what was found as lines of text."""
    lines = []
    if (real := found["real"]) is not None:
        lines.append(f"real    {real['missing'] or 'nothing missing'}")
        lines.append(f"        looked for in {real['folder']}")
    if (sample := found["sample"]) is not None:
        drawn = sample["drawn"]
        size = f"drawn, {sample['bytes'] / MEGABYTE:.0f} MB" if drawn else "not drawn yet"
        lines.append(f"sample  {size}")
        lines.append(f"        {'in' if drawn else 'would be in'} {sample['folder']}")
    return lines
