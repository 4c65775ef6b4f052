"""What an op declares: a torch reference, a launcher of its kernel, and samples, side by side.

Nothing here knows where an op runs: `dispatch` chooses, and the modules beside it evaluate.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, ClassVar

import torch
from torch import Tensor

from detloss_triton.precision import arithmetic_dtype

REGISTRY: dict[str, Formula] = {}

# Largest error allowed to either backend, relative to the largest value, by dtype of the inputs.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}

# How many tensors of the widest input's size most references hold at a time.
TEMPORARIES = 16

Inputs = tuple[Tensor | None, ...]
# What a sample has in the place of an input: also several tensors, as of feature levels.
Given = Tensor | tuple["Given", ...] | None


def mapped(change: Callable[[Tensor], Any], given: Given) -> Any:
    """The same tensors, or tuples of them, changed."""
    if isinstance(given, tuple):
        return tuple(mapped(change, x) for x in given)
    return None if given is None else change(given)


def tensors_of(given: Given) -> list[Tensor]:
    # An operator of a graph is handed a list where a tuple was.
    if isinstance(given, (tuple, list)):
        return [y for x in given for y in ([x] if isinstance(x, Tensor) else tensors_of(x))]
    return [] if given is None else [given]


def is_differentiated(inputs: Inputs) -> bool:
    """Whether autograd will ask for a gradient by one of them."""
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs)


@dataclass(frozen=True)
class Input:
    """One tensor argument of an op: rows, then `features` further dimensions (0 or 1).

    Its entries are values to compute with, of whatever type, or with `index` integers.
    """

    name: str
    features: int = 0
    grad: bool = False
    optional: bool = False
    index: bool = False


@dataclass(frozen=True)
class Sample:
    """Arguments an op accepts; `weight` and the inputs share their row dimensions."""

    inputs: tuple[Given, ...]
    params: dict[str, Any] = field(default_factory=dict)
    weight: Tensor | None = None

    def changed(self, change: Callable[[Tensor], Any]) -> Sample:
        """The sample with `change(x)` for every tensor that is there."""
        return Sample(mapped(change, self.inputs), self.params, mapped(change, self.weight))


class Formula:
    """What the registry holds: name, torch reference, Triton launcher, samples."""

    def __init__(
        self, reference: Callable[..., Any], samples: Callable[..., Iterator[Any]]
    ) -> None:
        self.name = reference.__name__
        self.reference = reference
        self.parameters = list(inspect.signature(reference).parameters)
        self.samples = samples
        self.launcher: Callable[[Any], Any] | None = None
        # What a graph that does not look inside takes the results' shapes from.
        self.shapes: Callable[[Any], Any] | None = None
        # Of the inputs, why a kernel cannot hold them; empty if it can.
        self.beyond: Callable[..., str] = lambda *inputs: ""
        self.__doc__ = reference.__doc__
        if self.name in REGISTRY:
            raise TypeError(f"op {self.name!r} is declared twice")
        REGISTRY[self.name] = self

    @property
    def differentiable(self) -> tuple[bool, ...]:
        """Whether a gradient is defined by each input."""
        return ()

    def with_leaves(self, sample: Sample) -> tuple[Sample, list[Tensor]]:
        """The sample with leaves of a graph where gradients are defined, and these."""
        leaves: list[Tensor] = []

        def leaf(x: Tensor) -> Tensor:
            leaves.append(x.detach().requires_grad_())
            return leaves[-1]

        flags = itertools.chain(self.differentiable, itertools.repeat(False))
        inputs = tuple(
            mapped(leaf, x) if flag else x for x, flag in zip(sample.inputs, flags, strict=False)
        )
        return Sample(inputs, sample.params, sample.weight), leaves

    def given(self, *arguments: Any, **params: Any) -> Any:
        """The reference's arguments by name, in one object, as its other forms take them."""
        return SimpleNamespace(**dict(zip(self.parameters, arguments, strict=False)), **params)

    def triton(self, launcher: Callable[[Any], Any]) -> Callable[[Any], Any]:
        """Register the Triton launcher: of what is `given`, what the engine is to launch; or where
        an op has no rows, the results, which it launches itself."""
        self.launcher = launcher
        return launcher

    def shaped_as(self, shapes: Callable[[Any], Any]) -> Callable[[Any], Any]:
        """Register what makes tensors like the results of what is `given`, where the reference
        looks at sizes.

        A graph for any number of boxes knows no number to cut into pieces.
        """
        self.shapes = shapes
        return shapes

    def limited(self, beyond: Callable[..., str]) -> Callable[..., str]:
        """Register what the kernel cannot hold: of the inputs, why not, or an empty string."""
        self.beyond = beyond
        return beyond

    def __repr__(self) -> str:
        return f"<op {self.name}>"


