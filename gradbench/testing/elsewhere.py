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
    result, failure = _process().ask(function, *args, **kwargs)
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
        self.ask(torch.set_num_threads, torch.get_num_threads())  # sums have as many parts

    def ask(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> tuple[Any, str]:
        assert self._child.stdin is not None
        assert self._child.stdout is not None
        question = pickle.dumps((function, args, kwargs))
        # in a wrapping of its own, for the path must be known before it is opened
        self._child.stdin.write(pickle.dumps((sys.path, question)))
        self._child.stdin.flush()
        result, failure = pickle.load(self._child.stdout)
        return result, failure

    def end(self) -> None:
        self._child.communicate()  # closes its input, at which it ends


@functools.cache
def _process() -> _Process:
    process = _Process()
    atexit.register(process.end)
    return process


def serve() -> None:
    """Answer the questions on the standard input until it ends; run in the other process."""
    questions, answers = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a plug-in prints is no answer
    while questions.peek(1):
        sys.path[:], question = pickle.load(questions)
        try:
            function, args, kwargs = pickle.loads(question)
            answer = (function(*args, **kwargs), "")
        except Exception:  # whatever a plug-in raised belongs in the other process's report
            answer = (None, traceback.format_exc())
        answers.write(pickle.dumps(answer))
        answers.flush()
