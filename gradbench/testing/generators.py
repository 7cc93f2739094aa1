"""The global random generators, which no plug-in may draw from."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator

import numpy as np
import torch

# ruff: noqa: NPY002 - numpy's global generator is what is looked at here

Positions = tuple[str, str, str]


def positions() -> Positions:
    """Return where the global generators of torch, numpy and Python stand."""
    return (
        str(torch.get_rng_state().tolist()),
        str(
            [str(part) if isinstance(part, np.ndarray) else part for part in np.random.get_state()]
        ),
        str(random.getstate()),
    )


@contextlib.contextmanager
def seeded_by(seed: int) -> Iterator[None]:
    """Seed the global generators, and put them back where they stood afterwards."""
    numpys, pythons = np.random.get_state(), random.getstate()
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        np.random.seed(seed)
        random.seed(seed)
        try:
            yield
        finally:
            np.random.set_state(numpys)
            random.setstate(pythons)
