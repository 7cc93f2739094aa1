from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from gradbench.errors import HomeError
from gradbench.files import make_folder, replacing, write_json


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


class TestReplacing:
    def test_the_content_takes_the_place_of_the_old_one(self, tmp_path: Path) -> None:
        target = tmp_path / "record"
        target.write_text("old")
        with replacing(target) as temporary:
            temporary.write_text("new")
            assert target.read_text() == "old"
        assert target.read_text() == "new"
        assert names(tmp_path) == ["record"]

    @pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
    def test_a_failure_leaves_the_old_content(
        self, tmp_path: Path, error: type[BaseException]
    ) -> None:
        target = tmp_path / "record"
        target.write_text("old")

        def write_half() -> None:
            with replacing(target) as temporary:
                temporary.write_text("half of the n")
                raise error

        with pytest.raises(error):
            write_half()
        assert target.read_text() == "old"
        assert names(tmp_path) == ["record"]

    def test_the_content_is_on_the_disk_before_it_has_its_name(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        target = tmp_path / "record"
        events: list[tuple[str, bool]] = []
        sync = os.fsync

        def recorded(descriptor: int) -> None:
            is_folder = os.path.samestat(os.fstat(descriptor), tmp_path.stat())
            events.append(("folder" if is_folder else "content", target.exists()))
            sync(descriptor)

        monkeypatch.setattr(os, "fsync", recorded)
        with replacing(target) as temporary:
            temporary.write_text("new")
        assert events == [("content", False), ("folder", True)]


class TestWriteJson:
    def test_the_value_comes_back(self, tmp_path: Path) -> None:
        value = {"name": "digits 0–4", "share": 0.1, "none": None, "list": [1, True]}
        write_json(tmp_path / "a.json", value)
        text = (tmp_path / "a.json").read_text(encoding="utf-8")
        assert json.loads(text) == value
        assert text.endswith("}\n")

    @pytest.mark.parametrize("value", [float("nan"), float("inf"), {1, 2}])
    def test_what_is_no_json_is_refused_and_changes_nothing(
        self, tmp_path: Path, value: Any
    ) -> None:
        target = tmp_path / "a.json"
        write_json(target, {"x": 1.0})
        with pytest.raises((ValueError, TypeError)):
            write_json(target, {"x": value})
        assert json.loads(target.read_text()) == {"x": 1.0}
        assert names(tmp_path) == ["a.json"]


class TestMakeFolder:
    def test_makes_it_with_its_parents_and_leaves_nothing_in_it(self, tmp_path: Path) -> None:
        folder = tmp_path / "a" / "b"
        make_folder(folder)
        make_folder(folder)  # there already
        assert names(folder) == []

    def test_a_file_in_the_way_is_one_clear_error(self, tmp_path: Path) -> None:
        (tmp_path / "a").write_text("")
        with pytest.raises(HomeError, match=r"Expected a folder .*GRADBENCH_HOME") as caught:
            make_folder(tmp_path / "a" / "b")
        assert str(tmp_path / "a" / "b") in str(caught.value)
        assert isinstance(caught.value, OSError)

    def test_a_folder_that_takes_no_files_is_an_error(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def refuse(path: Path) -> None:
            raise PermissionError(13, "Permission denied", str(path))

        monkeypatch.setattr(Path, "touch", refuse)
        with pytest.raises(HomeError, match="found Permission denied"):
            make_folder(tmp_path)
