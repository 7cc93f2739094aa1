"""Finds what in a method's step would make the host wait for a GPU, without a GPU.

The step runs on fake tensors: they have shapes and a device but no numbers, so whatever needs a
number on the host fails by itself. Operations that would succeed, yet make the host wait for a
real GPU, are recognised beside it.
"""

from __future__ import annotations

import contextlib
import traceback
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from gradbench.errors import ContractError
from gradbench.method import Aggregation, Method, Scalarization, Setup, Weighting
from gradbench.step import Step
from gradbench.testing.inputs import EXAMPLES, Batch
from gradbench.testing.steps import step_over

STEPS_PER_EPOCH = 2
INDICES = (0, 1, 4)  # the first step, one within an epoch, the first of a later epoch

# These look at a result on the host: to check it, or to learn the shape of what they return.
# Others carry a tag of PyTorch's own that says so.
WAITING = frozenset(
    {
        "_linalg_check_errors",  # behind cholesky, inv, solve, lu_factor and ldl_factor
        "_linalg_eigh",
        "_linalg_eigvals",
        "_linalg_svd",
        "linalg_eig",
        "linalg_eigvals",
        "linalg_matrix_exp",
        "linalg_pinv",
        "multinomial",
        "normal",  # with a tensor of deviations, the only form that appears under this name
    }
)
TAGS = (torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape)
COPIES = frozenset({"_to_copy", "copy_", "copy", "_copy_from", "_copy_from_and_resize"})
INDEXING = frozenset({"index", "index_put", "index_put_", "_unsafe_index", "_unsafe_index_put"})


def waits(method: Method, *, objectives: int = 3, parameters: int = 64) -> list[str]:
    """Return, a line each, what in the steps of ``method`` makes the host wait for the device.

    For a ``host`` Weighting the framework makes one copy each way, which is not counted. Its
    Gramian and its memory are real and on the CPU; whatever else the step holds is on the device.
    Backward passes are taken on trust: their gradients have the right shapes, no more.
    """
    device = torch.device("cuda", 0)
    setup = Setup(objectives, parameters, device, torch.float32)
    fake, watch = FakeTensorMode(), _Watch()
    host = isinstance(method, Weighting) and method.host

    @contextlib.contextmanager
    def watched() -> Iterator[None]:
        with contextlib.nullcontext() if host else fake, _without_backward(), watch:
            yield

    try:
        with fake:
            batch = _fake_batch(method, setup)
        with watched():
            state = method.initial_state(setup)
        for index in INDICES:
            step = step_over(batch, index=index, steps_per_epoch=STEPS_PER_EPOCH, state=state)
            with watched(), torch.no_grad():
                returned = _act(method, step)
                method.after_step(step)
            watch.found += _misplaced(returned, step, None if host else device)
    except Exception as error:
        if not watch.found:  # what fails for want of a number was recognised before it failed
            watch.found.append(f"{type(error).__name__}: {error} ({_place_of(error)})")
    return list(dict.fromkeys(watch.found))


def assert_never_waits(method: Method) -> None:
    """Fail if a step of ``method`` makes the host wait for the device."""
    found = waits(method)
    if found:
        raise AssertionError(
            f"Expected {type(method).__name__} never to wait for the device, found:\n  "
            + "\n  ".join(found)
            + "\nKeep numbers in tensors on the device (torch.where, clamp_min, gradbench.linalg); "
            "a Weighting that needs them on the host declares host = True."
        )


def _act(method: Method, step: Step) -> object:
    """Return the weights, one set or two, that the method returns."""
    if isinstance(method, Scalarization):
        return method.weights_from_losses(step.losses, step)
    if isinstance(method, Weighting):
        gramian = torch.eye(len(step.losses), dtype=torch.float64) if method.host else step.gramian
        return method.weights_from_gramian(gramian, step)
    if isinstance(method, Aggregation):
        return method.combine(step.jacobian, step, torch.zeros_like(step.jacobian[0]))
    raise ContractError(f"Expected a method with steps, found {type(method).__name__}.")


