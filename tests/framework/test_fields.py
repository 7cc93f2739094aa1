from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal

import pytest

from gradbench.errors import FieldError, PluginError, UnknownKeyError
from gradbench.fields import (
    Checked,
    Choice,
    IntUniform,
    LogUniform,
    Uniform,
    Valid,
    check_definition,
    convert_all,
    fields_of,
)

BIG = 2**53 + 1  # the first integer that a float rounds
HUGE = 10**400  # no float is as large


@dataclass(frozen=True)
class Settings(Checked):
    """One field of each kind."""

    count: Annotated[int, Valid(1, 100), IntUniform(1, 20), "how many"] = 10
    rate: Annotated[float, Valid(0, 1), LogUniform(0.01, 1.0)] = 0.5
    free: float = 0.0
    whole: int = 0
    flag: bool = False
    text: str = "a"
    kind: Literal["plain", "fancy"] = "plain"
    level: Literal[1, 2] = 1
    limit: Annotated[int | None, Valid(1)] = None


def short(value: object) -> str:
    """Name a test case."""
    return repr(value)[:20]


def convert(name: str, value: object) -> Any:
    return fields_of(Settings)[name].convert(value, "settings")


class TestConvert:
    @pytest.mark.parametrize(
        ("name", "value", "expected"),
        [
            ("count", 7, 7),
            ("count", 7.0, 7),
            ("count", "7", 7),
            ("count", " +7 ", 7),
            ("count", "7.0", 7),
            ("count", "1e1", 10),
            ("whole", -3, -3),
            ("whole", "-3", -3),
            ("whole", BIG, BIG),
            ("whole", str(BIG), BIG),
            ("whole", HUGE, HUGE),
            ("whole", str(HUGE), HUGE),
            ("whole", 2.0**52, 2**52),
            ("rate", 0, 0.0),
            ("rate", 1, 1.0),
            ("rate", "0.25", 0.25),
            ("rate", "1e-3", 1e-3),
            ("free", "-1", -1.0),
            ("flag", True, True),
            ("flag", "true", True),
            ("flag", "No", False),
            ("flag", "1", True),
            ("text", "none", "none"),
            ("text", " b ", " b "),
            ("kind", "fancy", "fancy"),
            ("level", 2, 2),
            ("level", "2", 2),
            ("limit", None, None),
            ("limit", "none", None),
            ("limit", "None", None),
            ("limit", "5", 5),
        ],
        ids=short,
    )
    def test_accepts(self, name: str, value: object, expected: object) -> None:
        found = convert(name, value)
        assert found == expected
        assert type(found) is type(expected)

    @pytest.mark.parametrize(
        ("name", "value"),
        [
            ("count", 0),
            ("count", 101),
            ("count", "0"),
            ("count", 7.5),
            ("count", "7.5"),
            ("count", "seven"),
            ("count", ""),
            ("count", "+-7"),
            ("count", "²"),
            ("count", None),
            ("count", "none"),
            ("count", True),
            ("count", [7]),
            ("count", math.nan),
            ("count", math.inf),
            ("count", HUGE),
            ("whole", f"{BIG}.0"),
            ("whole", "1e23"),
            ("rate", -0.001),
            ("rate", 1.001),
            ("rate", "nan"),
            ("rate", math.nan),
            ("rate", False),
            ("free", math.inf),
            ("free", "-inf"),
            ("free", "1e400"),
            ("free", HUGE),
            ("free", str(HUGE)),
            ("whole", math.inf),
            ("whole", 1j),
            ("flag", 1),
            ("flag", 0),
            ("flag", "maybe"),
            ("flag", None),
            ("text", 3),
            ("text", None),
            ("kind", "plane"),
            ("kind", None),
            ("level", 3),
            ("level", True),
            ("limit", 0),
            ("limit", "nothing"),
            ("limit", math.nan),
        ],
        ids=short,
    )
    def test_refuses(self, name: str, value: object) -> None:
        with pytest.raises(FieldError, match=rf"Expected settings\.{name} to be .*, found"):
            convert(name, value)

    @pytest.mark.parametrize(
        ("name", "words"),
        [
            ("count", "an integer, 1 to 100"),
            ("rate", "a finite number, 0 to 1"),
            ("flag", "true or false"),
            ("kind", "one of plain, fancy"),
            ("limit", "an integer or none, at least 1"),
        ],
    )
    def test_says_what_it_accepts(self, name: str, words: str) -> None:
        with pytest.raises(FieldError, match=words):
            convert(name, object())

    def test_a_range_without_ends_says_so(self) -> None:
        assert str(Valid()) == "any number"
        assert str(Valid(high=3)) == "at most 3"


