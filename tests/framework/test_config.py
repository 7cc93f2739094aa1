from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pytest

from gradbench import registry
from gradbench.config import Request, RunConfig, known_keys, resolve, run_id, with_shortcuts
from gradbench.errors import FieldError, GradBenchError, PluginNotFoundError, UnknownKeyError
from gradbench.fields import fields_of
from gradbench.settings import Architecture, Budget, Optimizer
from gradbench_methods.attittud import ATTITTUD
from gradbench_tasks.digits import Digits

BASE = Request(method="attittud", task="digits")


def config(settings: Mapping[str, object] | None = None, **changes: Any) -> RunConfig:
    return resolve(dataclasses.replace(BASE, settings=settings or {}, **changes))


def identity(found: RunConfig, weights: str | None = None) -> dict[str, Any]:
    return found.identity("real", "data digest", weights)


def name_of(settings: Mapping[str, object] | None = None, **changes: Any) -> str:
    return run_id(identity(config(settings, **changes)))


class TestResolve:
    def test_defaults_are_those_of_the_preset_and_the_plug_ins(self) -> None:
        found = config()
        preset = Digits.presets["default"]
        assert (found.method, found.task) == (ATTITTUD(), Digits())
        assert (found.preset, found.preset_name) == (preset, "default")
        assert (found.budget, found.optimizer) == (preset.budget, preset.optimizer)
        assert found.architecture == Architecture(backbone="timm:test_vit")
        assert (found.scale, found.precision, found.seed) == ("paper", "fp32", 0)

    def test_every_group_takes_settings(self) -> None:
        found = config(
            {
                "method.rank": "3",
                "method.scale": "sum",
                "task.auxiliary_weight": 0.5,
                "optimizer.lr": "1e-2",
                "budget.epochs": 4,
                "model.dropout": "0",
            }
        )
        assert found.method == ATTITTUD(rank=3)
        assert found.scale == "sum"
        assert found.task == Digits(auxiliary_weight=0.5)
        assert found.optimizer == Optimizer(lr=0.01)
        assert found.budget == dataclasses.replace(Digits.presets["default"].budget, epochs=4)
        assert found.architecture == Architecture(backbone="timm:test_vit", dropout=0.0)

    def test_every_known_key_can_be_set_to_its_default(self) -> None:
        keys = known_keys(ATTITTUD, Digits)
        owners = {
            "method": ATTITTUD,
            "task": Digits,
            "optimizer": Optimizer,
            "budget": Budget,
            "model": Architecture,
        }
        defaults: dict[str, object] = {"method.scale": "paper"}
        for key in keys:
            group, _, name = key.partition(".")
            if key != "method.scale":
                defaults[key] = str(fields_of(owners[group])[name].default)
        assert len(keys) == len(set(keys)) == 1 + sum(len(fields_of(c)) for c in owners.values())
        found = config({**defaults, "model.backbone": "timm:test_vit"})
        assert (found.method, found.task, found.optimizer) == (ATTITTUD(), Digits(), Optimizer())

    @pytest.mark.parametrize(
        ("key", "nearest"),
        [
            ("method.rnk", "method.rank"),
            ("optimizer.learning_rate", None),
            ("optimiser.lr", "optimizer.lr"),
            ("rank", None),
            ("", None),
            ("method.", None),
            ("task.auxiliary_wieght", "task.auxiliary_weight"),
        ],
    )
    def test_an_unknown_key_shows_the_nearest_and_all(self, key: str, nearest: str | None) -> None:
        with pytest.raises(UnknownKeyError) as caught:
            config({key: 1})
        message = str(caught.value)
        assert f"found {key!r}." in message
        assert "budget.steps_per_epoch" in message
        if nearest is not None:
            assert f"Did you mean {nearest!r}?" in message

    @pytest.mark.parametrize(
        ("key", "value"),
        [
            ("method.rank", 0),
            ("method.rank", "ten"),
            ("method.rank", "1.5"),
            ("method.eta_bad", "nan"),
            ("method.eta_bad", float("inf")),
            ("method.basis", "qr"),
            ("method.anchor_probe", "maybe"),
            ("method.scale", "mean"),
            ("task.auxiliary_weight", -1),
            ("optimizer.lr", "nan"),
            ("optimizer.lr", 0),
            ("optimizer.lr", True),
            ("optimizer.name", "adam"),
            ("budget.epochs", 0),
            ("budget.batch_size", 2.5),
            ("model.dropout", 1.0),
            ("model.batch_norm", "auxiliary"),
            ("model.backbone", 7),
        ],
    )
    def test_a_bad_value_is_refused_with_its_key(self, key: str, value: object) -> None:
        with pytest.raises(FieldError) as caught:
            config({key: value})
        assert f"Expected {key} to be " in str(caught.value)
        assert f"found {value!r}." in str(caught.value)

    @pytest.mark.parametrize(
        "changes",
        [
            {"seed": -1},
            {"seed": 2**63},
            {"seed": 1.5},
            {"precision": "fp16"},
            {"preset": "paper"},
            {"preset": ""},
        ],
    )
    def test_a_bad_request_is_refused(self, changes: dict[str, Any]) -> None:
        with pytest.raises(FieldError) as caught:
            config(**changes)
        assert f"found {next(iter(changes.values()))!r}." in str(caught.value)

    def test_an_unknown_preset_shows_those_there_are(self) -> None:
        with pytest.raises(FieldError, match=r"preset of 'digits' \(default"):
            config(preset="paper")

    @pytest.mark.parametrize(
        ("changes", "nearest"),
        [({"method": "atittud"}, "attittud"), ({"task": "digit"}, "digits")],
    )
    def test_an_unknown_plug_in_shows_the_nearest(
        self, changes: dict[str, Any], nearest: str
    ) -> None:
        with pytest.raises(PluginNotFoundError, match=f"Did you mean '{nearest}'"):
            config(**changes)

    def test_a_method_that_absorbs_the_auxiliary_weight_wants_it_to_be_one(self) -> None:
        with pytest.raises(FieldError, match="auxiliary_weight to be 1 with method 'primary-only'"):
            config({"task.auxiliary_weight": 0.5}, method="primary-only")
        assert config({"task.auxiliary_weight": 1}, method="primary-only").task == Digits()

    def test_every_refusal_is_the_users_to_mend(self) -> None:
        with pytest.raises(GradBenchError) as caught:
            config({"method.rank": 0})
        assert caught.value.exit_code == 2


