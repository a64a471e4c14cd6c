"""What a short training learns: the same every time on one kind of machine."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import train
from benchmarks.processes import Turn
from benchmarks.suite.material import Material
from training.options import RunOptions

STEPS, CONVERSATIONS = 150, 400


def ours(material: Material) -> Turn:
    """A training of the tiny preset, with its own evaluation at the end."""

    def turn() -> dict[str, float]:
        with tempfile.TemporaryDirectory() as name:
            config = material.config(
                Path(name) / "run",
                max_steps=STEPS,
                save_steps=STEPS,
                evaluate_steps=STEPS,
                evaluation_conversations=CONVERSATIONS,
                validation_fraction=0.2,
            )
            train.train(config, None, RunOptions(overwrite=True))
            log = (Path(config.run) / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        last = [record for line in log if (record := json.loads(line))["kind"] == "evaluation"][-1]
        return {"exact": last["alignment"]["right"], "validation_loss": last["validation_loss"]}

    return turn


def whole(material: Material) -> Turn:
    """Every answer right, and a loss that is not compared."""
    return lambda: {"exact": 100.0}
