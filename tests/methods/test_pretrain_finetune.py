from __future__ import annotations

import pytest
from torch.testing import assert_close

import gradbench
from gradbench.errors import FieldError
from gradbench.method import Phase, Plan
from gradbench.testing import (
    MakeMethod,
    PermutationInvariant,
    PositivelyHomogeneous,
    direction,
    random_jacobian,
)
from gradbench_methods.pretrain_finetune import PretrainFinetune
from gradbench_methods.primary_only import PrimaryOnly

SHORT = {"budget.fine_tune_epochs": 2, "budget.steps_per_epoch": 2, "budget.batch_size": 8}


class TestProperties(PermutationInvariant, PositivelyHomogeneous):
    @pytest.fixture
    def make_method(self) -> MakeMethod:
        return PretrainFinetune


def test_trains_the_auxiliaries_and_then_the_primary() -> None:
    plan = Plan(objectives=3, steps_per_epoch=10, epochs=4, fine_tune_epochs=2)
    assert PretrainFinetune().phases(plan) == (
        Phase("pretrain", (1, 2), 4, select="last"),
        Phase("fine-tune", (0,), 2, select="best"),
    )


def test_has_the_budget_of_the_reference() -> None:
    plan = Plan(objectives=3, steps_per_epoch=10, epochs=4, fine_tune_epochs=2)
    found, expected = PretrainFinetune().phases(plan), PrimaryOnly().phases(plan)
    assert [phase.epochs for phase in found] == [phase.epochs for phase in expected]
    assert found[1] == expected[1]


def test_without_phases_it_is_the_plain_sum() -> None:
    jacobian = random_jacobian(3, 7)
    assert_close(direction(PretrainFinetune(), jacobian), jacobian.sum(0))


def test_a_run_trains_the_primary_in_the_second_phase_alone(
    tmp_path: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GRADBENCH_HOME", str(tmp_path))
    found = gradbench.run("pretrain-finetune", "digits", epochs=1, settings=SHORT)
    assert found.status == "ok"
    assert found.selection is not None
    assert found.selection.phase == "fine-tune"
    assert found.cost.backward_passes == 2 * (1 + 2)  # steps of one objective in three epochs


def test_needs_a_second_phase(tmp_path: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRADBENCH_HOME", str(tmp_path))
    settings = {**SHORT, "budget.fine_tune_epochs": 0}
    with pytest.raises(FieldError, match=r"fine_tune_epochs of at least 1 .* found 0"):
        gradbench.run("pretrain-finetune", "digits", epochs=1, settings=settings)
