"""Smaller models: 4 bits again, and pruned; their certificates."""

from __future__ import annotations

import json
from pathlib import Path

import bitsandbytes as bnb
import exporting
import pytest
import runs
import torch
from exporting import ANSWERS, draw, logits_of, text_ids
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
)

import export
import exports.llava
import exports.merge
import exports.prune
import exports.requantize
from assistant.assistant import Assistant
from errors import PhiSightError
from exports import calibrate, measure
from lora.layer import LoRALinear, secure_four_bit
from ops.nf4_grid import FourBit, round_to_nearest


@pytest.fixture(scope="module")
def assistant() -> Assistant:
    """A trained run whose adapter and projector do something. Tests only read it."""
    return runs.assistant()


@pytest.fixture(scope="module")
def probe(assistant) -> measure.Probe:
    return exporting.probe()


def bnb_weight(weight: torch.Tensor, block: int) -> torch.Tensor:
    """What bitsandbytes makes of a weight in NF4."""
    data, state = bnb.functional.quantize_4bit(weight, blocksize=block, quant_type="nf4")
    return bnb.functional.dequantize_4bit(data, state)


@pytest.mark.parametrize("block", [32, 64])
def test_naive_rounding_is_that_of_bitsandbytes(block):
    weight = draw(6, 2 * block, seed=block)
    ours = round_to_nearest(weight, block).weight()
    torch.testing.assert_close(ours, bnb_weight(weight, block), atol=1e-6, rtol=1e-6)


def test_without_correlations_there_is_nothing_to_compensate():
    weight = draw(6, 128)
    plain = round_to_nearest(weight, 64)
    same = exports.requantize.round_with_compensation(weight, torch.eye(128), 64)
    assert torch.equal(plain.codes, same.codes) and torch.equal(plain.scales, same.scales)


def test_compensation_takes_most_of_the_error_at_the_output():
    inputs = draw(500, 24, seed=1) @ draw(24, 128, seed=2) + draw(500, 128, seed=3) / 20
    weight, moment = draw(16, 128), inputs.T @ inputs
    errors = {}
    for name, made in (
        ("naive", round_to_nearest(weight, 64)),
        ("gptq", exports.requantize.round_with_compensation(weight, moment, 64)),
    ):
        errors[name] = (inputs @ (made.weight() - weight).T).norm()
        assert made.codes.max() < 16
    assert errors["gptq"] < errors["naive"] / 2


def test_packed_codes_are_what_bitsandbytes_multiplies_by():
    value = round_to_nearest(draw(6, 128), 64)
    tensors = exports.requantize.packed("x.weight", value, torch.float32)
    data = tensors.pop("x.weight")
    stats = {name.removeprefix("x.weight."): tensor for name, tensor in tensors.items()}
    parameter = bnb.nn.Params4bit.from_prequantized(data, stats, device="cpu")
    unpacked = bnb.functional.dequantize_4bit(parameter.data, parameter.quant_state)
    assert torch.equal(unpacked, value.weight())


@pytest.fixture(scope="module")
def requantized(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("requantized") / "model"
    assert (
        export.main(
            [
                "--requantize",
                f"--out={out}",
                f"--run={runs.finished_run()}",
                ANSWERS,
                "--calibration=6",
                "--max-loss-difference=9",
                "--min-greedy-equal=0",
                "--dtype=float32",
            ]
        )
        == 0
    )
    return out


def test_the_requantised_model_is_a_4_bit_phi3_of_transformers(requantized, assistant):
    theirs = AutoModelForCausalLM.from_pretrained(requantized, dtype=torch.float32)
    layers = [m for m in theirs.modules() if isinstance(m, bnb.nn.Linear4bit)]
    wrapped = [m for m in assistant.parts.base.model.modules() if isinstance(m, LoRALinear)]
    assert len(layers) == len(wrapped) and type(theirs.lm_head) is nn.Linear
    for layer in layers:
        secure_four_bit(layer)
    ours = exports.requantize.read_back(assistant, requantized).parts.base.model
    ids = text_ids(assistant)
    torch.testing.assert_close(logits_of(theirs, ids), logits_of(ours, ids), atol=1e-5, rtol=1e-5)
    assert not torch.equal(logits_of(ours, ids), logits_of(assistant.parts.base.model, ids))


def test_its_certificate_has_both_roundings(requantized, assistant, probe):
    found = json.loads((requantized / exports.requantize.CERTIFICATE).read_text())
    before = measure.measure(assistant, probe, "").loss
    written = exports.requantize.read_back(assistant, requantized)
    assert found["loss_before"] == before
    assert found["loss_after"] == pytest.approx(measure.measure(written, probe, "").loss, abs=1e-6)
    assert found["naive"]["loss_difference"] == found["naive"]["loss_after"] - before
    under = found["loss_difference"] < found["naive"]["loss_difference"] / 4
    assert found["under_a_quarter_of_naive"] is under
    assert found["calibration"]["conversations"] == 6
    assert "2210.17323" in found["method"]


@torch.no_grad()
def test_on_what_a_layer_sees_compensation_takes_most_of_the_error(assistant, probe):
    """Of a drawn weight: those of a run this short have not left the grid of their base."""
    merged = calibrate.merged_assistant(assistant)
    batches = calibrate.calibration_batches(assistant, probe, 8)
    name = "model.layers.0.self_attn.qkv_proj"
    moment = calibrate.input_moments(merged.model, [name], batches, 1)[name]
    assert torch.equal(moment, calibrate.input_moments(merged.model, [name], batches)[name])
    weight = draw(48, len(moment))

    def error(made: FourBit) -> float:
        change = made.weight() - weight
        return (change @ moment * change).sum().item()

    better = exports.requantize.round_with_compensation(weight, moment, 64)
    assert error(better) < error(round_to_nearest(weight, 64)) / 2


def test_calibration_takes_no_conversation_that_is_measured(assistant, probe):
    measured = {name for _, samples in probe.batches for s in samples for name in s.images}
    trained = {name for sample in probe.data.train for name in sample.images}
    assert measured and trained and not measured & trained
    with pytest.raises(PhiSightError, match="at least 1 conversation"):
        calibrate.calibration_batches(assistant, probe, 0)


# -- pruning ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("width", "share", "kept"),
    [
        (384, 0.1, 352),
        (8192, 0.1, 7360),
        (128, 0.5, 64),
        (64, 0.5, 32),
    ],
)
def test_widths_stay_multiples_of_a_quantisation_block(width, share, kept):
    assert exports.prune.kept_channels(width, share) == kept


