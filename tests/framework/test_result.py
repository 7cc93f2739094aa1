from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pandas as pd
import pytest
import torch

from gradbench import runner
from gradbench.config import Request, run_id
from gradbench.display import Display
from gradbench.errors import NonFiniteLossError, RecordError
from gradbench.result import Metrics, RunFolder, RunResult, json_schema
from gradbench.runner import Outcome
from gradbench.training.evaluation import Evaluation

SHORT = {"budget.epochs": 2, "budget.steps_per_epoch": 3, "budget.fine_tune_epochs": 1}
HOPELESS = {**SHORT, "optimizer.lr": 1e6, "optimizer.clip": 0, "optimizer.warmup_epochs": 0}

# what a record holds at least, part by part; the schema allows nothing that it does not ask for
FIELDS = {
    "": {
        *("schema", "protocol", "run_id", "status", "error", "started", "ended", "attempts"),
        *("seed", "config", "task", "method", "backbone", "metric", "selection", "metrics"),
        *("cost", "diagnostics", "environment"),
    },
    "error": {"type", "message", "phase", "step", "objective"},
    "task": {
        *("name", "version", "revision", "preset", "source", "data_digest", "split_digest"),
        *("sizes", "distribution", "distribution_version"),
    },
    "task.sizes": {"train", "validation", "test", "meta"},
    "method": {"name", "kind", "revision", "fields", "distribution", "distribution_version"},
    "backbone": {"name", "weights_digest", "parameters"},
    "metric": {"name", "higher_is_better", "margin"},
    "selection": {"phase", "epoch", "step"},
    "metrics": {"validation", "test"},
    "cost": {
        *("wall_seconds", "step_milliseconds_p50", "peak_memory_mb", "forward_passes"),
        *("backward_passes", "examples"),
    },
    "diagnostics": {
        *("cosine", "conflict_rate", "good_share", "bad_share", "neutral_share"),
        "captured_energy",
    },
}


@pytest.fixture(scope="module", autouse=True)
def _home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRADBENCH_HOME", str(tmp_path_factory.mktemp("home")))
        patch.setenv("GRADBENCH_TRACKING_URI", "none")
        yield


def make(method: str, settings: Mapping[str, object]) -> Outcome:
    request = Request(method=method, task="digits", device="cpu", settings=settings)
    return runner.execute(request, Display())


@pytest.fixture(scope="module")
def attittud() -> Outcome:
    return make("attittud", SHORT)


@pytest.fixture(scope="module")
def hopeless() -> Outcome:
    return make("weighted-sum", HOPELESS)


@pytest.fixture(params=["attittud", "hopeless"])
def outcome(request: pytest.FixtureRequest) -> Outcome:
    found: Outcome = request.getfixturevalue(request.param)
    return found


def stored(outcome: Outcome) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(outcome.folder.result.read_text(encoding="utf-8"))
    return found


def part(record: Mapping[str, Any], path: str) -> Any:
    found: Any = record
    for name in path.split(".") if path else ():
        found = found[name]
    return found


class TestSchema:
    def test_the_published_file_is_the_schema(self) -> None:
        published = Path(__file__).parents[2] / "docs" / "result.schema.json"
        if not published.exists():
            pytest.skip("the docs are not beside these tests")
        assert json.loads(published.read_text(encoding="utf-8")) == json_schema(), (
            "write json_schema() into docs/result.schema.json, and raise SCHEMA if old records "
            "no longer fit"
        )

    def test_the_schema_itself_is_valid(self) -> None:
        jsonschema.Draft202012Validator.check_schema(json_schema())

    def test_every_record_fits(self, outcome: Outcome) -> None:
        jsonschema.validate(stored(outcome), json_schema())

    @pytest.mark.parametrize("path", FIELDS)
    def test_the_schema_asks_for_every_field_and_allows_no_other(
        self, attittud: Outcome, path: str
    ) -> None:
        record = stored(attittud)
        record["error"] = dict.fromkeys(FIELDS["error"]) | {"type": "x", "message": "x"}
        check = jsonschema.Draft202012Validator(json_schema())
        assert check.is_valid(record)
        assert FIELDS[path] <= set(part(record, path))
        for name in part(record, path):
            poorer = copy.deepcopy(record)
            del part(poorer, path)[name]
            assert not check.is_valid(poorer), name
        richer = copy.deepcopy(record)
        part(richer, path)["unheard of"] = 1
        assert not check.is_valid(richer)

    def test_the_states_are_these(self, attittud: Outcome) -> None:
        record = stored(attittud)
        check = jsonschema.Draft202012Validator(json_schema())
        for status in ("ok", "failed", "nan", "oom", "timeout", "interrupted"):
            assert check.is_valid({**record, "status": status})
        assert not check.is_valid({**record, "status": "done"})