def _fake_batch(method: Method, setup: Setup) -> Batch:
    """Return a batch of fake tensors; there are no numbers in it."""

    def empty(*shape: int) -> Tensor:
        return torch.empty(*shape, device=setup.device, dtype=setup.dtype)

    return Batch(
        jacobian=empty(method.batches, setup.objectives, setup.parameters),
        losses=empty(setup.objectives),
        sketch_gradients=empty(EXAMPLES, setup.parameters),
        heldout_gradients=empty(EXAMPLES, setup.parameters),
    )


@contextlib.contextmanager
def _without_backward() -> Iterator[None]:
    """Give zeros for the gradients, for no backward pass runs without a real device."""

    def backward(tensors: Tensor | Sequence[Tensor], *args: object, **kwargs: object) -> None:
        for tensor in [tensors] if isinstance(tensors, Tensor) else tensors:
            for leaf in _leaves(tensor.grad_fn):
                leaf.grad = torch.zeros_like(leaf)

    def grad(
        outputs: object, inputs: Tensor | Sequence[Tensor], *args: object, **kwargs: object
    ) -> tuple[Tensor, ...]:
        several = [inputs] if isinstance(inputs, Tensor) else inputs
        return tuple(torch.zeros_like(tensor) for tensor in several)

    with mock.patch.multiple(torch.autograd, backward=backward, grad=grad):
        yield


def _leaves(root: Any) -> list[Tensor]:
    """Return the parameters that a graph ends in."""
    seen, ahead = set(), [root]
    while ahead:
        node = ahead.pop()
        if node is not None and node not in seen:
            seen.add(node)
            ahead += [before for before, _ in node.next_functions]
    return [node.variable for node in seen if hasattr(node, "variable")]


def _misplaced(returned: object, step: Step, device: torch.device | None) -> Iterator[str]:
    """Yield weights that are not on the device, and diagnostics that are no scalars on it.

    The framework would have to copy them. None is any device.
    """
    for weights in tree_leaves(returned):
        if isinstance(weights, Tensor) and device not in (None, weights.device):
            yield f"returned weights are on {weights.device}"
    for name, value in step.diagnostics().items():
        if value.dim() or device not in (None, value.device):
            yield f"diagnostic {name!r} of shape {tuple(value.shape)} is on {value.device}"


class _Watch(TorchDispatchMode):  # type: ignore[no-untyped-call] # its class hook has no types
    """Writes down operations after which the host has waited for the device."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.found: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> object:
        given = {} if kwargs is None else kwargs
        why = None if func.namespace == "prim" else _why_it_waits(func, args, given)
        if why is not None:
            self.found.append(f"{func.overloadpacket.__name__} {why} ({_place()})")
        return func(*args, **given)


def _why_it_waits(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
    """Say why the operation waits, or return None."""
    name = func.overloadpacket.__name__
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    target = kwargs.get("device")
    places = {tensor.device.type for tensor in tensors}
    if name in COPIES:
        ends = places if target is None else places | {torch.device(target).type}
        return f"copies between {' and '.join(sorted(ends))}" if len(ends) > 1 else None
    if places <= {"cpu"}:
        return None
    if any(tensor.device.type == "cpu" and tensor.dim() for tensor in tensors):
        return "copies a tensor from the cpu"  # one without dimensions is an argument of the kernel
    if name in INDEXING:
        return _why_indexing_waits(args)
    if name in WAITING or any(tag in func.tags for tag in TAGS):
        return "looks at numbers on the host"
    return None


def _why_indexing_waits(args: tuple[Any, ...]) -> str | None:
    """Say why ``args`` (tensor, indices, values) make the host wait, or return None."""
    masked = any(
        index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1]
    )
    filled = len(args) > 2 and args[2].device.type == "cpu"  # a number: becomes masked_fill_
    return "counts what a mask selects" if masked and not filled else None


OURS, TORCHS = Path(__file__).parent, Path(torch.__file__).parent


def _place() -> str:
    return _last_place(traceback.extract_stack())


def _place_of(error: BaseException) -> str:
    trace: TracebackType | None = error.__traceback__
    return _last_place(traceback.extract_tb(trace))


def _last_place(frames: Iterable[traceback.FrameSummary]) -> str:
    """Name the innermost line that is neither of PyTorch nor of this package."""
    places = [
        f"{Path(frame.filename).name}:{frame.lineno}: {frame.line}"
        for frame in frames
        if not {OURS, TORCHS} & set(Path(frame.filename).parents)
    ]
    return places[-1] if places else "unknown place"
