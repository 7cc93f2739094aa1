from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from gradbench.linalg import eigh, orthonormal_rows, right_singular_rows
from gradbench.testing.inputs import generator

SIZES = [1, 2, 3, 5, 10, 41]

# of the largest entry, times n: rotations a row, each with an error of 1e-16 or 6e-8
ROUND_OFF = {torch.float64: 1e-13, torch.float32: 1e-6}
DTYPES = pytest.mark.parametrize(
    "dtype", list(ROUND_OFF), ids=[str(dtype).removeprefix("torch.") for dtype in ROUND_OFF]
)
PRODUCTS = 1e-12  # products of float64 vectors of length 1 whose sums have some ten terms


def normal(rows: int, columns: int, *, seed: int = 0) -> Tensor:
    return torch.randn(rows, columns, generator=generator(seed, "linalg"), dtype=torch.float64)


def orthogonal(size: int) -> Tensor:
    turned: Tensor = torch.linalg.qr(normal(size, size, seed=size)).Q
    return turned


def symmetric_with(eigenvalues: Tensor) -> Tensor:
    turned = orthogonal(len(eigenvalues))
    matrix = turned * eigenvalues @ turned.T
    return (matrix + matrix.T) / 2


def gramian(size: int) -> Tensor:
    rows = normal(size, 2 * size + 1)
    return rows @ rows.T


def indefinite(size: int) -> Tensor:
    matrix = normal(size, size)
    return matrix + matrix.T


