"""4-bit products on a CPU, as vector instructions that numba compiles: without a compiler.

    target.py     which of the targets this machine runs, and why
    avx512.py avx2.py   what differs between them; their results are equal to the bit
    layout.py     the order of the codes in memory, and back
    codebook.py   the levels as integers, and the bound of the error
    products.py   rows of activations by NF4 weights
    dense.py      dequantising; a few rows by dense weights
    linear.py     the same for tensors: `nf4_linear`, `nf4_dequantize`, `nf4_linear_backward`
    token.py      a token through all layers of a model in one call, with layers.py, attention.py
                  and lanes.py
    crew.py       threads that share one compiled call
    compiling.py  where compiled code is kept
    simd.py       vector instructions for numba

numba is imported at the first product (`loaded`), not before.
"""

from __future__ import annotations

import functools
from types import ModuleType

from ops.kernels.layout import CHUNK, PANEL, PanelWeight, bitsandbytes_order, panels_of
from ops.kernels.target import choose as available

__all__ = [
    "CHUNK", "PANEL", "PanelWeight", "available", "bitsandbytes_order", "loaded", "panels_of",
]  # fmt: skip


@functools.cache
def loaded() -> ModuleType:
    """The module `linear`, compiled for this machine. The first time on a machine, a person is told
    that compiling takes some seconds."""
    from ops.kernels import compiling, linear

    compiling.prepare("4-bit products", linear.use_each_once)
    return linear
