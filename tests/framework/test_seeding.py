from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
from numpy.typing import NDArray

from gradbench.seeding import Axis, ExampleRandom, derive, rng

COUNT = 20_000
STANDARD_ERROR = (1 / 12 / COUNT) ** 0.5  # of the mean of that many uniform numbers
KURTOSIS_TERM = 1 / 180  # variance of (u - 1/2)², for the standard error of a variance


def numbers(*values: int) -> NDArray[np.int64]:
    return np.array(values, dtype=np.int64)


class TestDerive:
    @pytest.mark.parametrize(
        ("axes", "expected"),
        [
            ((0,), 7806570719398326482),
            ((7, "dropout", 3, 1), 7247917738328401941),
            ((2**70, "é", "-1", -1), 6091459843971467433),
        ],
    )
    def test_is_pinned(self, axes: tuple[int, *tuple[Axis, ...]], expected: int) -> None:
        assert derive(*axes) == expected

    def test_is_the_same_in_another_process(self) -> None:
        code = "from gradbench.seeding import derive; print(derive(7, 'dropout', 3, 1))"
        for hash_seed in ("0", "1"):
            found = subprocess.run(
                [sys.executable, "-c", code],
                env={"PYTHONHASHSEED": hash_seed},
                capture_output=True,
                text=True,
                check=True,
            )
            assert int(found.stdout) == 7247917738328401941

    def test_tells_places_apart(self) -> None:
        places: list[tuple[int, *tuple[Axis, ...]]] = [
            (1,),
            (2,),
            (1, 0),
            (1, "0"),
            (1, 0, 0),
            (1, "a", "b"),
            (1, "ab"),
            (1, "b", "a"),
            (1, "a", 1, 2),
            (1, "a", 12),
            (11, "a"),
            (1, "1a"),
        ]
        assert len({derive(*place) for place in places}) == len(places)

    def test_takes_integers_of_numpy(self) -> None:
        assert derive(int(np.int64(3)), np.int64(4)) == derive(3, 4)  # type: ignore[arg-type]

    def test_fits_a_signed_word(self) -> None:
        assert all(0 <= derive(seed) < 2**63 for seed in range(200))


class TestRng:
    def test_is_pinned(self) -> None:
        assert rng(3, "order", 0, 1).permutation(6).tolist() == [5, 1, 2, 3, 4, 0]

    def test_does_not_depend_on_what_was_drawn_before(self) -> None:
        first, second = rng(1, "a"), rng(1, "b")
        forwards = [first.random(), second.random()]
        second, first = rng(1, "b"), rng(1, "a")
        backwards = [second.random(), first.random()]
        assert forwards == backwards[::-1]
        assert forwards[0] != forwards[1]

    def test_leaves_the_global_generator_alone(self) -> None:
        before = np.random.get_state()  # noqa: NPY002 - it is the one that must not move
        rng(1, "a").random(10)
        after = np.random.get_state()  # noqa: NPY002
        assert (before[1] == after[1]).all()  # type: ignore[index]


class TestExampleRandom:
    def test_is_pinned(self) -> None:
        random = ExampleRandom(5, numbers(0, 1), numbers(4, 4))
        expected = [
            [0.9605140214106568, 0.7291175098231943],
            [0.14759331166257827, 0.500122445720479],
        ]
        assert random.uniform("a", 2).tolist() == expected
        assert random.integers("b", 10).tolist() == [7, 8]

    def test_does_not_depend_on_the_batch(self) -> None:
        passes, examples = numbers(0, 0, 0, 1, 1), numbers(7, 3, 9, 7, 2)
        together = ExampleRandom(5, passes, examples).uniform("a", 4)
        for row in range(5):
            alone = ExampleRandom(5, passes[row : row + 1], examples[row : row + 1])
            np.testing.assert_array_equal(alone.uniform("a", 4)[0], together[row])
        order = numbers(4, 2, 0, 3, 1)
        turned = ExampleRandom(5, passes[order], examples[order]).uniform("a", 4)
        np.testing.assert_array_equal(turned, together[order])

    def test_a_longer_draw_begins_as_a_shorter_one(self) -> None:
        random = ExampleRandom(5, numbers(0), numbers(4))
        np.testing.assert_array_equal(random.uniform("a", 8)[:, :3], random.uniform("a", 3))

    def test_streams_passes_examples_and_keys_differ(self) -> None:
        def draw(key: int, passage: int, example: int, stream: str) -> float:
            random = ExampleRandom(key, numbers(passage), numbers(example))
            return float(random.uniform(stream, 1)[0, 0])

        places = [(1, 2, 3, "a"), (2, 2, 3, "a"), (1, 3, 3, "a"), (1, 2, 4, "a"), (1, 2, 3, "b")]
        places += [(1, 3, 2, "a"), (1, 0, 0, "a"), (1, 0, 1, "a"), (1, 1, 0, "a")]
        assert len({draw(*place) for place in places}) == len(places)

    @pytest.mark.parametrize("along", ["examples", "passes", "draws"])
    def test_numbers_are_uniform(self, along: str) -> None:
        line, zero = np.arange(COUNT, dtype=np.int64), np.zeros(COUNT, dtype=np.int64)
        if along == "draws":
            found = ExampleRandom(5, zero[:1], zero[:1]).uniform("a", COUNT)[0]
        elif along == "examples":
            found = ExampleRandom(5, zero, line).uniform("a", 1)[:, 0]
        else:
            found = ExampleRandom(5, line, zero).uniform("a", 1)[:, 0]
        assert found.dtype == np.float64
        assert found.min() >= 0
        assert found.max() < 1
        assert abs(found.mean() - 1 / 2) < 5 * STANDARD_ERROR
        assert abs(found.var() - 1 / 12) < 5 * (KURTOSIS_TERM / COUNT) ** 0.5
        assert abs(np.corrcoef(found[:-1], found[1:])[0, 1]) < 5 / COUNT**0.5

    def test_streams_are_not_correlated(self) -> None:
        random = ExampleRandom(5, np.zeros(COUNT, dtype=np.int64), np.arange(COUNT, dtype=np.int64))
        pair = random.uniform("a", 1)[:, 0], random.uniform("b", 1)[:, 0]
        assert abs(np.corrcoef(*pair)[0, 1]) < 5 / COUNT**0.5

    def test_integers_cover_their_range(self) -> None:
        random = ExampleRandom(5, np.zeros(COUNT, dtype=np.int64), np.arange(COUNT, dtype=np.int64))
        found = random.integers("a", 7)
        assert found.dtype == np.int64
        counts = np.bincount(found)
        assert len(counts) == 7
        assert abs(counts - COUNT / 7).max() < 5 * (COUNT / 7) ** 0.5

    def test_takes_an_empty_batch(self) -> None:
        assert ExampleRandom(5, numbers(), numbers()).uniform("a", 3).shape == (0, 3)
