"""How much memory a training takes, for the timing of its log records."""

from __future__ import annotations

import resource
import sys

import torch


def peak_memory_mb() -> dict[str, float]:
    """The most memory this process has held, in MiB, to go into a record's timing:
    {"memory_mb": resident} and, once CUDA is in use, "cuda_memory_mb" over all devices."""
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss: bytes there, KiB elsewhere
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    peak = {"memory_mb": round(resident / 2**20, 1)}
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        held = sum(map(torch.cuda.max_memory_allocated, range(torch.cuda.device_count())))
        peak["cuda_memory_mb"] = round(held / 2**20, 1)
    return peak
