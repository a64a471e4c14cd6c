"""Trains with rows whose gradient is not what it should be: huge, or not finite.

    python poisoned.py POISON PLACE -- arguments of train.py

POISON is JSON: {"epoch/row": factor}. PLACE is "" or the "module:name" of a function, with a "!"
behind it for after the call: there the process kills itself, as a kill from outside does.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable, Mapping
from typing import Any

from errors import run_main
from lora.dropout import key_of
from training import alerts, step

SPIKE_AFTER = 3  # steps before the first judgement: tests do not make 20


def poisoned(poison: Mapping[str, float], seed: int = 0) -> Callable[..., Any]:
    """`step.add_gradients`, with the gradients of a step over such a row times its factor."""
    original = step.add_gradients
    keys = {key_of(seed, *map(int, place.split("/"))): f for place, f in poison.items()}

    def add_gradients(model: Any, scaler: Any, batches: Any, supervised: int) -> Any:
        loss = original(model, scaler, batches, supervised)
        for key in (key for batch in batches for key in batch.row_keys):
            for parameter in model.parameters() if key in keys else ():
                if parameter.grad is not None:
                    parameter.grad *= keys[key]
        return loss

    return add_gradients


def main() -> int:
    import train
    from tools.torture.kills import wrap

    poison, place, _, *arguments = sys.argv[1:]
    step.add_gradients = poisoned(json.loads(poison))
    alerts.SPIKE_AFTER = SPIKE_AFTER
    if place:

        def kill() -> None:
            os.kill(os.getpid(), signal.SIGKILL)

        moment = "after" if place.endswith("!") else "before"
        wrap(place.removesuffix("!"), **{moment: kill})
    return train.main(arguments)


if __name__ == "__main__":
    run_main(main)
