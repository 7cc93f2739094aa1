from __future__ import annotations

import itertools
import math
from dataclasses import replace
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from gradbench import seeding
from gradbench.errors import MissingInputError
from gradbench.losses import ExampleLosses
from gradbench.surgery import Surgery
from gradbench.testing import (
    LinearLoop,
    MakeMethod,
    NonConflicting,
    PermutationInvariant,
    PositivelyHomogeneous,
    direction,
    example_gradients,
    random_batch,
    random_jacobian,
)
from gradbench_methods.attittud import ATTITTUD, Basis
from gradbench_methods.pcgrad_asymmetric import PCGradAsymmetric

PARAMETERS, EXAMPLES, RANK = 30, 12, 5
BASES: list[Basis] = ["svd", "gram_schmidt", "random", "canonical", "mean", "primary"]
RANGES: list[Basis] = ["svd", "gram_schmidt"]  # bases of the range of the sketch
PUBLISHED = [(1, -1, 1), (1, 0, 1), (0, -1, 1), (0, 0, 1)]  # good, bad, neutral

# float32 keeps 7 digits, and a basis is the product of some hundred roundings of them
FLOAT32 = 1e-4


class Parts(NamedTuple):
    good: Tensor  # (P,)
    bad: Tensor
    neutral: Tensor


def split(gradient: Tensor, primary: Tensor, basis: Tensor) -> Parts:
    """Split one auxiliary gradient along the rows of ``basis``, one row at a time."""
    good, bad = torch.zeros_like(gradient), torch.zeros_like(gradient)
    for axis in basis:
        part = (axis @ gradient) * axis
        if (axis @ gradient) * (axis @ primary) >= 0:
            good = good + part
        else:
            bad = bad + part
    return Parts(good, bad, gradient - good - bad)


def oracle(jacobian: Tensor, basis: Tensor, method: ATTITTUD) -> Tensor:
    total = method.eta_primary * jacobian[0]
    for auxiliary in jacobian[1:]:
        parts = split(auxiliary, jacobian[0], basis)
        total = (
            total
            + method.eta_good * parts.good
            + method.eta_bad * parts.bad
            + method.eta_neutral * parts.neutral
        )
    return total


def drawn(seed: int, index: int = 0) -> torch.Generator:
    """Return the generator of a step."""
    name = LinearLoop(ATTITTUD(), 1, 1).surgery.name
    derived = seeding.derive(seed, "method", name, index, "device")
    return torch.Generator().manual_seed(derived)


def orthonormal(rows: Tensor) -> Tensor:
    """Orthonormalise independent rows by a library's factorisation; signs are arbitrary."""
    columns: Tensor = torch.linalg.qr(rows.T).Q
    return columns.T


def basis_of(method: ATTITTUD, jacobian: Tensor, examples: Tensor, seed: int) -> Tensor:
    """Make the basis of the first step from library functions."""
    count, parameters = examples.shape
    if method.basis == "primary":
        return nn.functional.normalize(jacobian[:1])
    if method.basis == "mean":
        return nn.functional.normalize(examples.mean(0, keepdim=True))
    draw = drawn(seed)
    if method.basis == "canonical":
        axes = torch.randint(parameters, (method.rank, 1), generator=draw)
        return torch.eye(parameters, dtype=torch.float64)[sorted(set(axes[:, 0].tolist()))]
    columns = parameters if method.basis == "random" else count
    rows = min(method.rank, columns)
    omega = torch.randn(rows, columns, generator=draw, dtype=torch.float64)
    if method.basis == "random":
        return orthonormal(omega)
    if method.anchor_probe:
        omega[0] = 1.0
    sketch = omega @ examples
    if method.basis == "gram_schmidt":
        return orthonormal(sketch)
    right: Tensor = torch.linalg.svd(sketch, full_matrices=False).Vh
    return right


def inject(method: ATTITTUD, jacobian: Tensor, basis: Tensor) -> Tensor:
    """Return the direction in a step after the one that made ``basis``."""
    assert method.refresh_every > 1
    return direction(method, jacobian, index=1, state={"basis": basis})


def parts_of(jacobian: Tensor, basis: Tensor) -> Parts:
    """Return the parts of the one auxiliary gradient, by the method itself."""
    nothing = ATTITTUD(eta_good=0, eta_bad=0, eta_neutral=0, eta_primary=0)
    return Parts(
        good=inject(replace(nothing, eta_good=1), jacobian, basis),
        bad=inject(replace(nothing, eta_bad=1), jacobian, basis),
        neutral=inject(replace(nothing, eta_neutral=1), jacobian, basis),
    )


