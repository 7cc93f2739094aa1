"""From what a user asks for to what a run is: names resolved, every setting checked."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar, cast

from gradbench import registry
from gradbench.backbones import split_name
from gradbench.errors import FieldError, UnknownKeyError
from gradbench.fields import Field, Valid, convert_all, fields_of, identity_of
from gradbench.method import Method, Scale
from gradbench.registry import Plugin
from gradbench.result import PROTOCOL
from gradbench.settings import Architecture, Budget, Optimizer, Precision
from gradbench.task import Preset, Source, TaskPair

SCALE = Field(
    "scale", Literal["paper", "sum"], "paper", None, None, "length of the direction: paper or sum"
)
SEED = Field("seed", int, 0, Valid(0, 2**63 - 1), None, "decides about everything that is drawn")
PRECISION = Field("precision", Precision, "fp32", None, None, "of the forward passes")
DATA = Field("data", Literal["auto", "real", "sample"], "auto", None, None, "where data comes from")

Settings = TypeVar("Settings")

GROUPS = ("method", "task", "optimizer", "budget", "model")


@dataclass(frozen=True)
class Request:
    """What a user asks for; ``settings`` are the ``--set`` keys and their values."""

    method: str
    task: str
    seed: int = 0
    data: str = "auto"
    preset: str = "default"
    device: str = "auto"
    precision: str = "fp32"
    memory_format: str = "auto"
    allow_environment_change: bool = False
    tracking_uri: str | None = None
    settings: Mapping[str, object] = field(default_factory=dict)


@dataclass(frozen=True)
class RunConfig:
    """What a run is, resolved and checked."""

    method_plugin: Plugin
    method: Method
    scale: Scale
    task_plugin: Plugin
    task: TaskPair
    preset_name: str
    preset: Preset
    optimizer: Optimizer
    budget: Budget
    architecture: Architecture
    precision: Precision
    seed: int

    def identity(
        self,
        source: Source,
        data_digest: str,
        weights_digest: str | None,
        files_digest: str | None = None,
    ) -> dict[str, Any]:
        """Return what a result depends on, as JSON values."""
        model = dataclasses.asdict(self.architecture)
        del model["weights"]  # a path or a wish; its digest says what it was
        return {
            "protocol": PROTOCOL,
            "task": {
                "name": self.task_plugin.name,
                "version": self.task.version,
                "revision": self.task.revision,
                "preset": self.preset_name,
                "sizes": dict(self.preset.sizes),
                "source": source,
                "data_digest": data_digest,
                "files_digest": files_digest,
                "fields": identity_of(self.task),
            },
            "method": {
                "name": self.method_plugin.name,
                "revision": self.method.revision,
                "scale": self.scale,
                "fields": identity_of(self.method),
            },
            "optimizer": dataclasses.asdict(self.optimizer),
            "budget": dataclasses.asdict(self.budget),
            "model": {**model, "weights_digest": weights_digest},
            "precision": self.precision,
            "seed": self.seed,
        }


def run_id(identity: Mapping[str, Any]) -> str:
    """Return the name of the run that an identity decides about."""
    canonical = json.dumps(identity, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(canonical.encode()).hexdigest()[:16]


def resolve(request: Request) -> RunConfig:
    """Load the plug-ins that a request names and check every setting.

    Raises:
        PluginNotFoundError, PluginError: if a name is not installed, or what it names is broken.
        UnknownKeyError, FieldError: if a setting does not exist or is not accepted.
    """
    method_plugin = registry.load_class(registry.METHODS, request.method, Method)
    task_plugin = registry.load_class(registry.TASKS, request.task, TaskPair)
    preset = _preset(task_plugin, request.preset)
    settings = {**preset.settings, **request.settings}
    groups = _by_group(settings, method_plugin.obj, task_plugin.obj)
    scale = SCALE.convert(groups["method"].pop("scale", "paper"), "method")
    method = method_plugin.obj(**convert_all(method_plugin.obj, groups["method"], "method"))
    task = task_plugin.obj(**convert_all(task_plugin.obj, groups["task"], "task"))
    if method.absorbs_auxiliary_weight and task.auxiliary_weight != 1:
        raise FieldError(
            f"Expected task.auxiliary_weight to be 1 with method {request.method!r}, which gives "
            f"it no meaning, found {task.auxiliary_weight:g}; leave it out."
        )
    architecture = _changed(Architecture(backbone=preset.backbone), groups["model"], "model")
    backbone = ":".join(split_name(architecture.backbone))  # one name, with or without provider
    return RunConfig(
        method_plugin=method_plugin,
        method=method,
        scale=scale,
        task_plugin=task_plugin,
        task=task,
        preset_name=request.preset,
        preset=preset,
        optimizer=_changed(preset.optimizer, groups["optimizer"], "optimizer"),
        budget=_changed(preset.budget, groups["budget"], "budget"),
        architecture=dataclasses.replace(architecture, backbone=backbone),
        precision=PRECISION.convert(request.precision),
        seed=SEED.convert(request.seed),
    )


def resolve_task(
    name: str, preset_name: str, settings: Mapping[str, object]
) -> tuple[TaskPair, Preset]:
    """Return a task pair with its own settings, and a preset of it, for looking at its data.

    Raises:
        PluginNotFoundError, PluginError: if the task is not installed or broken.
        UnknownKeyError, FieldError: if a setting does not exist or is not accepted.
    """
    plugin = registry.load_class(registry.TASKS, name, TaskPair)
    preset = _preset(plugin, preset_name)
    known = [f"task.{field}" for field in fields_of(plugin.obj)]
    for key in settings:
        if key not in known:
            raise UnknownKeyError(key, known)
    given = {**preset.settings, **settings}
    values = {key.removeprefix("task."): given[key] for key in known if key in given}
    return plugin.obj(**convert_all(plugin.obj, values, "task")), preset


def with_shortcuts(
    settings: Mapping[str, object], shortcuts: Mapping[str, object]
) -> dict[str, object]:
    """Return ``settings`` and those ``shortcuts`` that are not None.

    Raises:
        FieldError: if a key is given both ways.
    """
    given = {key: value for key, value in shortcuts.items() if value is not None}
    for key in given:
        if key in settings:
            raise FieldError(f"Expected {key} once, found it as an option and in the settings.")
    return {**settings, **given}


def known_keys(method: type, task: type) -> list[str]:
    """Return every key that ``--set`` accepts for this method and task."""
    owners = (method, task, Optimizer, Budget, Architecture)
    keys = [
        f"{group}.{name}"
        for group, owner in zip(GROUPS, owners, strict=True)
        for name in fields_of(owner)
    ]
    return ["method.scale", *keys]


def _preset(task: Plugin, name: str) -> Preset:
    presets: Mapping[str, Preset] = task.obj.presets
    if name not in presets:
        raise FieldError(
            f"Expected a preset of {task.name!r} ({', '.join(presets)}), found {name!r}."
        )
    return presets[name]


def _by_group(
    settings: Mapping[str, object], method: type, task: type
) -> dict[str, dict[str, object]]:
    known = set(known_keys(method, task))
    groups: dict[str, dict[str, object]] = {group: {} for group in GROUPS}
    for key, value in settings.items():
        if key not in known:
            raise UnknownKeyError(key, sorted(known))
        group, _, name = key.partition(".")
        groups[group][name] = value
    return groups


def _changed(settings: Settings, values: Mapping[str, object], owner: str) -> Settings:
    converted = convert_all(type(settings), values, owner)
    return cast("Settings", dataclasses.replace(cast("Any", settings), **converted))
