"""The installed plug-ins: which there are, and the one that a name stands for."""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib.metadata import Distribution, EntryPoint, PackageNotFoundError
from typing import Any, Literal, Protocol

from gradbench.errors import PluginConflictError, PluginError, PluginNotFoundError
from gradbench.fields import Checked, check_definition
from gradbench.sources import SourceReader

METHODS = "gradbench.methods"
TASKS = "gradbench.tasks"
BACKBONES = "gradbench.backbones"

DISTRIBUTION = "gradbench-surgery"
FOREIGN = "gradbench"  # an autodiff benchmark has this name on package indexes
UNKNOWN = "unknown"


@dataclass(frozen=True)
class Plugin:
    """A loaded plug-in and the distribution that it came from."""

    obj: Any
    name: str
    distribution: str
    version: str


@dataclass(frozen=True)
class Listing:
    """One row of the installed plug-ins; the summary of an unreadable one says why it is."""

    name: str
    kind: str | None
    summary: str
    distribution: str
    version: str
    status: Literal["listed", "unreadable"] = "listed"


class Provider(Protocol):
    """Many plug-ins under one entry point, whose name ends in ``/``."""

    def names(self) -> Iterable[str]:
        """Return the names, without importing the package that the plug-ins come from."""

    def load(self, name: str) -> Any:
        """Import and return one plug-in."""


@dataclass(frozen=True)
class _Entry:
    """An entry point and the release that registers it."""

    point: EntryPoint
    distribution: str
    version: str

    def __str__(self) -> str:
        return f"{self.distribution} {self.version}"

    @property
    def is_provider(self) -> bool:
        return self.point.name.endswith("/")

    def serves(self, name: str) -> bool:
        """Tell whether this entry point answers for ``name``."""
        registered = self.point.name
        return name == registered or (self.is_provider and name.startswith(registered))

    def target(self) -> tuple[str, str]:
        """Return the module that the entry point names, and the object in it, if any."""
        try:
            return self.point.module, self.point.attr or ""
        except Exception:  # which one depends on the version of Python
            raise PluginError(f"no import path: {self.point.value}") from None

    def load(self) -> Any:
        """Import the object that the entry point names."""
        self.target()  # says what is malformed, which the line below does not
        return self.point.load()

    def provider(self) -> Provider:
        """Import the provider."""
        loaded = self.load()
        provider: Provider = loaded() if isinstance(loaded, type) else loaded
        if not all(callable(getattr(provider, verb, None)) for verb in ("names", "load")):
            raise TypeError(f"expected names() and load(name), found {provider!r}")
        return provider

    def names(self) -> list[str]:
        """Return the full names of the plug-ins under this entry point."""
        if not self.is_provider:
            return [self.point.name]
        names = set(self.provider().names())
        if not all(isinstance(name, str) and name for name in names):
            raise TypeError(f"expected names() to give text, found {names!r}")
        return sorted(self.point.name + name for name in names)


def load(group: str, name: str) -> Plugin:
    """Import the one plug-in that is registered as ``name``.

    Raises:
        PluginNotFoundError: if nothing is registered under the name.
        PluginConflictError: if two distributions register it.
        PluginError: if the import fails.
    """
    entry = _choose(group, name)
    with _blaming(entry, name):
        known = entry.names()
    if name not in known:
        raise PluginNotFoundError(group, name, _installed(group))
    with _blaming(entry, name):
        if entry.is_provider:
            obj = entry.provider().load(name.removeprefix(entry.point.name))
        else:
            obj = entry.load()
    return Plugin(obj, name, entry.distribution, entry.version)


def load_class(group: str, name: str, base: type) -> Plugin:
    """Import the plug-in ``name``, a subclass of ``base``; its fields, if any, defined well.

    Raises:
        PluginNotFoundError: if nothing is registered under the name.
        PluginConflictError: if two distributions register it.
        PluginError: if the import fails or gives something else.
    """
    plugin = load(group, name)
    if not (isinstance(plugin.obj, type) and issubclass(plugin.obj, base)):
        raise PluginError(
            f"Expected plug-in {name!r} of {plugin.distribution} {plugin.version} to be a subclass "
            f"of {base.__module__}.{base.__qualname__}, found {plugin.obj!r}. Correct the entry "
            f"point in the pyproject.toml of {plugin.distribution}, or report it to its authors."
        )
    if issubclass(base, Checked):
        with _blaming(plugin, name):
            check_definition(plugin.obj)
    return plugin


