"""What all sides of the suite work on: a small picture world, a run after one step, its export.

python -m benchmarks.suite.material '{"folder": DIR, "threads": 1}'
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import config as configs
from benchmarks import measuring
from benchmarks.processes import ROOT, command
from errors import run_main

PICTURES, HELD_OUT = 600, 20
RUN, EXPORT = NEEDS = ("run", "export")  # the export is the run's
STEPS = 60  # of the run, which stands after the first of them


@dataclass(frozen=True)
class Material:
    """Where it lies, and the threads that every side computes on."""

    folder: Path
    threads: int

    @property
    def world(self) -> Path:
        return self.folder / "world"

    @property
    def questions(self) -> Path:
        """About held-out pictures."""
        return self.world / "held_out.jsonl"

    @property
    def run(self) -> Path:
        """A run of the tiny preset that stopped after its first step."""
        return self.folder / "run"

    @property
    def llava(self) -> Path:
        """The same weights as transformers loads them, in float32."""
        return self.folder / "llava"

    def fields(self, run: Path) -> dict[str, Any]:
        """The tiny preset's fields on this world, for a run in this folder."""
        from data.world import world_fields

        return {
            "base": str(ROOT / "assets/tiny/phi3"),
            "vision": str(ROOT / "assets/tiny/clip"),
            **world_fields(self.world),
            "features": str(self.folder / "features"),
            "run": str(run),
            "device": "cpu",
            "threads": self.threads,
            "evaluate_steps": 0,
        }

    def config(self, run: Path, **fields: Any) -> configs.Config:
        """The tiny preset on this world, with some fields replaced."""
        return configs.replace(configs.default_config("tiny"), **(self.fields(run) | fields))

    def make(self, needs: Sequence[str]) -> None:
        """Write the world, and what of `NEEDS` is needed, by the commands that a person types."""
        from data.world import write_world

        write_world(self.world, pictures=PICTURES, held_out=HELD_OUT)
        if not needs:
            return
        given = self.fields(self.run) | {"max_steps": STEPS, "stop_at_step": 1}
        flags = [f"--{name.replace('_', '-')}={value}" for name, value in given.items()]
        command("train.py", "--preset", "tiny", *flags, threads=self.threads)
        if EXPORT not in needs:
            return
        export = ("export.py", "--llava", self.llava, "--run", self.run)
        command(*export, "--greedy-answers", 8, threads=self.threads)


def main() -> None:
    asked = measuring.argument()
    Material(Path(asked["folder"]), asked["threads"]).make(asked["needs"])
    measuring.report({})


if __name__ == "__main__":
    run_main(main)
