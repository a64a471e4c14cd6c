"""Dropout whose mask belongs to a row of the data, not to a moment of the program."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from errors import PhiSightError

KEY_LIMIT = 2**63
STEPS = 2**16  # an int16 tells so many probabilities apart


def key_of(*parts: object) -> int:
    """A number from 0 to 2**63 - 1 that depends on nothing but `parts`."""
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "big") % KEY_LIMIT


class RowDropout(nn.Module):
    """Inverted dropout whose mask, with `row_keys`, is a function of row key and layer key.

    A mask drawn from a global generator depends on everything that was drawn before it, and on
    which process draws it. One drawn from the row's own key is the same in whatever micro-batch and
    on whichever process the row is computed, when a checkpointed activation is computed again, and
    after a resume: a run means the same on one process as on four.

    It is drawn from a row's first token on, so that on a CPU padding behind the last one changes
    none of it; elsewhere rows must always come with their padding, or always without.

    Attributes:
        layer_key: tells the layers apart, which would otherwise share one mask.
    """

    def __init__(self, probability: float, layer_key: int = 0) -> None:
        super().__init__()
        self.probability, self.layer_key = probability, layer_key

    def forward(
        self,
        x: Tensor,
        row_keys: Sequence[int] | None = None,
        row_tokens: Sequence[int] | None = None,
    ) -> Tensor:
        """(rows, length, features) -> the same shape; any shape without row keys.

        row_keys: one key a row, or None for a mask from torch's own generator.
        row_tokens: see `mask`.

        Raises:
            PhiSightError: the input has another number of rows than there are keys.
        """
        mask, scale = self.mask(x, row_keys, row_tokens)
        return x if mask is None else x * (mask * scale).to(x.dtype)

    def mask(
        self, x: Tensor, row_keys: Sequence[int] | None, row_tokens: Sequence[int] | None = None
    ) -> tuple[Tensor | None, float]:
        """Where `x` is kept (uint8 of its shape: 1 or 0; None: everywhere), and its scale there.

        row_tokens: how many tokens each row has, where `x` is (1, tokens of all rows, features)
        and the rows stand one behind the other, without padding. Raises as `forward` does.
        """
        if not self.training or self.probability == 0:
            return None, 1.0
        if row_keys is None:
            mask = nn.functional.dropout(torch.ones_like(x), self.probability) != 0
            return mask.view(torch.uint8), 1 / (1 - self.probability)
        if row_tokens is None:
            row_tokens = [x.shape[1]] * len(x)
        if len(row_keys) != len(row_tokens):
            raise PhiSightError(
                f"dropout: {len(row_tokens)} rows came with {len(row_keys)} row keys; give one a"
                " row"
            )
        dropped = min(round(self.probability * STEPS), STEPS - 1)
        mask = self.draws(x, row_keys, row_tokens) >= dropped - STEPS // 2
        # A CPU multiplies floats by uint8 in a third of the time that it takes for bool.
        return mask.view(torch.uint8), STEPS / (STEPS - dropped)

    def draws(self, x: Tensor, row_keys: Sequence[int], row_tokens: Sequence[int]) -> Tensor:
        """A random int16 for each element of `x`, which has rows of `row_tokens` tokens.

        Four come from each number of 64 bits: three times as fast on a CPU as drawing a float for
        each. A probability is thereby rounded to a multiple of 1/65536, and the scale with it.
        """
        counts = [tokens * x.shape[-1] for tokens in row_tokens]
        sizes = [-(-count // 4) for count in counts]
        # Apple's GPU is not asked for numbers of 64 bits: the CPU's are sent to it.
        drawn_on = torch.device("cpu") if x.device.type == "mps" else x.device
        words = torch.empty(sum(sizes), dtype=torch.int64, device=drawn_on)
        rows = words.split(sizes)
        for row, key in zip(rows, row_keys, strict=True):
            generator = torch.Generator(drawn_on).manual_seed(key ^ self.layer_key)
            row.random_(-(2**63), None, generator=generator)
        words = words.to(x.device)
        rows = words.split(sizes)
        if 4 * len(words) == x.numel():  # every row is whole words
            return words.view(torch.int16).view(x.shape)
        cut = [row.view(torch.int16)[:count] for row, count in zip(rows, counts, strict=True)]
        return torch.cat(cut).view(x.shape)

    def extra_repr(self) -> str:
        return f"probability={self.probability}"
