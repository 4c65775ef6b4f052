"""Losses over class logits: sigmoid losses with one scored label per row, and their samples.

Every op takes the same inputs. `label` (*rows,) is the index of the target class; an index outside
[0, classes) is background. `score` (*rows,) is the target at the label, 1 if None. With no label
(None), every class of a row has the row's score as its target: with one class per row, these are
dense soft targets; with no score either, all is background. `mask` (*rows, classes) weighs
entries. A row's loss is summed over classes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from detloss_triton.backend import is_transformed, kernels
from detloss_triton.blocks import Part, everything
from detloss_triton.entries import factor, where
from detloss_triton.launch import TILE, Tile, power_of_2
from detloss_triton.op import Input, Sample, row_loss
from detloss_triton.slope import with_slope

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


def _at_label(dense: Tensor, label: Tensor | None, score: Tensor | None) -> Tensor:
    """`dense` (*rows, classes) with the row's score at its label, where it is a class.

    Writes to `dense`, which keeps its memory layout: mixed layouts cost more than the arithmetic.
    """
    if label is None:
        return dense if score is None else score.unsqueeze(-1).expand(dense.shape)
    n_classes = dense.shape[-1]
    label = label.unsqueeze(-1)
    value = dense.new_ones(()) if score is None else score.unsqueeze(-1)
    if torch.compiler.is_compiling() or is_transformed():
        # Inductor fuses a comparison into its one loop; a scatter would be a loop of its own. And
        # no transform has a rule for a scatter in place.
        return torch.where(label == torch.arange(n_classes, device=dense.device), value, dense)
    is_class = (label >= 0) & (label < n_classes)
    # Before 2.13 torch takes no other integers than int64 as an index.
    index = torch.where(is_class, label, 0).long()
    return dense.scatter_(-1, index, torch.where(is_class, value, dense.gather(-1, index)))


def _targets(logits: Tensor, label: Tensor | None, score: Tensor | None) -> Tensor | None:
    """Targets of all entries; None where all are background."""
    if label is None and score is None:
        return None
    # Without labels only the shape is read.
    dense = logits if label is None else torch.zeros_like(logits, requires_grad=False)
    return _at_label(dense, label, score)


def _by_label(
    weight: Tensor | None,
    logits: Tensor,
    label: Tensor | None,
    score: Tensor | None,
    mask: Tensor | None,
) -> list[Part]:
    """All rows as background, which is cheaper by half; then the few that have a class, in full.

    To take one entry of theirs back would leave the rounding error of what cancels.
    """
    mask = factor(mask)
    if label is None:
        return everything(weight, logits, label, score, mask)
    is_class = (label >= 0) & (label < logits.shape[-1])
    at = where(is_class)
    if 2 * len(at.flat) > label.numel():
        return everything(weight, logits, label, score, mask)
    of_class = (None if x is None else at.of(x) for x in (logits, label, score, mask))
    return [
        Part((logits, None, None, mask), weight, left=is_class),
        Part(tuple(of_class), None if weight is None else at.of(weight), at),
    ]


def _laid_out(mask: Tensor, x: Tensor) -> Tensor:
    """The mask in x's memory layout, as mixed layouts cost more than the arithmetic."""
    return mask if torch.compiler.is_compiling() else torch.empty_like(x).copy_(mask)


def _summed(losses: Tensor, mask: Tensor | None) -> Tensor:
    """A row's losses, summed over its classes; left to the caller where Inductor fuses it all."""
    if mask is not None:
        losses = losses * _laid_out(mask, losses)
    if torch.compiler.is_compiling():
        return losses
    return losses.squeeze(-1) if losses.shape[-1] == 1 else losses.sum(-1)


def _bce(logits: Tensor, targets: Tensor | None) -> Tensor:
    losses = F.softplus(logits, threshold=_EXACT)
    return losses if targets is None else torch.addcmul(losses, logits, targets, value=-1)


