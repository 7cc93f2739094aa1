"""The one door to automatic differentiation: gradients written straight into flat buffers."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.batchnorm import _BatchNorm

from gradbench.errors import ContractError

Layout = tuple[tuple[torch.device, torch.dtype, torch.Size, tuple[int, ...]], ...]


class FlatGradients:
    """Flat vectors whose slices can stand as the ``.grad`` of a list of parameters.

    Each slice has its parameter's own strides. A contiguous slice under a channels-last parameter
    would make fused optimizers pair the wrong numbers, with no error.
    """

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        if not parameters:
            raise ContractError("Expected shared parameters that require gradients, found none.")
        self.parameters = list(parameters)
        self.layout = self.current_layout()
        dtypes = {dtype for _, dtype, _, _ in self.layout}
        if dtypes not in ({torch.float32}, {torch.float64}):
            found = ", ".join(sorted(map(str, dtypes)))
            raise ContractError(
                f"Expected shared parameters all in float32 or all in float64, found {found}; "
                "keep the parameters in float32 and compute in lower precision under autocast."
            )
        if len({device for device, _, _, _ in self.layout}) > 1:
            raise ContractError("Expected the shared parameters on one device; move the trunk.")
        self.device, self.dtype = self.layout[0][:2]
        self.offsets = [0]
        for _, _, size, stride in self.layout:
            extent = 1 + sum((n - 1) * s for n, s in zip(size, stride, strict=True))
            if extent != size.numel():
                raise ContractError(
                    "Expected parameters that fill their memory without gaps or overlaps, found "
                    f"one of size {tuple(size)} with strides {stride}; make it contiguous."
                )
            self.offsets.append(self.offsets[-1] + size.numel())
        self.size = self.offsets[-1]

    def current_layout(self) -> Layout:
        """Return device, dtype, size and strides of every parameter as they are now."""
        return tuple((p.device, p.dtype, p.shape, p.stride()) for p in self.parameters)

    def new(self, *rows: int) -> Tensor:
        """Return a buffer of zeros (*rows, P)."""
        return torch.zeros(*rows, self.size, dtype=self.dtype, device=self.device)

    def slices(self, flat: Tensor) -> list[Tensor]:
        """Return views of ``flat`` (P,), one a parameter, with the parameter's strides."""
        start = flat.storage_offset()
        return [
            flat.as_strided(size, stride, start + offset)
            for offset, (_, _, size, stride) in zip(self.offsets, self.layout, strict=False)
        ]

    def bind(self, slices: Sequence[Tensor]) -> None:
        """Make ``slices`` the ``.grad`` of the parameters."""
        for parameter, view in zip(self.parameters, slices, strict=True):
            parameter.grad = view

    def accumulate(
        self, slices: Sequence[Tensor], tensors: Sequence[Tensor], cotangents: Sequence[Tensor]
    ) -> None:
        """Add the gradient of ``sum(tensors * cotangents)`` to ``slices``, keep the graph.

        No other leaf receives a gradient, and the parameters' ``.grad`` is as before afterwards.
        """
        before = [parameter.grad for parameter in self.parameters]
        self.bind(slices)
        try:
            torch.autograd.backward(
                list(tensors), list(cotangents), retain_graph=True, inputs=self.parameters
            )
        finally:
            for parameter, grad in zip(self.parameters, before, strict=True):
                parameter.grad = grad

    def hvp(self, loss: Tensor, vector: Tensor) -> Tensor:
        """Return (P,): the Hessian of the scalar ``loss`` times ``vector`` (P,)."""
        first = torch.autograd.grad(
            loss, self.parameters, create_graph=True, materialize_grads=True
        )
        pairs = zip(first, self.slices(vector), strict=True)
        with_graph = [(grad, part) for grad, part in pairs if grad.requires_grad]
        out = self.new()
        if with_graph:
            grads, parts = zip(*with_graph, strict=True)
            self.accumulate(self.slices(out), grads, parts)
        return out


def sketch(flat: FlatGradients, losses: Tensor, combinations: Tensor) -> Tensor:
    """Return ``combinations`` (R, m) times the per-example gradients (m, P), as (R, P).

    One backward pass a row, through one forward.
    """
    rows = flat.new(combinations.shape[0])
    weights = combinations.to(losses.dtype)
    for row, cotangent in zip(rows, weights, strict=True):
        flat.accumulate(flat.slices(row), [losses], [cotangent])
    return rows


@dataclass(frozen=True)
class Blocks:
    """The slices of the shared parameters by module, in the order in which forwards start."""

    slices: tuple[slice, ...]
    last_weight: int


class BlockProbe:
    """Watches the first forward of each module of a trunk to learn the order of the blocks."""

    def __init__(self, trunk: nn.Module) -> None:
        self._trunk = trunk
        self._order: list[nn.Module] = []
        self._handles = {
            module: module.register_forward_pre_hook(self._start)
            for module in trunk.modules()
            if next(module.parameters(recurse=False), None) is not None
        }

    def _start(self, module: nn.Module, inputs: object) -> None:
        self._order.append(module)
        self._handles.pop(module).remove()

    def blocks(self, flat: FlatGradients) -> Blocks:
        """Return the blocks; modules whose own forward is never called come last.

        Raises:
            ContractError: if the trunk has not been called since the probe was set.
        """
        if not self._order:
            raise ContractError(
                "Expected one forward of the trunk before blocks are asked for; make the Surgery "
                "before the forward whose losses it gets."
            )
        owners = _owners(self._trunk, flat)
        called = [module for module in self._order if module in owners]
        modules = [*called, *(module for module in owners if module not in called)]
        weighted = [i for i, module in enumerate(called) if _trains_a_matrix(module)]
        return Blocks(
            slices=tuple(owners[module] for module in modules),
            last_weight=weighted[-1] if weighted else max(len(called) - 1, 0),
        )


