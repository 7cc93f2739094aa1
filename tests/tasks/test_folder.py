from __future__ import annotations

import dataclasses
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from torch.testing import assert_close

import gradbench
from gradbench.cli import main
from gradbench.data.tables import Table, read_table
from gradbench.errors import DataError, FieldError
from gradbench.objectives import Classification, MultiLabel, image_input
from gradbench.result import RunResult
from gradbench.seeding import ExampleRandom
from gradbench.task import ExampleSet, Splits
from gradbench.testing import MakeTask, TaskContract
from gradbench_tasks.folder import Folder

LABELS = ("edema", "effusion")
BUDGET = {
    "budget.fine_tune_epochs": 0,
    "budget.steps_per_epoch": 2,
    "budget.batch_size": 4,
    "task.size": 32,
}


def draw(path: Path, level: int, spread: int = 20) -> None:
    """Write an image of about one level, another one in every place."""
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(sum(str(path.name).encode()))
    pixels = noise.integers(level - spread, level + spread, (12, 16, 3))
    Image.fromarray(pixels.astype(np.uint8)).save(path)


def tree(folder: Path, **sizes: int) -> Path:
    """Write a folder of so many images a class."""
    for level, (name, count) in enumerate(sizes.items()):
        for i in range(count):
            draw(folder / name / f"{name}-{i:03d}.{'jpg' if i % 2 else 'png'}", 40 + 60 * level)
    return folder


