"""Where backbones come from; the one door to timm."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models import load_state_dict
from torch import Tensor, nn

from gradbench.errors import BackboneError, nearest
from gradbench.model import Features
from gradbench.task import Input

DEFAULT_PROVIDER = "timm"


@dataclass(frozen=True)
class Backbone:
    """A module from a batch of inputs to :class:`~gradbench.model.Features`, and its width."""

    module: nn.Module
    width: int


class BackboneProvider(ABC):
    """A family of backbones, chosen as ``--backbone provider:name``."""

    @abstractmethod
    def names(self, pattern: str) -> list[str]:
        """Return the names of backbones that match a shell pattern."""

    @abstractmethod
    def create(self, name: str, spec: Input, weights: str) -> Backbone:
        """Build a backbone; the global torch generator decides about random weights.

        ``weights`` is ``none``, ``hub`` or the path of a file.

        Raises:
            BackboneError: if there is none of that name, or its weights can not be loaded.
        """


class Timm(BackboneProvider):
    """Image models of the timm library."""

    def names(self, pattern: str) -> list[str]:
        """Return the names of timm's models that match a shell pattern."""
        return [str(name) for name in timm.list_models(pattern)]

    def create(self, name: str, spec: Input, weights: str) -> Backbone:
        """Build a timm model without its classifier, at the input's own size."""
        options = _options(name, spec)
        state = None if weights in ("none", "hub") else _read_weights(Path(weights))
        start: dict[str, Any] = {"pretrained": weights == "hub"}
        if state is not None:
            start = {"pretrained": True, "pretrained_cfg_overlay": {"state_dict": state}}
        generator = torch.get_rng_state()
        try:
            trunk = TimmTrunk(timm.create_model(name, **options, **start))
            width = _width(trunk, spec)
        except Exception as error:  # timm, its hub client and torch raise many types here
            raise BackboneError(_why_not(name, spec, weights, error)) from error
        if state is not None:
            _check_loaded(name, weights, state, trunk.model, options, generator)
        return Backbone(trunk, width)


def _options(name: str, spec: Input) -> dict[str, Any]:
    """Return the arguments that make a model of that name take such images."""
    options: dict[str, Any] = {"num_classes": 0, "in_chans": spec.channels}
    try:
        config = timm.get_pretrained_cfg(name) if timm.is_model(name) else _UNKNOWN
    except RuntimeError:  # a model's name with the tag of weights that do not exist
        config = _UNKNOWN
    if config is _UNKNOWN:
        raise BackboneError(
            f"Expected the name of a timm model, found {name!r}."
            f"{nearest(name, timm.list_models())} `gradbench backbones --all '*'` lists them."
        )
    if config is not None and config.fixed_input_size:
        options["img_size"] = spec.size
    return options


_UNKNOWN: Any = object()


def _width(trunk: TimmTrunk, spec: Input) -> int:
    """Return how many features there are, by running one image through."""
    with torch.no_grad():
        features = trunk.eval()(torch.zeros(1, spec.channels, spec.size, spec.size))
    trunk.train()
    return int(features.pooled.shape[1])


def _check_loaded(
    name: str,
    weights: str,
    state: Mapping[str, Any],
    model: nn.Module,
    options: Mapping[str, Any],
    generator: Tensor,
) -> None:
    """Check that no matrix of the model is as it was drawn; timm does not tell."""
    missing = [
        parameter
        for parameter, value in model.named_parameters()
        if parameter not in state and value.dim() > 1
    ]
    if not missing:
        return
    with torch.random.fork_rng(devices=[]):
        torch.set_rng_state(generator)
        drawn = timm.create_model(name, **options)
    left = [
        each for each in missing if torch.equal(model.state_dict()[each], drawn.state_dict()[each])
    ]
    if left:  # the others were in the file under older names
        raise BackboneError(
            f"Expected weights of {name!r} in {weights}, found none for {', '.join(left[:3])}"
            f"{f' and {len(left) - 3} more' if len(left) > 3 else ''}; "
            "use a file that was saved from the same model."
        )


class TimmTrunk(nn.Module):
    """Wrap a timm model that was built without a classifier."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Features:
        """Return the features of images (B, C, H, W)."""
        unpooled = self.model.forward_features(images)
        pooled = self.model.forward_head(unpooled, pre_logits=True)
        return Features(pooled=pooled, tokens=_tokens(unpooled, self.model.num_features))


def _tokens(unpooled: Tensor, channels: int) -> Tensor:
    """Return (B, T, C) from tokens, or from a feature map with channels first or last."""
    if unpooled.dim() != 4:
        return unpooled
    channels_first = unpooled.shape[1] == channels
    return unpooled.flatten(2).mT if channels_first else unpooled.flatten(1, 2)


def split_name(backbone: str) -> tuple[str, str]:
    """Return provider and name of ``provider:name``; timm is the default provider."""
    provider, colon, name = backbone.partition(":")
    return (provider, name) if colon else (DEFAULT_PROVIDER, backbone)


def _read_weights(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise BackboneError(
            f"Expected model.weights to be 'none', 'hub' or a file, found {str(path)!r}."
        )
    try:
        state: dict[str, Any] = load_state_dict(str(path), weights_only=True)
    except Exception as error:  # a damaged or malicious file can fail in any way
        raise BackboneError(
            f"Expected weights in {path} that load without running code "
            f"(safetensors, or tensors saved by torch), found {type(error).__name__}: "
            f"{_first_line(error)}"
        ) from error
    return state


def _why_not(name: str, spec: Input, weights: str, error: Exception) -> str:
    what = f"{type(error).__name__}: {_first_line(error)}"
    if weights == "none":
        return (
            f"Expected {name!r} to take images of {spec.channels}×{spec.size}×{spec.size}, "
            f"found {what}. Choose another backbone."
        )
    where = "the hub" if weights == "hub" else weights
    return (
        f"Expected weights of {name!r} from {where}, found {what}. "
        "Offline, put a weights file on this machine and pass --set model.weights=PATH, "
        "or train from scratch with --set model.weights=none."
    )


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else "no message"
