"""Running statistics of batch norm, estimated anew for weights that have moved without them."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm


def reestimate_statistics(
    modules: Iterable[nn.Module], forwards: Iterable[Callable[[], object]]
) -> None:
    """Replace the running statistics of ``modules`` by plain means over the batches of ``forwards``.

    Each forward takes one batch through the modules. Dropout is off, nothing is differentiated,
    and nothing is done where no layer keeps statistics.
    """
    parts = [part for module in modules for part in module.modules()]
    norms = [part for part in parts if isinstance(part, _BatchNorm) and part.track_running_stats]
    if not norms:
        return
    modes = [part.training for part in parts]
    momenta = [norm.momentum for norm in norms]
    for part in parts:
        part.training = False
    for norm in norms:
        norm.reset_running_stats()
        norm.training, norm.momentum = True, None  # without a momentum it keeps a plain mean
    try:
        with torch.no_grad():
            for forward in forwards:
                forward()
    finally:
        for part, mode in zip(parts, modes, strict=True):
            part.training = mode
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