@pytest.mark.parametrize("share", [0.0, 1.0, -0.1, float("nan"), 0.01, 0.999])
def test_a_share_that_keeps_all_or_nothing_is_refused(share):
    with pytest.raises(PhiSightError, match="--prune"):
        exports.prune.kept_channels(64, share)


def test_channels_that_do_nothing_go_first_and_are_not_missed(assistant, probe):
    merged = calibrate.merged_assistant(assistant)
    model = calibrate.language_model_in(merged)
    batches = calibrate.calibration_batches(assistant, probe, 4)
    width = model.config.intermediate_size
    dead = torch.randperm(width, generator=torch.Generator().manual_seed(0))[:32]
    for layer in model.model.layers:
        layer.mlp.down_proj.weight.data[:, dead] = 0
    effects = exports.prune.channel_effects(merged.model, batches)
    for effect in effects:
        assert (effect[dead] == 0).all() and (effect > 0).sum() == width - 32
    state = exports.prune.cut(model, merged.model, effects, width - 32, batches)
    narrow = Phi3Config.from_pretrained(runs.BASE, intermediate_size=width - 32)
    smaller = Phi3ForCausalLM(narrow)
    smaller.load_state_dict(state, strict=True)
    ids = text_ids(assistant)
    torch.testing.assert_close(logits_of(smaller, ids), logits_of(model, ids), atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_the_fit_of_what_is_left_is_nearer_than_leaving_it(assistant, probe):
    merged = calibrate.merged_assistant(assistant)
    model = calibrate.language_model_in(merged)
    batches = calibrate.calibration_batches(assistant, probe, 8)
    effects = exports.prune.channel_effects(merged.model, batches)
    kept = model.config.intermediate_size // 2
    state = exports.prune.cut(model, merged.model, effects, kept, batches)
    name = "model.layers.0.mlp.down_proj"
    moment = calibrate.input_moments(merged.model, [name], batches, 1)[name]
    weight, chosen = model.get_submodule(name).weight, effects[0].topk(kept).indices.sort().values

    def error(narrow: torch.Tensor) -> float:
        change = weight.clone()
        change[:, chosen] -= narrow
        return (change @ moment * change).sum().item()

    assert error(state[f"{name}.weight"]) < error(weight[:, chosen])


def test_the_pruned_folder_is_a_narrower_phi3_with_its_certificate(tmp_path, assistant):
    out, width = tmp_path / "out", assistant.parts.base.model.config.intermediate_size
    assert (
        export.main(
            [
                "--prune=0.25",
                f"--out={out}",
                f"--run={runs.finished_run()}",
                ANSWERS,
                "--calibration=4",
            ]
        )
        == 0
    )
    theirs = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    found = json.loads((out / exports.prune.CERTIFICATE).read_text())
    assert theirs.config.intermediate_size == found["channels"]["after"] < width
    assert found["weights"]["after"] == sum(p.numel() for p in theirs.parameters())
    assert logits_of(theirs, text_ids(assistant)).isfinite().all()
    assert found["tolerance"] is None and found["within_tolerance"]
    with pytest.raises(PhiSightError, match="prune: refused"):
        export.main(
            [
                "--prune=0.25",
                f"--out={tmp_path / 'no'}",
                f"--run={runs.finished_run()}",
                ANSWERS,
                "--calibration=4",
                "--max-loss-difference=0",
            ]
        )
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
