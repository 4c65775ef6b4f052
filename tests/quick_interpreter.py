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
            blocks[key] = {**vars(self), "of_tensor": (core.constexpr(self.numel), sizes)}
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
