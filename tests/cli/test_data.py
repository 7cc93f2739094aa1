from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from gradbench.cli import main
from gradbench.data.inspection import open_all
from gradbench.data.preview import caption, contact_sheet
from gradbench.errors import DataError
from gradbench.objectives import Classification
from gradbench.seeding import ExampleRandom
from gradbench.settings import Budget
from gradbench.task import Examples, ExampleSet, Indices, Preset, Splits, TensorSet
from gradbench_tasks import _chexpert_sample
from gradbench_tasks.chexpert import CheXpert, Findings
from gradbench_tasks.digits import DigitClassification

TINY = Preset("timm:test_vit", {"train": 12, "validation": 6}, Budget(epochs=1))

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty data folder, and a sample that is drawn at once."""
    monkeypatch.setenv("GRADBENCH_DATA", str(tmp_path / "data"))
    monkeypatch.setattr(_chexpert_sample, "PATIENTS", {"train": 16, "valid": 5})
    monkeypatch.setattr(_chexpert_sample, "PICTURES", 2)
    monkeypatch.setattr(CheXpert, "presets", {"default": TINY})
    return tmp_path / "data"


@pytest.fixture
def gradbench(capsys: pytest.CaptureFixture[str]) -> Run:
    def run(*arguments: str) -> tuple[int, str, str]:
        capsys.readouterr()
        with pytest.raises(SystemExit) as exit_:
            main(["data", *arguments])
        out, err = capsys.readouterr()
        assert isinstance(exit_.value.code, int)
        return exit_.value.code, out, err

    return run


@pytest.fixture
def real(data: Path) -> Path:
    """The drawn films where the real ones are looked for."""
    folder = data / "chexpert"
    folder.mkdir(parents=True)
    CheXpert().draw_sample(folder)
    return folder


class TestStatus:
    def test_says_what_is_missing_where_and_that_no_sample_is_drawn(
        self, data: Path, gradbench: Run
    ) -> None:
        code, out, _ = gradbench("status", "chexpert", "--json")
        assert code == 0
        found = json.loads(out)
        assert found["task"] == "chexpert"
        assert found["real"]["folder"] == str(data / "chexpert")
        assert "train.csv" in found["real"]["missing"]
        assert found["sample"]["drawn"] is False
        assert found["sample"]["bytes"] is None
        assert not Path(found["sample"]["folder"]).exists()

    def test_finds_the_sample_that_was_drawn(self, data: Path, gradbench: Run) -> None:
        gradbench("prepare", "chexpert", "--data", "sample")
        found = json.loads(gradbench("status", "chexpert", "--json")[1])["sample"]
        assert found["drawn"] is True
        files = [path for path in Path(found["folder"]).rglob("*") if path.is_file()]
        assert found["bytes"] == sum(path.stat().st_size for path in files)
        assert "drawn" in gradbench("status", "chexpert")[1]

    def test_finds_real_files(self, real: Path, gradbench: Run) -> None:
        assert json.loads(gradbench("status", "chexpert", "--json")[1])["real"] == {
            "folder": str(real),
            "missing": None,
        }
        assert "nothing missing" in gradbench("status", "chexpert")[1]

    def test_looks_where_settings_say(self, data: Path, real: Path, gradbench: Run) -> None:
        elsewhere = data / "elsewhere"
        real.rename(elsewhere)
        keys = (f"task.films={elsewhere}", f"task.auxiliary={elsewhere}/tiny-imagenet-200")
        arguments = ["status", "chexpert", "--json", "--set", keys[0], "--set", keys[1]]
        assert json.loads(gradbench(*arguments)[1])["real"]["missing"] is None

    def test_a_task_without_files_has_no_sample(self, data: Path, gradbench: Run) -> None:
        found = json.loads(gradbench("status", "digits", "--json")[1])
        assert found["real"]["missing"] is None
        assert found["sample"] is None


class TestPrepare:
    def test_draws_the_sample_once_and_reads_it(self, data: Path, gradbench: Run) -> None:
        code, out, err = gradbench("prepare", "chexpert")
        assert code == 0
        assert "SAMPLE" in err
        assert "drawn in" in err
        assert out.splitlines() == [
            "train: 12 examples, all can be read",
            "validation: 6 examples, all can be read",
            "auxiliary 1: 40 examples, all can be read",
            f"test: {out.split('test: ')[1].split()[0]} examples, left unopened until a run has "
            "trained",
        ]
        assert "drawn in" not in gradbench("prepare", "chexpert")[2]

    def test_lists_every_bad_real_file_and_leaves_the_test_alone(
        self, real: Path, gradbench: Run
    ) -> None:
        films = real / "CheXpert-v1.0-small"
        (films / "valid").rename(real / "away")
        code, _, err = gradbench("prepare", "chexpert", "--data", "real")
        assert code == 0, err
        splits = CheXpert().splits("real", real, TINY, 0)
        bad = [films / splits.train.ids[3], films / splits.validation.ids[2]]
        pictures = sorted((real / "tiny-imagenet-200").rglob("*.JPEG"))
        bad += [pictures[0], pictures[-1]]
        bad[0].unlink()
        bad[1].write_bytes(bad[1].read_bytes()[:-300])
        bad[2].write_text("no picture")
        bad[3].write_bytes(b"")
        code, out, err = gradbench("prepare", "chexpert", "--data", "real")
        assert code == 2
        assert "train: 12 examples, not all can be read" in out
        for path, reason in zip(bad, ("missing", "truncated", "no image", "no image"), strict=True):
            assert f"{path} ({reason})" in err

    def test_real_data_that_is_not_there_is_an_error(self, data: Path, gradbench: Run) -> None:
        code, _, err = gradbench("prepare", "chexpert", "--data", "real")
        assert code == 2
        assert "CheXpert-v1.0-small/train.csv" in err
        assert not (data / "samples").exists()

    def test_every_fault_of_a_set_that_is_read_piece_by_piece_is_told(self) -> None:
        class Piecewise(ExampleSet):
            ids = tuple(str(i) for i in range(600))

            def take(self, indices: Indices) -> Examples:
                raise DataError(f"from {indices[0]}")

        part = Piecewise()
        good = TensorSet(["a"], {"x": torch.zeros(1)})
        lines: list[str] = []
        with pytest.raises(DataError, match="train: from 0 train: from 256 train: from 512"):
            open_all(Splits(part, good, part, (good,), ""), lines.append)
        assert lines[1:3] == [
            "validation: 1 examples, all can be read",
            "auxiliary 1: 1 examples, all can be read",
        ]


class TestPreview:
    def test_draws_a_sheet_of_every_objective(
        self, data: Path, gradbench: Run, tmp_path: Path
    ) -> None:
        for task, rows in (("digits", 2), ("chexpert", 2)):
            out = tmp_path / f"{task}.png"
            code, said, err = gradbench("preview", task, "--out", str(out), "--count", "3")
            assert code == 0, err
            assert said == f"{out}\n"
            with Image.open(out) as sheet:
                assert sheet.format == "PNG"
                pixels = np.asarray(sheet.convert("L"))
            assert pixels.shape[1] > 3 * 100
            assert pixels.shape[0] > rows * 100
            assert pixels.min() < 50 < 200 < pixels.max()

    def test_is_of_the_seed_and_of_the_settings(
        self, data: Path, gradbench: Run, tmp_path: Path
    ) -> None:
        sheets: list[bytes] = []
        for extra in ((), (), ("--seed", "1"), ("--set", "task.u_policy=ignore")):
            out = tmp_path / f"{len(sheets)}.png"
            assert gradbench("preview", "chexpert", "--out", str(out), *extra)[0] == 0
            sheets.append(out.read_bytes())
        assert sheets[0] == sheets[1]
        assert sheets[0] not in sheets[2:]

    def test_writes_here_by_default(
        self, data: Path, gradbench: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(tmp_path)
        assert gradbench("preview", "digits")[1] == "digits.png\n"
        assert (tmp_path / "digits.png").is_file()

    def test_what_can_not_be_written_is_an_error(
        self, data: Path, gradbench: Run, tmp_path: Path
    ) -> None:
        code, _, err = gradbench("preview", "digits", "--out", str(tmp_path / "no" / "sheet.png"))
        assert code == 2
        assert "error: Expected to write" in err

    def test_captions_say_what_a_target_is(self) -> None:
        findings = Findings(64)
        target = torch.tensor([[1.0, 0.0, 0.0, torch.nan, 1.0], [0.0] * 5])
        assert caption(findings, target, 0) == "Atelectasis, Edema?, Pleural Effusion"
        assert caption(findings, target, 1) == "none"
        digits = DigitClassification("digits", 5, margin=0.1)
        assert caption(digits, torch.tensor([3, 1]), 1) == "class 1"
        assert caption(digits, torch.tensor([0.25]), 0) == "0.25"
        assert caption(digits, torch.zeros(2, 7, 9), 0) == "target of 7×9"
        assert caption(digits, {"other": target}, 0) == ""

    def test_what_is_no_image_has_its_place_all_the_same(self) -> None:
        class Row(Classification):
            def batch(
                self, examples: Examples, random: ExampleRandom | None
            ) -> tuple[torch.Tensor, torch.Tensor]:
                return examples["row"], examples["label"]

        examples = {"row": torch.zeros(4, 7), "label": torch.arange(4)}
        part = TensorSet([str(i) for i in range(4)], examples)
        objectives = (Row("rows", 4, margin=0.1), Row("others", 4, margin=0.1))
        splits = Splits(part, part, part, (part,), "")
        sheet = contact_sheet(objectives, splits, title="a table", count=16, seed=0)
        assert sheet.width > 4 * 100


class TestWhatIsWrong:
    @pytest.mark.parametrize("command", ["status", "prepare", "preview"])
    @pytest.mark.parametrize(
        ("arguments", "said"),
        [
            (["chexprt"], "Did you mean 'chexpert'?"),
            (["chexpert", "--set", "task.sice=3"], "Did you mean 'task.size'?"),
            (["chexpert", "--set", "optimizer.lr=3"], "task.size"),
            (["chexpert", "--set", "task.size=3"], "16 to 1024"),
            (["chexpert", "--preset", "huge"], "default"),
            (["chexpert", "--set", "size"], "KEY=VALUE"),
        ],
    )
    def test_is_said_in_one_line(
        self, data: Path, gradbench: Run, command: str, arguments: list[str], said: str
    ) -> None:
        code, out, err = gradbench(command, *arguments)
        assert code == 2
        assert out == ""
        assert err.startswith("error: ")
        assert err.count("\n") == 1
        assert said in err
        assert not data.exists()


def test_help_is_light() -> None:
    probe = (
        "import sys\nfrom gradbench.cli import main\n"
        "try:\n    main(['data', '--help'])\nexcept SystemExit as exit:\n    assert not exit.code\n"
        "assert not {'torch', 'PIL', 'numpy', 'matplotlib'} & set(sys.modules), 'heavy'"
    )
    done = subprocess.run(
        [sys.executable, "-c", probe], capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stderr
    for command in ("status", "prepare", "preview"):
        assert command in done.stdout
