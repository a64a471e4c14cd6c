"""Real weights, where the environment's PHISIGHT_REAL_WEIGHTS names a folder of them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

VARIABLE = "PHISIGHT_REAL_WEIGHTS"


def real_weights(name: str) -> Path:
    """The folder `name` there; a test that needs it is skipped, with the reason, without it."""
    folder = Path(os.environ.get(VARIABLE, "")) / name
    if not os.environ.get(VARIABLE) or not folder.is_dir():
        pytest.skip(f"{VARIABLE} names no folder that holds {name}")
    return folder
