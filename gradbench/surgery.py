"""A method in anybody's own training loop; the benchmark's own loop is one of its users."""

from __future__ import annotations

import contextlib
import functools
import inspect
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gradbench import registry, seeding
from gradbench.errors import ContractError, FieldError, MissingInputError
from gradbench.fields import convert_all
from gradbench.gradients import (
    Arithmetic,
    BlockProbe,
    Blocks,
    FlatGradients,
    GeneratorState,
    evaluation_mode,
    full_precision,
    generator_state,
    replayed,
    sketch,
    twice_differentiable,
    unmoved_statistics,
)
from gradbench.heldout import HeldOutBatch, HeldOutExamples
from gradbench.losses import ExampleLosses, Scored, mean_loss, per_example
from gradbench.method import (
    Aggregation,
    Branching,
    Method,
    Scalarization,
    Scale,
    Setup,
    State,
    Weighting,
    Weights,
    load_state,
    saved_state,
)
from gradbench.step import BatchNorm, Draw, HeldOut, Step

Closure = Callable[[], ExampleLosses]
Source = ExampleLosses | Closure
SketchSource = Callable[[int], ExampleLosses]  # how many examples are asked for -> their losses


class Surgery:
    """Fill ``.grad`` of a shared trunk, and of the heads, by a method.

    Example::

        surgery = gradbench.Surgery("attittud", trunk, rank=10)
        surgery.backward(primary_losses, auxiliary_losses, sketch=lambda: ce(net(x), y))
        optimizer.step()
        surgery.after_step()

    ``trunk`` is the shared module; ``heads`` are one module an objective, needed by methods that
    weigh the heads' gradients. Extra passes turn dropout off in the trunk and in ``heads`` alone.
    ``steps_per_epoch`` is needed by methods that read ``step.epoch``. ``scale="sum"`` gives a mean
    or unit direction the length of a sum. ``name`` is what the method's random numbers are drawn
    for, where it is not a name already. ``fields`` are the method's hyper-parameters.

    Raises:
        PluginNotFoundError: if no method of that name is installed.
        FieldError: if a hyper-parameter is not accepted.
        ContractError: if the method can not run in a loop of one's own, or lacks heads.
    """

    def __init__(
        self,
        method: str | Method,
        trunk: nn.Module,
        heads: Sequence[nn.Module] = (),
        *,
        objectives: int | None = None,
        steps_per_epoch: int | None = None,
        seed: int = 0,
        scale: Scale = "paper",
        name: str | None = None,
        **fields: Any,
    ) -> None:
        self.method = _make(method, fields)
        self.name = name or (method if isinstance(method, str) else type(method).__name__)
        self.backward_passes = 0  # of one objective's batch, or of one row of a sketch
        _check(self.method, self.name, trunk, heads, scale)
        self.trunk, self.heads = trunk, tuple(heads)
        self.index = 0
        self.state: State | None = None
        self._steps_per_epoch, self._seed, self._scale = steps_per_epoch, seed, scale
        self._parameters = list(trunk.parameters())
        self._probe = BlockProbe(trunk)
        self._sources: dict[int, list[tuple[Closure, GeneratorState]]] = {}
        self._means: dict[int, Tensor] = {}
        self._step: Step | None = None
        self._lay_out()
        if objectives is not None:
            self.start(objectives)

    def _lay_out(self) -> None:
        self._flat = FlatGradients(self._trainable())
        self._out = self._flat.new()
        self._out_slices = self._flat.slices(self._out)
        self._rows: Tensor | None = None  # (batches, K, P)
        self._row_slices: list[list[list[Tensor]]] = []
        self._written: set[tuple[int, int]] = set()
        self._stashed: dict[int, list[tuple[nn.Parameter, Tensor | None]]] = {}
        self._blocks: Blocks | None = None

    def _trainable(self) -> list[nn.Parameter]:
        return [parameter for parameter in self._parameters if parameter.requires_grad]

    @property
    def direction(self) -> Tensor:
        """(P,), what the last ``apply`` wrote into the trunk's ``.grad``."""
        return self._out

    @property
    def step(self) -> Step:
        """The last step, with its diagnostics."""
        if self._step is None:
            raise ContractError("Expected a step; call backward first.")
        return self._step

    def start(self, objectives: int) -> None:
        """Make the method's memory for this number of objectives."""
        if objectives < 1:
            raise ContractError("Expected losses of at least one objective, found none.")
        if _weighs_heads(self.method) and len(self.heads) != objectives:
            raise ContractError(
                f"Expected {objectives} heads, one an objective, for method {self.name!r}, "
                f"found {len(self.heads)}."
            )
        self.objectives = objectives
        flat = self._flat
        self.state = self.method.initial_state(
            Setup(objectives, flat.size, flat.device, flat.dtype)
        )

    def backward(
        self,
        *objectives: Source | Sequence[Source],
        sketch: Callable[[], ExampleLosses] | SketchSource | None = None,
        heldout: Callable[[], HeldOutExamples] | None = None,
    ) -> None:
        """Write the trunk's ``.grad`` and add to the heads', from the losses of each objective.

        An objective, the primary first, is its losses an example (B,) or a closure that returns
        them; for a method with several independent batches it is a sequence of those. Tensors
        may share one forward; with closures one graph is alive at a time. Of several batches the
        first trains the head and makes ``step.losses``. ``sketch`` returns the losses of some
        primary examples; it is called when the method asks, and may take how many examples are
        wanted. ``heldout`` returns primary examples that are not trained on.
        """
        batches = [_batches(objective, self.method.batches) for objective in objectives]
        if self.state is None:
            self.start(len(batches))
        if len(batches) != self.objectives:
            raise ContractError(
                f"Expected losses of {self.objectives} objectives as in the first step, "
                f"found {len(batches)}."
            )
        last = (len(batches) - 1, self.method.batches - 1)
        try:
            for k, sources in enumerate(batches):
                for b, source in enumerate(sources):
                    self.add(k, source, batch=b, retain_graph=(k, b) != last)
            self.apply(sketch=sketch, heldout=heldout)
        except BaseException:
            self._discard()  # or the next call would add to what this one has
            raise

    def add(self, k: int, losses: Source, *, batch: int = 0, retain_graph: bool = True) -> None:
        """Add the gradient of the mean loss of objective ``k``; several calls add up.

        As in gradient accumulation anywhere, who adds n times divides each loss by n.
        ``retain_graph`` keeps the graph of a tensor for other objectives that share it.
        """
        if self.state is None:
            raise ContractError("Expected Surgery(…, objectives=K) where add is called directly.")
        if not 0 <= k < self.objectives:
            raise ContractError(
                f"Expected an objective from 0 to {self.objectives - 1}, found {k}."
            )
        if not self._means:
            self._keep_up_with_layout()
            self._sources.clear()
        if callable(losses):
            if batch == 0:
                source = (losses, generator_state(self._flat.device))
                self._sources.setdefault(k, []).append(source)
            value, retain_graph = losses(), False
        else:
            value = losses
        mean = mean_loss(value)
        if isinstance(self.method, Scalarization):
            self._means[k] = self._means[k] + mean if k in self._means else mean
            return
        if batch == 0:
            detached = mean.detach()
            self._means[k] = self._means[k] + detached if k in self._means else detached
        self._stash_head(k)
        self._bind_row(batch, k)
        if mean.requires_grad:
            inputs = None if batch == 0 else self._flat.parameters
            torch.autograd.backward(mean, retain_graph=retain_graph, inputs=inputs)
            self.backward_passes += 1

    def apply(
        self,
        *,
        sketch: Callable[[], ExampleLosses] | SketchSource | None = None,
        heldout: Callable[[], HeldOutExamples] | None = None,
    ) -> None:
        """Turn what was added into the trunk's ``.grad``."""
        missing = [k for k in range(self.objectives) if k not in self._means]
        if missing:
            raise ContractError(f"Expected losses of every objective, found none of {missing}.")
        means = [self._means[k] for k in range(self.objectives)]
        losses = torch.stack([mean.detach().to(self._flat.dtype) for mean in means])
        self._step = Step(
            _Sources(self, sketch, heldout),
            losses,
            index=self.index,
            steps_per_epoch=self._steps_per_epoch,
            seed=self._seed,
            name=self.name,
            state=self.state,
        )
        if isinstance(self.method, Scalarization):
            self._scalarize(self.method, means, self._step)
        else:
            with torch.no_grad(), full_precision(self._flat.device):
                self._combine(self._step)
        self._flat.bind(self._out_slices)
        self._means, self._written = {}, set()
        self.index += 1

    def after_step(self) -> None:
        """Let the method look back, after ``optimizer.step()``."""
        with torch.no_grad(), full_precision(self._flat.device):
            self.method.after_step(self.step)
        self._sources.clear()

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint holds; state that the method can rebuild is left out."""
        return {"index": self.index, "state": saved_state(self.method, self.state or {})}

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Go on from a checkpoint; ``objectives`` must be known."""
        if self.state is None:
            raise ContractError("Expected Surgery(…, objectives=K) before a checkpoint is loaded.")
        self.index = int(saved["index"])
        load_state(self.state, saved["state"])

    def _scalarize(self, method: Scalarization, means: list[Tensor], step: Step) -> None:
        with torch.no_grad(), full_precision(self._flat.device):
            weights = method.weights_from_losses(step.losses, step)
            if self._scale == "sum" and method.scale == "mean":
                weights = weights * self.objectives
        self._out.zero_()
        self._flat.bind(self._out_slices)
        pairs = zip(means, weights.unbind(), strict=True)
        live = [(mean, weight.to(mean.dtype)) for mean, weight in pairs if mean.requires_grad]
        if live:
            roots, cotangents = zip(*live, strict=True)
            torch.autograd.backward(roots, cotangents)
            self.backward_passes += len(roots)

    def _combine(self, step: Step) -> None:
        method, jacobian = self.method, step.jacobian
        if isinstance(method, Weighting):
            weights = _weights(method, step)
            factor = self._factor(step)
            shared = weights.shared if factor is None else weights.shared * factor
            heads = weights.heads if factor is None else weights.heads * factor
            torch.mv(jacobian.T, shared, out=self._out)
        elif isinstance(method, Aggregation):
            returned = method.combine(jacobian, step, self._out)
            factor = self._factor(step)
            if factor is not None:
                self._out.mul_(factor)
            heads = torch.ones_like(step.losses) if returned is None else returned
        if method.heads == "weighted":
            self._weigh_heads(heads)

    def _factor(self, step: Step) -> Tensor | float | None:
        """Return what gives the direction the length of a sum, or None where it has it."""
        if self._scale == "paper" or self.method.scale == "sum":
            return None
        if self.method.scale == "mean":
            return float(self.objectives)
        length: Tensor = torch.linalg.vector_norm(step.jacobian.sum(0))
        return length

    def _keep_up_with_layout(self) -> None:
        flat, trainable = self._flat, self._trainable()
        same = len(trainable) == len(flat.parameters) and all(
            map(operator.is_, trainable, flat.parameters)
        )
        if same and flat.layout == flat.current_layout():
            return
        if self.index > 0:
            raise ContractError(
                "Expected the shared parameters on the device, in the memory format and with the "
                "requires_grad of the first step, found them changed; make a new Surgery after "
                "moving, freezing or unfreezing a model."
            )
        self._lay_out()
        self.start(self.objectives)

    def _bind_row(self, batch: int, k: int) -> None:
        if self._rows is None:
            self._rows = self._flat.new(self.method.batches, self.objectives)
            self._row_slices = [[self._flat.slices(row) for row in rows] for rows in self._rows]
        elif (batch, k) not in self._written:
            self._rows[batch, k].zero_()
        self._written.add((batch, k))
        self._flat.bind(self._row_slices[batch][k])

    def _discard(self) -> None:
        """Forget the step that was begun."""
        for stashed in self._stashed.values():
            for parameter, before in stashed:
                parameter.grad = before
        self._stashed.clear()
        self._sources.clear()
        self._means, self._written = {}, set()

    def _stash_head(self, k: int) -> None:
        if self.method.heads == "weighted" and k not in self._stashed:
            parameters = list(self.heads[k].parameters())
            self._stashed[k] = [(parameter, parameter.grad) for parameter in parameters]
            for parameter in parameters:
                parameter.grad = None

    def _weigh_heads(self, weights: Tensor) -> None:
        for k, stashed in self._stashed.items():
            for parameter, before in stashed:
                grad = parameter.grad
                if grad is not None:
                    grad.mul_(weights[k].to(grad.dtype))
                    parameter.grad = grad if before is None else before.add_(grad)
                else:
                    parameter.grad = before
        self._stashed.clear()


