from __future__ import annotations

import contextlib
import importlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from torch import nn

import gradbench
from gradbench.config import Request
from gradbench.display import Display
from gradbench.errors import (
    BackboneError,
    DataError,
    DeviceError,
    FieldError,
    HomeError,
    OutOfMemoryError,
    PluginError,
    RecordError,
)
from gradbench.objectives import Classification
from gradbench.result import RunFolder, RunResult
from gradbench.runner import Outcome, execute
from gradbench_tasks.digits import Digits

SHORT: dict[str, object] = {
    "budget.epochs": 2,
    "budget.steps_per_epoch": 3,
    "budget.fine_tune_epochs": 1,
}
BASE = Request(method="weighted-sum", task="digits", device="cpu", settings=SHORT)
ROUND_OFF = 1e-4  # relative, of losses after three steps of Adam in float32
PATIENCE = 120.0  # seconds for another process to import everything on a busy machine

DAWDLE = """
import os, time
from dataclasses import dataclass
from pathlib import Path
import torch
from gradbench.method import Weighting

@dataclass(frozen=True)
class Dawdle(Weighting):
    def weights_from_gramian(self, gramian, step):
        if step.index == 4 and "GRADBENCH_TEST_REACHED" in os.environ:
            Path(os.environ["GRADBENCH_TEST_REACHED"]).touch()
            time.sleep(300)
        return torch.ones_like(gramian[0])
"""


@pytest.fixture(scope="module", autouse=True)
def _no_tracking() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRADBENCH_TRACKING_URI", "none")
        yield


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("GRADBENCH_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def make(
    request: Request = BASE, say: Callable[[str], None] = lambda line: None, **settings: Any
) -> Outcome:
    keys = {key.replace("__", "."): value for key, value in settings.items()}
    return execute(replace(request, settings={**request.settings, **keys}), Display(say))


def predictions(folder: RunFolder) -> pd.DataFrame:
    return pd.read_parquet(folder.predictions)


def losses(outcome: Outcome) -> list[dict[str, float]]:
    lines = outcome.folder.metrics.read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["losses"] for line in lines]


def record(outcome: Outcome) -> RunResult:
    found = outcome.folder.read()
    assert found is not None
    return found


@dataclass(frozen=True)
class Reference:
    """A run that nothing disturbed."""

    result: RunResult
    predictions: pd.DataFrame
    losses: list[dict[str, float]]


def reference(home: Path, request: Request = BASE) -> Reference:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRADBENCH_HOME", str(home))
        outcome = make(request)
    assert outcome.error is None
    return Reference(outcome.result, predictions(outcome.folder), losses(outcome))


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Reference:
    return reference(tmp_path_factory.mktemp("undisturbed"))


def assert_same_bits(outcome: Outcome, expected: Reference) -> None:
    assert outcome.error is None
    assert record(outcome).same_bits() == expected.result.same_bits()
    assert losses(outcome) == expected.losses
    found = predictions(outcome.folder)
    assert list(found["example"]) == list(expected.predictions["example"])
    assert list(found["target"]) == list(expected.predictions["target"])
    scores = [list(score) for score in found["score"]]
    assert scores == [list(score) for score in expected.predictions["score"]]


class TestRepetition:
    def test_the_same_run_in_another_home_has_the_same_bits(
        self, home: Path, undisturbed: Reference
    ) -> None:
        outcome = make()
        assert not outcome.repeated
        assert outcome.folder.path == home / "runs" / undisturbed.result.run_id
        assert_same_bits(outcome, undisturbed)

    def test_another_seed_has_other_bits_and_another_folder(
        self, home: Path, undisturbed: Reference
    ) -> None:
        outcome = make(replace(BASE, seed=1))
        assert outcome.folder.path.name != undisturbed.result.run_id
        assert losses(outcome) != undisturbed.losses
        digests = (outcome.result.task.split_digest, undisturbed.result.task.split_digest)
        assert digests[0] != digests[1]

    def test_a_run_that_is_there_is_shown_and_not_repeated(self, home: Path) -> None:
        first = make()
        before = {path: path.stat().st_mtime_ns for path in first.folder.path.iterdir()}
        said: list[str] = []
        again = make(say=said.append)
        assert again.repeated
        assert again.error is None
        assert again.result == first.result
        assert again.result.attempts == 1
        assert said == []
        after = {path: path.stat().st_mtime_ns for path in first.folder.path.iterdir()}
        assert after == before

    def test_where_and_how_it_ran_makes_no_other_run(
        self, home: Path, undisturbed: Reference
    ) -> None:
        outcome = make(replace(BASE, memory_format="channels-last"))
        assert outcome.error is None
        assert outcome.result.run_id == undisturbed.result.run_id
        assert outcome.result.environment["memory_format"] == "channels-last"
        config = json.loads((outcome.folder.path / "config.json").read_text(encoding="utf-8"))
        assert config["execution"]["memory_format"] == "channels-last"


