"""What every part of the tiny preset is made with, and what it says about itself."""

from __future__ import annotations

import json
from pathlib import Path

import torch

SEED = 20260101


def write_report(out: Path, **facts: object) -> None:
    """`build_report.json` in the part's folder: what it was made with and what it measured."""
    facts |= {"seed": SEED, "torch": torch.__version__, "threads": torch.get_num_threads()}
    (out / "build_report.json").write_text(
        json.dumps(facts, indent=1), encoding="utf-8", newline="\n"
    )
    print(json.dumps(facts))
