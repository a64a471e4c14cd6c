"""The keys and values of sequences that are decoded, in memory that grows and is shared."""

from __future__ import annotations

import logging

import torch
from torch import Tensor

from system.memory import of_machine

BLOCK = 64  # tokens: memory is taken in multiples of it
LARGEST_HALF = 65504.0  # of float16

log = logging.getLogger("phisight.cache")


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
    which happens ever more rarely, and never beyond what `most` tokens take. While it is copied,
    the old and the new are there together.
    """

    def __init__(self, memory: Memory, length: int, most: int | None = None) -> None:
        """`most`: tokens that the sequence can come to, if that is known."""
        self.memory, self.length, self.most = memory, length, most

    @classmethod
    def empty(
        cls, layers: int, heads: int, head_dim: int, dtype: torch.dtype, device: torch.device,
        most: int | None = None,
    ) -> KeyValues:  # fmt: skip
        """Of a sequence without a token."""
        empty = torch.empty(layers, 2, heads, 0, head_dim, dtype=dtype, device=device)
        return cls(Memory(empty), 0, most)

    @property
    def bytes(self) -> int:
        return self.memory.tensor.nbytes

    def bytes_of(self, tokens: int) -> int:
        """Memory for so many tokens, in whole blocks."""
        layers, two, heads, _, dim = self.memory.tensor.shape
        return layers * two * heads * dim * self.memory.tensor.itemsize * whole_blocks(tokens)

    def prefix(self, length: int, most: int | None = None) -> KeyValues:
        """The first `length` tokens as a sequence of its own, over the same memory."""
        return KeyValues(self.memory, length, most)

    def make_room(self, total: int) -> None:
        """Have memory for `total` tokens, all of it this sequence's own behind its last one."""
        if self.memory.used == self.length and self.memory.capacity >= total:
            return
        # A quarter more than is needed, so that growing by single tokens copies seldom.
        ample = total + total // 4
        shape = list(self.memory.tensor.shape)
        shape[3] = whole_blocks(ample if self.most is None else max(total, min(ample, self.most)))
        grown = self.memory.tensor.new_empty(shape)
        grown[..., : self.length, :] = self.memory.tensor[..., : self.length, :]
        self.memory = Memory(grown, self.length)

    def reserve(self, count: int) -> None:
        """Make `count` positions behind the last one this sequence's own, to be written."""
        self.make_room(self.length + count)
        self.memory.used = self.length + count

    def widen(self) -> None:
        """Go on in float32, in memory of its own: a key or value is beyond float16."""
        log.warning(
            "keys or values beyond %g: one conversation keeps its own in float32, in twice the"
            " memory that was reckoned with",
            LARGEST_HALF,
        )
        self.memory = Memory(self.memory.tensor.float(), self.memory.used)

    def write(self, layer: int, new: Tensor) -> tuple[Tensor, Tensor]:
        """Put (new tokens, 2, heads, head dim) keys and values behind those of `layer`, in
        positions that were reserved; returns all keys and all values, (heads, tokens, head dim), in
        the dtype that they are kept in, which may be narrower."""
        total = self.length + len(new)
        if self.memory.tensor.dtype == torch.float16 and new.abs().amax() > LARGEST_HALF:
            self.widen()
        memory = self.memory.tensor[layer]  # (2, heads, capacity, head dim)
        memory[:, :, self.length : total] = new.permute(1, 2, 0, 3)
        keys, values = memory[:, :, :total]
        return keys, values


def whole_blocks(tokens: int) -> int:
    return -(-tokens // BLOCK) * BLOCK


def default_kv_bytes(device: torch.device) -> int:
    """Memory for the keys and values of all sequences that are decoded: a quarter of the machine's,
    or of its container's; on a GPU, half of what is free there."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] // 2
    return of_machine() // 4
