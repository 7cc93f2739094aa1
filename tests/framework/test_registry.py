from __future__ import annotations

import importlib
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from textwrap import dedent

import pytest

from gradbench import registry
from gradbench.errors import PluginConflictError, PluginError, PluginNotFoundError
from gradbench.fields import Checked
from gradbench.registry import Listing, Plugin

GROUP = "gradbench.methods.of-these-tests"  # the real groups hold whatever is installed

PROVIDER = """
    class Shelf:
        def names(self):
            yield "upgrad"
            yield "mgda"

        def load(self, name):
            return name.upper()

    shelf = Shelf()
    """


@dataclass(frozen=True)
class Site:
    """A folder on the path that distributions are written into."""

    path: Path

    def install(
        self,
        name: str,
        points: Mapping[str, str],
        *,
        version: str = "1.0",
        group: str = GROUP,
        **modules: str,
    ) -> None:
        lines = "\n".join(f"{key} = {value}" for key, value in points.items())
        self.install_raw(name, f"[{group}]\n{lines}\n", version=version)
        for module, text in modules.items():
            (self.path / f"{module}.py").write_text(dedent(text), encoding="utf-8")
        importlib.invalidate_caches()

    def install_raw(self, name: str, entry_points: str, *, version: str = "1.0") -> None:
        folder = self.path / f"{name.replace('-', '_')}-{version}.dist-info"
        folder.mkdir(parents=True)
        metadata = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
        (folder / "METADATA").write_text(metadata, encoding="utf-8")
        (folder / "entry_points.txt").write_text(entry_points, encoding="utf-8")
        importlib.invalidate_caches()


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    monkeypatch.syspath_prepend(tmp_path)
    before = set(sys.modules)
    yield Site(tmp_path)
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(tmp_path)):
            del sys.modules[name]


def rows(group: str = GROUP) -> dict[str, Listing]:
    return {row.name: row for row in registry.listing(group)}


class TestLoad:
    def test_loads_the_object_and_tells_where_it_came_from(self, site: Site) -> None:
        site.install("acme", {"x": "acme_x:X"}, version="2.3", acme_x="X = 7")
        assert registry.load(GROUP, "x") == Plugin(7, "x", "acme", "2.3")

    def test_imports_nothing_but_the_requested_plugin(self, site: Site) -> None:
        site.install(
            "acme",
            {"x": "acme_x:X", "broken": "acme_broken:X", "shelf/": "acme_shelf:shelf"},
            acme_x="X = 7",
            acme_broken="raise RuntimeError",
            acme_shelf="raise RuntimeError",
        )
        assert registry.load(GROUP, "x").obj == 7
        assert not {"acme_broken", "acme_shelf"} & set(sys.modules)

    def test_unknown_name_lists_the_installed_and_the_nearest(self, site: Site) -> None:
        site.install(
            "acme",
            {"pcgrad": "a:X", "shelf/": "acme_shelf:shelf", "bad/": "acme_bad:shelf"},
            acme_shelf=PROVIDER,
            acme_bad="raise RuntimeError",
        )
        with pytest.raises(PluginNotFoundError) as caught:
            registry.load(GROUP, "pcgard")
        assert "found 'pcgard'. Did you mean 'pcgrad'?" in str(caught.value)
        assert "Installed: pcgrad, shelf/mgda, shelf/upgrad." in str(caught.value)

    def test_an_empty_group_says_so(self, site: Site) -> None:
        with pytest.raises(PluginNotFoundError, match="Installed: none"):
            registry.load(GROUP, "x")

    @pytest.mark.parametrize(
        ("text", "cause"),
        [
            ("import acme_absent", "ModuleNotFoundError: No module named 'acme_absent'"),
            ("raise RuntimeError('no GPU')", "RuntimeError: no GPU"),
            ("Y = 1", "AttributeError: module 'acme_x' has no attribute 'X'"),
            ("X = (", "SyntaxError: "),
        ],
    )
    def test_a_failed_import_names_plugin_distribution_and_cause(
        self, site: Site, text: str, cause: str
    ) -> None:
        site.install("acme", {"x": "acme_x:X"}, version="2.3", acme_x=text)
        with pytest.raises(PluginError, match=re.escape(cause)) as caught:
            registry.load(GROUP, "x")
        assert "plug-in 'x' of acme 2.3 to work" in str(caught.value)
        assert caught.value.__cause__ is not None
        assert caught.value.exit_code == 1

    def test_a_malformed_value_is_named(self, site: Site) -> None:
        site.install("acme", {"x": "acme x y"})
        with pytest.raises(PluginError, match=r"'x' of acme 1\.0 .* no import path: acme x y"):
            registry.load(GROUP, "x")

    @pytest.mark.parametrize("exception", ["KeyboardInterrupt", "SystemExit"])
    def test_an_interrupt_passes(self, site: Site, exception: str) -> None:
        site.install("acme", {"x": "acme_x:X"}, acme_x=f"raise {exception}")
        with pytest.raises((KeyboardInterrupt, SystemExit)):
            registry.load(GROUP, "x")

    @pytest.mark.parametrize("content", [None, b"", b"Name: acm\xe9\n"])
    def test_bad_metadata_gives_unknown(self, site: Site, content: bytes | None) -> None:
        site.install("acme", {"x": "acme_x:X"}, acme_x="X = 7")
        metadata = site.path / "acme-1.0.dist-info" / "METADATA"
        metadata.unlink() if content is None else metadata.write_bytes(content)
        assert registry.load(GROUP, "x") == Plugin(7, "x", "unknown", "unknown")