def singular(size: int) -> Tensor:
    rows = normal(size, (size + 1) // 2)
    return rows @ rows.T


def repeated(size: int) -> Tensor:
    """Return a matrix of three eigenvalues, each several times."""
    return symmetric_with(torch.tensor([2.0, -1.0, 0.5]).double()[torch.arange(size) % 3])


def close_together(size: int) -> Tensor:
    return symmetric_with(1 + 1e-9 * torch.arange(size, dtype=torch.float64))


def graded(size: int) -> Tensor:
    return symmetric_with(torch.logspace(0, -12, size, dtype=torch.float64))


def one_large(size: int) -> Tensor:
    """Return what conflicting objectives of very different lengths give."""
    lengths = torch.ones(size, dtype=torch.float64)
    lengths[size // 2] = 1e6
    return lengths[:, None] * gramian(size) * lengths


def diagonal(size: int) -> Tensor:
    return torch.arange(size, 0, -1, dtype=torch.float64).diag()


def ones(size: int) -> Tensor:
    return torch.ones(size, size, dtype=torch.float64)


def zero(size: int) -> Tensor:
    return torch.zeros(size, size, dtype=torch.float64)


def identity(size: int) -> Tensor:
    return torch.eye(size, dtype=torch.float64)


def exchange(size: int) -> Tensor:
    """Return the matrix whose every rotation is by 45 degrees."""
    return identity(size).flip(0)


FAMILIES: list[Callable[[int], Tensor]] = [
    gramian,
    indefinite,
    singular,
    repeated,
    close_together,
    graded,
    one_large,
    diagonal,
    ones,
    zero,
    identity,
    exchange,
]


def check_decomposition(matrix: Tensor) -> None:
    """Compare with the library's own decomposition, in everything that is determined."""
    values, vectors = eigh(matrix)
    size, dtype = len(matrix), matrix.dtype
    assert values.shape == (size,)
    assert vectors.shape == (size, size)
    assert values.dtype == vectors.dtype == dtype
    tolerance = ROUND_OFF[dtype] * size
    assert_close(vectors.T @ vectors, torch.eye(size, dtype=dtype), atol=tolerance, rtol=0)
    length = float(matrix.double().abs().max())
    unit = 1.0 if length == 0 else 1 / length
    expected = torch.linalg.eigvalsh(matrix.double() * unit)
    assert_close(values.sort().values.double() * unit, expected, atol=tolerance, rtol=0)
    again = vectors * values @ vectors.T
    assert_close(again.double() * unit, matrix.double() * unit, atol=tolerance, rtol=0)


class TestEigh:
    @pytest.mark.parametrize("size", SIZES)
    @pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.__name__)
    @DTYPES
    def test_agrees_with_the_library(
        self, family: Callable[[int], Tensor], size: int, dtype: torch.dtype
    ) -> None:
        check_decomposition(family(size).to(dtype))

    @pytest.mark.parametrize("seed", range(10))
    def test_agrees_on_many_draws(self, seed: int) -> None:
        rows = normal(10, 12, seed=seed)
        check_decomposition(rows @ rows.T)

    @pytest.mark.parametrize("scale", [1e-100, 1e-20, 1e-10, 1e10, 1e20, 1e100])
    @pytest.mark.parametrize("size", [2, 5, 10])
    def test_any_scale(self, scale: float, size: int) -> None:
        check_decomposition(gramian(size) * scale)

    @pytest.mark.parametrize("scale", [1e-15, 1e-8, 1e8, 1e15])
    def test_any_scale_whose_square_float32_holds(self, scale: float) -> None:
        check_decomposition((gramian(5) * scale).float())

    def test_by_hand(self) -> None:
        values, vectors = eigh(torch.tensor([[2.0, 1.0], [1.0, 2.0]]).double())
        order = values.argsort()
        assert_close(values[order], torch.tensor([1.0, 3.0]).double())
        half = 0.5**0.5
        assert_close(vectors[:, order].abs(), torch.full((2, 2), half).double())

    def test_the_matrix_stays_as_it_is(self) -> None:
        matrix = gramian(5)
        before = matrix.clone()
        eigh(matrix)
        assert torch.equal(matrix, before)

    def test_same_bits_again(self) -> None:
        for found, again in zip(eigh(gramian(10)), eigh(gramian(10)), strict=True):
            assert torch.equal(found, again)


class TestOrthonormalRows:
    @pytest.mark.parametrize("shape", [(1, 1), (1, 7), (3, 3), (5, 30), (10, 11)])
    def test_agrees_with_a_qr_decomposition(self, shape: tuple[int, int]) -> None:
        rows = normal(*shape)
        columns, factor = torch.linalg.qr(rows.T)
        expected = (columns * factor.diagonal().sign()).T  # with rows that point along their own
        assert_close(orthonormal_rows(rows), expected)

    @DTYPES
    def test_nearly_dependent_rows(self, dtype: torch.dtype) -> None:
        one, other = normal(2, 50)
        rows = torch.stack([one, one + 1e-3 * other, other]).to(dtype)
        found = orthonormal_rows(rows)
        tolerance = ROUND_OFF[dtype]
        # the third row is all but dependent on the first two, so little of its direction is known
        assert_close(found[:2] @ found[:2].T, torch.eye(2, dtype=dtype), atol=tolerance, rtol=0)
        assert abs(float(found[2] @ found[0])) < tolerance
        assert abs(float(found[2] @ found[1])) < tolerance

    @DTYPES
    def test_a_dependent_row_becomes_zero_and_the_others_go_on(self, dtype: torch.dtype) -> None:
        one, other = normal(2, 20).to(dtype)
        zero = torch.zeros_like(one)
        found = orthonormal_rows(torch.stack([one, -2 * one, zero, other, one + 3 * other]))
        expected = orthonormal_rows(torch.stack([one, other]))
        assert_close(found, torch.stack([expected[0], zero, zero, expected[1], zero]))

    def test_more_rows_than_columns(self) -> None:
        found = orthonormal_rows(normal(5, 3))
        assert_close(found[:3] @ found[:3].T, identity(3), atol=PRODUCTS, rtol=0)
        assert torch.equal(found[3:], torch.zeros(2, 3).double())

    @pytest.mark.parametrize("scale", [1e-10, 1e10])
    @DTYPES
    def test_any_scale(self, scale: float, dtype: torch.dtype) -> None:
        rows = normal(3, 8).to(dtype)
        assert_close(orthonormal_rows(rows * scale), orthonormal_rows(rows))

    def test_rows_of_very_different_lengths(self) -> None:
        rows = normal(3, 8)
        lengths = torch.tensor([[1e-10], [1.0], [1e10]]).double()
        assert_close(orthonormal_rows(rows * lengths), orthonormal_rows(rows))

    def test_zero_rows_stay_zero(self) -> None:
        assert torch.equal(orthonormal_rows(zero(4)), zero(4))


class TestRightSingularRows:
    def check(self, rows: Tensor, rank: int, tolerance: float = PRODUCTS) -> Tensor:
        """Compare with the library's singular vectors; return ours, by falling singular value."""
        found = right_singular_rows(rows)
        assert found.shape == rows.shape
        assert found.dtype == rows.dtype
        values, right = torch.linalg.svd(rows.double(), full_matrices=False)[1:]
        lengths = (rows @ found.T).norm(dim=0)  # singular values; those of zero rows are 0
        order = lengths.argsort(descending=True)
        ordered = found[order].double()
        assert_close(
            lengths[order][:rank].double() / values[0],
            values[:rank] / values[0],
            atol=tolerance,
            rtol=0,
        )
        assert_close(ordered[:rank] @ ordered[:rank].T, identity(rank), atol=tolerance, rtol=0)
        assert torch.equal(ordered[rank:], torch.zeros_like(ordered[rank:]))
        projector = right[:rank].T @ right[:rank]
        assert_close(ordered.T @ ordered, projector, atol=tolerance, rtol=0)
        return ordered

    @pytest.mark.parametrize("shape", [(1, 1), (1, 7), (2, 7), (5, 30), (10, 200), (7, 7)])
    def test_agrees_with_the_library(self, shape: tuple[int, int]) -> None:
        rows = normal(*shape)
        found = self.check(rows, rank=shape[0])
        expected = torch.linalg.svd(rows, full_matrices=False).Vh
        signs = (found * expected).sum(1).sign()
        assert_close(found * signs[:, None], expected)

    def test_agrees_in_float32(self) -> None:
        self.check(normal(10, 200).float(), rank=10, tolerance=1e-5)

    @pytest.mark.parametrize("rank", [1, 2, 4])
    def test_directions_that_are_not_reached_are_zero(self, rank: int) -> None:
        self.check(normal(6, rank) @ normal(rank, 30, seed=1), rank)

    def test_dead_rows_in_float32(self) -> None:
        rows = (normal(6, 2) @ normal(2, 30, seed=1)).float()
        self.check(rows, rank=2, tolerance=1e-5)

    def test_equal_singular_values_span_the_same(self) -> None:
        self.check(3 * orthogonal(8)[:5], rank=5)

    def test_all_rows_the_same(self) -> None:
        self.check(normal(1, 9).expand(4, -1), rank=1)

    def test_more_rows_than_columns(self) -> None:
        found = right_singular_rows(normal(7, 3))
        assert_close(found.T @ found, identity(3), atol=PRODUCTS, rtol=0)
        assert (found.norm(dim=1) > 0.5).sum() == 3

    def test_nothing_at_all(self) -> None:
        assert torch.equal(right_singular_rows(zero(4)), zero(4))

    @pytest.mark.parametrize("scale", [1e-10, 1e10])
    @DTYPES
    def test_any_scale(self, scale: float, dtype: torch.dtype) -> None:
        tolerance = PRODUCTS if dtype == torch.float64 else 1e-5
        self.check((normal(5, 30) * scale).to(dtype), rank=5, tolerance=tolerance)

    @pytest.mark.parametrize("scale", [1e-90, 1e90])
    def test_scales_whose_fourth_power_no_number_holds(self, scale: float) -> None:
        self.check(normal(5, 30) * scale, rank=5)
