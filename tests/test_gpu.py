"""What only a GPU can show: exact resume over NF4 in 16 bits, and that the host does not wait.

No machine with a GPU has run these tests so far.
"""

from __future__ import annotations

import pytest
import runs
import torch

import checkpoints
import ops
import train
from ops.nf4_grid import round_to_nearest
from training.batches import BatchesAhead
from training.ranks import Ranks
from training.run import prepare_run
from training.step import add_gradients

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU on this machine")


@pytest.mark.parametrize("merge_rounding", ["none", "nf4"])
@pytest.mark.parametrize("compute_type", ["bfloat16", "float16"])
def test_a_resumed_run_is_the_same_to_the_bit_on_a_gpu(compute_type, merge_rounding, tmp_path):
    fields = runs.SHORT | {
        "device": "cuda",
        "compute_type": compute_type,
        "max_steps": 6,
        "save_steps": 2,
        "log_steps": 1,
        "gradient_checkpointing": "products",
        "merge_rounding": merge_rounding,
        "projector_dropout": 0.1,
        "lora_dropout": 0.0 if merge_rounding == "nf4" else 0.05,
    }
    runs.start(tmp_path / "whole", **fields)
    runs.start(tmp_path / "stopped", "--stop-at-step=3", **fields)
    runs.resume(tmp_path / "stopped")
    found = checkpoints.diff(tmp_path / "whole", tmp_path / "stopped")
    assert found.identical and found.parted is None, found
    assert checkpoints.resolve(tmp_path / "whole").config["device"] == "cuda"


def test_a_gpu_rounds_to_the_codes_and_scales_of_a_cpu():
    weight = torch.randn(64, 256, generator=torch.Generator().manual_seed(0))
    here, there = round_to_nearest(weight, 64), round_to_nearest(weight.cuda(), 64)
    assert torch.equal(here.codes, there.codes.cpu())
    assert torch.equal(here.scales, there.scales.cpu())


def test_without_determinism_the_run_says_what_is_lost(tmp_path, capsys):
    runs.start(tmp_path / "run", "--no-deterministic", **runs.SHORT | {"device": "cuda"})
    assert "a resumed run can differ in the last bits" in capsys.readouterr().out


@pytest.mark.parametrize("recompute", [True, False])
@pytest.mark.parametrize("compute_type", ["bfloat16", "float32"])
def test_the_window_never_waits_for_the_gpu(compute_type, recompute, tmp_path):
    fields = runs.SHORT | {
        "device": "cuda",
        "compute_type": compute_type,
        "gradient_checkpointing": recompute,
        "accumulation": 2,
        "max_steps": 3,
    }
    config, options = train.parse(runs.flags(tmp_path / "run", **fields))
    run = prepare_run(config, None, options, Ranks())
    with BatchesAhead(run) as ahead:
        for mode in ("default", "error"):  # the first window loads kernels and libraries
            torch.cuda.synchronize()
            torch.cuda.set_sync_debug_mode(mode)
            try:
                batches = ahead.take(run.next_rows())
                supervised = sum(batch.supervised_tokens for batch in batches)
                loss_sum = add_gradients(run.parts.model, run.scaler, batches, supervised)
            finally:
                torch.cuda.set_sync_debug_mode("default")
            assert loss_sum.device.type == "cuda" and loss_sum.item() > 0


@pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.get_device_capability() < (8, 0),
    reason="this GPU has no flash attention",
)
@pytest.mark.parametrize("kv_heads", [32, 8])
def test_the_backward_of_attention_is_the_same_to_the_bit(kv_heads):
    lengths, generator = [700, 1, 333, 990], torch.Generator("cuda").manual_seed(0)
    shapes = [(sum(lengths), heads, 96) for heads in (32, kv_heads, kv_heads)]
    qkv = [
        torch.randn(shape, dtype=torch.bfloat16, device="cuda", generator=generator)
        for shape in shapes
    ]
    was = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        found = []
        for target in (ops.cuda, ops.cuda, ops.cuda, ops.plain):
            own = [part.clone().requires_grad_() for part in qkv]
            target.packed_attention(*own, lengths).float().square().sum().backward()
            found.append([part.grad for part in own])
    finally:
        torch.use_deterministic_algorithms(was)
    for first, *others, plain in zip(*found, strict=True):
        assert all(torch.equal(first, other) for other in others)
        torch.testing.assert_close(first, plain, rtol=0.05, atol=0.05)
