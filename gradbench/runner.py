"""One run: a request in, a record and its folder out."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout

from gradbench import registry
from gradbench.backbones import BackboneProvider, split_name
from gradbench.config import DATA, Request, RunConfig, resolve, run_id, with_shortcuts
from gradbench.data.store import locate
from gradbench.environment import fingerprint, resolve_device
from gradbench.errors import (
    ContractError,
    FieldError,
    GradBenchError,
    HomeError,
    NonFiniteLossError,
    OutOfMemoryError,
    PluginError,
)
from gradbench.files import make_folder
from gradbench.method import Branching, kind_of
from gradbench.model import Model, initialised_from, weights_digest
from gradbench.result import (
    PROTOCOL,
    BackboneRecord,
    Cost,
    Diagnostics,
    Failure,
    MethodRecord,
    MetricRecord,
    Metrics,
    RunFolder,
    RunResult,
    SelectionRecord,
    Sizes,
    Status,
    TaskRecord,
)
from gradbench.task import Objective, Source, Splits
from gradbench.training.evaluation import evaluate
from gradbench.training.loop import Epoch, Place, Recipe, Training

LITTLE_ENERGY = 0.1  # below it the basis says little about the primary gradient

Say = Callable[[str], None]


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
    say: Say | None = None,
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
        ),
        say or (lambda line: None),
    )
    if outcome.error is not None:
        raise outcome.error
    return outcome.result


def home() -> Path:
    """Return the folder that holds the runs."""
    return Path(os.environ.get("GRADBENCH_HOME") or ".gradbench")


def execute(request: Request, say: Say) -> Outcome:
    """Make the run that is asked for, or find it made.

    Raises:
        GradBenchError: where the request can not become a run; nothing is written then.
    """
    config = resolve(request)
    if isinstance(config.method, Branching):
        raise ContractError(
            f"Expected a method that acts in every step, found {request.method!r}, which trains "
            "branches of the weights; the training loop of this version can not run it."
        )
    device, warning = resolve_device(request.device)
    for line in [warning] if warning else []:
        say(f"warning: {line}")
    wanted = DATA.convert(request.data)
    source, folder = locate(config.task, config.task_plugin.name, wanted, say)
    splits = config.task.splits(source, folder, config.preset, config.seed)
    if config.method.needs_meta:
        splits = splits.with_meta(config.seed)
    splits.check()
    objectives = config.task.objectives()
    if len(objectives) != 1 + len(splits.auxiliaries):
        raise PluginError(
            f"Expected {len(objectives)} training sets from task {request.task!r}, one an "
            f"objective, found {1 + len(splits.auxiliaries)}."
        )
    model, digest, channels_last = _build(config, objectives, device, request.memory_format)
    identity = config.identity(source, splits.data_digest, digest)
    root = home() / "runs"
    make_folder(root)
    run_folder = RunFolder(root / run_id(identity))
    make_folder(run_folder.path)
    with _alone(run_folder):
        found = run_folder.read()
        if found is not None and found.status == "ok":
            return Outcome(found, run_folder, repeated=True, error=None)
        draft = _draft(config, identity, splits, objectives, model, digest, source, run_folder)
        environment = fingerprint(device, channels_last)
        attempts = 1 if found is None else found.attempts + 1
        draft = draft.model_copy(update={"environment": environment, "attempts": attempts})
        execution = {"device": str(device), "memory_format": environment["memory_format"]}
        run_folder.write_config({"identity": identity, "execution": execution})
        run_folder.metrics.unlink(missing_ok=True)
        run_folder.write(draft)  # says "interrupted" until the run says otherwise
        return _Execution(config, objectives, splits, model, device, run_folder, draft, say).run()


class _Execution:
    """Trains, tests and records; whatever happens, the record says so."""

    def __init__(
        self,
        config: RunConfig,
        objectives: tuple[Objective, ...],
        splits: Splits,
        model: Model,
        device: torch.device,
        folder: RunFolder,
        draft: RunResult,
        say: Say,
    ) -> None:
        self.config, self.objectives, self.splits = config, objectives, splits
        self.model, self.device, self.folder, self.draft = model, device, folder, draft
        self._log: list[str] = []
        self._shown = say
        recipe = Recipe(
            method=config.method,
            method_name=config.method_plugin.name,
            scale=config.scale,
            auxiliary_weight=config.task.auxiliary_weight,
            optimizer=config.optimizer,
            budget=config.budget,
            architecture=config.architecture,
            precision=config.precision,
            seed=config.seed,
        )
        self.training = Training(model, objectives, splits.for_training(), recipe, device, self)

    def run(self) -> Outcome:
        self._announce()
        status: Status = "ok"
        error: BaseException | None = None
        update: dict[str, Any] = {}
        try:
            with _own_generators(self.device), _deterministic(self.device):
                update = self._train_and_test()
        except NonFiniteLossError as caught:
            status, error = "nan", caught
        except (torch.OutOfMemoryError, MemoryError) as caught:
            status, error = "oom", _out_of_memory(caught)
        except KeyboardInterrupt as caught:
            status, error = "interrupted", caught
        except Exception as caught:  # whatever a plug-in raised is recorded, then raised again
            status, error = "failed", _as_ours(caught, self.config)
        update["status"] = status
        update["ended"] = _now()
        update["cost"] = self.training.costs.summary(self.device)
        if error is not None:
            update["error"] = _failure(error, self.training.place)
        result = self.draft.model_copy(update=update)
        self.folder.write(result)
        return Outcome(result, self.folder, repeated=False, error=error)

    def _train_and_test(self) -> dict[str, Any]:
        config, primary = self.config, self.objectives[0]
        selection = self.training.run()
        evaluations = {
            name: evaluate(self.model, primary, examples, self.device, config.precision)
            for name, examples in (
                ("validation", self.splits.validation),
                ("test", self.splits.test),
            )
        }
        self.folder.write_predictions(evaluations)
        found = self.training.diagnostics
        diagnostics = Diagnostics(
            **{name: found[name] for name in Diagnostics.model_fields if name in found}
        )
        energy = diagnostics.captured_energy
        if energy is not None and energy < LITTLE_ENERGY:
            self._say(
                f"warning: the basis holds {energy:.1%} of the primary gradient's energy, so that "
                "what it calls neutral is not; try --set method.anchor_probe=true or a larger "
                "--set method.rank"
            )
        return {
            "selection": SelectionRecord(
                phase=selection.phase, epoch=selection.epoch, step=selection.step
            ),
            "metrics": Metrics(
                validation=evaluations["validation"].metrics, test=evaluations["test"].metrics
            ),
            "diagnostics": diagnostics,
        }

    def epoch(self, epoch: Epoch) -> None:
        """Write one epoch to the run folder, and show it."""
        row = {"time": _now(), **dataclasses.asdict(epoch)}
        with self.folder.metrics.open("a", encoding="utf-8") as lines:
            lines.write(json.dumps(row) + "\n")
        losses = " | ".join(f"{name} {value:.3f}" for name, value in epoch.losses.items())
        metric, value = next(iter(epoch.validation.items()))
        self._say(
            f"{epoch.phase:<10} {epoch.epoch:>3}/{epoch.epochs:<3} step {epoch.step:>5}   "
            f"loss {losses}   validation {metric} {value:.3f}{' *' if epoch.best else '  '} "
            f"{epoch.steps_per_second:6.1f} steps/s"
        )

    def _announce(self) -> None:
        config, sizes = self.config, self.splits.sizes()
        parts = [f"{name} {count}" for name, count in sizes.items() if count]
        parts += [f"auxiliary {len(part)}" for part in self.splits.auxiliaries]
        shared = sum(p.numel() for p in self.model.shared.parameters())
        source = self.draft.task.source
        self._say(f"{config.method_plugin.name} on {config.task_plugin.name}, seed {config.seed}")
        self._say(f"  data   {source}: {', '.join(parts)}")
        self._say(
            f"  model  {config.architecture.backbone}, {shared / 1e6:.2f} M shared parameters, "
            f"{self.device}, {torch.get_num_threads()} threads"
        )
        self._say(f"  run    {self.folder.path}")

    def _say(self, line: str) -> None:
        with self.folder.log.open("a", encoding="utf-8") as log:
            log.write(f"{_now()} {line}\n")
        self._shown(line)


def _build(
    config: RunConfig,
    objectives: tuple[Objective, ...],
    device: torch.device,
    memory_format: str,
) -> tuple[Model, str | None, bool]:
    """Return the model, the digest of loaded weights, and whether it is channels-last."""
    if memory_format not in ("auto", "contiguous", "channels-last"):
        raise FieldError(
            f"Expected memory format auto, contiguous or channels-last, found {memory_format!r}."
        )
    architecture = config.architecture
    provider_name, name = split_name(architecture.backbone)
    provider = registry.load_class(registry.BACKBONES, provider_name, BackboneProvider).obj()
    with initialised_from(config.seed, "backbone"):
        backbone = provider.create(name, config.task.input, architecture.weights)
    loaded = architecture.weights != "none"
    digest = weights_digest(backbone.module.state_dict()) if loaded else None
    with initialised_from(config.seed, "heads"):
        model = Model(backbone.module, objectives, backbone.width, architecture.dropout)
    model.to(device, torch.float64 if config.precision == "fp64" else torch.float32)
    channels_last = memory_format == "channels-last" or (
        memory_format == "auto" and device.type == "cuda"
    )
    if channels_last:
        model.to(memory_format=torch.channels_last)
    return model, digest, channels_last


def _draft(
    config: RunConfig,
    identity: dict[str, Any],
    splits: Splits,
    objectives: tuple[Objective, ...],
    model: Model,
    digest: str | None,
    source: Source,
    folder: RunFolder,
) -> RunResult:
    """Return the record of a run that has just begun."""
    method, task, primary = config.method_plugin, config.task_plugin, objectives[0]
    return RunResult(
        protocol=PROTOCOL,
        run_id=folder.path.name,
        status="interrupted",
        error=None,
        started=_now(),
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
            weights_digest=digest,
            parameters=sum(p.numel() for p in model.backbone.parameters()),
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


@contextlib.contextmanager
def _own_generators(device: torch.device) -> Iterator[None]:
    """Leave the caller's global generators as they were."""
    devices = [device.index or 0] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        yield


