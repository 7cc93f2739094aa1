from __future__ import annotations

import csv
import json
import math
import os
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torch.testing import assert_close

from gradbench.config import Request, resolve
from gradbench.errors import DataError, FieldError
from gradbench.losses import Scored
from gradbench.seeding import ExampleRandom
from gradbench.settings import Budget
from gradbench.task import ExampleSet, Preset, Splits
from gradbench_tasks.chexpert import CheXpert

SMALL, FULL = "CheXpert-v1.0-small", "CheXpert-v1.0"
VIEW = "Frontal/Lateral"
COLUMNS = (
    "Path", "Sex", "Age", VIEW, "AP/PA", "No Finding", "Enlarged Cardiomediastinum",
    "Cardiomegaly", "Lung Opacity", "Lung Lesion", "Edema", "Consolidation", "Pneumonia",
    "Atelectasis", "Pneumothorax", "Pleural Effusion", "Pleural Other", "Fracture",
    "Support Devices",
)  # fmt: skip
LABELS = ("Atelectasis", "Cardiomegaly", "Consolidation", "Edema", "Pleural Effusion")
FINDINGS = (
    ("1.0", "0.0", "-1.0", "", "1"),
    ("-1", "0", "1.0", "-1.0", ""),
    ("-1.0", "-1.0", "-1.0", "-1.0", "-1.0"),
)
TINY = Preset(
    backbone="timm:test_vit",
    sizes={"train": 12, "validation": 6},
    budget=Budget(epochs=1, fine_tune_epochs=1, steps_per_epoch=2, batch_size=4),
)
SEEDS = range(8)

Row = dict[str, str]


def film(path: str, view: str = "Frontal", labels: Mapping[str, str] | None = None) -> Row:
    blank = dict.fromkeys(COLUMNS, "")
    return blank | {"Path": path, "Sex": "Female", "Age": "61", VIEW: view} | dict(labels or {})


def patients(split: str, name: str, first: int, count: int) -> list[Row]:
    """Two or three frontal films a patient and a lateral one, findings in turn."""
    rows = []
    for number in range(first, first + count):
        labels = {
            label: ("1.0", "0.0", "", "-1.0" if split == "train" else "0.0")[(number + i) % 4]
            for i, label in enumerate(LABELS)
        }
        for study in range(1, 3 + number % 2):
            path = f"{name}/{split}/patient{number:05d}/study{study}/view1_frontal.jpg"
            rows.append(film(path, "Frontal", labels))
        path = f"{name}/{split}/patient{number:05d}/study1/view2_lateral.jpg"
        rows.append(film(path, "Lateral", labels))
    return rows


