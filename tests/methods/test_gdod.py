from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from gradbench.testing import (
    LinearLoop,
    MakeMethod,
    NonConflicting,
    PermutationInvariant,
    PositivelyHomogeneous,
    direction,
    random_jacobian,
)
from gradbench_methods.gdod import GDOD, decompose

ROUND_OFF = 1e-9  # the Gramian has the squares of the singular values
SKIP = GDOD(fallback="skip")  # the rule alone
SHAPES = [(2, 2), (2, 20), (3, 8), (4, 40), (6, 200)]  # (K, P)


class TestDefault(PermutationInvariant, PositivelyHomogeneous):
    @pytest.fixture
    def make_method(self) -> MakeMethod:
        return GDOD


class TestFallingBackOnThePrimary(NonConflicting):
    @pytest.fixture
    def make_method(self) -> MakeMethod:
        return lambda: GDOD(fallback="primary")


class TestSkipping(NonConflicting, PermutationInvariant, PositivelyHomogeneous):
    @pytest.fixture
    def make_method(self) -> MakeMethod:
        return lambda: GDOD(fallback="skip")


class TestNormalized(PermutationInvariant, PositivelyHomogeneous):
    @pytest.fixture
    def make_method(self) -> MakeMethod:
        return lambda: GDOD(normalize=True)


def rows(*gradients: list[float]) -> Tensor:
    return torch.tensor(gradients, dtype=torch.float64)


def split(jacobian: Tensor, *, normalize: bool = False) -> tuple[Tensor, Tensor]:
    """Return the shared and the conflict part of every gradient, (K, P) each."""
    basis = jacobian
    if normalize:
        basis = torch.stack([gradient / gradient.norm() for gradient in jacobian])
    _, singular, directions = torch.linalg.svd(basis, full_matrices=False)
    shared = torch.zeros_like(jacobian)
    for value, v in zip(singular, directions, strict=True):
        along = [float(gradient @ v) for gradient in jacobian]
        if value > 1e-6 * singular[0] and (min(along) >= 0 or max(along) <= 0):
            for k, coordinate in enumerate(along):
                shared[k] += coordinate * v
    return shared, jacobian - shared


def is_lost(shared: Tensor) -> bool:
    return not shared.any()


def correlated(objectives: int, parameters: int, seed: int) -> Tensor:
    """Return gradients with something in common, as those of related tasks have."""
    common = 0.3 * random_jacobian(1, parameters, seed=100 + seed)
    return random_jacobian(objectives, parameters, seed=seed) + common


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize(("objectives", "parameters"), SHAPES)
def test_agrees_with_the_singular_value_decomposition(
    objectives: int, parameters: int, normalize: bool
) -> None:
    for seed in range(10):
        jacobian = correlated(objectives, parameters, seed)
        jacobian *= 2.0 ** torch.arange(objectives)[:, None]
        shared, conflict = split(jacobian, normalize=normalize)
        plain = direction(GDOD(fallback="skip", normalize=normalize), jacobian)
        assert_close(plain, shared.sum(0), rtol=ROUND_OFF, atol=ROUND_OFF)
        mixed = direction(GDOD(shared=2.0, conflict=0.25, normalize=normalize), jacobian)
        expected = 2 * shared.sum(0) + 0.25 * conflict.sum(0)
        assert_close(mixed, expected, rtol=ROUND_OFF, atol=ROUND_OFF)


@pytest.mark.parametrize(
    ("gradients", "expected"),
    [
        (rows([1, 0], [-1, 1]), [0.44721, 0.72361]),
        (rows([1, 0], [1, 1]), [1.89443, 1.17082]),  # nothing conflicts, yet it is not (2, 1)
        (rows([1, 0], [0, 2]), [1, 2]),  # orthogonal
        (rows([1, 1e-5], [0, 2]), [0, 2]),  # and what a little less or more than that makes of it
        (rows([1, -1e-5], [0, 2]), [1, 0]),
        (rows([3, 4], [3, 4]), [6, 8]),  # the same twice
        (rows([3, 4], [4, -3]), [7, 1]),
        (rows([3, 4], [-3, 4]), [0, 8]),
        (rows([3, 4], [-3, -4]), [0, 0]),
        (rows([3, 4], [0, 0]), [3, 4]),
    ],
)
def test_pairs_by_hand(gradients: Tensor, expected: list[float]) -> None:
    assert_close(direction(SKIP, gradients), rows(expected)[0], rtol=0, atol=1e-4)


