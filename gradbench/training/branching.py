"""Epochs in which a method trains branches of the weights, in the benchmark's own loop."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from gradbench.branches import Branch, Branches, Tensors
from gradbench.errors import ContractError, MissingInputError
from gradbench.gradients import Arithmetic, evaluation_mode, full_precision
from gradbench.losses import mean_loss
from gradbench.method import Branching, Phase, Setup, load_state, saved_state
from gradbench.model import training_mode
from gradbench.task import ExampleSet
from gradbench.training.answers import Answers, Moved
from gradbench.training.batches import Batches, to_device
from gradbench.training.epochs import EpochTrainer, TrainedEpoch
from gradbench.training.evaluation import BATCH, autocast, evaluate
from gradbench.training.ledger import NEVER, Ledger
from gradbench.training.optimization import clip_head

if TYPE_CHECKING:
    from gradbench.training.loop import Training


class BranchedEpochs(EpochTrainer):
    """Lets a method train an epoch in branches; ``save`` makes a checkpoint of the run.

    Inside an epoch a checkpoint holds the epoch's beginning and what the method was answered
    since: going on, the method begins the epoch again and is answered from there.
    """

    def __init__(
        self,
        training: Training,
        phase: Phase,
        position: int,
        start: int,
        method: Branching,
        save: Callable[[], None],
    ) -> None:
        super().__init__(training, phase, position, start)
        self.method, self._save_run = method, save
        self.ledger = LossLedger(len(phase.objectives), training.device)
        self.seconds: list[float] = []
        self.answers = Answers(self._save)
        self.branches = TrainerBranches(self)
        self._begin_anew()

    def train(self, epoch: int) -> TrainedEpoch:
        """Train one epoch."""
        branches, steps = self.branches, self.branches.steps_per_epoch
        branches.begin(self.start // steps + epoch)
        with torch.no_grad(), full_precision(self.training.device):
            self.method.epoch(branches)
        if not self.answers.have("commit"):
            raise ContractError(
                "Expected a method that trains branches to end an epoch in branches.commit, "
                "found none."
            )
        branches.load(branches.start)  # something may have been looked at since
        for _ in range(branches.shown, steps):
            self.training.observer.step(self.phase.name)
        trained = TrainedEpoch(self.ledger.means(branches.recorded), self.seconds)
        self._begin_anew()
        return trained

    def state(self) -> dict[str, Any]:
        """Return what the epoch under way began with, and how far it has got."""
        return {
            **self._beginning,
            "answers": self.answers.state(),
            "ledger": self.ledger.state(),
            "seconds": self.seconds,
        }

    def load(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint."""
        load_state(self.branches.state, state["method"])
        self.branches.optimizers = dict(state["optimizers"])
        self._begin_anew()
        self.answers.load(state["answers"])
        self.ledger.load(state["ledger"])
        self.seconds = list(state["seconds"])

    def _begin_anew(self) -> None:
        """Take down what the next epoch begins with."""
        self._beginning = {
            "method": saved_state(self.method, self.branches.state),
            "optimizers": dict(self.branches.optimizers),
        }
        self.seconds = []
        self.answers.load([])

    def _save(self) -> None:
        self.branches.load(self.branches.beginning)
        self._save_run()