def draw_case(seed: int, objectives: int = 2) -> tuple[Tensor, Tensor]:
    """Return a jacobian and the gradients of primary examples that its first row is the mean of."""
    jacobian = random_jacobian(objectives, PARAMETERS, seed=seed)
    return jacobian, example_gradients(jacobian[0], examples=EXAMPLES, seed=seed)


def draw_basis(seed: int) -> Tensor:
    return orthonormal(random_jacobian(RANK, PARAMETERS, seed=seed + 100))


class TestProperties(PermutationInvariant, PositivelyHomogeneous):
    @pytest.fixture(params=BASES)
    def make_method(self, request: pytest.FixtureRequest) -> MakeMethod:
        return lambda: ATTITTUD(basis=request.param)


class TestWithoutTheBadPart(NonConflicting):
    """With the primary gradient inside the basis, nothing is left that hurts it."""

    @pytest.fixture(params=["svd", "gram_schmidt", "mean", "primary"])
    def make_method(self, request: pytest.FixtureRequest) -> MakeMethod:
        return lambda: ATTITTUD(basis=request.param, anchor_probe=True, eta_bad=0.0)


class TestReversingTheBadPart(NonConflicting):
    """Turned around, what hurt the primary helps it: only g⊥ · g_0 = 0 is needed."""

    @pytest.fixture
    def make_method(self) -> MakeMethod:
        return lambda: ATTITTUD(anchor_probe=True)


class TestAgainstTheOracle:
    @pytest.mark.parametrize("basis", BASES)
    @pytest.mark.parametrize("objectives", [2, 3, 5])
    def test_every_basis(self, basis: Basis, objectives: int) -> None:
        method = ATTITTUD(
            basis=basis, rank=RANK, eta_good=0.7, eta_bad=-1.3, eta_neutral=0.4, eta_primary=2.0
        )
        for seed in range(3):
            jacobian, examples = draw_case(seed, objectives)
            found = direction(method, jacobian, seed=seed, sketch_gradients=examples)
            expected = oracle(jacobian, basis_of(method, jacobian, examples, seed), method)
            assert_close(found, expected)

    @pytest.mark.parametrize(("good", "bad", "neutral"), PUBLISHED)
    @pytest.mark.parametrize("anchored", [False, True])
    def test_every_published_setting(
        self, good: float, bad: float, neutral: float, anchored: bool
    ) -> None:
        method = ATTITTUD(
            rank=RANK, eta_good=good, eta_bad=bad, eta_neutral=neutral, anchor_probe=anchored
        )
        for seed in range(3):
            jacobian, examples = draw_case(seed)
            found = direction(method, jacobian, seed=seed, sketch_gradients=examples)
            expected = oracle(jacobian, basis_of(method, jacobian, examples, seed), method)
            assert_close(found, expected)

    def test_more_rows_than_examples(self) -> None:
        method = ATTITTUD(rank=3 * EXAMPLES)
        jacobian, examples = draw_case(0)
        found = direction(method, jacobian, sketch_gradients=examples)
        assert_close(found, oracle(jacobian, basis_of(method, jacobian, examples, 0), method))

    def test_tuning_draws_from_the_published_settings(self) -> None:
        options = ATTITTUD.joint_search["eta"].values
        found = [(eta["eta_good"], eta["eta_bad"], eta["eta_neutral"]) for eta in options]
        assert found == PUBLISHED
        default = ATTITTUD()
        assert (default.eta_good, default.eta_bad, default.eta_neutral) == PUBLISHED[0]


