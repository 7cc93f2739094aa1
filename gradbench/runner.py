"""One run: a request in, a record and its folder out."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from filelock import FileLock, Timeout

from gradbench.build import Built, build
from gradbench.config import DATA, Request, RunConfig, resolve, run_id, with_shortcuts
from gradbench.data.store import locate
from gradbench.display import Display
from gradbench.environment import fingerprint, resolve_device
from gradbench.errors import (
    EnvironmentChangedError,
    HomeError,
    PluginError,
)
from gradbench.execution import Execution, now
from gradbench.fields import locations_of
from gradbench.files import make_folder
from gradbench.method import Plan, kind_of
from gradbench.result import (
    PROTOCOL,
    BackboneRecord,
    Cost,
    Diagnostics,
    Environment,
    MethodRecord,
    MetricRecord,
    RunFolder,
    RunResult,
    Sizes,
    TaskRecord,
    runs_folder,
)
from gradbench.task import Objective, Source, Splits
from gradbench.tracking import store_uri
from gradbench.training.checkpoint import Checkpoints


@dataclass(frozen=True)
class Outcome:
    """What a run came to: its record, its folder, and the error that ended it, if any."""

    result: RunResult
    folder: RunFolder
    repeated: bool  # the record was there already
    error: BaseException | None


def run(
    method: str,
    task: str,
    *,
    seed: int = 0,
    backbone: str | None = None,
    epochs: int | None = None,
    data: str = "auto",
    preset: str = "default",
    device: str = "auto",
    precision: str = "fp32",
    settings: Mapping[str, object] | None = None,
    allow_environment_change: bool = False,
    tracking_uri: str | None = None,
    say: Callable[[str], None] | None = None,
) -> RunResult:
    """Train one method on one task pair, and return the record.

    ``settings`` are what ``--set`` takes on the command line, ``{"method.rank": 20}``; ``say``
    receives a line of progress an epoch. A run that has ended well is not repeated.

    Raises:
        GradBenchError: one subclass a cause; its message says what to do.
    """
    shortcuts = {"model.backbone": backbone, "budget.epochs": epochs}
    outcome = execute(
        Request(
            method=method,
            task=task,
            seed=seed,
            data=data,
            preset=preset,
            device=device,
            precision=precision,
            settings=with_shortcuts(settings or {}, shortcuts),
            allow_environment_change=allow_environment_change,
            tracking_uri=tracking_uri,
        ),
        Display(say or (lambda line: None)),
    )
    if outcome.error is not None:
        raise outcome.error
    return outcome.result


def execute(request: Request, display: Display) -> Outcome:
    """Make the run that is asked for, or find it made.

    Raises:
        GradBenchError: where the request can not become a run; nothing is written then.
    """
    config = resolve(request)
    device, warning = resolve_device(request.device)
    if warning is not None:
        display.say(f"warning: {warning}")
    wanted = DATA.convert(request.data)
    source, data = locate(config.task, config.task_plugin.name, wanted, display.say)
    splits = config.task.splits(source, data, config.preset, config.seed)
    if config.method.needs_meta:
        splits = splits.with_meta(config.seed)
    splits.check()
    objectives = config.task.objectives()
    if len(objectives) != 1 + len(splits.auxiliaries):
        raise PluginError(
            f"Expected {len(objectives)} training sets from task {request.task!r}, one an "
            f"objective, found {1 + len(splits.auxiliaries)}."
        )
    _check_phases(config, len(objectives))
    built = build(
        config.architecture,
        objectives,
        config.task.input,
        seed=config.seed,
        precision=config.precision,
        device=device,
        memory_format=request.memory_format,
    )
    identity = config.identity(
        source, splits.data_digest, built.weights_digest, splits.files_digest
    )
    root = runs_folder()
    make_folder(root)
    folder = RunFolder(root / run_id(identity))
    make_folder(folder.path)
    with _alone(folder):
        folder.check_config(identity)
        found = folder.read()
        if found is not None and found.status == "ok":
            return Outcome(found, folder, repeated=True, error=None)
        environment = fingerprint(device, built.channels_last)
        checkpoint = Checkpoints(folder.checkpoints).load(device, display.say)
        if checkpoint is not None:
            changes = _changes(checkpoint["environment"], environment)
            if changes and not request.allow_environment_change:
                raise EnvironmentChangedError(
                    f"Expected the environment in which this run began, found {changes}. Go back "
                    "to it for the same bits, or go on with --allow-environment-change."
                )
            environment["changed"] = changes or None
        draft = _draft(config, identity, splits, objectives, built, source, folder.path.name)
        draft = draft.model_copy(
            update={
                "environment": environment,
                "attempts": 1 if found is None else found.attempts + 1,
                "started": draft.started if found is None else found.started,
            }
        )
        execution = {
            "device": str(device),
            "memory_format": environment["memory_format"],
            "locations": locations_of(config.task),
        }
        folder.write_config({"identity": identity, "execution": execution})
        folder.write(draft)  # says "interrupted" until the run says otherwise
        result, error = Execution(
            config,
            objectives,
            splits,
            built.model,
            device,
            folder,
            draft,
            checkpoint,
            store_uri(request.tracking_uri),
            display,
        ).run()
        return Outcome(result, folder, repeated=False, error=error)


def _check_phases(config: RunConfig, objectives: int) -> None:
    """Let the method refuse a budget before anything is written."""
    budget = config.budget
    plan = Plan(objectives, budget.steps_per_epoch, budget.epochs, budget.fine_tune_epochs)
    config.method.phases(plan)


def _changes(before: Environment, after: Environment) -> str:
    """Say what differs between two environments; nothing if they repeat each other's bits."""
    return ", ".join(
        f"{name} {before.get(name)} → {after[name]}"
        for name in after
        if name != "changed" and before.get(name) != after[name]
    )


