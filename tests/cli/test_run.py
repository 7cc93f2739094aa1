from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from gradbench import cli
from gradbench.objectives import Classification
from gradbench.result import json_schema

NOBODY = 65534
SHORT = (
    *("--device", "cpu", "--epochs", "1"),
    *("--set", "budget.steps_per_epoch=3", "--set", "budget.fine_tune_epochs=1"),
)
DIGITS = ("run", "--method", "weighted-sum", "--task", "digits")
HOPELESS = (
    *("--set", "optimizer.lr=1e6", "--set", "optimizer.clip=0"),
    *("--set", "optimizer.warmup_epochs=0", "--set", "budget.steps_per_epoch=6"),
)


@pytest.fixture(scope="module", autouse=True)
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("home")
        patch.setenv("GRADBENCH_HOME", str(folder))
        patch.setenv("GRADBENCH_TRACKING_URI", "none")
        yield folder


class Terminal:
    """Runs commands in this process, and keeps what they print."""

    def __init__(self, capture: pytest.CaptureFixture[str]) -> None:
        self._capture = capture
        self.out = self.err = ""

    def __call__(self, *arguments: str) -> int:
        self._capture.readouterr()
        with pytest.raises(SystemExit) as caught:
            cli.main(list(arguments))
        self.out, self.err = self._capture.readouterr()
        assert isinstance(caught.value.code, int)
        return caught.value.code

    @property
    def errors(self) -> list[str]:
        return [line for line in self.err.splitlines() if line.startswith("error:")]

    def record(self) -> dict[str, Any]:
        """Return the only thing on stdout, a record."""
        found: dict[str, Any] = json.loads(self.out)
        jsonschema.validate(found, json_schema())
        return found


@pytest.fixture
def gradbench(capsys: pytest.CaptureFixture[str]) -> Terminal:
    return Terminal(capsys)


def records(home: Path) -> int:
    return len(list(home.glob("runs/*/result.json")))


class TestRun:
    def test_shows_progress_on_stderr_and_the_result_on_stdout(
        self, gradbench: Terminal, home: Path
    ) -> None:
        assert gradbench(*DIGITS, *SHORT, "--seed", "11") == 0
        assert gradbench.err.count("steps/s") == 2
        assert gradbench.errors == []
        assert "weighted-sum (scalarization)" in gradbench.out
        assert "test accuracy" in gradbench.out
        assert "steps/s" not in gradbench.out
        shown = "".join(gradbench.out.replace("│", "").split())  # as one line, without the frame
        assert f"runs/{next(home.glob('runs/*')).name}/result.json" in shown

    def test_a_run_that_is_there_is_shown(self, gradbench: Terminal) -> None:
        assert gradbench(*DIGITS, *SHORT, "--seed", "12") == 0
        table = gradbench.out
        assert gradbench(*DIGITS, *SHORT, "--seed", "12") == 0
        assert gradbench.out == table
        assert "has been made" in gradbench.err
        assert "steps/s" not in gradbench.err

    def test_json_is_the_record_and_nothing_else(self, gradbench: Terminal, home: Path) -> None:
        assert gradbench(*DIGITS, *SHORT, "--seed", "13", "--json") == 0
        found = gradbench.record()
        stored = home / "runs" / found["run_id"] / "result.json"
        assert found == json.loads(stored.read_text(encoding="utf-8"))
        assert gradbench(*DIGITS, *SHORT, "--seed", "13", "--json") == 0
        assert gradbench.record() == found
        assert gradbench.err == ""

    def test_every_option_reaches_the_run(self, gradbench: Terminal) -> None:
        options = {
            "--seed": "5",
            "--backbone": "timm:test_resnet",
            "--epochs": "1",
            "--data": "real",
            "--preset": "default",
            "--device": "cpu",
            "--precision": "bf16",
            "--bn": "shared",
            "--memory-format": "channels-last",
        }
        settings = (
            *("--set", "budget.steps_per_epoch=2", "--set", "budget.fine_tune_epochs=0"),
            *("--set", "method.scale=sum", "--set", "task.auxiliary_weight=0.5"),
        )
        arguments = [part for option in options.items() for part in option]
        assert gradbench(*DIGITS, *arguments, *settings, "--json") == 0
        found = gradbench.record()
        config = found["config"]
        assert (found["seed"], config["precision"]) == (5, "bf16")
        assert found["backbone"]["name"] == config["model"]["backbone"] == "timm:test_resnet"
        assert config["model"]["batch_norm"] == "shared"
        budget = config["budget"]
        assert (budget["epochs"], budget["steps_per_epoch"], budget["fine_tune_epochs"]) == (
            1,
            2,
            0,
        )
        assert (found["task"]["source"], found["task"]["preset"]) == ("real", "default")
        assert config["method"]["scale"] == "sum"
        assert config["task"]["fields"]["auxiliary_weight"] == 0.5
        assert found["environment"]["memory_format"] == "channels-last"

    def test_a_value_may_hold_an_equals_sign(self, gradbench: Terminal) -> None:
        assert gradbench(*DIGITS, "--set", "model.weights=a=b.pt") == 2
        assert "found 'a=b.pt'" in gradbench.err


