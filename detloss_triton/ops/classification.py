"""Sigmoid losses over class logits, with one scored label per row.

Every op takes the same inputs. `label` (*rows,) is the index of the target class; an index outside
[0, classes) is background. `score` (*rows,) is the target at the label, 1 if None. With no label
(None), every class of a row has the row's score as its target, so `dense` gives each entry a target
of its own. `mask` (*rows, classes) weighs entries. A row's loss is summed over classes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from detloss_triton.backend import kernels
from detloss_triton.engine import TILE, Input, Sample, Tile, power_of_2, row_loss

_INPUTS = (
    Input("logits", features=1, grad=True),
    Input("label", optional=True, index=True),
    Input("score", optional=True),
    Input("mask", features=1, optional=True),
)


def _samples(*params: dict[str, Any]) -> Callable[..., Iterator[Sample]]:
    """Samples for each of `params`: dense and indexed targets, background, extremes, masks."""

    def samples(rows: int, generator: torch.Generator) -> Iterator[Sample]:
        def uniform(*shape: int) -> Tensor:
            return torch.rand(*shape, generator=generator)

        for i, p in enumerate(params):
            classes = (80, 1, 3)[i % 3]
            logits = torch.randn(rows, classes, generator=generator) * 4 - 2
            extremes = torch.tensor([100.0, -100.0, 0.0, 89.0])
            logits[: rows // 4, 0] = extremes.repeat(rows)[: rows // 4]
            label = torch.randint(-2, classes + 2, (rows,), generator=generator)
            yield Sample((logits, label, uniform(rows), None), p, uniform(rows))
            yield Sample((logits, label, None, (uniform(rows, classes) > 0.3).float()), p)
            yield Sample((logits[:, :1], None, uniform(rows), None), p, uniform(rows).round())

    return samples


def dense(logits: Tensor, targets: Tensor) -> tuple[Tensor, None, Tensor, None]:
    """An op's inputs where each entry has a target of its own: rows of one class."""
    return logits.unsqueeze(-1), None, targets, None


def _at_label(elsewhere: Tensor, label: Tensor | None, score: Tensor | None) -> Tensor:
    """(*rows, classes): the row's score (or 1) at its label, `elsewhere` at other classes.

    Without labels every class of the row is its label.
    """
    if label is None:
        score = elsewhere.new_ones(elsewhere.shape[:-1]) if score is None else score
        return score.unsqueeze(-1).expand(elsewhere.shape)
    value = 1.0 if score is None else score.unsqueeze(-1)
    columns = torch.arange(elsewhere.shape[-1], device=elsewhere.device)
    return torch.where(label.unsqueeze(-1) == columns, value, elsewhere)


def _targets(logits: Tensor, label: Tensor | None, score: Tensor | None) -> Tensor:
    zeros = torch.zeros((), dtype=logits.dtype, device=logits.device).expand(logits.shape)
    return _at_label(zeros, label, score)


def _masked(losses: Tensor, mask: Tensor | None) -> Tensor:
    return losses if mask is None else losses * mask.to(losses.dtype)


# Above its threshold torch's softplus(x) is x. That is 2e-9 off at its default of 20, more than
# rounding; above 88 its exponential overflows.
_THRESHOLD = 40.0

# The least target of an IoU-aware loss.
LEAST_TARGET = 0.01


def _bce(logits: Tensor, targets: Tensor) -> Tensor:
    return F.softplus(logits, threshold=_THRESHOLD) - logits * targets


def _background(
    logits: Tensor, mask: Tensor | None, alpha: float, gamma: float
) -> tuple[Tensor, Tensor]:
    """alpha p^gamma softplus(x), and its slope alpha p^gamma (p + gamma softplus(x) (1 - p)).

    Most of a dense detector's step goes here, and autograd would take almost twice the passes.
    """
    p, losses = logits.sigmoid(), F.softplus(logits, threshold=_THRESHOLD)
    scale = _masked(p.pow(gamma), mask)
    if alpha != 1:
        scale = scale * alpha
    slopes = torch.addcmul(p, losses, 1 - p, value=gamma).mul_(scale)
    return losses.mul_(scale), slopes


def _tile(logits: Tensor, loss: str, *constants: float) -> Tile:
    columns = min(power_of_2(logits.shape[-1]), 16)
    return Tile(
        kernels.classes.class_kernel,
        rows=TILE // columns,
        constants={"LOSS": (loss, *map(float, constants)), "BC": columns},
    )


@row_loss(*_INPUTS, samples=_samples({}, {}, {}), by_entry=True, temporaries=4)
def binary_cross_entropy(
    logits: Tensor, label: Tensor | None, score: Tensor | None, mask: Tensor | None
) -> Tensor:
    """softplus(x) - x t."""
    return _masked(_bce(logits, _targets(logits, label, score)), mask)


