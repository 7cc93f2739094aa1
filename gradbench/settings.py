"""The settings that every run has, whatever its method and task."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from gradbench.fields import Checked, LogUniform, Uniform, Valid

BatchNormPolicy = Literal["primary", "shared", "frozen"]
Precision = Literal["fp32", "fp64", "bf16"]


@dataclass(frozen=True)
class Optimizer(Checked):
    """How the parameters move along the direction."""

    name: Annotated[Literal["adamw", "sgd"], "the optimizer"] = "adamw"
    lr: Annotated[
        float, Valid(1e-12, 1e6), LogUniform(1e-4, 1e-2), "learning rate after the warm-up"
    ] = 1e-3
    weight_decay: Annotated[
        float, Valid(0, 1e3), LogUniform(1e-4, 0.3), "decay of weights, not of norms and biases"
    ] = 0.05
    momentum: Annotated[float, Valid(0, 0.9999), "of sgd"] = 0.9
    warmup_epochs: Annotated[float, Valid(0, 1e6), "epochs of linear warm-up in each phase"] = 1.0
    schedule: Annotated[Literal["cosine", "constant"], "learning rate after the warm-up"] = "cosine"
    clip: Annotated[
        float, Valid(0, 1e9), "largest norm of the shared gradient, and of each head's; 0 is none"
    ] = 1.0
    fine_tune_factor: Annotated[
        float, Valid(1e-6, 1e6), "times lr in phases after the first, as in ATTITTUD's code"
    ] = 0.5


@dataclass(frozen=True)
class Budget(Checked):
    """How long a run trains; an epoch is the same number of steps for every method."""

    epochs: Annotated[int, Valid(1, 10**6), "epochs of the first phase, at most"] = 20
    fine_tune_epochs: Annotated[
        int, Valid(0, 10**6), "epochs on the primary alone, at most; 0 is none"
    ] = 10
    steps_per_epoch: Annotated[int, Valid(1, 10**6), "joint updates an epoch"] = 20
    batch_size: Annotated[int, Valid(1, 10**6), "examples a step of each objective"] = 64
    patience: Annotated[
        int, Valid(1, 10**6), "epochs without a better validation metric that end a phase"
    ] = 10


@dataclass(frozen=True)
class Architecture(Checked):
    """What is trained."""

    backbone: Annotated[str, "provider:name; timm is the provider where none is given"] = ""
    weights: Annotated[str, "none, hub, or the path of a weights file"] = "none"
    dropout: Annotated[float, Valid(0, 0.95), Uniform(0.0, 0.5), "before each head"] = 0.1
    batch_norm: Annotated[
        BatchNormPolicy, "whose batches the running statistics follow, or frozen"
    ] = "primary"
