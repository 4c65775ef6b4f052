"""The losses of a criterion as one number."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from detloss_triton.ops.total import total


def sum_losses(losses: Mapping[str, Any]) -> Tensor:
    """The total of a criterion's losses, lists over levels or images included.

    In one launch where all are numbers.

    An entry called "total_loss" is a summary of the others and is left out.

    Shapes:
        losses: tensors of any size, or nested lists of them. Returns a 0-dim tensor.

    Raises:
        ValueError: if there is nothing to sum.
    """
    terms = _flat([value for name, value in losses.items() if name != "total_loss"])
    if not terms:
        raise ValueError("losses holds no tensor to sum")
    if all(term.numel() == 1 for term in terms):
        return total.unbound(tuple(terms))[0]
    return torch.cat([term.reshape(-1) for term in terms]).sum()


def _flat(values: Any) -> list[Tensor]:
    terms: list[Tensor] = []
    for value in values.values() if isinstance(values, Mapping) else values:
        if isinstance(value, Tensor):
            terms.append(value)
        else:
            terms += _flat(value)
    return terms
