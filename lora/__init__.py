"""Low-rank adaptation of frozen, possibly 4-bit, linear layers (arXiv:2106.09685)."""

import logging
import sys
from typing import Any, NoReturn

import torch


def _import_bitsandbytes() -> None:
    """Import bitsandbytes quietly and quickly, before any module here does.

    It asks for an optional package that would fetch a kernel from the hub, and warns when it is
    absent. Nothing here uses that kernel (see `secure_four_bit`).

    It also hands four functions to `torch.compile`, which alone loads torch's compiler: longer than
    all else that answering a question needs. Where compiling fails it takes the functions as they
    are, so it is made to fail meanwhile. They are fallbacks for devices without kernels of
    bitsandbytes' own, and a CPU and a CUDA GPU have those. The same holds for triton, which it
    imports only to know whether it could.
    """

    def refuse(*_: Any, **__: Any) -> NoReturn:
        raise RuntimeError("not while bitsandbytes is imported")

    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    compile_, torch.compile = torch.compile, refuse
    hide_triton = "triton" not in sys.modules
    if hide_triton:
        sys.modules["triton"] = None  # type: ignore[assignment]  # importing it fails
    try:
        import bitsandbytes  # noqa: F401
    finally:
        torch.compile = compile_
        if hide_triton:
            del sys.modules["triton"]


_import_bitsandbytes()
