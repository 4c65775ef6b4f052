"""The component modules, functions and coders against their formulas in plain torch."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import detloss_triton as dt
from detloss_triton import functional

EPS32 = 2.0**-23


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def logits_and_labels(generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    logits = torch.randn(6, 3, generator=generator)
    return logits, torch.tensor([0, 2, 3, -100, 1, 0]), torch.rand(6, generator=generator)


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_sigmoid_cross_entropy_of_indices(generator: torch.Generator) -> None:
    logits, labels, weight = logits_and_labels(generator)
    target = F.one_hot(labels.clamp(0, 3), 4)[:, :3].float()
    each = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
    each = each * (labels >= 0).unsqueeze(1)
    loss = dt.CrossEntropyLoss(use_sigmoid=True)
    close(loss(logits, labels), each.mean())
    weighted = each * weight.unsqueeze(1)
    close(loss(logits, labels, weight, reduction_override="none"), weighted)
    close(loss(logits, labels, weight, avg_factor=3), weighted.sum() / (3 + EPS32))
    kept = dt.CrossEntropyLoss(use_sigmoid=True, avg_non_ignore=True, loss_weight=2.0)
    close(kept(logits, labels, weight), 2 * weighted.sum() / 15)
    pos = torch.tensor([1.0, 2.0, 3.0])
    expected = F.binary_cross_entropy_with_logits(logits, target, pos_weight=pos, reduction="none")
    expected = (expected * (labels >= 0).unsqueeze(1)).sum()
    heavier = dt.CrossEntropyLoss(use_sigmoid=True, class_weight=[1, 2, 3], reduction="sum")
    close(heavier(logits, labels), expected)


def test_sigmoid_cross_entropy_of_soft_targets(generator: torch.Generator) -> None:
    logits = torch.randn(6, 3, generator=generator)
    target = torch.rand(6, 3, generator=generator) - 0.2
    weight = torch.rand(6, 3, generator=generator)
    each = F.binary_cross_entropy_with_logits(logits, target, reduction="none") * (target >= 0)
    loss = dt.CrossEntropyLoss(use_sigmoid=True)
    close(loss(logits, target), each.mean())
    close(loss(logits, target, weight), (each * weight).mean())
    close(loss(logits[:, 0], target[:, 0]), each[:, 0].mean())


def test_softmax_cross_entropy(generator: torch.Generator) -> None:
    logits = torch.randn(5, 3, generator=generator)
    labels, weight = torch.tensor([0, 2, 1, -100, 1]), torch.rand(5, generator=generator)
    each = F.cross_entropy(logits, labels, reduction="none")
    close(dt.CrossEntropyLoss()(logits, labels), each.mean())
    close(dt.CrossEntropyLoss()(logits, labels, weight, avg_factor=2), (each * weight).sum() / 2)
    close(dt.CrossEntropyLoss(avg_non_ignore=True)(logits, labels), each.sum() / 4)
    by_class = torch.tensor([1.0, 2.0, 3.0])
    each = F.cross_entropy(logits, labels, weight=by_class, reduction="none")
    close(dt.CrossEntropyLoss(class_weight=[1, 2, 3], reduction="sum")(logits, labels), each.sum())
    with pytest.raises(NotImplementedError, match="use_mask"):
        dt.CrossEntropyLoss(use_mask=True)


def test_focal(generator: torch.Generator) -> None:
    logits, _, weight = logits_and_labels(generator)
    labels = torch.tensor([0, 2, 3, 3, 1, 0])
    mask = (torch.rand(6, 3, generator=generator) > 0.3).float()
    t, p = F.one_hot(labels, 4)[:, :3].float(), logits.sigmoid()
    each = F.binary_cross_entropy_with_logits(logits, t, reduction="none")
    each = each * (0.25 * t + 0.75 * (1 - t)) * (t * (1 - p) + (1 - t) * p) ** 2
    loss = dt.CrossSigmoidFocalLoss()
    close(loss(logits, labels), each.mean())
    masked = each * weight.unsqueeze(1) * mask
    close(loss(logits, labels, weight, valid_label_mask=mask, avg_factor=3.0), masked.sum() / 3)
    close(loss(logits, labels, weight, "none", valid_label_mask=mask), masked)
    close(functional.sigmoid_focal_loss(logits, t), each)
    close(loss(logits.view(2, 3, 3), labels.view(2, 3)), each.mean())


def test_quality_focal(generator: torch.Generator) -> None:
    logits, _, weight = logits_and_labels(generator)
    labels, scores = torch.tensor([0, 2, 3, 3, 1, 0]), torch.rand(6, generator=generator)
    dense = F.one_hot(labels, 4)[:, :3] * scores.unsqueeze(1)
    each = F.binary_cross_entropy_with_logits(logits, dense, reduction="none")
    each = (each * (dense - logits.sigmoid()) ** 2).sum(1)
    loss = dt.QualityFocalLoss()
    close(loss(logits, (labels, scores)), each.mean())
    close(loss(logits, dense), each.mean())
    close(loss(logits, dense, reduction_override="none"), each)
    close(loss(logits, (labels, scores), weight, 4.0), (each * weight).sum() / (4 + EPS32))
    close(loss(logits, dense, weight, 4.0), (each * weight).sum() / (4 + EPS32))
    close(dt.QualityFocalLoss(activated=True)(logits.sigmoid(), (labels, scores)), each.mean())
    ends = torch.tensor([[0.0, 1.0]], requires_grad=True)
    dt.QualityFocalLoss(activated=True)(ends, (torch.tensor([0]), torch.tensor([0.5]))).backward()
    assert ends.grad is not None and ends.grad.isfinite().all()
    with pytest.raises(ValueError, match="use_sigmoid"):
        dt.QualityFocalLoss(use_sigmoid=False)
    with pytest.raises(ValueError, match="use_sigmoid"):
        dt.CrossSigmoidFocalLoss(use_sigmoid=False)
    with pytest.raises(ValueError, match="label, score"):
        loss(logits, (labels,))


def boxes(generator: torch.Generator, n: int = 7) -> Tensor:
    low = torch.rand(n, 2, generator=generator)
    return torch.cat([low, low + 0.3 + torch.rand(n, 2, generator=generator)], 1)


def ious(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(IoU, union, enclosing area), in float64."""
    a, b = a.double(), b.double()
    size = (torch.minimum(a[:, 2:], b[:, 2:]) - torch.maximum(a[:, :2], b[:, :2])).clamp(min=0)
    union = (a[:, 2:] - a[:, :2]).prod(1) + (b[:, 2:] - b[:, :2]).prod(1) - size.prod(1)
    hull = torch.maximum(a[:, 2:], b[:, 2:]) - torch.minimum(a[:, :2], b[:, :2])
    return size.prod(1) / union, union, hull.prod(1)


