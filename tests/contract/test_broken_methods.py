"""Every check of the contract fails for a method that breaks just what it checks."""

from __future__ import annotations

import importlib
import os
import random
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from textwrap import dedent
from typing import Annotated, Any, ClassVar
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from torch import Tensor

from gradbench.errors import PluginError
from gradbench.fields import Uniform, Valid
from gradbench.method import (
    Aggregation,
    Method,
    Phase,
    Plan,
    Scalarization,
    Setup,
    State,
    Weighting,
)
from gradbench.step import Step
from gradbench.testing import (
    MakeMethod,
    MethodContract,
    NonConflicting,
    PermutationInvariant,
    PositivelyHomogeneous,
    elsewhere,
    waits,
)
from gradbench.testing.checks import checks_of
from gradbench_methods.pcgrad_asymmetric import PCGradAsymmetric

FOREIGN: list[int] = [0]  # memory that belongs to no method


@dataclass(frozen=True)
class Sound(Weighting):
    """Sum the gradients, which breaks nothing.

    Source: this test.
    Departs from it: nothing.
    """

    def weights_from_gramian(self, gramian: Tensor, step: Step) -> Tensor:
        return torch.ones_like(gramian[0])


@dataclass(frozen=True)
class SoundAggregation(Aggregation):
    """Sum the gradients, which breaks nothing.

    Source: this test.
    Departs from it: nothing.
    """

    def combine(self, jacobian: Tensor, step: Step, out: Tensor) -> Tensor | None:
        out.copy_(jacobian.sum(0))
        return None


Projecting = PCGradAsymmetric  # breaks nothing, and has every property


class NotDecorated(Sound):
    pass


@dataclass(frozen=True)
class SearchedOutsideItsRange(Sound):
    c: Annotated[float, Valid(0, 1), Uniform(0, 2)] = 0.5


@dataclass(frozen=True)
class UnknownHeads(Sound):
    heads = "sometimes"  # type: ignore[assignment]


@dataclass(frozen=True)
class UnitScalarization(Scalarization):
    """Weigh losses to a unit direction, which no scalarization can know.

    Source: this test.
    Departs from it: nothing.
    """

    scale = "unit"

    def weights_from_losses(self, losses: Tensor, step: Step) -> Tensor:
        return torch.ones_like(losses)


@dataclass(frozen=True)
class ForgetsThePrimary(Sound):
    def phases(self, plan: Plan) -> tuple[Phase, ...]:
        return (Phase("joint", (0, 1, 2), 1), Phase("auxiliaries", (1, 2), 1))


@dataclass(frozen=True)
class SaysTwoPhasesTheSame(Sound):
    def phases(self, plan: Plan) -> tuple[Phase, ...]:
        return (Phase("joint", (0,), 1), Phase("joint", (0,), 1))


@dataclass(frozen=True)
class NamesNoSource(Sound):
    """Sum the gradients."""


@dataclass(frozen=True)
class NamesNoDeparture(Sound):
    """Sum the gradients.

    Source: this test.
    Departs from it:
    """


@dataclass(frozen=True)
class DeclaresUnknownFailure(Sound):
    known_failures: ClassVar[Mapping[str, str]] = {"test_of_patience": "it has none"}


@dataclass(frozen=True)
class NeedsAnAuxiliary(SoundAggregation):
    def combine(self, jacobian: Tensor, step: Step, out: Tensor) -> Tensor | None:
        out.copy_(jacobian[0] + jacobian[1])
        return None


@dataclass(frozen=True)
class AssumesFloat32(SoundAggregation):
    def combine(self, jacobian: Tensor, step: Step, out: Tensor) -> Tensor | None:
        out.copy_(torch.ones(len(jacobian)) @ jacobian)
        return None


@dataclass(frozen=True)
class DividesByZero(Sound):
    def weights_from_gramian(self, gramian: Tensor, step: Step) -> Tensor:
        return 1 / gramian.diagonal().sqrt()


@dataclass(frozen=True)
class Overflows(Sound):
    def weights_from_gramian(self, gramian: Tensor, step: Step) -> Tensor:
        power = gramian.diagonal() ** 8 + 1
        return power / power.sum()


@dataclass(frozen=True)
class TakesLogarithms(UnitScalarization):
    def weights_from_losses(self, losses: Tensor, step: Step) -> Tensor:
        return losses.log()