class RowFormula(Formula):
    """A loss, or a few values, of each row of its inputs.

    Args:
        inputs: the reference's first parameters.
        skip: a row of weight 0 contributes nothing, whatever it holds.
        values: how many values a row has; 0 for one loss.
        by_entry: the reference gives a loss of each entry of the first input; a row's is their sum.
        temporaries: how many tensors of the widest input's size the reference holds at a time.
    """

    def __init__(
        self,
        reference: Callable[..., Tensor],
        inputs: tuple[Input, ...],
        samples: Callable[..., Iterator[Sample]],
        skip: bool = False,
        values: int = 0,
        by_entry: bool = False,
        temporaries: int = TEMPORARIES,
    ) -> None:
        super().__init__(reference, samples)
        names = self.parameters[: len(inputs)]
        if names != [spec.name for spec in inputs]:
            raise TypeError(f"{self.name}: parameters {names} are not the inputs declared")
        self.inputs = inputs
        self.skip = skip
        self.values = values
        self.by_entry = by_entry
        self.temporaries = temporaries
        self.background: Callable[..., tuple[Tensor, Tensor]] | None = None

    @property
    def differentiable(self) -> tuple[bool, ...]:
        return tuple(spec.grad for spec in self.inputs)

    def of_background(
        self, background: Callable[..., tuple[Tensor, Tensor]]
    ) -> Callable[..., tuple[Tensor, Tensor]]:
        """Register what a row without a class costs, with its derivative by the first input.

        Given the op's parameters without label and score, (losses, slopes) of each entry. A CPU
        takes this for all rows but the few that have a class, which halves its work.
        """
        self.background = background
        return background

    def check(self, inputs: Inputs, weight: Tensor | None, keep: int) -> torch.Size:
        """The row dimensions.

        Raises:
            ValueError: if inputs disagree in them, one without a gradient requires it, or holds
                what is no real number, or no integer.
        """
        if len(inputs) != len(self.inputs):
            names = ", ".join(spec.name for spec in self.inputs)
            raise ValueError(f"{self.name}: expected the inputs ({names}), got {len(inputs)}")
        rows: torch.Size | None = None
        for spec, x in zip(self.inputs, inputs, strict=True):
            if x is None:
                if not spec.optional:
                    raise ValueError(f"{self.name}: {spec.name} is required, got None")
                continue
            if x.dim() < spec.features:
                raise ValueError(
                    f"{self.name}: {spec.name} needs a last dimension, got shape {tuple(x.shape)}"
                )
            here = x.shape[: x.dim() - spec.features]
            if rows is None:
                rows = here
            elif here != rows:
                raise ValueError(
                    f"{self.name}: {spec.name} has rows {tuple(here)}, expected {tuple(rows)} "
                    f"as in {self.inputs[0].name}"
                )
            if x.is_complex() or (spec.index and x.is_floating_point() and x.numel() > 0):
                expected = "integers" if spec.index else "real numbers"
                raise ValueError(f"{self.name}: {spec.name} must hold {expected}, got {x.dtype}")
            if x.requires_grad and not spec.grad:
                raise ValueError(
                    f"{self.name}: no gradient is defined for {spec.name}; detach it first"
                )
        assert rows is not None
        if weight is not None:
            if weight.shape != rows:
                raise ValueError(
                    f"{self.name}: weight has shape {tuple(weight.shape)}, expected {tuple(rows)}"
                )
            if weight.requires_grad:
                raise ValueError(f"{self.name}: no gradient is defined for weight; detach it first")
        if not 0 <= keep <= len(rows):
            raise ValueError(f"{self.name}: keep must be in [0, {len(rows)}], got {keep}")
        return rows


def as_rows(x: Tensor, dim: int) -> Tensor:
    """A map (N, features..., H, W) as a view (N, H * W, ...features) of `dim` dimensions, their
    order reversed; what has so many is not a map."""
    if x.dim() == dim:
        return x
    cells = x.flatten(-2)
    rows = cells.permute(0, *range(cells.dim() - 1, 0, -1))
    return rows if rows.dim() == dim else rows.squeeze(-1)


def is_walkable(x: Tensor) -> bool:
    """Whether one stride goes from cell to cell of a map, and of what is allocated like it."""
    *_, row, cell = x.stride()
    is_dense = x.is_contiguous() or (
        x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last)
    )
    return is_dense and row == cell * x.shape[-1]


def row_shape(x: Tensor, dim: int) -> tuple[int, ...]:
    """The shape of `as_rows(x, dim)`."""
    if x.dim() == dim:
        return tuple(x.shape)
    image, *features, height, width = x.shape
    return (image, height * width, *features[::-1])[:dim]


def row_strides(x: Tensor, dim: int) -> tuple[int, ...]:
    if not dim or x.dim() == dim:
        return x.stride()
    image, *features, _, cell = x.stride()
    return (image, cell, *features[::-1])[:dim]


