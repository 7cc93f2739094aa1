"""What a run leaves to its user: the model, predictions for new files, weights."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file

import gradbench
from gradbench.cli import _status
from gradbench.errors import DataError, RecordError
from gradbench.trained import export, predict

TINY = {"budget.steps_per_epoch": 4, "budget.fine_tune_epochs": 1, "optimizer.lr": 3e-3}


def write_tree(root: Path, classes: dict[str, int], count: int) -> None:
    draw = np.random.default_rng(0)
    for name, level in classes.items():
        (root / name).mkdir(parents=True)
        for number in range(count):
            pixels = np.clip(draw.normal(level, 20, (24, 24, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(root / name / f"{number}.png")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, Path]:
    """A home with a run on folders that were named relative to another working folder."""
    base = tmp_path_factory.mktemp("work")
    write_tree(base / "mine", {"dark": 50, "light": 200}, 20)
    write_tree(base / "other", {"a": 30, "b": 120, "c": 220}, 12)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRADBENCH_HOME", str(base / "home"))
        patch.chdir(base)
        result = gradbench.run(
            "weighted-sum",
            "folder",
            epochs=3,
            settings={**TINY, "task.primary": "mine", "task.auxiliary": "other", "task.size": 32},
        )
    return base / "home", result.run_id, base / "mine"


@pytest.fixture
def run(made: tuple[Path, str, Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> str:
    monkeypatch.setenv("GRADBENCH_HOME", str(made[0]))
    monkeypatch.chdir(tmp_path)
    return made[1]


def test_the_loaded_model_scores_as_the_stored_predictions_say(
    run: str, made: tuple[Path, str, Path]
) -> None:
    stored = pd.read_parquet(made[0] / "runs" / run / "predictions.parquet")
    stored = stored[stored.split == "test"]
    files = [made[2] / example for example in stored.example]
    found = predict(run, files)
    scores = found[["score dark", "score light"]].to_numpy()
    np.testing.assert_allclose(scores, np.stack(stored.score.to_list()), atol=1e-5)
    assert list(found.prediction) == [("dark", "light")[i] for i in scores.argmax(axis=1)]


def test_load_takes_the_beginning_of_a_run_id(run: str) -> None:
    model = gradbench.load(run[:6])
    assert not model.training
    with torch.no_grad():
        assert model(torch.zeros(2, 3, 32, 32)).shape == (2, 2)


def test_the_backbone_alone_fits_timm(run: str, tmp_path: Path) -> None:
    path = tmp_path / "trunk.safetensors"
    export(run, path, "backbone")
    trunk = timm.create_model("test_vit", num_classes=0, img_size=32)
    trunk.load_state_dict(load_file(path))


def test_predict_writes_csv(
    run: str, made: tuple[Path, str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    file = next((made[2] / "dark").iterdir())
    assert _status(["predict", run, str(file)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "file,prediction,score dark,score light"
    assert len(lines) == 2


@pytest.mark.parametrize("name", ["missing.png", "text.png"])
def test_files_that_are_no_images_are_named(run: str, tmp_path: Path, name: str) -> None:
    (tmp_path / "text.png").write_text("no image")
    with pytest.raises(DataError, match=name.replace(".", r"\.")):
        predict(run, [tmp_path / name])


def test_an_unknown_run_is_named(run: str) -> None:
    with pytest.raises(RecordError, match="nothing-like-it"):
        gradbench.load("nothing-like-it")


def test_another_format_is_refused(run: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert _status(["export-model", run, "--format", "onnx"]) == 2
    assert "safetensors" in capsys.readouterr().err
