"""What every method must satisfy, as tests that its author subclasses."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import io
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from gradbench.fields import check_definition
from gradbench.method import KINDS, Method, Plan, Scalarization
from gradbench.testing import elsewhere, generators
from gradbench.testing.checks import checks_of, known_failures
from gradbench.testing.device import assert_never_waits
from gradbench.testing.inputs import (
    SCALES,
    Batch,
    awkward_jacobians,
    batch_of,
    random_batch,
    random_jacobian,
)
from gradbench.testing.loops import LinearLoop, train, trajectory
from gradbench.testing.properties import (
    MakeMethod,
    MethodChecks,
    NonConflicting,
    PermutationInvariant,
    PositivelyHomogeneous,
)

PARAMETERS = 40  # more than there are examples in a sketch, so that no basis spans everything
STEPS_PER_EPOCH = 4
LATER = 6  # steps after a checkpoint: the rest of one epoch and the first steps of the next
LINE = 100  # characters of a summary, which listings print on one line

DTYPES = pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float64], ids=["float32", "float64"]
)
AWKWARD = list(awkward_jacobians(PARAMETERS, torch.float64))
SHAPES = [(1, PARAMETERS), (2, PARAMETERS), (5, PARAMETERS), (5, 3), (2, 1)]  # (K, P)
LOSSES = {  # what a network that fits everything has, and one that has just been initialised badly
    "zero primary": [0.0, 1.0, 2.0],
    "zero": [0.0, 0.0, 0.0],
    "tiny": [1e-10, 2e-10, 3e-10],
    "huge": [1e4, 2e4, 3e4],
}


class MethodContract(MethodChecks):
    """Subclass it and define a ``make_method`` fixture that returns a zero-argument factory::

        class TestMine(MethodContract):
            @pytest.fixture
            def make_method(self) -> MakeMethod:
                return Mine

    Every check runs the method through :class:`gradbench.Surgery`, as a training loop would.
    A method that acts in branches of the weights is checked for its definition alone.
    """

    def test_definition_is_accepted(self, make_method: MakeMethod) -> None:
        cls = type(make_method())
        assert dataclasses.is_dataclass(cls)
        assert "__dataclass_params__" in vars(cls), "the class itself is not decorated"
        assert vars(cls)["__dataclass_params__"].frozen
        assert sum(issubclass(cls, kind) for kind in KINDS) == 1
        check_definition(cls)

    def test_declared_attributes_are_legal(self, make_method: MakeMethod) -> None:
        method = make_method()
        assert method.heads in ("own", "weighted")
        assert method.scale in ("sum", "mean", "unit")
        if isinstance(method, Scalarization):
            assert method.heads == "weighted"
            assert method.scale != "unit"
        assert isinstance(method.batches, int)
        assert method.batches >= 1
        assert isinstance(method.needs_meta, bool)
        assert isinstance(method.absorbs_auxiliary_weight, bool)
        assert isinstance(method.rebuildable, frozenset)
        assert all(isinstance(key, str) for key in method.rebuildable)
        assert isinstance(method.revision, int)
        assert method.revision >= 1
        assert isinstance(getattr(method, "host", False), bool)

    def test_known_failures_name_checks_and_reasons(self, make_method: MakeMethod) -> None:
        declared = known_failures(type(make_method()))
        properties = (NonConflicting, PermutationInvariant, PositivelyHomogeneous)
        known = checks_of(type(self), *properties)
        assert {name.partition("[")[0] for name in declared} <= known
        assert all(reason.strip() for reason in declared.values())

    def test_phases_are_legal(self, make_method: MakeMethod) -> None:
        plan = Plan(objectives=3, steps_per_epoch=10, epochs=4, fine_tune_epochs=2)
        phases = make_method().phases(plan)
        assert len({phase.name for phase in phases}) == len(phases) > 0
        for phase in phases:
            assert phase.epochs >= 0
            assert phase.select in ("best", "last")
            assert len(set(phase.objectives)) == len(phase.objectives) > 0
            assert set(phase.objectives) <= set(range(plan.objectives))
        assert 0 in phases[-1].objectives, "the last phase does not train the primary"

    def test_docstring_names_source_and_departures(self, make_method: MakeMethod) -> None:
        text = inspect.cleandoc(type(make_method()).__doc__ or "")
        summary = text.partition("\n")[0]
        assert summary.endswith(".")
        assert len(summary) <= LINE
        for heading in ("Source:", "Departs from it:"):
            assert any(
                line.startswith(heading) and line.removeprefix(heading).strip()
                for line in text.splitlines()
            ), f"no line of the docstring begins with {heading!r} and goes on"

    @DTYPES
    @pytest.mark.parametrize(("objectives", "parameters"), SHAPES)
    def test_direction_has_shape_and_dtype(
        self, make_step_method: MakeMethod, objectives: int, parameters: int, dtype: torch.dtype
    ) -> None:
        method = make_step_method()
        batch = random_batch(0, objectives, parameters, batches=method.batches, dtype=dtype)
        for found in _repeat(method, batch):
            assert found.shape == (parameters,)
            assert found.dtype == dtype
            assert found.isfinite().all()

    @DTYPES
    @pytest.mark.parametrize("case", AWKWARD)
    def test_awkward_gradients_give_a_finite_direction(
        self, make_step_method: MakeMethod, case: str, dtype: torch.dtype
    ) -> None:
        jacobian = awkward_jacobians(PARAMETERS, dtype)[case]
        for found in _repeat(make_step_method(), batch_of(jacobian)):
            assert found.isfinite().all()

    @pytest.mark.parametrize(
        ("scale", "dtype"),
        [(scale, dtype) for dtype, scales in SCALES.items() for scale in scales],
    )
    def test_any_scale_gives_a_finite_direction(
        self, make_step_method: MakeMethod, scale: float, dtype: torch.dtype
    ) -> None:
        jacobian = random_jacobian(3, PARAMETERS, dtype=dtype) * scale
        for found in _repeat(make_step_method(), batch_of(jacobian)):
            assert found.isfinite().all()

    @DTYPES
    @pytest.mark.parametrize("case", LOSSES)
    def test_awkward_losses_give_a_finite_direction(
        self, make_step_method: MakeMethod, case: str, dtype: torch.dtype
    ) -> None:
        jacobian = random_jacobian(3, PARAMETERS, dtype=dtype)
        losses = torch.tensor(LOSSES[case], dtype=dtype)
        for found in _repeat(make_step_method(), batch_of(jacobian, losses)):
            assert found.isfinite().all()

    def test_heads_get_what_is_declared(self, make_step_method: MakeMethod) -> None:
        method = make_step_method()
        loop = _loop(method, objectives=3)
        train(loop, [0])
        assert loop.head_weights.isfinite().all()
        if method.heads == "own":
            assert_close(loop.head_weights, torch.ones_like(loop.head_weights), rtol=0, atol=0)

    def test_what_it_is_given_stays_as_it_is(self, make_step_method: MakeMethod) -> None:
        method = make_step_method()
        batch = random_batch(0, 3, PARAMETERS, batches=method.batches)
        loop = _loop(method, objectives=3)
        _backward(loop, batch)
        step = loop.surgery.step
        assert_close(step.losses, batch.losses, rtol=0, atol=0)
        if not isinstance(method, Scalarization):
            assert_close(step.jacobians, batch.jacobian, rtol=0, atol=0)
            gramian = step.jacobian @ step.jacobian.T
            assert_close(step.gramian, gramian, rtol=0, atol=0)

    def test_diagnostics_are_finite_scalars(self, make_step_method: MakeMethod) -> None:
        loop = _loop(make_step_method(), objectives=3)
        train(loop, [0])
        for name, value in loop.surgery.step.diagnostics().items():
            assert value.shape == (), name
            assert value.isfinite(), name

    def test_global_generators_are_ignored(self, make_step_method: MakeMethod) -> None:
        found = []
        for global_seed in (1, 2):
            with generators.seeded_by(global_seed):
                before = generators.positions()
                found.append(_trajectory(make_step_method()))
                assert generators.positions() == before, "a global generator was drawn from"
        _assert_same_bits(*found)

    def test_same_seed_gives_the_same_bits(self, make_step_method: MakeMethod) -> None:
        _assert_same_bits(_trajectory(make_step_method()), _trajectory(make_step_method()))

    def test_another_process_gives_the_same_bits(self, make_step_method: MakeMethod) -> None:
        method = make_step_method()
        there = elsewhere.call(
            trajectory, method, STEPS_PER_EPOCH, steps_per_epoch=STEPS_PER_EPOCH, seed=3
        )
        _assert_same_bits(there, _trajectory(method))

    def test_nothing_is_kept_on_the_method(self, make_step_method: MakeMethod) -> None:
        method = make_step_method()
        before = copy.deepcopy(vars(method))
        one, fresh = _loop(method, objectives=3), _loop(make_step_method(), objectives=3)
        for index in range(2 * STEPS_PER_EPOCH):
            fresh.surgery.method = make_step_method()
            _assert_same_bits(train(one, [index]), train(fresh, [index]))
        assert vars(method) == before

    def test_continues_exactly_from_a_checkpoint(self, make_step_method: MakeMethod) -> None:
        undisturbed = _loop(make_step_method(), objectives=3)
        train(undisturbed, range(STEPS_PER_EPOCH))
        file = io.BytesIO()
        torch.save([undisturbed.surgery.state_dict(), undisturbed.trunk.state_dict()], file)
        expected = train(undisturbed, _later())

        file.seek(0)
        surgery, trunk = torch.load(file, weights_only=True)
        assert not undisturbed.surgery.method.rebuildable & surgery["state"].keys()
        resumed = _loop(make_step_method(), objectives=3)
        resumed.trunk.load_state_dict(trunk)
        resumed.surgery.load_state_dict(surgery)
        _assert_same_bits(train(resumed, _later()), expected)

    def test_memory_can_be_saved(self, make_step_method: MakeMethod) -> None:
        loop = _loop(make_step_method(), objectives=3)
        train(loop, range(STEPS_PER_EPOCH))
        for key, value in (loop.surgery.state or {}).items():
            scalar = value is None or isinstance(value, (bool, int, float, str))
            module = hasattr(value, "state_dict") and hasattr(value, "load_state_dict")
            assert isinstance(value, Tensor) or scalar or module, f"{key}: {type(value)}"

    def test_never_waits_for_the_device(self, make_step_method: MakeMethod) -> None:
        assert_never_waits(make_step_method())


def _loop(method: Method, objectives: int, dtype: torch.dtype = torch.float64) -> LinearLoop:
    return LinearLoop(
        method, objectives, PARAMETERS, dtype=dtype, steps_per_epoch=STEPS_PER_EPOCH, seed=3
    )


def _backward(loop: LinearLoop, batch: Batch) -> Tensor:
    return loop.backward(
        batch.jacobian,
        batch.losses,
        sketch_gradients=batch.sketch_gradients,
        heldout_gradients=batch.heldout_gradients,
    )


def _repeat(method: Method, batch: Batch) -> list[Tensor]:
    """Return the directions of a step, of one after it, and of one in the next epoch."""
    loop = LinearLoop(
        method, *batch.jacobian.shape[1:], dtype=batch.losses.dtype, steps_per_epoch=2
    )
    found = []
    for _ in range(3):
        found.append(_backward(loop, batch))
        loop.descend(rate=0.0)  # where a model has converged, or its learning rate is zero
    return found


def _trajectory(method: Method) -> list[Tensor]:
    return trajectory(method, STEPS_PER_EPOCH, steps_per_epoch=STEPS_PER_EPOCH, seed=3)


def _later() -> range:
    return range(STEPS_PER_EPOCH, STEPS_PER_EPOCH + LATER)


def _assert_same_bits(found: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    assert_close(list(found), list(expected), rtol=0, atol=0)