class TestRecord:
    @pytest.mark.parametrize("path", FIELDS)
    def test_every_field_is_there(self, outcome: Outcome, path: str) -> None:
        found = part(stored(outcome), path)
        assert found is None or set(found) >= FIELDS[path]

    def test_says_what_was_run(self, attittud: Outcome) -> None:
        record = stored(attittud)
        assert record["schema"] == 1
        assert record["protocol"] == record["config"]["protocol"] == "GB-1"
        assert record["run_id"] == run_id(record["config"]) == attittud.folder.path.name
        assert (record["status"], record["error"]) == ("ok", None)
        assert (record["attempts"], record["seed"]) == (1, 0)
        assert record["started"] < record["ended"]
        assert record["started"].endswith("+00:00")
        task, method = record["task"], record["method"]
        assert (task["name"], task["preset"], task["source"]) == ("digits", "default", "real")
        assert task["sizes"] == {"train": 100, "validation": 50, "test": 751, "meta": 0}
        assert (method["name"], method["kind"]) == ("attittud", "aggregation")
        assert method["fields"] == record["config"]["method"]["fields"]
        for plugin in (task, method):
            assert plugin["distribution"] == "gradbench-surgery"
        assert record["backbone"]["name"] == "timm:test_vit"
        assert record["backbone"]["parameters"] == 300096
        assert record["metric"] == {"name": "accuracy", "higher_is_better": True, "margin": 0.02}
        assert record["environment"]["torch"] == torch.__version__

    def test_says_what_came_out(self, attittud: Outcome) -> None:
        record = stored(attittud)
        assert record["selection"]["phase"] in ("joint", "fine-tune")
        assert set(record["metrics"]["validation"]) == set(record["metrics"]["test"])
        cost = record["cost"]
        # two phases of 6 and 3 steps; one basis an epoch, of ten directions over 32 examples
        assert cost["forward_passes"] == 6 * 2 + 2 + 3
        assert cost["backward_passes"] == 6 * 2 + 2 * 10 + 3
        assert cost["examples"] == (6 * 2 + 3) * 64 + 2 * 32
        assert 0 < cost["step_milliseconds_p50"] < cost["wall_seconds"] * 1e3
        assert cost["peak_memory_mb"] > 0

    def test_says_where_it_went_wrong(self, hopeless: Outcome) -> None:
        record = stored(hopeless)
        assert record["status"] == "nan"
        assert (record["metrics"], record["selection"]) == (None, None)
        assert record["ended"] > record["started"]
        error = record["error"]
        assert error["type"] == "NonFiniteLossError"
        assert error["phase"] == "joint"
        assert 0 < error["step"] < 6
        assert error["objective"] in ("digits 0–4", "digits 5–9")
        assert str(error["step"]) in error["message"]
        assert isinstance(hopeless.error, NonFiniteLossError)

    def test_is_read_as_it_was_written(self, outcome: Outcome) -> None:
        found = outcome.folder.read()
        assert found == outcome.result
        assert found is not None
        assert found.as_json() == stored(outcome)

    def test_numbers_that_are_none_are_refused(self) -> None:
        with pytest.raises(ValueError, match="finite"):
            Metrics(validation={"accuracy": float("nan")}, test={})

    def test_same_bits_leaves_out_what_may_differ_and_nothing_else(self, attittud: Outcome) -> None:
        found = attittud.result.same_bits()
        moving = {"started", "ended", "attempts", "cost", "environment"}
        assert set(found) == FIELDS[""] - moving


