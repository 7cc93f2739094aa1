from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from gradbench.errors import DataError
from gradbench.seeding import ExampleRandom
from gradbench.settings import Budget
from gradbench.task import Preset, Splits
from gradbench_tasks.digits import MEAN, SPREAD, DigitClassification, Digits

NOWHERE = Path("/nonexistent")  # the pair needs no files


def splits(seed: int = 0) -> Splits:
    task = Digits()
    return task.splits("real", NOWHERE, task.presets["default"], seed)


def labels_of(part: str, seed: int = 0) -> list[int]:
    found = getattr(splits(seed), part)
    labels: list[int] = found.take(np.arange(len(found)))["label"].tolist()
    return labels


def test_the_data_is_that_of_the_library() -> None:
    images, labels = load_digits(return_X_y=True)
    everything = splits()
    parts = (everything.train, everything.validation, everything.test, everything.auxiliaries[0])
    seen: dict[int, int] = {}
    for part in parts:
        taken = part.take(np.arange(len(part)))
        assert part.strata is not None
        for name, scan, label, digit in zip(
            part.ids, taken["scan"], taken["label"], part.strata, strict=True
        ):
            position = int(name.removeprefix("scan-"))
            np.testing.assert_array_equal(scan.numpy().ravel(), images[position])
            assert int(digit) == labels[position]
            assert int(label) == labels[position] % 5
            seen[position] = seen.get(position, 0) + 1
    assert seen == dict.fromkeys(range(1797), 1)


def test_splits_have_the_sizes_of_the_preset() -> None:
    everything = splits()
    everything.check()
    assert everything.sizes() == {"train": 100, "validation": 50, "test": 751, "meta": 0}
    assert len(everything.auxiliaries[0]) == 896
    assert np.bincount(labels_of("train")).tolist() == [20] * 5
    assert np.bincount(labels_of("validation")).tolist() == [10] * 5


def test_the_primary_is_of_digits_0_to_4_and_the_auxiliary_of_5_to_9() -> None:
    everything = splits()
    for part in (everything.train, everything.validation, everything.test):
        assert part.strata is not None
        assert set(part.strata.tolist()) == {0, 1, 2, 3, 4}
    assert everything.auxiliaries[0].strata is not None
    assert set(everything.auxiliaries[0].strata.tolist()) == {5, 6, 7, 8, 9}


def test_splits_are_a_function_of_the_seed() -> None:
    assert splits(1).digest() == splits(1).digest()
    assert splits(1).digest() != splits(2).digest()
    assert splits(1).data_digest == splits(2).data_digest


def test_held_out_examples_come_out_of_train() -> None:
    found = splits().with_meta(0)
    found.check()
    assert found.sizes() == {"train": 80, "validation": 50, "test": 751, "meta": 20}


def test_a_preset_that_asks_for_too_much_is_refused() -> None:
    task = Digits()
    preset = Preset(backbone="", sizes={"train": 150, "validation": 30}, budget=Budget())
    with pytest.raises(DataError, match=r"180 examples of class 0.*found 178"):
        task.splits("real", NOWHERE, preset, 0)


def test_nothing_is_missing() -> None:
    assert Digits().missing(NOWHERE) is None
    assert Digits.sources == ("real",)


def test_images_are_as_the_trunk_is_told() -> None:
    task = Digits()
    everything = splits()
    taken = everything.train.take(np.arange(100))
    images, labels = task.objectives()[0].batch(taken, None)
    assert images.shape == (100, task.input.channels, task.input.size, task.input.size)
    assert images.dtype == torch.float32
    assert images.is_contiguous()
    assert labels.dtype == torch.int64
    assert torch.equal(images[:, 0], images[:, 1])
    assert torch.equal(images[:, 0], images[:, 2])


def test_images_are_of_mean_0_and_spread_1() -> None:
    scans = torch.from_numpy(load_digits().images.astype(np.float32))
    assert abs(float(scans.mean()) / 16 - MEAN) < 1e-3
    assert abs(float(scans.std()) / 16 - SPREAD) < 1e-3
    objective = DigitClassification("digits", 5, margin=0.02)
    images, _ = objective.batch({"scan": scans, "label": torch.zeros(1797)}, None)
    assert abs(float(images.mean())) < 0.01
    assert 0.8 < float(images.std()) < 1.01  # smoothing by the larger size takes some of it


def test_images_are_the_scans_made_larger() -> None:
    scan = torch.zeros(1, 8, 8)
    scan[0, 2, 5] = 16
    objective = DigitClassification("digits", 5, margin=0.02)
    images, _ = objective.batch({"scan": scan, "label": torch.zeros(1)}, None)
    ink = images[0, 0] * SPREAD + MEAN
    rows, columns = (ink > 0.5).nonzero().T
    assert (int(rows.min()), int(rows.max())) == (8, 11)
    assert (int(columns.min()), int(columns.max())) == (20, 23)


def test_training_images_are_moved_by_example_and_pass() -> None:
    objective = Digits().objectives()[0]
    taken = splits().train.take(np.zeros(50, dtype=np.int64))
    order = np.arange(50, dtype=np.int64)
    random = ExampleRandom(3, order * 0, order)
    moved, labels = objective.batch(taken, random)
    still, _ = objective.batch(taken, None)
    assert torch.equal(labels, taken["label"])
    assert 5 < len(moved.flatten(1).unique(dim=0)) <= 25
    assert not torch.equal(moved, still)
    again, _ = objective.batch(taken, ExampleRandom(3, order * 0, order))
    assert torch.equal(moved, again)
    other, _ = objective.batch(taken, ExampleRandom(3, order * 0 + 1, order))
    assert not torch.equal(moved, other)


def test_objectives_are_two_of_five_classes() -> None:
    objectives = Digits().objectives()
    assert [objective.name for objective in objectives] == ["digits 0–4", "digits 5–9"]
    for objective in objectives:
        assert objective.head_name is None
        assert objective.higher_is_better
        assert list(objective.metrics()) == ["accuracy"]
        assert objective.head(7, 0.0).get_parameter("linear.weight").shape == (5, 7)
