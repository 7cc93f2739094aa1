"""Typed fields of frozen dataclasses: what they accept, what tuning draws from, their help.

A plug-in writes each of its settings once, as a field::

    rank: Annotated[int, Valid(1, 4096), IntUniform(1, 20), "rows of the basis"] = 10

The command line, the tuning space and the recorded parameters are all read from there.
"""

from __future__ import annotations

import dataclasses
import inspect
import math
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Union, get_args, get_origin

from gradbench.errors import FieldError, PluginError, UnknownKeyError

MAX_RANKED_DIMENSIONS = 3  # protocol GB-1, rule 2
EXACT = 2**53  # up to here a float64 can hold every integer


@dataclass(frozen=True)
class Valid:
    """The closed range of numbers that a field accepts."""

    low: float = -math.inf
    high: float = math.inf

    def __contains__(self, value: object) -> bool:
        return isinstance(value, (int, float)) and self.low <= value <= self.high

    def __str__(self) -> str:
        if math.isinf(self.high):
            return "any number" if math.isinf(self.low) else f"at least {self.low:g}"
        return (
            f"at most {self.high:g}" if math.isinf(self.low) else f"{self.low:g} to {self.high:g}"
        )


@dataclass(frozen=True)
class Location:
    """The field says where something is; what is there decides about a result, not where."""


@dataclass(frozen=True)
class Uniform:
    """Tuning draws a number uniformly from [low, high]."""

    low: float
    high: float

    def options(self) -> tuple[object, ...]:
        """Return the ends of the range."""
        return (self.low, self.high)

    def __str__(self) -> str:
        return f"{self.low:g} to {self.high:g}"


@dataclass(frozen=True)
class LogUniform(Uniform):
    """Tuning draws the logarithm of a number uniformly from [log low, log high]."""

    def __str__(self) -> str:
        return f"{super().__str__()}, log-uniform"


@dataclass(frozen=True)
class IntUniform(Uniform):
    """Tuning draws an integer uniformly from low, …, high."""

    low: int
    high: int


@dataclass(frozen=True, init=False)
class Choice:
    """Tuning draws one of the listed values; a joint dimension lists dicts of fields."""

    values: tuple[Any, ...]

    def __init__(self, *values: Any) -> None:
        object.__setattr__(self, "values", values)

    def options(self) -> tuple[object, ...]:
        """Return the listed values."""
        return self.values

    def __str__(self) -> str:
        return " | ".join(
            ", ".join(f"{key} {part}" for key, part in value.items())
            if isinstance(value, Mapping)
            else str(value)
            for value in self.values
        )


SearchRange = Uniform | Choice


@dataclass(frozen=True)
class Field:
    """What is known of one field: its type, default, valid values, search range, help."""

    name: str
    type: Any
    default: Any
    valid: Valid | None
    search: SearchRange | None
    help: str
    is_location: bool = False

    @property
    def expected(self) -> str:
        """Say in words what the field accepts."""
        options = _options(self.type)
        words = " or ".join(_words(option) for option in options)
        return f"{words}, {self.valid}" if self.valid is not None else words

    def convert(self, value: object, owner: str = "") -> Any:
        """Return ``value`` as the field's type; text is parsed, as on the command line.

        Raises:
            FieldError: if it is of another type, NaN, or outside the valid range.
        """
        for option in _options(self.type):
            converted = _convert(option, value)
            if converted is not _REFUSED and self._accepts(converted):
                return converted
        name = f"{owner}.{self.name}" if owner else self.name
        raise FieldError(f"Expected {name} to be {self.expected}, found {value!r}.")

    def _accepts(self, value: object) -> bool:
        return self.valid is None or value is None or value in self.valid


def fields_of(cls: type) -> Mapping[str, Field]:
    """Return the fields of a dataclass by name, in the order of definition.

    Raises:
        PluginError: if the class is no frozen dataclass or a field has no default.
    """
    if cls not in _known:
        _known[cls] = types.MappingProxyType(_read(cls))
    return _known[cls]


_known: dict[type, Mapping[str, Field]] = {}


def _read(cls: type) -> dict[str, Field]:
    hints = typing.get_type_hints(cls, include_extras=True)
    if not _is_frozen_dataclass(cls, hints):
        raise PluginError(
            f"Expected {cls.__qualname__} to be a frozen dataclass; "
            "decorate it with @dataclass(frozen=True)."
        )
    found: dict[str, Field] = {}
    for field in dataclasses.fields(cls):
        hint = hints[field.name]
        marks = hint.__metadata__ if get_origin(hint) is Annotated else ()
        default = field.default
        if default is dataclasses.MISSING:
            raise PluginError(
                f"Expected a default for {cls.__qualname__}.{field.name}, found none; "
                "every hyper-parameter needs one."
            )
        found[field.name] = Field(
            name=field.name,
            type=get_args(hint)[0] if marks else hint,
            default=default,
            valid=next((mark for mark in marks if isinstance(mark, Valid)), None),
            search=next((mark for mark in marks if isinstance(mark, Uniform | Choice)), None),
            help=next((mark for mark in marks if isinstance(mark, str)), ""),
            is_location=any(isinstance(mark, Location) for mark in marks),
        )
    return found


def _is_frozen_dataclass(cls: type, hints: Mapping[str, Any]) -> bool:
    if not dataclasses.is_dataclass(cls):
        return False
    frozen: bool = cls.__dataclass_params__.frozen  # type: ignore[attr-defined]
    decorated = "__dataclass_fields__" in vars(cls)
    own = [name for name in inspect.get_annotations(cls) if get_origin(hints[name]) is not ClassVar]
    return frozen and (decorated or not own)  # else its own fields would go unseen


