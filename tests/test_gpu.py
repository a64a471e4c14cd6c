"""What only a GPU can show: exact resume in bfloat16 over NF4."""

from __future__ import annotations

import pytest
import runs
import torch

import checkpoints

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU on this machine")


@pytest.mark.parametrize("compute_type", ["bfloat16", "float16"])
def test_a_resumed_run_is_the_same_to_the_bit_on_a_gpu(compute_type, tmp_path):
    fields = runs.SHORT | {
        "device": "cuda",
        "compute_type": compute_type,
        "max_steps": 6,
        "save_steps": 2,
        "log_steps": 1,
        "gradient_checkpointing": "products",
    }
    runs.start(tmp_path / "whole", **fields)
    runs.start(tmp_path / "stopped", "--stop-at-step=3", **fields)
    runs.resume(tmp_path / "stopped")
    found = checkpoints.diff(tmp_path / "whole", tmp_path / "stopped")
    assert found.identical and found.parted is None, found
    assert checkpoints.resolve(tmp_path / "whole").config["device"] == "cuda"


def test_without_determinism_the_run_says_what_is_lost(tmp_path, capsys):
    runs.start(tmp_path / "run", "--no-deterministic", **runs.SHORT | {"device": "cuda"})
    assert "a resumed run can differ in the last bits" in capsys.readouterr().out
