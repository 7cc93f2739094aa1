from __future__ import annotations

import json
from typing import Any

import pytest

from gradbench import cli

KEYS = ["name", "kind", "summary", "distribution", "version", "status"]


class Terminal:
    """Runs commands in this process, and keeps what they print."""

    def __init__(self, capture: pytest.CaptureFixture[str]) -> None:
        self._capture = capture
        self.out = self.err = ""

    def __call__(self, *arguments: str) -> int:
        self._capture.readouterr()
        with pytest.raises(SystemExit) as caught:
            cli.main(list(arguments))
        self.out, self.err = self._capture.readouterr()
        assert isinstance(caught.value.code, int)
        return caught.value.code


@pytest.fixture
def gradbench(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Terminal:
    monkeypatch.setenv("COLUMNS", "200")
    return Terminal(capsys)


def rows(gradbench: Terminal, noun: str) -> dict[str, dict[str, Any]]:
    assert gradbench(noun, "--json") == 0
    assert gradbench.err == ""
    found = json.loads(gradbench.out)
    assert [list(row) for row in found] == [KEYS] * len(found)
    assert found == sorted(found, key=lambda row: row["name"])
    return {row["name"]: row for row in found}


class TestListings:
    def test_methods_have_a_kind_a_summary_and_a_distribution(self, gradbench: Terminal) -> None:
        found = rows(gradbench, "methods")
        kinds = {name: found[name]["kind"] for name in ("attittud", "pcgrad", "primary-only")}
        assert kinds == {
            "attittud": "aggregation",
            "pcgrad": "weighting",
            "primary-only": "scalarization",
        }
        ours = [row for row in found.values() if row["distribution"] == "gradbench-surgery"]
        assert len(ours) >= 5
        assert {row["status"] for row in ours} == {"listed"}
        assert all(row["kind"] and row["summary"].endswith(".") for row in ours)

    def test_tasks_and_backbones_are_listed(self, gradbench: Terminal) -> None:
        assert "digits" in rows(gradbench, "tasks")
        assert "timm" in rows(gradbench, "backbones")

    @pytest.mark.parametrize("noun", ["methods", "tasks", "backbones"])
    def test_the_table_shows_the_same(self, gradbench: Terminal, noun: str) -> None:
        found = rows(gradbench, noun)
        assert gradbench(noun) == 0
        assert gradbench.err == ""
        for row in found.values():
            line = next(line for line in gradbench.out.splitlines() if row["name"] in line.split())
            assert f"{row['distribution']} {row['version']}" in line
            assert row["kind"] is None or row["kind"] in line

    def test_a_narrow_terminal_keeps_names_whole(
        self, gradbench: Terminal, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        names = rows(gradbench, "methods")
        monkeypatch.setenv("COLUMNS", "60")
        assert gradbench("methods") == 0
        assert names.keys() <= set(gradbench.out.split())


class TestBackbones:
    def test_a_pattern_asks_the_providers(self, gradbench: Terminal) -> None:
        assert gradbench("backbones", "--all", "resnet1*") == 0
        names = gradbench.out.split()
        assert {"timm:resnet18", "timm:resnet101"} <= set(names)
        assert all(name.startswith("timm:resnet1") for name in names)
        assert gradbench("backbones", "--all", "resnet1*", "--json") == 0
        assert json.loads(gradbench.out) == names

    def test_a_pattern_of_nothing_is_the_users_to_mend(self, gradbench: Terminal) -> None:
        assert gradbench("backbones", "--all", "resnot*") == 2
        assert gradbench.out == ""
        assert len(gradbench.err.splitlines()) == 1
        assert "'resnot*'" in gradbench.err


class TestInfo:
    @pytest.mark.parametrize(
        ("name", "words"),
        [
            (
                "attittud",
                [
                    "attittud: a method of gradbench-surgery ",
                    "arXiv:2108.11346",
                    "kind: aggregation",
                    "needs_meta: False",
                    "--set method.rank=10",
                    "an integer, 1 to 4096; tuned over 1 to 20",
                    "eta, a joint dimension of tuning: eta_good 1.0, eta_bad -1.0",
                ],
            ),
            ("pcgrad", ["kind: weighting", "It has no settings of its own."]),
            ("weighted-sum", ["kind: scalarization", "heads: weighted"]),
            (
                "digits",
                [
                    "digits: a task of gradbench-surgery ",
                    "licence: CC BY 4.0",
                    "preset default: timm:test_vit, train 20, validation 10, epochs 20",
                    "--set task.auxiliary_weight=1.0",
                    "log-uniform",
                    "sources: real",
                ],
            ),
            ("timm", ["timm: a backbone of gradbench-surgery ", "model.weights=none|hub|PATH"]),
        ],
    )
    def test_says_what_a_plug_in_is(self, gradbench: Terminal, name: str, words: list[str]) -> None:
        assert gradbench("info", name) == 0
        assert gradbench.err == ""
        for each in words:
            assert each in gradbench.out

    def test_an_unknown_name_shows_the_nearest_of_all_kinds(self, gradbench: Terminal) -> None:
        assert gradbench("info", "digit") == 2
        assert gradbench.out == ""
        assert len(gradbench.err.splitlines()) == 1
        assert "Did you mean 'digits'?" in gradbench.err
        assert "timm" in gradbench.err


class TestHelp:
    @pytest.mark.parametrize("arguments", [(), ("--help",), ("-h",)])
    def test_shows_all_commands(self, gradbench: Terminal, arguments: tuple[str, ...]) -> None:
        assert gradbench(*arguments) == 0
        assert gradbench.err == ""
        for command in ("run", "methods", "tasks", "backbones", "info"):
            assert f"\n  {command}" in gradbench.out

    @pytest.mark.parametrize("command", ["run", "methods", "tasks", "backbones", "info"])
    def test_every_command_has_help(self, gradbench: Terminal, command: str) -> None:
        assert gradbench(command, "--help") == 0
        assert gradbench.out.startswith(f"Usage: gradbench {command} ")
        assert "--debug" in gradbench.out
