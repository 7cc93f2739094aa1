from __future__ import annotations

import csv
import hashlib
import re
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from gradbench import seeding
from gradbench.task import Splits
from gradbench_tasks import _chexpert_sample
from gradbench_tasks._chexpert_beam import Chests
from gradbench_tasks._chexpert_frontal import Frontal
from gradbench_tasks._chexpert_lateral import Lateral
from gradbench_tasks.chexpert import CheXpert

LABELS = ("Atelectasis", "Cardiomegaly", "Consolidation", "Edema", "Pleural Effusion")
FINDINGS = ("atelectasis", "cardiomegaly", "consolidation", "edema", "effusion")
LIMIT = 40e6  # bytes, so that nobody minds
SEEN = 1.5  # grey levels of 255 that a strong finding changes, on the average of its film


@pytest.fixture(scope="module")
def sample(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sample")
    start = time.process_time()
    CheXpert().draw_sample(folder)
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    print(f"drawn in {time.process_time() - start:.1f} s, {size / 1e6:.1f} MB")
    assert size <= LIMIT
    return folder


@pytest.fixture(scope="module")
def splits(sample: Path) -> Splits:
    return CheXpert().splits("sample", sample, CheXpert.presets["default"], 0)


def rows(sample: Path, split: str) -> list[dict[str, str]]:
    with (sample / "CheXpert-v1.0-small" / f"{split}.csv").open(encoding="utf-8") as table:
        return list(csv.DictReader(table))


def patient(row: dict[str, str]) -> str:
    return row["Path"].split("/")[2]


def bytes_of(folder: Path) -> dict[str, str]:
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def test_two_draws_have_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # whether the whole sample is drawn the same again is asked of every task pair
    monkeypatch.setattr(_chexpert_sample, "PATIENTS", {"train": 9, "valid": 5})
    drawn = []
    for name in ("one", "other"):
        folder = tmp_path / name
        folder.mkdir()
        CheXpert().draw_sample(folder)
        drawn.append(bytes_of(folder))
    assert drawn[0] == drawn[1]
    assert len(drawn[0]) > 30


def test_the_loader_reads_it(sample: Path, splits: Splits) -> None:
    splits.check()
    assert (
        CheXpert(films=str(sample), auxiliary=str(sample / "tiny-imagenet-200")).missing(
            sample / "nowhere"
        )
        is None
    )
    train = splits.train.take(np.arange(len(splits.train)))
    assert train["image"].shape == (400, 3, 64, 64)
    shares = train["target"].mean(0)
    assert bool(((shares > 0.1) & (shares < 0.5)).all())
    pictures = splits.auxiliaries[0]
    assert len(pictures) == 1200
    assert int(pictures.take(np.arange(1200))["target"].max()) == 19


def test_settings_that_point_to_real_data_are_not_used_and_said_so(sample: Path) -> None:
    task = CheXpert(films="/nowhere", auxiliary="/nowhere")
    found = task.splits("sample", sample, CheXpert.presets["default"], 0)
    assert any("not used" in note for note in found.notes)


def test_paths_are_those_of_the_release_and_every_film_is_there(sample: Path) -> None:
    for split in ("train", "valid"):
        for row in rows(sample, split):
            assert re.fullmatch(
                rf"CheXpert-v1\.0-small/{split}/patient\d{{5}}/study\d+/view\d+_"
                rf"{row['Frontal/Lateral'].lower()}\.jpg",
                row["Path"],
            )
            with Image.open(sample / row["Path"]) as film:
                assert film.mode == "L"
                assert film.format == "JPEG"


def test_tables_have_what_makes_the_real_ones_hard(sample: Path) -> None:
    train = rows(sample, "train")
    films = Counter(map(patient, train))
    assert max(films.values()) >= 4
    assert sum(count > 1 for count in films.values()) > len(films) / 3
    for label in LABELS:
        values = Counter(row[label] for row in train)
        assert set(values) == {"1.0", "0.0", "-1.0", ""}, label
        assert values["-1.0"] < values["1.0"] < values[""]
    views = Counter(row["Frontal/Lateral"] for row in train)
    assert 0 < views["Lateral"] < views["Frontal"] / 4
    assert {row["AP/PA"] for row in train} == {"AP", "PA", ""}
    assert {row["Sex"] for row in train} == {"Female", "Male"}
    assert all(18 <= int(row["Age"]) <= 90 for row in train)


def test_official_films_are_read_without_doubt(sample: Path) -> None:
    valid = rows(sample, "valid")
    for label in LABELS:
        assert {row[label] for row in valid} == {"1.0", "0.0"}
    assert not set(map(patient, valid)) & set(map(patient, rows(sample, "train")))


def test_films_of_a_patient_resemble_each_other(splits: Splits) -> None:
    images = splits.train.take(np.arange(len(splits.train)))["image"][:, 0].double().flatten(1)
    images = (images - images.mean(1, keepdim=True)) / images.std(1, keepdim=True)
    alike = images @ images.T / images.shape[1]
    who = [name.split("/")[1] for name in splits.train.ids]
    same = np.array([[one == other for other in who] for one in who]) & ~np.eye(
        len(who), dtype=bool
    )
    assert alike.numpy()[same].mean() > alike.numpy()[~same].mean() + 0.02


def chests(**findings: float) -> Chests:
    """Return three ordinary chests with these findings."""
    ones = np.ones(3, np.float32)
    usual = {
        "width": 1.0, "height": 0.5, "heart": 0.44, "tilt": 0.0, "knob": 0.3, "ribs": 0.2,
        "phase": 0.1, "bone": 1.0, "bulk": 0.3, "breast": 0.0, "curve": 0.0, "portable": 0.0,
        "turn": 0.0, "zoom": 0.95, "exposure": 0.0, "side": -1.0, "both": 0.0, "wires": 0.0,
        **dict.fromkeys(FINDINGS, 0.0), **findings,
    }  # fmt: skip
    found = {name: value * ones for name, value in usual.items()}
    return Chests(
        shift=np.zeros((3, 2), np.float32), place=np.full((3, 4), 0.4, np.float32), **found
    )


def films_of(kind: Callable[..., Frontal | Lateral], which: Chests) -> NDArray[np.float64]:
    return kind(which, seeding.rng(0, "films")).film().astype(np.float64)


@pytest.mark.parametrize("finding", FINDINGS)
def test_a_finding_is_seen_and_more_of_it_is_seen_more(finding: str) -> None:
    without = films_of(Frontal, chests())
    changes = [
        np.abs(films_of(Frontal, chests(**{finding: severity})) - without).mean()
        for severity in (0.3, 0.6, 1.0)
    ]
    assert changes == sorted(changes)
    assert changes[-1] > SEEN


@pytest.mark.parametrize("finding", ["consolidation", "atelectasis", "effusion"])
def test_a_finding_is_on_its_side(finding: str) -> None:
    without = films_of(Frontal, chests())
    found = chests(**{finding: 1.0})
    for side in (-1, 1):
        turned = replace(found, side=np.full_like(found.side, side))
        changed = np.abs(films_of(Frontal, turned) - without)
        own, other = np.split(changed.mean(0), 2, axis=1)[::-side]
        assert own.mean() > 2 * other.mean()


@pytest.mark.parametrize("finding", ["cardiomegaly", "consolidation", "edema", "effusion"])
def test_a_finding_is_seen_from_the_side_too(finding: str) -> None:
    changed = films_of(Lateral, chests(**{finding: 1.0})) - films_of(Lateral, chests())
    assert np.abs(changed).mean() > SEEN
