"""One run under way: trained, tested and recorded, whatever happens."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import time
import traceback
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from gradbench.config import RunConfig
from gradbench.display import Display
from gradbench.errors import (
    GradBenchError,
    NonFiniteLossError,
    OutOfMemoryError,
    PluginError,
)
from gradbench.files import replacing
from gradbench.model import Model
from gradbench.result import (
    Diagnostics,
    Failure,
    Metrics,
    RunFolder,
    RunResult,
    SelectionRecord,
    Status,
)
from gradbench.task import Objective, Splits
from gradbench.tracking import mirror_or_warn
from gradbench.training.checkpoint import Checkpoints
from gradbench.training.evaluation import evaluate
from gradbench.training.loop import Training
from gradbench.training.recipe import Epoch, Place, Recipe

MIRROR_EVERY = 60  # seconds between two looks that the tracking store gets at a run under way
LITTLE_ENERGY = 0.1  # below it the basis says little about the primary gradient


class Execution:
    """Trains, tests and records; whatever happens, the record says so.

    ``checkpoint`` is where an earlier attempt got to, or None.
    """

    def __init__(
        self,
        config: RunConfig,
        objectives: tuple[Objective, ...],
        splits: Splits,
        model: Model,
        device: torch.device,
        folder: RunFolder,
        draft: RunResult,
        checkpoint: dict[str, Any] | None,
        tracking_uri: str,
        display: Display,
    ) -> None:
        self.config, self.objectives, self.splits = config, objectives, splits
        self.model, self.device, self.folder, self.draft = model, device, folder, draft
        self._checkpoint, self._display = checkpoint, display
        self._tracking_uri, self._mirrored = tracking_uri, time.monotonic()
        self._checkpoints = Checkpoints(folder.checkpoints)
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
        self.training = Training(
            model, objectives, splits.for_training(), recipe, device, self, self._save
        )

    def run(self) -> tuple[RunResult, BaseException | None]:
        """Return the record, which has been written, and the error that ended the run, if any."""
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
        update["ended"] = now()
        update["cost"] = self.training.costs.summary(self.device)
        if error is not None:
            update["error"] = _failure(error, self.training.place)
        result = self.draft.model_copy(update=update)
        self.folder.write(result)
        if status == "ok":
            self._checkpoints.remove()
        if status != "interrupted":
            mirror_or_warn(self.folder, self._tracking_uri, self._say)
        return result, error

    def _train_and_test(self) -> dict[str, Any]:
        config, primary = self.config, self.objectives[0]
        if self._checkpoint is None:
            self.folder.keep_epochs(0)
            selection = self.training.run()
        else:
            self.folder.keep_epochs(self._checkpoint["training"]["epochs_seen"])
            selection = self.training.run(self._checkpoint["training"])
        evaluations = {
            name: evaluate(
                self.model,
                primary,
                examples,
                self.device,
                config.precision,
                name,
                phase=selection.phase,
                step=selection.step - 1,
            )
            for name, examples in (
                ("validation", self.splits.validation),
                ("test", self.splits.test),
            )
        }
        self.folder.write_predictions(evaluations)
        with replacing(self.folder.weights) as temporary:
            state = self.model.state_dict()
            save_file({name: value.cpu().contiguous() for name, value in state.items()}, temporary)
        found = self.training.diagnostics
        diagnostics = Diagnostics(
            **{name: found[name] for name in Diagnostics.model_fields if name in found}
        )
        self._warn_of_little_energy(diagnostics.captured_energy)
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
        self.folder.add_epoch({"time": now(), **dataclasses.asdict(epoch)})
        losses = " | ".join(f"{name} {value:.3f}" for name, value in epoch.losses.items())
        metric, value = next(iter(epoch.validation.items()))
        self._say(
            f"{epoch.phase:<10} {epoch.epoch:>3}/{epoch.epochs:<3} step {epoch.step:>5}   "
            f"loss {losses}   validation {metric} {value:.3f}{' *' if epoch.best else '  '} "
            f"{epoch.steps_per_second:6.1f} steps/s"
        )
        self._display.epoch(epoch, metric)
        if time.monotonic() - self._mirrored > MIRROR_EVERY:
            mirror_or_warn(self.folder, self._tracking_uri, self._say)
            self._mirrored = time.monotonic()

    def plan(self, steps: int, done: int) -> None:
        """Pass on how many steps there are at most, and how many an earlier attempt made."""
        self._display.plan(steps, done)

    def step(self, phase: str) -> None:
        """Pass on that a step was made."""
        self._display.step(phase)

    def _save(self, state: dict[str, Any]) -> None:
        self._checkpoints.save({"training": state, "environment": self.draft.environment})

    def _announce(self) -> None:
        config, sizes = self.config, self.splits.sizes()
        parts = [f"{name} {count}" for name, count in sizes.items() if count]
        parts += [f"auxiliary {len(part)}" for part in self.splits.auxiliaries]
        shared = sum(p.numel() for p in self.model.shared.parameters())
        self._say(f"{config.method_plugin.name} on {config.task_plugin.name}, seed {config.seed}")
        self._say(f"  data   {self.draft.task.source}: {', '.join(parts)}")
        for note in self.splits.notes:
            self._say(f"  split  {note}")
        self._say(
            f"  model  {config.architecture.backbone}, {shared / 1e6:.2f} M shared parameters, "
            f"{self.device}, {torch.get_num_threads()} threads"
        )
        self._say(f"  run    {self.folder.path}")
        if self._checkpoint is not None:
            done = self._checkpoint["training"]["epochs_seen"]
            self._say(f"  goes on after {done} epochs of an earlier attempt")

    def _warn_of_little_energy(self, energy: float | None) -> None:
        if energy is not None and energy < LITTLE_ENERGY:
            self._say(
                f"warning: the basis holds {energy:.1%} of the primary gradient's energy, so that "
                "what it calls neutral is not; try --set method.anchor_probe=true or a larger "
                "--set method.rank"
            )

    def _say(self, line: str) -> None:
        with self.folder.log.open("a", encoding="utf-8") as log:
            log.write(f"{now()} {line}\n")
        self._display.say(line)


def now() -> str:
    """Return the time, ISO 8601 with offset."""
    return datetime.now(UTC).isoformat(timespec="milliseconds")


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
    found = next(iter(str(error).splitlines()), "none left")  # Python's own error has no text
    wrapped = OutOfMemoryError(
        f"Expected the run to fit into memory, found {found}. "
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
