"""Figures of one run."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import matplotlib as mpl
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from gradbench.result import RunFolder, RunResult

SHARES = ("good_share", "neutral_share", "bad_share", "captured_energy")
RELATIONS = ("cosine", "conflict_rate")


def draw_run(folder: RunFolder, result: RunResult) -> list[Path]:
    """Draw the curves of a run and, where its method has any, the gradient diagnostics."""
    rows = [json.loads(line) for line in folder.metrics.read_text("utf-8").splitlines()]
    if not rows:
        return []
    with mpl.rc_context(), sns.axes_style("whitegrid"), sns.color_palette("colorblind"):
        paths = [_save(_curves(rows, result), folder, "curves.png")]
        if any(row["diagnostics"] for row in rows):
            paths.append(_save(_diagnostics(rows, result), folder, "gradients.png"))
    return paths


def _curves(rows: list[dict[str, Any]], result: RunResult) -> Figure:
    figure = Figure(figsize=(8.5, 5.5), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True)
    metric = result.metric.name
    values = _long(rows, "validation", (metric,))
    sns.lineplot(values, x="step", y="value", ax=above, marker="o", markersize=4)
    above.set(ylabel=f"validation {metric}", title=_title(result))
    if result.selection is not None:
        above.axvline(result.selection.step, color="0.3", linestyle=":", label="selected")
        above.legend(loc="best")
    names = tuple(dict.fromkeys(name for row in rows for name in row["losses"]))
    losses = _long(rows, "losses", names)
    sns.lineplot(losses, x="step", y="value", hue="name", style="name", ax=below)
    below.set(ylabel="training loss", xlabel="step", yscale="log")
    _legend_beside(below)
    _mark_phases(rows, (above, below))
    return figure


def _diagnostics(rows: list[dict[str, Any]], result: RunResult) -> Figure:
    present = {name for row in rows for name in row["diagnostics"]}
    groups = [tuple(n for n in names if n in present) for names in (RELATIONS, SHARES)]
    groups = [names for names in groups if names]
    figure = Figure(figsize=(8.5, 2.8 * len(groups)), layout="constrained")
    for ax, names in zip(figure.subplots(len(groups), 1, squeeze=False)[:, 0], groups, strict=True):
        values = _long(rows, "diagnostics", names)
        sns.lineplot(values, x="step", y="value", hue="name", style="name", ax=ax)
        ax.set(ylabel="", xlabel="step", ylim=(-1.05 if names[0] == "cosine" else -0.05, 1.05))
        _legend_beside(ax)
    figure.suptitle(_title(result))
    return figure


def _long(rows: list[dict[str, Any]], part: str, names: tuple[str, ...]) -> pd.DataFrame:
    found = [
        {"step": row["step"], "name": name.replace("_", " "), "value": row[part][name]}
        for row in rows
        for name in names
        if name in row[part]
    ]
    return pd.DataFrame(found)


def _mark_phases(rows: list[dict[str, Any]], axes: tuple[Axes, ...]) -> None:
    for before, after in itertools.pairwise(rows):
        if before["phase"] != after["phase"]:
            for ax in axes:
                ax.axvline(before["step"], color="0.6", linewidth=1)


def _legend_beside(ax: Axes) -> None:
    sns.move_legend(ax, "center left", bbox_to_anchor=(1.01, 0.5), title=None, frameon=False)


def _title(result: RunResult) -> str:
    return f"{result.method.name} on {result.task.name} ({result.task.source}), seed {result.seed}"


def _save(figure: Figure, folder: RunFolder, name: str) -> Path:
    path = folder.path / "figures" / name
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, dpi=120)
    return path
