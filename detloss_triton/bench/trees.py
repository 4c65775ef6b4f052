"""Nested dictionaries, lists and tuples of tensors: what criteria take and return."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor

from detloss_triton import signature


def leaves(tree: Any, path: str = "") -> Iterator[tuple[str, Tensor]]:
    """(dotted path, tensor) of every tensor, in order."""
    return ((here, x) for here, x in signature.leaves(tree, path) if isinstance(x, Tensor))


def mapped(change: Callable[[str, Tensor], Tensor], tree: Any, path: str = "") -> Any:
    """A copy of the tree with `change(dotted path, tensor)` in place of each tensor."""
    if isinstance(tree, Tensor):
        return change(path, tree)
    if isinstance(tree, dict):
        return {k: mapped(change, v, f"{path}.{k}" if path else str(k)) for k, v in tree.items()}
    if isinstance(tree, (list, tuple)):
        items = [mapped(change, v, f"{path}.{i}" if path else str(i)) for i, v in enumerate(tree)]
        return type(tree)(*items) if hasattr(tree, "_fields") else type(tree)(items)
    return tree


def shared(change: Callable[[str, Tensor], Tensor]) -> Callable[[str, Tensor], Tensor]:
    """The same change, once for each tensor: what is one in many places stays one."""
    made: dict[int, tuple[Tensor, Tensor]] = {}

    def once(path: str, x: Tensor) -> Tensor:
        if id(x) not in made:
            made[id(x)] = x, change(path, x)  # holds x, as its id is reused when it is gone
        return made[id(x)][1]

    return once