# Above 20 torch's softplus is the identity unless told otherwise: 2e-9 off, more than rounding.
# Above 88 its exponential overflows.
_EXACT = 40.0


def _focal_background(logits: Tensor, gamma: float, mask: Tensor | None) -> Tensor:
    """softplus(x) p^gamma, and its slope p^gamma (p + gamma softplus(x) (1-p)).

    Autograd would take almost twice the passes, in what most of a dense detector's time goes to.
    """
    with torch.no_grad():
        p, losses = logits.sigmoid(), _bce(logits, None)
        scale = p.pow(gamma)
        if mask is not None:
            scale = scale.mul_(_laid_out(mask, scale))
        slope = torch.addcmul(p, losses, 1 - p, value=gamma).mul_(scale)
        losses = scale.mul_(losses)
    return with_slope(losses, slope, logits)


def _tile(logits: Tensor, loss: str, *constants: float) -> Tile:
    columns = min(power_of_2(logits.shape[-1]), 16)
    return Tile(
        kernels.classes.class_kernel,
        rows=TILE // columns,
        constants={"LOSS": (loss, *map(float, constants)), "BC": columns},
    )


@row_loss(*_INPUTS, parts=_by_label, samples=_samples({}, {}, {}), temporaries=4)
def binary_cross_entropy(
    logits: Tensor, label: Tensor | None, score: Tensor | None, mask: Tensor | None
) -> Tensor:
    """softplus(x) - x t."""
    return _summed(_bce(logits, _targets(logits, label, score)), mask)


@binary_cross_entropy.triton
def _(logits: Tensor, label: Any, score: Any, mask: Any) -> Tile:
    return _tile(logits, "bce")


@row_loss(
    *_INPUTS,
    parts=_by_label,
    samples=_samples(
        {"alpha": 0.25, "gamma": 2.0}, {"alpha": 0.25, "gamma": 0.0}, {"alpha": -1.0, "gamma": 1.5}
    ),
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
    t = _targets(logits, label, score)
    if t is None:
        losses = _summed(_focal_background(logits, gamma, mask), None)
        return losses * (1 - alpha) if alpha >= 0 else losses
    p = logits.sigmoid()
    scale = (t + p * (1 - 2 * t)).pow(gamma)
    if alpha >= 0:
        scale = scale * ((2 * alpha - 1) * t + (1 - alpha))
    return _summed(_bce(logits, t) * scale, mask)


@sigmoid_focal.triton
def _(logits: Tensor, label: Any, score: Any, mask: Any, alpha: float, gamma: float) -> Tile:
    return _tile(logits, "focal", alpha, gamma)


@row_loss(
    *_INPUTS,
    parts=_by_label,
    samples=_samples({"beta": 2.0}, {"beta": 1.5}, {"beta": 0.0}),
    temporaries=8,
)
def quality_focal(
    logits: Tensor, label: Tensor | None, score: Tensor | None, mask: Tensor | None, beta: float
) -> Tensor:
    """BCE(x, t) |t - p|^beta; p is differentiated."""
    t = _targets(logits, label, score)
    if t is None:
        return _summed(_focal_background(logits, beta, mask), None)
    return _summed(_bce(logits, t) * (t - logits.sigmoid()).abs().pow(beta), mask)


@quality_focal.triton
def _(logits: Tensor, label: Any, score: Any, mask: Any, beta: float) -> Tile:
    return _tile(logits, "quality_focal", beta)


@row_loss(
    *_INPUTS,
    parts=_by_label,
    samples=_samples(
        {"alpha": 0.75, "gamma": 2.0}, {"alpha": 0.2, "gamma": 1.5}, {"alpha": 1.0, "gamma": 0.0}
    ),
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
    return _summed(_bce(logits, _targets(logits, label, score)) * scale, mask)


@varifocal.triton
def _(logits: Tensor, label: Any, score: Any, mask: Any, alpha: float, gamma: float) -> Tile:
    return _tile(logits, "varifocal", alpha, gamma)