class TrainerBranches(Branches):
    """Branches of the model that is trained, on the batches and by the recipe of a run.

    Every branch of an epoch gets the batches, the dropout and the learning rates of the same
    steps, which are those of the epoch. A branch without the primary lets running statistics
    follow its own batches.
    """

    def __init__(self, trainer: BranchedEpochs) -> None:
        training, recipe = trainer.training, trainer.training.recipe
        self.optimizers: dict[str, dict[str, Any]] = {}
        self._trainer, self._training = trainer, training
        super().__init__(
            training.model,
            training.model.shared,
            trainer.heads,
            steps_per_epoch=recipe.budget.steps_per_epoch,
            seed=recipe.seed,
            name=recipe.method_name,
        )
        flat = self._flat
        self.state = trainer.method.initial_state(
            Setup(self.objectives, flat.size, flat.device, flat.dtype)
        )

    def begin(self, epoch: int) -> None:
        """Begin an epoch of the run."""
        super().begin(epoch)
        self.beginning = self.start
        self.recorded = {}
        self.shown = 0  # steps of the epoch that the observer was told of
        self._gradients = 0
        self._arithmetic = Arithmetic.present(self._flat.device)

    def train(self, weights: Tensor, steps: int, *, optimizer: str | None = None) -> Branch:
        """Train from ``start``; see :meth:`Branches.train`."""
        branch: Branch = self._trainer.answers.get(
            "train", lambda: self._train(weights.tolist(), steps, optimizer)
        )
        if optimizer is not None and branch.optimizer is not None:
            self.optimizers[optimizer] = branch.optimizer
        return branch

    def evaluate(self, branch: Branch) -> float:
        """Return the primary metric on the meta split, negated where lower is better."""
        value: float = self._trainer.answers.get("evaluate", lambda: self._evaluate(branch))
        return value

    def gradient(self, branch: Branch) -> Tensor:
        """Return the (P,) gradient of the primary loss on a batch drawn from the meta split.

        Dropout is off; batch norm uses the statistics of the batch, unless it is frozen.
        """
        call, self._gradients = self._gradients, self._gradients + 1
        # on the host, for the answers of a whole epoch are kept
        found: Tensor = self._trainer.answers.get(
            "gradient", lambda: self._gradient(branch, call).cpu()
        )
        return found.to(self._flat.device, copy=True)

    def commit(self, branch: Branch) -> None:
        """Make ``branch`` the weights to go on from."""
        buffers: Tensors = self._trainer.answers.get("commit", lambda: self._settle(branch))
        super().commit(Branch(branch.parameters, buffers, branch.optimizer))

    def merge(self, branches: Sequence[Branch], coefficients: Sequence[float]) -> Branch:
        """Return the weighted sum of branches; buffers are copied, from the first one.

        The share 1 of one branch and 0 of all others is that branch, its statistics included.
        """
        parameters = super().merge(branches, coefficients).parameters
        shares = [
            (branch, share) for branch, share in zip(branches, coefficients, strict=True) if share
        ]
        if len(shares) == 1 and shares[0][1] == 1:
            return type(shares[0][0])(parameters, shares[0][0].buffers)
        return Moved(parameters, branches[0].buffers)

    def at(self, vector: Tensor, heads: Sequence[Branch]) -> Branch:
        """Return the branch with shared parameters ``vector`` (P,) and head k of ``heads[k]``."""
        return Moved(**vars(super().at(vector, heads)))

    def _train(self, weights: list[float], steps: int, name: str | None) -> Branch:
        trainer = self._trainer
        weighted = [
            (row, k, weight)
            for row, (k, weight) in enumerate(zip(trainer.phase.objectives, weights, strict=True))
            if weight
        ]
        with_primary = any(k == 0 for _, k, _ in weighted)
        self.load(self.start)
        training_mode(self.model, self._training.recipe.architecture.batch_norm)
        optimizer = trainer.new_optimizer()
        if name in self.optimizers:
            optimizer.load_state_dict(copy.deepcopy(self.optimizers[name]))  # it would be shared
        trainer.clock.mark()
        with torch.enable_grad(), self._arithmetic.on(self._flat.device):
            for step in range(steps if weighted else 0):
                self._take_step(optimizer, step, weighted, with_primary)
                trainer.clock.mark()
        trainer.seconds += trainer.clock.close_epoch()
        bad = trainer.ledger.first_bad()
        if bad is not None:
            raise trainer.fail(*bad)
        kind = Branch if with_primary else Moved
        return kind(**vars(self.snapshot(None if name is None else optimizer.state_dict())))

    def _take_step(
        self,
        optimizer: torch.optim.Optimizer,
        step: int,
        weighted: list[tuple[int, int, float]],
        with_primary: bool,
    ) -> None:
        training, trainer = self._training, self._trainer
        index = self.epoch * self.steps_per_epoch + step
        training.place.step = index
        if self.shown == step < self.steps_per_epoch:
            training.observer.step(trainer.phase.name)
            self.shown += 1
        trainer.set_rate(optimizer, index)
        optimizer.zero_grad()
        for row, k, weight in weighted:
            mean = mean_loss(training.losses.closure(k, index, 0, with_primary)())
            trainer.ledger.note_loss(row, index, mean.detach())
            if mean.requires_grad:
                torch.autograd.backward(weight * mean)
                training.costs.backward_passes += 1
        training.place.objective = None
        for module in (training.model.shared, *trainer.heads):
            clip_head(module, training.recipe.optimizer.clip)
        optimizer.step()

    def _evaluate(self, branch: Branch) -> float:
        training, meta = self._training, self._meta()
        primary = training.objectives[0]
        self._settle(branch)
        with self._arithmetic.on(self._flat.device):
            found = evaluate(
                training.model,
                primary,
                meta,
                training.device,
                training.recipe.precision,
                "meta",
                phase=self._trainer.phase.name,
                step=(self.epoch + 1) * self.steps_per_epoch - 1,
            )
        training.costs.forward_passes += math.ceil(len(meta) / BATCH)
        training.costs.examples += len(meta)
        value = next(iter(found.metrics.values()))
        return value if primary.higher_is_better else -value

    def _gradient(self, branch: Branch, call: int) -> Tensor:
        training, recipe = self._training, self._training.recipe
        primary, size = training.objectives[0], recipe.budget.batch_size
        self.load(branch)
        training_mode(self.model, recipe.architecture.batch_norm)
        examples = Batches(primary, self._meta(), 0, recipe.seed, size)
        inputs, target = to_device(
            examples.draw(size, "branches", self.epoch, call), training.device, self._flat.dtype
        )
        training.costs.forward_passes += 1
        training.costs.backward_passes += 1
        training.costs.examples += len(target)
        out = self._flat.new()
        with (
            torch.enable_grad(),
            self._arithmetic.on(self._flat.device),
            evaluation_mode(self.model, batch_statistics=True),
        ):
            with autocast(training.device, recipe.precision):
                loss = mean_loss(primary.loss(training.model(inputs), target))
            self._flat.accumulate(self._flat.slices(out), [loss], [torch.ones_like(loss)])
        return out

    def _settle(self, branch: Branch) -> Tensors:
        """Load a branch, give it the statistics that it lacks, and return its buffers."""
        self.load(branch)
        if not isinstance(branch, Moved):
            return branch.buffers
        with self._arithmetic.on(self._flat.device):
            self._training.reestimate_statistics()
        self._training.place.objective = None
        return self.snapshot().buffers

    def _meta(self) -> ExampleSet:
        if self._training.meta is None:
            raise MissingInputError(
                "Expected a meta split to judge branches on, found none; declare needs_meta = True "
                "in the method."
            )
        return self._training.meta


class LossLedger(Ledger):
    """Sums the losses of an epoch one by one, across branches and interruptions."""

    def note_loss(self, row: int, index: int, loss: Tensor) -> None:
        """Take in one loss of a step of the run, without waiting for the device."""
        place = index * len(self._columns) + row
        found = torch.where(torch.isfinite(loss), NEVER, place)
        torch.minimum(self._first_bad, found, out=self._first_bad)
        self._add(f"loss {row}", loss)

    def first_bad(self) -> tuple[int, int] | None:
        """Return step and row of the first loss that is not finite."""
        first = int(self._first_bad)
        return None if first == NEVER else divmod(first, len(self._columns))

    def means(self, recorded: Tensors) -> dict[str, float]:
        """Return the epoch's means by name, and what was recorded of it; start anew."""
        for name, value in recorded.items():
            self._add(name, value.detach().to(self._columns.device))
        return self.close_epoch()[0] if self._sums else {}

    def state(self) -> dict[str, Any]:
        """Return tensors and plain values for a checkpoint; all losses so far were finite."""
        return {"sums": dict(self._sums), "counts": dict(self._counts)}

    def load(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint."""
        self._sums, self._counts = dict(state["sums"]), dict(state["counts"])
