"""Tests that plug-ins subclass, and what they are made of; needs pytest.

A method is checked by :class:`MethodContract`, a task pair by :class:`TaskContract`; what a method
claims beyond that, by the mixins :class:`NonConflicting`, :class:`PermutationInvariant` and
:class:`PositivelyHomogeneous`. For tests of one's own there are :func:`direction`, what a method
makes of a jacobian, and :func:`random_jacobian`.
"""

from __future__ import annotations

import pytest

for _module in ("contract", "properties", "tasks"):  # so that a failed check shows its values
    pytest.register_assert_rewrite(f"{__name__}.{_module}")

from gradbench.testing.checks import PluginChecks  # noqa: E402 - after the line above
from gradbench.testing.contract import MethodContract  # noqa: E402
from gradbench.testing.device import assert_never_waits, waits  # noqa: E402
from gradbench.testing.inputs import (  # noqa: E402
    Batch,
    batch_of,
    example_gradients,
    random_batch,
    random_jacobian,
)
from gradbench.testing.loops import LinearLoop, direction, train, trajectory  # noqa: E402
from gradbench.testing.properties import (  # noqa: E402
    MakeMethod,
    MethodChecks,
    NonConflicting,
    PermutationInvariant,
    PositivelyHomogeneous,
)
from gradbench.testing.steps import MatrixSource, step_over  # noqa: E402
from gradbench.testing.tasks import MakeTask, TaskContract, TinyTrunk  # noqa: E402

__all__ = [
    "Batch",
    "LinearLoop",
    "MakeMethod",
    "MakeTask",
    "MatrixSource",
    "MethodChecks",
    "MethodContract",
    "NonConflicting",
    "PermutationInvariant",
    "PluginChecks",
    "PositivelyHomogeneous",
    "TaskContract",
    "TinyTrunk",
    "assert_never_waits",
    "batch_of",
    "direction",
    "example_gradients",
    "random_batch",
    "random_jacobian",
    "step_over",
    "train",
    "trajectory",
    "waits",
]