class _Sources:
    """Gives a :class:`Step` what the method asks for, out of a :class:`Surgery`."""

    def __init__(
        self,
        surgery: Surgery,
        sketch: Callable[[], ExampleLosses] | SketchSource | None,
        heldout: Callable[[], HeldOutExamples] | None,
    ) -> None:
        self._surgery, self._flat = surgery, surgery._flat
        self._sketch, self._heldout = sketch, heldout
        self._arithmetic = Arithmetic.present(self.device)
        self._held_out = 0

    @property
    def device(self) -> torch.device:
        return self._flat.device

    def generator(self, seed: int) -> torch.Generator:
        return torch.Generator(self.device).manual_seed(seed)

    def jacobians(self) -> Tensor:
        rows = self._surgery._rows
        if rows is None:
            raise ContractError(
                "Expected a method that reads gradients to be a Weighting or an Aggregation; "
                "a Scalarization has no jacobian."
            )
        return rows

    def blocks(self) -> tuple[tuple[slice, ...], int]:
        if self._surgery._blocks is None:
            self._surgery._blocks = self._surgery._probe.blocks(self._flat)
        return self._surgery._blocks.slices, self._surgery._blocks.last_weight

    def sketch(self, draw: Draw, samples: int, batch_norm: BatchNorm) -> Tensor:
        if self._sketch is None:
            raise self._missing("step.sketch", "sketch=lambda: losses an example of the primary")
        by_batch = batch_norm == "batch"
        with self._as_in_the_loop(), evaluation_mode(*self._modules, batch_statistics=by_batch):
            losses = per_example(_call_with_count(self._sketch, samples))
            combinations = draw(losses.shape[0])
            self._surgery.backward_passes += len(combinations)
            return sketch(self._flat, losses, combinations)

    def reevaluate(self) -> Tensor:
        with self._as_in_the_loop(), torch.no_grad():
            return torch.stack([loss.to(self._flat.dtype) for loss in self._again("reevaluate")])

    def hvp(self, vector: Tensor, weights: Tensor) -> Tensor:
        with self._as_in_the_loop(), twice_differentiable():
            losses = self._again("hvp")
            total = (torch.stack([loss.to(weights.dtype) for loss in losses]) * weights).sum()
            return self._flat.hvp(total, vector)

    def heldout(self) -> HeldOut:
        if self._heldout is None:
            raise self._missing("step.heldout", "heldout=lambda: HeldOutExamples(…)")
        self._held_out += 1
        surgery = self._surgery
        seed = seeding.derive(surgery._seed, "heldout", surgery.index, self._held_out)
        return HeldOutBatch(self._heldout(), self._flat, seed, self._beside_the_loop)

    @property
    def _modules(self) -> tuple[nn.Module, ...]:
        return (self._surgery.trunk, *self._surgery.heads)

    def _again(self, what: str) -> list[Tensor]:
        """Return the losses of the same batches under the same dropout, with present weights."""
        surgery = self._surgery
        if len(surgery._sources) < surgery.objectives:
            raise self._missing(f"step.{what}", "closures, backward(lambda: …, lambda: …)")
        losses = []
        for k in range(surgery.objectives):
            parts = []
            for closure, state in surgery._sources[k]:
                with replayed(state, self.device), unmoved_statistics(*self._modules):
                    parts.append(mean_loss(closure()))
            losses.append(functools.reduce(torch.add, parts))
        return losses

    @contextlib.contextmanager
    def _as_in_the_loop(self) -> Iterator[None]:
        with torch.enable_grad(), self._arithmetic.on(self.device):
            yield

    @contextlib.contextmanager
    def _beside_the_loop(self) -> Iterator[None]:
        """Look with dropout off and statistics unmoved; batch norm uses those of the batch."""
        with (
            self._arithmetic.on(self.device),
            evaluation_mode(*self._modules, batch_statistics=True),
        ):
            yield

    def _missing(self, what: str, how: str) -> MissingInputError:
        return MissingInputError(
            f"Method {self._surgery.name!r} asks for {what}, which this loop did not give; "
            f"pass {how} to Surgery.backward."
        )