def test_two_gradients_of_one_length_are_summed_whatever_their_angle() -> None:
    for angle in (0.1, 1.0, 2.0, 3.0):
        jacobian = rows([1, 0], [math.cos(angle), math.sin(angle)])
        assert_close(direction(SKIP, jacobian), jacobian.sum(0))
        scaled = jacobian * torch.tensor([[1.0], [1e3]], dtype=torch.float64)
        normalized = GDOD(normalize=True, fallback="skip")
        middle = jacobian.sum(0) / jacobian.sum(0).norm()
        assert_close(direction(normalized, scaled), (scaled.sum(0) @ middle) * middle)


@pytest.mark.parametrize(("objectives", "parameters"), SHAPES)
def test_parts_add_up_and_no_objective_gets_worse(objectives: int, parameters: int) -> None:
    for seed in range(10):
        jacobian = correlated(objectives, parameters, seed)
        everything = direction(GDOD(shared=1.0, conflict=1.0), jacobian)
        assert_close(everything, jacobian.sum(0))
        found = direction(SKIP, jacobian)
        lengths = found.norm() * jacobian.norm(dim=1)
        assert (jacobian @ found >= -ROUND_OFF * lengths).all()


def test_all_objectives_are_treated_alike() -> None:
    order = torch.tensor([2, 0, 3, 1])
    for seed in range(10):
        jacobian = correlated(4, 40, seed)
        assert_close(direction(GDOD(), jacobian[order]), direction(GDOD(), jacobian))


@pytest.mark.parametrize(("fallback", "expected"), [("sum", 4), ("primary", 1), ("skip", 0)])
def test_falls_back_where_no_direction_is_shared(fallback: str, expected: int) -> None:
    draws = [random_jacobian(4, 200, seed=seed) for seed in range(60)]
    lost = [jacobian for jacobian in draws if is_lost(split(jacobian)[0])]
    assert 0.3 < len(lost) / len(draws) < 0.7
    for jacobian in lost[:5]:
        loop = LinearLoop(GDOD(fallback=fallback), *jacobian.shape)  # type: ignore[arg-type]
        assert_close(loop.backward(jacobian), jacobian[:expected].sum(0))
        assert loop.surgery.step.diagnostics()["fallback_rate"] == 1


def test_does_not_fall_back_where_it_keeps_some_of_the_conflict() -> None:
    opposites = rows([3, 4], [-2, -3])
    loop = LinearLoop(GDOD(conflict=0.1, fallback="primary"), 2, 2)
    found = loop.backward(opposites)
    shared, conflict = split(opposites)
    assert_close(found, shared.sum(0) + 0.1 * conflict.sum(0))
    assert loop.surgery.step.diagnostics()["fallback_rate"] == 0


def test_a_coordinate_of_round_off_has_no_sign() -> None:
    nearly = rows([1, 1e-8], [0, 2])
    assert_close(direction(SKIP, nearly), nearly.sum(0), rtol=0, atol=1e-7)
    assert_close(direction(GDOD(tolerance=0.0, fallback="skip"), nearly), rows([0, 2])[0])


def test_a_direction_within_the_tolerance_is_left_out() -> None:
    gramian = np.diag([1.0, 1e-10])
    assert decompose(gramian, 1e-6, normalize=False).directions.shape == (2, 2)
    assert decompose(gramian, 1e-4, normalize=False).directions.shape == (1, 2)
    assert decompose(np.zeros((2, 2)), 1e-6, normalize=True).directions.shape == (0, 2)


def test_a_decomposition_gives_the_gradients_back() -> None:
    jacobian = random_jacobian(4, 9) * torch.tensor([[1.0], [10.0], [0.1], [1.0]])
    for normalize in (False, True):
        found = decompose((jacobian @ jacobian.T).numpy(), 1e-6, normalize=normalize)
        basis = found.directions @ jacobian.numpy()
        np.testing.assert_allclose(basis @ basis.T, np.eye(4), atol=ROUND_OFF)
        np.testing.assert_allclose(found.coordinates @ basis, jacobian, atol=ROUND_OFF)


def test_it_works_on_float32_gradients() -> None:
    jacobian = correlated(3, 1000, seed=1)
    found = direction(SKIP, jacobian.float())
    assert_close(found.double(), direction(SKIP, jacobian), rtol=1e-4, atol=1e-4)