class TestConvertAll:
    def test_converts_by_name(self) -> None:
        assert convert_all(Settings, {"count": "3", "limit": "none"}, "settings") == {
            "count": 3,
            "limit": None,
        }

    def test_an_unknown_key_is_met_with_the_nearest(self) -> None:
        with pytest.raises(UnknownKeyError, match=r"'settings\.cuont'.*mean 'settings\.count'"):
            convert_all(Settings, {"cuont": 3}, "settings")

    def test_an_unknown_key_is_met_with_all_keys(self) -> None:
        with pytest.raises(UnknownKeyError) as caught:
            convert_all(Settings, {"zzz": 3}, "settings")
        for each in dataclasses.fields(Settings):
            assert f"settings.{each.name}" in str(caught.value)


class TestChecked:
    def test_normalises(self) -> None:
        made = Settings(count=3.0, rate=1)  # type: ignore[arg-type]
        assert type(made.count) is int
        assert type(made.rate) is float

    def test_refuses(self) -> None:
        with pytest.raises(FieldError, match=r"Settings\.count"):
            Settings(count=0)


class TestFieldsOf:
    def test_reads_marks(self) -> None:
        found = fields_of(Settings)
        assert list(found) == [each.name for each in dataclasses.fields(Settings)]
        count = found["count"]
        assert (count.type, count.default, count.help) == (int, 10, "how many")
        assert count.valid == Valid(1, 100)
        assert count.search == IntUniform(1, 20)
        assert found["flag"].valid is None
        assert found["flag"].search is None

    def test_can_not_be_written_to(self) -> None:
        with pytest.raises(TypeError):
            fields_of(Settings)["count"] = fields_of(Settings)["rate"]  # type: ignore[index]

    def test_refuses_what_is_no_dataclass(self) -> None:
        class Plain(Checked):
            """No dataclass."""

        with pytest.raises(PluginError, match="Plain to be a frozen dataclass"):
            fields_of(Plain)

    def test_refuses_a_subclass_that_is_not_decorated(self) -> None:
        class Forgotten(Settings):
            """Its field would be ignored, for the class is not decorated."""

            extra: int = 3

        with pytest.raises(PluginError, match="Forgotten to be a frozen dataclass"):
            fields_of(Forgotten)

    def test_takes_a_subclass_without_fields_of_its_own(self) -> None:
        class Renamed(Settings):
            """Another name for the same fields."""

            version: ClassVar[str] = "2"

        assert fields_of(Renamed) == fields_of(Settings)

    def test_refuses_a_dataclass_that_can_change(self) -> None:
        @dataclass
        class Loose(Checked):
            """Not frozen."""

            count: int = 1

        with pytest.raises(PluginError, match="Loose to be a frozen dataclass"):
            fields_of(Loose)

    def test_refuses_a_field_without_a_default(self) -> None:
        @dataclass(frozen=True)
        class Bare(Checked):
            """A field without a default."""

            count: int

        with pytest.raises(PluginError, match=r"default for .*Bare\.count"):
            check_definition(Bare)

    def test_refuses_a_default_that_is_made_anew(self) -> None:
        @dataclass(frozen=True)
        class Made(Checked):
            """A default that is no constant."""

            text: str = field(default_factory=str)

        with pytest.raises(PluginError, match=r"default for .*Made\.text"):
            check_definition(Made)


@dataclass(frozen=True)
class DefaultOutside(Checked):
    """Its default is outside its range."""

    count: Annotated[int, Valid(1, 5)] = 6


@dataclass(frozen=True)
class DefaultOfAnotherType(Checked):
    """Its default is of another type."""

    count: int = 1.5  # type: ignore[assignment]


