"""Benchmark of gradient surgery: mix auxiliary gradients into a primary one, and measure it.

Names are imported on first use, so that ``gradbench --help`` does not wait for torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gradbench.runner import run
    from gradbench.surgery import Surgery
    from gradbench.trained import load

__version__ = "0.1.0"
__all__ = ["Surgery", "__version__", "load", "run"]

_HOMES = {"Surgery": "gradbench.surgery", "load": "gradbench.trained", "run": "gradbench.runner"}


def __getattr__(name: str) -> object:
    """Import a public name on first use."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
