"""How much memory a training takes, for the timing of its log records."""

from __future__ import annotations

import torch

from system import memory


def peak_memory_mb() -> dict[str, float]:
    """The most memory this process has held, in MiB, to go into a record's timing:
    {"memory_mb": resident} and, once CUDA is in use, "cuda_memory_mb" over all devices; on a Mac
    "mps_memory_mb", what its GPU holds for us now."""
    peak = {"memory_mb": round(memory.peak() / 2**20, 1)}
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        held = sum(map(torch.cuda.max_memory_allocated, range(torch.cuda.device_count())))
        peak["cuda_memory_mb"] = round(held / 2**20, 1)
    if torch.backends.mps.is_available():  # which counts none at most, but what it has now
        peak["mps_memory_mb"] = round(torch.mps.driver_allocated_memory() / 2**20, 1)
    return peak
