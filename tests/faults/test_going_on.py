"""What a run that would go on refuses, and what it says."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

import gradbench
from gradbench.errors import EnvironmentChangedError, RecordError
from gradbench.result import RunResult

TINY = {"budget.steps_per_epoch": 2, "budget.fine_tune_epochs": 1}


@pytest.fixture(autouse=True)
def own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("GRADBENCH_HOME", str(tmp_path))
    return tmp_path


@pytest.fixture(autouse=True)
def own_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def make(*, allow: bool = False, stop_in_epoch: int | None = None) -> RunResult:
    shown = 0

    def say(line: str) -> None:
        nonlocal shown
        shown += "steps/s" in line
        if shown == stop_in_epoch:
            raise KeyboardInterrupt

    return gradbench.run(
        "weighted-sum",
        "digits",
        epochs=2,
        settings=TINY,
        allow_environment_change=allow,
        say=say,
    )


def only_folder(home: Path) -> Path:
    return next((home / "runs").iterdir())


def test_another_environment_is_refused_by_name(own_home: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        make(stop_in_epoch=2)
    before = torch.get_num_threads()
    torch.set_num_threads(before + 1)
    with pytest.raises(EnvironmentChangedError, match=f"threads {before} → {before + 1}"):
        make()
    result = make(allow=True)
    assert result.status == "ok"
    assert result.environment["changed"] == f"threads {before} → {before + 1}"


def test_the_same_environment_goes_on_and_says_nothing(own_home: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        make(stop_in_epoch=2)
    result = make()
    assert result.attempts == 2
    assert result.environment["changed"] is None


@pytest.mark.parametrize("content", ['{"identity": {"seed": 7}}', "{", "[]", ""])
def test_a_folder_of_another_configuration_is_refused(own_home: Path, content: str) -> None:
    make()
    path = only_folder(own_home) / "config.json"
    record = only_folder(own_home) / "result.json"
    path.write_text(content)
    before = record.read_bytes()
    with pytest.raises(RecordError, match=r"config\.json"):
        make()
    assert record.read_bytes() == before


def test_every_length_of_a_torn_checkpoint_is_survived(own_home: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        make(stop_in_epoch=2)
    latest = only_folder(own_home) / "checkpoint" / "latest.pt"
    content = latest.read_bytes()
    for length in (0, 1, 63, 64, 65, len(content) // 2, len(content) - 1):
        latest.write_bytes(content[:length])
        lines: list[str] = []
        with pytest.raises(KeyboardInterrupt):
            gradbench.run(
                "weighted-sum", "digits", epochs=2, settings=TINY, say=_stop_at_once(lines)
            )
        assert any("damaged" in line for line in lines), length
    latest.write_bytes(content)
    result = make()
    assert json.loads((only_folder(own_home) / "result.json").read_text())["status"] == "ok"
    assert result.status == "ok"


def _stop_at_once(lines: list[str]) -> Callable[[str], None]:
    def say(line: str) -> None:
        lines.append(line)
        if "steps/s" in line:
            raise KeyboardInterrupt

    return say
