"""Where a run ran: what the last bits of a result may depend on."""

from __future__ import annotations

import platform
from importlib import metadata

import torch

from gradbench.errors import DeviceError, nearest
from gradbench.result import Environment


def resolve_device(name: str) -> tuple[torch.device, str | None]:
    """Return the device of ``auto``, ``cpu``, ``cuda``, ``cuda:N`` or ``mps``, and a warning.

    Raises:
        DeviceError: if this machine has no such device.
    """
    if name == "auto":
        return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu"), None
    kind, colon, number = name.partition(":")
    numbered = kind == "cuda" and number.isdecimal()
    if kind not in ("cpu", "cuda", "mps") or (colon and not numbered):
        known = ["auto", "cpu", "cuda", "cuda:0", "mps"]
        raise DeviceError(
            f"Expected a device auto, cpu, cuda, cuda:N or mps, found {name!r}.{nearest(name, known)}"
        )
    if kind == "cuda":
        count = torch.cuda.device_count()
        if int(number or 0) >= count:
            raise DeviceError(
                f"Expected one of {count} CUDA devices, found {name!r}. "
                "Use --device cpu, or --device auto for the best there is."
            )
        return torch.device("cuda", int(number or 0)), None
    if kind == "mps":
        if not torch.backends.mps.is_available():
            raise DeviceError("Expected an MPS device, found none. Use --device cpu.")
        return torch.device("mps"), "GradBench is not tested on mps; results may be wrong."
    return torch.device("cpu"), None


def fingerprint(device: torch.device, channels_last: bool) -> Environment:
    """Return what has to be equal for a run to repeat its bits."""
    cuda = device.type == "cuda"
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "torch": str(torch.__version__),
        "timm": metadata.version("timm"),
        "numpy": metadata.version("numpy"),
        "device": torch.cuda.get_device_name(device) if cuda else platform.machine(),
        "cuda": torch.version.cuda if cuda else None,
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "compile": False,
        "memory_format": "channels-last" if channels_last else "contiguous",
        "tf32": torch.backends.cudnn.allow_tf32 if cuda else False,
        # on CUDA every run uses deterministic kernels, whatever its caller does
        "deterministic": cuda or torch.are_deterministic_algorithms_enabled(),
        "world_size": 1,
    }
