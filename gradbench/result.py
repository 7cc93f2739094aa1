"""The record of one run: its schema, and the folder that holds it."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, ValidationError

from gradbench.errors import RecordError
from gradbench.files import home, replacing, write_json

if TYPE_CHECKING:
    from gradbench.training.evaluation import Evaluation

SCHEMA = 1
PROTOCOL = "GB-1"

Environment = dict[str, str | int | bool | None]
Status = Literal["ok", "failed", "nan", "oom", "timeout", "interrupted"]


class _Part(BaseModel):
    """Every field is always present; what is not known is null."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, json_schema_serialization_defaults_required=True
    )


class Failure(_Part):
    """What ended a run before its end, and where."""

    type: str
    message: str
    phase: str | None
    step: int | None
    objective: str | None


class Sizes(_Part):
    """Primary examples a split."""

    train: int
    validation: int
    test: int
    meta: int


class TaskRecord(_Part):
    """The task pair and its data."""

    name: str
    version: str
    revision: int
    preset: str
    source: Literal["real", "sample"]
    data_digest: str
    split_digest: str
    sizes: Sizes
    distribution: str
    distribution_version: str


class MethodRecord(_Part):
    """The method and its hyper-parameters."""

    name: str
    kind: str
    revision: int
    fields: dict[str, Any]
    distribution: str
    distribution_version: str


class BackboneRecord(_Part):
    """The shared trunk."""

    name: str
    weights_digest: str | None
    parameters: int


class MetricRecord(_Part):
    """The metric that selects, stops and is compared; differences below ``margin`` are none."""

    name: str
    higher_is_better: bool
    margin: float


class SelectionRecord(_Part):
    """The state that was tested."""

    phase: str
    epoch: int
    step: int


class Metrics(_Part):
    """Metrics of the primary objective by split and name."""

    validation: dict[str, FiniteFloat]
    test: dict[str, FiniteFloat]


class Cost(_Part):
    """Seconds, milliseconds a step, MiB and counts; lower is better in all."""

    wall_seconds: float | None = None
    step_milliseconds_p50: float | None = None
    peak_memory_mb: float | None = None
    forward_passes: int | None = None
    backward_passes: int | None = None
    examples: int | None = None


class Diagnostics(_Part):
    """Means over the steps in which the method acted; null where its kind computes none.

    ``cosine`` in [-1, 1] between the primary and an auxiliary gradient; the rest are shares in
    [0, 1]: of steps in conflict, of the auxiliary gradient's squared norm, and of the primary
    gradient's squared norm inside the basis; of steps in which a method fell back on another.
    """

    cosine: FiniteFloat | None = None
    conflict_rate: FiniteFloat | None = None
    good_share: FiniteFloat | None = None
    bad_share: FiniteFloat | None = None
    neutral_share: FiniteFloat | None = None
    captured_energy: FiniteFloat | None = None
    fallback_rate: FiniteFloat | None = None


class RunResult(_Part):
    """One run, as ``result.json`` holds it."""

    schema_: Literal[1] = Field(alias="schema", default=1)
    protocol: str
    run_id: str
    status: Status
    error: Failure | None
    started: str  # ISO 8601 with offset
    ended: str | None
    attempts: int
    seed: int
    config: dict[str, Any]
    task: TaskRecord
    method: MethodRecord
    backbone: BackboneRecord
    metric: MetricRecord
    selection: SelectionRecord | None
    metrics: Metrics | None
    cost: Cost
    diagnostics: Diagnostics
    environment: Environment

    def as_json(self) -> dict[str, Any]:
        """Return plain JSON values; nothing is left out."""
        values: dict[str, Any] = self.model_dump(mode="json", by_alias=True)
        return values

    def same_bits(self) -> dict[str, Any]:
        """Return what two runs of one identity have in common."""
        moving = ("started", "ended", "attempts", "cost", "environment")
        return {key: value for key, value in self.as_json().items() if key not in moving}


def json_schema() -> dict[str, Any]:
    """Return the JSON schema of ``result.json``."""
    schema = RunResult.model_json_schema(by_alias=True, mode="serialization")
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}


def runs_folder() -> Path:
    """Return the folder that holds all runs."""
    return home() / "runs"


class RunFolder:
    """The folder of one run."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def result(self) -> Path:
        """The record."""
        return self.path / "result.json"

    @property
    def metrics(self) -> Path:
        """One JSON object an epoch, with a time stamp each."""
        return self.path / "metrics.jsonl"

    @property
    def predictions(self) -> Path:
        """One row an example of the validation and test splits."""
        return self.path / "predictions.parquet"

    @property
    def weights(self) -> Path:
        """The model that was tested."""
        return self.path / "model.safetensors"

    @property
    def checkpoints(self) -> Path:
        """Where a run that has not ended can go on."""
        return self.path / "checkpoint"

    @property
    def log(self) -> Path:
        """The lines that were shown."""
        return self.path / "log.txt"

    def read(self) -> RunResult | None:
        """Return the record, or None where there is none yet.

        Raises:
            RecordError: if there is one that does not fit the schema.
        """
        if not self.result.exists():
            return None
        try:
            return RunResult.model_validate_json(self.result.read_bytes())
        except (ValidationError, OSError) as error:
            raise RecordError(
                f"Expected a record of schema {SCHEMA} in {self.result}, found something else: "
                f"{str(error).splitlines()[0]}. Move the folder away and run again."
            ) from error

    def write(self, result: RunResult) -> None:
        """Write the record, whole or not at all."""
        write_json(self.result, result.as_json())

    def check_config(self, identity: dict[str, Any]) -> None:
        """Check that what is in the folder was made for ``identity``.

        Raises:
            RecordError: if it was made for something else, or can not be read.
        """
        path = self.path / "config.json"
        if not path.exists():
            return
        try:
            found = json.loads(path.read_text(encoding="utf-8"))["identity"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise RecordError(
                f"Expected the configuration of this run in {path}, found a damaged file "
                f"({type(error).__name__}). Move the folder away and run again."
            ) from error
        if found != json.loads(json.dumps(identity)):
            raise RecordError(
                f"Expected the configuration of this run in {path}, found that of another. "
                "Move the folder away and run again."
            )

    def write_config(self, config: dict[str, Any]) -> None:
        """Write what was asked for."""
        write_json(self.path / "config.json", config)

    def add_epoch(self, row: dict[str, Any]) -> None:
        """Append one epoch to the metrics."""
        with self.metrics.open("a", encoding="utf-8") as lines:
            lines.write(json.dumps(row) + "\n")
            lines.flush()
            os.fsync(lines.fileno())

    def keep_epochs(self, count: int) -> None:
        """Leave the first ``count`` epochs in the metrics, those that a checkpoint knows of."""
        known = self.metrics.read_bytes().splitlines(True)[:count] if count else []
        with replacing(self.metrics) as temporary:
            temporary.write_bytes(b"".join(known))

    def write_predictions(self, splits: dict[str, Evaluation]) -> None:
        """Write split, example, target and score of every scored example."""
        import pandas as pd

        rows = [
            {
                "split": split,
                "example": example,
                "target": target,
                "score": score if isinstance(score, list) else [score],
            }
            for split, found in splits.items()
            for example, target, score in zip(
                found.ids, found.targets.tolist(), found.scores.tolist(), strict=True
            )
        ]
        with replacing(self.predictions) as temporary:
            pd.DataFrame(rows).to_parquet(temporary, index=False)