@dataclass(frozen=True)
class WeighsHeadsByNothing(SoundAggregation):
    heads = "weighted"

    def combine(self, jacobian: Tensor, step: Step, out: Tensor) -> Tensor | None:
        out.copy_(jacobian.sum(0))
        return torch.full_like(step.losses, torch.nan)


@dataclass(frozen=True)
class ChangesTheJacobian(SoundAggregation):
    def combine(self, jacobian: Tensor, step: Step, out: Tensor) -> Tensor | None:
        out.copy_(jacobian.mul_(2).sum(0))
        return None


@dataclass(frozen=True)
class ChangesTheGramian(Sound):
    def weights_from_gramian(self, gramian: Tensor, step: Step) -> Tensor:
        return torch.ones_like(gramian.fill_(1.0)[0])


@dataclass(frozen=True)
class ChangesTheLosses(Sound):
    def weights_from_gramian(self, gramian: Tensor, step: Step) -> Tensor:
        return step.losses.mul_(2)


@dataclass(frozen=True)
class RecordsAVector(Sound):
    def weights_from_gramian(self, gramian: Tensor, step: Step) -> Tensor:
        step.record(gramian=gramian[0])
        return torch.ones_like(gramian[0])


@dataclass(frozen=True)
class RecordsNoNumber(Sound):
    def weights_from_gramian(self, gramian: Tensor, step: Step) -> Tensor:
        step.record(share=gramian[0, 0] * torch.nan)
        return torch.ones_like(gramian[0])


@dataclass(frozen=True)
class DrawsFromTorch(Sound):
    def weights_from_gramian(self, gramian: Tensor, step: Step) -> Tensor:
        return torch.rand_like(gramian[0])


@dataclass(frozen=True)
class DrawsFromNumpyInVain(Sound):
    def weights_from_gramian(self, gramian: Tensor, step: Step) -> Tensor:
        np.random.rand()  # noqa: NPY002 - what the check is for
        return torch.ones_like(gramian[0])


@dataclass(frozen=True)
class DrawsFromPythonInVain(Sound):
    def weights_from_gramian(self, gramian: Tensor, step: Step) -> Tensor:
        random.random()
        return torch.ones_like(gramian[0])


@dataclass(frozen=True)
class CountsElsewhere(Sound):
    def weights_from_gramian(self, gramian: Tensor, step: Step) -> Tensor:
        FOREIGN[0] += 1
        return torch.full_like(gramian[0], FOREIGN[0])


@dataclass(frozen=True)
class CountsOnItself(Sound):
    def weights_from_gramian(self, gramian: Tensor, step: Step) -> Tensor:
        count = vars(self).get("count", 0) + 1
        object.__setattr__(self, "count", count)
        return torch.full_like(gramian[0], count)


@dataclass(frozen=True)
class RemembersInVain(Sound):
    def weights_from_gramian(self, gramian: Tensor, step: Step) -> Tensor:
        object.__setattr__(self, "gramian", gramian)
        return torch.ones_like(gramian[0])


@dataclass(frozen=True)
class RebuildsTooLate(Sound):
    rebuildable = frozenset({"weights"})

    def weights_from_gramian(self, gramian: Tensor, step: Step) -> Tensor:
        if "weights" not in step.state or step.index % 3 == 0:  # of the run, not of the epoch
            step.state["weights"] = gramian[0].clone()
        weights: Tensor = step.state["weights"]
        return weights


@dataclass(frozen=True)
class KeepsAnArray(Sound):
    def initial_state(self, setup: Setup) -> State:
        return {"counts": np.zeros(setup.objectives)}


@dataclass(frozen=True)
class KeepsAList(Sound):
    def initial_state(self, setup: Setup) -> State:
        return {"weights": [torch.ones(()) for _ in range(setup.objectives)]}


@dataclass(frozen=True)
class FavoursTheSecond(Sound):
    def weights_from_gramian(self, gramian: Tensor, step: Step) -> Tensor:
        return gramian.new_ones(len(gramian)).index_fill_(0, torch.tensor([1]), 2.0)


@dataclass(frozen=True)
class GrowsWithTheSquare(Sound):
    def weights_from_gramian(self, gramian: Tensor, step: Step) -> Tensor:
        return gramian.diagonal().sqrt()


