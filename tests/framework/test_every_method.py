"""Every installed method trains on digits, one of each kind on chexpert; all beat chance."""

from __future__ import annotations

from pathlib import Path

import pytest

import gradbench
from gradbench import registry
from gradbench.result import RunResult

METHODS = {row.name: row.kind for row in registry.listing(registry.METHODS)}
ONE_OF_EACH_KIND = sorted({kind: name for name, kind in sorted(METHODS.items())}.values())
CHANCE = {"digits": 0.2, "chexpert": 0.5}  # accuracy of five classes, area under the ROC curve


@pytest.fixture(autouse=True)
def own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRADBENCH_HOME", str(tmp_path))


def train(method: str, task: str, **settings: object) -> RunResult:
    budget = {"budget.fine_tune_epochs": 2, "budget.steps_per_epoch": 10}
    chosen = {f"{key.replace('__', '.')}": value for key, value in settings.items()}
    return gradbench.run(method, task, epochs=3, settings={**budget, **chosen})


@pytest.mark.parametrize("method", METHODS)
def test_on_digits(method: str) -> None:
    result = train(method, "digits", optimizer__lr=3e-3)
    assert result.status == "ok"
    assert result.metrics is not None
    assert result.metrics.test["accuracy"] > 2 * CHANCE["digits"]
    assert result.method.kind == METHODS[method]


@pytest.mark.parametrize("method", ONE_OF_EACH_KIND)
def test_on_chexpert(method: str) -> None:
    result = train(method, "chexpert", budget__batch_size=32)
    assert result.status == "ok"
    assert result.task.source == "sample"
    assert result.metrics is not None
    assert result.metrics.test["auroc"] > CHANCE["chexpert"] + 0.02