def test_iou_losses(generator: torch.Generator) -> None:
    a, b = boxes(generator), boxes(generator)
    iou, union, hull = ious(a, b)
    weight = torch.rand(7, generator=generator)
    for mode, value in (
        ("log", -iou.clamp(1e-6).log()),
        ("square", 1 - iou**2),
        ("linear", 1 - iou),
    ):
        close(dt.IoULoss(mode=mode)(a, b), value.mean().float())
        close(functional.iou_loss(a, b, mode=mode, reduction="none"), value.float())
    close(dt.IoULoss(linear=True)(a, b), (1 - iou).mean().float())
    giou = 1 - iou + (hull - union) / hull
    rows = weight.unsqueeze(1).repeat(1, 4)
    close(dt.GIoULoss()(a, b, rows, avg_factor=2), ((giou * weight).sum() / 2).float())
    close(functional.generalized_box_iou_loss(a, b), giou.float())
    assert dt.GIoULoss()(a[:0], b[:0]) == 0
    with pytest.raises(ValueError, match="mode must be one of"):
        dt.IoULoss(mode="cubic")
    with pytest.raises(ValueError, match=r"IoULoss: target must have shape \(.*got"):
        dt.GIoULoss()(a, b[:3])


def test_distance_and_complete_iou(generator: torch.Generator) -> None:
    a, b = boxes(generator), boxes(generator)
    iou, _, _ = ious(a, b)
    low, high = torch.minimum(a, b), torch.maximum(a, b)
    diagonal = ((high[:, 2:] - low[:, :2]).double() ** 2).sum(1)
    centres = ((a[:, :2] + a[:, 2:] - b[:, :2] - b[:, 2:]).double() / 2).square().sum(1)
    diou = 1 - iou + centres / diagonal
    close(functional.distance_box_iou_loss(a, b), diou.float())
    aspect = [torch.atan((x[:, 2] - x[:, 0]) / (x[:, 3] - x[:, 1])).double() for x in (a, b)]
    v = 4 / math.pi**2 * (aspect[0] - aspect[1]) ** 2
    ciou = diou + v / (1 - iou + v) * v
    for differentiate in (False, True):
        x = a.clone().requires_grad_()
        loss = functional.complete_box_iou_loss(x, b, differentiate_alpha=differentiate)
        close(loss, ciou.float())
    held, flowing = (
        torch.autograd.grad(
            functional.complete_box_iou_loss(x, b, "sum", differentiate_alpha=d), x
        )[0]
        for d, x in ((False, a.clone().requires_grad_()), (True, a.clone().requires_grad_()))
    )
    assert (held - flowing).abs().max() > 1e-4


def test_distances(generator: torch.Generator) -> None:
    a, b = torch.randn(2, 5, 4, generator=generator).unbind()
    weight = torch.rand(5, 4, generator=generator)
    close(dt.L1Loss()(a, b), (a - b).abs().mean())
    close(dt.L1Loss()(a, b, weight, avg_factor=3), ((a - b).abs() * weight).sum() / 3)
    close(dt.L1Loss(reduction="none")(a, b, weight[:, 0]), (a - b).abs() * weight[:, :1])
    assert dt.L1Loss()(a[:0], b[:0]) == 0
    close(dt.smooth_l1_loss(a, b, beta=0.3), F.smooth_l1_loss(a, b, beta=0.3))
    with pytest.raises(ValueError, match="beta must be positive"):
        dt.smooth_l1_loss(a, b, beta=0.0)