@contextlib.contextmanager
def _deterministic(device: torch.device) -> Iterator[None]:
    """Use deterministic kernels on a GPU; on a CPU the ones in use are."""
    if device.type != "cuda":
        yield
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS asks for it by name
    before = torch.are_deterministic_algorithms_enabled()
    benchmark = torch.backends.cudnn.benchmark
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.backends.cudnn.benchmark = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)
        torch.backends.cudnn.benchmark = benchmark


def _out_of_memory(error: BaseException) -> OutOfMemoryError:
    wrapped = OutOfMemoryError(
        f"Expected the run to fit into memory, found {str(error).splitlines()[0] or 'none left'}. "
        "Try a smaller --set budget.batch_size=…, a smaller --backbone, or --precision bf16."
    )
    wrapped.__cause__ = error
    return wrapped


def _as_ours(error: Exception, config: RunConfig) -> GradBenchError:
    """Return a foreign exception as one of ours that says whose plug-ins were at work."""
    if isinstance(error, GradBenchError):
        return error
    last = traceback.extract_tb(error.__traceback__)[-1]
    plugins = ", ".join(
        f"{plugin.name} ({plugin.distribution} {plugin.version})"
        for plugin in (config.method_plugin, config.task_plugin)
    )
    wrapped = PluginError(
        f"Expected the run to end, found {type(error).__name__}: {error} "
        f"(in {last.name}, line {last.lineno} of {Path(last.filename).name}; plug-ins: {plugins}). "
        "Run again with --debug for the traceback."
    )
    wrapped.__cause__ = error
    return wrapped


def _failure(error: BaseException, place: Place) -> Failure:
    cause = error.__cause__ or error
    if isinstance(error, NonFiniteLossError):
        place = Place(error.phase, error.step, error.objective)
    return Failure(
        type=type(cause).__name__,
        message=str(error) or type(error).__name__,
        phase=place.phase,
        step=place.step,
        objective=place.objective,
    )


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")
