from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from gradbench import seeding
from gradbench.data.division import divide
from gradbench.task import Indices

SHARES = (0.5, 0.2, 0.3)


def parts(
    marks: list[tuple[int, ...]],
    groups: list[str] | None = None,
    shares: tuple[float, ...] = SHARES,
    seed: int = 0,
) -> Indices:
    return divide(marks, groups, shares, seeding.rng(seed, "test"))


def counts(part: Indices, marks: list[tuple[int, ...]], mark: int) -> list[int]:
    found = Counter(int(p) for p, each in zip(part, marks, strict=True) if mark in each)
    return [found[p] for p in range(max(part) + 1)]


def classes(*sizes: int) -> list[tuple[int, ...]]:
    return [(label,) for label, size in enumerate(sizes) for _ in range(size)]


def test_classes_are_divided_in_proportion() -> None:
    marks = classes(10, 100, 30)
    part = parts(marks)
    assert [counts(part, marks, label) for label in range(3)] == [
        [5, 2, 3],
        [50, 20, 30],
        [15, 6, 9],
    ]


@pytest.mark.parametrize("size", range(3, 12))
@pytest.mark.parametrize("shares", [SHARES, (0.9, 0.05, 0.05), (0.05, 0.05, 0.9)])
def test_every_part_gets_one_where_there_are_enough(size: int, shares: tuple[float, ...]) -> None:
    marks = classes(size, 40)
    for seed in range(5):
        assert min(counts(parts(marks, shares=shares, seed=seed), marks, 0)) >= 1


@pytest.mark.parametrize("size", [5, 6, 9, 23])
def test_folds_differ_by_one_at_most(size: int) -> None:
    marks = classes(size, 50)
    found = counts(parts(marks, shares=(0.2,) * 5), marks, 0)
    assert sum(found) == size
    assert max(found) - min(found) <= 1


def test_it_is_a_function_of_the_generator() -> None:
    marks = classes(20, 20)
    assert (parts(marks) == parts(marks)).all()
    assert (parts(marks) != parts(marks, seed=1)).any()


def test_groups_stay_whole() -> None:
    draw = np.random.default_rng(0)
    for seed in range(5):
        groups = [str(group) for group in draw.integers(0, 60, 400)]
        label_of = {group: int(group) % 3 for group in groups}
        marks: list[tuple[int, ...]] = [(label_of[group],) for group in groups]
        part = parts(marks, groups, seed=seed)
        assert len({*zip(groups, part.tolist(), strict=True)}) == len(set(groups))
        for label in range(3):
            total = sum(mark == (label,) for mark in marks)
            for found, share in zip(counts(part, marks, label), SHARES, strict=True):
                assert found == pytest.approx(share * total, abs=8)  # about a group


def test_a_few_uneven_groups_leave_no_part_empty() -> None:
    groups = ["large"] * 38 + ["one", "two"]
    for seed in range(20):
        assert set(parts(classes(40), groups, seed=seed).tolist()) == {0, 1, 2}


def test_groups_of_any_size_are_divided_evenly() -> None:
    draw = np.random.default_rng(0)
    groups = [str(group) for group, size in enumerate(draw.integers(1, 8, 60)) for _ in range(size)]
    marks: list[tuple[int, ...]] = [(int(label),) for label in draw.integers(0, 3, len(groups))]
    for seed in range(20):
        part = parts(marks, groups, seed=seed)
        away = [
            abs(found - share * sum(counts(part, marks, label)))
            for label in range(3)
            for found, share in zip(counts(part, marks, label), SHARES, strict=True)
        ]
        assert sum(away) < 0.05 * len(groups)


def test_classes_in_few_groups_reach_every_part_if_they_can() -> None:
    marks: list[tuple[int, ...]] = [*[(0,)] * 30, *[(1,)] * 3, (0,), (0,)]
    groups = ["large"] * 30 + ["large", "b", "c", "x", "y"]
    for seed in range(20):
        part = parts(marks, groups, seed=seed)
        assert set(counts(part, marks, 0)) == {30, 1}
        assert counts(part, marks, 1) == [1, 1, 1]


def test_labels_are_divided_together() -> None:
    draw = np.random.default_rng(1)
    truth = draw.random((600, 4)) < [0.5, 0.1, 0.03, 0.3]
    known = draw.random((600, 4)) < 0.8
    marks = [
        tuple(2 * i + int(value) for i, value in enumerate(row) if known[place, i])
        for place, row in enumerate(truth)
    ]
    part = parts(marks)
    for mark in range(8):
        total = sum(mark in each for each in marks)
        for found, share in zip(counts(part, marks, mark), SHARES, strict=True):
            assert found == pytest.approx(share * total, abs=max(2.0, 0.05 * total))


def test_examples_without_marks_are_divided_too() -> None:
    part = parts([()] * 10)
    assert np.bincount(part).tolist() == [5, 2, 3]