@dataclass(frozen=True)
class SearchOutside(Checked):
    """Tuning would draw what it does not accept."""

    rate: Annotated[float, Valid(0, 1), Uniform(0, 2)] = 0.5


@dataclass(frozen=True)
class ChoiceOutside(Checked):
    """Tuning would draw what it does not accept."""

    count: Annotated[int, Valid(1, 5), Choice(1, 7)] = 1


@dataclass(frozen=True)
class FractionsOfAnInteger(Checked):
    """Tuning would draw fractions for an integer."""

    count: Annotated[int, Uniform(1, 5)] = 1


@dataclass(frozen=True)
class LogarithmOfZero(Checked):
    """Tuning would take the logarithm of zero."""

    rate: Annotated[float, LogUniform(0, 1)] = 0.5


@dataclass(frozen=True)
class Reversed(Checked):
    """Its search range ends before it begins."""

    rate: Annotated[float, Uniform(1, 0.5)] = 0.5


@dataclass(frozen=True)
class Four(Checked):
    """One search dimension too many."""

    a: Annotated[float, Uniform(0, 1)] = 0.5
    b: Annotated[float, Uniform(0, 1)] = 0.5
    c: Annotated[float, Uniform(0, 1)] = 0.5
    d: Annotated[float, Uniform(0, 1)] = 0.5


@dataclass(frozen=True)
class ThreeAndJoint(Checked):
    """One search dimension too many, counting the joint one."""

    joint_search: ClassVar[Mapping[str, Choice]] = {"d": Choice({"d": 0.0}, {"d": 1.0})}
    a: Annotated[float, Uniform(0, 1)] = 0.5
    b: Annotated[float, Uniform(0, 1)] = 0.5
    c: Annotated[float, Uniform(0, 1)] = 0.5
    d: float = 0.5


@dataclass(frozen=True)
class JointUnknown(Checked):
    """Its joint dimension names no field."""

    joint_search: ClassVar[Mapping[str, Choice]] = {"pair": Choice({"rate": 1.0, "rnak": 2})}
    rate: float = 0.5
    rank: int = 1


@dataclass(frozen=True)
class JointOutside(Checked):
    """Its joint dimension holds what a field does not accept."""

    joint_search: ClassVar[Mapping[str, Choice]] = {"pair": Choice({"rate": 2.0, "rank": 2})}
    rate: Annotated[float, Valid(0, 1)] = 0.5
    rank: int = 1


class TestCheckDefinition:
    @pytest.mark.parametrize(
        ("cls", "words"),
        [
            (DefaultOutside, r"DefaultOutside\.count.*1 to 5, found 6"),
            (DefaultOfAnotherType, r"an integer, found 1\.5"),
            (SearchOutside, r"search range.*0 to 1, found 2"),
            (ChoiceOutside, r"search range.*1 to 5, found 7"),
            (FractionsOfAnInteger, r"count.*IntUniform"),
            (LogarithmOfZero, r"rate.*above 0"),
            (Reversed, r"rate.*low to high"),
            (Four, "at most 3 search dimensions in Four, found 4"),
            (ThreeAndJoint, "at most 3 search dimensions in ThreeAndJoint, found 4"),
            (JointUnknown, r"JointUnknown\.rnak.*Did you mean 'JointUnknown\.rank'"),
            (JointOutside, r"JointOutside\.rate.*found 2"),
        ],
    )
    def test_refuses(self, cls: type, words: str) -> None:
        with pytest.raises(PluginError, match=words) as caught:
            check_definition(cls)
        assert cls.__name__ in str(caught.value)

    def test_takes_what_is_defined_well(self) -> None:
        @dataclass(frozen=True)
        class Three(Checked):
            """As many search dimensions as are ranked."""

            joint_search: ClassVar[Mapping[str, Choice]] = {
                "pair": Choice({"flag": True, "kind": "b"}, {"flag": False, "kind": "a"})
            }
            rate: Annotated[float, Valid(0, 1), LogUniform(0.1, 1)] = 0.5
            count: Annotated[int, Valid(1), IntUniform(1, 5)] = 1
            flag: bool = False
            kind: Literal["a", "b"] = "a"
            free: float = 0.5

        check_definition(Three)
        check_definition(Settings)
