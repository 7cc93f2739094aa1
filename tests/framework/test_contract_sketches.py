"""Short forms of the field's methods and tasks, which show that the contract holds them.

They are the code of ``docs/contract.md``. The methods that ship are documented, tuned and complete.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from sklearn.datasets import load_diabetes
from torch import Tensor, nn
from torch.testing import assert_close
from torchmetrics import MeanSquaredError, Metric
from torchmetrics.classification import MulticlassAccuracy

from gradbench import registry, seeding
from gradbench.backbones import Backbone, BackboneProvider
from gradbench.branches import Branch, Branches, MemoryBranches
from gradbench.heldout import HeldOutExamples
from gradbench.losses import ExampleLosses, Scored, mean_loss
from gradbench.method import (
    TINY,
    Branching,
    Method,
    Scalarization,
    Setup,
    State,
    Weighting,
    Weights,
)
from gradbench.model import Features, LinearHead, Model
from gradbench.objectives import Classification
from gradbench.seeding import ExampleRandom
from gradbench.step import Step
from gradbench.surgery import Surgery
from gradbench.task import (
    Examples,
    Input,
    Objective,
    Preset,
    Source,
    Splits,
    TaskPair,
    TensorSet,
)

PAGE = Path(__file__).parents[2] / "docs" / "contract.md"
CANONICAL = ([1.0, 0.0], [-1.0, 1.0])  # two gradients in conflict, of lengths 1 and √2

MASK, IGNORED = 0, -100  # the token that stands for a hidden one; the target with no loss


# the sketches, in the order of the page


@dataclass(frozen=True)
class FAMO(Scalarization):
    scale = "mean"
    absorbs_auxiliary_weight = True
    rate: float = 0.025
    decay: float = 0.001

    def initial_state(self, setup: Setup) -> State:
        logits = torch.zeros(setup.objectives, dtype=setup.dtype, device=setup.device)
        adam = torch.optim.Adam([logits], lr=self.rate, weight_decay=self.decay)
        return {"logits": logits, "optimizer": adam}

    def weights_from_losses(self, losses: Tensor, step: Step) -> Tensor:
        weights: Tensor = step.state["logits"].softmax(0) / losses.clamp_min(TINY)
        return weights / weights.sum()

    def after_step(self, step: Step) -> None:
        decrease = step.losses.clamp_min(TINY).log() - step.reevaluate().clamp_min(TINY).log()
        share = step.state["logits"].softmax(0)
        step.state["logits"].grad = share * (decrease - share @ decrease)
        step.state["optimizer"].step()


@dataclass(frozen=True)
class GradNorm(Weighting):
    heads = "weighted"
    absorbs_auxiliary_weight = True
    alpha: float = 1.5
    rate: float = 0.025

    def initial_state(self, setup: Setup) -> State:
        weights = torch.ones(setup.objectives, dtype=setup.dtype, device=setup.device)
        return {"weights": weights, "optimizer": torch.optim.Adam([weights], lr=self.rate)}

    def weights_from_gramian(self, gramian: Tensor, step: Step) -> Tensor:
        learned: Tensor = step.state["weights"]
        used = learned.clone()
        norms = step.block_gramians[step.last_weight_block].diagonal().sqrt()
        ratios = step.losses / step.state.setdefault("first_losses", step.losses)
        target = (used * norms).mean() * (ratios / ratios.mean()) ** self.alpha
        learned.grad = (used * norms - target).sign() * norms
        step.state["optimizer"].step()
        learned.mul_(len(learned) / learned.sum())
        return used


@dataclass(frozen=True)
class IMTL(Weighting):
    heads = "weighted"
    host = True
    scale = "mean"
    absorbs_auxiliary_weight = True
    rate: float = 0.01

    def initial_state(self, setup: Setup) -> State:
        return {"log_scales": torch.zeros(setup.objectives, dtype=torch.float64)}

    def weights_from_gramian(self, gramian: Tensor, step: Step) -> Weights:
        scales = step.state["log_scales"].exp()
        scaled = gramian * torch.outer(scales, scales)
        shares = torch.linalg.pinv(scaled, hermitian=True) @ scaled.diagonal().sqrt()
        step.state["log_scales"] -= self.rate * (scales * step.losses.to(scales) - 1)
        return Weights(shared=scales * shares / shares.sum(), heads=scales)


@dataclass(frozen=True)
class SDMGrad(Weighting):
    batches = 3
    host = True
    scale = "mean"
    preference: float = 0.3
    inner_steps: int = 20
    inner_rate: float = 0.5

    def initial_state(self, setup: Setup) -> State:
        return {"weights": torch.ones(setup.objectives, dtype=torch.float64) / setup.objectives}

    def weights_from_gramian(self, gramian: Tensor, step: Step) -> Tensor:
        _, second, third = step.jacobians
        products = (second @ third.T).to(gramian)
        products /= products.diagonal().abs().mean().clamp_min(TINY)
        weights: Tensor = step.state["weights"]
        toward_mean = self.preference / len(products)
        for _ in range(self.inner_steps):
            weights = weights * torch.exp(-self.inner_rate * products @ (weights + toward_mean))
            weights = weights / weights.sum()
        step.state["weights"] = weights
        return (weights + toward_mean) / (1 + self.preference)


@dataclass(frozen=True)
class METATARTAN(Weighting):
    heads = "weighted"
    scale = "mean"
    needs_meta = True
    absorbs_auxiliary_weight = True
    rate: float = 0.1
    head_rate: float = 0.03

    def initial_state(self, setup: Setup) -> State:
        return {"logits": torch.zeros(setup.objectives, dtype=setup.dtype, device=setup.device)}

    def weights_from_gramian(self, gramian: Tensor, step: Step) -> Tensor:
        first, second = step.heldout(), step.heldout()
        head = first.new_head()
        optimizer = torch.optim.AdamW(head.parameters(), lr=self.head_rate, weight_decay=0.1)
        for _ in range(10):
            optimizer.zero_grad()
            torch.autograd.backward(first.loss(first.features, head))
            optimizer.step()
        wanted = second.gradient(head)
        logits: Tensor = step.state["logits"]
        logits += self.rate * nn.functional.cosine_similarity(step.jacobian, wanted[None])
        return logits.softmax(0)


@dataclass(frozen=True)
class AuxiLearn(Weighting):
    heads = "weighted"
    needs_meta = True
    absorbs_auxiliary_weight = True
    rate: float = 0.1
    inner_rate: float = 0.1
    terms: int = 3
    every: int = 30

    def initial_state(self, setup: Setup) -> State:
        return {"weights": torch.ones(setup.objectives, dtype=setup.dtype, device=setup.device)}

    def weights_from_gramian(self, gramian: Tensor, step: Step) -> Tensor:
        weights: Tensor = step.state["weights"]
        if step.index % self.every == 0:
            heldout = step.heldout()
            term = heldout.gradient(heldout.head)
            total = term.clone()
            for _ in range(self.terms):
                term = term - self.inner_rate * step.hvp(term, weights)
                total += term
            weights[1:] += self.rate * self.inner_rate * (step.jacobian[1:] @ total)
            weights[1:].clamp_(min=0)
        return weights.clone()


@dataclass(frozen=True)
class ForkMerge(Branching):
    needs_meta = True

    def epoch(self, branches: Branches) -> None:
        mixtures = torch.eye(branches.objectives)
        mixtures[:, 0] = 1.0  # every branch trains the primary, branch b > 0 also auxiliary b
        forks = [
            branches.train(mixture, branches.steps_per_epoch, optimizer=f"branch {b}")
            for b, mixture in enumerate(mixtures)
        ]
        forks.sort(key=branches.evaluate, reverse=True)
        kept = [1.0]
        for count in range(2, len(forks) + 1):
            trials = [[*kept, tenths / 10 * sum(kept) / count] for tenths in (0, 2, 4, 6, 8, 10)]
            kept = max(trials, key=lambda trial: branches.evaluate(mix(branches, forks, trial)))
        branches.commit(mix(branches, forks, kept))


def mix(branches: Branches, forks: Sequence[Branch], shares: list[float]) -> Branch:
    return branches.merge(forks[: len(shares)], [share / sum(shares) for share in shares])


@dataclass(frozen=True)
class AlphaVIL(Branching):
    needs_meta = True
    absorbs_auxiliary_weight = True
    rate: float = 0.1
    inner_steps: int = 5

    def initial_state(self, setup: Setup) -> State:
        ones = torch.ones(setup.objectives, dtype=setup.dtype, device=setup.device)
        return {"weights": ones}

    def epoch(self, branches: Branches) -> None:
        weights, start = branches.state["weights"], branches.vector(branches.start)
        forks = [branches.train(row, branches.steps_per_epoch) for row in weights.diag()]
        deltas = torch.stack([branches.vector(fork) - start for fork in forks])  # (K, P)
        alphas = torch.ones_like(weights)
        for _ in range(self.inner_steps):
            gradient = branches.gradient(branches.at(start + alphas @ deltas, forks))
            alphas -= self.rate * (deltas @ gradient)
        branches.state["weights"] = weights + alphas - 1
        branches.commit(branches.at(start + alphas @ deltas, forks))


class TokenHead(LinearHead):
    def forward(self, features: Features) -> Tensor:
        output: Tensor = self.linear(self.dropout(features.tokens))
        return output


class MaskedTokens(Objective):
    name, margin = "masked tokens", 0.01

    def __init__(self, vocabulary: int) -> None:
        self.vocabulary = vocabulary

    def head(self, width: int, dropout: float) -> nn.Module:
        return TokenHead(width, self.vocabulary, dropout)

    def batch(self, examples: Examples, random: ExampleRandom | None) -> tuple[Tensor, Tensor]:
        tokens = examples["tokens"]  # (B, T)
        if random is None:
            hidden = (torch.arange(tokens.shape[1]) % 7 == 0).expand_as(tokens)
        else:
            hidden = torch.from_numpy(random.uniform("mask", tokens.shape[1]) < 0.15)
        return tokens.masked_fill(hidden, MASK), tokens.masked_fill(~hidden, IGNORED)

    def loss(self, output: Tensor, target: Tensor) -> Scored:
        losses = nn.functional.cross_entropy(
            output.mT, target, ignore_index=IGNORED, reduction="none"
        )  # (B, T)
        hidden = (target != IGNORED).sum(1)
        return Scored(losses.sum(1) / hidden.clamp_min(1), hidden > 0)

    def metrics(self) -> dict[str, Metric]:
        accuracy = MulticlassAccuracy(self.vocabulary, ignore_index=IGNORED, average="micro")
        return {"accuracy": accuracy}

    def scores(self, output: Tensor) -> Tensor:
        return output.float().softmax(2).mT  # (B, vocabulary, T)


class Rotation(Classification):
    def batch(self, examples: Examples, random: ExampleRandom | None) -> tuple[Tensor, Tensor]:
        images = examples["image"]  # (B, C, H, W)
        drawn = np.zeros(len(images), np.int64) if random is None else random.integers("turns", 4)
        turns = torch.from_numpy(drawn)
        pairs = zip(images, turns.tolist(), strict=True)
        return torch.stack([image.rot90(turn, (1, 2)) for image, turn in pairs]), turns


class Findings(Classification):
    def batch(self, examples: Examples, random: ExampleRandom | None) -> tuple[Tensor, Tensor]:
        return examples["image"], examples["finding"]


def two_hospitals() -> tuple[Objective, ...]:
    return (
        Findings("our films", 5, margin=0.02, head_name="findings"),
        Findings("their films", 5, margin=0.02, head_name="findings"),
        Rotation("rotation", 4, margin=0.02),
    )


class Detached(LinearHead):
    def forward(self, features: Features) -> Tensor:
        return super().forward(Features(features.pooled.detach(), features.tokens.detach()))


class Null(Findings):
    def head(self, width: int, dropout: float) -> nn.Module:
        return Detached(width, self.classes, dropout)


class Perceptron(nn.Module):
    def __init__(self, inputs: int, width: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(inputs, width), nn.ReLU(), nn.Linear(width, width))

    def forward(self, rows: Tensor) -> Features:
        pooled = self.layers(rows)
        return Features(pooled, tokens=pooled[:, None])


class Perceptrons(BackboneProvider):
    def names(self, pattern: str) -> list[str]:
        return ["small"]

    def create(self, name: str, spec: Input, weights: str) -> Backbone:
        return Backbone(Perceptron(spec.channels, width=16), width=16)


class Column(Objective):
    margin, higher_is_better = 0.05, False

    def __init__(self, name: str) -> None:
        self.name = name

    def head(self, width: int, dropout: float) -> nn.Module:
        return LinearHead(width, 1, dropout)

    def batch(self, examples: Examples, random: ExampleRandom | None) -> tuple[Tensor, Tensor]:
        return examples["row"], examples[self.name]

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        return (output[:, 0] - target).square()

    def metrics(self) -> dict[str, Metric]:
        return {"squared error": MeanSquaredError()}

    def scores(self, output: Tensor) -> Tensor:
        return output[:, 0].float()


@dataclass(frozen=True)
class Diabetes(TaskPair):
    version, licence = "1.0", "BSD"
    citation = "Efron et al., Least Angle Regression, 2004, doi:10.1214/009053604000000067"
    sources: ClassVar[tuple[Source, ...]] = ("real",)
    presets: ClassVar[Mapping[str, Preset]] = {
        "default": Preset("perceptrons:small", {"train": 30, "validation": 30, "test": 100})
    }

    @property
    def input(self) -> Input:
        return Input(channels=9, size=1)

    def objectives(self) -> tuple[Objective, ...]:
        return Column("progression"), Column("body mass")

    def missing(self, root: Path) -> str | None:
        return None

    def splits(self, source: Source, root: Path, preset: Preset, seed: int) -> Splits:
        values = np.column_stack(load_diabetes(return_X_y=True)).astype(np.float32)
        table = torch.from_numpy((values - values.mean(0)) / values.std(0))
        columns = {"row": table[:, [0, 1, *range(3, 10)]]}
        columns |= {"body mass": table[:, 2], "progression": table[:, 10]}
        patients = TensorSet([f"patient-{row:03d}" for row in range(len(values))], columns)
        drawn = seeding.rng(seed, "split").permutation(len(values))
        *parts, rest = np.split(drawn, np.cumsum(list(preset.sizes.values())))
        train, validation, test = (patients.subset(part) for part in parts)
        return Splits(train, validation, test, (patients.subset(rest),), data_digest="sklearn")


# what the tests run them on


def vector(*numbers: float) -> Tensor:
    return torch.tensor(numbers, dtype=torch.float64)


class World:
    """A trunk θ and heads h = 1 with the losses ``h_k · (g_k · θ) + 1``: the gradients are the rows."""

    def __init__(self, *rows: Sequence[float], theta: Sequence[float] | None = None) -> None:
        self.rows = torch.tensor(rows, dtype=torch.float64)
        self.trunk, *self.heads = [
            nn.Linear(width, 1, bias=False, dtype=torch.float64)
            for width in (self.rows.shape[1], *(1 for _ in rows))
        ]
        self.theta = self.trunk.weight
        nn.init.zeros_(self.theta)
        if theta is not None:
            self.theta.data.copy_(vector(*theta))
        for head in self.heads:
            nn.init.ones_(head.weight)

    def losses(self, k: int, step: int = 0) -> Tensor:
        found: Tensor = self.heads[k](self.trunk(self.rows[k])) + 1
        return found

    def surgery(self, method: Method, **options: Any) -> Surgery:
        return Surgery(method, self.trunk, self.heads, objectives=len(self.rows), **options)

    def direction(self, surgery: Surgery, **options: Any) -> Tensor:
        batches = surgery.method.batches
        for head in self.heads:
            head.zero_grad()
        surgery.backward(
            *[[partial(self.losses, k)] * batches for k in range(len(self.rows))], **options
        )
        return surgery.direction.clone()

    def head_gradients(self) -> Tensor:
        return torch.cat([gradient_of(head)[0] for head in self.heads])

    def branches(
        self,
        method: Branching,
        *,
        steps: int = 1,
        momentum: float = 0.0,
        rate: float = 1.0,
        target: Sequence[float],
    ) -> MemoryBranches:
        """Return branches judged by the distance of θ to ``target``, trained by plain descent."""
        wanted = vector(*target)
        setup = Setup(len(self.rows), wanted.numel(), wanted.device, wanted.dtype)
        return MemoryBranches(
            nn.ModuleList([self.trunk, *self.heads]),
            self.trunk,
            self.heads,
            losses=[partial(self.losses, k) for k in range(len(self.rows))],
            meta_loss=lambda: 0.5 * (self.theta - wanted).square().sum()[None],
            metric=lambda: -(self.theta - wanted).norm().item(),
            optimizer=lambda parameters: torch.optim.SGD(parameters, lr=rate, momentum=momentum),
            steps_per_epoch=steps,
            state=method.initial_state(setup),
        )


def gradient_of(layer: nn.Linear) -> Tensor:
    assert layer.weight.grad is not None
    return layer.weight.grad


class Gain(nn.Module):
    """A head whose output rises with its input, however it is fitted."""

    def __init__(self) -> None:
        super().__init__()
        self.log = nn.Parameter(torch.randn(1, dtype=torch.float64))

    def forward(self, features: Tensor) -> Tensor:
        return features * self.log.exp()


def random_for(count: int) -> ExampleRandom:
    return ExampleRandom(7, np.zeros(count, np.int64), np.arange(count))


def model_of(objectives: Sequence[Objective], pixels: int = 27) -> Model:
    torch.manual_seed(0)
    return Model(nn.Sequential(nn.Flatten(), Perceptron(pixels, 8)), objectives, 8, dropout=0.0)


def loss_of(
    model: Model, objectives: Sequence[Objective], k: int, examples: Examples
) -> ExampleLosses:
    inputs, target = objectives[k].batch(examples, random_for(8))
    return objectives[k].loss(model(inputs, k), target)


def films() -> Examples:
    draw = torch.Generator().manual_seed(0)
    return {
        "image": torch.randn(8, 3, 3, 3, generator=draw),
        "finding": torch.randint(5, (8,), generator=draw),
    }


# the methods


def test_famo_weighs_by_inverse_losses_and_sums_to_one() -> None:
    world = World([1.0, 0.0], [0.0, 1.0], theta=[0.0, 3.0])  # losses 1 and 4
    assert_close(world.direction(world.surgery(FAMO())), vector(0.8, 0.2))


def test_famo_keeps_its_weights_where_all_logarithms_decrease_alike() -> None:
    world = World([1.0, 0.0], [1.0, 0.0], theta=[2.0, 0.0])
    surgery = world.surgery(FAMO(decay=0.0))
    world.direction(surgery)
    world.theta.data.sub_(0.5)
    surgery.after_step()
    assert surgery.state is not None
    assert_close(surgery.state["logits"], vector(0, 0), rtol=0, atol=1e-9)


def test_famo_turns_to_the_loss_that_decreased_least() -> None:
    world = World([1.0, 0.0], [0.0, 1.0], theta=[2.0, 2.0])
    surgery = world.surgery(FAMO(rate=0.1, decay=0.0))
    world.direction(surgery)
    world.theta.data.sub_(vector(1.0, 0.0))
    surgery.after_step()
    assert surgery.state is not None
    assert_close(surgery.state["logits"], vector(-0.1, 0.1))  # Adam's first step is its rate


def test_famo_looks_again_under_the_same_dropout() -> None:
    torch.manual_seed(0)
    trunk = nn.Sequential(nn.Linear(16, 16), nn.Dropout(0.5))
    surgery = Surgery(FAMO(decay=0.0), trunk, objectives=2)
    inputs = torch.randn(4, 16)
    for _ in range(3):
        surgery.backward(*[lambda: trunk(inputs).square().mean(1) for _ in range(2)])
        surgery.after_step()  # the weights of the network did not move
    assert surgery.state is not None
    assert_close(surgery.state["logits"], torch.zeros(2), rtol=0, atol=0)


def test_gradnorm_steps_along_the_sign_of_what_a_norm_is_above_its_target() -> None:
    world = World([1.0, 0.0, 0.0], [0.0, 4.0, 0.0], [0.0, 0.0, 0.5])
    surgery = world.surgery(GradNorm())
    assert_close(world.direction(surgery), vector(1, 4, 0.5))
    assert surgery.state is not None
    assert_close(surgery.state["weights"].grad, vector(-1, 4, -0.5))
    assert_close(surgery.state["weights"].sum(), torch.tensor(3.0, dtype=torch.float64))


def test_gradnorm_rests_where_weighted_norms_are_equal() -> None:
    world = World([1.0, 0.0, 0.0], [0.0, 4.0, 0.0], [0.0, 0.0, 0.5])
    surgery = world.surgery(GradNorm(rate=0.02))
    for _ in range(300):
        direction = world.direction(surgery)
    inverse = 1 / vector(1, 4, 0.5)
    weights = 3 * inverse / inverse.sum()
    assert_close(direction, weights @ world.rows, rtol=0, atol=0.04)  # it swings by about its rate


def test_gradnorm_goes_on_from_a_checkpoint() -> None:
    world = World([1.0, 0.0], [0.0, 4.0])
    surgery, resumed = world.surgery(GradNorm()), world.surgery(GradNorm())
    world.direction(surgery)
    saved = surgery.state_dict()
    expected = [world.direction(surgery) for _ in range(3)]
    resumed.load_state_dict(saved)
    assert_close([world.direction(resumed) for _ in range(3)], expected, rtol=0, atol=0)


def test_imtl_projects_equally_on_both_gradients() -> None:
    world = World(*CANONICAL)
    direction = world.direction(world.surgery(IMTL()))
    assert_close(direction, vector(0.17157, 0.41421), rtol=0, atol=1e-5)


def test_imtl_weighs_heads_by_the_learned_scales_alone() -> None:
    world = World(*CANONICAL, theta=[3.0, 2.0])
    surgery = world.surgery(IMTL())
    assert surgery.state is not None
    surgery.state["log_scales"].copy_(vector(2, 4).log())
    shares = 1 / vector(2, 4 * 2**0.5)  # of the scaled gradients
    expected = vector(2, 4) * shares / shares.sum() @ world.rows
    assert_close(world.direction(surgery), expected)
    assert_close(world.head_gradients(), vector(2 * 3, 4 * -1))


@pytest.mark.parametrize("preference", [0.0, 0.3])
def test_sdmgrad_without_noise_is_mgda(preference: float) -> None:
    world = World(*CANONICAL)
    surgery = world.surgery(SDMGrad(preference=preference, inner_steps=200))
    assert_close(world.direction(surgery), vector(0.2, 0.4), rtol=0, atol=1e-6)


def test_sdmgrad_weighs_by_two_batches_what_it_takes_from_the_first() -> None:
    draw = torch.Generator().manual_seed(0)
    first, second, third = torch.randn(3, 2, 4, generator=draw, dtype=torch.float64)
    trunk = nn.Linear(4, 1, bias=False, dtype=torch.float64)
    surgery = Surgery(SDMGrad(preference=0.0, inner_steps=1), trunk)
    surgery.backward(*[[trunk(batch[k]) for batch in (first, second, third)] for k in range(2)])
    products = second @ third.T
    logits = -0.5 * products.mean(1) / products.diagonal().abs().mean()
    assert_close(surgery.direction, logits.softmax(0) @ first)


def test_a_head_is_trained_on_the_first_of_several_batches() -> None:
    world = World(*CANONICAL, theta=[3.0, 2.0])
    world.direction(world.surgery(SDMGrad()))
    assert_close(world.head_gradients(), world.rows @ vector(3, 2))


def test_meta_tartan_follows_the_cosine_with_the_second_held_out_batch() -> None:
    world = World([1.0, 0.0], [-0.5, 0.75**0.5], theta=[1.0, 2.0])
    batches = iter([vector(0, 1), vector(1, 0)])

    def heldout() -> HeldOutExamples:
        row = next(batches)
        return HeldOutExamples(
            forward=lambda: world.trunk(row), loss=lambda x, head: head(x), new_head=Gain
        )

    direction = world.direction(world.surgery(METATARTAN()), heldout=heldout)
    weights = vector(0.53743, 0.46257)
    assert_close(direction, weights @ world.rows, rtol=0, atol=1e-5)
    expected = weights * (world.rows @ world.theta[0].detach())
    assert_close(world.head_gradients(), expected, rtol=0, atol=2e-5)


def test_a_held_out_pass_has_no_dropout_and_moves_no_statistics() -> None:
    def result(seed: int) -> Tensor:
        torch.manual_seed(0)
        norm = nn.BatchNorm1d(4)
        trunk = nn.Sequential(nn.Linear(4, 4), norm, nn.Dropout(0.5))
        inputs, rows = torch.randn(2, 8, 4)
        losses = [trunk(inputs)[:, k].square() for k in range(2)]
        statistics = [buffer.clone() for buffer in norm.buffers()]
        heldout = HeldOutExamples(
            forward=lambda: trunk(rows),
            loss=lambda features, head: head(features)[:, 0].square(),
            new_head=lambda: nn.Sequential(nn.Dropout(0.5), nn.Linear(4, 1)),
        )
        torch.manual_seed(seed)
        surgery = Surgery(METATARTAN(), trunk, [nn.Identity(), nn.Identity()])
        surgery.backward(*losses, heldout=lambda: heldout)
        assert_close(list(norm.buffers()), statistics, rtol=0, atol=0)
        return surgery.direction

    assert_close(result(1), result(2), rtol=0, atol=0)


def test_auxilearn_moves_its_weight_by_the_truncated_series() -> None:
    curvature, centre, wanted = vector(1, 2), vector(0, -1), 3.0
    trunk = nn.Linear(1, 1, bias=False, dtype=torch.float64)
    nn.init.ones_(trunk.weight)
    one = vector(1)
    surgery = Surgery(AuxiLearn(), trunk, [nn.Identity(), nn.Identity()])
    surgery.backward(
        *[lambda k=k: 0.5 * curvature[k] * (trunk(one) - centre[k]) ** 2 for k in range(2)],
        heldout=lambda: HeldOutExamples(
            forward=lambda: trunk(one),
            loss=lambda x, head: 0.5 * (head(x) - wanted) ** 2,
            new_head=nn.Identity,
            head=nn.Identity(),
        ),
    )
    series = sum((1 - 0.1 * 3) ** power for power in range(4))  # 0.1 the rate, 3 the Hessian
    weight = 1 + 0.1 * 0.1 * (1 - wanted) * series * 4  # 4 the auxiliary gradient
    assert_close(surgery.direction, vector(1 + weight * 4))


def test_forkmerge_finds_the_best_share_of_its_grid() -> None:
    world = World([-1.0], [-1.0])  # the branches end at 1 and at 2
    branches = world.branches(ForkMerge(), target=[1.2])
    ForkMerge().epoch(branches)
    assert_close(world.theta[0].detach(), vector((1 + 0.3 * 2) / 1.3))


@pytest.mark.parametrize("seed", range(5))
def test_forkmerge_is_no_worse_than_its_best_branch(seed: int) -> None:
    draw = np.random.default_rng(seed)
    world = World(*draw.normal(size=(3, 4)).tolist())
    branches = world.branches(ForkMerge(), target=draw.normal(size=4).tolist())
    mixtures = torch.tensor([[1, 0, 0], [1, 1, 0], [1, 0, 1]])
    best = max(branches.evaluate(branches.train(mixture, 1)) for mixture in mixtures)
    ForkMerge().epoch(branches)
    assert branches.evaluate(branches.start) >= best


def test_alphavil_steps_along_its_deltas() -> None:
    world = World([-1.2])
    branches = world.branches(AlphaVIL(), target=[2.0])
    AlphaVIL(rate=0.1, inner_steps=1).epoch(branches)
    assert_close(branches.state["weights"], vector(1.096))
    assert_close(world.theta[0].detach(), vector(1.096 * 1.2))


def test_alphavil_after_one_step_a_task_is_a_weighted_sum() -> None:
    world = World([1.0, 0.0, 2.0], [0.5, -1.0, 0.0], theta=[1.0, 1.0, 1.0])
    branches = world.branches(AlphaVIL(), rate=0.1, target=[0.0, 3.0, 0.0])
    before = branches.state["weights"].copy_(vector(0.5, 2))
    AlphaVIL(inner_steps=3).epoch(branches)
    alphas = branches.state["weights"] - before + 1
    assert (alphas - 1).abs().min() > 1e-3
    expected = vector(1, 1, 1) - 0.1 * (alphas * before) @ world.rows
    assert_close(world.theta[0].detach(), expected)
    heads = torch.cat([head.weight.detach()[0] for head in world.heads])
    assert_close(heads, 1 - 0.1 * before * (world.rows @ vector(1, 1, 1)))  # each in its own branch


# the branches


def test_an_optimizer_goes_on_under_its_name_alone() -> None:
    branches = World([1.0]).branches(ForkMerge(), momentum=0.9, target=[0.0])
    names = ("a", None, "b", "a", None)
    forks = [branches.train(torch.ones(1), 1, optimizer=name) for name in names]
    assert [branches.vector(fork).item() for fork in forks] == [-1, -1, -1, -1.9, -1]
    assert [fork.optimizer is None for fork in forks] == [name is None for name in names]
    optimizers = [fork.optimizer for fork in (forks[0], forks[3])]
    assert [kept and kept["state"][0]["momentum_buffer"].item() for kept in optimizers] == [1, 1.9]


def test_branches_of_an_epoch_see_the_same_steps() -> None:
    world = World([1.0], [1.0])
    branches = world.branches(ForkMerge(), steps=2, target=[0.0])
    seen: list[int] = []
    branches._losses = [lambda step: seen.append(step) or world.losses(0)] * 2  # type: ignore[func-returns-value]
    branches.begin(3)
    for _ in range(2):
        branches.train(vector(1, 0), 2)
    assert seen == [6, 7, 6, 7]


def test_random_numbers_of_an_epoch_are_a_function_of_it() -> None:
    branches = World([1.0]).branches(ForkMerge(), target=[0.0])
    first = branches.rng.random()
    branches.rng.random()
    branches.begin(1)
    second = branches.rng.random()
    branches.begin(0)
    assert branches.rng.random() == first != second


def test_merging_combines_what_is_floating_and_copies_what_counts() -> None:
    torch.manual_seed(0)
    trunk, inputs = nn.BatchNorm1d(2), torch.randn(8, 2)
    branches = MemoryBranches(
        trunk,
        trunk,
        [nn.Identity()],
        losses=[lambda step: (trunk(inputs + step) - 1).square().sum(1)],
        meta_loss=lambda: trunk(inputs).sum(1),
        metric=lambda: trunk(inputs).sum().item(),
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.1),
        steps_per_epoch=3,
    )
    forks = [branches.train(torch.ones(1), steps) for steps in (1, 3)]
    merged = branches.merge(forks, [0.25, 0.75])
    assert merged.buffers["num_batches_tracked"] == 1
    few, many = ({**fork.parameters, **fork.buffers} for fork in forks)
    for key, value in {**merged.parameters, **merged.buffers}.items():
        if value.is_floating_point():
            assert (few[key] - many[key]).abs().max() > 1e-3
            assert_close(value, 0.25 * few[key] + 0.75 * many[key])
    for look in (branches.evaluate, branches.gradient):
        look(forks[1])
        assert_close(branches.snapshot().buffers, forks[1].buffers, rtol=0, atol=0)  # none moved


def test_a_diverged_branch_with_no_share_leaves_no_trace() -> None:
    world = World([1.0])
    branches = world.branches(ForkMerge(), target=[0.0])
    lost = branches.train(torch.tensor([float("nan")]), 1)
    merged = branches.merge([branches.start, lost], [1.0, 0.0])
    assert branches.vector(merged).item() == 0


def test_a_vector_fits_the_gradient_under_any_strides() -> None:
    trunk = nn.Conv2d(2, 3, 3).to(memory_format=torch.channels_last)
    branches = MemoryBranches(
        trunk,
        trunk,
        [nn.Identity()],
        losses=[],
        meta_loss=lambda: 0.5 * (trunk.weight.square().sum() + trunk.bias.square().sum())[None],  # type: ignore[union-attr]
        metric=lambda: 0.0,
        optimizer=torch.optim.SGD,
        steps_per_epoch=1,
    )
    found = branches.vector(branches.start)
    assert_close(branches.gradient(branches.start), found)  # the gradient of ½ θ² is θ
    moved = branches.at(2 * found, [branches.start])
    assert_close(moved.parameters["weight"], 2 * trunk.weight.detach())


# the tasks


def test_an_example_without_a_hidden_token_has_no_weight() -> None:
    objective = MaskedTokens(vocabulary=11)
    tokens = torch.randint(1, 11, (16, 4), generator=torch.Generator().manual_seed(0))
    inputs, target = objective.batch({"tokens": tokens}, random_for(16))
    hidden = inputs == MASK
    torch.manual_seed(0)
    width = 8
    embedding, head = nn.Embedding(11, width), objective.head(width, 0.0)
    embedded = embedding(inputs)
    output = head(Features(embedded.mean(1), embedded))
    losses = objective.loss(output, target)
    expected = [
        nn.functional.cross_entropy(scores[where], row[where])
        for scores, row, where in zip(output, tokens, hidden, strict=True)
        if where.any()
    ]
    assert 0 < len(expected) < 16
    assert_close(losses.weight, hidden.any(1))
    assert_close(mean_loss(losses), torch.stack(expected).mean())
    metric = next(iter(objective.metrics().values()))
    accuracy = metric(objective.scores(output.detach()), target)
    assert_close(accuracy, (output.argmax(2) == tokens)[hidden].float().mean())


def test_a_rotation_belongs_to_the_example() -> None:
    objective = Rotation("rotation", 4, margin=0.02)
    images = torch.arange(32 * 9.0).reshape(32, 1, 3, 3)
    turned, turns = objective.batch({"image": images}, random_for(32))
    assert set(turns.tolist()) == {0, 1, 2, 3}
    for image, original, turn in zip(turned, images, turns.tolist(), strict=True):
        assert_close(image.rot90(-turn, (1, 2)), original)
    last = ExampleRandom(7, np.zeros(1, np.int64), np.array([31]))
    assert objective.batch({"image": images[-1:]}, last)[1] == turns[-1]


def test_a_shared_head_is_part_of_the_shared_parameters() -> None:
    objectives = two_hospitals()
    model = model_of(objectives)
    surgery = Surgery("pcgrad", model.shared)
    surgery.backward(*[loss_of(model, objectives, k, films()) for k in range(3)])
    assert model.head(0) is model.head(1)
    in_head = {id(parameter) for parameter in model.head(0).parameters()}
    used = torch.cat(
        [torch.full((p.numel(),), id(p) in in_head) for p in model.shared.parameters()]
    )
    jacobian = surgery.step.jacobian
    assert used.sum() == 5 * 8 + 5
    assert [bool(row[used].any()) for row in jacobian] == [True, True, False]
    assert all(row[~used].any() for row in jacobian)


SKETCHES = {cls.__name__: cls() for cls in (FAMO, GradNorm, IMTL, SDMGrad, METATARTAN, AuxiLearn)}
STEP_METHODS = [
    row.name
    for row in registry.listing(registry.METHODS)
    if row.distribution == registry.DISTRIBUTION and row.kind != "branching"
]


@pytest.mark.parametrize("name", [*STEP_METHODS, *SKETCHES])
def test_a_null_objective_leaves_a_finite_direction(name: str) -> None:
    objectives = (Findings("films", 5, margin=0.02), Null("null", 5, margin=0.02))
    model = model_of(objectives)
    heads = [model.own_head(k) for k in range(2)]
    method = SKETCHES.get(name, name)
    surgery = Surgery(method, model.shared, heads, objectives=2, steps_per_epoch=2)
    primary, null = (partial(loss_of, model, objectives, k, films()) for k in range(2))
    images, findings = objectives[0].batch(films(), None)
    held_out = HeldOutExamples(
        forward=lambda: model.backbone(images),
        loss=lambda features, head: objectives[0].loss(head(features), findings),
        new_head=lambda: objectives[0].head(8, 0.0),
        head=model.head(0),
    )
    count = surgery.method.batches
    for _ in range(3):
        surgery.backward(
            [primary] * count, [null] * count, sketch=primary, heldout=lambda: held_out
        )
        surgery.after_step()
        assert surgery.direction.isfinite().all()
    if name == "pcgrad-asymmetric":
        assert not surgery.step.jacobian[1].any()
        assert_close(surgery.direction, surgery.step.jacobian[0], rtol=0, atol=0)


def test_a_table_is_a_task_pair_with_its_own_backbone() -> None:
    pair = Diabetes()
    preset = pair.presets["default"]
    splits = pair.splits("real", Path(), preset, seed=0)
    splits.check()
    assert [*splits.sizes().values(), len(splits.auxiliaries[0])] == [30, 30, 100, 0, 442 - 160]
    assert splits.digest() == pair.splits("real", Path(), preset, seed=0).digest()
    assert splits.digest() != pair.splits("real", Path(), preset, seed=1).digest()
    objectives = pair.objectives()
    torch.manual_seed(0)
    backbone = Perceptrons().create("small", pair.input, "none")
    model = Model(backbone.module, objectives, backbone.width, dropout=0.0)
    data = (splits.train, *splits.auxiliaries)
    everything = [
        objective.batch(part.take(np.arange(len(part))), None)
        for objective, part in zip(objectives, data, strict=True)
    ]
    surgery, optimizer = Surgery("pcgrad", model.shared), torch.optim.Adam(model.parameters(), 0.01)
    first: Tensor | None = None
    for _ in range(60):
        optimizer.zero_grad()
        surgery.backward(
            *[objectives[k].loss(model(x, k), y) for k, (x, y) in enumerate(everything)]
        )
        optimizer.step()
        first = surgery.step.losses if first is None else first
    assert first is not None
    assert (surgery.step.losses < 0.8 * first).all()


# the page


def definitions(source: str) -> dict[str, str]:
    """Return the source of every class and function of a module, and of nothing else."""
    lines = source.splitlines()
    found: dict[str, str] = {}
    for node in ast.parse(source).body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            first = min(part.lineno for part in (node, *node.decorator_list))
            found[node.name] = "\n".join(lines[first - 1 : node.end_lineno])
    return found


def test_the_page_shows_the_code_that_is_tested() -> None:
    tested = Path(__file__).read_text(encoding="utf-8").partition("# what the tests run them on")[0]
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    assert [len(definitions(block)) for block in blocks] == [
        len(ast.parse(block).body) for block in blocks
    ]
    shown = {name: text for block in blocks for name, text in definitions(block).items()}
    assert shown == definitions(tested)