def _make(method: str | Method, fields: Mapping[str, Any]) -> Method:
    if isinstance(method, str):
        cls = registry.load_class(registry.METHODS, method, Method).obj
        made: Method = cls(**convert_all(cls, fields, method))
        return made
    if fields:
        raise FieldError(f"Expected no fields beside a made method, found {sorted(fields)}.")
    return method


def _check(
    method: Method, name: str, trunk: nn.Module, heads: Sequence[nn.Module], scale: Scale
) -> None:
    if isinstance(method, Branching):
        raise ContractError(
            f"Expected a method that acts in every step, found {name!r}, which trains branches of "
            "the weights; it runs through `gradbench run` or gradbench.run alone."
        )
    if scale not in ("paper", "sum"):
        raise FieldError(f"Expected scale to be 'paper' or 'sum', found {scale!r}.")
    if not _weighs_heads(method):
        return
    if not heads:
        raise ContractError(f"Method {name!r} weighs the heads; pass heads=(…), primary first.")
    owned = [id(p) for module in (trunk, *heads) for p in module.parameters()]
    if len(set(owned)) < len(owned):
        raise ContractError(
            f"Method {name!r} weighs the heads, found parameters that a head has in common with "
            "another head or the trunk; put what is shared into the trunk, and there alone."
        )