class TestFolder:
    def test_holds_these_files(self, attittud: Outcome) -> None:
        names = {path.name for path in attittud.folder.path.iterdir()}
        assert names >= {
            *("config.json", "result.json", "metrics.jsonl", "predictions.parquet", "log.txt"),
            "model.safetensors",
        }
        assert not [name for name in names if name.endswith((".part", ".pt"))]

    def test_the_configuration_is_that_of_the_record(self, attittud: Outcome) -> None:
        config = json.loads((attittud.folder.path / "config.json").read_text(encoding="utf-8"))
        assert config["identity"] == stored(attittud)["config"]
        assert config["execution"]["device"] == "cpu"
        assert config["execution"]["memory_format"] == "contiguous"

    def test_there_is_a_row_of_metrics_an_epoch(self, attittud: Outcome) -> None:
        lines = attittud.folder.metrics.read_text(encoding="utf-8").splitlines()
        rows = [json.loads(line) for line in lines]
        assert [(row["phase"], row["epoch"], row["step"]) for row in rows] == [
            ("joint", 1, 3),
            ("joint", 2, 6),
            ("fine-tune", 1, 9),
        ]
        assert [set(row["losses"]) for row in rows] == [
            {"digits 0–4", "digits 5–9"},
            {"digits 0–4", "digits 5–9"},
            {"digits 0–4"},
        ]
        assert {"cosine", "captured_energy"} <= set(rows[0]["diagnostics"])
        assert rows[2]["diagnostics"] == {}
        assert [row["time"] for row in rows] == sorted(row["time"] for row in rows)
        best = [row for row in rows if row["best"]][-1]
        record = stored(attittud)
        assert record["selection"] == {key: best[key] for key in ("phase", "epoch", "step")}
        assert record["metrics"]["validation"] == best["validation"]

    def test_the_log_holds_what_was_shown(self, attittud: Outcome) -> None:
        log = attittud.folder.log.read_text(encoding="utf-8")
        assert "attittud on digits, seed 0" in log
        assert len([line for line in log.splitlines() if "steps/s" in line]) == 3

    def test_the_metrics_follow_from_the_predictions(self, attittud: Outcome) -> None:
        table = pd.read_parquet(attittud.folder.predictions)
        assert list(table.columns) == ["split", "example", "target", "score"]
        record = stored(attittud)
        for split in ("validation", "test"):
            rows = table[table["split"] == split]
            assert len(rows) == rows["example"].nunique() == record["task"]["sizes"][split]
            scores = np.stack(list(rows["score"]))
            assert scores.shape == (len(rows), 5)
            np.testing.assert_allclose(scores.sum(axis=1), 1, rtol=1e-5)
            accuracy = (scores.argmax(axis=1) == rows["target"]).mean()
            # torchmetrics divides in float32
            assert accuracy == pytest.approx(record["metrics"][split]["accuracy"], rel=1e-7)
        assert set(table["split"]) == {"validation", "test"}

    def test_a_number_an_example_is_stored_as_a_list_of_one(self, tmp_path: Path) -> None:
        folder = RunFolder(tmp_path)
        targets, scores = torch.tensor([1, 0]), torch.tensor([0.75, 0.25])
        folder.write_predictions({"test": Evaluation({}, ("a", "b"), targets, scores)})
        rows = pd.read_parquet(folder.predictions).to_dict("records")
        assert [(row["example"], row["target"], list(row["score"])) for row in rows] == [
            ("a", 1, [0.75]),
            ("b", 0, [0.25]),
        ]

    def test_a_folder_without_a_record_has_none(self, tmp_path: Path) -> None:
        assert RunFolder(tmp_path).read() is None

    @pytest.mark.parametrize("content", ["", "{}", "[]", '{"schema": 2}', "\xff"])
    def test_a_record_that_does_not_fit_is_one_clear_error(
        self, tmp_path: Path, content: str
    ) -> None:
        folder = RunFolder(tmp_path)
        folder.result.write_text(content, encoding="latin-1")
        with pytest.raises(RecordError, match="Expected a record of schema 1") as caught:
            folder.read()
        assert str(folder.result) in str(caught.value)

    def test_a_record_of_another_schema_is_refused(self, attittud: Outcome, tmp_path: Path) -> None:
        folder = RunFolder(tmp_path)
        folder.result.write_text(json.dumps({**stored(attittud), "schema": 2}), encoding="utf-8")
        with pytest.raises(RecordError):
            folder.read()

    def test_the_record_can_be_made_again_from_its_json(self, attittud: Outcome) -> None:
        assert RunResult.model_validate(stored(attittud)) == attittud.result
