from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Sequence

import pytest
import timm
import torch
from timm.layers.norm_act import BatchNormAct2d
from torch import Tensor, nn
from torch.func import functional_call

from gradbench.errors import ContractError
from gradbench.gradients import (
    BlockProbe,
    FlatGradients,
    evaluation_mode,
    full_precision,
    generator_state,
    replayed,
    seed_generators,
    sketch,
    twice_differentiable,
    unmoved_statistics,
)

CPU = torch.device("cpu")
ROUND_OFF = 1e-12  # float64 sums in another order, of values near 1
FLOAT32_HVP = 1e-3  # relative: two backward passes in float32 against float64 differences
DIFFERENCE = 1e-5  # step of the central differences: its error is of order 1e-10 in float64


def equal(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def draws(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def conv_net() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, stride=2, padding=1),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.Conv2d(6, 8, 3, stride=2, bias=False),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
    )


def images(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(4, 3, 16, 16, generator=draws(7), dtype=dtype)


class TestLayout:
    def test_contiguous_parameters_lie_one_after_the_other(self) -> None:
        net = conv_net()
        parameters = list(net.parameters())
        flat = FlatGradients(parameters)
        loss = net(images()).square().mean()
        row = flat.new()
        flat.accumulate(flat.slices(row), [loss], [torch.ones(())])
        grads = torch.autograd.grad(loss, parameters)
        equal(row, torch.cat([grad.flatten() for grad in grads]))

    def test_slices_have_the_strides_of_their_parameters(self) -> None:
        net = conv_net().to(memory_format=torch.channels_last)
        parameters = list(net.parameters())
        flat = FlatGradients(parameters)
        slices = flat.slices(flat.new())
        assert [view.stride() for view in slices] == [p.stride() for p in parameters]
        assert not slices[0].is_contiguous()  # the layout is one that could go wrong

    def test_slices_cover_the_row_once(self) -> None:
        net = conv_net().to(memory_format=torch.channels_last)
        flat = FlatGradients(list(net.parameters()))
        rows = torch.arange(2 * flat.size, dtype=torch.float32).view(2, -1)
        found = torch.cat([view.flatten() for view in flat.slices(rows[1])])
        equal(found.sort().values, rows[1])

    def test_new_buffers_have_the_type_of_the_parameters(self) -> None:
        flat = FlatGradients(list(conv_net().double().parameters()))
        assert flat.new(2, 3).shape == (2, 3, flat.size)
        assert flat.new().dtype == torch.float64

    @pytest.mark.parametrize(
        ("parameters", "words"),
        [
            ([], "found none"),
            ([nn.Parameter(torch.zeros(3, dtype=torch.bfloat16))], "torch.bfloat16"),
            ([nn.Parameter(torch.zeros(3, dtype=torch.float16))], "autocast"),
            (
                [nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(3).double())],
                "torch.float32, torch.float64",
            ),
            (
                [nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(3, device="meta"))],
                "one device",
            ),
            ([nn.Parameter(torch.zeros(4, 4)[:, ::2])], "without gaps"),
            ([nn.Parameter(torch.zeros(1, 4).expand(3, 4))], "overlaps"),
        ],
    )
    def test_what_can_not_be_laid_out_is_refused(
        self, parameters: list[nn.Parameter], words: str
    ) -> None:
        with pytest.raises(ContractError, match=words):
            FlatGradients(parameters)