def write_table(file: Path, rows: Iterable[Mapping[str, str]], columns: Sequence[str]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("w", newline="", encoding="utf-8") as opened:
        table = csv.DictWriter(opened, columns, extrasaction="ignore")
        table.writeheader()
        table.writerows(rows)


def write_image(path: Path, mode: str, seed: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    shape = (20, 24) if mode == "L" else (16, 16, 3)
    pixels = np.random.default_rng(seed).integers(0, 256, shape).astype(np.uint8)
    Image.fromarray(pixels).save(path)


def write_release(
    folder: Path,
    name: str = SMALL,
    train: Sequence[Row] | None = None,
    valid: Sequence[Row] | None = None,
) -> Path:
    """Write tables and films as they are released, and pictures as in Tiny-ImageNet."""
    tables = {
        "train": patients("train", name, 1, 14) if train is None else train,
        "valid": patients("valid", name, 64541, 4) if valid is None else valid,
    }
    for split, rows in tables.items():
        write_table(folder / name / f"{split}.csv", rows, COLUMNS)
        for seed, row in enumerate(rows):
            write_image(folder / row["Path"], "L", seed)
    for wnid in ("n01443537", "n01629819", "n01641577"):
        for number in range(4):
            images = folder / "tiny-imagenet-200" / "train" / wnid / "images"
            write_image(images / f"{wnid}_{number}.JPEG", "RGB", number)
    return folder


def split(folder: Path, task: CheXpert | None = None, seed: int = 0) -> Splits:
    return (task or CheXpert(size=16)).splits("real", folder, TINY, seed)


def everything(part: ExampleSet) -> dict[str, Tensor]:
    return dict(part.take(np.arange(len(part))))


def targets_by_id(part: ExampleSet) -> dict[str, list[float]]:
    return dict(zip(part.ids, everything(part)["target"].tolist(), strict=True))


def patients_of(part: ExampleSet) -> set[str]:
    return {name.split("/")[1] for name in part.ids}


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_release(tmp_path_factory.mktemp("chexpert"))


class TestLayout:
    @pytest.mark.parametrize("name", [SMALL, FULL])
    def test_both_releases_are_read_alike(self, tmp_path: Path, release: Path, name: str) -> None:
        found, expected = split(write_release(tmp_path, name)), split(release)
        assert found.digest() == expected.digest()
        assert targets_by_id(found.train) == targets_by_id(expected.train)
        images = everything(found.test)["image"]
        assert images.dtype == torch.uint8
        assert images.shape == (len(found.test), 3, 16, 16)

    def test_sizes_are_those_of_the_preset_and_the_test_is_the_official_one(
        self, release: Path
    ) -> None:
        found = split(release)
        assert found.sizes() == {"train": 12, "validation": 6, "test": 10, "meta": 0}
        assert {name.split("/")[0] for name in found.test.ids} == {"valid"}
        assert {name.split("/")[0] for name in (*found.train.ids, *found.validation.ids)} == {
            "train"
        }
        assert patients_of(found.test) == {f"patient{number}" for number in range(64541, 64545)}

    def test_lateral_films_are_left_out_unless_they_are_asked_for(self, release: Path) -> None:
        for views, expected in (("frontal", 10), ("all", 14)):
            found = split(release, CheXpert(size=16, views=views))  # type: ignore[arg-type]
            assert len(found.test) == expected
            lateral = [name for name in found.test.ids if name.endswith("lateral.jpg")]
            assert bool(lateral) == (views == "all")

    def test_release_and_pictures_may_be_elsewhere(self, tmp_path: Path, release: Path) -> None:
        elsewhere = write_release(tmp_path / "mine")
        (elsewhere / "tiny-imagenet-200" / "train").rename(elsewhere / "pictures")
        for films in (elsewhere, elsewhere / SMALL):
            task = CheXpert(size=16, films=str(films), auxiliary=str(elsewhere / "pictures"))
            assert task.missing(tmp_path) is None
            assert split(tmp_path, task).digest() == split(release).digest()

    def test_any_folder_of_class_folders_will_do_for_pictures(
        self, tmp_path: Path, release: Path
    ) -> None:
        write_release(tmp_path)
        (tmp_path / "tiny-imagenet-200" / "train").rename(tmp_path / "auxiliary")
        (tmp_path / "tiny-imagenet-200").rmdir()
        assert CheXpert().missing(tmp_path) is None
        assert split(tmp_path).auxiliaries[0].ids == split(release).auxiliaries[0].ids

    def test_pictures_have_their_class(self, release: Path) -> None:
        (pictures,) = split(release).auxiliaries
        assert len(pictures) == 12
        assert everything(pictures)["target"].tolist() == [0] * 4 + [1] * 4 + [2] * 4
        assert pictures.strata is not None

    def test_more_classes_than_the_head_has_are_refused(self, release: Path) -> None:
        with pytest.raises(DataError, match=r"at most 2 classes.*found 3.*auxiliary_classes=3"):
            split(release, CheXpert(auxiliary_classes=2))

    def test_what_is_missing_is_named(self, tmp_path: Path) -> None:
        said = CheXpert().missing(tmp_path)
        assert said is not None
        for part in (f"{SMALL}/train.csv", f"{SMALL}/valid.csv", f"{SMALL}/train", "tiny-imagenet"):
            assert part in said
        assert "Stanford AIMI" in said
        write_release(tmp_path)
        assert CheXpert().missing(tmp_path) is None
        (tmp_path / SMALL / "valid.csv").unlink()
        said = CheXpert().missing(tmp_path)
        assert said is not None
        assert f"{tmp_path}: {SMALL}/valid.csv. Films" in said


@pytest.fixture(scope="module")
def labelled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eighteen patients of one film each, the rows of FINDINGS in turn."""
    train = [
        film(
            f"{SMALL}/train/patient{number:05d}/study1/view1_frontal.jpg",
            labels=dict(zip(LABELS, FINDINGS[number % 3], strict=True)),
        )
        for number in range(18)
    ]
    return write_release(tmp_path_factory.mktemp("labels"), train=train)


class TestLabels:
    @pytest.mark.parametrize(
        ("policy", "uncertain"), [("ones", 1.0), ("zeros", 0.0), ("ignore", math.nan)]
    )
    def test_policy_says_what_an_uncertain_label_is(
        self, labelled: Path, policy: str, uncertain: float
    ) -> None:
        task = CheXpert(size=16, u_policy=policy)  # type: ignore[arg-type]
        u = uncertain
        expected = ([1, 0, u, 0, 1], [u, 0, 1, u, 0], [u] * 5)
        found = split(labelled, task)
        for part in (found.train, found.validation):
            for name, target in targets_by_id(part).items():
                number = int(name.split("/")[1].removeprefix("patient"))
                assert_close(target, [float(v) for v in expected[number % 3]], equal_nan=True)

    def test_ones_is_the_default_and_uncertain_labels_are_counted(self, labelled: Path) -> None:
        found = split(labelled)
        count = sum({0: 1, 1: 2, 2: 5}[int(name.split("/")[1][7:]) % 3] for name in found.train.ids)
        assert found.notes == (f"12 patients, {count} uncertain training labels taken as ones",)

    def test_ignored_labels_are_masked_in_loss_and_gradient(self, labelled: Path) -> None:
        task = CheXpert(size=16, u_policy="ignore")
        objective = task.objectives()[0]
        train = split(labelled, task).train
        target = everything(train)["target"]
        output = torch.linspace(-2, 2, target.numel()).view_as(target).requires_grad_()
        losses = objective.loss(output, target)
        assert isinstance(losses, Scored)
        for i, row in enumerate(target.tolist()):
            known = [j for j, value in enumerate(row) if not math.isnan(value)]
            assert losses.weight[i] == bool(known)
            if known:
                alone = [
                    nn.functional.binary_cross_entropy_with_logits(output[i, j], target[i, j])
                    for j in known
                ]
                assert_close(losses.losses[i], torch.stack(alone).mean())
        (grad,) = torch.autograd.grad((losses.losses * losses.weight).sum(), output)
        assert bool((grad[target.isnan()] == 0).all())
        assert bool((grad[~target.isnan()] != 0).all())

    def test_metrics_are_the_mean_area_and_that_of_each_label(self) -> None:
        names = list(CheXpert().objectives()[0].metrics())
        assert names == ["auroc", *(f"auroc {label}" for label in LABELS)]


class TestPatients:
    @pytest.mark.parametrize("seed", SEEDS)
    @pytest.mark.parametrize("views", ["frontal", "all"])
    def test_no_patient_is_in_two_splits(self, release: Path, seed: int, views: str) -> None:
        found = split(release, CheXpert(views=views), seed)  # type: ignore[arg-type]
        found.check()
        parts = [patients_of(part) for part in (found.train, found.validation, found.test)]
        assert sum(map(len, parts)) == len(set.union(*parts))
        assert found.sizes()["train"] == 12
        assert found.sizes()["validation"] == 6

    def test_seeds_draw_different_patients(self, release: Path) -> None:
        drawn = {frozenset(split(release, seed=seed).train.ids) for seed in SEEDS}
        assert len(drawn) == len(SEEDS)
        assert len({split(release, seed=seed).test.ids for seed in SEEDS}) == 1

    def test_test_patients_are_not_drawn_for_training(self, tmp_path: Path) -> None:
        train = patients("train", SMALL, 1, 14)
        # of one patient there is but a lateral film in the test, which frontal runs do not use
        path = f"{SMALL}/valid/patient00003/study9/view1_lateral.jpg"
        valid = [*patients("valid", SMALL, 1, 2), film(path, "Lateral")]
        write_release(tmp_path, train=train, valid=valid)
        for seed in SEEDS:
            found = split(tmp_path, seed=seed)
            drawn = patients_of(found.train) | patients_of(found.validation)
            assert not drawn & {"patient00001", "patient00002", "patient00003"}

    def test_too_few_patients_are_refused(self, tmp_path: Path) -> None:
        write_release(tmp_path, train=patients("train", SMALL, 1, 6))
        with pytest.raises(
            DataError, match=r"12 for train and 6 for validation, found 6 patients with 15 films"
        ):
            split(tmp_path)

    def test_data_digest_is_of_tables_and_pictures_and_of_no_film(self, tmp_path: Path) -> None:
        write_release(tmp_path)
        first = split(tmp_path)
        assert split(tmp_path, seed=1).data_digest == first.data_digest
        assert split(tmp_path, seed=1).files_digest != first.files_digest
        (tmp_path / SMALL / "valid").rename(tmp_path / "moved")
        assert split(tmp_path).data_digest == first.data_digest
        assert split(tmp_path).files_digest == first.files_digest
        write_image(tmp_path / SMALL / first.train.ids[0], "L", 99)
        changed = split(tmp_path)
        assert changed.data_digest == first.data_digest
        assert changed.files_digest != first.files_digest
        write_image(tmp_path / "tiny-imagenet-200/train/n01443537/images/one more.JPEG", "RGB", 0)
        assert split(tmp_path).data_digest != first.data_digest


class TestFaults:
    def test_every_malformed_row_is_listed_with_its_file(self, tmp_path: Path) -> None:
        rows = patients("train", SMALL, 1, 14)
        rows[1]["Path"] = "somewhere/else.jpg"
        rows[3]["Edema"] = "2.0"
        rows[3]["Cardiomegaly"] = "yes"
        rows[5][VIEW] = "Oblique"
        rows[7]["Path"] = rows[6]["Path"]
        rows[9]["Path"] = f"{SMALL}/train/../valid/patient64541/study1/view1_frontal.jpg"
        write_release(tmp_path)
        write_table(tmp_path / SMALL / "train.csv", rows, COLUMNS)
        with (tmp_path / SMALL / "train.csv").open("a", encoding="utf-8") as table:
            table.write("only,three,cells\n")
        with pytest.raises(DataError) as error:
            split(tmp_path)
        said = str(error.value)
        assert str(tmp_path / SMALL / "train.csv") in said
        assert "found 6 that are not" in said
        for part in (
            "row 3: Path 'somewhere/else.jpg'",
            "row 5: Cardiomegaly 'yes', Edema '2.0'",
            "row 7: Frontal/Lateral 'Oblique'",
            f"row 9: Path {rows[6]['Path']!r} a second time",
            f"row 11: Path {rows[9]['Path']!r}",
            f"row {len(rows) + 2}: 3 cells instead of 19",
        ):
            assert part in said, part

    def test_training_films_in_the_official_table_are_refused(self, tmp_path: Path) -> None:
        rows = patients("train", SMALL, 1, 14)
        write_release(tmp_path)
        write_table(tmp_path / SMALL / "valid.csv", rows, COLUMNS)
        with pytest.raises(DataError, match=rf"valid\.csv.*found {len(rows)} that are not"):
            split(tmp_path)

    def test_missing_columns_are_listed(self, tmp_path: Path) -> None:
        write_release(tmp_path)
        kept = [name for name in COLUMNS if name not in ("Edema", VIEW)]
        write_table(tmp_path / SMALL / "train.csv", patients("train", SMALL, 1, 14), kept)
        with pytest.raises(DataError, match=r"train\.csv.*named Frontal/Lateral, Edema"):
            split(tmp_path)

    @pytest.mark.parametrize("content", [b"", b"\xff\xfe\x00", ",".join(COLUMNS).encode()])
    def test_a_table_without_rows_is_refused(self, tmp_path: Path, content: bytes) -> None:
        write_release(tmp_path)
        (tmp_path / SMALL / "train.csv").write_bytes(content)
        with pytest.raises(DataError, match=r"train\.csv"):
            split(tmp_path)

    def test_all_files_that_can_not_be_read_are_listed(self, tmp_path: Path) -> None:
        write_release(tmp_path)
        missing, truncated, other = (
            tmp_path / SMALL / name for name in split(tmp_path).train.ids[:3]
        )
        missing.unlink()
        truncated.write_bytes(truncated.read_bytes()[:-60])
        other.write_text("no film")
        found = split(tmp_path)
        with pytest.raises(DataError) as error:
            found.train.take(np.array([5]))
        for path, reason in ((missing, "missing"), (truncated, "truncated"), (other, "no image")):
            assert f"{path} ({reason})" in str(error.value)

    def test_unknown_policy_is_refused(self) -> None:
        with pytest.raises(FieldError, match="ones, zeros, ignore"):
            CheXpert(u_policy="maybe")  # type: ignore[arg-type]


class TestPresets:
    def test_paper_has_the_sizes_and_rates_of_the_reference(self) -> None:
        config = resolve(Request("primary-only", "chexpert", preset="paper"))
        assert config.preset.sizes == {"train": 5000, "validation": 100}
        assert config.task.input.size == 224
        assert isinstance(config.task, CheXpert)
        assert config.task.views == "all"
        assert config.task.u_policy == "ones"
        assert config.architecture.backbone == "timm:resnet18"
        assert config.architecture.dropout == 0.2
        assert config.optimizer.name == "adamw"
        assert config.optimizer.lr == 1e-4
        assert config.optimizer.fine_tune_factor == 0.5
        assert config.budget.batch_size == 64
        assert config.budget.patience == 10

    def test_own_settings_go_before_those_of_a_preset(self) -> None:
        own = {"task.size": 96, "model.dropout": 0.0}
        config = resolve(Request("primary-only", "chexpert", preset="paper", settings=own))
        assert config.task.input.size == 96
        assert config.architecture.dropout == 0.0


def test_films_keep_their_sides_and_pictures_do_not() -> None:
    images = torch.zeros(64, 3, 32, 32, dtype=torch.uint8)
    images[..., :16] = 200
    examples = {"image": images, "target": torch.zeros(64, len(LABELS))}
    random = ExampleRandom(0, np.zeros(64, np.int64), np.arange(64))
    sided = []
    for objective in CheXpert(size=32).objectives():
        inputs, _ = objective.batch(examples, random)
        assert inputs.std(0).max() > 0, "training images are moved"
        assert_close(objective.batch(examples, None)[0].std(0).max(), torch.tensor(0.0))
        sided.append((inputs[..., :16].mean((1, 2, 3)) > inputs[..., 16:].mean((1, 2, 3))).double())
    assert sided[0].mean() == 1
    assert 0.2 < sided[1].mean() < 0.8


WATCHED = """
import json, os, sys
from pathlib import Path

folder, away = Path(sys.argv[1]), Path(sys.argv[2])
touched, has_trained = [], False

def note(how, what):
    try:
        name = os.path.abspath(os.fsdecode(what))
    except (TypeError, ValueError):
        return
    if "/valid/" in name or name.endswith("/valid"):
        touched.append((has_trained, how, name))

def hook(event, arguments):
    if event in ("open", "os.listdir", "os.scandir") and arguments:
        note(event, arguments[0])

def watched(function):
    def call(path, *arguments, **options):
        note(function.__name__, path)
        return function(path, *arguments, **options)
    return call

from gradbench import execution, run
from gradbench.settings import Budget
from gradbench.task import Preset
from gradbench_tasks.chexpert import CheXpert

evaluate = execution.evaluate

def evaluate_and_move(model, objective, examples, device, precision, split="", **options):
    global has_trained
    if split == "test":
        has_trained = True
        away.rename(folder / "valid")
    return evaluate(model, objective, examples, device, precision, split, **options)

budget = Budget(epochs=1, fine_tune_epochs=1, steps_per_epoch=2, batch_size=4)
preset = Preset("timm:test_vit", {"train": 12, "validation": 6}, budget)
CheXpert.presets = {"default": preset}
execution.evaluate = evaluate_and_move
sys.addaudithook(hook)
os.stat, os.lstat = watched(os.stat), watched(os.lstat)
(folder / "valid").rename(away)
touched.clear()
result = run("attittud", "chexpert", data="real", settings={"task.size": 32})
print(json.dumps([result.status, result.task.sizes.test, touched]))
"""


def test_test_films_are_not_touched_before_training_has_ended(tmp_path: Path) -> None:
    folder = write_release(tmp_path / "data" / "chexpert") / SMALL
    environment = {
        **os.environ,
        "GRADBENCH_DATA": str(tmp_path / "data"),
        "GRADBENCH_HOME": str(tmp_path / "home"),
        "GRADBENCH_TRACKING_URI": "none",
    }
    done = subprocess.run(
        [sys.executable, "-c", WATCHED, str(folder), str(tmp_path / "away")],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    status, tested, touched = json.loads(done.stdout.splitlines()[-1])
    assert status == "ok"
    before = [what for has_trained, *what in touched if not has_trained]
    assert before == []
    opened = {name for _, how, name in touched if how == "open"}
    assert len(opened) == tested == 10
