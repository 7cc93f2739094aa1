"""What a run leaves to its user: the trained model, predictions, weights to take along."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from gradbench import registry
from gradbench.build import build
from gradbench.environment import resolve_device
from gradbench.errors import RecordError
from gradbench.fields import convert_all
from gradbench.files import replacing
from gradbench.model import Model
from gradbench.result import RunFolder, RunResult, runs_folder
from gradbench.settings import Architecture
from gradbench.task import TaskPair
from gradbench.training.batches import to_device
from gradbench.training.evaluation import BATCH, autocast

if TYPE_CHECKING:
    import pandas as pd

Part = Literal["model", "backbone"]


def load(run: str | Path) -> Model:
    """Return the model of a run in evaluation mode, on the CPU.

    ``run`` is a run id, the beginning of one, or a run folder. The model maps a batch of the
    task's inputs to the primary head's output.

    Raises:
        RecordError: if there is no such run, or it has not ended well.
        PluginNotFoundError: if the task or backbone plug-in is no longer installed.
    """
    folder, result = find(run)
    return _rebuild(folder, result)[0]


def predict(run: str | Path, files: Sequence[str | Path], device: str = "auto") -> pd.DataFrame:
    """Return a row a file: its name, the predicted class where there is one, every score.

    Raises:
        DataError: if the task can not read files, or a file can not be read; all are named.
    """
    import pandas as pd

    folder, result = find(run)
    model, task = _rebuild(folder, result)
    where = resolve_device(device)[0]
    model.to(where)
    objective = task.objectives()[0]
    paths = [Path(file) for file in files]
    examples = task.read(paths)
    precision = result.config["precision"]
    dtype = torch.float64 if precision == "fp64" else torch.float32
    scores = []
    with torch.inference_mode(), autocast(where, precision):
        for start in range(0, len(paths), BATCH):
            taken = examples.take(np.arange(start, min(start + BATCH, len(paths))))
            inputs, _ = to_device(objective.batch(taken, None), where, dtype)
            scores.append(objective.scores(model(inputs)).float().cpu())
    table = torch.cat(scores).numpy()
    names = objective.labels or tuple(str(column) for column in range(table.shape[1]))
    columns: dict[str, Any] = {"file": [str(file) for file in files]}
    if objective.exclusive:
        columns["prediction"] = [names[column] for column in table.argmax(axis=1)]
    for column, name in enumerate(names):
        columns[f"score {name}"] = table[:, column]
    return pd.DataFrame(columns)


def export(run: str | Path, path: Path, part: Part = "model") -> None:
    """Write weights as safetensors; those of the backbone under the backbone's own names."""
    folder, result = find(run)
    state = load_file(folder.weights)
    if part == "backbone":
        prefix = "shared.backbone.model."
        state = {
            name.removeprefix(prefix): value
            for name, value in state.items()
            if name.startswith(prefix)
        }
    about = {"run_id": result.run_id, "backbone": result.backbone.name, "task": result.task.name}
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        save_file(state, temporary, metadata={**about, "method": result.method.name, "part": part})


def find(run: str | Path) -> tuple[RunFolder, RunResult]:
    """Return folder and record of a run that has ended well.

    Raises:
        RecordError: if there is none, more than one, or it has not ended well.
    """
    root = runs_folder()
    if (Path(run) / "result.json").exists():
        matches = [Path(run)]
    else:
        known = sorted(root.iterdir()) if root.is_dir() else []
        matches = [path for path in known if path.name.startswith(str(run)) and path.is_dir()]
    if len(matches) != 1:
        found = ", ".join(path.name for path in matches) or "none"
        raise RecordError(
            f"Expected one run {str(run)!r} in {root}, found {found}. Give a run id or a folder."
        )
    folder = RunFolder(matches[0])
    result = folder.read()
    if result is None or result.status != "ok" or not folder.weights.exists():
        status = "no record" if result is None else f"status {result.status!r}"
        raise RecordError(
            f"Expected a run that ended well in {folder.path}, found {status}. "
            "Give the command of the run again."
        )
    return folder, result


def _rebuild(folder: RunFolder, result: RunResult) -> tuple[Model, TaskPair]:
    cls = registry.load_class(registry.TASKS, result.task.name, TaskPair).obj
    execution = json.loads((folder.path / "config.json").read_text(encoding="utf-8"))["execution"]
    values = {**result.config["task"]["fields"], **execution["locations"]}
    task: TaskPair = cls(**convert_all(cls, values, "task"))
    settings = {k: v for k, v in result.config["model"].items() if k != "weights_digest"}
    built = build(
        Architecture(**settings),
        task.objectives(),
        task.input,
        seed=result.seed,
        precision=result.config["precision"],
        device=torch.device("cpu"),
        memory_format="contiguous",
    )
    built.model.load_state_dict(load_file(folder.weights))
    return built.model.eval(), task