class TestAccumulate:
    def test_adds_to_the_slices_and_touches_no_other_leaf(self) -> None:
        trunk, head = nn.Linear(3, 4), nn.Linear(4, 2)
        inputs = torch.randn(5, 3, generator=draws(1), requires_grad=True)
        flat = FlatGradients(list(trunk.parameters()))
        kept = torch.ones_like(trunk.weight)
        trunk.weight.grad = kept
        loss = head(trunk(inputs)).square().mean()
        row = flat.new()
        for _ in range(2):
            flat.accumulate(flat.slices(row), [loss], [torch.tensor(0.5)])
        grads = torch.autograd.grad(loss, list(trunk.parameters()))
        equal(row, torch.cat([grad.flatten() for grad in grads]))  # 2 · 0.5 is exact
        assert trunk.weight.grad is kept
        equal(kept, torch.ones_like(kept))
        assert trunk.bias.grad is None
        assert inputs.grad is None
        assert head.weight.grad is None

    def test_cotangents_weigh_the_tensors(self) -> None:
        trunk = nn.Linear(3, 4).double()
        flat = FlatGradients(list(trunk.parameters()))
        output = trunk(torch.randn(5, 3, generator=draws(1), dtype=torch.float64))
        cotangent = torch.randn(5, 4, generator=draws(2), dtype=torch.float64)
        row = flat.new()
        flat.accumulate(flat.slices(row), [output], [cotangent])
        grads = torch.autograd.grad((output * cotangent).sum(), list(trunk.parameters()))
        equal(row, torch.cat([grad.flatten() for grad in grads]))

    def test_gradients_are_put_back_after_a_failure(self) -> None:
        trunk = nn.Linear(3, 4)
        flat = FlatGradients(list(trunk.parameters()))
        trunk.weight.grad = kept = torch.ones_like(trunk.weight)
        with pytest.raises(RuntimeError, match="does not require grad"):
            flat.accumulate(flat.slices(flat.new()), [torch.zeros(())], [torch.ones(())])
        assert trunk.weight.grad is kept
        assert trunk.bias.grad is None


class TestHvp:
    def test_equals_the_explicit_hessian(self) -> None:
        net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
        inputs = torch.randn(6, 3, generator=draws(1), dtype=torch.float64)
        names, parameters = zip(*net.named_parameters(), strict=True)
        theta = torch.cat([p.detach().flatten() for p in parameters]).requires_grad_()
        named = dict(zip(names, parts_of(theta, parameters), strict=True))
        loss = functional_call(net, named, (inputs,)).pow(3).mean()
        (gradient,) = torch.autograd.grad(loss, theta, create_graph=True)
        rows = [torch.autograd.grad(entry, theta, retain_graph=True)[0] for entry in gradient]
        hessian = torch.stack(rows)
        flat = FlatGradients(list(net.parameters()))
        for seed in (2, 3):
            vector = torch.randn(flat.size, generator=draws(seed), dtype=torch.float64)
            found = flat.hvp(net(inputs).pow(3).mean(), vector)
            torch.testing.assert_close(found, hessian @ vector, rtol=ROUND_OFF, atol=ROUND_OFF)

    def test_of_a_linear_loss_is_zero(self) -> None:
        net = nn.Linear(3, 1)
        flat = FlatGradients(list(net.parameters()))
        equal(flat.hvp(net(torch.ones(2, 3)).mean(), torch.ones(flat.size)), flat.new())

    def test_goes_through_attention(self) -> None:
        torch.manual_seed(0)
        net = timm.create_model("test_vit", num_classes=0, img_size=32)
        inputs = torch.randn(2, 3, 32, 32, generator=draws(1))
        flat = FlatGradients(list(net.parameters()))
        vector = torch.randn(flat.size, generator=draws(2))
        vector /= vector.norm()
        with twice_differentiable():
            found = flat.hvp(net(inputs).square().mean(), vector)
        expected = difference_of_gradients(net, inputs, vector)
        error = (found.double() - expected).norm() / expected.norm()
        assert float(error) < FLOAT32_HVP


