from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from timm.layers.norm_act import BatchNormAct2d
from torch import Tensor, nn
from torchmetrics import Metric

from gradbench.gradients import unmoved_statistics
from gradbench.model import (
    Features,
    LinearHead,
    Model,
    has_batch_norm,
    initialised_from,
    statistics_for,
    training_mode,
    weights_digest,
)
from gradbench.seeding import ExampleRandom
from gradbench.settings import BatchNormPolicy
from gradbench.task import Examples, Objective


def equal(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


class Backbone(nn.Module):
    """Four features of an image, with batch norm."""

    def __init__(self, norm: Callable[[int], nn.Module] = nn.BatchNorm2d) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.norm = norm(4)

    def forward(self, images: Tensor) -> Features:
        maps = self.norm(self.conv(images))
        return Features(maps.mean((2, 3)), maps.flatten(2).mT)


class Sorting(Objective):
    """An objective of which the head alone matters."""

    def __init__(self, outputs: int, head_name: str | None = None) -> None:
        self.name, self.outputs, self.head_name, self.margin = "sorting", outputs, head_name, 0.1

    def head(self, width: int, dropout: float) -> nn.Module:
        return LinearHead(width, self.outputs, dropout)

    def batch(self, examples: Examples, random: ExampleRandom | None) -> tuple[Any, Any]:
        raise NotImplementedError

    def loss(self, output: Any, target: Any) -> Tensor:
        raise NotImplementedError

    def metrics(self) -> dict[str, Metric]:
        raise NotImplementedError


def model_of(
    objectives: Sequence[Objective], norm: Callable[[int], nn.Module] = nn.BatchNorm2d
) -> Model:
    with initialised_from(0):
        return Model(Backbone(norm), objectives, width=4, dropout=0.5)


def images() -> Tensor:
    return torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1)) + 2


class TestModel:
    def test_heads_are_an_objectives_own(self) -> None:
        model = model_of([Sorting(2), Sorting(2), Sorting(3)])
        heads = [model.head(k) for k in range(3)]
        assert len(set(map(id, heads))) == 3
        assert [model.own_head(k) for k in range(3)] == heads
        backbone = list(model.backbone.parameters())
        assert [id(p) for p in model.shared.parameters()] == [id(p) for p in backbone]

    def test_heads_of_one_name_are_one_and_shared(self) -> None:
        model = model_of([Sorting(2, "a"), Sorting(3), Sorting(2, "a"), Sorting(5, "b")])
        assert model.head(0) is model.head(2)
        assert model.head(0) is not model.head(3)
        shared = {id(p) for p in model.shared.parameters()}
        expected = [*model.backbone.parameters(), *model.head(0).parameters()]
        assert shared == {id(p) for p in expected}
        assert not list(model.own_head(0).parameters())
        assert not list(model.own_head(2).parameters())
        assert model.own_head(1) is model.head(1)
        assert model.own_head(3) is model.head(3)  # a name that nobody shares

    def test_every_parameter_is_there_once(self) -> None:
        model = model_of([Sorting(2, "a"), Sorting(3), Sorting(2, "a")])
        parts = [model.shared, *(model.own_head(k) for k in range(3))]
        found = [id(p) for part in parts for p in part.parameters()]
        assert sorted(found) == sorted(id(p) for p in model.parameters())

    def test_returns_what_the_head_makes_of_the_features(self) -> None:
        model = model_of([Sorting(2), Sorting(3)]).eval()
        for k in range(2):
            output = model(images(), k)
            features = model.backbone(images())
            equal(output, model.get_submodule(f"own.head{k}.linear")(features.pooled))
        equal(model(images()), model(images(), 0))

    def test_new_primary_heads_are_no_part_of_it(self) -> None:
        model = model_of([Sorting(2), Sorting(3)])
        before = weights_digest(model.state_dict())
        one, other = model.new_primary_head(), model.new_primary_head()
        assert one.get_parameter("linear.weight").shape == (2, 4)
        assert not torch.equal(
            one.get_parameter("linear.weight"), other.get_parameter("linear.weight")
        )
        assert weights_digest(model.state_dict()) == before

    def test_can_be_copied_and_sent(self) -> None:
        model = model_of([Sorting(2), Sorting(3)])
        for made in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert weights_digest(made.state_dict()) == weights_digest(model.state_dict())
            assert made.new_primary_head().get_parameter("linear.weight").shape == (2, 4)

    def test_dropout_of_a_head(self) -> None:
        head = LinearHead(4, 2, 0.5)
        features = Features(torch.ones(1000, 4), torch.ones(1000, 1, 4))
        assert len(head(features).unique(dim=0)) > 2
        assert len(head.eval()(features).unique(dim=0)) == 1


