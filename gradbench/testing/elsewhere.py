"""Calls functions in one other process, whose hashes of text are other ones.

A set of words has another order there, and nothing that this process remembers exists there.
"""

from __future__ import annotations

import atexit
import functools
import os
import pickle
import subprocess
import sys
import traceback
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import torch

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")

PROGRAM = "from gradbench.testing.elsewhere import serve; serve()"


def call(
    function: Callable[Arguments, Result], *args: Arguments.args, **kwargs: Arguments.kwargs
) -> Result:
    """Return ``function(*args, **kwargs)``, computed in the other process.

    The process starts with the first call and serves all of them. Functions and classes travel
    by their name, so they must be importable; everything else by value.

    Raises:
        RuntimeError: holding the traceback, if the call fails there.
    """
    result, failure = _process().ask((function, args, kwargs))
    if failure:
        raise RuntimeError(f"The call failed in the other process:\n{failure}")
    answer: Result = result
    return answer


class _Process:
    def __init__(self) -> None:
        self._child = subprocess.Popen(
            [sys.executable, "-c", PROGRAM],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONHASHSEED": "random"},
        )
        self.ask((_agree, (sys.path, torch.get_num_threads()), {}))

    def ask(self, question: tuple[Any, ...]) -> Any:
        assert self._child.stdin is not None
        assert self._child.stdout is not None
        self._child.stdin.write(pickle.dumps(question))
        self._child.stdin.flush()
        return pickle.load(self._child.stdout)

    def end(self) -> None:
        self._child.communicate()  # closes its input, at which it ends


@functools.cache
def _process() -> _Process:
    process = _Process()
    atexit.register(process.end)
    return process


def _agree(path: list[str], threads: int) -> None:
    """Import from where the first process does; sum in as many parts."""
    sys.path[:] = path
    torch.set_num_threads(threads)


def serve() -> None:
    """Answer the questions on the standard input until it ends; run in the other process."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a plug-in prints is no answer
    while sys.stdin.buffer.peek(1):
        try:
            function, args, kwargs = pickle.load(sys.stdin.buffer)
            answer = (function(*args, **kwargs), "")
        except Exception:  # whatever a plug-in raised belongs in the other process's report
            answer = (None, traceback.format_exc())
        answers.write(pickle.dumps(answer))
        answers.flush()