class TestByHand:
    jacobian = torch.tensor([[1.0, 1.0, 0.0], [2.0, -1.0, 3.0]], dtype=torch.float64)
    axes = torch.eye(2, 3, dtype=torch.float64)

    def turned(self, angle: float) -> Tensor:
        return torch.tensor(
            [
                [math.cos(angle), math.sin(angle), 0.0],
                [-math.sin(angle), math.cos(angle), 0.0],
            ],
            dtype=torch.float64,
        )

    def test_parts(self) -> None:
        found = parts_of(self.jacobian, self.axes)
        assert_close(found.good, torch.tensor([2.0, 0.0, 0.0]).double())
        assert_close(found.bad, torch.tensor([0.0, -1.0, 0.0]).double())
        assert_close(found.neutral, torch.tensor([0.0, 0.0, 3.0]).double())

    @pytest.mark.parametrize(("bad", "expected"), [(-1, [2.0, 1.0, 3.0]), (0, [2.0, 0.0, 3.0])])
    def test_directions(self, bad: float, expected: list[float]) -> None:
        method = ATTITTUD(eta_bad=bad, eta_primary=0)
        found = inject(method, self.jacobian, self.axes)
        assert_close(found, torch.tensor(expected, dtype=torch.float64))

    def test_primary_is_added(self) -> None:
        found = inject(ATTITTUD(eta_bad=0, eta_primary=0.5), self.jacobian, self.axes)
        assert_close(found, torch.tensor([2.5, 0.5, 3.0]).double())

    def test_another_basis_of_the_same_subspace_gives_another_direction(self) -> None:
        method = ATTITTUD(eta_bad=0, eta_primary=0)
        found = inject(method, self.jacobian, self.turned(0.3))
        # the first axis has p, a = 1.25086, 1.61515; the second .65982, -1.54638 and is dropped
        assert_close(
            found, torch.tensor([1.5430, 0.4773, 3.0]).double(), atol=5e-5, rtol=0
        )  # to the digits written down here

    def test_what_neither_helps_nor_hurts_counts_as_good(self) -> None:
        half = math.sqrt(0.5)
        basis = torch.tensor([[half, half, 0.0], [-half, half, 0.0]], dtype=torch.float64)
        assert basis[1] @ self.jacobian[0] == 0
        found = inject(ATTITTUD(eta_primary=0), self.jacobian, basis)
        assert_close(found, self.jacobian[1])


class TestInvariants:
    @pytest.fixture(params=range(5))
    def case(self, request: pytest.FixtureRequest) -> tuple[Tensor, Tensor]:
        return draw_case(request.param)[0], draw_basis(request.param)

    def test_parts_add_up_and_are_orthogonal(self, case: tuple[Tensor, Tensor]) -> None:
        jacobian, basis = case
        parts = parts_of(jacobian, basis)
        assert_close(parts.good + parts.bad + parts.neutral, jacobian[1])
        for one, other in itertools.combinations(parts, 2):
            assert_close(one @ other, torch.zeros(()).double())

    def test_good_helps_and_bad_hurts(self, case: tuple[Tensor, Tensor]) -> None:
        jacobian, basis = case  # the primary gradient is not in the span
        parts = parts_of(jacobian, basis)
        assert parts.good @ jacobian[0] >= 0 >= parts.bad @ jacobian[0]

    def test_turning_the_bad_part_around_helps_along_every_axis(
        self, case: tuple[Tensor, Tensor]
    ) -> None:
        jacobian, basis = case
        inside = inject(ATTITTUD(eta_neutral=0, eta_primary=0), jacobian, basis)
        expected = ((basis @ jacobian[0]) * (basis @ jacobian[1])).abs().sum()
        assert_close(inside @ (basis.T @ (basis @ jacobian[0])), expected)

    def test_weights_of_one_give_the_sum(self, case: tuple[Tensor, Tensor]) -> None:
        jacobian, basis = case
        plain = ATTITTUD(eta_good=1, eta_bad=1, eta_neutral=1)
        assert_close(inject(plain, jacobian, basis), jacobian.sum(0))

    @pytest.mark.parametrize("signs", list(itertools.product([1, -1], repeat=3)))
    def test_weights_of_length_one_keep_the_length(
        self, case: tuple[Tensor, Tensor], signs: tuple[int, int, int]
    ) -> None:
        jacobian, basis = case
        good, bad, neutral = signs
        method = ATTITTUD(eta_good=good, eta_bad=bad, eta_neutral=neutral, eta_primary=0)
        assert_close(inject(method, jacobian, basis).norm(), jacobian[1].norm())

    def test_signs_of_the_axes_make_no_difference(self, case: tuple[Tensor, Tensor]) -> None:
        jacobian, basis = case
        signs = torch.tensor([1.0, -1.0, -1.0, 1.0, -1.0], dtype=torch.float64)
        found = inject(ATTITTUD(), jacobian, signs[:, None] * basis)
        assert_close(found, inject(ATTITTUD(), jacobian, basis))

    def test_auxiliaries_are_split_one_by_one(self, case: tuple[Tensor, Tensor]) -> None:
        jacobian, basis = case
        jacobian = torch.cat([jacobian, random_jacobian(2, PARAMETERS, seed=77)])
        method = ATTITTUD(eta_primary=0)
        apart = [inject(method, jacobian[[0, k]], basis) for k in (1, 2, 3)]
        found = inject(method, jacobian, basis)
        assert_close(found, apart[0] + apart[1] + apart[2])
        together = torch.stack([jacobian[0], jacobian[1:].sum(0)])
        assert not torch.allclose(found, inject(method, together, basis))