class TestConflict:
    @pytest.fixture(autouse=True)
    def two_distributions(self, site: Site) -> None:
        site.install("acme", {"x": "acme_x:X", "y": "acme_x:X"}, acme_x="X = 7")
        site.install("rival", {"x": "rival_x:X"}, version="2.0", rival_x="X = 8")

    def test_both_distributions_are_named(self) -> None:
        with pytest.raises(PluginConflictError, match=r"'x', found 2: acme 1\.0, rival 2\.0\."):
            registry.load(GROUP, "x")

    def test_other_names_still_load(self) -> None:
        assert registry.load(GROUP, "y").obj == 7

    def test_both_rows_are_listed(self, site: Site) -> None:
        for module in ("acme_x", "rival_x"):
            (site.path / f"{module}.py").write_text("class X: ...")
        found = [(row.name, row.distribution, row.status) for row in registry.listing(GROUP)]
        assert found == [
            ("x", "acme", "listed"),
            ("x", "rival", "listed"),
            ("y", "acme", "listed"),
        ]

    def test_a_name_under_the_prefix_of_anothers_provider(self, site: Site) -> None:
        site.install("shelves", {"shelf/": "acme_shelf:shelf"}, acme_shelf=PROVIDER)
        site.install("squatter", {"shelf/mgda": "acme_x:X"})
        assert registry.load(GROUP, "shelf/upgrad").obj == "UPGRAD"
        with pytest.raises(PluginConflictError, match=r"shelves 1\.0, squatter 1\.0"):
            registry.load(GROUP, "shelf/mgda")