class TestFailure:
    def test_losses_that_are_no_numbers_are_two_and_a_record(
        self, gradbench: Terminal, home: Path
    ) -> None:
        assert gradbench(*DIGITS, *SHORT, *HOPELESS[:-2], "--json") == 2
        found = gradbench.record()
        assert found["status"] == "nan"
        assert len(gradbench.errors) == 1
        assert f"at step {found['error']['step']} of phase 'joint'" in gradbench.errors[0]
        assert "optimizer.lr" in gradbench.errors[0]
        assert "Traceback" not in gradbench.err
        assert (home / "runs" / found["run_id"] / "result.json").exists()

    def test_without_json_stdout_stays_empty(self, gradbench: Terminal) -> None:
        assert gradbench(*DIGITS, *SHORT, *HOPELESS[:-2], "--seed", "1") == 2
        assert gradbench.out == ""
        assert len(gradbench.errors) == 1

    @pytest.mark.parametrize("debug", [False, True])
    def test_a_plug_in_that_raises_is_one_and_one_line(
        self, gradbench: Terminal, monkeypatch: pytest.MonkeyPatch, debug: bool
    ) -> None:
        def fail(*_: object) -> None:
            raise RuntimeError("this\nis of no use")

        monkeypatch.setattr(Classification, "loss", fail)
        options = ["--debug"] if debug else []
        assert gradbench(*DIGITS, *SHORT, "--seed", "2", "--json", *options) == 1
        found = gradbench.record()
        assert (found["status"], found["error"]["type"]) == ("failed", "RuntimeError")
        assert len(gradbench.errors) == 1
        assert "RuntimeError: this is of no use" in gradbench.errors[0]
        assert "weighted-sum (gradbench-surgery " in gradbench.errors[0]
        assert gradbench.err.splitlines()[-1] == gradbench.errors[0]
        assert ("Traceback" in gradbench.err) is debug
        assert ("in fail" in gradbench.err.replace(gradbench.errors[0], "")) is debug

    def test_a_fault_of_ours_is_one_and_one_line(
        self, gradbench: Terminal, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def fail(*_: object, **__: object) -> None:
            raise KeyError("unheard of")

        monkeypatch.setattr("gradbench.runner.execute", fail)
        assert gradbench(*DIGITS) == 1
        assert gradbench.out == ""
        assert len(gradbench.err.splitlines()) == 1
        assert "KeyError" in gradbench.err
        assert gradbench(*DIGITS, "--debug") == 1
        assert "Traceback" in gradbench.err

    def test_an_interrupt_is_130_and_one_line(
        self, gradbench: Terminal, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def stop(*_: object) -> None:
            raise KeyboardInterrupt

        monkeypatch.setattr(Classification, "loss", stop)
        assert gradbench(*DIGITS, *SHORT, "--seed", "3", "--json") == 130
        assert gradbench.record()["status"] == "interrupted"
        assert len(gradbench.errors) == 1
        assert "Interrupted" in gradbench.errors[0]

    def test_an_interrupt_before_the_run_is_130_and_one_line(
        self, gradbench: Terminal, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def stop(*_: object, **__: object) -> None:
            raise KeyboardInterrupt

        monkeypatch.setattr("gradbench.runner.resolve", stop)
        assert gradbench(*DIGITS, *SHORT) == 130
        assert gradbench.out == ""
        assert [gradbench.err.strip()] == gradbench.errors


class TestRefusal:
    @pytest.mark.parametrize(
        ("arguments", "words"),
        [
            (("run", "--method", "atittud", "--task", "digits"), "mean 'attittud'"),
            (("run", "--method", "attittud", "--task", "digit"), "mean 'digits'"),
            ((*DIGITS, "--backbone", "test_vti"), "mean 'test_vit'"),
            ((*DIGITS, "--backbone", "tim:test_vit"), "mean 'timm'"),
            ((*DIGITS, "--device", "cude"), "mean 'cuda'"),
            ((*DIGITS, "--set", "optimizer.lrr=1"), "mean 'optimizer.lr'"),
            ((*DIGITS, "--set", "optimizer.lr=0"), "optimizer.lr to be a finite number"),
            ((*DIGITS, "--set", "optimizer.lr=nan"), "found 'nan'"),
            ((*DIGITS, "--set", "optimizer.lr=fast"), "found 'fast'"),
            ((*DIGITS, "--set", "optimizer.lr"), "Expected --set KEY=VALUE"),
            ((*DIGITS, "--set", "=1"), "Expected --set KEY=VALUE"),
            ((*DIGITS, "--set", "budget.epochs=1.5"), "budget.epochs to be an integer"),
            ((*DIGITS, "--epochs", "0"), "budget.epochs to be an integer, 1 to"),
            ((*DIGITS, "--epochs", "3", "--set", "budget.epochs=3"), "budget.epochs once"),
            ((*DIGITS, "--bn", "frozen", "--set", "model.batch_norm=frozen"), "batch_norm once"),
            (
                (*DIGITS, "--set", "optimizer.lr=1e-3", "--set", "optimizer.lr=1e-2"),
                "optimizer.lr once",
            ),
            ((*DIGITS, "--bn", "batch"), "primary, shared, frozen"),
            ((*DIGITS, "--preset", "paper"), "preset of 'digits' (default"),
            ((*DIGITS, "--precision", "fp8"), "fp32, fp64, bf16"),
            ((*DIGITS, "--memory-format", "nhwc"), "memory format auto"),
            ((*DIGITS, "--seed", "-1"), "seed to be an integer"),
            ((*DIGITS, "--seed", "one"), "'--seed'"),
            ((*DIGITS, "--data", "sample"), "task with sample data"),
            ((*DIGITS, "--data", "none"), "auto, real, sample"),
            (("run", "--task", "digits"), "'--method'"),
            (("run", "--method", "attittud"), "'--task'"),
            ((*DIGITS, "--speed", "9"), "--speed"),
            ((*DIGITS, "extra"), "extra"),
            (("runs",), "'runs'"),
            (("--frob",), "--frob"),
        ],
    )
    def test_bad_input_is_two_and_one_line(
        self, gradbench: Terminal, home: Path, arguments: tuple[str, ...], words: str
    ) -> None:
        before = records(home)
        assert gradbench(*arguments) == 2
        assert gradbench.out == ""
        assert len(gradbench.err.splitlines()) == 1
        assert gradbench.err.startswith("error: Expected ")
        assert words in gradbench.err
        assert records(home) == before

    def test_json_prints_nothing_where_there_is_no_run(self, gradbench: Terminal) -> None:
        assert gradbench(*DIGITS, "--set", "optimizer.lr=0", "--json") == 2
        assert gradbench.out == ""
        assert len(gradbench.err.splitlines()) == 1

    @pytest.mark.skipif(os.name != "posix", reason="users are numbers on POSIX alone")
    def test_a_home_that_is_not_ones_own_is_two_and_one_line(
        self, gradbench: Terminal, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        assert gradbench(*DIGITS, *SHORT) == 0  # everything that is imported has been
        folder = tmp_path / "home"
        folder.mkdir()
        folder.chmod(0o555)
        monkeypatch.setenv("GRADBENCH_HOME", str(folder))
        with unprivileged():
            code = gradbench(*DIGITS, *SHORT, "--json")
        assert code == 2
        assert gradbench.out == ""
        assert len(gradbench.err.splitlines()) == 1
        assert str(folder) in gradbench.err
        assert "Permission denied" in gradbench.err
        assert "GRADBENCH_HOME" in gradbench.err
        assert list(folder.iterdir()) == []


@contextlib.contextmanager
def unprivileged() -> Iterator[None]:
    """Act as a user who may write nowhere, if this is the one who may write everywhere."""
    user = os.geteuid()
    if user == 0:
        import sklearn

        os.seteuid(NOBODY)
        if not os.access(Path(sklearn.__file__), os.R_OK, effective_ids=True):
            os.seteuid(user)
            pytest.skip("another user may not read the installed packages")
    try:
        yield
    finally:
        os.seteuid(user)
