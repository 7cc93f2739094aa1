"""A package of somebody else's, three files, installed and used."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

import jsonschema
import pytest

from gradbench.result import json_schema

PROJECT = """
[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"

[project]
name = "acme-gradients"
version = "3.1"
dependencies = ["gradbench-surgery"]

[project.entry-points."gradbench.methods"]
acme-mean = "acme_mean:Mean"

[project.entry-points."gradbench.tasks"]
acme-stripes = "acme_stripes:Stripes"

[tool.hatch.build.targets.wheel]
only-include = ["acme_mean.py", "acme_stripes.py"]
"""

METHOD = '''
from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor

from gradbench.fields import Valid
from gradbench.method import Weighting
from gradbench.step import Step


@dataclass(frozen=True)
class Mean(Weighting):
    """Average the gradients."""

    scale = "mean"

    power: Annotated[float, Valid(0, 2), "of the number of objectives"] = 1.0

    def weights_from_gramian(self, gramian: Tensor, step: Step) -> Tensor:
        return torch.full_like(gramian[0], len(gramian) ** -self.power)
'''

TASK = '''
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch

from gradbench.objectives import Classification
from gradbench.seeding import ExampleRandom
from gradbench.settings import Budget
from gradbench.task import Examples, Input, Objective, Preset, Source, Splits, TaskPair, TensorSet


class Direction(Classification):
    """Tell upright stripes from level ones."""

    def batch(self, examples: Examples, random: ExampleRandom | None) -> tuple[Any, Any]:
        return examples["image"].expand(-1, 3, -1, -1), examples["label"]


def stripes(first: int, count: int) -> TensorSet:
    labels = np.arange(count) % 2
    waves = np.sin(np.arange(32) + np.arange(first, first + count)[:, None])
    level = np.repeat(waves[:, None, :, None], 32, axis=3).astype(np.float32)
    images = np.where(labels[:, None, None, None], level, level.swapaxes(2, 3))
    examples = {"image": torch.from_numpy(images), "label": torch.from_numpy(labels)}
    return TensorSet([f"stripes {i}" for i in range(first, first + count)], examples, labels)


@dataclass(frozen=True)
class Stripes(TaskPair):
    """Few stripes beside many."""

    version = "0.2"
    citation = "none"
    licence = "CC0"
    sources: ClassVar[tuple[Source, ...]] = ("real",)
    presets: ClassVar[Mapping[str, Preset]] = {
        "default": Preset(
            backbone="timm:test_vit",
            sizes={"train": 4},
            budget=Budget(epochs=1, fine_tune_epochs=1, steps_per_epoch=2, batch_size=4),
        )
    }

    @property
    def input(self) -> Input:
        return Input(channels=3, size=32)

    def objectives(self) -> tuple[Objective, ...]:
        return Direction("few", 2, margin=0.1), Direction("many", 2, margin=0.1)

    def splits(self, source: Source, folder: Path, preset: Preset, seed: int) -> Splits:
        return Splits(
            train=stripes(0, 8),
            validation=stripes(100, 8),
            test=stripes(200, 8),
            auxiliaries=(stripes(300, 32),),
            data_digest="drawn",
        )
'''


def call(*command: str, environment: Mapping[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *command],
        env=dict(environment),
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment of a user who installed the package."""
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("target")
    (source / "pyproject.toml").write_text(PROJECT)
    (source / "acme_mean.py").write_text(METHOD)
    (source / "acme_stripes.py").write_text(TASK)
    options = ["--no-deps", "--no-build-isolation", "--no-index", "--disable-pip-version-check"]
    done = call(
        "-m",
        "pip",
        "install",
        *options,
        "--target",
        str(target),
        str(source),
        environment=os.environ,
    )
    assert done.returncode == 0, done.stderr
    path = [str(target), os.environ.get("PYTHONPATH", "")]
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, path)),
        "GRADBENCH_HOME": str(tmp_path_factory.mktemp("home")),
        "GRADBENCH_TRACKING_URI": "none",
    }


def listed(noun: str, environment: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    done = call("-m", "gradbench", noun, "--json", environment=environment)
    assert done.returncode == 0, done.stderr
    return {row["name"]: row for row in json.loads(done.stdout)}


def test_its_plug_ins_are_listed_like_any_other(environment: dict[str, str]) -> None:
    rows = listed("methods", environment)
    assert rows["acme-mean"] == {
        "name": "acme-mean",
        "kind": "weighting",
        "summary": "Average the gradients.",
        "distribution": "acme-gradients",
        "version": "3.1",
        "status": "listed",
    }
    assert "attittud" in rows
    task = listed("tasks", environment)["acme-stripes"]
    assert (task["summary"], task["distribution"]) == ("Few stripes beside many.", "acme-gradients")


def test_its_method_runs_on_its_task_pair(environment: dict[str, str]) -> None:
    done = call(
        *("-m", "gradbench", "run", "--method", "acme-mean", "--task", "acme-stripes"),
        *("--set", "method.power=0.5", "--device", "cpu", "--json"),
        environment=environment,
    )
    assert done.returncode == 0, done.stderr
    record = json.loads(done.stdout)  # one object and nothing else
    jsonschema.validate(record, json_schema())
    assert record["status"] == "ok"
    method, task = record["method"], record["task"]
    assert method == {
        "name": "acme-mean",
        "kind": "weighting",
        "revision": 1,
        "fields": {"power": 0.5},
        "distribution": "acme-gradients",
        "distribution_version": "3.1",
    }
    assert (task["name"], task["version"]) == ("acme-stripes", "0.2")
    assert (task["distribution"], task["distribution_version"]) == ("acme-gradients", "3.1")
    assert record["diagnostics"]["cosine"] is not None
    assert done.stderr.count("steps/s") == 2


def test_without_it_they_are_unknown(environment: dict[str, str]) -> None:
    without = {**environment, "PYTHONPATH": os.environ.get("PYTHONPATH", "")}
    assert "acme-mean" not in listed("methods", without)