def listing(group: str) -> list[Listing]:
    """Return a row for every plug-in, sorted by name; of all these only providers are imported."""
    reader_of = functools.cache(_reader)
    rows = [row for entry in _entries(group) for row in _rows(entry, reader_of(entry.point.dist))]
    return sorted(rows, key=lambda row: (row.name, row.distribution))


def foreign_distribution() -> str | None:
    """Return the version of the installed distribution that is called as our import, if any."""
    try:
        return _release(importlib.metadata.distribution(FOREIGN))[1]
    except PackageNotFoundError:
        return None


def _rows(entry: _Entry, reader: SourceReader) -> list[Listing]:
    release = (entry.distribution, entry.version)
    try:
        if entry.is_provider:
            return [Listing(name, None, "", *release) for name in entry.names()]
        found = reader.describe(*entry.target())
    except Exception as error:  # whatever is wrong with one plug-in must not hide the others
        reason = _cause(error).partition("\n")[0]
        return [Listing(entry.point.name, None, reason, *release, status="unreadable")]
    return [Listing(entry.point.name, found.kind, found.summary, *release)]


def _reader(distribution: Distribution | None) -> SourceReader:
    """Return a reader of the distribution's own files and of ours."""
    packages: set[str] = set()
    with contextlib.suppress(Exception):  # the framework alone can do without an installation
        packages |= _packages(importlib.metadata.distribution(DISTRIBUTION))
    if distribution is not None:
        packages |= _packages(distribution)
    return SourceReader(packages)


def _packages(distribution: Distribution) -> set[str]:
    modules = (point.value.partition(":")[0] for point in distribution.entry_points)
    return {module.partition(".")[0].strip() for module in modules}


def _choose(group: str, name: str) -> _Entry:
    """Return the only entry point that answers for ``name``."""
    entries = [entry for entry in _entries(group) if entry.serves(name)]
    if not entries:
        raise PluginNotFoundError(group, name, _installed(group))
    rivals = {id(entry.point.dist): entry for entry in entries}.values()
    if len(rivals) > 1:
        raise PluginConflictError(
            f"Expected one distribution to register plug-in {name!r}, found {len(rivals)}: "
            f"{', '.join(sorted(map(str, rivals)))}. Uninstall all but one of them, or ask the "
            "authors of one to rename the plug-in."
        )
    return max(entries, key=lambda entry: len(entry.point.name))


def _installed(group: str) -> set[str]:
    """Return the names of all plug-ins, without those of providers that fail."""
    names: set[str] = set()
    for entry in _entries(group):
        with contextlib.suppress(Exception):
            names.update(entry.names())
    return names


@contextlib.contextmanager
def _blaming(owner: _Entry | Plugin, name: str) -> Iterator[None]:
    """Name the plug-in and its distribution in whatever its code raises."""
    try:
        yield
    except Exception as error:
        raise PluginError(
            f"Expected plug-in {name!r} of {owner.distribution} {owner.version} to work, found "
            f"this: {_cause(error).removesuffix('.')}. Install what is missing, or report it to "
            f"the authors of {owner.distribution}."
        ) from error


def _cause(error: Exception) -> str:
    return str(error) if isinstance(error, PluginError) else f"{type(error).__name__}: {error}"


def _entries(group: str) -> list[_Entry]:
    """Return what is registered under ``group``, in the order of the path."""
    release_of = functools.cache(_release)
    entries: dict[tuple[int, str], _Entry] = {}
    for point in _points(group):
        key = (id(point.dist), point.name)  # a name twice in one distribution: the first counts
        entries.setdefault(key, _Entry(point, *release_of(point.dist)))
    return list(entries.values())


def _points(group: str) -> list[EntryPoint]:
    try:
        return list(importlib.metadata.entry_points(group=group))
    except Exception:  # one distribution with malformed metadata
        return list(_readable_points(group))


def _readable_points(group: str) -> Iterator[EntryPoint]:
    """Yield the entry points of the distributions that can be read, each the first on the path."""
    seen: set[str] = set()
    for distribution in importlib.metadata.distributions():
        name = re.sub(r"[-_.]+", "-", _release(distribution)[0]).lower()
        if name in seen:
            continue
        if name != UNKNOWN:
            seen.add(name)
        with contextlib.suppress(Exception):
            yield from distribution.entry_points.select(group=group)


def _release(distribution: Distribution | None) -> tuple[str, str]:
    """Return the name and the version of a distribution."""
    if distribution is None:
        return UNKNOWN, UNKNOWN
    try:
        metadata = distribution.metadata
        return metadata.get_all("Name", [UNKNOWN])[0], metadata.get_all("Version", [UNKNOWN])[0]
    except Exception:  # missing or undecodable
        return UNKNOWN, UNKNOWN
