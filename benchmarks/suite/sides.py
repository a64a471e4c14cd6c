"""One side of a measurement, as a process that waits for its turns.

python -m benchmarks.suite.sides '{"side": "training.ours", "folder": DIR, "threads": 1}'
"""

from __future__ import annotations

import importlib
from pathlib import Path

import threads  # noqa: F401 (before torch is loaded)

from benchmarks import measuring
from benchmarks.processes import take_turns
from benchmarks.suite.material import Material
from errors import run_main


def main() -> None:
    asked = measuring.argument()
    module, name = asked["side"].split(".")
    side = getattr(importlib.import_module(f"benchmarks.suite.{module}"), name)
    take_turns(side(Material(Path(asked["folder"]), asked["threads"])))


if __name__ == "__main__":
    run_main(main)
