"""The trained network: a shared backbone, heads, and what batch norm does in it."""

from __future__ import annotations

import contextlib
import functools
import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from gradbench import seeding
from gradbench.gradients import unmoved_statistics
from gradbench.settings import BatchNormPolicy

if TYPE_CHECKING:
    from gradbench.task import Objective


class Features(NamedTuple):
    """What a backbone returns."""

    pooled: Tensor  # (B, width)
    tokens: Tensor  # (B, T, C), one a position; C is below the width where a layer follows pooling


class LinearHead(nn.Module):
    """Dropout and a linear layer on the pooled features."""

    def __init__(self, width: int, outputs: int, dropout: float) -> None:
        super().__init__()
        self.dropout = nn.Dropout(dropout)
        self.linear = nn.Linear(width, outputs)

    def forward(self, features: Features) -> Tensor:
        """Return (B, outputs)."""
        output: Tensor = self.linear(self.dropout(features.pooled))
        return output


class Model(nn.Module):
    """A backbone and one head an objective; heads of one name are one module.

    ``shared`` holds the parameters that more than one objective uses: the backbone, and heads
    that objectives share.
    """

    def __init__(
        self, backbone: nn.Module, objectives: Sequence[Objective], width: int, dropout: float
    ) -> None:
        super().__init__()
        self._new_primary_head: Callable[[], nn.Module] = functools.partial(
            objectives[0].head, width, dropout
        )
        names = [objective.head_name or f"own {k}" for k, objective in enumerate(objectives)]
        keys = {name: f"head{position}" for position, name in enumerate(dict.fromkeys(names))}
        self._head_of = [keys[name] for name in names]
        made: dict[str, nn.Module] = {}
        for key, objective in zip(self._head_of, objectives, strict=True):
            if key not in made:
                made[key] = objective.head(width, dropout)
        common = {key for key in made if self._head_of.count(key) > 1}
        self.shared = nn.ModuleDict({"backbone": backbone})
        self.shared.update({key: made[key] for key in made if key in common})
        self.own = nn.ModuleDict({key: made[key] for key in made if key not in common})

    @property
    def backbone(self) -> nn.Module:
        """The trunk without any head."""
        return self.shared["backbone"]

    def head(self, k: int) -> nn.Module:
        """Return the head of objective ``k``."""
        key = self._head_of[k]
        return self.own[key] if key in self.own else self.shared[key]

    def own_head(self, k: int) -> nn.Module:
        """Return the head of objective ``k`` if it is its own, else a module of nothing."""
        key = self._head_of[k]
        return self.own[key] if key in self.own else nn.Identity()

    def new_primary_head(self) -> nn.Module:
        """Return a freshly initialised head of the primary objective, not part of the model."""
        return self._new_primary_head()

    def forward(self, inputs: object, k: int = 0) -> object:
        """Return the output of objective ``k``, by default the primary."""
        return self.head(k)(self.backbone(inputs))


@contextlib.contextmanager
def initialised_from(seed: int, *axes: str | int) -> Iterator[None]:
    """Seed the global generators for building modules, and put their state back afterwards."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seeding.derive(seed, "initialisation", *axes))
        yield


@contextlib.contextmanager
def statistics_for(
    model: nn.Module, policy: BatchNormPolicy, objective: int, primary_in_phase: bool
) -> Iterator[None]:
    """Let running statistics follow the batches that the policy names, and no others.

    ``primary``: those of the primary objective, or of all in a phase without it; ``shared``: all.
    Under ``frozen`` the layers are in evaluation mode and nothing is left to do.
    """
    follows = policy != "primary" or objective == 0 or not primary_in_phase
    with contextlib.nullcontext() if follows else unmoved_statistics(model):
        yield


def training_mode(model: nn.Module, policy: BatchNormPolicy) -> None:
    """Put the model in training mode; frozen batch norm stays in evaluation mode."""
    model.train()
    if policy == "frozen":
        for module in model.modules():
            if isinstance(module, _BatchNorm):
                module.eval()


def has_batch_norm(model: nn.Module) -> bool:
    """Say whether any layer normalises by the batch."""
    return any(isinstance(module, _BatchNorm) for module in model.modules())


def weights_digest(state: Mapping[str, Tensor]) -> str:
    """Return a SHA-256 of the names, types, shapes and bytes of a state dict."""
    found = hashlib.sha256()
    for name in sorted(state):
        value = state[name].detach().cpu().contiguous()
        found.update(f"{name} {value.dtype} {tuple(value.shape)}\0".encode())
        found.update(value.flatten().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()
