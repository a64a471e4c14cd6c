"""Whose prompt is read next: short ones are not behind long ones, and long ones are not forgotten.

A step of the engine reads at most `STEP` tokens of prompts, so that the answers that are being
decoded have their next token soon (chunked prefill, Sarathi-Serve, arXiv:2403.02310).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol, TypeVar

from assistant.decoding import PIECE, piece_of

STEP = PIECE  # tokens of prompts in one step: a piece of a long one, or a few short ones
OLDEST_EVERY = 4  # of so many steps one begins with whoever came first
PATIENCE = 32  # later ones may begin before the first of those that wait for a place or memory


class Prompt(Protocol):
    """A prompt of which something is to be read."""

    ids: list[int]
    unread: int
    """of its tokens, the last ones that are still to be read, as far as is known"""
    submitted: float
    """when it came"""


AnyPrompt = TypeVar("AnyPrompt", bound=Prompt)


class Schedule:
    """Turns that depend on what was asked and in which order, not on the time that it takes."""

    def __init__(self) -> None:
        self._steps = 0
        self._overtaken = 0
        """how many began before the first of those that wait, and came later"""

    def choose(
        self,
        begun: Sequence[AnyPrompt],
        waiting: Sequence[AnyPrompt],
        begin: Callable[[AnyPrompt], bool],
    ) -> list[AnyPrompt]:
        """The prompts of which a piece is read in this step.

        begun: they have a place and memory; waiting: in the order of their coming. `begin` gives
        one of these a place and memory, and says whether there was room. Shortest remaining first:
        the mean time to a first token is the least then. In every fourth step the one that came
        first is the first. One that needs much must not wait for ever while small ones come
        and go: after `PATIENCE` of them, nobody begins before it does.
        """
        self._steps += 1
        order = sorted((*begun, *waiting), key=lambda prompt: prompt.unread)
        stuck = waiting[0] if waiting and self._overtaken >= PATIENCE else None
        if order and (stuck or self._steps % OLDEST_EVERY == 0):
            first = stuck or min(order, key=lambda prompt: prompt.submitted)
            order.remove(first)
            order.insert(0, first)
        chosen: list[AnyPrompt] = []
        line, left = list(waiting), STEP
        for prompt in order:
            piece = piece_of(len(prompt.ids), prompt.unread)
            if piece > left:
                continue
            if prompt not in begun:
                if (stuck and prompt is not stuck) or not begin(prompt):
                    continue
                self._overtaken = 0 if prompt is line[0] else self._overtaken + 1
                line.remove(prompt)
            chosen.append(prompt)
            left -= piece
        return chosen
