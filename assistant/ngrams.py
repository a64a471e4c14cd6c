"""N-grams that may not come twice (`no_repeat_ngram_size`; Paulus et al., arXiv 1705.04304)."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from torch import Tensor


class Ngrams:
    """The n-grams of one sequence that grows, and what would repeat one of them.

    As in transformers, those of the prompt count, the question's words among them. Two things
    are different from there. An n-gram that reaches into a picture does not count: its slots have
    the same id in every picture, whatever they show. And a token that ends the answer may always
    come: it stands behind every turn of the prompt, so that an answer of a conversation could
    otherwise be forbidden to end as a former one did. So there is always a token that may come.
    """

    def __init__(self, size: int, slot: int, ends: Collection[int]) -> None:
        """`size`: tokens of an n-gram, 1 or more; `slot`: the id of a picture's places; `ends`:
        the ids that end an answer."""
        self.size, self._slot, self._ends = size, slot, frozenset(ends)
        self._last: dict[tuple[int, ...], int] = {}
        """the first tokens of an n-gram -> the last one, as it came first"""
        self._others: dict[tuple[int, ...], set[int]] = {}
        """the same -> the other last ones: few have any, and a set for each would cost most"""
        self._taken = 0
        """tokens of the sequence that were looked at"""
        self._text = 0
        """of these, the last ones, behind the last picture"""

    def repeating(self, ids: Sequence[int]) -> Collection[int]:
        """The tokens that would repeat an n-gram of the whole sequence `ids`, of which only what
        came since the last call is looked at."""
        before = self.size - 1
        for place in range(self._taken, len(ids)):
            token = ids[place]
            if token == self._slot:
                self._text = 0
                continue
            if self._text >= before and token not in self._ends:
                first = tuple(ids[place - before : place])
                if self._last.setdefault(first, token) != token:
                    self._others.setdefault(first, set()).add(token)
            self._text += 1
        self._taken = len(ids)
        if self._text < before:
            return ()
        first = tuple(ids[len(ids) - before :])
        if first not in self._last:
            return ()
        return {self._last[first], *self._others.get(first, ())}

    def forbid(self, logits: Tensor, ids: Sequence[int]) -> Tensor:
        """(vocabulary,) logits of the token behind `ids`, -inf where it would repeat an n-gram."""
        repeating = self.repeating(ids)
        if not repeating:
            return logits
        places = torch.tensor(sorted(repeating), device=logits.device)
        return logits.index_fill(0, places, float("-inf"))
