"""`gradbench methods`, `tasks`, `backbones` and `info`."""

from __future__ import annotations

import dataclasses
import inspect
import json
from typing import Annotated, Any

import typer

from gradbench import registry
from gradbench.errors import GradBenchError, PluginNotFoundError

AsJson = Annotated[bool, typer.Option("--json", help="Print a JSON list of objects.")]
Debug = Annotated[bool, typer.Option(help="Show tracebacks.")]

GROUPS = {
    "method": registry.METHODS,
    "task": registry.TASKS,
    "backbone": registry.BACKBONES,
}


def methods(as_json: AsJson = False, debug: Debug = False) -> None:
    """List the installed methods; none is imported."""
    _print(registry.METHODS, as_json)


def tasks(as_json: AsJson = False, debug: Debug = False) -> None:
    """List the installed task pairs; none is imported."""
    _print(registry.TASKS, as_json)


def backbones(
    pattern: Annotated[
        str | None,
        typer.Option("--all", metavar="PATTERN", help="Ask the providers, as in 'resnet*'."),
    ] = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """List where backbones come from, or with --all the backbones."""
    if pattern is None:
        _print(registry.BACKBONES, as_json)
        return
    from gradbench.backbones import BackboneProvider

    names = []
    for row in registry.listing(registry.BACKBONES):
        provider = registry.load_class(registry.BACKBONES, row.name, BackboneProvider).obj()
        names += [f"{row.name}:{name}" for name in provider.names(pattern)]
    if not names:
        raise GradBenchError(
            f"Expected a pattern that matches a backbone, found {pattern!r}; try 'resnet*'."
        )
    print(json.dumps(names) if as_json else "\n".join(names))


def info(
    name: Annotated[str, typer.Argument(help="A method, a task pair or a provider of backbones.")],
    debug: Debug = False,
) -> None:
    """Show what a plug-in is and what can be set."""
    found = [
        (noun, group)
        for noun, group in GROUPS.items()
        if name in {row.name for row in registry.listing(group)}
    ]
    if not found:
        known = [row.name for group in GROUPS.values() for row in registry.listing(group)]
        raise PluginNotFoundError("gradbench.plugins", name, known)
    for noun, group in found:
        plugin = registry.load(group, name)
        print(f"{name}: a {noun} of {plugin.distribution} {plugin.version}\n")
        print(f"{inspect.getdoc(plugin.obj) or 'No description.'}\n")
        for key, value in _facts(plugin.obj):
            print(f"{key}: {value}")
        _print_settings(noun, plugin.obj)


def _facts(cls: Any) -> list[tuple[str, object]]:
    """Return the class attributes that say what a plug-in is."""
    from gradbench.method import Method, kind_of
    from gradbench.task import TaskPair

    if not isinstance(cls, type):
        return []
    if issubclass(cls, Method):
        names: tuple[str, ...] = (
            "heads",
            "scale",
            "batches",
            "needs_meta",
            "absorbs_auxiliary_weight",
            "revision",
        )
        return [("kind", kind_of(cls)), *((name, getattr(cls, name)) for name in names)]
    if issubclass(cls, TaskPair):
        names = ("version", "revision", "citation", "licence")
        facts: list[tuple[str, object]] = [(name, getattr(cls, name)) for name in names]
        for name, preset in cls.presets.items():
            sizes = ", ".join(f"{key} {count}" for key, count in preset.sizes.items())
            facts.append((f"preset {name}", f"{preset.backbone}, {sizes}, {_plain(preset.budget)}"))
        return [*facts, ("sources", ", ".join(cls.sources))]
    return []


def _plain(settings: Any) -> str:
    return ", ".join(f"{key} {value}" for key, value in dataclasses.asdict(settings).items())


def _print_settings(noun: str, cls: Any) -> None:
    from gradbench.fields import fields_of

    if noun == "backbone":
        print("\nSettings: --backbone provider:name, --set model.weights=none|hub|PATH")
        return
    fields = fields_of(cls)
    print("\nSettings and their defaults:" if fields else "\nIt has no settings of its own.")
    for field in fields.values():
        parts = [field.help, field.expected]
        if field.search is not None:
            parts.append(f"tuned over {field.search}")
        print(f"  --set {noun}.{field.name}={field.default}")
        print(f"      {'; '.join(part for part in parts if part)}")
    for name, choice in getattr(cls, "joint_search", {}).items():
        print(f"  {name}, a joint dimension of tuning: {choice}")


def _print(group: str, as_json: bool) -> None:
    rows = registry.listing(group)
    if as_json:
        print(json.dumps([dataclasses.asdict(row) for row in rows]))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for title in ("name", "kind", "summary", "from"):
        table.add_column(title, overflow="fold", no_wrap=title == "name")
    for row in rows:
        kind = row.kind or ("–" if row.status == "listed" else row.status)
        table.add_row(row.name, kind, row.summary, f"{row.distribution} {row.version}")
    Console().print(table)
