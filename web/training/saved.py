"""The checkpoints of a run for the page, and whether they are intact, when somebody asks."""

from __future__ import annotations

import bisect
import re
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from documents import BYTE_LIMIT, read_json
from errors import PhiSightError, printable
from files import stamp_of
from web.errors import NotThere, RequestError
from web.training.curves import Point, Series

MOST = 100  # checkpoints that are listed, the newest
PROBLEMS = 10  # of a damaged one that are told
KEPT = 500  # answers that are remembered
NAME = re.compile(r"checkpoint-([0-9]{6,18})")


class Verified:
    """What verifying a checkpoint found, remembered as long as its files stay as they are."""

    def __init__(self) -> None:
        self._known: dict[Path, tuple[object, dict[str, Any]]] = {}
        self._busy = threading.Lock()

    def of(self, folder: Path) -> dict[str, Any] | None:
        """{"at", "problems"}, or None for what was not verified as it is now."""
        known = self._known.get(folder)
        return known[1] if known and known[0] == _stamps(folder) else None

    def verify(self, folder: Path) -> dict[str, Any]:
        """Read and hash every file of a checkpoint. Raises `RequestError` while another one is
        being verified: the disk reads one of them as fast as two."""
        if not self._busy.acquire(blocking=False):
            raise RequestError("verifying_another")
        try:
            import checkpoints  # with torch, which reads the tensors

            before = _stamps(folder)
            problems = [printable(text, 300) for text in checkpoints.verify(folder)]
            found = {"at": time.time(), "problems": problems[:PROBLEMS]}
            if len(self._known) >= KEPT:
                self._known.clear()
            self._known[folder] = before, found
            return found
        finally:
            self._busy.release()


def _stamps(folder: Path) -> object:
    try:
        return [
            (str(path.relative_to(folder)), *stamp_of(path.lstat()))
            for path in sorted(folder.rglob("*"))
        ]
    except OSError:
        return None  # being removed


def checkpoint_of(run: Path, name: str) -> Path:
    """The folder of a checkpoint of a run. Raises `NotThere`."""
    folder = run / name
    if not NAME.fullmatch(name) or folder.is_symlink() or not folder.is_dir():
        raise NotThere("checkpoint_not_there")
    return folder


def checkpoints_of(run: Path) -> list[tuple[int, Path]]:
    """(step, folder) of the newest checkpoints, the newest first."""
    try:
        found = [
            (int(match[1]), path)
            for path in run.iterdir()
            if (match := NAME.fullmatch(path.name)) and path.is_dir() and not path.is_symlink()
        ]
    except OSError:
        return []  # the run is being removed
    return sorted(found, reverse=True)[:MOST]


def rows_of(
    found: Sequence[tuple[int, Path]], series: Series, verified: Verified
) -> list[dict[str, Any]]:
    """The checkpoints as the page lists them, each with what the log says of its step."""
    best = _best_step(found[0][1]) if found else None
    rows = []
    for step, folder in found:
        row: dict[str, Any] = {"name": folder.name, "step": step, "best": step == best}
        try:
            row["bytes"] = sum(p.lstat().st_size for p in folder.rglob("*") if p.is_file())
            row["at"] = folder.stat().st_mtime
        except OSError:
            continue  # a training has just removed it
        row |= {
            name: at_step(series.get(name, []), step)
            for name in ("loss", "validation_loss", "right", "swapped", "blank")
        }
        rows.append(row | {"verified": verified.of(folder)})
    return rows


def _best_step(newest: Path) -> int | None:
    try:
        state: Mapping[str, Any] = read_json(newest / "trainer_state.json", BYTE_LIMIT)
    except (OSError, PhiSightError):
        return None  # verifying it tells what is wrong
    best = state.get("best_step")
    return best if type(best) is int else None


def at_step(points: Sequence[Point], step: int) -> dict[str, float] | None:
    """The last value up to a step, and the step that it is of."""
    at = bisect.bisect_right([place for place, _ in points], step)
    return {"step": points[at - 1][0], "value": points[at - 1][1]} if at else None