class TestShortcuts:
    def test_an_option_that_is_given_is_a_setting(self) -> None:
        shortcuts = {"budget.epochs": 3, "model.backbone": None}
        assert with_shortcuts({"method.rank": 1}, shortcuts) == {
            "method.rank": 1,
            "budget.epochs": 3,
        }

    def test_a_key_given_both_ways_is_refused(self) -> None:
        with pytest.raises(FieldError, match=r"Expected budget\.epochs once"):
            with_shortcuts({"budget.epochs": 3}, {"budget.epochs": 3})

    def test_an_option_that_is_left_out_takes_the_setting(self) -> None:
        assert with_shortcuts({"budget.epochs": 3}, {"budget.epochs": None}) == {"budget.epochs": 3}


@dataclass(frozen=True)
class Version(ATTITTUD):
    """A later revision of the method."""

    revision = 2


class TestIdentity:
    def test_is_json(self) -> None:
        found = identity(config({"optimizer.warmup_epochs": 1}))
        assert json.loads(json.dumps(found, allow_nan=False)) == found

    def test_the_name_is_a_function_of_the_identity_alone(self) -> None:
        canonical = b'{"a":{"b":[1,2.5],"c":null},"d":"x"}'
        expected = hashlib.sha256(canonical).hexdigest()[:16]
        assert run_id({"d": "x", "a": {"c": None, "b": [1, 2.5]}}) == expected

    @pytest.mark.parametrize(
        "settings",
        [
            {"budget.epochs": 20},
            {"budget.epochs": "20"},
            {"optimizer.lr": "1e-3"},
            {"optimizer.lr": 0.001},
            {"optimizer.clip": 1},
            {"method.scale": "paper"},
            {"method.anchor_probe": "no"},
            {"model.backbone": "timm:test_vit"},
            {"model.backbone": "test_vit"},
        ],
    )
    def test_a_default_that_is_spelled_out_changes_nothing(
        self, settings: dict[str, object]
    ) -> None:
        assert name_of(settings) == name_of()

    def test_the_order_of_settings_changes_nothing(self) -> None:
        settings: dict[str, object] = {"method.rank": 3, "budget.epochs": 2, "model.dropout": 0}
        assert name_of(settings) == name_of(dict(reversed(settings.items())))

    @pytest.mark.parametrize(
        "changes",
        [{"device": "cuda"}, {"memory_format": "channels-last"}, {"data": "real"}],
    )
    def test_where_and_how_it_runs_changes_nothing(self, changes: dict[str, Any]) -> None:
        assert name_of(**changes) == name_of()

    def test_everything_that_a_result_depends_on_changes_the_name(self) -> None:
        found = config()
        names = [
            name_of(),
            name_of(seed=1),
            name_of(precision="fp64"),
            name_of(method="pcgrad"),
            name_of({"method.rank": 11}),
            name_of({"method.scale": "sum"}),
            name_of({"task.auxiliary_weight": 0.5}),
            name_of({"optimizer.lr": 0.002}),
            name_of({"budget.epochs": 21}),
            name_of({"budget.fine_tune_epochs": 0}),
            name_of({"budget.steps_per_epoch": 21}),
            name_of({"model.backbone": "timm:test_resnet"}),
            name_of({"model.dropout": 0}),
            name_of({"model.batch_norm": "frozen"}),
            run_id(found.identity("sample", "data digest", None)),
            run_id(found.identity("real", "another digest", None)),
            run_id(found.identity("real", "data digest", "a weights digest")),
            run_id(identity(dataclasses.replace(found, method=Version()))),
            run_id(identity(dataclasses.replace(found, preset_name="paper"))),
        ]
        assert len(set(names)) == len(names)

    def test_the_size_of_a_split_changes_the_name(self) -> None:
        found = config()
        preset = dataclasses.replace(found.preset, sizes={"train": 10, "validation": 10})
        assert run_id(identity(dataclasses.replace(found, preset=preset))) != name_of()

    def test_weights_count_by_their_digest_and_not_by_their_path(self) -> None:
        names = {
            run_id(identity(config({"model.weights": path}), "one digest"))
            for path in ("a.safetensors", "b.safetensors", "hub")
        }
        assert len(names) == 1

    def test_first_party_plug_ins_have_a_name_each(self) -> None:
        methods = [row.name for row in registry.listing(registry.METHODS)]
        names = {name_of(method=name) for name in methods}
        assert len(names) == len(methods)
