"""Task-aligned matching: ties, NaN, what is far apart, and sizes that take several blocks.

Against a matcher written target by target: test_criteria.py.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from test_ops import samples
from torch import Tensor

from detloss_triton.engine import REGISTRY
from detloss_triton.ops import alignment

ALIGN: Any = REGISTRY["align"]
PARAMS = {"iou": "ciou", "iou_power": 6.0, "class_power": 0.5, "topk": 10, "heads": 1}
PARAMS |= {"rules": "otx", "reach": 0.0}


def aligned(
    boxes: Tensor,
    logits: Tensor,
    anchors: Tensor,
    targets: Tensor,
    strides: tuple[Tensor, ...] = (),
    **changes: Any,
) -> tuple[Tensor, Tensor]:
    """Of boxes (B, A, 4), logits (B, A, C), and targets (B, T, 5)."""
    levels = (logits.transpose(1, 2),), (boxes.transpose(1, 2),)
    given = *levels, anchors, (), strides, targets
    found: tuple[Tensor, Tensor] = ALIGN(*given, **{**PARAMS, **changes})
    return found


def rows(*targets: list[float]) -> Tensor:
    return torch.tensor([list(targets)])


@pytest.mark.parametrize("topk", [1, 3, 7])
def test_of_equal_anchors_the_first_are_kept(topk: int, backend: str, device: torch.device) -> None:
    """Anchors 2, 3, 5 to 8 and 11 tie, 4 is better; target 1 of the same box has nothing left."""
    with device:
        boxes = torch.tensor([0.0, 0.0, 8.0, 6.0]).repeat(1, 12, 1)
        boxes[0, 4, 3] = 7.0
        anchors = torch.full((12, 2), 4.0)
        anchors[[0, 1, 9, 10]] = 20.0
        targets = rows([1, 0, 0, 8, 8], [1, 0, 0, 8, 8]).to(device)
        target, score = aligned(boxes, torch.zeros(1, 12, 2), anchors, targets, topk=topk)
    kept = [4, 2, 3, 5, 6, 7, 8, 11][:topk]
    assert target[0].ge(0).nonzero()[:, 0].tolist() == sorted(kept)
    assert target[0, kept].eq(0).all()
    assert score[0].argmax() == 4 and score[0].gt(0).sum() == topk


def test_nan_spreads_as_far_as_it_should(backend: str, device: torch.device) -> None:
    """A NaN logit takes an anchor from all, and a NaN box the scores of its image."""
    with device:
        boxes = torch.tensor([0.0, 0.0, 8.0, 6.0]).repeat(2, 5, 1)
        boxes[:, 1, 3] = 7.0
        logits = torch.zeros(2, 5, 3)
        logits[0, 1, 2] = logits[0, 2, 2] = math.nan
        boxes[1, 3, 0] = math.nan
        anchors = torch.full((5, 2), 4.0)
        anchors[2] = 20.0
        targets = torch.cat([rows([0, 0, 0, 8, 8], [2, 0, 0, 8, 8], [-1, 0, 0, 8, 8])] * 2)
        target, score = aligned(boxes, logits, anchors, targets)
    # In the first image target 1 keeps anchor 1 with a NaN, and no target has anchor 2 in it.
    assert target.tolist() == [[0, -1, -1, 0, 0], [0, 0, -1, -1, 0]]
    assert score[0, [0, 3, 4]].gt(0.1).all() and score[0, 1] == 0
    assert score.isnan().tolist() == [[False] * 5, [True, True, False, False, True]]


@pytest.mark.parametrize("topk", [1, 4])
def test_more_nan_than_are_kept(topk: int, backend: str, device: torch.device) -> None:
    with device:
        boxes = torch.tensor([0.0, 0.0, 8.0, 6.0]).repeat(1, 9, 1)
        logits = torch.zeros(1, 9, 2)
        logits[0, 2:7, 1] = math.nan
        anchors = torch.full((9, 2), 4.0)
        targets = rows([1, 0, 0, 8, 8], [0, 0, 0, 8, 8]).to(device)
        target, _ = aligned(boxes, logits, anchors, targets, topk=topk)
    # Target 1 keeps the first topk anchors, of which it gets those that target 0 has no NaN at.
    expected = torch.full((9,), -1)
    expected[: min(topk, 2)] = 1
    assert target[0].tolist() == expected.tolist()


@pytest.mark.parametrize("iou", ["ciou", "diou", "iou"])
def test_pairs_that_lie_apart_are_as_if_evaluated(iou: str) -> None:
    """A CPU leaves them out; boxes that touch, are inside out or NaN are not missed."""
    generator = torch.Generator().manual_seed(0)
    low = torch.rand(2, 300, 2, generator=generator) * 60
    boxes = torch.cat([low, low + torch.rand(2, 300, 2, generator=generator) * 9 - 1], -1)
    targets = boxes[:, ::25].round().clone()
    targets[:, 0] = 0
    boxes[:, 1, :2], boxes[:, 1, 2:] = targets[:, 1, 2:], targets[:, 1, 2:] + 3
    boxes[1, 7, 2] = math.nan
    label = torch.arange(12.0).expand(2, -1).unsqueeze(2) % 3
    logits = torch.randn(2, 3, 300, generator=generator)
    anchors = (boxes[0, :, :2] + boxes[0, :, 2:]) / 2
    params = {**PARAMS, "iou": iou}
    given = (logits,), (boxes.mT,), anchors, (), (), torch.cat([label, targets], 2)
    target, score = ALIGN.cpu_form(ALIGN.given(*given, **params))
    expected, expected_score = ALIGN.reference(*given, **params)
    assert torch.equal(target, expected) and (target >= 0).sum() > 10
    torch.testing.assert_close(score, expected_score, rtol=1e-6, atol=1e-7, equal_nan=True)
    assert score[0].gt(0.1).any() and score[1][target[1] >= 0].isnan().all()


def test_blocks_of_any_size(
    backend: str, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More blocks than are read at once, of which the first has a NaN; targets one by one."""
    for sample in samples(ALIGN, 100, device)[:1]:
        sample.inputs[1][0][0, 0, 0] = math.nan
        expected, expected_score = ALIGN.reference(*sample.inputs, **sample.params)
        for name, size in {"_BLOCK": 16, "_WIDE_BLOCK": 16, "_TARGETS": 1}.items():
            monkeypatch.setattr(alignment, name, size)
        target, score = ALIGN(*sample.inputs, **sample.params)
        assert torch.equal(target, expected) and (target >= 0).any() and score.isnan().any()
        torch.testing.assert_close(score, expected_score, rtol=1e-5, atol=1e-6, equal_nan=True)


