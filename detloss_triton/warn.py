"""Warnings to the user's own line of code, each of them once."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from typing import Any, TypeVar

_Function = TypeVar("_Function", bound=Callable[..., Any])
_said: set[str] = set()


def not_traced(function: _Function) -> _Function:
    """Have the function called while a graph is traced, and its result be a constant in the graph.

    As `torch.compiler.assume_constant_result` does, which takes a second to import the compiler.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


@not_traced
def warn_once(message: str, kind: str = "") -> None:
    """Warn in the name of the line that called the library, once for each kind of message.

    Args:
        kind: what is said once, by default the message.
    """
    if (kind or message) in _said:
        return
    _said.add(kind or message)
    frame = sys._getframe()
    ours = (__name__.partition(".")[0], "torch")
    # The line to look at is the caller's of all this, also beyond modules and a compiler at work.
    while frame.f_back and frame.f_globals.get("__name__", "").partition(".")[0] in ours:
        frame = frame.f_back
    warnings.warn_explicit(
        message,
        UserWarning,
        frame.f_code.co_filename,
        frame.f_lineno,
        module=frame.f_globals.get("__name__"),
    )
