from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn
from torch.testing import assert_close
from torchmetrics import Metric

from gradbench.errors import DataError
from gradbench.losses import Scored, mean_loss
from gradbench.model import Features, Model
from gradbench.objectives import MEAN, SPREAD, MeanAUROC, MultiLabel, flip, image_input, shift
from gradbench.seeding import ExampleRandom
from gradbench.task import Examples, TensorSet
from gradbench.training.evaluation import evaluate

NAN = math.nan
LABELS = ("edema", "effusion", "fracture")
# torchmetrics adds up areas of float32, sklearn of float64
AREA = 1e-6


class Findings(MultiLabel):
    def batch(self, examples: Examples, random: ExampleRandom | None) -> tuple[Tensor, Tensor]:
        return examples["row"], examples["target"]


def findings(labels: tuple[str, ...] = LABELS) -> Findings:
    return Findings("findings", labels, margin=0.02)


def drawn(seed: int, count: int = 200, ties: bool = False) -> tuple[Tensor, Tensor]:
    """Return scores that say something of targets, of which a third is unknown."""
    draw = np.random.default_rng(seed)
    target = (draw.random((count, len(LABELS))) < 0.3).astype(np.float32)
    score = np.clip(0.3 * target + 0.7 * draw.random(target.shape), 0, 1).astype(np.float32)
    target[draw.random(target.shape) < 1 / 3] = NAN
    return torch.from_numpy(score.round(1) if ties else score), torch.from_numpy(target)


def area(score: Tensor, target: Tensor) -> float:
    known = ~target.isnan()
    return float(roc_auc_score(target[known].numpy(), score[known].numpy()))


def values(objective: MultiLabel, score: Tensor, target: Tensor) -> dict[str, float]:
    found = {}
    for name, metric in objective.metrics().items():
        metric.update(score, target)
        found[name] = float(metric.compute())
    return found


class TestLoss:
    def test_it_is_the_mean_over_what_is_known(self) -> None:
        output = torch.tensor([[0.5, -2.0, 1.0], [3.0, 0.0, -1.0], [1.0, 1.0, 1.0]])
        target = torch.tensor([[1.0, 0.0, NAN], [NAN, NAN, 1.0], [NAN, NAN, NAN]])
        losses, weight = findings().loss(output, target)
        first = (math.log1p(math.exp(-0.5)) + math.log1p(math.exp(-2.0))) / 2
        assert losses.tolist() == pytest.approx([first, math.log1p(math.exp(1.0)), 0.0])
        assert weight.tolist() == [1.0, 1.0, 0.0]
        assert weight.dtype == losses.dtype
        total = first + math.log1p(math.exp(1.0))
        assert float(mean_loss(Scored(losses, weight))) == pytest.approx(total / 2)

    def test_gradients_are_finite_and_those_of_unknown_labels_zero(self) -> None:
        target = torch.tensor([[1.0, NAN, 0.0], [NAN, NAN, NAN]])
        output = torch.full((2, 3), 200.0, requires_grad=True)
        torch.autograd.backward(mean_loss(findings().loss(output, target)))
        assert output.grad is not None
        assert_close(output.grad, torch.tensor([[0.0, 0.0, 0.5], [0.0, 0.0, 0.0]]))

    def test_without_anything_known_it_is_zero(self) -> None:
        output = torch.randn(2, 3, generator=torch.Generator().manual_seed(0), requires_grad=True)
        loss = mean_loss(findings().loss(output, torch.full((2, 3), NAN)))
        torch.autograd.backward(loss)
        assert float(loss.detach()) == 0
        assert output.grad is not None
        assert not output.grad.any()

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_it_has_the_precision_of_the_target(self, dtype: torch.dtype) -> None:
        losses, _ = findings().loss(
            torch.ones(1, 3, dtype=torch.bfloat16), torch.ones(1, 3).to(dtype)
        )
        assert losses.dtype == dtype

    def test_head_and_scores_have_an_entry_a_label(self) -> None:
        features = Features(torch.randn(4, 5), torch.randn(4, 2, 5))
        output = findings().head(5, 0.0)(features)
        scores = findings().scores(output.to(torch.bfloat16))
        assert scores.shape == (4, 3)
        assert scores.dtype == torch.float32
        assert bool(((scores >= 0) & (scores <= 1)).all())