class TestOneDistributionTwiceOnThePath:
    @pytest.fixture(autouse=True)
    def two_copies(self, site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
        first = Site(site.path / "first")
        site.install("acme-x", {"x": "acme_x:Old"}, acme_x="Old = 1\nNew = 2")
        first.install("acme.X", {"x": "acme_x:New"}, version="2.0")
        monkeypatch.syspath_prepend(first.path)

    def test_the_first_counts(self) -> None:
        assert registry.load(GROUP, "x") == Plugin(2, "x", "acme.X", "2.0")

    def test_the_first_counts_beside_malformed_metadata(self, site: Site) -> None:
        site.install_raw("malformed", f"[{GROUP}]\nno equals sign\n")
        assert registry.load(GROUP, "x") == Plugin(2, "x", "acme.X", "2.0")
        assert [row.version for row in registry.listing(GROUP)] == ["2.0"]


class TestLoadClass:
    def test_a_subclass_is_loaded(self, site: Site) -> None:
        text = """
            from dataclasses import dataclass
            from gradbench.fields import Checked

            @dataclass(frozen=True)
            class X(Checked):
                rank: int = 10
            """
        site.install("acme", {"x": "acme_x:X"}, acme_x=text)
        assert issubclass(registry.load_class(GROUP, "x", Checked).obj, Checked)

    @pytest.mark.parametrize(
        ("text", "found"), [("X = 7", "found 7"), ("class X: ...", "found <class 'acme_x.X'>")]
    )
    def test_anything_else_is_refused(self, site: Site, text: str, found: str) -> None:
        site.install("acme", {"x": "acme_x:X"}, acme_x=text)
        with pytest.raises(PluginError, match=found) as caught:
            registry.load_class(GROUP, "x", Checked)
        assert "'x' of acme 1.0 to be a subclass of gradbench.fields.Checked" in str(caught.value)

    @pytest.mark.parametrize("fault", ["rank: int", "rank: Absent = 1", "rank: int = 1.5"])
    def test_its_fields_are_checked(self, site: Site, fault: str) -> None:
        text = f"""
            from __future__ import annotations
            from dataclasses import dataclass
            from gradbench.fields import Checked

            @dataclass(frozen=True)
            class X(Checked):
                {fault}
            """
        site.install("acme", {"x": "acme_x:X"}, acme_x=text)
        with pytest.raises(PluginError, match=r"'x' of acme 1\.0 to work"):
            registry.load_class(GROUP, "x", Checked)


class TestProvider:
    @pytest.mark.parametrize("target", ["acme_shelf", "acme_shelf:shelf", "acme_shelf:Shelf"])
    def test_a_module_an_object_or_a_class_provides(self, site: Site, target: str) -> None:
        text = dedent(PROVIDER) + "names, load = shelf.names, shelf.load\n"
        site.install("acme", {"shelf/": target}, version="2.3", acme_shelf=text)
        assert registry.load(GROUP, "shelf/upgrad") == Plugin(
            "UPGRAD", "shelf/upgrad", "acme", "2.3"
        )
        assert registry.listing(GROUP) == [
            Listing("shelf/mgda", None, "", "acme", "2.3"),
            Listing("shelf/upgrad", None, "", "acme", "2.3"),
        ]

    @pytest.mark.parametrize("name", ["shelf/upgrade", "shelf/", "shelf"])
    def test_a_name_that_it_does_not_have(self, site: Site, name: str) -> None:
        site.install("acme", {"shelf/": "acme_shelf:shelf"}, acme_shelf=PROVIDER)
        with pytest.raises(PluginNotFoundError, match="Installed: shelf/mgda, shelf/upgrad"):
            registry.load(GROUP, name)

    def test_the_nearest_of_its_names_is_offered(self, site: Site) -> None:
        site.install("acme", {"shelf/": "acme_shelf:shelf"}, acme_shelf=PROVIDER)
        with pytest.raises(PluginNotFoundError, match=r"Did you mean 'shelf/upgrad'\?"):
            registry.load(GROUP, "shelf/upgrade")

    def test_the_longest_prefix_of_a_distribution_answers(self, site: Site) -> None:
        nested = PROVIDER.replace("name.upper()", "'nested'")
        points = {"shelf/": "acme_shelf:shelf", "shelf/top/": "acme_top:shelf"}
        site.install("acme", points, acme_shelf=PROVIDER, acme_top=nested)
        assert registry.load(GROUP, "shelf/top/mgda").obj == "nested"
        assert registry.load(GROUP, "shelf/mgda").obj == "MGDA"

    @pytest.mark.parametrize(
        ("text", "reason"),
        [
            ("import acme_absent", "ModuleNotFoundError: No module named 'acme_absent'"),
            ("shelf = 7", "TypeError: expected names() and load(name), found 7"),
            (PROVIDER.replace('"mgda"', "1 / 0"), "ZeroDivisionError: division by zero"),
            (PROVIDER.replace('"mgda"', "5"), "TypeError: expected names() to give text"),
            ("raise RuntimeError('first\\nsecond')", "RuntimeError: first"),
        ],
    )
    def test_a_broken_one_is_one_row_and_stops_no_other(
        self, site: Site, text: str, reason: str
    ) -> None:
        points = {"shelf/": "acme_shelf:shelf", "x": "acme_x:X"}
        site.install("acme", points, acme_shelf=text, acme_x="class X: ...")
        found = rows()
        assert list(found) == ["shelf/", "x"]
        assert found["shelf/"].status == "unreadable"
        assert found["shelf/"].summary.startswith(reason)
        assert "second" not in found["shelf/"].summary
        assert found["x"].status == "listed"
        with pytest.raises(PluginError, match=r"'shelf/mgda' of acme 1\.0"):
            registry.load(GROUP, "shelf/mgda")

    def test_a_failure_to_load_is_named(self, site: Site) -> None:
        text = PROVIDER.replace("return name.upper()", "import acme_absent")
        site.install("acme", {"shelf/": "acme_shelf:shelf"}, acme_shelf=text)
        with pytest.raises(PluginError, match=r"'shelf/mgda' .*No module named 'acme_absent'"):
            registry.load(GROUP, "shelf/mgda")


class TestListing:
    def test_rows_are_sorted_and_described_from_source(self, site: Site) -> None:
        text = """
            raise RuntimeError("imported")
            from acme_base import Gated
            class X(Gated):
                '''Gate gradients.'''
            class A: ...
            """
        site.install(
            "acme",
            {"x": "acme_x:X", "a": "acme_x:A"},
            acme_x=text,
            acme_base="from gradbench.method import Weighting\nclass Gated(Weighting): ...",
        )
        site.install("base", {}, group="any.other.group")
        before = set(sys.modules)
        assert registry.listing(GROUP) == [
            Listing("a", None, "", "acme", "1.0"),
            Listing("x", None, "Gate gradients.", "acme", "1.0"),  # acme_base is not acme's
        ]
        assert set(sys.modules) == before

    def test_kind_through_every_package_of_the_distribution(self, site: Site) -> None:
        entry_points = f"[{GROUP}]\nx = acme_x:X\n[any.other.group]\ny = acme_base:main\n"
        site.install_raw("acme", entry_points)
        (site.path / "acme_x.py").write_text("from acme_base import B\nclass X(B): ...")
        (site.path / "acme_base.py").write_text(
            "from gradbench.method import Weighting\nclass B(Weighting): ..."
        )
        assert rows()["x"].kind == "weighting"

    def test_kind_through_a_plugin_of_our_own_distribution(
        self, site: Site, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(registry, "DISTRIBUTION", "ours")
        site.install("acme", {"x": "acme_x:X"}, acme_x="from ours import B\nclass X(B): ...")
        assert rows()["x"].kind is None
        text = "from gradbench import Branching\nclass B(Branching): ..."
        site.install("ours", {"b": "ours:B"}, ours=text)
        assert rows()["x"].kind == "branching"

    @pytest.mark.parametrize(
        ("target", "reason"),
        [
            ("acme_absent:X", "no source of acme_absent"),
            ("acme_x:Absent", "no class Absent in acme_x"),
            ("acme_broken:X", "syntax error in acme_broken, line 1"),
            ("acme_x", "names a module, not a class: acme_x"),
            ("acme x y", "no import path: acme x y"),
        ],
    )
    def test_an_unreadable_plugin_says_why_and_stops_no_other(
        self, site: Site, target: str, reason: str
    ) -> None:
        points = {"bad": target, "x": "acme_x:X"}
        site.install("acme", points, acme_x="class X: ...", acme_broken="class X(:")
        assert registry.listing(GROUP) == [
            Listing("bad", None, reason, "acme", "1.0", "unreadable"),
            Listing("x", None, "", "acme", "1.0", "listed"),
        ]

    @pytest.mark.parametrize("content", [b"[%s]\nno equals sign\n", b"[%s]\nx = \xff:X\n"])
    def test_malformed_metadata_stops_no_other_distribution(
        self, site: Site, content: bytes
    ) -> None:
        site.install_raw("malformed", "")
        broken = site.path / "malformed-1.0.dist-info" / "entry_points.txt"
        broken.write_bytes(content.replace(b"%s", GROUP.encode()))
        site.install("acme", {"x": "acme_x:X"}, acme_x="class X: ...")
        site.install("other", {"y": "acme_x:X"})
        assert list(rows()) == ["x", "y"]
        assert registry.load(GROUP, "x").distribution == "acme"

    @pytest.mark.parametrize("group", [registry.METHODS, registry.TASKS, registry.BACKBONES])
    def test_the_groups_of_the_framework(self, site: Site, group: str) -> None:
        text = "from gradbench.task import TaskPair\nclass X(TaskPair): ..."
        site.install("acme", {"acme-x": "acme_x:X"}, group=group, acme_x=text)
        assert rows(group)["acme-x"] == Listing("acme-x", "task", "", "acme", "1.0")

    def test_nothing_heavy_is_imported(self) -> None:
        code = """
            import sys
            from gradbench import registry

            for group in (registry.METHODS, registry.TASKS, registry.BACKBONES):
                registry.listing(group)
            print({"torch", "timm", "mlflow", "pandas", "numpy"} & set(sys.modules))
            """
        command = [sys.executable, "-c", dedent(code)]
        found = subprocess.run(command, capture_output=True, text=True, check=True)
        assert found.stdout.strip() == "set()"


class TestForeignDistribution:
    def test_it_is_reported_with_its_version(self, site: Site) -> None:
        site.install_raw("gradbench", "", version="0.9")
        assert registry.foreign_distribution() == "0.9"

    def test_our_own_is_not_foreign(self, site: Site) -> None:
        site.install_raw("gradbench-surgery", "")
        assert registry.foreign_distribution() is None