def _owners(trunk: nn.Module, flat: FlatGradients) -> dict[nn.Module, slice]:
    """Return, a module that owns shared parameters, their slice of P."""
    position = {id(parameter): i for i, parameter in enumerate(flat.parameters)}
    owners: dict[nn.Module, slice] = {}
    claimed: set[int] = set()
    for module in trunk.modules():
        own = [position[id(p)] for p in module.parameters(recurse=False) if id(p) in position]
        own = [i for i in own if i not in claimed]
        if own:
            claimed.update(own)
            owners[module] = slice(flat.offsets[min(own)], flat.offsets[max(own) + 1])
    return owners


def _trains_a_matrix(module: nn.Module) -> bool:
    kinds = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
    return isinstance(module, kinds) and module.weight.requires_grad


@contextlib.contextmanager
def unmoved_statistics(*modules: nn.Module) -> Iterator[None]:
    """Keep the running statistics of batch norm where they are; batches are normalised as ever."""
    norms = [m for module in modules for m in module.modules() if isinstance(m, _BatchNorm)]
    tracked = [norm.track_running_stats for norm in norms]
    for norm in norms:
        norm.track_running_stats = False  # hides them from a layer in training, and only there
    try:
        yield
    finally:
        for norm, track in zip(norms, tracked, strict=True):
            norm.track_running_stats = track


@contextlib.contextmanager
def evaluation_mode(*modules: nn.Module, batch_statistics: bool = False) -> Iterator[None]:
    """Put modules in evaluation mode; batch norm may go on using the batch's statistics."""
    parts = [part for module in modules for part in module.modules()]
    modes = [part.training for part in parts]
    for part in parts:
        part.training = batch_statistics and isinstance(part, _BatchNorm) and part.training
    try:
        with unmoved_statistics(*modules):
            yield
    finally:
        for part, mode in zip(parts, modes, strict=True):
            part.training = mode


class Arithmetic(NamedTuple):
    """How a loop computes: under autocast or not, and how exact its matrix products are.

    torch has an older and a newer switch for products, and raises in products where the two
    disagree; ``newer`` says which of them is in use.
    """

    autocast: torch.dtype | None
    newer: bool
    products: str

    @classmethod
    def present(cls, device: torch.device) -> Arithmetic:
        """Return what is in force now."""
        enabled = torch.is_autocast_enabled(device.type)
        autocast = torch.get_autocast_dtype(device.type) if enabled else None
        try:
            return cls(autocast, False, torch.get_float32_matmul_precision())
        except RuntimeError:  # the answer of the older switch where the newer one is in use
            return cls(autocast, True, torch.backends.cuda.matmul.fp32_precision)

    @contextlib.contextmanager
    def on(self, device: torch.device) -> Iterator[None]:
        """Compute like this; weights are cast afresh, for they may have moved or lack a graph."""
        before = Arithmetic.present(device)
        enabled = self.autocast is not None
        with torch.autocast(device.type, self.autocast, enabled, cache_enabled=False):
            self._set_products(before.products)
            try:
                yield
            finally:
                before._set_products(self.products)

    def _set_products(self, before: str) -> None:
        if self.products == before:
            return
        if self.newer:
            torch.backends.cuda.matmul.fp32_precision = self.products
        else:
            torch.set_float32_matmul_precision(self.products)


@contextlib.contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Compute in the tensors' own precision: no autocast, no TensorFloat-32."""
    newer = Arithmetic.present(device).newer
    with Arithmetic(None, newer, "ieee" if newer else "highest").on(device):
        yield


@contextlib.contextmanager
def twice_differentiable() -> Iterator[None]:
    """Compute attention by plain matrix products, which can be differentiated twice."""
    with sdpa_kernel(SDPBackend.MATH):
        yield


def seed_generators(seed: int, device: torch.device) -> None:
    """Seed the global generators that a forward on ``device`` may draw from.

    ``torch.manual_seed`` would seed every device, and record a stack trace for each call where
    CUDA has not been used.
    """
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.default_generators[device.index or 0].manual_seed(seed)


GeneratorState = tuple[Tensor, Tensor | None]


def generator_state(device: torch.device) -> GeneratorState:
    """Return the state of the global generators that a forward on ``device`` may draw from."""
    cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
    return torch.get_rng_state(), cuda


@contextlib.contextmanager
def replayed(state: GeneratorState, device: torch.device) -> Iterator[None]:
    """Run under an earlier state of the global generators, and put the present one back."""
    present = generator_state(device)
    _set_generator_state(state, device)
    try:
        yield
    finally:
        _set_generator_state(present, device)


def _set_generator_state(state: GeneratorState, device: torch.device) -> None:
    torch.set_rng_state(state[0])
    if state[1] is not None:
        torch.cuda.set_rng_state(state[1], device)