class TestAUROC:
    @pytest.mark.parametrize("ties", [False, True])
    @pytest.mark.parametrize("seed", range(5))
    def test_it_is_that_of_scikit_learn(self, seed: int, ties: bool) -> None:
        score, target = drawn(seed, ties=ties)
        expected = [area(score[:, i], target[:, i]) for i in range(3)]
        found = values(findings(), score, target)
        assert list(found) == ["auroc", *(f"auroc {label}" for label in LABELS)]
        assert list(found.values()) == pytest.approx([np.mean(expected), *expected], abs=AREA)

    def test_batches_add_up(self) -> None:
        score, target = drawn(0)
        metric = MeanAUROC([0, 2])
        for part in range(0, 200, 30):
            metric.update(score[part : part + 30], target[part : part + 30])
        expected = np.mean([area(score[:, i], target[:, i]) for i in (0, 2)])
        assert float(metric.compute()) == pytest.approx(expected, abs=AREA)

    @pytest.mark.parametrize("only", [0.0, 1.0, NAN])
    def test_a_label_of_one_class_is_no_part_of_the_mean(self, only: float) -> None:
        score, target = drawn(0)
        target[:, 1] = torch.where(target[:, 1].isnan(), NAN, only)
        found = values(findings(), score, target)
        expected = np.mean([area(score[:, i], target[:, i]) for i in (0, 2)])
        assert found["auroc"] == pytest.approx(expected, abs=AREA)
        assert math.isnan(found["auroc effusion"])

    def test_without_any_area_it_is_undefined(self) -> None:
        assert math.isnan(values(findings(), torch.rand(4, 3), torch.ones(4, 3))["auroc"])

    @pytest.mark.parametrize(("score", "expected"), [([0.1, 0.9], 1.0), ([0.9, 0.1], 0.0)])
    def test_its_ends(self, score: list[float], expected: float) -> None:
        metric = MeanAUROC([0])
        metric.update(torch.tensor(score)[:, None], torch.tensor([[0.0], [1.0]]))
        assert float(metric.compute()) == expected
        assert metric.higher_is_better


class Constant(Findings):
    """Has no first metric whatever the examples are."""

    def metrics(self) -> dict[str, Metric]:
        return {"auroc none": MeanAUROC([]), **super().metrics()}


class TestEvaluation:
    def evaluated(self, objective: MultiLabel, target: NDArray[np.float32]) -> dict[str, float]:
        class Trunk(nn.Module):
            def forward(self, rows: Tensor) -> Features:
                return Features(rows, rows[:, None])

        rows = torch.linspace(-1, 1, len(target))[:, None].expand(-1, 4).contiguous()
        ids = [str(i) for i in range(len(target))]
        examples = TensorSet(ids, {"row": rows, "target": torch.from_numpy(target)})
        model = Model(Trunk(), [objective], 4, 0.0)
        found = evaluate(model, objective, examples, torch.device("cpu"), "fp32", "test")
        assert found.targets.shape == found.scores.shape == target.shape
        return found.metrics

    def test_what_is_undefined_is_left_out(self) -> None:
        target = np.array([[0, 1, NAN]] * 3 + [[1, 1, 0]] * 300, dtype=np.float32)
        assert list(self.evaluated(findings(), target)) == ["auroc", "auroc edema"]

    @pytest.mark.parametrize("objective", [findings(), Constant("findings", LABELS, margin=0.02)])
    def test_a_first_metric_that_is_undefined_is_an_error(self, objective: MultiLabel) -> None:
        target = np.full((5, 3), NAN, dtype=np.float32)
        with pytest.raises(
            DataError, match=r"test split on which auroc.* of 'findings' is defined"
        ):
            self.evaluated(objective, target)


def random_of(count: int, passes: int = 0) -> ExampleRandom:
    return ExampleRandom(5, np.full(count, passes, np.int64), np.arange(count))


class TestImageInput:
    images = torch.arange(6 * 3 * 8 * 8).view(6, 3, 8, 8).remainder(256).to(torch.uint8)

    def test_evaluation_only_normalises(self) -> None:
        found = image_input(self.images, None, pixels=2, mirror=True)
        back = found * torch.tensor(SPREAD)[:, None, None] + torch.tensor(MEAN)[:, None, None]
        assert_close(back * 255, self.images.float())
        assert found.is_contiguous()

    def test_training_moves_and_mirrors(self) -> None:
        random = random_of(6)
        expected = image_input(
            flip(shift(self.images, random, 2), random), None, pixels=0, mirror=False
        )
        found = image_input(self.images, random, pixels=2, mirror=True)
        assert_close(found, expected, rtol=0, atol=0)
        moved = image_input(self.images, random, pixels=2, mirror=False)
        assert_close(
            moved, image_input(shift(self.images, random, 2), None, pixels=0, mirror=False)
        )
        assert not torch.equal(moved, found)

    def test_half_of_the_images_is_mirrored_and_the_choice_is_the_example_s(self) -> None:
        images = torch.arange(4).expand(1000, 3, 2, 4)
        found = flip(images, random_of(1000))
        mirrored = found[:, 0, 0, 0] == 3
        assert_close(found[mirrored], images[mirrored].flip(3))
        assert_close(found[~mirrored], images[~mirrored])
        assert 430 < int(mirrored.sum()) < 570
        some = np.array([7, 3, 999])
        random = ExampleRandom(5, np.zeros(3, np.int64), some)
        assert_close(flip(images[:3], random), found[some])
        assert not torch.equal(flip(images, random_of(1000, passes=1)), found)