@binary_cross_entropy.of_background
def _(logits: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    losses = F.softplus(logits, threshold=_THRESHOLD)
    return _masked(losses, mask), _masked(logits.sigmoid(), mask)


@binary_cross_entropy.triton
def _(given: Any) -> Tile:
    return _tile(given.logits, "bce")


@row_loss(
    *_INPUTS,
    samples=_samples(
        {"alpha": 0.25, "gamma": 2.0}, {"alpha": 0.25, "gamma": 0.0}, {"alpha": -1.0, "gamma": 1.5}
    ),
    by_entry=True,
    temporaries=8,
)
def sigmoid_focal(
    logits: Tensor,
    label: Tensor | None,
    score: Tensor | None,
    mask: Tensor | None,
    alpha: float,
    gamma: float,
) -> Tensor:
    """(a t + (1-a)(1-t)) ((1-p) t + p (1-t))^gamma BCE(x, t); no balance where alpha < 0."""
    t, p = _targets(logits, label, score), logits.sigmoid()
    scale = (t + p * (1 - 2 * t)).pow(gamma)
    if alpha >= 0:
        scale = scale * ((2 * alpha - 1) * t + (1 - alpha))
    return _masked(_bce(logits, t) * scale, mask)


@sigmoid_focal.of_background
def _(logits: Tensor, mask: Tensor | None, alpha: float, gamma: float) -> tuple[Tensor, Tensor]:
    return _background(logits, mask, 1 - alpha if alpha >= 0 else 1.0, gamma)


@sigmoid_focal.triton
def _(given: Any) -> Tile:
    return _tile(given.logits, "focal", given.alpha, given.gamma)


@row_loss(
    *_INPUTS,
    samples=_samples({"beta": 2.0}, {"beta": 1.5}, {"beta": 0.0}),
    by_entry=True,
    temporaries=8,
)
def quality_focal(
    logits: Tensor, label: Tensor | None, score: Tensor | None, mask: Tensor | None, beta: float
) -> Tensor:
    """BCE(x, t) |t - p|^beta; p is differentiated."""
    t = _targets(logits, label, score)
    return _masked(_bce(logits, t) * (t - logits.sigmoid()).abs().pow(beta), mask)


@quality_focal.of_background
def _(logits: Tensor, mask: Tensor | None, beta: float) -> tuple[Tensor, Tensor]:
    return _background(logits, mask, 1.0, beta)


@quality_focal.triton
def _(given: Any) -> Tile:
    return _tile(given.logits, "quality_focal", given.beta)


@row_loss(
    *_INPUTS,
    samples=_samples(
        {"alpha": 0.75, "gamma": 2.0}, {"alpha": 0.2, "gamma": 1.5}, {"alpha": 1.0, "gamma": 0.0}
    ),
    by_entry=True,
)
def varifocal(
    logits: Tensor,
    label: Tensor | None,
    score: Tensor | None,
    mask: Tensor | None,
    alpha: float,
    gamma: float,
) -> Tensor:
    """BCE(x, q) q at the label, softplus(x) alpha p^gamma elsewhere; the factors are constants."""
    scale = _at_label(alpha * logits.detach().sigmoid().pow(gamma), label, score)
    return _masked(_bce(logits, _targets(logits, label, score)) * scale, mask)


@varifocal.of_background
def _held_background(
    logits: Tensor, mask: Tensor | None, alpha: float, gamma: float
) -> tuple[Tensor, Tensor]:
    p = logits.sigmoid()
    scale = _masked(alpha * p.pow(gamma), mask)
    return F.softplus(logits, threshold=_THRESHOLD) * scale, p * scale


@varifocal.triton
def _(given: Any) -> Tile:
    return _tile(given.logits, "varifocal", given.alpha, given.gamma)


@row_loss(
    *_INPUTS,
    samples=_samples(
        {"alpha": 1.0, "gamma": 1.5}, {"alpha": 0.2, "gamma": 2.0}, {"alpha": 1.0, "gamma": 0.0}
    ),
    by_entry=True,
)
def matchability(
    logits: Tensor,
    label: Tensor | None,
    score: Tensor | None,
    mask: Tensor | None,
    alpha: float,
    gamma: float,
) -> Tensor:
    """BCE(x, q^gamma) at the label, softplus(x) alpha p^gamma elsewhere; the factors are constants.

    DEIM's matchability-aware loss (Huang et al., 2024).
    """
    scale = _at_label(alpha * logits.detach().sigmoid().pow(gamma), label, None)
    t = _targets(logits, label, None if score is None else score.pow(gamma))
    return _masked(_bce(logits, t) * scale, mask)


matchability.of_background(_held_background)


@matchability.triton
def _(given: Any) -> Tile:
    return _tile(given.logits, "matchability", given.alpha, given.gamma)


@row_loss(
    *_INPUTS,
    samples=_samples({"alpha": 0.25, "gamma": 2.0}, {"alpha": 0.0, "gamma": 1.5}),
    by_entry=True,
    temporaries=8,
)
def iou_aware(
    logits: Tensor,
    label: Tensor | None,
    score: Tensor | None,
    mask: Tensor | None,
    alpha: float,
    gamma: float,
) -> Tensor:
    """BCE(x, max(p^alpha q^(1-alpha), 0.01)) at the label, its target a constant; p^gamma
    softplus(x) elsewhere, p differentiated.

    LW-DETR's (Chen et al., 2024), and RF-DETR's.
    """
    p = logits.sigmoid()
    quality = 1.0 if score is None else score.unsqueeze(-1).pow(1 - alpha)
    t = (p.detach().pow(alpha) * quality).clamp(min=LEAST_TARGET)
    background = F.softplus(logits, threshold=_THRESHOLD) * p.pow(gamma)
    if label is None:
        return _masked(_bce(logits, t), mask)
    columns = torch.arange(logits.shape[-1], device=logits.device)
    losses = torch.where(label.unsqueeze(-1) == columns, _bce(logits, t), background)
    return _masked(losses, mask)


@iou_aware.of_background
def _(logits: Tensor, mask: Tensor | None, alpha: float, gamma: float) -> tuple[Tensor, Tensor]:
    return _background(logits, mask, 1.0, gamma)


@iou_aware.triton
def _(given: Any) -> Tile:
    return _tile(given.logits, "iou_aware", given.alpha, given.gamma, LEAST_TARGET)
