"""Which kill is next: what a run still has before it, and a fair share for every kind."""

from __future__ import annotations

import random
import threading
from collections.abc import Collection
from dataclasses import dataclass

from errors import PhiSightError
from tools.torture.kills import PLACES, RANDOM, Aim

MISSES = 10  # attempts of one kind in a row that ended before their place: then it is never reached


@dataclass(frozen=True)
class Recipe:
    """How long the runs are; what happens every so many steps follows from it."""

    steps: int = 24
    pictures: int = 60

    @property
    def save_steps(self) -> int:
        return max(1, self.steps // 6)

    @property
    def log_steps(self) -> int:
        return max(1, self.steps // 12)

    @property
    def evaluate_steps(self) -> int:
        """Not a multiple of `save_steps`: the best is saved at steps of its own too."""
        return max(1, self.steps // 4)


def left(kind: str, recipe: Recipe, newest: int | None) -> int:
    """How many steps, saves, removals, evaluations … of a kind a run has before it, that resumes
    at the step `newest`, or starts if that is None. 0: the kind cannot strike."""
    start = newest or 0

    def every(steps: int) -> int:
        return sum(
            step % steps == 0 or step == recipe.steps for step in range(start + 1, recipe.steps + 1)
        )

    if start >= recipe.steps:
        return 0
    if kind == "step":
        return recipe.steps - start
    if kind in ("save", "verify", "rename"):
        return every(recipe.save_steps)
    if kind == "prune":  # the first save finds nothing to remove
        return every(recipe.save_steps) - (newest is None)
    if kind == "evaluation":
        return every(recipe.evaluate_steps)
    if kind == "best":  # the first evaluation of a process often finds one, later ones may not
        return min(1, every(recipe.evaluate_steps))
    if kind == "resume":
        return int(newest is not None)
    return 1


def draw_aim(kind: str, units: int, generator: random.Random) -> Aim:
    """A place of the kind and the number of the call there, within the units that are left."""
    if kind == RANDOM:
        return Aim(kind)
    place = generator.choice(sorted(PLACES[kind]))
    return Aim(kind, place, generator.randint(1, units * PLACES[kind][place].calls))


class Deal:
    """Gives out kinds so that each gets a fair share: all of them in a random order, then again.
    May be asked from several threads."""

    def __init__(self, kills: int, kinds: Collection[str], seed: int) -> None:
        self.wanted, self.kinds = kills, tuple(kinds)
        self.kills = dict.fromkeys(self.kinds, 0)
        self._out, self._misses = 0, dict.fromkeys(self.kinds, 0)
        self._waiting: list[str] = []
        self._generator = random.Random(f"{seed}/kinds")
        self._lock = threading.Lock()

    @property
    def open(self) -> bool:
        """Whether more kills are wanted than were made and are on their way."""
        return sum(self.kills.values()) + self._out < self.wanted

    def take(self, possible: Collection[str]) -> str | None:
        """The next kind among the possible ones, or None: enough kills, or none is possible. Tell
        of its end with `hit` or `missed`."""
        with self._lock:
            if not self.open or not set(possible) & set(self.kinds):
                return None
            while not set(possible) & set(self._waiting):
                self._waiting += self._generator.sample(self.kinds, len(self.kinds))
            kind = next(kind for kind in self._waiting if kind in possible)
            self._waiting.remove(kind)
            self._out += 1
            return kind

    def hit(self, kind: str) -> None:
        with self._lock:
            self._out -= 1
            self.kills[kind] += 1
            self._misses[kind] = 0

    def missed(self, kind: str) -> None:
        """The process ended by itself. Raises PhiSightError where that is no chance any more."""
        with self._lock:
            self._out -= 1
            self._waiting.insert(0, kind)
            self._misses[kind] += 1
            if self._misses[kind] >= MISSES:
                raise PhiSightError(
                    f"kind {kind}: {MISSES} processes in a row ended before it "
                    "struck; the functions that it waits for are not called"
                )