contract = MethodContract()
in_float32, in_float64 = {"dtype": torch.float32}, {"dtype": torch.float64}

# the check, a method that breaks it, what it raises, the case of the check
BROKEN: list[tuple[Callable[..., None], type[Method], type[Exception], dict[str, Any]]] = [
    (contract.test_definition_is_accepted, NotDecorated, AssertionError, {}),
    (contract.test_definition_is_accepted, SearchedOutsideItsRange, PluginError, {}),
    (contract.test_declared_attributes_are_legal, UnknownHeads, AssertionError, {}),
    (contract.test_declared_attributes_are_legal, UnitScalarization, AssertionError, {}),
    (
        contract.test_known_failures_name_checks_and_reasons,
        DeclaresUnknownFailure,
        AssertionError,
        {},
    ),
    (contract.test_phases_are_legal, ForgetsThePrimary, AssertionError, {}),
    (contract.test_phases_are_legal, SaysTwoPhasesTheSame, AssertionError, {}),
    (contract.test_docstring_names_source_and_departures, NamesNoSource, AssertionError, {}),
    (contract.test_docstring_names_source_and_departures, NamesNoDeparture, AssertionError, {}),
    (
        contract.test_direction_has_shape_and_dtype,
        NeedsAnAuxiliary,
        IndexError,
        {"objectives": 1, "parameters": 40, **in_float64},
    ),
    (
        contract.test_direction_has_shape_and_dtype,
        AssumesFloat32,
        RuntimeError,
        {"objectives": 2, "parameters": 40, **in_float64},
    ),
    (
        contract.test_awkward_gradients_give_a_finite_direction,
        DividesByZero,
        AssertionError,
        {"case": "zero auxiliary", **in_float64},
    ),
    (
        contract.test_any_scale_gives_a_finite_direction,
        Overflows,
        AssertionError,
        {"scale": 1e8, **in_float32},
    ),
    (
        contract.test_awkward_losses_give_a_finite_direction,
        TakesLogarithms,
        AssertionError,
        {"case": "zero primary", **in_float64},
    ),
    (contract.test_heads_get_what_is_declared, WeighsHeadsByNothing, AssertionError, {}),
    (contract.test_what_it_is_given_stays_as_it_is, ChangesTheJacobian, AssertionError, {}),
    (contract.test_what_it_is_given_stays_as_it_is, ChangesTheGramian, AssertionError, {}),
    (contract.test_what_it_is_given_stays_as_it_is, ChangesTheLosses, AssertionError, {}),
    (contract.test_diagnostics_are_finite_scalars, RecordsAVector, AssertionError, {}),
    (contract.test_diagnostics_are_finite_scalars, RecordsNoNumber, AssertionError, {}),
    (contract.test_global_generators_are_ignored, DrawsFromTorch, AssertionError, {}),
    (contract.test_global_generators_are_ignored, DrawsFromNumpyInVain, AssertionError, {}),
    (contract.test_global_generators_are_ignored, DrawsFromPythonInVain, AssertionError, {}),
    (contract.test_same_seed_gives_the_same_bits, CountsElsewhere, AssertionError, {}),
    (contract.test_nothing_is_kept_on_the_method, CountsOnItself, AssertionError, {}),
    (contract.test_nothing_is_kept_on_the_method, RemembersInVain, AssertionError, {}),
    (contract.test_continues_exactly_from_a_checkpoint, CountsOnItself, AssertionError, {}),
    (contract.test_continues_exactly_from_a_checkpoint, RebuildsTooLate, AssertionError, {}),
    (contract.test_continues_exactly_from_a_checkpoint, KeepsAnArray, UnpicklingError, {}),
    (contract.test_memory_can_be_saved, KeepsAList, AssertionError, {}),
    (contract.test_never_waits_for_the_device, RecordsAVector, AssertionError, {}),
    (NonConflicting().test_non_conflicting, Sound, AssertionError, {"objectives": 2}),
    (
        PermutationInvariant().test_permutation_invariant,
        FavoursTheSecond,
        AssertionError,
        {"objectives": 3},
    ),
    (
        PositivelyHomogeneous().test_positively_homogeneous,
        GrowsWithTheSquare,
        AssertionError,
        {"factor": 3.0},
    ),
]