def films(folder: Path, count: int = 60, group_size: int = 3) -> Path:
    """Write a CSV of labelled films, a third of the labels blank, some films a patient."""
    known = np.random.default_rng(1).random((count, len(LABELS))) < 2 / 3
    rows = [",".join(("path", "group", *LABELS))]
    for i in range(count):
        truth = (i // group_size % 2, i % 2)
        cells = [str(value) if known[i, k] else "" for k, value in enumerate(truth)]
        rows.append(",".join((f"films/{i:03d}.png", f"patient {i // group_size}", *cells)))
        draw(folder / f"films/{i:03d}.png", 60 + 100 * truth[0])
    (folder / "films.csv").write_text("\n".join(rows))
    return folder / "films.csv"


def touched(folder: Path, **sizes: int) -> Path:
    """Write a folder of files that have the names of images."""
    for name, count in sizes.items():
        (folder / name).mkdir(parents=True)
        for i in range(count):
            (folder / name / f"{name}-{i:03d}.png").touch()
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a small and a larger tree and a CSV; tests leave it as it is."""
    folder = tmp_path_factory.mktemp("data")
    tree(folder / "my", cat=12, dog=12, owl=12)
    tree(folder / "big", ant=30, bee=30)
    films(folder)
    return folder


@pytest.fixture
def no_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave the bytes of files alone, for tests of what is known without them."""
    monkeypatch.setattr("gradbench_tasks.folder.digests", lambda paths: ["" for _ in paths])


def pair(primary: Path, auxiliary: Path, **fields: Any) -> Folder:
    return Folder(primary=str(primary), auxiliary=str(auxiliary), **fields)


def splits(task: Folder, seed: int = 0) -> Splits:
    found = task.splits("real", Path(), task.presets["default"], seed)
    found.check()
    return found


def parts(found: Splits) -> dict[str, ExampleSet]:
    return {"train": found.train, "validation": found.validation, "test": found.test}


def groups_of(table: Table, part: ExampleSet) -> set[str]:
    assert table.groups is not None
    owner = dict(zip(table.ids, table.groups, strict=True))
    return {owner[name] for name in part.ids}


class TestExample(TaskContract):
    @pytest.fixture
    def make_task(self, tmp_path: Path) -> MakeTask:
        task = Folder.example(tmp_path)
        return lambda: dataclasses.replace(task)


class TestLabelledFilms(TaskContract):
    @pytest.fixture
    def make_task(self, data: Path) -> MakeTask:
        return lambda: pair(data / "films.csv", data / "big", folds=1)


class TestObjectives:
    def test_classes_come_from_folders(self, data: Path) -> None:
        objectives = pair(data / "my", data / "big").objectives()
        assert [objective.name for objective in objectives] == ["primary", "auxiliary"]
        assert all(isinstance(objective, Classification) for objective in objectives)
        assert [objective.labels for objective in objectives] == [
            *(("cat", "dog", "owl"), ("ant", "bee"))
        ]
        assert list(objectives[0].metrics()) == ["accuracy"]

    def test_labels_come_from_columns(self, data: Path) -> None:
        objectives = pair(data / "films.csv", data / "my").objectives()
        assert isinstance(objectives[0], MultiLabel)
        assert isinstance(objectives[1], Classification)
        assert objectives[0].labels == LABELS
        assert list(objectives[0].metrics()) == ["auroc", "auroc edema", "auroc effusion"]
        chosen = pair(data / "films.csv", data / "my", labels=" effusion ").objectives()[0]
        assert isinstance(chosen, MultiLabel)
        assert chosen.labels == ("effusion",)

    def test_size_and_mirror_reach_the_batch(self, data: Path) -> None:
        task = pair(data / "my", data / "big", size=16, mirror=False)
        assert (task.input.channels, task.input.size) == (3, 16)
        examples = splits(task).train.take(np.arange(4))
        images, target = task.objectives()[0].batch(examples, None)
        assert images.shape == (4, 3, 16, 16)
        random = ExampleRandom(0, np.zeros(4, np.int64), np.arange(4))
        moved = image_input(examples["image"], random, pixels=1, mirror=False)
        assert_close(task.objectives()[0].batch(examples, random)[0], moved)
        assert target.tolist() == examples["target"].tolist()

    def test_other_files_are_read_for_prediction(self, data: Path) -> None:
        files = [data / "big/ant/ant-000.png", data / "my/cat/cat-001.jpg"]
        for primary in ("my", "films.csv"):
            task = pair(data / primary, data / "big", size=16)
            examples = task.read(files)
            assert list(examples.ids) == [str(file) for file in files]
            images, _ = task.objectives()[0].batch(examples.take(np.arange(2)), None)
            assert images.shape == (2, 3, 16, 16)


class TestSplits:
    def test_few_images_are_in_folds(self, tmp_path: Path, no_bytes: None) -> None:
        big = touched(tmp_path / "big", a=1, b=1)
        few = splits(pair(touched(tmp_path / "few", a=100, b=99), big))
        assert len(few.test) == pytest.approx(199 / 5, abs=1)
        assert len(few.validation) == pytest.approx(199 / 5, abs=1)
        assert sum(few.sizes().values()) == 199
        assert few.notes[0].startswith("the test is fold 0 of 0 … 4, for there are fewer than 200")
        many = splits(pair(touched(tmp_path / "many", a=100, b=100), big))
        assert many.sizes() == {"train": 100, "validation": 40, "test": 60, "meta": 0}
        assert many.notes[0].startswith("one, drawn with the seed, for there are not fewer")

    def test_folds_cover_everything_once(self, tmp_path: Path, no_bytes: None) -> None:
        task = pair(touched(tmp_path / "my", a=13, b=7, c=4), touched(tmp_path / "big", x=1, y=1))
        for folds in (2, 4):
            tested: list[str] = []
            for fold in range(folds):
                found = splits(dataclasses.replace(task, folds=folds, fold=fold), seed=3)
                tested += found.test.ids
                for part in parts(found).values():
                    assert part.strata is not None
                    assert set(part.strata.tolist()) == {0, 1, 2}
            assert len(tested) == len(set(tested)) == 24

    def test_shares_are_of_all_images_and_a_class_s(self, tmp_path: Path, no_bytes: None) -> None:
        primary = touched(tmp_path / "my", a=200, b=40)
        task = pair(primary, touched(tmp_path / "big", x=1, y=1))
        found = splits(dataclasses.replace(task, validation_share=0.1, test_share=0.4))
        counts = {
            name: np.bincount(part.strata).tolist()
            for name, part in parts(found).items()
            if part.strata is not None
        }
        assert counts == {"train": [100, 20], "validation": [20, 4], "test": [80, 16]}

    def test_they_are_drawn_with_the_seed(self, tmp_path: Path, no_bytes: None) -> None:
        task = pair(touched(tmp_path / "my", a=9, b=9), touched(tmp_path / "big", x=1, y=1))
        for folds in (1, 3):
            task = dataclasses.replace(task, folds=folds)
            assert splits(task).digest() == splits(task).digest()
            assert splits(task).digest() != splits(task, seed=1).digest()
            assert splits(task).data_digest == splits(task, seed=1).data_digest

    @pytest.mark.parametrize("fields", [{}, {"folds": 1}, {"folds": 4, "fold": 3}])
    def test_groups_are_kept_together(self, data: Path, fields: dict[str, int]) -> None:
        table = read_table(data / "films.csv")
        for seed in range(3):
            found = splits(pair(data / "films.csv", data / "big", **fields), seed)
            owners = [groups_of(table, part) for part in parts(found).values()]
            assert sum(len(each) for each in owners) == len(set.union(*owners)) == 20
            for part in parts(found).values():
                assert table.scored(np.array([table.ids.index(name) for name in part.ids]))

    def test_held_out_images_and_groups_are_no_auxiliary_ones(self, data: Path) -> None:
        found = splits(pair(data / "films.csv", data / "films.csv", folds=1))
        held_out = {*found.validation.ids, *found.test.ids}
        auxiliary = {name.removeprefix("auxiliary/") for name in found.auxiliaries[0].ids}
        assert auxiliary == set(found.train.ids)
        assert any(f"{len(held_out)} auxiliary images left out" in note for note in found.notes)

        table = read_table(data / "films.csv")
        rows = [f"../big/ant/ant-{i:03d}.png,x,patient {i}" for i in range(0, 20, 2)]
        rows += [f"../big/ant/ant-{i:03d}.jpg,y,patient {i}" for i in range(1, 20, 2)]
        (data / "other").mkdir()
        (data / "other/others.csv").write_text("\n".join(["path,label,group", *rows]))
        found = splits(pair(data / "films.csv", data / "other/others.csv", folds=1))
        trained = groups_of(table, found.train)
        assert len(found.auxiliaries[0]) == len(trained)
        assert {f"patient {int(name[-7:-4])}" for name in found.auxiliaries[0].ids} == trained

    def test_labels_that_can_not_be_scored_are_said(self, tmp_path: Path, no_bytes: None) -> None:
        rows = [f"{i}.png,{i % 2},{int(i == 0)}" for i in range(40)]
        (tmp_path / "a.csv").write_text("\n".join(["path,common,rare", *rows]))
        found = splits(pair(tmp_path / "a.csv", touched(tmp_path / "big", x=1, y=1)))
        assert [note for note in found.notes if "rare" in note]
        assert not [note for note in found.notes if "common" in note]


def error(task: Folder) -> str:
    with pytest.raises((DataError, FieldError)) as caught:
        splits(task)
    text = str(caught.value)
    assert caught.value.exit_code == 2
    assert "\n" not in text
    return text


class TestErrors:
    def test_unset_fields_say_how_to_set_them(self, data: Path) -> None:
        assert "--set task.primary=PATH --set task.auxiliary=PATH" in error(Folder())
        one = error(Folder(primary=str(data / "my")))
        assert "--set task.auxiliary=PATH" in one
        assert "task.primary" not in one

    def test_missing_and_empty_folders_are_said(self, data: Path, tmp_path: Path) -> None:
        absent = tmp_path / "absent"
        assert f"nothing at {absent} (task.auxiliary)." in error(pair(data / "my", absent))
        assert "an empty folder" in error(pair(tmp_path, data / "big"))
        assert pair(data / "my", data / "big").missing(tmp_path) is None

    @pytest.mark.parametrize(
        ("sizes", "fields", "expected"),
        [
            ({"a": 9, "b": 4}, {}, "at least 5 images of every class"),
            ({"a": 9, "b": 4}, {}, "one for each of 5 folds, found class 'b' with 4;"),
            ({"a": 9, "b": 4}, {}, "choose fewer folds with --set task.folds=…"),
            ({"a": 9, "b": 2, "c": 1}, {"folds": 1}, "class 'b' with 2, class 'c' with 1;"),
            ({"a": 1, "b": 1}, {"folds": 1}, "at least 3 images in"),
            ({"a": 9, "b": 9}, {"folds": 3, "fold": 3}, "one of 3 folds, 0 to 2, found 3"),
            ({"a": 9, "b": 9}, {"folds": 1, "fold": 1}, "one of 1 folds"),
            ({"a": 9, "b": 9}, {"folds": 1, "validation_share": 0.7}, "left for training"),
            ({"a": 9, "b": 9}, {"folds": 5, "validation_share": 0.8}, "left for training"),
            ({"a": 9, "b": 9}, {"labels": "edema"}, "task.labels to name columns"),
        ],
    )
    def test_what_can_not_be_divided_is_refused(
        self, tmp_path: Path, sizes: dict[str, int], fields: dict[str, Any], expected: str
    ) -> None:
        primary = touched(tmp_path / "my", **sizes)
        assert expected in error(pair(primary, touched(tmp_path / "big", x=1, y=1), **fields))

    @pytest.mark.parametrize(
        ("rows", "fields", "expected"),
        [
            ([f"{i}.png,{i % 2},{i % 4}" for i in range(40)], {}, "at least 5 groups in"),
            (
                [f"{i}.png,{i % 2},{i % 4}" for i in range(40)],
                {"folds": 1},
                "at least 3 groups of every class",
            ),
        ],
    )
    def test_groups_that_can_not_be_divided_are_refused(
        self, tmp_path: Path, rows: list[str], fields: dict[str, int], expected: str
    ) -> None:
        (tmp_path / "a.csv").write_text("\n".join(["path,label,group", *rows]))
        big = touched(tmp_path / "big", x=1, y=1)
        assert expected in error(pair(tmp_path / "a.csv", big, **fields))

    def test_a_split_without_a_label_to_score_is_refused(self, tmp_path: Path) -> None:
        rows = [f"{i}.png,{int(i < 2)}" for i in range(40)]
        (tmp_path / "a.csv").write_text("\n".join(["path,u", *rows]))
        text = error(pair(tmp_path / "a.csv", touched(tmp_path / "big", x=1, y=1)))
        assert "Expected a label with both 0 and 1 in the test split, found none in 8" in text
        assert "another fold or seed" in text

    def test_a_split_without_a_class_is_refused(self, tmp_path: Path) -> None:
        # four classes with three groups each, of five: no division has all of them everywhere
        held = {"a": "124", "b": "235", "c": "345", "d": "123"}
        rows = [f"{name}{group}.png,{name},{group}" for name in held for group in held[name]]
        (tmp_path / "a.csv").write_text("\n".join(["path,label,group", *rows]))
        text = error(pair(tmp_path / "a.csv", touched(tmp_path / "big", x=1, y=1), folds=1))
        assert "Expected every class in the " in text
        assert "The groups are too few or too large" in text

    def test_nothing_left_for_the_auxiliary_is_refused(self, data: Path) -> None:
        table = read_table(data / "my")
        found = splits(pair(data / "my", data / "big"))
        rows = [f"my/{name},{'xy'[i % 2]}" for i, name in enumerate(found.test.ids)]
        (data / "tests.csv").write_text("\n".join(["path,label", *rows]))
        assert len(table.ids) > len(rows)
        assert "Expected auxiliary images beside" in error(pair(data / "my", data / "tests.csv"))

    def test_all_unreadable_files_are_named_before_anything_is_trained(
        self, data: Path, tmp_path: Path
    ) -> None:
        shutil.copytree(data / "big", tmp_path / "big")
        rows = [f"{i}.png,{'xy'[i % 2]}" for i in range(10)]
        (tmp_path / "a.csv").write_text("\n".join(["path,label", *rows]))
        (tmp_path / "big/ant/ant-001.jpg").write_text("no image")
        text = error(pair(tmp_path / "a.csv", tmp_path / "big"))
        assert text.count("(missing)") == 8  # two are test files, of which nothing is known yet
        assert "9 of 68 files" in text
        assert "ant-001.jpg (no image)" in text

    def test_the_command_line_says_one_line_and_exits_with_2(
        self, capsys: pytest.CaptureFixture[str]
    ) -> None:
        with pytest.raises(SystemExit, match="2"):
            main(["run", "--method", "pcgrad", "--task", "folder"])
        found = capsys.readouterr()
        assert found.err.startswith("error: Expected the real data of 'folder'. Say where they are")
        assert "--set task.primary=PATH --set task.auxiliary=PATH" in found.err
        assert len(found.err.splitlines()) == 1


class TestDigests:
    def digests(self, folder: Path) -> tuple[str, str | None]:
        found = splits(pair(folder / "my", folder / "big"))
        return found.data_digest, found.files_digest

    @pytest.fixture
    def copy(self, data: Path, tmp_path: Path) -> Path:
        for name in ("my", "big"):
            shutil.copytree(data / name, tmp_path / "copy" / name)
        return tmp_path / "copy"

    def test_another_place_is_the_same_data(self, data: Path, copy: Path) -> None:
        assert self.digests(copy) == self.digests(data)

    @pytest.mark.parametrize("split", ["train", "validation", "test", "auxiliary"])
    def test_bytes_count_but_for_those_of_the_test(self, copy: Path, split: str) -> None:
        before = self.digests(copy)
        found = splits(pair(copy / "my", copy / "big"))
        name = (
            f"big/{found.auxiliaries[0].ids[0].removeprefix('auxiliary/')}"
            if split == "auxiliary"
            else f"my/{parts(found)[split].ids[0]}"
        )
        with (copy / name).open("ab") as file:
            file.write(b"\0")
        after = self.digests(copy)
        assert after[0] == before[0]
        assert (after[1] == before[1]) == (split == "test")

    def test_names_count(self, copy: Path) -> None:
        before = self.digests(copy)
        (copy / "big/ant").rename(copy / "big/aphid")
        assert self.digests(copy)[0] != before[0]


_opened: list[str] | None = None


@contextmanager
def opened() -> Iterator[list[str]]:
    """Collect what this process opens."""
    global _opened
    _opened = []
    try:
        yield _opened
    finally:
        _opened = None


@pytest.fixture(scope="module", autouse=True)
def watch_files() -> None:
    """Install the hook behind :func:`opened`; hooks stay for the life of a process."""

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if _opened is not None and event == "open":
            _opened.append(str(arguments[0]))

    sys.addaudithook(hook)


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., RunResult]:
    monkeypatch.setenv("GRADBENCH_HOME", str(tmp_path / "home"))

    def run(
        primary: Path, auxiliary: Path, say: Callable[[str], None] | None = None, **more: Any
    ) -> RunResult:
        settings = {**BUDGET, "task.primary": str(primary), "task.auxiliary": str(auxiliary)}
        return gradbench.run(
            "pcgrad", "folder", epochs=1, device="cpu", settings={**settings, **more}, say=say
        )

    return run


