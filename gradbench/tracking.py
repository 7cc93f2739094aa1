"""The one door to MLflow: mirrors run folders into a store, as often as asked, each point once."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
from collections.abc import Callable, Iterator, Mapping
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock, Timeout

from gradbench import __version__
from gradbench.errors import TrackingError
from gradbench.files import home, make_folder, write_json
from gradbench.result import RunFolder, RunResult, runs_folder

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Metric

OFF = "none"
PATIENCE = 180  # seconds to wait for other processes that write; a queue of ten needs one minute
BATCH = 500  # points a request; the server's limit is 1,000
STATUS = {"ok": "FINISHED", "interrupted": "KILLED"}  # the others are FAILED
FORBIDDEN = re.compile(r"[^\w\-./ ]", re.ASCII)  # in names of metrics


def store_uri(uri: str | None = None) -> str:
    """Return where runs are tracked: what is given, $GRADBENCH_TRACKING_URI, or a local database."""
    given = uri or os.environ.get("GRADBENCH_TRACKING_URI")
    return given or f"sqlite:///{home().absolute() / 'mlflow.db'}"


def mirror_or_warn(folder: RunFolder, uri: str, say: Callable[[str], None]) -> None:
    """Mirror one run; where that fails, say so and leave it for `gradbench sync`."""
    if uri == OFF:
        return
    try:
        mirror(folder, uri)
    except TrackingError as error:
        say(f"warning: {error} The run is safe in its folder; `gradbench sync` sends it later.")


def mirror(folder: RunFolder, uri: str) -> None:
    """Bring the store up to date with a run folder.

    Raises:
        TrackingError: if the store can not be reached, or another process holds it.
    """
    result = folder.read()
    if result is None:
        return
    make_folder(home())
    try:
        artifacts = _artifacts(folder, result)
        _import_mlflow()  # what takes seconds is done before others are kept waiting
        with FileLock(home() / "mlflow.lock", timeout=PATIENCE):
            _Mirror(_client(uri), folder, result).write(artifacts)
    except Timeout as error:
        raise TrackingError(
            f"Expected to write to {uri}, found another process writing for {PATIENCE} seconds."
        ) from error
    except Exception as error:  # MLflow, its database and its HTTP client raise many types here
        line = " ".join(str(error).split())[:200]
        raise TrackingError(
            f"Expected to write to the tracking store {uri}, found {type(error).__name__}: {line}."
        ) from error
    write_json(folder.path / "tracked.json", {"uri": uri, "record": _digest(folder)})


def quiet_environment() -> dict[str, str]:
    """Return the environment for MLflow: no telemetry, no progress bars, no long waits."""
    return {
        "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
        "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
        **os.environ,
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "DO_NOT_TRACK": "true",
    }


def unsent(uri: str) -> Iterator[RunFolder]:
    """Give the run folders whose record the store does not have."""
    root = runs_folder()
    for path in sorted(root.iterdir()) if root.is_dir() else []:
        folder = RunFolder(path)
        if not folder.result.exists():
            continue
        try:
            sent = json.loads((path / "tracked.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            sent = {}
        if sent != {"uri": uri, "record": _digest(folder)}:
            yield folder


class _Mirror:
    """One run folder and its run in the store."""

    def __init__(self, client: MlflowClient, folder: RunFolder, result: RunResult) -> None:
        self._client, self._folder, self._result = client, folder, result

    def write(self, artifacts: list[Path]) -> None:
        """Write what the store does not have yet, and the artifacts."""
        from mlflow.entities import Param, RunTag

        client, result = self._client, self._result
        run = self._find_or_create()
        known = client.get_run(run).data
        params = [
            Param(key, value) for key, value in _flat("", result.config) if key not in known.params
        ]
        tags = [RunTag(key, value) for key, value in self._tags().items()]
        client.log_batch(run, params=params[:100], tags=tags)
        points = self._missing_points(run, set(known.metrics))
        for start in range(0, len(points), BATCH):
            client.log_batch(run, metrics=points[start : start + BATCH])
        for path in artifacts:
            client.log_artifact(run, str(path))
        if result.ended is not None:
            status = STATUS.get(result.status, "FAILED")
            client.set_terminated(run, status=status, end_time=_milliseconds(result.ended))

    def _find_or_create(self) -> str:
        client, result = self._client, self._result
        experiment = client.get_experiment_by_name(result.task.name)
        if experiment is None:
            local = client.tracking_uri.startswith("sqlite:")
            place = (home().absolute() / "mlartifacts" / result.task.name).as_uri()
            chosen = client.create_experiment(
                result.task.name, artifact_location=place if local else None
            )
        else:
            chosen = experiment.experiment_id
        wanted = f"tags.`gradbench.run_id` = '{result.run_id}'"
        found = client.search_runs([chosen], filter_string=wanted, max_results=1)
        if found:
            return str(found[0].info.run_id)
        made = client.create_run(
            chosen,
            start_time=_milliseconds(result.started),
            run_name=f"{result.method.name} seed {result.seed}",
            tags={"gradbench.run_id": result.run_id},
        )
        return str(made.info.run_id)

    def _tags(self) -> dict[str, str]:
        result = self._result
        return {
            "gradbench.version": __version__,
            "gradbench.protocol": result.protocol,
            "gradbench.status": result.status,
            "gradbench.method": result.method.name,
            "gradbench.method.distribution": (
                f"{result.method.distribution} {result.method.distribution_version}"
            ),
            "gradbench.task": result.task.name,
            "gradbench.task.version": result.task.version,
            "gradbench.task.source": result.task.source,
            "gradbench.task.distribution": (
                f"{result.task.distribution} {result.task.distribution_version}"
            ),
        }

    def _missing_points(self, run: str, known: set[str]) -> list[Metric]:
        from mlflow.entities import Metric

        wanted = {(key, step): (value, stamp) for key, value, stamp, step in self._points()}
        for key in known & {key for key, _ in wanted}:
            for point in self._client.get_metric_history(run, key):
                wanted.pop((key, point.step), None)
        return [Metric(key, value, stamp, step) for (key, step), (value, stamp) in wanted.items()]

    def _points(self) -> Iterator[tuple[str, float, int, int]]:
        """Give key, value, milliseconds and step of every point of the run."""
        step = 0
        lines = (
            self._folder.metrics.read_text(encoding="utf-8").splitlines()
            if (self._folder.metrics.exists())
            else []
        )
        for line in lines:
            row = json.loads(line)
            step, stamp = int(row["step"]), _milliseconds(row["time"])
            named = {
                **{f"loss/{name}": value for name, value in row["losses"].items()},
                **{f"validation/{name}": value for name, value in row["validation"].items()},
                **{f"diagnostics/{name}": value for name, value in row["diagnostics"].items()},
                "steps_per_second": row["steps_per_second"],
            }
            for name, value in named.items():
                yield FORBIDDEN.sub("-", name), float(value), stamp, step
        if self._result.metrics is not None and self._result.ended is not None:
            stamp = _milliseconds(self._result.ended)
            for name, value in self._result.metrics.test.items():
                yield FORBIDDEN.sub("-", f"test/{name}"), value, stamp, step
            for name, cost in self._result.cost.model_dump().items():
                if cost is not None:
                    yield f"cost/{name}", float(cost), stamp, step


def _artifacts(folder: RunFolder, result: RunResult) -> list[Path]:
    """Return the files that go along with a run, its figures drawn."""
    from gradbench.figures import draw_run

    paths = [folder.result, folder.path / "config.json", folder.metrics]
    if result.status == "ok":
        paths += [folder.predictions, *draw_run(folder, result)]
    return [path for path in paths if path.exists()]


def _import_mlflow() -> None:
    """Import MLflow so that it sends no telemetry, keeps quiet and gives up soon."""
    os.environ.update(quiet_environment())
    import mlflow  # noqa: F401 - its settings are read here

    for name in ("mlflow", "alembic"):
        logging.getLogger(name).setLevel(logging.WARNING)


def _client(uri: str) -> MlflowClient:
    """Return a client of a store, which is made if need be."""
    _import_mlflow()
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=uri)


def _flat(prefix: str, values: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for key, value in values.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            yield from _flat(f"{name}.", value)
        else:
            yield name, str(value)


def _milliseconds(stamp: str) -> int:
    return round(datetime.fromisoformat(stamp).timestamp() * 1000)


def _digest(folder: RunFolder) -> str:
    return hashlib.sha256(folder.result.read_bytes()).hexdigest()
