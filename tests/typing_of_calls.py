"""For mypy, never run: calls are typed as `forward` is; an unneeded `ignore` is an error."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from typing_extensions import assert_type

import detloss_triton as dt

Losses = dict[str, Tensor]


def criteria(x: Tensor, levels: list[Tensor], outputs: dict[str, Any], targets: Any) -> None:
    detr, dfine = dt.DetrCriterion({}), dt.DFINECriterion({})
    assert_type(detr(outputs, targets), Losses)
    assert_type(dfine(outputs, targets, num_boxes=3), Losses)
    detr(x, targets)  # type: ignore[arg-type]
    detr(outputs)  # type: ignore[call-arg]
    ssd = dt.SSDCriterion(80)
    ssd(x, x, x, x, x)  # type: ignore[call-arg]
    assert_type(dt.graphed(detr)(outputs, targets), Losses)


def whole_losses(levels: list[Tensor], targets: Any) -> None:
    loss = dt.RTMDetLoss(80)
    assert_type(loss(levels, levels, targets), dict[str, list[Tensor]])
    loss(levels, targets)  # type: ignore[call-arg]


def slots(x: Tensor) -> None:
    assert_type(dt.GIoULoss()(x, x, avg_factor=2.0), Tensor)
    dt.QualityFocalLoss()(x, x, 3)  # type: ignore[arg-type]
