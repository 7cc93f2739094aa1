"""`gradbench run`."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Annotated

import typer

from gradbench.errors import FieldError

if TYPE_CHECKING:
    from gradbench.result import RunFolder, RunResult
    from gradbench.runner import Outcome


def run(
    method: Annotated[str, typer.Option(help="A method, as `gradbench methods` lists them.")],
    task: Annotated[str, typer.Option(help="A task pair, as `gradbench tasks` lists them.")],
    seed: Annotated[int, typer.Option(help="Decides about everything that is drawn.")] = 0,
    backbone: Annotated[
        str | None, typer.Option(help="The shared trunk, any timm model. Default: the preset's.")
    ] = None,
    epochs: Annotated[
        int | None, typer.Option(help="Epochs of the first phase. Default: the preset's.")
    ] = None,
    data: Annotated[str, typer.Option(help="auto, real or sample.")] = "auto",
    preset: Annotated[str, typer.Option(help="The task's sizes and budget.")] = "default",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:N or mps.")] = "auto",
    precision: Annotated[str, typer.Option(help="fp32, fp64 or bf16.")] = "fp32",
    bn: Annotated[
        str | None,
        typer.Option(help="Whose batches batch norm follows: primary, shared or frozen."),
    ] = None,
    memory_format: Annotated[str, typer.Option(help="auto, contiguous or channels-last.")] = "auto",
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="KEY=VALUE",
            help="method.…, task.…, optimizer.…, budget.… or model.…, as `gradbench info` shows.",
        ),
    ] = None,
    allow_environment_change: Annotated[
        bool,
        typer.Option(
            "--allow-environment-change", help="Go on with a run that began in another environment."
        ),
    ] = False,
    tracking_uri: Annotated[
        str | None,
        typer.Option(help="An MLflow store, or none. Default: mlflow.db in $GRADBENCH_HOME."),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the record as JSON on stdout, nothing else.")
    ] = False,
    debug: Annotated[bool, typer.Option(help="Show tracebacks.")] = False,
) -> None:
    """Train a method on a task pair, test it once, keep the record."""
    given = parse_settings(settings or [])
    from gradbench.config import Request, with_shortcuts
    from gradbench.display import display
    from gradbench.runner import execute

    shortcuts = {"model.backbone": backbone, "budget.epochs": epochs, "model.batch_norm": bn}

    request = Request(
        method=method,
        task=task,
        seed=seed,
        data=data,
        preset=preset,
        device=device,
        precision=precision,
        memory_format=memory_format,
        allow_environment_change=allow_environment_change,
        tracking_uri=tracking_uri,
        settings=with_shortcuts(given, shortcuts),
    )
    with display() as shown:
        outcome = execute(request, shown)
    if as_json:
        print(json.dumps(outcome.result.as_json(), allow_nan=False))
    if outcome.error is not None:
        raise outcome.error
    if not as_json:
        _show(outcome)


def parse_settings(settings: list[str]) -> dict[str, object]:
    """Return the keys and values of ``--set KEY=VALUE``, each once."""
    given: dict[str, object] = {}
    for setting in settings:
        key, equals, value = setting.partition("=")
        if not equals or not key:
            raise FieldError(f"Expected --set KEY=VALUE, found {setting!r}.")
        if key.strip() in given:
            raise FieldError(f"Expected --set {key.strip()} once, found it twice.")
        given[key.strip()] = value
    return given


def _show(outcome: Outcome) -> None:
    from rich.console import Console
    from rich.panel import Panel
    from rich.table import Table

    result = outcome.result
    if outcome.repeated:
        print("This run has been made; here is its record.", file=sys.stderr)
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for name, value in _rows(result):
        table.add_row(name, value)
    for name, path in _places(outcome.folder):
        table.add_row(name, path)
    title = f"{result.method.name} on {result.task.name}"
    Console().print(Panel(table, title=title, title_align="left", expand=False))


def _places(folder: RunFolder) -> list[tuple[str, str]]:
    """Return where things are, those that exist."""
    places = [
        ("record", folder.result),
        ("predictions", folder.predictions),
        ("model", folder.weights),
        ("curves", folder.path / "figures" / "curves.png"),
    ]
    return [(name, str(path)) for name, path in places if path.exists()]


def _rows(result: RunResult) -> list[tuple[str, str]]:
    metric, cost, found = result.metric, result.cost, result.diagnostics
    metrics, selection = result.metrics, result.selection
    sizes = result.task.sizes
    rows = [
        ("method", f"{result.method.name} ({result.method.kind})"),
        (
            "task",
            f"{result.task.name} {result.task.version}, {result.task.source} data, seed "
            f"{result.seed}, {sizes.train} training examples",
        ),
    ]
    if metrics is not None and selection is not None:
        arrow = "higher" if metric.higher_is_better else "lower"
        for name, value in metrics.test.items():
            lead = f", {arrow} is better" if name == metric.name else ""
            rows.append((f"test {name}", f"{value:.4f}  ({sizes.test} examples{lead})"))
        value = metrics.validation[metric.name]
        rows.append((f"validation {metric.name}", f"{value:.4f}  ({sizes.validation} examples)"))
        where = f"{selection.phase}, epoch {selection.epoch}, step {selection.step}"
        rows.append(("selected", where))
    rows += [
        (
            "time",
            f"{_number(cost.wall_seconds, '.1f')} s, "
            f"{_number(cost.step_milliseconds_p50, '.1f')} ms a step",
        ),
        (
            "passes",
            f"{_number(cost.forward_passes, 'd')} forward, "
            f"{_number(cost.backward_passes, 'd')} backward",
        ),
        ("peak memory", f"{_number(cost.peak_memory_mb, '.0f')} MiB"),
        ("gradient cosine", _number(found.cosine, "+.3f")),
        ("conflict rate", _number(found.conflict_rate, ".3f")),
        (
            "good, bad, neutral share",
            ", ".join(
                _number(share, ".3f")
                for share in (found.good_share, found.bad_share, found.neutral_share)
            ),
        ),
        ("captured energy", _number(found.captured_energy, ".3f")),
    ]
    return rows


def _number(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)
