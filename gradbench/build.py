"""Builds the network of a run."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from gradbench import registry
from gradbench.backbones import BackboneProvider, split_name
from gradbench.errors import FieldError
from gradbench.model import Model, initialised_from, weights_digest
from gradbench.settings import Architecture, Precision
from gradbench.task import Input, Objective

MEMORY_FORMATS = ("auto", "contiguous", "channels-last")


@dataclass(frozen=True)
class Built:
    """A model on its device, the digest of weights that were loaded, and its memory format."""

    model: Model
    weights_digest: str | None
    channels_last: bool


def build(
    architecture: Architecture,
    objectives: tuple[Objective, ...],
    spec: Input,
    *,
    seed: int,
    precision: Precision,
    device: torch.device,
    memory_format: str = "auto",
) -> Built:
    """Build trunk and heads; what is drawn is a function of the seed.

    Raises:
        BackboneError: if there is no such backbone, or its weights can not be loaded.
    """
    if memory_format not in MEMORY_FORMATS:
        raise FieldError(
            f"Expected memory format {', '.join(MEMORY_FORMATS)}, found {memory_format!r}."
        )
    provider_name, name = split_name(architecture.backbone)
    provider = registry.load_class(registry.BACKBONES, provider_name, BackboneProvider).obj()
    with initialised_from(seed, "backbone"):
        backbone = provider.create(name, spec, architecture.weights)
    loaded = architecture.weights != "none"
    digest = weights_digest(backbone.module.state_dict()) if loaded else None
    with initialised_from(seed, "heads"):
        model = Model(backbone.module, objectives, backbone.width, architecture.dropout)
    model.to(device, torch.float64 if precision == "fp64" else torch.float32)
    channels_last = memory_format == "channels-last" or (
        memory_format == "auto" and device.type == "cuda"
    )
    if channels_last:
        model.to(memory_format=torch.channels_last)
    return Built(model, digest, channels_last)