@pytest.mark.parametrize("empty", ["images", "targets", "anchors", "a level"])
def test_nothing_to_match(empty: str, backend: str, device: torch.device) -> None:
    *_, sample = samples(ALIGN, 0 if empty == "anchors" else 2, device)
    logits, sides, anchors, decoding, strides, targets = sample.inputs
    if empty == "images":
        logits, sides = (tuple(x[:0] for x in levels) for levels in (logits, sides))
        targets = targets[:0]
    elif empty == "targets":
        targets = targets[:, :0]
    target, score = ALIGN(logits, sides, anchors, decoding, strides, targets, **sample.params)
    assert target.shape == score.shape == (2 * len(targets), len(anchors))
    assert target.dtype == torch.int64 and score.dtype == torch.float32
    if empty != "a level":
        assert target.eq(-1).all() and score.eq(0).all()


def test_levels_of_several_dtypes(backend: str, device: torch.device) -> None:
    *_, sample = samples(ALIGN, 300, device)
    logits, sides, *others = sample.inputs
    logits = (logits[0].half(), *logits[1:])
    sides = (*sides[:1], sides[1].bfloat16(), *sides[2:])
    target, score = ALIGN(logits, sides, *others, **sample.params)
    expected, expected_score = ALIGN.reference(logits, sides, *others, **sample.params)
    assert torch.equal(target, expected) and (target >= 0).any()
    torch.testing.assert_close(score, expected_score, rtol=1e-5, atol=1e-6)
