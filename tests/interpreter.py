"""Whether Triton's interpreter runs here: releases older than the installed NumPy may not.

Run as a program it ends with the reason where it does not.
"""

from __future__ import annotations

import sys

import torch
import triton
import triton.language as tl


@triton.jit
def counting_kernel(p, n):
    for i in range(n):  # a limit known only now: it is what fails before Triton 3.7
        tl.store(p + i, i)


def fault() -> str:
    """Why a kernel cannot be interpreted, empty if it can; needs TRITON_INTERPRET=1."""
    x = torch.zeros(3, dtype=torch.int64)
    try:
        counting_kernel[(1,)](x, 3)
    except Exception as error:  # whatever it is, no kernel will run
        import numpy

        versions = f"Triton {triton.__version__} with NumPy {numpy.__version__}"
        return f"no interpreter: {versions} fails with {error}"
    assert x.tolist() == [0, 1, 2]
    return ""


if __name__ == "__main__":
    sys.exit(fault() or None)
