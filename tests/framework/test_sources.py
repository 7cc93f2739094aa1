from __future__ import annotations

import importlib
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from textwrap import dedent
from types import ModuleType

import pytest

from gradbench.errors import PluginError
from gradbench.sources import KINDS, Description, SourceReader

Write = Callable[[dict[str, str]], None]

BASES = "from gradbench.method import Aggregation, Branching, Scalarization, Weighting\n"


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Write:
    """Write modules into a folder on the path."""
    monkeypatch.syspath_prepend(tmp_path)

    def write(files: dict[str, str]) -> None:
        for name, text in files.items():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(dedent(text), encoding="utf-8")
        importlib.invalidate_caches()

    return write


def describe(path: str, *packages: str) -> Description:
    module, _, name = path.partition(":")
    return SourceReader(packages or [module.partition(".")[0]]).describe(module, name)


def kind(path: str, *packages: str) -> str | None:
    return describe(path, *packages).kind


@pytest.mark.parametrize(("base", "expected"), KINDS.items())
def test_kind_of_each_framework_class(write: Write, base: str, expected: str) -> None:
    module = {"TaskPair": "task", "BackboneProvider": "backbones"}.get(base, "method")
    write({"acme.py": f"from gradbench.{module} import {base}\nclass X({base}): ..."})
    assert kind("acme:X") == expected


@pytest.mark.parametrize(
    "text",
    [
        "from gradbench.method import Weighting\nclass X(Weighting): ...",
        "from gradbench.method import Weighting as W\nclass X(W): ...",
        "from gradbench import Weighting\nclass X(Weighting): ...",
        "from gradbench import method\nclass X(method.Weighting): ...",
        "from gradbench.method import *\nclass X(Weighting): ...",
        "import gradbench.method\nclass X(gradbench.method.Weighting): ...",
        "import gradbench.method as m\nclass X(m.Weighting): ...",
        "import gradbench.method as m\nBase = m.Weighting\nclass X(Base): ...",
        "from gradbench.method import Weighting\nclass X(Weighting[int]): ...",
        "from gradbench.method import Weighting\nclass X(object, Weighting): ...",
        "from gradbench.method import Weighting\nclass X: ...\nclass X(X, Weighting): ...",
        "from gradbench.method import Weighting as X\nclass X(X): ...",
        "from typing import TYPE_CHECKING\n"
        "if TYPE_CHECKING:\n    from gradbench.method import Weighting\nclass X(Weighting): ...",
        "try:\n    from gradbench.method import Weighting\nexcept ImportError:\n"
        "    Weighting = object\nclass X(Weighting): ...",
    ],
)
def test_kind_through_each_form_of_import(write: Write, text: str) -> None:
    write({"acme.py": text})
    assert kind("acme:X") == "weighting"


def test_kind_through_files_a_reexport_and_an_alias(write: Write) -> None:
    write(
        {
            "acme/__init__.py": "from ._bases import Gated as PublicGated",
            "acme/_bases.py": BASES + "class Root(Aggregation): ...\nclass Gated(Root): ...",
            "acme/deep/__init__.py": "",
            "acme/deep/gate.py": """
                from .. import PublicGated as Base
                class Middle(Base): ...
                """,
            "acme/deep/method.py": """
                import acme.deep.gate as g
                class X(g.Middle):
                    '''Gate all blocks.

                    More.
                    '''
                """,
        }
    )
    assert describe("acme.deep.method:X") == Description("aggregation", "Gate all blocks.")


def test_the_first_base_with_a_kind_decides(write: Write) -> None:
    write({"acme.py": BASES + "class A(Branching): ...\nclass X(object, A, Weighting): ..."})
    assert kind("acme:X") == "branching"


def test_the_latest_definition_counts(write: Write) -> None:
    write({"acme.py": "class X:\n    'Old.'\nclass X:\n    'New.'"})
    assert describe("acme:X").summary == "New."


def test_two_bases_under_one_imported_package_are_both_followed(write: Write) -> None:
    write(
        {
            "acme/__init__.py": "",
            "acme/a.py": "class Mixin: ...",
            "acme/b.py": BASES + "class Base(Branching): ...",
            "acme/x.py": "import acme.a, acme.b\nclass X(acme.a.Mixin, acme.b.Base): ...",
        }
    )
    assert kind("acme.x:X") == "branching"


def test_a_name_wins_over_the_submodule_that_it_hides(write: Write) -> None:
    write(
        {
            "acme/__init__.py": "from .gate import gate",
            "acme/gate.py": BASES + "class gate(Weighting): ...",
            "acme/x.py": "from acme import gate\nclass X(gate): ...",
        }
    )
    assert kind("acme.x:X") == "weighting"


def test_a_reexported_class_is_described(write: Write) -> None:
    write(
        {
            "acme/__init__.py": "from .x import *",
            "acme/x.py": BASES + "class X(Scalarization):\n    'Weigh.'",
        }
    )
    assert describe("acme:X") == Description("scalarization", "Weigh.")