class TestEqualBits:
    @pytest.mark.parametrize(
        ("backbone", "dropout"), [("test_vit", 0.1), ("test_vit", 0.3), ("test_resnet", 0.1)]
    )
    def test_a_weight_of_zero_is_the_primary_alone(
        self, home: Path, backbone: str, dropout: float
    ) -> None:
        settings: dict[str, Any] = {"model__backbone": backbone, "model__dropout": dropout}
        weighted = make(**settings, task__auxiliary_weight=0)
        alone = make(replace(BASE, method="primary-only"), **settings)
        assert weighted.error is alone.error is None
        assert weighted.result.metrics == alone.result.metrics
        one, other = weighted.result.selection, alone.result.selection
        assert one is not None
        assert other is not None
        assert (one.epoch, one.step) == (other.epoch, other.step)
        scores = [
            [list(score) for score in predictions(o.folder)["score"]] for o in (weighted, alone)
        ]
        assert scores[0] == scores[1]
        rows = [[row["digits 0–4"] for row in losses(outcome)] for outcome in (weighted, alone)]
        assert rows[0] == rows[1]
        assert weighted.result.run_id != alone.result.run_id

    def test_attittud_with_weights_of_one_is_the_sum(
        self, home: Path, undisturbed: Reference
    ) -> None:
        outcome = make(
            replace(BASE, method="attittud"),
            method__eta_good=1,
            method__eta_bad=1,
            method__eta_neutral=1,
        )
        assert outcome.error is None
        first, expected = losses(outcome)[0], undisturbed.losses[0]
        assert first == pytest.approx(expected, rel=ROUND_OFF)
        turned = make(replace(BASE, method="attittud"))
        assert losses(turned)[0] != pytest.approx(expected, rel=ROUND_OFF)

    def test_unequal_batch_statistics_are_seen(self, home: Path) -> None:
        """The policy matters, or the equality above would say nothing about batch norm."""
        settings: dict[str, Any] = {
            "model__backbone": "test_resnet",
            "task__auxiliary_weight": 0,
        }
        primary, shared = (
            make(**settings, model__batch_norm=policy) for policy in ("primary", "shared")
        )
        assert losses(primary)[0] == losses(shared)[0]
        scores = [[list(s) for s in predictions(o.folder)["score"]] for o in (primary, shared)]
        assert scores[0] != scores[1]