def _weighs_heads(method: Method) -> bool:
    """Say whether head gradients are weighted after the fact; one backward pass needs no help."""
    return method.heads == "weighted" and not isinstance(method, Scalarization)


def _batches(objective: Source | Sequence[Source], count: int) -> list[Source]:
    if isinstance(objective, Tensor | Scored) or callable(objective):
        sources: list[Source] = [objective]
    else:
        sources = list(objective)
    if len(sources) != count:
        raise ContractError(
            f"Expected {count} independent batch(es) an objective, found {len(sources)}."
        )
    return sources


def _call_with_count(source: Callable[..., ExampleLosses], samples: int) -> ExampleLosses:
    """Call ``source`` with the number of examples wanted, if it needs an argument."""
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    takes_count = any(
        parameter.kind in positional and parameter.default is inspect.Parameter.empty
        for parameter in inspect.signature(source).parameters.values()
    )
    return source(samples) if takes_count else source()


def _weights(method: Weighting, step: Step) -> Weights:
    gramian = step.gramian
    returned = method.weights_from_gramian(
        gramian.to("cpu", torch.float64) if method.host else gramian, step
    )
    shared, heads = returned if isinstance(returned, Weights) else (returned, returned)
    return Weights(shared.to(gramian), shared.to(gramian) if heads is shared else heads.to(gramian))