def _draft(
    config: RunConfig,
    identity: dict[str, Any],
    splits: Splits,
    objectives: tuple[Objective, ...],
    built: Built,
    source: Source,
    name: str,
) -> RunResult:
    """Return the record of a run that has just begun."""
    method, task, primary = config.method_plugin, config.task_plugin, objectives[0]
    return RunResult(
        protocol=PROTOCOL,
        run_id=name,
        status="interrupted",
        error=None,
        started=now(),
        ended=None,
        attempts=1,
        seed=config.seed,
        config=identity,
        task=TaskRecord(
            name=task.name,
            version=config.task.version,
            revision=config.task.revision,
            preset=config.preset_name,
            source=source,
            data_digest=splits.data_digest,
            split_digest=splits.digest(),
            sizes=Sizes(**splits.sizes()),
            distribution=task.distribution,
            distribution_version=task.version,
        ),
        method=MethodRecord(
            name=method.name,
            kind=kind_of(config.method),
            revision=config.method.revision,
            fields=dataclasses.asdict(config.method),
            distribution=method.distribution,
            distribution_version=method.version,
        ),
        backbone=BackboneRecord(
            name=config.architecture.backbone,
            weights_digest=built.weights_digest,
            parameters=sum(p.numel() for p in built.model.backbone.parameters()),
        ),
        metric=MetricRecord(
            name=next(iter(primary.metrics())),
            higher_is_better=primary.higher_is_better,
            margin=primary.margin,
        ),
        selection=None,
        metrics=None,
        cost=Cost(),
        diagnostics=Diagnostics(),
        environment={},
    )


@contextlib.contextmanager
def _alone(folder: RunFolder) -> Iterator[None]:
    """Keep other processes out of a run folder.

    Raises:
        HomeError: if one is in it.
    """
    lock = FileLock(folder.path / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise HomeError(
            f"Expected {folder.path} to be free, found another process making this very run; "
            "wait for it."
        ) from error
    try:
        yield
    finally:
        lock.release()
