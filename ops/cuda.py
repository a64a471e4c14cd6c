"""Operations for CUDA GPUs: packed attention in one kernel; the rest is plain PyTorch."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor

from ops.plain import adapted_linear, gated, linear, rms_norm, rotate
from tensors import sent_to

__all__ = ["adapted_linear", "gated", "linear", "packed_attention", "rms_norm", "rotate", "runs_on"]


def runs_on(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the attention kernel takes these: 16 bits, compute capability 8.0 or newer."""
    return (
        device.type == "cuda"
        and dtype in (torch.bfloat16, torch.float16)
        and torch.cuda.get_device_capability(device) >= (8, 0)
    )


def packed_attention(
    query: Tensor, key: Tensor, value: Tensor, lengths: Sequence[int], window: int | None = None
) -> Tensor:
    """As `ops.plain.packed_attention`, all conversations in one call without a mask. Its backward
    adds in a fixed order where `torch.use_deterministic_algorithms(True)` asks for it: torch reads
    that switch in its flash attention, which takes no argument for it."""
    from torch.nn.attention.varlen import varlen_attn  # only where there is a GPU

    ends = ends_of(tuple(lengths), query.device)
    longest = max(lengths)
    mixed = varlen_attn(
        query.contiguous(), key.contiguous(), value.contiguous(), ends, ends, longest, longest,
        window_size=(window - 1 if window else -1, 0),
        enable_gqa=query.shape[1] != key.shape[1],
    )  # fmt: skip
    assert isinstance(mixed, Tensor)  # a tuple only where more is asked for
    return mixed


@functools.lru_cache(maxsize=4)
def ends_of(lengths: tuple[int, ...], device: torch.device) -> Tensor:
    """Where each conversation begins, and the last one ends: (conversations + 1,) int32.

    Every layer of a pass, and of its computing again in the backward, asks for the same.
    """
    return sent_to(device, torch.tensor([0, *accumulate(lengths)], dtype=torch.int32))
