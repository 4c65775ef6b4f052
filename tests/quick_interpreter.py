"""Triton's interpreter in less than half its time, for tests: what it works out anew for every
operation is worked out once. What kernels compute does not pass through here.
"""

from __future__ import annotations

import os
import sys
from typing import Any

import pytest


def quicken(patch: pytest.MonkeyPatch) -> None:
    """Replace parts of the interpreter where it is in use and is one that has these parts."""
    interpreter = sys.modules.get("triton.runtime.interpreter")
    if os.environ.get("TRITON_INTERPRET") != "1" or not hasattr(interpreter, "_LangPatchScope"):
        return
    _patch_language_once(patch, interpreter)
    _keep_types(patch, interpreter)
    _pass_what_fits(patch)


def _patch_language_once(patch: pytest.MonkeyPatch, interpreter: Any) -> None:
    """It is patched for each launch, and again for each device function that a kernel calls."""
    patch_language = interpreter._patch_lang
    patched: set[str] = set()

    def once(function: Any) -> Any:
        if function.__module__ not in patched:
            patched.add(function.__module__)
            patch_language(function)
        return interpreter._LangPatchScope()  # with nothing to restore

    patch.setattr(interpreter, "_patch_lang", once)


def _keep_types(patch: pytest.MonkeyPatch, interpreter: Any) -> None:
    """Names, sizes and NumPy's types of blocks, of which a kernel has few."""
    from triton.language import core, semantic

    dtype_of, init_block = interpreter._get_np_dtype, core.block_type.__init__
    broadcast = semantic.TritonSemantic.broadcast_impl_value
    dtypes: dict[str, Any] = {}
    blocks: dict[Any, dict[str, Any]] = {}
    one = core.constexpr(1)

    def np_dtype(dtype: Any) -> Any:
        if dtype.name not in dtypes:
            dtypes[dtype.name] = dtype_of(dtype)
        return dtypes[dtype.name]

    def block(self: Any, element_ty: Any, shape: Any) -> None:
        key = element_ty.name, *(getattr(size, "value", size) for size in shape)
        if key not in blocks:
            init_block(self, element_ty, shape)
            sizes = tuple(map(core.constexpr, self.shape))
            of_tensor = core.constexpr(self.numel), sizes
            blocks[key] = {**vars(self), "of_tensor": of_tensor, "kind": str(key)}
        vars(self).update(blocks[key], element_ty=element_ty)

    def tensor(self: Any, handle: Any, type: Any) -> None:
        self.handle, self.type, self.dtype = handle, type, type.scalar
        self.numel, self.shape = type.of_tensor if type.is_block() else (one, ())

    def broadcasted(self: Any, a: Any, b: Any) -> Any:
        if a.type.is_block() and b.type.is_block() and a.type.shape == b.type.shape:
            return a, b
        return broadcast(self, a, b)

    patch.setattr(interpreter, "_get_np_dtype", np_dtype)
    patch.setattr(core.block_type, "__init__", block)
    patch.setattr(core.tensor, "__init__", tensor)
    patch.setattr(semantic.TritonSemantic, "broadcast_impl_value", broadcasted)


def _pass_what_fits(patch: pytest.MonkeyPatch) -> None:
    """Most operands are of one type and shape, or a block and one of few numbers."""
    from triton.language import core
    from triton.language.semantic import TritonSemantic

    fit = TritonSemantic.binary_op_type_checking_impl
    look_for_overflow = TritonSemantic.binary_op_sanitize_overflow_impl
    unwrap = core._unwrap_if_constexpr
    # In these a division is computed in the operands' own type.
    plain = {"fp32", "int32", "int64"}
    numbers: dict[Any, Any] = {}

    def unwrapped(x: Any) -> Any:
        return x if type(x) is core.tensor else unwrap(x)

    def kind(x: Any) -> Any:
        return x.type.kind if x.type.is_block() else x.dtype.name

    def fitting(self: Any, a: Any, b: Any, *rules: Any, **named: Any) -> Any:
        tensors = type(a) is core.tensor, type(b) is core.tensor
        if all(tensors):
            name = a.dtype.name
            if kind(a) == kind(b) and (name in plain or name == "int1"):
                return a, b
        elif any(tensors):
            x, number = (a, b) if tensors[0] else (b, a)
            if type(number) in (int, float) and x.dtype.name in plain:
                key = kind(x), type(number), number
                if key not in numbers:
                    found = fit(self, a, b, *rules, **named)
                    same, made = found if tensors[0] else found[::-1]
                    if same is not x:
                        return found
                    numbers[key] = made
                return (x, numbers[key]) if tensors[0] else (numbers[key], x)
        return fit(self, a, b, *rules, **named)

    def overflowing(self: Any, *operation: Any) -> None:
        if self.builder.options.debug:  # without it, what is found is not told
            look_for_overflow(self, *operation)

    patch.setattr(core, "_unwrap_if_constexpr", unwrapped)
    patch.setattr(TritonSemantic, "binary_op_type_checking_impl", fitting)
    patch.setattr(TritonSemantic, "binary_op_sanitize_overflow_impl", overflowing)
