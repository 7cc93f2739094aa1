"""Where a run can go on: written whole, checked when read, the one before kept."""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from gradbench.errors import HomeError
from gradbench.files import make_folder, replacing

DIGEST = 64  # bytes of the SHA-256, in hexadecimal, before the checkpoint itself


class Checkpoints:
    """The last two checkpoints of a run, in a folder of their own."""

    def __init__(self, folder: Path) -> None:
        self._latest, self._before = folder / "latest.pt", folder / "before.pt"
        self._folder = folder

    def save(self, state: dict[str, Any]) -> None:
        """Write tensors and plain values; whatever happens meanwhile, one checkpoint is whole.

        Raises:
            HomeError: if the folder can not be written, as on a full disk.
        """
        buffer = io.BytesIO()
        torch.save(state, buffer)
        content = buffer.getvalue()
        make_folder(self._folder)
        try:
            with replacing(self._latest) as temporary:
                with temporary.open("wb") as file:
                    file.write(hashlib.sha256(content).hexdigest().encode())
                    file.write(content)
                    file.flush()
                    os.fsync(file.fileno())
                if self._latest.exists():
                    self._latest.replace(self._before)
        except OSError as error:
            raise HomeError(
                f"Expected to write a checkpoint into {self._folder}, found "
                f"{error.strerror or error}. The one before is kept: make room, then give the "
                "same command again."
            ) from error

    def load(self, device: torch.device, say: Callable[[str], None]) -> dict[str, Any] | None:
        """Return the newest checkpoint that is whole, or None; what is not whole is named."""
        for path in (self._latest, self._before):
            if not path.exists():
                continue
            state = _read(path, device)
            if state is not None:
                return state
            say(f"warning: the checkpoint {path} is damaged and was left out")
        return None

    def remove(self) -> None:
        """Delete what only a run that goes on needs."""
        for path in (self._latest, self._before):
            path.unlink(missing_ok=True)


def _read(path: Path, device: torch.device) -> dict[str, Any] | None:
    try:
        content = path.read_bytes()
        digest = hashlib.sha256(content[DIGEST:]).hexdigest().encode()
        if content[:DIGEST] != digest:
            return None
        state: dict[str, Any] = torch.load(
            io.BytesIO(content[DIGEST:]), map_location=device, weights_only=True
        )
    except Exception:  # whatever is wrong with a file, the one before it is tried
        return None
    return state
