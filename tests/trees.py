"""Trees of tensors in tests: their sum, and proof that nothing writes to what it was given."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from detloss_triton.bench.trees import leaves as leaves
from detloss_triton.bench.trees import mapped as mapped
from detloss_triton.bench.trees import shared as shared


def mixed(losses: Any) -> Tensor:
    """A sum of all losses with factors of their own."""
    terms = [value for _, value in leaves(losses)]
    return torch.stack([(i + 1) * term.sum() for i, term in enumerate(terms)]).sum()


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
