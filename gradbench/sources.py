"""The kind and the summary of a plug-in class, read from its source without importing it."""

from __future__ import annotations

import ast
import importlib.util
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib.machinery import ModuleSpec, PathFinder

from gradbench.errors import PluginError

FRAMEWORK = "gradbench"
KINDS = {
    "Scalarization": "scalarization",
    "Weighting": "weighting",
    "Aggregation": "aggregation",
    "Branching": "branching",
    "TaskPair": "task",
    "BackboneProvider": "backbone",
}
MAX_STEPS = 1000  # a class is a few imports away from its kind; only an endless alias needs more


@dataclass(frozen=True)
class Description:
    """What the source of a plug-in class says about it."""

    kind: str | None
    summary: str


@dataclass(frozen=True, eq=False)
class _Binding:
    """A name of a module: the dotted paths it leads to, which for a class are its bases."""

    paths: tuple[str, ...]
    node: ast.ClassDef | None = None


_Table = dict[str, list[_Binding]]


class SourceReader:
    """Follows names through the files of some top-level packages and of the framework."""

    def __init__(self, packages: Iterable[str]) -> None:
        self._packages = {*packages, FRAMEWORK}
        self._tables: dict[str, _Table | None] = {}

    def describe(self, module: str, name: str) -> Description:
        """Return the kind and the summary of the class ``name`` of ``module``.

        Raises:
            PluginError: if the source can not be found or parsed, or holds no such class.
        """
        if not name:
            raise PluginError(f"names a module, not a class: {module}")
        if self._table(module) is None:
            raise PluginError(f"no source of {module}")
        node, kind = None, None
        for step in self._walk(f"{module}.{name}"):
            if isinstance(step, str):
                kind = step
                break
            node = node or step
        if node is None:
            raise PluginError(f"no class {name} in {module}")
        return Description(kind, (ast.get_docstring(node) or "").partition("\n")[0])

    def _walk(self, path: str) -> Iterator[ast.ClassDef | str]:
        """Yield the classes and kinds that imports and base classes lead to, depth first."""
        paths = [path]
        seen: set[tuple[_Binding, str]] = set()
        while paths and len(seen) < MAX_STEPS:
            path = paths.pop()
            top, _, name = path.partition(".")
            kind = KINDS.get(name.rpartition(".")[2])
            if top == FRAMEWORK and kind:
                yield kind
                continue
            following: list[str] = []
            for binding, rest in self._bindings(path):
                if (binding, rest) in seen:
                    continue
                seen.add((binding, rest))
                if binding.node is None:
                    following += [each + rest for each in binding.paths]
                elif not rest:
                    yield binding.node
                    following += binding.paths
            paths += reversed(following)

    def _bindings(self, path: str) -> list[tuple[_Binding, str]]:
        """Return what the name in ``path`` may be bound to, latest first, and what follows it."""
        parts = path.split(".")
        for cut in range(len(parts) - 1, 0, -1):
            table = self._table(".".join(parts[:cut])) or {}
            if named := table.get(parts[cut]):
                rest = "".join(f".{part}" for part in parts[cut + 1 :])
                return [(binding, rest) for binding in reversed(named)]
            if starred := table.get("*"):
                rest = "".join(f".{part}" for part in parts[cut:])
                return [(binding, rest) for binding in reversed(starred)]
        return []

    def _table(self, module: str) -> _Table | None:
        if module.partition(".")[0] not in self._packages:
            return None
        if module not in self._tables:
            self._tables[module] = _read(module)
        return self._tables[module]


def _read(module: str) -> _Table | None:
    """Return what the names of a module are bound to, or None where it has no source."""
    spec = _find(module)
    get_source = getattr(spec and spec.loader, "get_source", None)
    if spec is None or get_source is None:
        return None
    try:
        source = get_source(spec.name)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a plug-in's invalid escapes concern its author
            tree = None if source is None else ast.parse(source)
    except (SyntaxError, ValueError) as error:
        line = getattr(error, "lineno", None)
        fault = f"syntax error in {module}, line {line}" if line else f"undecodable {module}"
        raise PluginError(fault) from error
    if tree is None:
        return None
    is_package = spec.submodule_search_locations is not None
    return _tabulate(tree, module, module if is_package else module.rpartition(".")[0])


def _find(module: str) -> ModuleSpec | None:
    """Return the spec of a module; unlike `find_spec`, import none of its parents."""
    top, *rest = module.split(".")
    try:
        spec = importlib.util.find_spec(top)
    except ValueError:  # imported, and without a spec of its own
        return None
    for part in rest:
        spec = spec and PathFinder.find_spec(part, list(spec.submodule_search_locations or ()))
    return spec


def _tabulate(tree: ast.Module, module: str, package: str) -> _Table:
    table: _Table = {}
    for node in _statements(tree):
        for name, binding in _bind(node, module, package):
            table.setdefault(name, []).append(binding)
    return table


def _statements(parent: ast.AST) -> Iterator[ast.AST]:
    """Yield what runs when the module does, whichever way its conditions turn out."""
    for node in ast.iter_child_nodes(parent):
        yield node
        if isinstance(node, ast.If | ast.Try | ast.ExceptHandler | ast.With):
            yield from _statements(node)


def _bind(node: ast.AST, module: str, package: str) -> Iterator[tuple[str, _Binding]]:
    """Yield the names that a statement binds."""
    match node:
        case ast.ClassDef(name=name, bases=bases):
            paths = tuple(f"{module}.{path}" for base in bases if (path := _dotted(base)))
            yield name, _Binding(paths, node)
        case ast.Assign(targets=[ast.Name(id=name)], value=value) if path := _dotted(value):
            yield name, _Binding((f"{module}.{path}",))
        case ast.Import(names=aliases):
            for alias in aliases:
                top = alias.name.partition(".")[0]
                yield alias.asname or top, _Binding((alias.name if alias.asname else top,))
        case ast.ImportFrom(module=origin, names=aliases, level=level):
            base = package.split(".")[: len(package.split(".")) + 1 - level] if level else []
            home = ".".join([*base, *([origin] if origin else [])])
            for alias in aliases:
                path = home if alias.name == "*" else f"{home}.{alias.name}"
                yield alias.asname or alias.name, _Binding((path,))


def _dotted(node: ast.expr) -> str | None:
    """Return the dotted name that an expression spells, without a subscript, or None."""
    match node:
        case ast.Name(id=name):
            return name
        case ast.Attribute(value=value, attr=attribute):
            return f"{owner}.{attribute}" if (owner := _dotted(value)) else None
        case ast.Subscript(value=value):
            return _dotted(value)
    return None
