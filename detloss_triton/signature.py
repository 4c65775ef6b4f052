"""What a step depends on besides its tensors' values: a graph fits where all of it is the same."""

from __future__ import annotations

import enum
from collections.abc import Callable, Hashable, Iterator, Mapping
from operator import is_
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .backend import is_cpu

_CONSTANTS = (
    bool,
    int,
    float,
    complex,
    str,
    bytes,
    type(None),
    enum.Enum,
    np.number,
    torch.dtype,
    torch.device,
)


def described(tree: Any, tensors: list[Tensor], places: dict[int, int]) -> Hashable:
    """Containers and constants of a tree, with numbers in place of tensors, which are collected.

    One that is met again has its first number.

    Args:
        places: of the tensors, by their id.

    Raises:
        TypeError: for what may hold tensors or change unseen.
    """
    if isinstance(tree, Tensor):
        place = places.setdefault(id(tree), len(tensors))
        if place == len(tensors):
            tensors.append(tree)
        return Tensor, place
    if isinstance(tree, _CONSTANTS):
        return type(tree), tree
    if isinstance(tree, Mapping):
        items = tree.items()
        return type(tree), *((key, described(x, tensors, places)) for key, x in items)
    if isinstance(tree, (list, tuple)):
        return type(tree), *(described(x, tensors, places) for x in tree)
    raise TypeError(f"an argument holds {type(tree).__name__}, of which a graph cannot be sure")


def layout(x: Tensor) -> Hashable:
    return x.shape, x.stride(), x.dtype, x.device, x.requires_grad


def leaves(tree: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted path, leaf) of nested containers, in order."""
    if isinstance(tree, (Mapping, list, tuple)):
        for key, x in tree.items() if isinstance(tree, Mapping) else enumerate(tree):
            yield from leaves(x, f"{path}.{key}" if path else str(key))
    else:
        yield path, tree


def mapped(change: Callable[[Any], Any], tree: Any) -> Any:
    """A copy of the tree with `change(leaf)` in place of each leaf, in order."""
    if isinstance(tree, Mapping):
        return {key: mapped(change, x) for key, x in tree.items()}
    if isinstance(tree, (list, tuple)):
        entries = [mapped(change, x) for x in tree]
        named_tuple = hasattr(tree, "_fields")
        return type(tree)(*entries) if named_tuple else type(tree)(entries)
    return change(tree)


class State:
    """What a module, its parts, and the objects it holds are made of: numbers, words, tables,
    hooks, and where their tensors lie. What a function or an object in C holds is not looked at.

    It is walked through anew where a value has been replaced, which is found out at little cost.

    Attributes:
        tensors: all that were found.
    """

    def __init__(self, module: nn.Module, without: str) -> None:
        self._module = module
        self._without = without
        self.tensors: list[Tensor] = []
        self._places: list[Hashable] = []
        self._containers: list[tuple[Any, Any]] = []
        self._met: dict[int, int] = {}
        self._key: Hashable = None

    def key(self) -> Hashable:
        if not self._containers or self._has_changed():
            self.tensors, self._containers, self._met = [], [], {}
            self._key = self._walk(self._module)
            self._places = list(map(_place, self.tensors))
        return self._key

    def _has_changed(self) -> bool:
        return not (
            all(_is_as_before(now, before) for now, before in self._containers)
            and list(map(_place, self.tensors)) == self._places
        )

    def _walk(self, x: Any) -> Hashable:
        if isinstance(x, _CONSTANTS):
            return type(x), x
        if id(x) in self._met:
            return self._met[id(x)]
        self._met[id(x)] = len(self._met)
        if isinstance(x, Tensor):
            self.tensors.append(x)
            return Tensor, _place(x)
        if isinstance(x, dict):
            self._containers.append((x, dict(x)))
            return tuple((key, self._walk(v)) for key, v in x.items() if key != self._without)
        if isinstance(x, (list, tuple)):
            self._containers.append((x, list(x)))
            return type(x), *map(self._walk, x)
        if hasattr(x, "__dict__") and not isinstance(x, type) and not callable_in_python(x):
            return type(x), self._walk(vars(x))
        return (type(x), x) if isinstance(x, Hashable) else (type(x), id(x))


def callable_in_python(x: Any) -> bool:
    """Whether this is a function, or a method: one is told from another by what it is."""
    return hasattr(x, "__code__") or hasattr(x, "__func__")


def _place(x: Tensor) -> Hashable:
    # The host may read what lies on a CPU, so there values count.
    return x.data_ptr(), layout(x), x._version if is_cpu(x.device) else 0


def _is_as_before(now: Any, before: Any) -> bool:
    if len(now) != len(before):
        return False
    if isinstance(now, dict):
        return list(now) == list(before) and all(map(is_, now.values(), before.values()))
    return all(map(is_, now, before))
