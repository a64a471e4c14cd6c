"""Where kills strike, and the traps that make a process kill itself there.

For an aimed kill a child wraps the function in question and calls `train.main`; the code that is
trained with knows nothing of it.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import os
import shutil
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from errors import PhiSightError

ROOT = Path(__file__).resolve().parent.parent.parent


@dataclass(frozen=True)
class Place:
    """Before or after a call of `function`, "module:name"; with `inside`, a call made while that
    one is under way. `calls`: at least so many are made in each unit that `left` counts."""

    function: str
    moment: str
    inside: str = ""
    calls: int = 1


_ADD = "data.features:FeatureStore.add"
_LOAD = "checkpoints:load_newest"
_VERIFY = "checkpoints:verify"
_STEP = "training.step:train_step"
_UPDATE = "training.optimizer:AdamW.step"
_EVALUATE = "evaluation.meter:evaluate"
_CUT_LOG = "reports.log:MetricsLog.truncate_to"
_BEST = "training.progress:Progress.add_validation_loss"

# Only functions of the standard library and public ones of ours are named, so that the inside of a
# save may change. The counts of calls are lower bounds: a call that never comes kills nobody.
PLACES: dict[str, dict[str, Place]] = {
    "step": {
        "forward": Place("model.projectors.projector:Projector.__call__", "after", _STEP),
        "backward": Place("torch:Tensor.backward", "after"),
        "before-update": Place(_UPDATE, "before"),
        "after-update": Place(_UPDATE, "after"),
    },
    "save": {
        "fsync": Place("os:fsync", "before", calls=10),
        "tensors": Place("safetensors.torch:save_file", "after", calls=4),
    },
    "verify": {
        "start": Place(_VERIFY, "before"),
        "middle": Place("hashlib:sha256", "before", _VERIFY, calls=100),  # one a tensor
        "end": Place(_VERIFY, "after"),
    },
    "rename": {
        "before": Place("os:replace", "before"),
        "after": Place("os:replace", "after"),
    },
    "prune": {
        "before": Place("shutil:rmtree", "before"),
        "middle": Place("os:unlink", "after", "shutil:rmtree", calls=7),  # one a file
        "after": Place("shutil:rmtree", "after"),
    },
    "evaluation": {
        "middle": Place("evaluation.meter:packed_batch", "after", _EVALUATE, calls=2),
        "after": Place(_EVALUATE, "after"),
    },
    "best": {  # an evaluation found one: it is saved, and the former one removed
        "found": Place(_BEST, "after"),
        "fsync": Place("os:fsync", "before", calls=10),
        "before-rename": Place("os:replace", "before"),
        "after-rename": Place("os:replace", "after"),
        "before-removal": Place("shutil:rmtree", "before"),
        "removal": Place("os:unlink", "after", "shutil:rmtree", calls=7),
    },
    "features": {
        "tower": Place("model.vision:VisionTower.__call__", "after", _ADD),
        "shard": Place("safetensors.torch:save_file", "after", _ADD),
        "before-rename": Place("os:replace", "before", _ADD),
        "after-rename": Place("os:replace", "after", _ADD),
    },
    "resume": {
        "load": Place("hashlib:sha256", "before", _LOAD, calls=100),
        "generators": Place("training.rng:set_rng_state", "after"),
        "before-log": Place(_CUT_LOG, "before"),
        "after-log": Place(_CUT_LOG, "after"),
    },
}
RANDOM = "random"
KINDS = (RANDOM, *PLACES)
# What is called before this was called does not count: before the first step a shard is written, a
# quarantine file and a load; before the first evaluation other checkpoints are.
ARMED_BY = dict.fromkeys(("save", "verify", "rename", "prune"), _UPDATE) | {"best": _BEST}


@dataclass(frozen=True)
class Aim:
    """One kill to come: its kind, and unless that is random the place and the number of the call.
    As text, `save/fsync:7`."""

    kind: str
    place: str = ""
    number: int = 0

    def __str__(self) -> str:
        return f"{self.kind}/{self.place}:{self.number}" if self.place else self.kind

    @classmethod
    def parse(cls, text: str) -> Aim:
        """The inverse of `str`. Raises PhiSightError."""
        names, _, number = text.partition(":")
        kind, _, place = names.partition("/")
        if place not in PLACES.get(kind, {}) or not number.isdecimal() or int(number) < 1:
            raise PhiSightError(f"--child {text}: not KIND/PLACE:NUMBER; see torture/kills.py")
        return cls(kind, place, int(number))


# -- the child ------------------------------------------------------------------------------------


class Trap:
    """Ends this process, as a kill from outside does, at the `number`-th call that counts; calls
    may come from any thread."""

    def __init__(self, number: int, armed: bool) -> None:
        self.left, self.armed = number, armed
        self._lock = threading.Lock()

    def arm(self) -> None:
        self.armed = True

    def count(self) -> None:
        with self._lock:
            self.left -= self.armed
            if self.armed and self.left == 0:
                os.kill(os.getpid(), signal.SIGKILL)


def nothing() -> None:
    pass


def wrap(
    function: str, before: Callable[[], None] = nothing, after: Callable[[], None] = nothing
) -> None:
    """Call `before` and `after` around every call of "module:name" or "module:Class.name"."""
    module_name, _, path = function.partition(":")
    *classes, name = path.split(".")
    module = importlib.import_module(module_name)
    owner: Any = functools.reduce(getattr, classes, module)
    original = getattr(owner, name)
    removes = original is shutil.rmtree

    @functools.wraps(original)
    def wrapped(*arguments: Any, **named: Any) -> Any:
        # A save also removes, to be sure, the folder that it has just renamed: that is no removal.
        if removes and not Path(arguments[0]).is_dir():
            return original(*arguments, **named)
        before()
        try:
            return original(*arguments, **named)
        finally:
            after()

    setattr(owner, name, wrapped)
    if inspect.isclass(owner):
        return
    for other in list(sys.modules.values()):  # `from safetensors.torch import save_file`
        if str(getattr(other, "__file__", None) or "").startswith(f"{ROOT}{os.sep}"):
            for alias, value in list(vars(other).items()):
                if value is original:
                    setattr(other, alias, wrapped)


def set_trap(aim: Aim) -> None:
    """Wrap what the aim names, so that this process ends there."""
    place = PLACES[aim.kind][aim.place]
    armed_by = ARMED_BY.get(aim.kind)
    trap = Trap(aim.number, armed=armed_by is None)
    if armed_by:
        wrap(armed_by, after=trap.arm)
    depth = 0 if place.inside else 1  # of calls of the outer function, in whichever thread

    def enter() -> None:
        nonlocal depth
        depth += 1

    def leave() -> None:
        nonlocal depth
        depth -= 1

    def count() -> None:
        if depth:
            trap.count()

    if place.inside:
        wrap(place.inside, enter, leave)
    wrap(place.function, **{place.moment: count})


def train_with_trap(aim: Aim, arguments: Sequence[str]) -> int:
    """What the child does: `train.py ARGUMENTS`, killed where the aim says."""
    import train  # here: the parent does not train

    set_trap(aim)
    return train.main(list(arguments))
