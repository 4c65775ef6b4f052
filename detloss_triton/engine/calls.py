"""What all calls of a fused op have in common whose tensors are laid out alike.

It is worked out once and kept: beside a fast GPU a step takes as long as the host needs to launch
it. Nothing of it holds a tensor; a launch puts the tensors of its call in their places.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from detloss_triton.precision import READABLE

from .formula import FusedFormula, is_walkable, row_strides

# Signatures of an op that are kept: a few sizes of images, and numbers of boxes.
_KEPT = 256

# Pointers, in bytes, and strides that are multiples of this, Triton compiles apart from others.
ALIGNED = 16

# What losses are divided by may change from step to step, as a number of boxes does. It is no part
# of a signature, and no launcher knows it.
_NUMBER = "number"


class Slot(int):
    """Where an argument of a kernel is a tensor: its place among those of the call."""


def slotted(argument: Any, places: Mapping[int, int]) -> Any:
    """An argument of a kernel, or a tuple, with slots for tensors; by their ids, their places."""
    if isinstance(argument, Tensor):
        return Slot(places[id(argument)])
    if isinstance(argument, tuple):
        return tuple(slotted(x, places) for x in argument)
    return argument


def has_slot(argument: Any) -> bool:
    if isinstance(argument, tuple):
        return any(map(has_slot, argument))
    return isinstance(argument, Slot)


def filled(argument: Any, tensors: Sequence[Tensor]) -> Any:
    """An argument with the tensors of a call in its slots."""
    if type(argument) is Slot:
        return tensors[argument]
    if type(argument) is tuple:
        return tuple([x if type(x) is int else filled(x, tensors) for x in argument])
    return argument


class Signature:
    """A call of a fused op, but for its tensors' memory and its number.

    Args:
        counts: how many tensors each input has.
        params: without the number.

    Attributes:
        dtypes: of the tensors.
        is_readable: whether all are on one device, of types that kernels and references read.
        is_walkable: whether kernels walk the maps among them where they lie.
        beyond: why a kernel cannot hold them; empty if it can.
    """

    def __init__(
        self,
        op: FusedFormula,
        counts: tuple[int, ...],
        params: dict[str, Any],
        tensors: Sequence[Tensor],
    ) -> None:
        self.op, self.params = op, params
        ends = tuple(itertools.accumulate(counts))
        self.of_input = [slice(end - n, end) for end, n in zip(ends, counts, strict=True)]
        device = tensors[0].device
        self.strides = [x.stride() for x in tensors]
        self.dtypes = {x.dtype for x in tensors}
        self.is_readable = self.dtypes.issubset(READABLE) and all(
            x.device == device for x in tensors
        )
        pairs = zip(self.of_input, op.dims, strict=True)
        self.is_walkable = all(
            x.dim() == dim or is_walkable(x) for part, dim in pairs if dim for x in tensors[part]
        )
        self.beyond = op.beyond(*tensors)
        # Of each level the places and strides of its inputs, None where one is not given.
        self._rows: list[list[tuple[int, tuple[int, ...]] | None]] = []
        self._passes: Any = None

    def passes(self, tensors: Sequence[Tensor]) -> Any:
        """What the op's launcher answers, with slots in the place of tensors."""
        if self._passes is None:
            assert self.op.launcher is not None
            # One that is two inputs' has two places: in the next call they may be two tensors.
            apart = [x.detach() for x in tensors]
            inputs = (tuple(apart[part]) for part in self.of_input)
            passes = self.op.launcher(self.op.given(*inputs, **self.params))
            passes.set_slots({id(x): i for i, x in enumerate(apart)})
            self._passes = passes
        return self._passes

    def levels(
        self, tensors: Sequence[Tensor], gradients: Sequence[Tensor | None]
    ) -> tuple[tuple[Any, ...], ...]:
        """Of each level the inputs, then the gradients wanted: (tensor, strides...) or None."""
        parts, op = self.of_input, self.op
        if not self._rows:
            columns: list[list[Any]] = []
            for i in op.of_levels:
                places = range(parts[i].start, parts[i].stop)
                columns.append([(at, row_strides(tensors[at], op.dims[i])) for at in places])
            self._rows = _in_rows(columns)
        levels = [
            [None if at is None else (tensors[at[0]], *at[1]) for at in row] for row in self._rows
        ]
        into: list[list[Any]] = []
        for i in op.of_gradients:
            given, dim = gradients[parts[i]], op.dims[i]
            into.append([x if x is None else (x, *row_strides(x, dim)) for x in given])
        pairs = zip(levels, _in_rows(into), strict=True)
        return tuple([(*inputs, *outputs) for inputs, outputs in pairs])


def _in_rows(columns: Sequence[list[Any]]) -> list[list[Any]]:
    """Columns, of an entry for each level or of none at all, as the rows of the levels."""
    none = [None] * max(map(len, columns))
    return [list(row) for row in zip(*[column or none for column in columns], strict=True)]


class FusedCall:
    """One call of a fused op: everything about it but its tensors, which are passed in a row.

    Args:
        number: what losses are divided by, where the op takes one.
        apart: of losses that are asked for one by one, how many are to have a dimension.
    """

    def __init__(
        self, signature: Signature, number: float | None = None, apart: int | None = None
    ) -> None:
        self.signature, self.number, self.apart = signature, number, apart

    @property
    def op(self) -> FusedFormula:
        return self.signature.op

    @property
    def params(self) -> dict[str, Any]:
        params = self.signature.params
        return params if self.number is None else {**params, _NUMBER: self.number}

    def inputs(self, tensors: Sequence[Any]) -> list[tuple[Any, ...]]:
        """What is given of each tensor, by inputs."""
        return [tuple(tensors[part]) for part in self.signature.of_input]

    def with_layouts_of(self, tensors: Sequence[Tensor]) -> FusedCall:
        """The call of tensors that may be laid out in another way: a hook for saved tensors may
        have copied them."""
        if [x.stride() for x in tensors] == self.signature.strides:
            return self
        return call_of(self.op, self.inputs(tensors), self.params)[0]

    def whole(self, weight: None, *tensors: Tensor) -> Tensor:
        """The losses by the reference."""
        out: Tensor = self.op.reference(*self.op.rows(self.inputs(tensors)), **self.params)
        return out


def call_of(
    op: FusedFormula,
    inputs: Sequence[Sequence[Tensor]],
    params: Mapping[str, Any],
    apart: int | None = None,
    is_kept: bool = True,
) -> tuple[FusedCall, tuple[Tensor, ...]]:
    """A call and its tensors in a row. Its signature is known, unless that is not to be kept."""
    tensors = tuple([x for given in inputs for x in given])
    params = dict(params)
    number = params.pop(_NUMBER, None)
    counts = tuple(map(len, inputs))
    key: Any = None
    if is_kept:
        of_tensors: list[Any]
        if op.levels:
            of_tensors = [(x.shape, x.stride(), x.dtype, x.device) for x in tensors]
        else:  # whatever they are, a kernel takes them as numbers
            of_tensors = [*{x.dtype for x in tensors}, *{x.device for x in tensors}]
        if op.is_of_layers:
            of_tensors += [x.data_ptr() % ALIGNED for x in tensors]
        key = (counts, *params.items(), *of_tensors)
    try:
        signature = op.signatures.get(key)
    except TypeError:  # of a shape that a compiler has no number for
        key = signature = None
    if signature is None:
        signature = Signature(op, counts, params, tensors)
        if key is not None:
            if len(op.signatures) >= _KEPT:
                op.signatures.clear()
            op.signatures[key] = signature
    return FusedCall(signature, number, apart), tensors