def test_namespace_packages_are_walked(write: Write) -> None:
    write({"acme/plug/ins/x.py": BASES + "class X(Weighting): ..."})
    assert kind("acme.plug.ins.x:X") == "weighting"


def test_zipped_sources_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    archive = tmp_path / "acme.zip"
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("acme/__init__.py", "")
        file.writestr("acme/x.py", BASES + "class X(Weighting): ...")
    monkeypatch.syspath_prepend(archive)
    assert kind("acme.x:X") == "weighting"


@pytest.mark.parametrize(
    "text",
    [
        "class Weighting: ...\nclass X(Weighting): ...",
        "from acme_other import Weighting\nclass X(Weighting): ...",
        "from .gradbench import Weighting\nclass X(Weighting): ...",
        "class X: ...",
        BASES + "class Outer(Weighting):\n    class Inner: ...\nclass X(Outer.Inner): ...",
        "def base(): ...\nclass X(base()): ...",
        "class X(Nowhere): ...",
    ],
)
def test_the_spelling_of_a_name_is_not_its_kind(write: Write, text: str) -> None:
    write(
        {
            "acme/__init__.py": text,
            "acme/gradbench.py": "class Weighting: ...",
            "acme_other.py": "class Weighting: ...",
        }
    )
    assert kind("acme:X", "acme", "acme_other") is None


def test_only_the_given_packages_are_read(write: Write) -> None:
    write(
        {
            "acme.py": "from elsewhere import Base\nclass X(Base): ...",
            "elsewhere.py": BASES + "class Base(Weighting): ...",
        }
    )
    assert kind("acme:X", "acme") is None
    assert kind("acme:X", "acme", "elsewhere") == "weighting"


@pytest.mark.parametrize(
    "files",
    [
        {"acme.py": "class X(X): ..."},
        {"acme.py": "class X(Y): ...\nclass Y(X): ..."},
        {
            "acme.py": "from acme_b import Y\nclass X(Y): ...",
            "acme_b.py": "from acme import X as Y",
        },
        {"acme.py": "Y = Y.Y\nclass X(Y): ..."},
        {"acme.py": "from acme import *\nclass X(Y): ..."},
        {"acme.py": "import acme\nclass X(acme.acme.acme.Y): ..."},
    ],
)
def test_cycles_end(write: Write, files: dict[str, str]) -> None:
    write(files)
    assert kind("acme:X", "acme", "acme_b") is None


def test_nothing_is_imported(write: Write) -> None:
    write(
        {
            "acme/__init__.py": "raise RuntimeError",
            "acme/base.py": BASES + "raise RuntimeError\nclass Base(Weighting): ...",
            "acme/x.py": "from .base import Base\nraise RuntimeError\nclass X(Base): ...",
        }
    )
    before = set(sys.modules)
    assert kind("acme.x:X") == "weighting"
    assert set(sys.modules) == before


def test_an_invalid_escape_does_not_warn(write: Write) -> None:
    write({"acme.py": BASES + "PATTERN = '\\d'\nclass X(Weighting): ..."})
    assert kind("acme:X") == "weighting"


def test_a_class_without_docstring_has_no_summary(write: Write) -> None:
    write({"acme.py": "class X: ..."})
    assert describe("acme:X") == Description(None, "")


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("acme_absent:X", "no source of acme_absent"),
        ("acme.absent:X", "no source of acme.absent"),
        ("acme.absent.deeper:X", "no source of acme.absent.deeper"),
        ("sys:X", "no source of sys"),
        ("acme:Absent", "no class Absent in acme"),
        ("acme:function", "no class function in acme"),
        ("acme.broken:X", "syntax error in acme.broken, line 2"),
        ("acme.child:X", "syntax error in acme.broken, line 2"),
    ],
)
def test_unreadable_sources_say_why(write: Write, path: str, reason: str) -> None:
    write(
        {
            "acme/__init__.py": "def function(): ...",
            "acme/broken.py": "import ast\nclass X(:",
            "acme/child.py": "from .broken import Y\nclass X(Y): ...",
        }
    )
    with pytest.raises(PluginError, match=f"^{reason}$"):
        describe(path)


@pytest.mark.parametrize(
    "content", [b"# \xff\n", b"\n\n\n# \xff\n", b"# coding: unheard-of\n", b"X = 1\0"]
)
def test_undecodable_source_says_so(write: Write, tmp_path: Path, content: bytes) -> None:
    (tmp_path / "acme.py").write_bytes(content)
    importlib.invalidate_caches()
    with pytest.raises(PluginError, match=r"^(undecodable acme|syntax error in acme, line \d)$"):
        describe("acme:X")


def test_a_declared_encoding_is_obeyed(write: Write, tmp_path: Path) -> None:
    (tmp_path / "acme.py").write_bytes(b"# coding: latin-1\nclass X:\n    'Caf\xe9.'")
    importlib.invalidate_caches()
    assert describe("acme:X").summary == "Café."


def test_a_module_made_by_hand_has_no_source(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "acme_bare", ModuleType("acme_bare"))
    with pytest.raises(PluginError, match="no source of acme_bare"):
        describe("acme_bare:X")
