"""Functions that a graph or a transform calls as operators, and does not look into."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import torch

from . import modes

_Function = TypeVar("_Function", bound=Callable[..., Any])


def opaque(signature: str, fake: Callable[..., Any], name: str = "") -> Callable[..., Any]:
    """Declare the decorated function as an operator; in an eager step it is called as it is.

    Args:
        signature: arguments and result in torch's schema language.
        fake: of the same arguments, empty tensors like the results.
        name: of the operator; by default the function's.
    """

    def declare(function: _Function) -> _Function:
        operator = torch.library.custom_op(
            f"detloss_triton::{name or function.__name__.strip('_')}",
            function,
            mutates_args=(),
            schema=signature,
        )
        operator.register_fake(fake)

        @functools.wraps(function)
        def call(*args: Any) -> Any:
            outside = modes.is_compiling() or modes.is_transformed()
            return operator(*args) if outside else function(*args)

        return call  # type: ignore[return-value]

    return declare