class TestInterruption:
    @pytest.mark.parametrize("epochs", [0, 1, 2, 3])
    def test_a_run_that_was_interrupted_goes_on_to_the_same_bits(
        self, home: Path, undisturbed: Reference, epochs: int
    ) -> None:
        seen = 0

        def say(line: str) -> None:
            nonlocal seen
            seen += "steps/s" in line
            if seen == epochs and ("steps/s" in line or "  run " in line):
                raise KeyboardInterrupt

        if epochs:
            outcome = make(say=say)
            assert isinstance(outcome.error, KeyboardInterrupt)
            stopped = record(outcome)
        else:
            with pytest.raises(KeyboardInterrupt):
                make(say=say)
            (path,) = (home / "runs").iterdir()
            found = RunFolder(path).read()
            assert found is not None
            stopped = found
        assert stopped.status == "interrupted"
        assert (stopped.metrics, stopped.selection) == (None, None)
        again = make()
        assert (again.result.status, again.result.attempts) == ("ok", 2)
        assert again.result.error is None
        assert_same_bits(again, undisturbed)

    def test_a_run_that_failed_is_started_again(
        self, home: Path, undisturbed: Reference, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def lose(*_: object) -> None:
            raise RuntimeError("a cable was pulled")

        with monkeypatch.context() as patch:
            patch.setattr(RunFolder, "write_predictions", lose)
            outcome = make()
        assert isinstance(outcome.error, PluginError)
        assert record(outcome).status == "failed"
        again = make()
        assert again.result.attempts == 2
        assert_same_bits(again, undisturbed)

    @pytest.mark.parametrize("error", [MemoryError("no room"), MemoryError()])
    def test_a_run_that_does_not_fit_says_what_would(self, home: Path, error: Exception) -> None:
        def say(line: str) -> None:
            if "steps/s" in line:
                raise error

        outcome = make(say=say)
        assert isinstance(outcome.error, OutOfMemoryError)
        assert outcome.error.exit_code == 2
        assert "budget.batch_size" in str(outcome.error)
        found = record(outcome)
        assert found.status == "oom"
        assert found.error is not None
        assert found.error.type == "MemoryError"

    def test_a_record_that_can_not_be_read_is_left_alone(self, home: Path) -> None:
        folder = make().folder
        folder.result.write_text("{}")
        with pytest.raises(RecordError):
            make()
        assert folder.result.read_text() == "{}"


def heed_interrupts() -> None:
    """Undo what a shell does to the jobs that it starts in the background."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


class TestProcesses:
    @pytest.fixture
    def reached(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        """Install a method that stops in its fifth step, in other processes; return its sign."""
        site = tmp_path / "site"
        info = site / "dawdlers-1.0.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: dawdlers\nVersion: 1.0\n")
        points = "[gradbench.methods]\ndawdle = gradbench_test_dawdle:Dawdle\n"
        (info / "entry_points.txt").write_text(points)
        (site / "gradbench_test_dawdle.py").write_text(DAWDLE)
        monkeypatch.syspath_prepend(site)
        importlib.invalidate_caches()
        return tmp_path / "reached"

    @contextlib.contextmanager
    def stuck(self, reached: Path) -> Iterator[subprocess.Popen[str]]:
        """Run the method in another process until its fifth step."""
        settings = [f"--set={key}={value}" for key, value in SHORT.items()]
        plug_ins = ["--method=dawdle", "--task=digits", "--device=cpu"]
        path = [str(reached.parent / "site"), os.environ.get("PYTHONPATH", "")]
        process = subprocess.Popen(
            [sys.executable, "-m", "gradbench", "run", *plug_ins, *settings],
            stderr=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={
                **os.environ,
                "PYTHONPATH": os.pathsep.join(filter(None, path)),
                "GRADBENCH_TEST_REACHED": str(reached),
            },
            preexec_fn=heed_interrupts,
        )
        try:
            end = time.monotonic() + PATIENCE
            while not reached.exists():
                assert process.poll() is None, process.communicate()[1]
                assert time.monotonic() < end, f"nothing happened within {PATIENCE} seconds"
                time.sleep(0.05)
            yield process
        finally:
            process.kill()
            process.communicate(timeout=PATIENCE)
        reached.unlink()

    def test_signals_and_rivals_lose_nothing(
        self, home: Path, reached: Path, tmp_path_factory: pytest.TempPathFactory
    ) -> None:
        request = replace(BASE, method="dawdle")

        with self.stuck(reached) as process:
            (path,) = (home / "runs").iterdir()
            folder = RunFolder(path)
            before = folder.result.read_bytes()
            with pytest.raises(HomeError, match="another process making this very run") as caught:
                make(request)
            assert caught.value.exit_code == 2
            assert folder.result.read_bytes() == before
            process.send_signal(signal.SIGINT)
            out, err = process.communicate(timeout=PATIENCE)
        assert process.returncode == 130
        assert out == ""
        assert err.splitlines()[-1].startswith("error: Interrupted")
        found = folder.read()
        assert found is not None
        assert (found.status, found.attempts) == ("interrupted", 1)
        assert found.error is not None
        assert (found.error.type, found.error.phase, found.error.step) == (
            "KeyboardInterrupt",
            "joint",
            4,
        )
        assert found.ended is not None

        with self.stuck(reached) as process:
            process.kill()
        assert process.returncode == -signal.SIGKILL
        found = folder.read()
        assert found is not None
        assert (found.status, found.attempts) == ("interrupted", 2)
        assert (found.error, found.ended, found.metrics) == (None, None, None)

        outcome = make(request)
        assert outcome.folder.path == path
        assert outcome.result.attempts == 3
        assert_same_bits(outcome, reference(tmp_path_factory.mktemp("other"), request))


class TestRefusal:
    @pytest.mark.parametrize(
        ("changes", "error", "message"),
        [
            ({"data": "sample"}, DataError, "task with sample data, found 'digits'"),
            ({"data": "fake"}, FieldError, "one of auto, real, sample"),
            ({"device": "gpu"}, DeviceError, "Expected a device"),
            ({"memory_format": "nhwc"}, FieldError, "Expected memory format"),
            ({"settings": {"model.backbone": "test_vti"}}, BackboneError, "mean 'test_vit'"),
            ({"settings": {"model.backbone": "timn:test_vit"}}, LookupError, "mean 'timm'"),
            ({"settings": {"model.weights": "nowhere.pt"}}, BackboneError, "found 'nowhere.pt'"),
        ],
    )
    def test_nothing_is_written(
        self, home: Path, changes: dict[str, Any], error: type[Exception], message: str
    ) -> None:
        with pytest.raises(error, match=message) as caught:
            make(replace(BASE, **changes))
        assert getattr(caught.value, "exit_code", None) == 2
        assert not home.exists()

    def test_a_task_without_a_training_set_for_each_objective_is_at_fault(
        self, home: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        splits = Digits.splits
        monkeypatch.setattr(
            Digits, "splits", lambda *given: replace(splits(*given), auxiliaries=())
        )
        with pytest.raises(PluginError, match="Expected 2 training sets from task 'digits'"):
            make()

    def test_a_home_that_is_a_file_is_one_clear_error(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (tmp_path / "file").write_text("")
        monkeypatch.setenv("GRADBENCH_HOME", str(tmp_path / "file"))
        with pytest.raises(HomeError, match="GRADBENCH_HOME"):
            make()


class TestRun:
    def test_returns_the_record_and_says_what_happens(
        self, home: Path, undisturbed: Reference
    ) -> None:
        said: list[str] = []
        result = gradbench.run(
            "weighted-sum",
            "digits",
            epochs=2,
            device="cpu",
            settings={key: value for key, value in SHORT.items() if key != "budget.epochs"},
            say=said.append,
        )
        assert result.same_bits() == undisturbed.result.same_bits()
        assert len([line for line in said if "steps/s" in line]) == 3
        log = (home / "runs" / result.run_id / "log.txt").read_text(encoding="utf-8")
        assert all(line in log for line in said)

    def test_raises_what_ended_the_run(self, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def fail(*_: object) -> None:
            raise ZeroDivisionError

        monkeypatch.setattr(Classification, "loss", fail)
        with pytest.raises(PluginError, match="ZeroDivisionError") as caught:
            gradbench.run("weighted-sum", "digits", device="cpu", settings=SHORT)
        assert isinstance(caught.value.__cause__, ZeroDivisionError)

    def test_a_key_given_both_ways_is_refused(self, home: Path) -> None:
        with pytest.raises(FieldError, match=r"budget\.epochs once"):
            gradbench.run("weighted-sum", "digits", epochs=1, settings={"budget.epochs": 1})

    def test_a_basis_that_says_little_is_warned_of(self, home: Path) -> None:
        said: list[str] = []
        make(
            replace(BASE, method="attittud"),
            say=said.append,
            method__basis="canonical",
            method__rank=1,
        )
        assert any("warning: the basis holds 0.0%" in line for line in said)

    def test_the_default_home_is_a_hidden_folder_here(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.delenv("GRADBENCH_HOME", raising=False)
        monkeypatch.chdir(tmp_path)
        outcome = make()
        assert outcome.folder.path.parent.absolute() == tmp_path / ".gradbench" / "runs"

    def test_the_model_that_was_tested_is_kept(self, home: Path) -> None:
        from safetensors.torch import load_file

        outcome = make()
        state = load_file(outcome.folder.weights)
        assert isinstance(state, dict)
        trunk = sum(
            value.numel() for name, value in state.items() if name.startswith("shared.backbone.")
        )
        assert trunk == outcome.result.backbone.parameters
        assert all(isinstance(value, nn.Parameter) is False for value in state.values())