def test_class_functions(generator: torch.Generator) -> None:
    logits, _, _ = logits_and_labels(generator)
    labels, scores = torch.tensor([0, 2, 3, -1, 1, 0]), torch.rand(6, generator=generator)
    one_hot = F.one_hot(labels.clamp(0, 3), 4)[:, :3] * (labels >= 0).unsqueeze(1)
    t = one_hot * scores.unsqueeze(1)
    each = F.binary_cross_entropy_with_logits(logits, t, reduction="none")
    scale = torch.where(one_hot > 0, t, 0.75 * logits.sigmoid() ** 2)
    close(functional.varifocal_loss(logits, labels, scores), (each * scale).sum(1))
    each = F.binary_cross_entropy_with_logits(logits, t.pow(1.5), reduction="none")
    scale = torch.where(one_hot > 0, 1.0, 0.5 * logits.sigmoid() ** 1.5)
    found = functional.matchability_aware_loss(logits, labels, scores, alpha=0.5)
    close(found, (each * scale).sum(1))
    p = logits.sigmoid()
    t = one_hot * (p**0.25 * scores.unsqueeze(1) ** 0.75).clamp(min=0.01)
    each = F.binary_cross_entropy_with_logits(logits, t, reduction="none")
    scale = torch.where(one_hot > 0, 1.0, p**2)
    close(functional.iou_aware_loss(logits, labels, scores), (each * scale).sum(1))
    bins, target = torch.randn(5, 8, generator=generator), torch.tensor([0.0, 0.3, 5.9, 6.5, 9.0])
    clamped = target.clamp(0, 6.99)
    log_p, left = bins.log_softmax(1), clamped.long()
    at = lambda i: log_p.gather(1, i.unsqueeze(1)).squeeze(1)  # noqa: E731  (two letters, used twice)
    expected = -((left + 1 - clamped) * at(left) + (clamped - left) * at(left + 1))
    close(functional.distribution_focal_loss(bins, target), expected)
    cost = torch.rand(3, 5, generator=generator)
    assert functional.linear_sum_assignment(cost).shape == (3,)


@pytest.mark.parametrize("reduction", ["avg", ""])
def test_unknown_reductions_are_refused(reduction: str) -> None:
    with pytest.raises(ValueError, match="reduction must be one of none, mean, sum"):
        dt.L1Loss(reduction=reduction)
    with pytest.raises(ValueError, match="avg_factor"):
        dt.L1Loss(reduction="sum")(torch.ones(2), torch.ones(2), avg_factor=2)


def test_all_zero_weights_keep_the_shape(generator: torch.Generator) -> None:
    a, b = boxes(generator), boxes(generator)
    loss = dt.IoULoss(reduction="none")(a, b, torch.zeros(7))
    assert loss.shape == (7,) and (loss == 0).all()


def test_coders_invert_themselves(generator: torch.Generator) -> None:
    anchors, targets = boxes(generator) * 50, boxes(generator) * 50
    coder = dt.DeltaXYWHBBoxCoder(
        target_means=(0.1, 0.0, 0.0, 0.2), target_stds=(0.1, 0.1, 0.2, 0.2)
    )
    close(coder.decode(anchors, coder.encode(anchors, targets)), targets)
    clipped = coder.decode(anchors, coder.encode(anchors, targets), max_shape=(40, 30))
    close(clipped[:, 0::2], targets[:, 0::2].clamp(0, 30))
    close(clipped[:, 1::2], targets[:, 1::2].clamp(0, 40))
    batch = torch.stack([anchors, anchors])
    limits = torch.tensor([[40, 30], [1000, 1000]])
    both = coder.decode(batch, coder.encode(batch, torch.stack([targets, targets])), limits)
    close(both, torch.stack([clipped, targets]))
    points = (anchors[:, :2] + anchors[:, 2:]) / 2
    distances = dt.DistancePointBBoxCoder()
    close(distances.decode(points, distances.encode(points, targets)), targets)
    assert distances.encode(points, targets, max_dis=5.0).amax() <= 4.9
    weight = torch.tensor([0.0] + [1.0] * (len(anchors) - 1))
    for used, reference in ((coder, anchors), (distances, points)):
        codes = used.encode(reference, targets)
        codes[0] = torch.nan
        close(used.decode(reference, codes, weight=weight), targets * weight.unsqueeze(-1))
    with pytest.raises(ValueError, match="bboxes must have shape"):
        coder.decode(anchors[:, :3], anchors)
    with pytest.raises(ValueError, match="target_stds must hold 4"):
        dt.DeltaXYWHBBoxCoder(target_stds=(1.0,))