def parts_of(vector: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """Return the parts of a vector (P,) in the shapes of contiguous parameters."""
    found, start = [], 0
    for parameter in like:
        found.append(vector[start : start + parameter.numel()].view(parameter.shape))
        start += parameter.numel()
    return found


def difference_of_gradients(net: nn.Module, inputs: Tensor, vector: Tensor) -> Tensor:
    """Return (∇L(θ + εv) - ∇L(θ - εv)) / 2ε, in float64."""
    exact = copy.deepcopy(net).double()
    parameters = list(exact.parameters())
    gradients = []
    for move in (DIFFERENCE, -2 * DIFFERENCE):
        with torch.no_grad():
            moves = parts_of(vector.double(), parameters)
            for parameter, part in zip(parameters, moves, strict=True):
                parameter.add_(part, alpha=move)
        grads = torch.autograd.grad(exact(inputs.double()).square().mean(), parameters)
        gradients.append(torch.cat([grad.flatten() for grad in grads]))
    return (gradients[0] - gradients[1]) / (2 * DIFFERENCE)


class TestSketch:
    def test_equals_the_combination_of_gradients_an_example(self) -> None:
        net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).double()
        parameters = list(net.parameters())
        losses = net(torch.randn(5, 3, generator=draws(1), dtype=torch.float64)).square()[:, 0]
        omega = torch.randn(3, 5, generator=draws(2), dtype=torch.float64)
        jacobian = torch.stack(
            [
                torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters, None, True)])
                for loss in losses
            ]
        )
        found = sketch(FlatGradients(parameters), losses, omega)
        torch.testing.assert_close(found, omega @ jacobian, rtol=ROUND_OFF, atol=ROUND_OFF)