class FusedFormula(Formula):
    """Losses of many tensors at once, a whole criterion's: a reference made of small ops.

    The launcher is not given the `number`, and answers `Passes` for all calls with tensors that are
    laid out alike.

    Args:
        levels: the inputs, each a tuple of tensors, that a kernel takes level by level (or layer by
            layer): as many of each, or none.
        gradients: those of them that have gradients.
        in_graphs: whether a compiled graph calls the kernels, or fuses the reference.
        maps: inputs that may be given as maps, see `as_rows`, with the dimensions of their rows. A
            kernel walks a map where it lies, which saves autograd the views.
        is_of_layers: whether one body of code takes all levels, so that it matters how they lie.
    """

    def __init__(
        self,
        reference: Callable[..., Tensor],
        samples: Callable[..., Iterator[Sample]],
        levels: tuple[str, ...],
        gradients: tuple[str, ...],
        in_graphs: bool = True,
        maps: Mapping[str, int] | None = None,
        is_of_layers: bool = False,
    ) -> None:
        super().__init__(reference, samples)
        annotations = inspect.signature(reference).parameters.values()
        self.inputs = [p.name for p in annotations if p.annotation == "tuple[Tensor, ...]"]
        self.levels, self.gradients = levels, gradients
        self.of_levels = [self.inputs.index(name) for name in levels]
        self.of_gradients = [self.inputs.index(name) for name in gradients]
        self.in_graphs = in_graphs
        self.dims = [(maps or {}).get(name, 0) for name in self.inputs]
        self.is_of_layers = is_of_layers
        # What is known of calls, see `calls`.
        self.signatures: dict[Hashable, Any] = {}

    def rows(
        self, inputs: Sequence[tuple[Tensor, ...]], is_kept: Callable[[Tensor], bool] | None = None
    ) -> tuple[tuple[Tensor, ...], ...]:
        """The inputs, maps as rows; but for those that are to be kept."""
        return tuple(
            tuple(x if is_kept and is_kept(x) else as_rows(x, dim) for x in given) if dim else given
            for given, dim in zip(inputs, self.dims, strict=True)
        )

    @property
    def differentiable(self) -> tuple[bool, ...]:
        return tuple(i in self.of_gradients for i in range(len(self.inputs)))


@dataclass(frozen=True)
class Call:
    """One call of a row formula: everything about it but its tensors.

    Losses are weighted, and summed but for the leading `keep` dimensions of the `rows`.
    """

    apart: ClassVar[None] = None

    op: RowFormula
    params: tuple[tuple[str, Any], ...]
    keep: int
    rows: torch.Size

    @property
    def out_shape(self) -> tuple[int, ...]:
        return (*self.rows[: self.keep], *([self.op.values] if self.op.values else []))

    @property
    def is_summed(self) -> bool:
        return self.keep < len(self.rows)

    def reference(self, *inputs: Tensor | None) -> Tensor:
        """The reference on some of the rows, in float64 where an input is, else in float32."""
        dtype = arithmetic_dtype(*inputs)
        return self.op.reference(
            *(
                x if x is None or spec.index else x.to(dtype)
                for spec, x in zip(self.op.inputs, inputs, strict=True)
            ),
            **dict(self.params),
        )

    def each(self, *inputs: Tensor | None) -> Tensor:
        """The loss, or the values, of each of some rows, not weighted."""
        losses = self.reference(*inputs)
        return losses.sum(-1) if self.op.by_entry else losses

    def whole(
        self, weight: Tensor | None, *inputs: Tensor | None, in_one_loop: bool = False
    ) -> Tensor:
        """The losses by one expression over all rows.

        Args:
            in_one_loop: entries are weighted and summed with their rows, which a compiler makes
                one loop of; else their sum is weighted, which is fewer operations.
        """
        losses = (self.reference if in_one_loop else self.each)(*self._blanked(weight, inputs))
        n_summed = losses.dim() - self.keep - bool(self.op.values)
        if weight is not None:
            missing = losses.dim() - weight.dim()
            losses = losses * weight[(..., *[None] * missing)].to(losses.dtype)
        if not n_summed:
            return losses
        # To join the dimensions of all would be to copy them where logits are transposed.
        return losses.flatten(self.keep).sum(-1) if self.keep else losses.sum()

    def new_gradients(self, inputs: Inputs, wanted: Sequence[bool]) -> list[Tensor | None]:
        """Memory for the gradients wanted, in the layouts of the inputs."""
        return [
            torch.empty_like(x) if want and x is not None else None
            for x, want in zip(inputs, wanted, strict=True)
        ]

    def _blanked(self, weight: Tensor | None, inputs: Inputs) -> Inputs:
        """The inputs, 0 in rows that are skipped: then autograd too finds nothing in them."""
        if weight is None or not self.op.skip:
            return inputs
        unused = weight == 0
        return tuple(
            x
            if x is None or spec.index
            else x.masked_fill(unused.unsqueeze(-1) if spec.features else unused, 0)
            for spec, x in zip(self.op.inputs, inputs, strict=True)
        )
