"""The keys and values of sequences that are decoded, in memory that grows and is shared."""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK = 64  # tokens: memory is taken in multiples of it


class Memory:
    """Preallocated keys and values: (layers, 2, key-value heads, capacity, head dim); the first
    `used` positions have been written, by whichever sequence went furthest."""

    def __init__(self, tensor: Tensor, used: int = 0) -> None:
        self.tensor, self.used = tensor, used

    @property
    def capacity(self) -> int:
        return self.tensor.shape[3]


class KeyValues:
    """The keys and values of one sequence in every layer.

    Positions that were written are never written again, so sequences that begin alike share their
    memory (`prefix`): the first one that goes on writes behind what is there, the next one finds
    that place taken and copies its part first (copy on write, as in vLLM's paged attention,
    arXiv:2309.06180). A token costs one write; the whole is copied only where memory has to grow,
    which happens ever more rarely.
    """

    def __init__(self, memory: Memory, length: int) -> None:
        self.memory, self.length = memory, length

    @classmethod
    def empty(
        cls, layers: int, heads: int, head_dim: int, dtype: torch.dtype, device: torch.device
    ) -> KeyValues:
        """Of a sequence without a token."""
        return cls(
            Memory(torch.empty(layers, 2, heads, 0, head_dim, dtype=dtype, device=device)), 0
        )

    @property
    def bytes(self) -> int:
        return self.memory.tensor.nbytes

    def prefix(self, length: int) -> KeyValues:
        """The first `length` tokens as a sequence of its own, over the same memory."""
        return KeyValues(self.memory, length)

    def reserve(self, count: int) -> None:
        """Make `count` positions behind the last one this sequence's own, to be written."""
        total = self.length + count
        if self.memory.used != self.length or self.memory.capacity < total:
            shape = list(self.memory.tensor.shape)
            # A quarter more than is needed, so that growing by single tokens copies seldom.
            shape[3] = -(-(total + total // 4) // BLOCK) * BLOCK
            grown = self.memory.tensor.new_empty(shape)
            grown[..., : self.length, :] = self.memory.tensor[..., : self.length, :]
            self.memory = Memory(grown)
        self.memory.used = total

    def write(self, layer: int, new: Tensor) -> tuple[Tensor, Tensor]:
        """Put (new tokens, 2, heads, head dim) keys and values behind those of `layer`, in
        positions that were reserved; returns all keys and all values, (heads, tokens, head dim)."""
        total = self.length + len(new)
        memory = self.memory.tensor[layer]  # (2, heads, capacity, head dim)
        memory[:, :, self.length : total] = new.permute(1, 2, 0, 3)
        keys, values = memory[:, :, :total]
        return keys, values