class TestInitialisation:
    def test_is_a_function_of_the_seed(self) -> None:
        found = []
        for seed, axes, before in ((1, (), 0), (1, (), 9), (2, (), 0), (1, ("head",), 0)):
            torch.manual_seed(before)
            with initialised_from(seed, *axes):
                found.append(weights_digest(nn.Linear(4, 4).state_dict()))
        assert found[0] == found[1]
        assert len(set(found)) == 3

    def test_leaves_the_global_generator_as_it_was(self) -> None:
        state = torch.get_rng_state()
        with initialised_from(1):
            torch.rand(3)
        equal(torch.get_rng_state(), state)
        with pytest.raises(ZeroDivisionError), initialised_from(1):
            raise ZeroDivisionError
        equal(torch.get_rng_state(), state)


def buffers(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.named_buffers()}


NORMS = [nn.BatchNorm2d, BatchNormAct2d]


class TestBatchNorm:
    @pytest.mark.parametrize("norm", NORMS)
    @pytest.mark.parametrize(
        ("policy", "objective", "primary_in_phase", "follows"),
        [
            ("primary", 0, True, True),
            ("primary", 1, True, False),
            ("primary", 1, False, True),
            ("shared", 0, True, True),
            ("shared", 1, True, True),
            ("shared", 1, False, True),
            ("frozen", 0, True, False),
            ("frozen", 1, True, False),
            ("frozen", 1, False, False),
        ],
    )
    def test_statistics_follow_the_batches_of_the_policy(
        self,
        norm: Callable[[int], nn.Module],
        policy: BatchNormPolicy,
        objective: int,
        primary_in_phase: bool,
        follows: bool,
    ) -> None:
        model = model_of([Sorting(2), Sorting(3)], norm)
        training_mode(model, policy)
        before = buffers(model)
        with statistics_for(model, policy, objective, primary_in_phase):
            pooled = model.backbone(images()).pooled.detach()
        after = buffers(model)
        moved = [not torch.equal(after[name], before[name]) for name in before]
        assert moved == [follows] * 3  # mean, variance and the number of batches
        if policy == "frozen":  # mean 0 and variance 1, as they were made
            assert float(pooled.mean().abs()) > 0.1
        elif norm is nn.BatchNorm2d:
            torch.testing.assert_close(
                pooled.mean(0), torch.zeros(4), rtol=0, atol=1e-5
            )  # normalised by the batch, also where statistics stand still

    def test_is_put_back_after_a_failure(self) -> None:
        model = model_of([Sorting(2), Sorting(3)])
        with pytest.raises(ZeroDivisionError), statistics_for(model, "primary", 1, True):
            raise ZeroDivisionError
        before = buffers(model)
        model.backbone(images())
        assert not torch.equal(
            buffers(model)["shared.backbone.norm.running_mean"],
            before["shared.backbone.norm.running_mean"],
        )

    @pytest.mark.parametrize("policy", ["primary", "shared", "frozen"])
    def test_mode(self, policy: BatchNormPolicy) -> None:
        model = model_of([Sorting(2), Sorting(3)]).eval()
        training_mode(model, policy)
        for module in model.modules():
            is_norm = isinstance(module, nn.BatchNorm2d)
            assert module.training == (not is_norm or policy != "frozen")

    def test_is_found(self) -> None:
        assert has_batch_norm(model_of([Sorting(2)]))
        assert has_batch_norm(model_of([Sorting(2)], BatchNormAct2d))
        assert not has_batch_norm(model_of([Sorting(2)], lambda width: nn.GroupNorm(2, width)))

    def test_passes_beside_the_loop_do_not_count(self) -> None:
        model = model_of([Sorting(2)])
        before = buffers(model)
        with unmoved_statistics(model):
            model(images())
        for name, value in buffers(model).items():
            equal(value, before[name])


class TestDigest:
    def test_is_pinned(self) -> None:
        state = {"b": torch.arange(3.0), "a": torch.tensor([True]), "n": torch.tensor(7)}
        expected = "92a15901d41ed7ff522ca618a04ef18a1d0a4d3a9bd69a8c4dbe485de787b51a"
        assert weights_digest(state) == expected
        assert weights_digest(dict(reversed(state.items()))) == expected

    def test_depends_on_names_types_shapes_and_bits(self) -> None:
        ones = torch.ones(2, 3)
        states: list[dict[str, Tensor]] = [
            {"a": ones},
            {"b": ones},
            {"a": ones.double()},
            {"a": ones.bfloat16()},
            {"a": ones.flatten()},
            {"a": ones.T},
            {"a": -ones},
            {"a": ones, "b": ones},
            {"a": torch.zeros(0)},
            {"a": torch.zeros(1)},
            {"a": torch.tensor(0.0)},
            {"a": torch.tensor(-0.0)},
        ]
        assert len({weights_digest(state) for state in states}) == len(states)

    def test_does_not_depend_on_the_memory_format(self) -> None:
        model = model_of([Sorting(2)])
        before = weights_digest(model.state_dict())
        moved = model.to(memory_format=torch.channels_last)
        assert not moved.get_parameter("shared.backbone.conv.weight").is_contiguous()
        assert weights_digest(moved.state_dict()) == before
