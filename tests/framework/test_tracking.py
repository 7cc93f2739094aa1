"""MLflow holds every run and every point once, and no run depends on it."""

from __future__ import annotations

import json
import os
import sqlite3
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

from gradbench import tracking
from gradbench.result import RunFolder
from gradbench.tracking import _client, mirror, mirror_or_warn, store_uri, unsent

# MLflow uses parts of SQLAlchemy that are going away
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

STARTS = int(os.environ.get("GRADBENCH_STARTS", "2"))  # ten under `tox -e faults`
COMMAND = [
    *(sys.executable, "-m", "gradbench", "run", "--method", "pcgrad", "--task", "digits"),
    *("--epochs", "2", "--set", "budget.steps_per_epoch=2", "--set", "budget.fine_tune_epochs=1"),
]


def run(home: Path, *extra: str, uri: str = "") -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "GRADBENCH_HOME": str(home), "GRADBENCH_TRACKING_URI": uri}
    return subprocess.run(
        [*COMMAND, *extra], env=environment, capture_output=True, text=True, check=False
    )


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home in which several first runs were started at once."""
    path = tmp_path_factory.mktemp("home")
    environment = {**os.environ, "GRADBENCH_HOME": str(path), "GRADBENCH_TRACKING_URI": ""}
    started = [
        subprocess.Popen([*COMMAND, "--seed", str(seed)], env=environment, stderr=subprocess.PIPE)
        for seed in range(STARTS)
    ]
    for process in started:
        _, shown = process.communicate(timeout=600)
        assert process.returncode == 0, shown.decode()
        assert b"warning" not in shown, shown.decode()
    return path


@pytest.fixture
def at_home(home: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("GRADBENCH_HOME", str(home))
    monkeypatch.delenv("GRADBENCH_TRACKING_URI")
    return home


def runs_in_store() -> list[Any]:
    client = _client(store_uri())
    experiment = client.get_experiment_by_name("digits")
    assert experiment is not None
    return list(client.search_runs([experiment.experiment_id]))


def folder_of_seed(home: Path, seed: int) -> RunFolder:
    folders = [RunFolder(path) for path in (home / "runs").iterdir()]
    found = {result.seed: folder for folder in folders if (result := folder.read())}
    return found[seed]


def test_runs_started_at_once_are_all_there(at_home: Path) -> None:
    runs = runs_in_store()
    assert len(runs) == STARTS
    assert {run.info.status for run in runs} == {"FINISHED"}
    assert {run.data.params["seed"] for run in runs} == {str(seed) for seed in range(STARTS)}


def test_a_run_holds_parameters_points_tags_and_artifacts(at_home: Path) -> None:
    folder = folder_of_seed(at_home, 0)
    result = folder.read()
    assert result is not None
    assert result.metrics is not None
    run = next(r for r in runs_in_store() if r.data.tags["gradbench.run_id"] == result.run_id)
    assert run.data.params["method.name"] == "pcgrad"
    assert run.data.params["optimizer.lr"] == "0.001"
    assert run.data.tags["gradbench.task.version"] == result.task.version
    assert run.data.metrics["test/accuracy"] == result.metrics.test["accuracy"]
    client = _client(store_uri())
    names = {artifact.path for artifact in client.list_artifacts(run.info.run_id)}
    assert names == {
        *("result.json", "config.json", "metrics.jsonl", "predictions.parquet"),
        *("curves.png", "gradients.png"),
    }


def test_mirroring_again_adds_no_point(at_home: Path) -> None:
    folder = folder_of_seed(at_home, 0)
    for _ in range(2):
        mirror(folder, store_uri())
    rows = [json.loads(line) for line in folder.metrics.read_text().splitlines()]
    client = _client(store_uri())
    result = folder.read()
    assert result is not None
    run = next(r for r in runs_in_store() if r.data.tags["gradbench.run_id"] == result.run_id)
    points = client.get_metric_history(run.info.run_id, "validation/accuracy")
    assert [p.step for p in sorted(points, key=lambda p: p.step)] == [row["step"] for row in rows]
    assert len(runs_in_store()) == STARTS
    assert len(client.get_metric_history(run.info.run_id, "test/accuracy")) == 1


def test_what_is_sent_is_known(at_home: Path) -> None:
    assert not list(unsent(store_uri()))
    assert len(list(unsent("http://127.0.0.1:9"))) == STARTS


def test_a_dead_server_costs_a_warning_and_sync_sends_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = run(tmp_path, uri="http://127.0.0.1:9")
    assert found.returncode == 0
    assert "warning: Expected to write to the tracking store" in found.stderr
    assert "gradbench sync" in found.stderr
    monkeypatch.setenv("GRADBENCH_HOME", str(tmp_path))
    monkeypatch.setenv("GRADBENCH_TRACKING_URI", "")
    sent = subprocess.run(
        [sys.executable, "-m", "gradbench", "sync"], capture_output=True, text=True, check=False
    )
    assert sent.returncode == 0, sent.stderr
    assert "1 runs sent" in sent.stdout
    assert len(runs_in_store()) == 1
    assert not list(unsent(store_uri()))


def test_a_locked_store_costs_a_warning(at_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracking, "PATIENCE", 0.2)
    lines: list[str] = []
    lock = FileLock(at_home / "mlflow.lock")
    with lock:
        mirror_or_warn(folder_of_seed(at_home, 0), store_uri(), lines.append)
    assert len(lines) == 1
    assert "another process" in lines[0]


def test_a_corrupt_store_costs_a_warning(tmp_path: Path, at_home: Path) -> None:
    database = tmp_path / "mlflow.db"
    database.write_bytes(b"no database " * 100)
    with pytest.raises(sqlite3.DatabaseError):
        sqlite3.connect(database).execute("select * from runs")
    lines: list[str] = []
    mirror_or_warn(folder_of_seed(at_home, 0), f"sqlite:///{database}", lines.append)
    assert len(lines) == 1
    assert "Expected to write to the tracking store" in lines[0]


def test_telemetry_is_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "false")
    assert tracking.quiet_environment()["MLFLOW_DISABLE_TELEMETRY"] == "true"
    assert tracking.quiet_environment()["DO_NOT_TRACK"] == "true"
