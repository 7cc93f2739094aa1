"""A run that is killed, again and again, ends with the bits of one that was not."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

KILLS = int(os.environ.get("GRADBENCH_KILLS", "2"))  # ten under `tox -e faults`
COMMAND = [
    *(sys.executable, "-m", "gradbench", "run", "--method", "attittud", "--task", "digits"),
    *("--epochs", str(4 + 2 * KILLS), "--set", "budget.patience=1000"),  # every kill finds it going
    *("--backbone", "test_convnext"),
    *("--set", "budget.fine_tune_epochs=3", "--set", "budget.steps_per_epoch=5"),
    *("--set", "model.dropout=0.3", "--set", "method.samples=8", "--set", "method.rank=3"),
]
MOVING = ("time", "steps_per_second")


def start(home: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        COMMAND,
        env={**os.environ, "GRADBENCH_HOME": str(home)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def kill_in_epoch(home: Path, epochs: int, delay: float) -> None:
    """Start the run and kill it some time after so many of its epochs have ended."""
    process = start(home)
    assert process.stderr is not None
    seen = 0
    while seen < epochs:
        line = process.stderr.readline()
        assert line, "the run ended before it could be killed"
        seen += "steps/s" in line
    time.sleep(delay)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


def finish(home: Path) -> dict[str, Any]:
    process = start(home)
    _, shown = process.communicate(timeout=300)
    assert process.returncode == 0, shown
    folder = folder_of(home)
    predictions = pd.read_parquet(folder / "predictions.parquet")
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {
        "result": json.loads((folder / "result.json").read_text()),
        "metrics": [{k: v for k, v in row.items() if k not in MOVING} for row in rows],
        "predictions": predictions.to_json(double_precision=15),
        "shown": shown,
    }


def folder_of(home: Path) -> Path:
    return next(path for path in (home / "runs").iterdir() if path.is_dir())


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return finish(tmp_path_factory.mktemp("undisturbed"))


def assert_same_bits(found: dict[str, Any], expected: dict[str, Any]) -> None:
    for moving in ("started", "ended", "attempts", "cost", "environment"):
        found["result"].pop(moving)
    wanted = {key: value for key, value in expected["result"].items() if key in found["result"]}
    assert found["result"] == wanted
    assert found["metrics"] == expected["metrics"]
    assert found["predictions"] == expected["predictions"]


def test_killed_at_random_moments(tmp_path: Path, undisturbed: dict[str, Any]) -> None:
    draw = random.Random(os.environ.get("GRADBENCH_KILL_SEED", "0"))
    for _ in range(KILLS):
        kill_in_epoch(tmp_path, epochs=draw.randint(1, 2), delay=draw.uniform(0, 0.5))
        record = json.loads((folder_of(tmp_path) / "result.json").read_text())
        assert record["status"] == "interrupted"
    found = finish(tmp_path)
    assert "goes on after" in found["shown"]
    assert found["result"]["attempts"] == KILLS + 1
    assert_same_bits(found, undisturbed)


def test_a_damaged_checkpoint_is_left_out(tmp_path: Path, undisturbed: dict[str, Any]) -> None:
    kill_in_epoch(tmp_path, epochs=3, delay=0)
    latest = folder_of(tmp_path) / "checkpoint" / "latest.pt"
    content = bytearray(latest.read_bytes())
    content[len(content) // 2] ^= 1
    latest.write_bytes(content)
    found = finish(tmp_path)
    assert "damaged" in found["shown"]
    assert "goes on after" in found["shown"]
    assert_same_bits(found, undisturbed)


def test_no_checkpoint_is_left_of_a_run_that_ended(undisturbed: dict[str, Any]) -> None:
    path = Path(undisturbed["shown"].partition("  run    ")[2].splitlines()[0])
    assert not list((path / "checkpoint").glob("*.pt"))
    assert (path / "model.safetensors").exists()