class TestOneAxis:
    """With the primary gradient as the only axis."""

    @pytest.mark.parametrize("objectives", [2, 3, 5])
    def test_dropping_the_bad_part_is_asymmetric_pcgrad(self, objectives: int) -> None:
        method = ATTITTUD(basis="primary", eta_good=1, eta_bad=0, eta_neutral=1)
        for seed in range(5):
            jacobian = random_jacobian(objectives, PARAMETERS, seed=seed)
            expected = direction(PCGradAsymmetric(), jacobian)
            assert_close(direction(method, jacobian), expected)

    def test_the_good_part_is_what_points_along_the_primary(self) -> None:
        method = ATTITTUD(basis="primary", eta_bad=0, eta_neutral=0, eta_primary=0)
        for seed in range(5):
            primary, auxiliary = jacobian = random_jacobian(2, PARAMETERS, seed=seed)
            along = (auxiliary @ primary).clamp_min(0) / (primary @ primary)
            assert_close(direction(method, jacobian), along * primary)

    def test_a_zero_primary_leaves_everything_neutral(self) -> None:
        jacobian = random_jacobian(2, PARAMETERS)
        jacobian[0] = 0
        method = ATTITTUD(basis="primary", eta_good=3, eta_bad=5, eta_neutral=7)
        assert_close(direction(method, jacobian), 7 * jacobian[1])


class TestBasis:
    def made(
        self, method: ATTITTUD, jacobian: Tensor, examples: Tensor | None = None, seed: int = 0
    ) -> tuple[Tensor, LinearLoop]:
        """Return the basis of the first step, and the loop."""
        loop = LinearLoop(method, *jacobian.shape, dtype=jacobian.dtype, seed=seed)
        loop.backward(jacobian, sketch_gradients=examples)
        assert loop.surgery.state is not None
        return loop.surgery.state["basis"], loop

    @pytest.mark.parametrize("basis", ["svd", "gram_schmidt", "random", "canonical", "mean"])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_axes_are_orthonormal_or_dead(self, basis: Basis, dtype: torch.dtype) -> None:
        jacobian, examples = (part.to(dtype) for part in draw_case(0))
        found, _ = self.made(ATTITTUD(basis=basis, rank=RANK), jacobian, examples)
        assert found.dtype == dtype
        products = (found @ found.T).double()
        alive = (products.diagonal() > 0.5).double()
        tolerance = FLOAT32 if dtype == torch.float32 else 1e-12
        assert_close(products, alive.diag(), atol=tolerance, rtol=0)

    @pytest.mark.parametrize("basis", ["random", "canonical", "primary"])
    def test_some_bases_need_no_examples(self, basis: Basis) -> None:
        assert direction(ATTITTUD(basis=basis), random_jacobian(2, 5)).isfinite().all()

    @pytest.mark.parametrize("basis", ["svd", "gram_schmidt", "mean"])
    def test_others_say_that_they_do(self, basis: Basis) -> None:
        with pytest.raises(MissingInputError, match="sketch"):
            direction(ATTITTUD(basis=basis), random_jacobian(2, 5))

    @pytest.mark.parametrize("basis", ["svd", "gram_schmidt"])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_dead_rows_where_the_examples_have_a_smaller_rank(
        self, basis: Basis, dtype: torch.dtype
    ) -> None:
        few = random_jacobian(3, PARAMETERS, seed=9)
        examples = (random_jacobian(EXAMPLES, 3, seed=10) @ few).to(dtype)
        jacobian = random_jacobian(2, PARAMETERS).to(dtype)
        found, loop = self.made(ATTITTUD(basis=basis, rank=10), jacobian, examples)
        tolerance = FLOAT32 if dtype == torch.float32 else 1e-12
        assert (found.norm(dim=1) > 0.5).sum() == 3
        assert ((found.norm(dim=1) - 1).abs().minimum(found.norm(dim=1)) < tolerance).all()
        projector = (found.T @ found).double()
        span = orthonormal(few)
        assert_close(projector, span.T @ span, atol=10 * tolerance, rtol=0)
        expected = oracle(jacobian.double(), found.double(), ATTITTUD())
        assert_close(loop.surgery.direction.double(), expected, atol=10 * tolerance, rtol=0)

    def test_a_basis_of_full_rank_holds_every_example(self) -> None:
        jacobian, examples = draw_case(0)
        for basis in RANGES:
            method = ATTITTUD(basis=basis, rank=EXAMPLES)
            found, _ = self.made(method, jacobian, examples)
            assert_close((examples @ found.T) @ found, examples)

    def test_the_anchor_puts_the_mean_gradient_into_the_span(self) -> None:
        jacobian, examples = draw_case(0)
        for basis in RANGES:
            for anchored in (False, True):
                method = ATTITTUD(basis=basis, rank=RANK, anchor_probe=anchored)
                found, loop = self.made(method, jacobian, examples)
                captured = loop.surgery.step.diagnostics()["captured_energy"]
                inside = (found.T @ (found @ jacobian[0])).square().sum()
                assert_close(captured, inside / jacobian[0].square().sum())
                assert (captured > 1 - 1e-12) == anchored

    def test_shares_of_the_auxiliaries(self) -> None:
        jacobian, examples = draw_case(0, objectives=3)
        found, loop = self.made(ATTITTUD(rank=RANK), jacobian, examples)
        recorded = loop.surgery.step.diagnostics()
        for name in ("good", "bad", "neutral"):
            shares = [
                getattr(split(row, jacobian[0], found), name).square().sum() / row.square().sum()
                for row in jacobian[1:]
            ]
            assert_close(recorded[f"{name}_share"], torch.stack(shares).mean())

    def test_another_seed_or_step_draws_another_basis(self) -> None:
        jacobian, examples = draw_case(0)
        made = [self.made(ATTITTUD(), jacobian, examples, seed=seed)[0] for seed in (1, 2)]
        assert not torch.allclose(made[0], made[1])

    def test_asks_for_its_number_of_examples(self) -> None:
        asked = []

        def sketch(count: int) -> ExampleLosses:
            asked.append(count)
            found: Tensor = trunk(rows[2:])[:, 0]
            return found

        trunk, rows = nn.Linear(PARAMETERS, 1), torch.ones(6, PARAMETERS)
        surgery = Surgery(ATTITTUD(samples=17, refresh_every=2), trunk)
        for _ in range(3):
            surgery.backward(trunk(rows[:1])[:, 0], trunk(rows[1:2])[:, 0], sketch=sketch)
        assert asked == [17, 17]


