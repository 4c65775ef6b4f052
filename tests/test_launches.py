"""What a step (forward, `sum_losses`, backward) launches on a GPU, counted on meta tensors."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from machine import needs_triton
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from trees import leaves

from detloss_triton import backend, sum_losses
from detloss_triton.bench.batches import BUILDERS

# One more than reached, whatever the size.
MOST = {"atss": 7, "rtmdet": 7, "ssd": 7, "yolox": 8, "yolov9": 14, "detr": 22, "dfine": 34}
SIZES: dict[str, list[dict[str, Any]]] = {
    "atss": [{}, {"images": 3, "strides": (8, 16, 32, 64)}, {"positives": 0.0}],
    "rtmdet": [{}, {"images": 3, "size": 128}],
    "ssd": [{}, {"images": 3, "anchors": 50}],
    "yolox": [{}, {"images": 3, "anchors": 50}],
    "yolov9": [{}, {"images": 3, "size": 128, "targets": 7}],
    "detr": [{}, {"images": 3, "boxes": 9, "layers": 5, "queries": 30, "groups": 3}],
    "dfine": [{}, {"images": 3, "boxes": 9, "layers": 5, "queries": 30, "groups": 3}],
}

# Operations that make a view or allocate, and start nothing on a GPU.
FREE = (
    "view", "expand", "slice", "select", "squeeze", "permute", "transpose", "detach", "alias",
    "as_strided", "split", "unbind", "empty", "t.default", "narrow", "reshape", "unflatten",
    "lift_fresh",
)  # fmt: skip


class Operations(TorchDispatchMode):
    """Counts operations of torch that write tensors of the device."""

    def __init__(self) -> None:
        super().__init__()
        self.found = Counter[str]()

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        out = function(*args, **(kwargs or {}))
        first = out[0] if isinstance(out, (tuple, list)) and out else out
        name = str(function).removeprefix("aten.")
        is_free = any(word in name for word in FREE)
        if isinstance(first, Tensor) and first.is_meta and not is_free:
            self.found[name] += 1
        return out


def launches(name: str, **sizes: Any) -> tuple[int, Counter[str]]:
    """(launches of our kernels, operations of torch)."""
    meta = torch.device("meta")
    batch = BUILDERS[name](**sizes).on(meta)
    criterion = batch.criterion(meta)
    wanted = [x for _, x in leaves(batch.inputs) if x.requires_grad]
    with backend.record_launches() as launched, Operations() as operations:
        loss = sum_losses(criterion(**batch.inputs))
        torch.autograd.grad(loss, wanted)
    return len(launched), operations.found


@needs_triton
@pytest.mark.parametrize("name", MOST)
def test_a_step_takes_few_launches(name: str) -> None:
    """As many, however many images, levels, layers, boxes and queries there are."""
    for sizes in SIZES[name]:
        ours, torchs = launches(name, **sizes)
        assert ours > 0
        assert ours + sum(torchs.values()) < MOST[name], (sizes, ours, torchs)