@pytest.mark.parametrize(
    ("check", "broken", "error", "case"),
    BROKEN,
    ids=[f"{check.__name__}-{broken.__name__}" for check, broken, *_ in BROKEN],
)
def test_a_broken_method_fails(
    check: Callable[..., None],
    broken: type[Method],
    error: type[Exception],
    case: dict[str, Any],
) -> None:
    check(Projecting, **case)  # breaks nothing
    with pytest.raises(error):
        check(broken, **case)


def test_every_check_is_broken_once() -> None:
    broken = {check.__name__ for check, *_ in BROKEN} | {
        "test_another_process_gives_the_same_bits"  # below
    }
    assert broken == checks_of(
        MethodContract, NonConflicting, PermutationInvariant, PositivelyHomogeneous
    )


@pytest.fixture
def importable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Return a folder from which both processes import."""
    monkeypatch.syspath_prepend(tmp_path)
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        del sys.modules[name]


HASHING = """
    from dataclasses import dataclass
    import torch
    from gradbench.method import Weighting

    @dataclass(frozen=True)
    class HashesWords(Weighting):
        def weights_from_gramian(self, gramian, step):
            return torch.full_like(gramian[0], hash("weight") % 1009)
    """


def test_a_method_that_depends_on_hashes_of_text_fails(importable: Path) -> None:
    (importable / "hashing_method.py").write_text(dedent(HASHING), encoding="utf-8")
    broken: MakeMethod = importlib.import_module("hashing_method").HashesWords
    contract.test_same_seed_gives_the_same_bits(broken)
    with pytest.raises(AssertionError):
        contract.test_another_process_gives_the_same_bits(broken)


def test_what_cannot_be_imported_in_the_other_process_is_named(
    importable: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (importable / "lost_method.py").write_text(dedent(HASHING), encoding="utf-8")
    broken: MakeMethod = importlib.import_module("lost_method").HashesWords
    monkeypatch.setattr(sys, "path", [part for part in sys.path if part != str(importable)])
    with pytest.raises(RuntimeError, match="No module named 'lost_method'"):
        contract.test_another_process_gives_the_same_bits(broken)
    assert elsewhere.call(abs, -1) == 1  # it goes on


DECLARING = """
    from dataclasses import dataclass
    from typing import ClassVar, Mapping
    import pytest
    from gradbench.method import Weighting
    from gradbench.testing import NonConflicting

    @dataclass(frozen=True)
    class Declares(Weighting):
        known_failures: ClassVar[Mapping[str, str]] = {{"{declared}": "it only sums"}}

        def weights_from_gramian(self, gramian, step):
            return gramian[0] * 0 + {weight}

    class TestDeclares(NonConflicting):
        @pytest.fixture
        def make_method(self):
            return Declares
    """


@pytest.mark.parametrize(
    ("declared", "weight", "outcome"),
    [
        ("test_non_conflicting", 1, "skipped skipped skipped"),  # what junit calls xfailed
        ("test_non_conflicting[2]", 1, "skipped failed failed"),
        ("test_non_conflicting", 0, "failed failed failed"),  # passes against expectation
        ("test_another", 0, "passed passed passed"),
    ],
)
def test_a_known_failure_is_expected_strictly(
    tmp_path: Path, declared: str, weight: int, outcome: str
) -> None:
    file, report = tmp_path / f"{tmp_path.name}.py", tmp_path / "report.xml"
    file.write_text(dedent(DECLARING).format(declared=declared, weight=weight), encoding="utf-8")
    options = ["-p", "no:cacheprovider", "--import-mode=importlib", "-c", os.devnull]
    elsewhere.call(pytest.main, [str(file), f"--junitxml={report}", *options])
    cases = ElementTree.parse(report).getroot().iter("testcase")
    names = {"failure": "failed", "skipped": "skipped"}
    found = [next((names[child.tag] for child in case), "passed") for case in cases]
    assert found == outcome.split()


def put(tensor: Tensor, index: Any, value: Any) -> None:
    tensor[index] = value


WAITING: dict[str, tuple[Callable[[Tensor], Any], str]] = {
    "item": (lambda x: x.sum().item(), "_local_scalar_dense"),
    "float": (lambda x: float(x[0, 0]), "_local_scalar_dense"),
    "tolist": (lambda x: x.tolist(), "_local_scalar_dense"),
    "if": (lambda x: 1 if x.sum() > 0 else 0, "_local_scalar_dense"),
    "max of Python": (lambda x: max(x[0]), "_local_scalar_dense"),
    "numpy": (lambda x: x.numpy(), "numpy"),
    "asarray": (lambda x: np.asarray(x), "numpy"),
    "cpu": (lambda x: x.cpu(), "_to_copy copies between cpu and cuda"),
    "to cpu": (lambda x: x.to("cpu", torch.float64), "_to_copy copies between cpu and cuda"),
    "copy_": (lambda x: torch.empty(x.shape, device="cpu").copy_(x), "copy_ copies between"),
    "list": (lambda x: torch.tensor([1.0, 2.0], device=x.device), "_to_copy copies between"),
    "number": (lambda x: torch.tensor(1.0, device=x.device), "_to_copy copies between"),
    "new_tensor": (lambda x: x.new_tensor([1.0, 2.0]), "_to_copy copies between"),
    "from_numpy": (lambda x: torch.from_numpy(np.ones(2)).to(x.device), "_to_copy copies between"),
    "one entry": (lambda x: x.diagonal()[0].copy_(torch.tensor(1.0)), "copy_ copies between"),
    "set one entry": (lambda x: put(x[0], 0, 1.0), "copy_ copies between"),
    "indices in a list": (lambda x: x[[0, 1]], "_to_copy copies between"),
    "indices on the cpu": (lambda x: x[torch.tensor([0, 1])], "index copies a tensor"),
    "mask": (lambda x: x[x > 0], "nonzero|index counts"),
    "set by mask": (
        lambda x: put(x, x > 0, x.sum()),
        "index_put_ counts what a mask selects",
    ),
    "nonzero": (lambda x: x.nonzero(), "nonzero looks at numbers"),
    "unique": (lambda x: torch.unique(x), "_unique2 looks at numbers"),
    "masked_select": (lambda x: x.masked_select(x > 0), "masked_select looks at numbers"),
    "bincount": (lambda x: x[0].long().bincount(), "bincount looks at numbers"),
    "equal": (lambda x: torch.equal(x, x), "equal looks at numbers"),
    "allclose": (lambda x: torch.allclose(x, x), "allclose looks at numbers"),
    "multinomial": (lambda x: x.abs().multinomial(1), "multinomial looks at numbers"),
    "normal": (lambda x: torch.normal(0.0, x.abs()), "normal looks at numbers"),
    "eigh": (lambda x: torch.linalg.eigh(x), "_linalg_eigh looks at numbers"),
    "eigvalsh": (lambda x: torch.linalg.eigvalsh(x), "_linalg_eigh looks at numbers"),
    "eig": (lambda x: torch.linalg.eig(x), "linalg_eig looks at numbers"),
    "eigvals": (lambda x: torch.linalg.eigvals(x), "eigvals looks at numbers"),
    "svd": (lambda x: torch.linalg.svd(x), "_linalg_svd looks at numbers"),
    "spectral norm": (lambda x: torch.linalg.matrix_norm(x, 2), "_linalg_svd looks at numbers"),
    "pinv": (lambda x: torch.linalg.pinv(x), "linalg_pinv looks at numbers"),
    "rank": (lambda x: torch.linalg.matrix_rank(x), "looks at numbers"),
    "lstsq": (lambda x: torch.linalg.lstsq(x, x), "linalg_lstsq looks at numbers"),
    "solve": (lambda x: torch.linalg.solve(x, x), "_linalg_check_errors looks at numbers"),
    "inv": (lambda x: torch.linalg.inv(x), "_linalg_check_errors looks at numbers"),
    "cholesky": (lambda x: torch.linalg.cholesky(x), "_linalg_check_errors looks at numbers"),
    "lu": (lambda x: torch.linalg.lu_factor(x), "_linalg_check_errors looks at numbers"),
    "matrix_exp": (lambda x: torch.linalg.matrix_exp(x), "linalg_matrix_exp looks at numbers"),
}

ASYNCHRONOUS: dict[str, Callable[[Tensor], Any]] = {
    "where": lambda x: torch.where(x > 0, x, 0.0),
    "full_like": lambda x: torch.full_like(x, 2.0),
    "set a slice": lambda x: put(x[0], slice(1), 1.0),
    "set a row": lambda x: put(x, 0, 1.0),
    "set to a tensor": lambda x: put(x[0], 0, x.sum()),
    "set by mask to a number": lambda x: put(x, x > 0, 1.0),
    "masked_fill": lambda x: x.masked_fill(x > 0, 1.0),
    "indices on the device": lambda x: x[torch.arange(2, device=x.device)],
    "a number times a tensor": lambda x: 2.0 * x * torch.tensor(2.0),
    "numbers of numpy": lambda x: x * float(np.arange(3.0).sum()),
    "randn": lambda x: torch.randn(3, generator=torch.Generator().manual_seed(1), device=x.device),
    "qr": lambda x: torch.linalg.qr(x),
    "cholesky_ex": lambda x: torch.linalg.cholesky_ex(x),
    "det": lambda x: torch.linalg.det(x),
    "optimizer": lambda x: optimize(x),
}


def optimize(like: Tensor) -> None:
    parameter = torch.nn.Parameter(torch.zeros_like(like))
    optimizer = torch.optim.Adam([parameter])
    for _ in range(2):
        parameter.grad = torch.ones_like(parameter)
        optimizer.step()


@dataclass(frozen=True)
class Does(Sound):
    """Does something with the Gramian; a class of its own a case would need as many lines."""

    what: str = ""

    def weights_from_gramian(self, gramian: Tensor, step: Step) -> Tensor:
        (WAITING[self.what][0] if self.what in WAITING else ASYNCHRONOUS[self.what])(gramian)
        return torch.ones_like(gramian[0])


@dataclass(frozen=True)
class DoesOnTheHost(Does):
    """Does it on the host, where the Gramian is real and on the CPU."""

    host = True


@dataclass(frozen=True)
class DoesToTheLosses(Does):
    host = True

    def weights_from_gramian(self, gramian: Tensor, step: Step) -> Tensor:
        WAITING[self.what][0](step.losses[None])
        return torch.ones_like(gramian[0])


@dataclass(frozen=True)
class DoesWithASketch(SoundAggregation):
    what: str = ""

    def combine(self, jacobian: Tensor, step: Step, out: Tensor) -> Tensor | None:
        def draw(m: int) -> Tensor:
            return torch.randn(2, m, generator=step.generator, device=jacobian.device)

        rows = step.sketch(draw, samples=8)
        WAITING[self.what][0](rows @ rows.T)
        return super().combine(jacobian, step, out)


@dataclass(frozen=True)
class DoesInALaterEpoch(Does):
    def weights_from_gramian(self, gramian: Tensor, step: Step) -> Tensor:
        if step.epoch > 1:
            super().weights_from_gramian(gramian, step)
        return torch.ones_like(gramian[0])


@dataclass(frozen=True)
class DoesAfterTheStep(Does):
    def weights_from_gramian(self, gramian: Tensor, step: Step) -> Tensor:
        return torch.ones_like(gramian[0])

    def after_step(self, step: Step) -> None:
        WAITING[self.what][0](step.reevaluate()[None])


@dataclass(frozen=True)
class ReturnsWeightsOnTheHost(Sound):
    def weights_from_gramian(self, gramian: Tensor, step: Step) -> Tensor:
        return torch.ones(len(gramian))


class TestWaits:
    def test_weights_that_must_be_copied_are_found(self) -> None:
        assert waits(ReturnsWeightsOnTheHost()) == ["returned weights are on cpu"]

    @pytest.mark.parametrize("what", WAITING)
    def test_what_waits_is_found(self, what: str) -> None:
        found = waits(Does(what=what))
        assert found
        assert re.search(WAITING[what][1], found[0]), found
        assert "test_broken_methods.py" in found[0]

    @pytest.mark.parametrize("what", ASYNCHRONOUS)
    def test_what_does_not_wait_passes(self, what: str) -> None:
        assert waits(Does(what=what)) == []

    @pytest.mark.parametrize("what", ["item", "eigh", "solve", "numpy", "mask"])
    def test_a_method_on_the_host_may(self, what: str) -> None:
        assert waits(DoesOnTheHost(what=what)) == []

    @pytest.mark.parametrize("what", ["item", "cpu", "number"])
    @pytest.mark.parametrize(
        "method", [DoesToTheLosses, DoesWithASketch, DoesInALaterEpoch, DoesAfterTheStep]
    )
    def test_whatever_the_step_gives_is_watched(self, method: Any, what: str) -> None:
        assert waits(method(what=what))
