"""Both sides of a group in turns: ours, the reference, ours, the reference."""

from __future__ import annotations

import contextlib
import importlib
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field

from tqdm import tqdm

from benchmarks.processes import Turn, waiting
from benchmarks.suite.material import Material
from benchmarks.suite.table import OURS, REFERENCE, Group, Measure
from benchmarks.suite.verdict import Found, found
from errors import PhiSightError


@dataclass
class Taken:
    """The turns of a group, of all its tries."""

    group: Group
    given: dict[str, list[dict[str, float]]] = field(default_factory=lambda: defaultdict(list))
    """side -> what each of its turns gave"""
    seconds: float = 0.0

    def of(self, measure: Measure) -> Found:
        ours, reference = (
            [turn[measure.figure] for turn in self.given[side]] for side in (OURS, REFERENCE)
        )
        return found(ours, reference, self.seconds)

    def check(self) -> None:
        """Raise `PhiSightError` where the sides do not do the same work."""
        if self.group.agrees is None:
            return
        name, share = self.group.agrees
        ours, reference = (self.given[side][0][name] for side in (OURS, REFERENCE))
        if abs(ours - reference) > share * abs(reference):
            raise PhiSightError(
                f"{self.group.name}: {name} is {ours:.6g} on our side and {reference:.6g} on the"
                " reference's, so that they do not do the same work; mend that first"
            )


def take(taken: Taken, material: Material, turns: int | None = None) -> None:
    """Take a group's turns (`turns` of each side, or its own number) and add them to `taken`."""
    group, started = taken.group, time.perf_counter()
    turns = turns or group.turns
    with (
        side_of(group, group.ours, material) as ours,
        side_of(group, group.reference, material) as reference,
        tqdm(total=turns, desc=group.name, unit="turn", leave=False, disable=None) as bar,
    ):
        if group.warms_up:
            ours(), reference()
        for _ in range(turns):
            taken.given[OURS].append(ours())
            taken.given[REFERENCE].append(reference())
            bar.update()
    taken.seconds += time.perf_counter() - started
    taken.check()


@contextlib.contextmanager
def side_of(group: Group, side: str, material: Material) -> Iterator[Turn]:
    """One side, ready for its turns."""
    if not group.in_processes:
        module, name = side.split(".")
        yield getattr(importlib.import_module(f"benchmarks.suite.{module}"), name)(material)
        return
    asked = {"side": side, "folder": str(material.folder), "threads": material.threads}
    with waiting("benchmarks.suite.sides", asked, material.threads) as turn:
        yield turn