class TestRun:
    def test_a_tree_is_trained_on_and_its_test_images_are_opened_last(
        self, data: Path, run: Callable[..., RunResult]
    ) -> None:
        with opened() as files:
            result = run(data / "my", data / "big", say=files.append)
        assert result.status == "ok"
        assert result.metrics is not None
        assert list(result.metrics.test) == ["accuracy"]
        found = splits(pair(data / "my", data / "big"))
        sizes = [f"{name} {len(part)}" for name, part in parts(found).items()]
        assert any(f"{', '.join(sizes)}, auxiliary 60" in line for line in files)
        [end] = [place for place, name in enumerate(files) if name.startswith("joint")]
        first = {name: files.index(str(data / "my" / name)) for name in found.test.ids}
        assert min(first.values()) > end
        for part in (found.train, found.validation):
            assert all(files.index(str(data / "my" / name)) < end for name in part.ids)

    def test_labelled_films_are_trained_on_while_the_test_images_are_away(
        self, data: Path, tmp_path: Path, run: Callable[..., RunResult]
    ) -> None:
        shutil.copytree(data / "films", tmp_path / "films")
        shutil.copy(data / "films.csv", tmp_path)
        found = splits(pair(tmp_path / "films.csv", data / "big"))
        for name in found.test.ids:
            os.rename(tmp_path / name, tmp_path / f"{name}.away")

        def say(line: str) -> None:
            if line.startswith("joint"):
                for name in found.test.ids:
                    os.rename(tmp_path / f"{name}.away", tmp_path / name)

        result = run(tmp_path / "films.csv", data / "big", say=say)
        assert result.status == "ok"
        assert result.metrics is not None
        assert set(result.metrics.test) == {"auroc", "auroc edema", "auroc effusion"}
        assert result.metric.name == "auroc"
        assert result.metric.margin == 0.02
        sizes = {name: len(part) for name, part in parts(found).items()}
        assert result.task.sizes.model_dump() == {**sizes, "meta": 0}
        moved = tmp_path / "moved"
        moved.mkdir()
        (tmp_path / "films").rename(moved / "films")
        (tmp_path / "films.csv").rename(moved / "films.csv")
        again = run(moved / "films.csv", data / "big")
        assert again == result  # found, not made again
