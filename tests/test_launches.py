"""What a step (forward, `sum_losses`, backward) launches on a GPU, counted on meta tensors."""

from __future__ import annotations

from typing import Any

import pytest
from machine import needs_triton

from detloss_triton.bench.launches import launches

# One more than reached, whatever the size.
MOST = {"atss": 6, "rtmdet": 6, "ssd": 7, "yolox": 7, "yolov9": 14, "detr": 20, "dfine": 31}
SIZES: dict[str, list[dict[str, Any]]] = {
    "atss": [{}, {"images": 3, "strides": (8, 16, 32, 64)}, {"positives": 0.0}],
    "rtmdet": [{}, {"images": 3, "size": 128}],
    "ssd": [{}, {"images": 3, "anchors": 50}],
    "yolox": [{}, {"images": 3, "anchors": 50}],
    "yolov9": [{}, {"images": 3, "size": 128, "targets": 7}, {"rules": "yolo"}],
    "detr": [{}, {"images": 3, "boxes": 9, "layers": 5, "queries": 30, "groups": 3}],
    "dfine": [{}, {"images": 3, "boxes": 9, "layers": 5, "queries": 30, "groups": 3}],
}


@needs_triton
@pytest.mark.parametrize("name", MOST)
def test_a_step_takes_few_launches(name: str) -> None:
    """As many, however many images, levels, layers, boxes and queries there are."""
    for sizes in SIZES[name]:
        ours, torchs = launches(name, **sizes)
        assert ours > 0
        assert ours + sum(torchs.values()) < MOST[name], (sizes, ours, torchs)