class Scrambled(nn.Module):
    """Its modules are defined in another order than they are called."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(3))
        self.never = nn.Linear(2, 2)
        self.norm = nn.LayerNorm(4)
        self.last = nn.Linear(5, 4)
        self.first = nn.Linear(3, 5)
        self.frozen = nn.Linear(4, 4).requires_grad_(False)

    def forward(self, inputs: Tensor) -> Tensor:
        middle = self.first(inputs * self.scale)
        output: Tensor = self.norm(self.frozen(self.last(middle)))
        return output


def slices_by_name(trunk: nn.Module) -> dict[str, slice]:
    """Return where the parameters of each module lie in P."""
    found: dict[str, slice] = {}
    start = 0
    for name, parameter in trunk.named_parameters():
        if parameter.requires_grad:
            owner = name.rpartition(".")[0]
            stop = start + parameter.numel()
            found[owner] = slice(found[owner].start if owner in found else start, stop)
            start = stop
    return found


class TestBlocks:
    def test_are_in_the_order_in_which_forwards_start(self) -> None:
        trunk = Scrambled()
        flat = FlatGradients([p for p in trunk.parameters() if p.requires_grad])
        probe = BlockProbe(trunk)
        for _ in range(2):
            trunk(torch.ones(2, 3))
        where = slices_by_name(trunk)
        names = ["", "first", "last", "norm", "never"]
        assert probe.blocks(flat).slices == tuple(where[name] for name in names)
        assert probe.blocks(flat).last_weight == names.index("last")

    def test_cover_all_parameters_once(self) -> None:
        trunk = timm.create_model("test_vit", num_classes=0, img_size=32)
        flat = FlatGradients(list(trunk.parameters()))
        probe = BlockProbe(trunk)
        trunk(torch.zeros(1, 3, 32, 32))
        covered = torch.zeros(flat.size, dtype=torch.int64)
        for block in probe.blocks(flat).slices:
            covered[block] += 1
        equal(covered, torch.ones_like(covered))

    def test_of_a_tied_parameter_belong_to_its_first_module(self) -> None:
        trunk = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
        trunk[1].weight = trunk[0].weight
        flat = FlatGradients(list(trunk.parameters()))
        probe = BlockProbe(trunk)
        trunk(torch.ones(1, 3))
        assert probe.blocks(flat).slices == (slice(0, 12), slice(12, 15))

    def test_last_weight_is_one_that_is_trained(self) -> None:
        trunk = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
        trunk[1].weight.requires_grad_(False)
        flat = FlatGradients([p for p in trunk.parameters() if p.requires_grad])
        probe = BlockProbe(trunk)
        trunk(torch.ones(1, 3))
        assert probe.blocks(flat).last_weight == 0

    def test_without_any_weight_matrix_the_last_called_is_taken(self) -> None:
        trunk = Scrambled().requires_grad_(False)
        for module in (trunk.norm, trunk.never):
            module.requires_grad_(True)
        trunk.never.weight.requires_grad_(False)
        flat = FlatGradients([p for p in trunk.parameters() if p.requires_grad])
        probe = BlockProbe(trunk)
        trunk(torch.ones(2, 3))
        where = slices_by_name(trunk)
        assert probe.blocks(flat).slices == (where["norm"], where["never"])
        assert probe.blocks(flat).last_weight == 0

    def test_need_a_forward(self) -> None:
        trunk = Scrambled()
        flat = FlatGradients([p for p in trunk.parameters() if p.requires_grad])
        with pytest.raises(ContractError, match="one forward of the trunk"):
            BlockProbe(trunk).blocks(flat)

    def test_watching_ends_with_the_first_forward(self) -> None:
        trunk = nn.Sequential(nn.Linear(3, 3), nn.ReLU())
        BlockProbe(trunk)
        trunk(torch.ones(1, 3))
        assert not any(module._forward_pre_hooks for module in trunk.modules())

    def test_a_watched_trunk_can_be_copied(self) -> None:
        trunk = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
        flat = FlatGradients(list(trunk.parameters()))
        probe = BlockProbe(trunk)
        copied = copy.deepcopy(trunk)
        copied(torch.ones(1, 3))
        with pytest.raises(ContractError, match="one forward of the trunk"):
            probe.blocks(flat)
        trunk(torch.ones(1, 3))
        assert probe.blocks(flat).slices == (slice(0, 12), slice(12, 24))


def plain_norm() -> nn.Module:
    return nn.BatchNorm2d(3)


def norm_with_activation() -> nn.Module:
    return BatchNormAct2d(3, act_layer=nn.ReLU)


def untracked_norm() -> nn.Module:
    return nn.BatchNorm2d(3, track_running_stats=False)


NORMS = [plain_norm, norm_with_activation]


def buffers(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in module.named_buffers()}


def flags(module: nn.Module) -> list[tuple[bool, bool | None]]:
    return [(m.training, getattr(m, "track_running_stats", None)) for m in module.modules()]


class FailureError(Exception):
    """Raised inside a context to see what it leaves behind."""


class TestUnmovedStatistics:
    @pytest.mark.parametrize("make", NORMS)
    def test_normalises_by_the_batch_and_moves_nothing(self, make: Callable[[], nn.Module]) -> None:
        norm, inputs = make(), images() + 3
        norm(inputs)
        before = buffers(norm)
        assert int(before["num_batches_tracked"]) == 1
        with unmoved_statistics(norm):
            found = norm(inputs)
        for name, value in buffers(norm).items():
            equal(value, before[name])
        equal(found, norm(inputs))
        assert int(norm.num_batches_tracked) == 2  # type: ignore[arg-type]

    @pytest.mark.parametrize("make", NORMS)
    def test_a_layer_in_evaluation_goes_on_using_its_own(
        self, make: Callable[[], nn.Module]
    ) -> None:
        norm, inputs = make().eval(), images() + 3
        expected = norm(inputs)
        with unmoved_statistics(norm):
            equal(norm(inputs), expected)

    def test_of_several_modules_that_overlap(self) -> None:
        net = conv_net()
        before = flags(net)
        with unmoved_statistics(net, net[1]):
            assert not net[1].track_running_stats
        assert flags(net) == before

    @pytest.mark.parametrize("make", [*NORMS, untracked_norm])
    def test_flags_are_put_back_after_a_failure(self, make: Callable[[], nn.Module]) -> None:
        norm = make()
        before = flags(norm)
        with contextlib.suppress(FailureError), unmoved_statistics(norm):
            raise FailureError
        assert flags(norm) == before


class TestEvaluationMode:
    @pytest.mark.parametrize("make", NORMS)
    def test_batch_norm_uses_its_own_statistics(self, make: Callable[[], nn.Module]) -> None:
        norm, inputs = make(), images() + 3
        norm(inputs)
        expected = copy.deepcopy(norm).eval()(inputs)
        before = buffers(norm)
        with evaluation_mode(norm):
            equal(norm(inputs), expected)
        for name, value in buffers(norm).items():
            equal(value, before[name])

    @pytest.mark.parametrize("make", NORMS)
    def test_batch_norm_may_use_those_of_the_batch(self, make: Callable[[], nn.Module]) -> None:
        norm, inputs = make(), images() + 3
        norm(inputs)
        expected = copy.deepcopy(norm)(inputs)
        before = buffers(norm)
        with evaluation_mode(norm, batch_statistics=True):
            equal(norm(inputs), expected)
        for name, value in buffers(norm).items():
            equal(value, before[name])

    def test_frozen_batch_norm_stays_frozen(self) -> None:
        norm, inputs = nn.BatchNorm2d(3).eval(), images() + 3
        with evaluation_mode(norm, batch_statistics=True):
            equal(norm(inputs), norm(inputs).clone())
            assert not norm.training

    @pytest.mark.parametrize("batch_statistics", [True, False])
    def test_dropout_is_off(self, batch_statistics: bool) -> None:
        net = nn.Sequential(nn.Dropout(0.5), nn.BatchNorm2d(3))
        with evaluation_mode(net, batch_statistics=batch_statistics):
            equal(net[0](images()), images())

    @pytest.mark.parametrize("fails", [True, False])
    def test_modes_are_put_back(self, fails: bool) -> None:
        net = nn.Sequential(nn.Dropout(), nn.BatchNorm2d(3), nn.BatchNorm2d(3), nn.Dropout())
        net[2].eval()
        net[3].eval()
        before = flags(net)
        assert len(set(before)) > 2  # a context that puts the whole net in one mode would be seen
        with contextlib.suppress(FailureError), evaluation_mode(net, batch_statistics=True):
            if fails:
                raise FailureError
        assert flags(net) == before


@pytest.fixture
def precision_of_products() -> Iterator[None]:
    """Put the switches of TensorFloat-32 back."""
    yield
    torch.backends.cuda.matmul.fp32_precision = "none"
    torch.set_float32_matmul_precision("highest")


class TestFullPrecision:
    def test_turns_autocast_off(self) -> None:
        ones = torch.ones(2, 2)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert (ones @ ones).dtype == torch.bfloat16
            with full_precision(CPU):
                assert (ones @ ones).dtype == torch.float32
            assert (ones @ ones).dtype == torch.bfloat16

    @pytest.mark.usefixtures("precision_of_products")
    @pytest.mark.parametrize("precision", ["highest", "high", "medium"])
    def test_turns_reduced_products_off(self, precision: str) -> None:
        torch.set_float32_matmul_precision(precision)
        with full_precision(CPU):
            assert torch.get_float32_matmul_precision() == "highest"
            assert not torch.backends.cuda.matmul.allow_tf32  # raises where switches disagree
        assert torch.get_float32_matmul_precision() == precision
        assert torch.backends.cuda.matmul.allow_tf32 == (precision != "highest")

    @pytest.mark.usefixtures("precision_of_products")
    def test_turns_reduced_products_off_where_the_newer_switch_set_them(self) -> None:
        matmul = torch.backends.cuda.matmul
        matmul.fp32_precision = "tf32"
        with full_precision(CPU):
            assert matmul.fp32_precision == "ieee"
        assert matmul.fp32_precision == "tf32"


class TestGenerators:
    def test_a_replay_draws_the_same_and_leaves_the_stream_alone(self) -> None:
        state = generator_state(CPU)
        first = torch.rand(3)
        before = torch.get_rng_state()
        with replayed(state, CPU):
            equal(torch.rand(3), first)
        equal(torch.get_rng_state(), before)

    def test_a_failed_replay_leaves_the_stream_alone(self) -> None:
        state = generator_state(CPU)
        torch.rand(3)
        before = torch.get_rng_state()
        with contextlib.suppress(FailureError), replayed(state, CPU):
            raise FailureError
        equal(torch.get_rng_state(), before)

    def test_seeding_is_that_of_torch(self) -> None:
        torch.manual_seed(11)
        expected = torch.rand(3)
        seed_generators(11, CPU)
        equal(torch.rand(3), expected)
