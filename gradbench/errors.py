"""Every error that GradBench raises on purpose, one class a cause.

The text of an error says what was expected, what was found and what to do.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import ClassVar


class GradBenchError(Exception):
    """The root of all errors that GradBench raises on purpose.

    ``exit_code`` is what the command line exits with: 2 where the user can mend the cause,
    1 where the fault is ours or a plug-in's.
    """

    exit_code: ClassVar[int] = 2


class FieldError(GradBenchError, ValueError):
    """A field of a method, a task or a run has a value that it does not accept."""


class UnknownKeyError(GradBenchError, LookupError):
    """A ``--set`` key names nothing that can be set."""

    def __init__(self, key: str, known: Iterable[str]) -> None:
        names = list(known)
        super().__init__(
            f"Expected a key that can be set, found {key!r}.{nearest(key, names)} "
            f"Keys: {', '.join(names)}."
        )


class PluginNotFoundError(GradBenchError, LookupError):
    """No installed distribution registers a plug-in under the requested name."""

    def __init__(self, group: str, name: str, installed: Iterable[str]) -> None:
        known = sorted(installed)
        noun = group.rpartition(".")[2].removesuffix("s")
        super().__init__(
            f"Expected the name of an installed {noun}, found {name!r}.{nearest(name, known)} "
            f"Installed: {', '.join(known) or 'none'}. "
            "A plug-in just added to a pyproject.toml appears after `pip install -e .`."
        )


class PluginConflictError(GradBenchError):
    """Two installed distributions register one name."""


class PluginError(GradBenchError, RuntimeError):
    """A plug-in could not be imported, or is not what its entry-point group holds."""

    exit_code: ClassVar[int] = 1


class ContractError(GradBenchError, RuntimeError):
    """A method asks for something, or returns something, that the contract does not allow."""


class MissingInputError(ContractError):
    """A method needs something that this training loop did not pass."""


class DataError(GradBenchError):
    """The data of a task pair is missing, malformed or too small."""


class BackboneError(GradBenchError):
    """A backbone can not be built, or its weights can not be loaded."""


class DeviceError(GradBenchError):
    """The requested device does not exist on this machine."""


class HomeError(GradBenchError, OSError):
    """The folder that holds the runs can not be written."""


class TrackingError(GradBenchError):
    """The tracking store can not be reached or written."""


class EnvironmentChangedError(GradBenchError):
    """A run would go on in an environment that can not repeat its bits."""


class RecordError(GradBenchError, ValueError):
    """A stored record does not fit the schema or the run that it is found under."""


class OutOfMemoryError(GradBenchError, MemoryError):
    """A run does not fit into the memory of its device."""


class NonFiniteLossError(GradBenchError, ArithmeticError):
    """A loss became NaN or infinite; holds where."""

    def __init__(self, phase: str, step: int, objective: str) -> None:
        self.phase, self.step, self.objective = phase, step, objective
        super().__init__(
            f"Expected finite losses, found NaN or infinity first at step {step} of phase "
            f"{phase!r} in objective {objective!r}. Try a smaller --set optimizer.lr=…, "
            "--set optimizer.clip=1, --precision fp32, or a smaller --set task.auxiliary_weight=…"
        )


def nearest(name: str, known: Iterable[str]) -> str:
    """Return `` Did you mean 'x'?`` for the known name closest to ``name``, or nothing."""
    close = difflib.get_close_matches(name, list(known), n=1)
    return f" Did you mean {close[0]!r}?" if close else ""