class TestRefresh:
    def refreshed(self, steps: int, steps_per_epoch: int | None, refresh_every: int) -> list[int]:
        """Return the steps after which the basis is another one."""
        loop = LinearLoop(
            ATTITTUD(rank=2, refresh_every=refresh_every), 2, 6, steps_per_epoch=steps_per_epoch
        )
        found, basis = [], None
        for index in range(steps):
            batch = random_batch(index, 2, 6)
            loop.backward(batch.jacobian, sketch_gradients=batch.sketch_gradients)
            assert loop.surgery.state is not None
            if loop.surgery.state["basis"] is not basis:
                found.append(index)
            basis = loop.surgery.state["basis"]
        return found

    def test_every_so_many_steps(self) -> None:
        assert self.refreshed(10, None, 4) == [0, 4, 8]

    def test_from_the_first_step_of_each_epoch(self) -> None:
        assert self.refreshed(16, 7, 3) == [0, 3, 6, 7, 10, 13, 14]

    def test_an_epoch_shorter_than_the_interval(self) -> None:
        assert self.refreshed(7, 2, 10) == [0, 2, 4, 6]

    def test_nothing_is_sketched_in_between(self) -> None:
        loop = LinearLoop(ATTITTUD(refresh_every=3), 2, PARAMETERS)
        jacobian, examples = draw_case(0)
        loop.backward(jacobian, sketch_gradients=examples)
        for _ in range(2):
            loop.backward(jacobian)
        with pytest.raises(MissingInputError):
            loop.backward(jacobian)

    def test_a_refresh_draws_from_its_own_step(self) -> None:
        jacobian, examples = draw_case(0)
        found = [
            direction(ATTITTUD(), jacobian, index=index, sketch_gradients=examples)
            for index in (0, 10)
        ]
        assert not torch.allclose(found[0], found[1])
