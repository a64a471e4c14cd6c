"""Choosing the next token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from errors import PhiSightError

LONGEST_NGRAM = 64  # tokens; what is kept of a prompt grows with its size
COLDEST = 1e-6  # a float32 divided by less than this could be infinite


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen. Temperature 0 takes the likeliest one (greedy)."""

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    repetition_penalty: float = 1.0
    no_repeat_ngram_size: int = 0
    """of n-grams that may not come twice, in tokens; 0: all may. See `assistant.ngrams`"""

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise PhiSightError(f"--temperature {self.temperature}: must be 0 or more")
        if not 0 < self.top_p <= 1:
            raise PhiSightError(f"--top-p {self.top_p}: must be over 0 and at most 1")
        if self.top_k < 0:
            raise PhiSightError(f"--top-k {self.top_k}: must be 0 (all tokens) or more")
        if not 0 < self.repetition_penalty < float("inf"):
            raise PhiSightError(
                f"--repetition-penalty {self.repetition_penalty}: must be over 0; 1 is none"
            )
        if not 0 <= self.no_repeat_ngram_size <= LONGEST_NGRAM:
            raise PhiSightError(
                f"--no-repeat-ngram-size {self.no_repeat_ngram_size}: must be from 0 (off) to"
                f" {LONGEST_NGRAM}"
            )

    @property
    def takes_the_likeliest(self) -> bool:
        """Whether the next token is that of the largest logit, as the model gave them."""
        plain = self.repetition_penalty == 1 and not self.no_repeat_ngram_size
        return self.temperature == 0 and plain


def choose(logits: Tensor, sampling: Sampling, generator: torch.Generator | None = None) -> Tensor:
    """(rows, vocabulary) float logits -> (rows,) int64 token ids.

    Nucleus sampling (arXiv 1904.09751) keeps the smallest set of likeliest tokens whose share
    reaches `top_p`, the likeliest one always among them.
    """
    if sampling.temperature == 0:
        return logits.argmax(-1)
    # The likeliest token's logit becomes 0, so that a tiny temperature cannot overflow it.
    logits = logits.float() - logits.float().amax(-1, keepdim=True)
    logits = logits / max(sampling.temperature, COLDEST)
    if sampling.top_k:
        smallest = logits.topk(min(sampling.top_k, logits.shape[-1])).values[:, -1:]
        logits = logits.masked_fill(logits < smallest, float("-inf"))
    if sampling.top_p < 1:
        ordered, order = logits.sort(descending=True)
        shares = ordered.softmax(-1)
        before = shares.cumsum(-1) - shares  # what the likelier ones add up to
        ordered = ordered.masked_fill(before >= sampling.top_p, float("-inf"))
        logits = torch.empty_like(logits).scatter_(-1, order, ordered)
    return torch.multinomial(logits.softmax(-1), 1, generator=generator)[:, 0]


@torch.no_grad()
def penalize(logits: Tensor, seen: Sequence[int], penalty: float) -> Tensor:
    """(vocabulary,) logits with those of tokens seen before made less likely: divided by `penalty`
    where positive, multiplied where negative (CTRL, arXiv 1909.05858)."""
    if penalty == 1 or not seen:
        return logits
    ids = torch.tensor(sorted(set(seen)), device=logits.device)
    scores = logits[ids]
    return logits.index_copy(0, ids, torch.where(scores > 0, scores / penalty, scores * penalty))
