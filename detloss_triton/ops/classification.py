"""Losses over class logits: sigmoid losses with one scored label per row, and their samples.

Every op takes the same inputs. `label` (*rows,) is the index of the target class; an index outside
[0, classes) is background. `score` (*rows,) is the target at the label, 1 if None. With no label
(None), every class of a row has the row's score as its target: with one class per row, these are
dense soft targets. `mask` (*rows, classes) weighs single entries. A row's loss is summed over classes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..backend import kernels
from ..launch import TILE, Tile, power_of_2
from ..op import Input, Sample, row_loss

_INPUTS = (
    Input("logits", features=1, grad=True),
    Input("label", optional=True),
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
            extremes = torch.tensor([100.0, -100.0, 0.0])
            logits[: rows // 4, 0] = extremes.repeat(rows)[: rows // 4]
            label = torch.randint(-2, classes + 2, (rows,), generator=generator)
            yield Sample((logits, label, uniform(rows), None), p, uniform(rows))
            yield Sample((logits, label, None, (uniform(rows, classes) > 0.3).float()), p)
            yield Sample((logits[:, :1], None, uniform(rows), None), p, uniform(rows).round())

    return samples


def _by_class(
    negative: Callable[[Tensor], Tensor],
    positive: Callable[[Tensor, Tensor], Tensor],
    logits: Tensor,
    label: Tensor | None,
    score: Tensor | None,
    mask: Tensor | None,
) -> Tensor:
    """Sum over classes of `positive(logit, score)` at the label and of `negative(logit)` elsewhere."""
    if score is None:
        score = logits.new_ones(()).expand(logits.shape[:-1])
    score = score.unsqueeze(-1)
    if label is None:
        losses = positive(logits, score)
    elif torch.compiler.is_compiling():
        # Inductor fuses a comparison into its one loop; a scatter would split it in three.
        classes = torch.arange(logits.shape[-1], device=logits.device)
        losses = torch.where(
            label.unsqueeze(-1) == classes, positive(logits, score), negative(logits)
        )
    else:
        # Eager, every dense pass costs: the label's entry is overwritten, not selected.
        losses = negative(logits)
        is_class = ((label >= 0) & (label < logits.shape[-1])).unsqueeze(-1)
        index = torch.where(is_class, label.unsqueeze(-1), 0)
        x = logits.gather(-1, index)
        losses.scatter_(-1, index, torch.where(is_class, positive(x, score), negative(x)))
    if mask is not None:
        losses = losses * mask
    return losses.sum(-1)


def _bce(logits: Tensor, target: Tensor) -> Tensor:
    return F.softplus(logits, threshold=_EXACT) - logits * target


# Above 20 torch's softplus is the identity unless told otherwise: 2e-9 off, more than rounding.
_EXACT = 90.0


def _tile(logits: Tensor, loss: str, a: float, b: float) -> Tile:
    columns = min(power_of_2(logits.shape[-1]), 16)
    return Tile(
        kernels.classes.class_kernel,
        rows=TILE // columns,
        constants={"LOSS": loss, "A": a, "B": b, "BC": columns},
    )


@row_loss(*_INPUTS, samples=_samples({}, {}, {}))
def binary_cross_entropy(
    logits: Tensor, label: Tensor | None, score: Tensor | None, mask: Tensor | None
) -> Tensor:
    """softplus(x) - x t."""
    return _by_class(lambda x: F.softplus(x, threshold=_EXACT), _bce, logits, label, score, mask)


@binary_cross_entropy.triton
def _(logits: Tensor, label: Any, score: Any, mask: Any) -> Tile:
    return _tile(logits, "bce", 0.0, 0.0)


@row_loss(
    *_INPUTS,
    samples=_samples(
        {"alpha": 0.25, "gamma": 2.0}, {"alpha": 0.25, "gamma": 0.0}, {"alpha": -1.0, "gamma": 1.5}
    ),
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

    def negative(x: Tensor) -> Tensor:
        balance = 1.0 if alpha < 0 else 1.0 - alpha
        return F.softplus(x, threshold=_EXACT) * (balance * x.sigmoid().pow(gamma))

    def positive(x: Tensor, t: Tensor) -> Tensor:
        p = x.sigmoid()
        wrong = (-x).sigmoid() * t + p * (1 - t)
        loss = _bce(x, t) * wrong.pow(gamma)
        return loss if alpha < 0 else loss * (alpha * t + (1 - alpha) * (1 - t))

    return _by_class(negative, positive, logits, label, score, mask)


@sigmoid_focal.triton
def _(logits: Tensor, label: Any, score: Any, mask: Any, alpha: float, gamma: float) -> Tile:
    return _tile(logits, "focal", float(alpha), float(gamma))


@row_loss(*_INPUTS, samples=_samples({"beta": 2.0}, {"beta": 1.5}, {"beta": 0.0}))
def quality_focal(
    logits: Tensor, label: Tensor | None, score: Tensor | None, mask: Tensor | None, beta: float
) -> Tensor:
    """BCE(x, t) |t - p|^beta; p is differentiated."""

    def negative(x: Tensor) -> Tensor:
        return F.softplus(x, threshold=_EXACT) * x.sigmoid().pow(beta)

    def positive(x: Tensor, t: Tensor) -> Tensor:
        return _bce(x, t) * (t - x.sigmoid()).abs().pow(beta)

    return _by_class(negative, positive, logits, label, score, mask)


@quality_focal.triton
def _(logits: Tensor, label: Any, score: Any, mask: Any, beta: float) -> Tile:
    return _tile(logits, "quality_focal", float(beta), 0.0)


@row_loss(
    *_INPUTS,
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
    """BCE(x, q) q at the label, softplus(x) alpha p^gamma elsewhere; these factors are constants."""

    def negative(x: Tensor) -> Tensor:
        return F.softplus(x, threshold=_EXACT) * (alpha * x.detach().sigmoid().pow(gamma))

    def positive(x: Tensor, t: Tensor) -> Tensor:
        return _bce(x, t) * t

    return _by_class(negative, positive, logits, label, score, mask)


@varifocal.triton
def _(logits: Tensor, label: Any, score: Any, mask: Any, alpha: float, gamma: float) -> Tile:
    return _tile(logits, "varifocal", float(alpha), float(gamma))
