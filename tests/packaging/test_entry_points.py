from __future__ import annotations

import ast
import importlib
import tomllib
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

import gradbench
from gradbench import registry
from gradbench.backbones import BackboneProvider
from gradbench.cli import main
from gradbench.method import Method
from gradbench.task import TaskPair

ROOT = Path(__file__).parents[2]
BASES = {
    registry.METHODS: Method,
    registry.TASKS: TaskPair,
    registry.BACKBONES: BackboneProvider,
}
PACKAGES = ("gradbench", "gradbench_methods", "gradbench_tasks")


@pytest.fixture(scope="module")
def project() -> dict[str, Any]:
    path = ROOT / "pyproject.toml"
    if not path.exists():
        pytest.skip("these tests are not in a checkout")
    found: dict[str, Any] = tomllib.loads(path.read_text(encoding="utf-8"))["project"]
    assert found["name"] == registry.DISTRIBUTION
    return found


def installed() -> dict[str, dict[str, str]]:
    """Return the entry points of our distribution, by group and name."""
    found: dict[str, dict[str, str]] = {}
    for point in metadata.distribution(registry.DISTRIBUTION).entry_points:
        found.setdefault(point.group, {})[point.name] = point.value
    return found


def test_installed_entry_points_are_those_that_are_declared(project: dict[str, Any]) -> None:
    declared = {**project["entry-points"], "console_scripts": project["scripts"]}
    assert installed() == declared, "install again: pip install -e ."


def test_the_version_is_that_of_the_distribution(project: dict[str, Any]) -> None:
    assert gradbench.__version__ == metadata.version(registry.DISTRIBUTION) == project["version"]


@pytest.mark.parametrize(
    ("group", "package"),
    [(registry.METHODS, "methods/gradbench_methods"), (registry.TASKS, "tasks/gradbench_tasks")],
)
def test_every_public_module_is_declared_under_its_own_name(
    project: dict[str, Any], group: str, package: str
) -> None:
    folder = ROOT / package
    modules = {
        path.stem
        for path in folder.iterdir()
        if (path.suffix == ".py" or (path / "__init__.py").exists())
        and not path.name.startswith("_")
    }
    declared = project["entry-points"][group]
    assert modules == {name.replace("-", "_") for name in declared}
    for name, value in declared.items():
        assert value.partition(":")[0] == f"{folder.name}.{name.replace('-', '_')}"


@pytest.mark.parametrize(
    ("group", "name"), [(group, name) for group in BASES for name in installed().get(group, {})]
)
def test_every_entry_point_loads(group: str, name: str) -> None:
    plugin = registry.load_class(group, name, BASES[group])
    assert plugin.distribution == registry.DISTRIBUTION


def test_the_command_is_the_command_line() -> None:
    scripts = metadata.entry_points(group="console_scripts", name="gradbench")
    assert [script.load() for script in scripts] == [main]


@pytest.mark.parametrize("package", PACKAGES)
def test_types_are_published(package: str) -> None:
    (path,) = importlib.import_module(package).__path__
    assert (Path(path) / "py.typed").is_file()


def test_the_framework_never_imports_a_plug_in() -> None:
    (folder,) = gradbench.__path__
    modules = list(Path(folder).rglob("*.py"))
    assert len(modules) > 30
    for path in modules:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                names.append(node.module or "")
            tops = {name.partition(".")[0] for name in names}
            assert not tops & set(PACKAGES[1:]), f"{path} imports {tops}"
