"""The seven criteria as their formulas are written, in float64: short, slow, and without our code.

Each takes the inputs of a batch of `detloss_triton.bench.batches`, with that batch's settings.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from trees import mapped

EPS32 = 2.0**-23


def in_double(inputs: dict[str, Any]) -> dict[str, Any]:
    """A copy whose floats are float64; what requires a gradient is a leaf again."""
    return mapped(
        lambda _, x: (
            x.detach().double().requires_grad_(x.requires_grad) if x.is_floating_point() else x
        ),
        inputs,
    )


def bce(x: Tensor, t: Tensor) -> Tensor:
    return F.binary_cross_entropy_with_logits(x, t, reduction="none")


def one_hot(labels: Tensor, classes: int) -> Tensor:
    """Of labels outside [0, classes), zeros."""
    return (labels.unsqueeze(-1) == torch.arange(classes)).double()


def iou_union_hull(a: Tensor, b: Tensor, eps: float = 1e-6) -> tuple[Tensor, Tensor, Tensor]:
    """IoU, union and hull of (..., 4) boxes xyxy, the latter two at least eps."""
    inter = (torch.minimum(a[..., 2:], b[..., 2:]) - torch.maximum(a[..., :2], b[..., :2])).clamp(0)
    areas = [(x[..., 2] - x[..., 0]) * (x[..., 3] - x[..., 1]) for x in (a, b)]
    union = (areas[0] + areas[1] - inter.prod(-1)).clamp(eps)
    hull = torch.maximum(a[..., 2:], b[..., 2:]) - torch.minimum(a[..., :2], b[..., :2])
    return inter.prod(-1) / union, union, hull.clamp(0).prod(-1).clamp(eps)


def giou(a: Tensor, b: Tensor) -> Tensor:
    iou, union, hull = iou_union_hull(a, b)
    return iou - (hull - union) / hull


def rows(x: Tensor, features: int) -> Tensor:
    """(N, features, H, W) as (N, H W, features)."""
    return x if x.dim() == 3 else x.flatten(2).transpose(1, 2).reshape(len(x), -1, features)


def total(losses: dict[str, Any]) -> Tensor:
    return sum((x.sum() for value in losses.values() for x in value), torch.zeros(()).double())


def atss(inputs: dict[str, Any], classes: int = 5) -> dict[str, list[Tensor]]:
    out: dict[str, list[Tensor]] = {"loss_cls": [], "loss_bbox": [], "loss_centerness": []}
    norm = torch.zeros(()).double()
    for anchor, x, box, centre, label, weight, target, mask in zip(
        *(inputs[key] for key in ("anchors", "cls_score", "bbox_pred", "centerness", "labels")),
        *(inputs[key] for key in ("label_weights", "bbox_targets", "valid_label_mask")),
        strict=True,
    ):
        x, t = rows(x, classes), one_hot(label, classes)
        p = x.sigmoid()
        wrong = (1 - p) * t + p * (1 - t)
        focal = (0.25 * t + 0.75 * (1 - t)) * wrong.square() * bce(x, t)
        out["loss_cls"].append((focal * weight.unsqueeze(-1) * mask).sum() / inputs["avg_factor"])
        positive = (label >= 0) & (label < classes)
        anchor, target = anchor[positive], target[positive]
        delta = rows(box, 4)[positive] * torch.tensor([0.1, 0.1, 0.2, 0.2], dtype=torch.float64)
        middle, size = (anchor[:, :2] + anchor[:, 2:]) / 2, anchor[:, 2:] - anchor[:, :2]
        limit = abs(math.log(16 / 1000))
        pred_middle = middle + delta[:, :2] * size
        pred_half = size * delta[:, 2:].clamp(-limit, limit).exp() / 2
        pred = torch.cat([pred_middle - pred_half, pred_middle + pred_half], 1)
        low, high = middle - target[:, :2], target[:, 2:] - middle
        ratios = torch.minimum(low, high) / torch.maximum(low, high)
        centerness = ratios.prod(1).clamp(0).sqrt()
        norm = norm + centerness.sum()
        out["loss_bbox"].append((2 * (1 - giou(pred, target)) * centerness).sum() / (1 + EPS32))
        logits = rows(centre, 1).squeeze(-1)[positive]
        divisor = inputs["avg_factor"] + EPS32
        out["loss_centerness"].append(bce(logits, centerness).sum() / divisor)
    out["loss_bbox"] = [loss / norm.clamp(1) for loss in out["loss_bbox"]]
    return out


def rtmdet(inputs: dict[str, Any], classes: int = 5) -> dict[str, list[Tensor]]:
    out: dict[str, list[Tensor]] = {"loss_cls": [], "loss_bbox": []}
    cls_norm, box_norm = torch.zeros(()).double(), torch.zeros(()).double()
    names = ("cls_score", "bbox_pred", "labels", "label_weights", "bbox_targets", "assign_metrics")
    for x, box, label, weight, target, metric in zip(*(inputs[n] for n in names), strict=True):
        x = rows(x, classes)
        t = one_hot(label, classes) * metric.unsqueeze(-1)
        focal = (bce(x, t) * (t - x.sigmoid()).square()).sum(-1)
        out["loss_cls"].append((focal * weight).sum() / (1 + EPS32))
        positive = (label >= 0) & (label < classes)
        gap = 1 - giou(rows(box, 4)[positive], target[positive])
        out["loss_bbox"].append(2 * (gap * metric[positive]).sum() / (1 + EPS32))
        cls_norm, box_norm = cls_norm + metric.sum(), box_norm + metric[positive].sum()
    out["loss_cls"] = [loss / cls_norm.clamp(1) for loss in out["loss_cls"]]
    out["loss_bbox"] = [loss / box_norm.clamp(1) for loss in out["loss_bbox"]]
    return out


def ssd(inputs: dict[str, Any], classes: int = 5) -> dict[str, list[Tensor]]:
    out: dict[str, list[Tensor]] = {"loss_cls": [], "loss_bbox": []}
    norm = inputs["avg_factor"] or 1
    for i, label in enumerate(inputs["labels"]):
        x = inputs["cls_score"][i]
        loss = F.cross_entropy(x, label, reduction="none") * inputs["label_weights"][i]
        positive, negative = loss[label < classes], loss[label == classes]
        hardest = negative.topk(min(3 * len(positive), len(negative))).values
        out["loss_cls"].append((positive.sum() + hardest.sum()).view(1) / norm)
        d = (inputs["bbox_pred"][i] - inputs["bbox_targets"][i]).abs()
        smooth = torch.where(d < 1, d.square() / 2, d - 0.5) * inputs["bbox_weights"][i]
        out["loss_bbox"].append(smooth.sum() / (norm + EPS32))
    return out


def yolox(inputs: dict[str, Any], classes: int = 5) -> dict[str, Tensor]:
    positive, n = inputs["pos_masks"], inputs["num_total_samples"]

    def of_positives(name: str) -> Tensor:
        return inputs[name].flatten(0, 1)[positive]

    iou = iou_union_hull(of_positives("flatten_bboxes"), inputs["bbox_targets"])[0].clamp(1e-16)
    return {
        "loss_cls": bce(of_positives("flatten_cls_preds"), inputs["cls_targets"]).sum() / n,
        "loss_bbox": 5 * (1 - iou.square()).sum() / n,
        "loss_obj": bce(inputs["flatten_objectness"].view(-1, 1), inputs["obj_targets"]).sum() / n,
        "loss_l1": (of_positives("flatten_bbox_preds") - inputs["l1_targets"]).abs().sum() / n,
    }


def ciou(a: Tensor, b: Tensor, alpha_grad: bool, eps: float = 1e-9) -> Tensor:
    inter = (torch.minimum(a[..., 2:], b[..., 2:]) - torch.maximum(a[..., :2], b[..., :2])).clamp(0)
    size_a, size_b = a[..., 2:] - a[..., :2], b[..., 2:] - b[..., :2]
    iou = inter.prod(-1) / (size_a.prod(-1) + size_b.prod(-1) - inter.prod(-1) + eps)
    apart = ((a[..., :2] + a[..., 2:] - b[..., :2] - b[..., 2:]) / 2).square().sum(-1)
    hull = torch.maximum(a[..., 2:], b[..., 2:]) - torch.minimum(a[..., :2], b[..., :2])
    angle = torch.atan(size_a[..., 0] / (size_a[..., 1] + eps)) - torch.atan(
        size_b[..., 0] / (size_b[..., 1] + eps)
    )
    v = 4 / math.pi**2 * angle.square()
    alpha = v / (v - iou + 1 + eps)
    alpha = alpha if alpha_grad else alpha.detach()
    return iou - apart / (hull.square().sum(-1) + eps) - alpha * v


def yolov9(inputs: dict[str, Any], classes: int = 5, size: int = 64) -> dict[str, Tensor]:
    strides = (8, 16, 32)
    sides = [torch.arange(size // s).double() * s + s // 2 for s in strides]
    centre = torch.cat([torch.stack([y.repeat(len(y)), y.repeat_interleave(len(y))], 1)
                        for y in sides])  # fmt: skip
    stride = torch.cat([torch.full((len(y) ** 2, 1), s).double()
                        for y, s in zip(sides, strides, strict=True)])  # fmt: skip
    terms = torch.zeros(3).double()
    for rate, head in ((1.0, inputs["main_preds"]), (0.25, inputs["aux_preds"])):
        logits = torch.cat([rows(x, classes) for x, _, _ in head], 1)
        bins = torch.cat([x.flatten(3).permute(0, 3, 2, 1) for _, x, _ in head], 1)  # B, A, 4, 16
        ltrb = torch.cat([rows(x, 4) for _, _, x in head], 1)
        boxes = torch.cat([centre - ltrb[..., :2] * stride, centre + ltrb[..., 2:] * stride], -1)
        score_of, box_of, norm = torch.zeros_like(logits), torch.zeros_like(boxes), 0.0
        used = torch.zeros(boxes.shape[:2], dtype=torch.bool)
        with torch.no_grad():
            for b, image in enumerate(inputs["targets"]):
                real = image[image[:, 0] >= 0]
                if not len(real):
                    continue
                gt = real[:, None, 1:]
                inside = ((centre > gt[..., :2]) & (centre < gt[..., 2:])).all(-1)
                overlap = ciou(boxes[b].unsqueeze(0), gt, alpha_grad=False).clamp(0, 1)  # T, A
                p = logits[b].sigmoid()[:, real[:, 0].long()].T
                metric = inside * overlap**6 * p.sqrt()
                kept = torch.zeros_like(metric)
                top = metric.topk(min(10, metric.shape[1]))
                kept.scatter_(1, top.indices, top.values)
                which = kept.argmax(0)
                used[b] = kept.amax(0) > 0
                scale = overlap.amax(1) / (metric.amax(1) + 1e-9)
                anchors = torch.arange(len(which))
                score = torch.where(used[b], kept[which, anchors] * scale[which], 0)
                score_of[b, anchors, real[which, 0].long()] = score
                box_of[b] = real[which, 1:] / stride
        score = score_of.sum(-1)
        norm = score.sum() if score.sum() > 0 else torch.ones(()).double()
        point = (centre / stride).expand(*score.shape, 2)[used]
        target, weight = box_of[used], score[used]
        distance = torch.cat([point - target[:, :2], target[:, 2:] - point], 1).clamp(0, 15 - 0.01)
        left = distance.floor().long()
        log_p = bins[used].log_softmax(-1)
        surprisal = -(
            log_p.gather(2, left.unsqueeze(2)).squeeze(2) * (left + 1 - distance)
            + log_p.gather(2, left.unsqueeze(2) + 1).squeeze(2) * (distance - left)
        )
        gap = 1 - ciou((boxes / stride)[used], target, alpha_grad=True)
        head_terms = [bce(logits, score_of).sum(), (surprisal.mean(1) * weight).sum()]
        terms = terms + rate * torch.stack([*head_terms, (gap * weight).sum()]) / norm
    terms = terms * torch.tensor([0.5, 1.5, 7.5], dtype=torch.float64)
    losses = dict(zip(("loss_cls", "loss_df", "loss_iou"), terms, strict=True))
    return {**losses, "total_loss": terms.mean()}


def xyxy(boxes: Tensor) -> Tensor:
    return torch.cat([boxes[..., :2] - boxes[..., 2:] / 2, boxes[..., :2] + boxes[..., 2:] / 2], -1)


Pairs = list[tuple[Tensor, Tensor]]


def matched(output: dict[str, Tensor], targets: list[dict[str, Tensor]]) -> Pairs:
    pairs = []
    for logits, boxes, target in zip(
        output["pred_logits"].detach(), output["pred_boxes"].detach(), targets, strict=True
    ):
        p = logits.sigmoid()[:, target["labels"]]
        positive = 0.25 * (1 - p) ** 2 * -(p + 1e-8).log()
        negative = 0.75 * p**2 * -(1 - p + 1e-8).log()
        l1 = (boxes.unsqueeze(1) - target["boxes"]).abs().sum(-1)
        overlap = giou(xyxy(boxes).unsqueeze(1), xyxy(target["boxes"]))
        cost = 2 * (positive - negative) + 5 * l1 - 2 * overlap
        queries, found = linear_sum_assignment(cost.numpy())
        pairs.append((torch.as_tensor(queries), torch.as_tensor(found)))
    return pairs


def given_pairs(meta: dict[str, Any], targets: list[dict[str, Tensor]]) -> Pairs:
    return [
        (positive, torch.arange(len(target["labels"])).repeat(meta["dn_num_group"]))
        for positive, target in zip(meta["dn_positive_idx"], targets, strict=True)
    ]


def union_of(matches: list[Pairs]) -> Pairs:
    """Pairs by how many layers have them, then by query and target; the first of each query."""
    out = []
    for image in range(len(matches[0])):
        count: Counter[tuple[int, int]] = Counter()
        for pairs in matches:
            count.update(zip(*(x.tolist() for x in pairs[image]), strict=True))
        chosen: dict[int, int] = {}
        for query, target in sorted(count, key=lambda pair: (-count[pair], pair)):
            chosen.setdefault(query, target)
        out.append((torch.tensor(list(chosen), dtype=torch.long),
                    torch.tensor(list(chosen.values()), dtype=torch.long)))  # fmt: skip
    return out


def picked(x: Tensor, pairs: Pairs) -> Tensor:
    return torch.cat([x[i][queries] for i, (queries, _) in enumerate(pairs)])


def wanted(targets: list[dict[str, Tensor]], key: str, pairs: Pairs) -> Tensor:
    return torch.cat([t[key][found] for t, (_, found) in zip(targets, pairs, strict=True)])


def overlaps(output: dict[str, Tensor], targets: Any, pairs: Pairs) -> Tensor:
    with torch.no_grad():
        a, b = picked(output["pred_boxes"], pairs), wanted(targets, "boxes", pairs)
        return iou_union_hull(xyxy(a), xyxy(b))[0]


def vfl(output: dict[str, Tensor], targets: Any, pairs: Pairs, alpha: float = 0.75) -> Tensor:
    x = output["pred_logits"]
    q = torch.zeros_like(x)
    for i, (queries, found) in enumerate(pairs):
        iou = overlaps({"pred_boxes": output["pred_boxes"][i : i + 1]}, targets[i : i + 1],
                       [(queries, found)])  # fmt: skip
        q[i, queries, targets[i]["labels"][found]] = iou
    hot = torch.zeros_like(x)
    for i, (queries, found) in enumerate(pairs):
        hot[i, queries, targets[i]["labels"][found]] = 1
    weight = alpha * x.detach().sigmoid().square() * (1 - hot) + q
    return (bce(x, q) * weight).sum()


def boxes_of(output: dict[str, Tensor], targets: Any, pairs: Pairs) -> tuple[Tensor, Tensor]:
    a, b = picked(output["pred_boxes"], pairs), wanted(targets, "boxes", pairs)
    return (a - b).abs().sum(), (1 - giou(xyxy(a), xyxy(b))).sum()


def layers_of(outputs: dict[str, Any], *kinds: tuple[str, str]) -> list[tuple[str, Any]]:
    named: list[tuple[str, Any]] = []
    for key, suffix in kinds:
        entry = outputs if not key else outputs.get(key) or ()
        if isinstance(entry, dict):
            named += [(suffix, entry)]
        else:
            named += [(f"{suffix}_{i}", output) for i, output in enumerate(entry)]
    return named


def detr(inputs: dict[str, Any]) -> dict[str, Tensor]:
    outputs, targets = inputs["outputs"], inputs["targets"]
    n = max(sum(len(t["labels"]) for t in targets), 1)
    losses = {}
    given = outputs.get("dn_meta") and given_pairs(outputs["dn_meta"], targets)
    for suffix, output in layers_of(outputs, ("", ""), ("aux_outputs", "_aux"),
                                    ("dn_aux_outputs", "_dn")):  # fmt: skip
        denoising = suffix.startswith("_dn")
        pairs = given if denoising else matched(output, targets)
        norm = n * outputs["dn_meta"]["dn_num_group"] if denoising else n
        distance, overlap = boxes_of(output, targets, pairs)
        losses["loss_vfl" + suffix] = vfl(output, targets, pairs) / norm
        losses["loss_bbox" + suffix] = 5 * distance / (norm + EPS32)
        losses["loss_giou" + suffix] = 2 * overlap / (norm + EPS32)
    return losses


def dfine(inputs: dict[str, Any]) -> dict[str, Tensor]:
    outputs, targets = inputs["outputs"], inputs["targets"]
    n = max(sum(len(t["labels"]) for t in targets), 1)
    main = layers_of(outputs, ("", ""), ("aux_outputs", "_aux"), ("pre_outputs", "_pre"),
                     ("enc_aux_outputs", "_enc"))  # fmt: skip
    own = [matched(output, targets) for _, output in main]
    union = union_of(own)
    n_union = max(sum(len(queries) for queries, _ in union), 1)
    images, queries = outputs["pred_logits"].shape[:2]
    n_matched = 4 * sum(len(q) for q, _ in union)
    a = math.sqrt(8 / images * n_matched)
    b = math.sqrt(8 / images * (4 * images * queries - n_matched))
    balance = a / (a + b), b / (a + b)
    losses = {}
    for (suffix, output), pairs in zip(main, own, strict=True):
        losses |= _dfine_layer(outputs, output, targets, suffix, pairs, union, n, n_union, balance)
    if outputs.get("dn_meta"):
        given = given_pairs(outputs["dn_meta"], targets)
        norm = n * outputs["dn_meta"]["dn_num_group"]
        for suffix, output in layers_of(outputs, ("dn_outputs", "_dn"),
                                        ("dn_pre_outputs", "_dn_pre")):  # fmt: skip
            losses |= _dfine_layer(
                outputs, output, targets, suffix, given, given, norm, norm, balance
            )
    return losses


def _dfine_layer(
    outputs: Any, output: Any, targets: Any, suffix: str, own: Pairs, union: Pairs,
    norm: float, union_norm: float, balance: tuple[float, float],
) -> dict[str, Tensor]:  # fmt: skip
    distance, overlap = boxes_of(output, targets, union)
    losses = {
        "loss_vfl": vfl(output, targets, own) / norm,
        "loss_bbox": 5 * distance / union_norm,
        "loss_giou": 2 * overlap / union_norm,
    }
    if "pred_corners" in output:
        corners = output["pred_corners"].unflatten(-1, (4, -1))
        bins = corners.shape[-1]
        left, right_weight = target_bins(outputs, output, targets, union, bins)
        log_p = picked(corners, union).log_softmax(-1)
        surprisal = -(
            log_p.gather(2, left.unsqueeze(2)).squeeze(2) * (1 - right_weight)
            + log_p.gather(2, left.unsqueeze(2) + 1).squeeze(2) * right_weight
        )
        weight = overlaps(output, targets, union).unsqueeze(1)
        losses["loss_fgl"] = 0.15 * (surprisal * weight).sum() / union_norm
    if "teacher_corners" in output:
        log_q = (corners / 5).log_softmax(-1)
        teacher = output["teacher_corners"].unflatten(-1, (4, -1))
        log_t = (teacher / 5).log_softmax(-1)
        kl = 25 * (log_t.exp() * (log_t - log_q)).sum(-1)
        weight = output["teacher_logits"].sigmoid().amax(-1)
        mask = torch.zeros(weight.shape, dtype=torch.bool)
        for i, (queries, found) in enumerate(union):
            mask[i, queries] = True
            weight[i, queries] = overlaps(
                {"pred_boxes": output["pred_boxes"][i : i + 1]}, targets[i : i + 1],
                [(queries, found)],
            )  # fmt: skip
        kl = kl * weight.unsqueeze(-1)
        means = [kl[m].mean() if m.any() else torch.zeros(()).double() for m in (mask, ~mask)]
        losses["loss_ddf"] = 1.5 * (means[0] * balance[0] + means[1] * balance[1])
    return {name + suffix: loss for name, loss in losses.items()}


def target_bins(
    outputs: Any, output: Any, targets: Any, pairs: Pairs, bins: int
) -> tuple[Tensor, Tensor]:
    r, scale = bins - 1, outputs["reg_scale"].abs()
    u = outputs["up"].abs() * scale
    s = (u + 1) ** (2 / (r - 2))
    near = [s ** (k + 1) - 1 for k in range(r // 2 - 1)]
    w = torch.cat([-2 * u, *(-x for x in reversed(near)), torch.zeros(1).double(), *near, 2 * u])
    ref, box = picked(output["ref_points"], pairs), xyxy(wanted(targets, "boxes", pairs))
    size = ref[:, 2:].repeat(1, 2) / scale + 1e-16
    d = torch.cat([ref[:, :2] - box[:, :2], box[:, 2:] - ref[:, :2]], 1) / size - scale / 2
    left = ((w <= d.unsqueeze(-1)).sum(-1) - 1).clamp(0, r - 1)
    return left, ((d - w[left]) / (w[left + 1] - w[left])).clamp(0, 1)


PLAIN: dict[str, Callable[..., dict[str, Any]]] = {
    "atss": atss,
    "rtmdet": rtmdet,
    "ssd": ssd,
    "yolox": yolox,
    "yolov9": yolov9,
    "detr": detr,
    "dfine": dfine,
}
