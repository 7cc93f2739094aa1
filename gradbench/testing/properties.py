"""Mathematical properties that a method may claim, one mixin each."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from gradbench.method import Branching, Method
from gradbench.testing.checks import PluginChecks
from gradbench.testing.inputs import Batch, batch_of, random_batch
from gradbench.testing.loops import LinearLoop

MakeMethod = Callable[[], Method]

DRAWS = 8
PARAMETERS = 5  # few, so that drawn gradients are in conflict as often as not, and strongly
FACTORS = (1e-3, 3.0, 1e3)
ROUND_OFF = 1e-10  # of |d| |g|, for products of float64 vectors that are computed in some ten steps


class MethodChecks(PluginChecks):
    """The base of what checks a method; define a ``make_method`` fixture, a factory."""

    @pytest.fixture
    def make_method(self) -> MakeMethod:
        """Return what makes the method; a class whose fields have defaults will do."""
        raise NotImplementedError(f"{type(self).__name__} needs a fixture make_method.")

    @pytest.fixture
    def plugin(self, make_method: MakeMethod) -> type:
        """Return the class of the method."""
        return type(make_method())

    @pytest.fixture
    def make_step_method(self, make_method: MakeMethod) -> MakeMethod:
        """Return what makes the method, if it is one that acts in every step."""
        if isinstance(make_method(), Branching):
            pytest.skip("trains branches of the weights and makes no direction")
        return make_method


class NonConflicting(MethodChecks):
    """To first order, the direction never makes the primary loss worse."""

    @pytest.mark.parametrize("objectives", [2, 3, 5])
    def test_non_conflicting(self, make_step_method: MakeMethod, objectives: int) -> None:
        for batch in _draws(make_step_method(), objectives):
            found, _ = _respond(make_step_method(), batch)
            primary = batch.jacobian[0, 0]
            assert found @ primary >= -ROUND_OFF * found.norm() * primary.norm()


class PermutationInvariant(MethodChecks):
    """The order of the auxiliaries makes no difference."""

    @pytest.mark.parametrize("objectives", [3, 5])
    def test_permutation_invariant(self, make_step_method: MakeMethod, objectives: int) -> None:
        turned = torch.tensor([0, *range(objectives - 1, 0, -1)])
        for batch in _draws(make_step_method(), objectives):
            other = Batch(
                jacobian=batch.jacobian[:, turned],
                losses=batch.losses[turned],
                sketch_gradients=batch.sketch_gradients,
                heldout_gradients=batch.heldout_gradients,
            )
            expected, expected_heads = _respond(make_step_method(), batch)
            found, found_heads = _respond(make_step_method(), other)
            assert_close(found, expected)
            assert_close(found_heads, expected_heads[turned])


class PositivelyHomogeneous(MethodChecks):
    """Gradients of c times the length give a direction of c times the length."""

    @pytest.mark.parametrize("factor", FACTORS)
    def test_positively_homogeneous(self, make_step_method: MakeMethod, factor: float) -> None:
        for batch in _draws(make_step_method(), 3):
            other = Batch(
                jacobian=batch.jacobian * factor,
                losses=batch.losses,
                sketch_gradients=batch.sketch_gradients * factor,
                heldout_gradients=batch.heldout_gradients * factor,
            )
            expected, _ = _respond(make_step_method(), batch)
            found, _ = _respond(make_step_method(), other)
            assert_close(found / factor, expected)


def _draws(method: Method, objectives: int) -> Iterator[Batch]:
    for index in range(DRAWS):
        drawn = random_batch(index, objectives, PARAMETERS, batches=method.batches)
        # one row for all batches: what is claimed holds of a batch, not between them
        yield batch_of(drawn.jacobian[:1].expand_as(drawn.jacobian), drawn.losses, seed=index)


def _respond(method: Method, batch: Batch) -> tuple[Tensor, Tensor]:
    """Return the direction (P,) and the weights of the heads (K,)."""
    loop = LinearLoop(method, *batch.jacobian.shape[1:], steps_per_epoch=1)
    found = loop.backward(
        batch.jacobian,
        batch.losses,
        sketch_gradients=batch.sketch_gradients,
        heldout_gradients=batch.heldout_gradients,
    )
    return found, loop.head_weights