def convert_all(cls: type, values: Mapping[str, object], owner: str) -> dict[str, Any]:
    """Return ``values`` converted to the fields of ``cls``; ``owner`` prefixes names in errors.

    Raises:
        UnknownKeyError: if a key is no field.
        FieldError: if a value is not accepted.
    """
    known = fields_of(cls)
    for key in values:
        if key not in known:
            raise UnknownKeyError(f"{owner}.{key}", [f"{owner}.{name}" for name in known])
    return {key: known[key].convert(value, owner) for key, value in values.items()}


class Checked:
    """A frozen dataclass whose constructor refuses values that its fields do not accept."""

    joint_search: ClassVar[Mapping[str, Choice]] = {}
    known_failures: ClassVar[Mapping[str, str]] = {}  # a test of the contract -> why it fails

    def __post_init__(self) -> None:
        """Check and normalise every field."""
        for name, field in fields_of(type(self)).items():
            value = getattr(self, name)
            converted = field.convert(value, type(self).__name__)
            object.__setattr__(self, name, converted)


def identity_of(settings: Any) -> dict[str, Any]:
    """Return the values of a dataclass by field, without those that only say where things are."""
    known = fields_of(type(settings))
    values = dataclasses.asdict(settings)
    return {name: value for name, value in values.items() if not known[name].is_location}


def locations_of(settings: Any) -> dict[str, Any]:
    """Return the values of a dataclass that only say where things are, as absolute paths."""
    found = {
        name: str(getattr(settings, name)).strip()
        for name, field in fields_of(type(settings)).items()
        if field.is_location
    }
    return {
        name: str(Path(text).expanduser().absolute()) if text else ""
        for name, text in found.items()
    }


def check_definition(cls: type) -> None:
    """Check that defaults and search ranges of a plug-in lie inside what its fields accept.

    Raises:
        PluginError: naming the first field that is defined wrongly.
    """
    fields = fields_of(cls)
    joint: Mapping[str, Choice] = getattr(cls, "joint_search", {})
    try:
        for field in fields.values():
            field.convert(field.default, cls.__qualname__)
            for option in field.search.options() if field.search else ():
                field.convert(option, f"{cls.__qualname__} (search range)")
            _check_range(field)
        for choice in joint.values():
            for option in choice.options():
                convert_all(cls, typing.cast("Mapping[str, object]", option), cls.__qualname__)
    except (FieldError, UnknownKeyError) as error:
        raise PluginError(f"{cls.__qualname__} is defined wrongly. {error}") from error
    dimensions = len(joint) + sum(field.search is not None for field in fields.values())
    if dimensions > MAX_RANKED_DIMENSIONS:
        raise PluginError(
            f"Expected at most {MAX_RANKED_DIMENSIONS} search dimensions in {cls.__qualname__}, "
            f"found {dimensions}; remove a search range or join fields in joint_search."
        )


def _check_range(field: Field) -> None:
    search = field.search
    if not isinstance(search, Uniform):
        return
    if float not in _options(field.type) and not isinstance(search, IntUniform):
        raise FieldError(f"Expected {field.name} to be drawn by IntUniform, found {search}.")
    if isinstance(search, LogUniform) and search.low <= 0:
        raise FieldError(f"Expected {field.name} to be drawn from above 0, found {search}.")
    if search.low > search.high:
        raise FieldError(f"Expected {field.name} to be drawn from low to high, found {search}.")


_REFUSED = object()
_TRUTH = {"true": True, "false": False, "yes": True, "no": False, "1": True, "0": False}


def _options(hint: Any) -> tuple[Any, ...]:
    return get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)


def _words(option: Any) -> str:
    if get_origin(option) is Literal:
        return f"one of {', '.join(map(str, get_args(option)))}"
    named = {int: "an integer", float: "a finite number", str: "text", bool: "true or false"}
    return named.get(option, "none" if option is type(None) else str(option))


def _convert(option: Any, value: object) -> Any:
    """Return ``value`` as ``option``, or ``_REFUSED``."""
    text = value.strip() if isinstance(value, str) else None
    if get_origin(option) is Literal:
        return next((each for each in get_args(option) if str(each) == str(value)), _REFUSED)
    if option is type(None):
        return None if value is None or (text is not None and text.lower() == "none") else _REFUSED
    if option is bool:
        if text is not None:
            return _TRUTH.get(text.lower(), _REFUSED)
        return value if isinstance(value, bool) else _REFUSED
    if option is str:
        return value if isinstance(value, str) else _REFUSED
    if option not in (int, float) or isinstance(value, bool):
        return _REFUSED
    try:
        number = (
            value if text is None else int(text) if text.lstrip("+-").isdigit() else float(text)
        )
    except ValueError:
        return _REFUSED
    if not isinstance(number, (int, float)):
        return _REFUSED
    return _as_float(number) if option is float else _as_integer(number)


def _as_float(number: float) -> Any:
    try:
        converted = float(number)
    except OverflowError:
        return _REFUSED
    return converted if math.isfinite(converted) else _REFUSED


def _as_integer(number: float) -> Any:
    if isinstance(number, int):
        return int(number)
    exact = number.is_integer() and abs(number) < EXACT  # beyond it text may have been rounded
    return int(number) if exact else _REFUSED
