"""Nested dictionaries, lists and tuples of tensors: what criteria take and return."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor


def leaves(tree: Any, path: str = "") -> Iterator[tuple[str, Tensor]]:
    """(dotted path, tensor) of every tensor, in order."""
    if isinstance(tree, Tensor):
        yield path, tree
    elif isinstance(tree, (dict, list, tuple)):
        items = tree.items() if isinstance(tree, dict) else enumerate(tree)
        for key, value in items:
            yield from leaves(value, f"{path}.{key}" if path else str(key))


def mapped(change: Callable[[str, Tensor], Tensor], tree: Any, path: str = "") -> Any:
    """A copy of the tree with `change(dotted path, tensor)` in place of each tensor."""
    if isinstance(tree, Tensor):
        return change(path, tree)
    if isinstance(tree, dict):
        return {k: mapped(change, v, f"{path}.{k}" if path else str(k)) for k, v in tree.items()}
    if isinstance(tree, (list, tuple)):
        items = [mapped(change, v, f"{path}.{i}" if path else str(i)) for i, v in enumerate(tree)]
        return type(tree)(items)
    return tree


class Unchanged:
    """Asserts on leaving that a tree has kept its keys, and its tensors their values and version.

    A kernel's writes do not count as a new version, and an in-place operation may write what was
    there: so both are compared.
    """

    def __init__(self, tree: Any) -> None:
        self.tree = tree
        self.before = [(path, x, x.detach().clone(), x._version) for path, x in leaves(tree)]

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, *_: Any) -> None:
        if kind is not None:
            return
        after = list(leaves(self.tree))
        assert [path for path, _ in after] == [path for path, *_ in self.before]
        for (path, now), (_, tensor, values, version) in zip(after, self.before, strict=True):
            assert now is tensor, f"{path} was replaced"
            assert now._version == version, f"{path} was written to"
            torch.testing.assert_close(
                now.detach(), values, rtol=0, atol=0, equal_nan=True, msg=f"{path} has changed"
            )
