"""What happens in a process of its own: imports, streams, exit codes."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

HEAVY = {"torch", "torchvision", "timm", "mlflow", "optuna", "pandas", "pyarrow", "sklearn"} | {
    "matplotlib",
    "seaborn",
    "torchmetrics",
}

LIGHT_COMMANDS = [
    ["--help"],
    ["run", "--help"],
    ["methods"],
    ["methods", "--json"],
    ["tasks", "--json"],
    ["backbones"],
    ["frob"],
]

PROBE = """
import contextlib, io, json, sys
from gradbench.cli import main

found = []
for arguments in json.loads(sys.argv[1]):
    streams = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(streams[0]), contextlib.redirect_stderr(streams[1]):
        try:
            main(arguments)
        except SystemExit as exit:
            code = exit.code
    modules = {name.partition(".")[0] for name in sys.modules}
    found.append([code, *(stream.getvalue() for stream in streams), sorted(modules)])
print(json.dumps(found))
"""


def run(*command: str, path: Path | None = None) -> subprocess.CompletedProcess[str]:
    environment = dict(os.environ)
    if path is not None:
        known = [str(path), environment.get("PYTHONPATH", "")]
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, known))
    return subprocess.run(
        command, env=environment, capture_output=True, text=True, check=False, timeout=120
    )


def gradbench(*arguments: str, path: Path | None = None) -> subprocess.CompletedProcess[str]:
    return run(sys.executable, "-m", "gradbench", *arguments, path=path)


def test_help_and_listings_import_nothing_heavy() -> None:
    done = run(sys.executable, "-c", PROBE, json.dumps(LIGHT_COMMANDS))
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert [code for code, *_ in found] == [0, 0, 0, 0, 0, 0, 2]
    for (_, out, _, modules), arguments in zip(found, LIGHT_COMMANDS, strict=True):
        assert not HEAVY & set(modules), arguments
        assert out or arguments == ["frob"]


def test_the_probe_would_see_a_heavy_import() -> None:
    """The names above are those under which the packages are imported."""
    assert {name for name in HEAVY if importlib.util.find_spec(name) is None} == set()


def test_importing_the_package_imports_nothing_heavy() -> None:
    code = "import sys, gradbench, json; print(json.dumps(list(sys.modules)))"
    done = run(sys.executable, "-c", code)
    assert done.returncode == 0, done.stderr
    assert not HEAVY & set(json.loads(done.stdout))


def test_the_module_is_the_command() -> None:
    command = Path(sys.executable).with_name("gradbench")
    if not command.exists():
        pytest.skip("the command is not beside this interpreter")
    one, other = gradbench("methods", "--json"), run(str(command), "methods", "--json")
    assert (one.returncode, one.stderr) == (other.returncode, other.stderr) == (0, "")
    assert one.stdout == other.stdout
    assert {row["name"] for row in json.loads(one.stdout)} >= {"attittud", "primary-only"}


def test_an_unknown_command_is_two_and_one_line() -> None:
    done = gradbench("frob")
    assert (done.returncode, done.stdout) == (2, "")
    assert len(done.stderr.splitlines()) == 1
    assert "No such command 'frob'" in done.stderr


def test_a_reader_that_has_gone_is_no_fault() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-m", "gradbench", "methods"]
    with os.fdopen(writing, "wb", closefd=True) as stdout:
        done = subprocess.run(command, stdout=stdout, stderr=subprocess.PIPE, check=False)
    assert (done.returncode, done.stderr) == (1, b"")


@pytest.mark.parametrize("command", [["--help"], ["run", "--method", "x", "--task", "y"]])
def test_the_other_distribution_of_this_name_is_two_and_one_line(
    tmp_path: Path, command: list[str]
) -> None:
    info = tmp_path / "gradbench-2.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: gradbench\nVersion: 2.0\n")
    done = gradbench(*command, path=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert len(done.stderr.splitlines()) == 1
    assert "distribution 'gradbench' 2.0" in done.stderr
    assert "pip uninstall gradbench" in done.stderr
