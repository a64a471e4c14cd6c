"""benchmarks/decode.py at a size of nothing: its figures are what the clocks say, its object has
what is promised, and every side is given the same model.

What is measured runs in this process here; as processes they would take most of a minute.
"""

import json
import math
import sys
from pathlib import Path

import numpy
import pytest
import torch

from benchmarks import decode, llama_cpp_side, torch_sides, turns
from benchmarks.bandwidth import read_all, read_bandwidth
from benchmarks.full_shape import phi_config
from benchmarks.measuring import Plan, measure, plan_of
from benchmarks.random_base import random_base
from benchmarks.turns import Measurement, Shape
from errors import PhiSightError
from exports.llama_cpp import language
from exports.llama_cpp.asked import find_llama
from model.decoder import LanguageModel
from model.families import PHI3
from ops.nf4 import bitsandbytes_form

SMALL = phi_config(2) | {
    "vocab_size": 96,
    "hidden_size": 192,
    "intermediate_size": 128,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "eos_token_id": 2,
    "pad_token_id": 2,
}
PLAN = Plan(threads=torch.get_num_threads(), contexts=(3, 5), decode_at=(3,), tokens=2,
            vocabulary=96)  # fmt: skip


def measured_here(module, asked, threads, python=""):
    """As `turns.in_a_process`."""
    if module == "benchmarks.bandwidth":
        return {"gb_per_second": read_bandwidth(threads, 1 << 16, 1)}
    facts = torch_sides.run(asked["side"], asked["base"], plan_of(asked["plan"]))
    return json.loads(json.dumps(facts))


def found_turn():
    """What a turn gave that read 5 tokens a second and decoded 8."""
    return {
        "prefill": {"10": 5.0}, "decode": {"10": 8.0}, "decoded": {"10": 4},
        "step_bytes": {"weights": 1_000_000, "a_token": 500},
    }  # fmt: skip


def test_the_quick_object_has_its_fields(monkeypatch, tmp_path):
    monkeypatch.setattr(turns, "in_a_process", measured_here)
    shape = Shape("full", "Phi-3.5-mini, random weights", SMALL, None)
    facts = json.loads(json.dumps(decode.measure_quickly(shape, PLAN, None, tmp_path)))
    assert facts["ratio_to_bitsandbytes"] > 0 and facts["prefill_ratio_to_bitsandbytes"] > 0
    assert facts["ratio_to_llama_cpp"] is None and facts["prefill_ratio_to_llama_cpp"] is None
    assert facts["llama_cpp"] == "not installed"
    assert (facts["layers"], facts["rows"], facts["threads"]) == (2, 1, PLAN.threads)
    assert facts["shape"] == "Phi-3.5-mini, random weights: 2 layers and the head"
    assert {"date", "processor", "cores", "memory_gb", "load"} <= set(facts["machine"])
    assert [one["side"] for one in facts["measurements"]] == ["ours", "transformers"]
    for one in facts["measurements"]:
        assert set(one["prefill_tokens_per_second"]) == {"3", "5"}
        assert set(one["decode_tokens_per_second"]) == {"3"}
        assert all(rate > 0 for rate in one["prefill_tokens_per_second"].values())
        assert one["share_of_read_bandwidth"]["3"] > 0 and one["resident_mb"] > 0
    decoded = [one["decode_tokens_per_second"]["3"] for one in facts["measurements"]]
    assert facts["ratio_to_bitsandbytes"] == pytest.approx(decoded[0] / decoded[1], rel=1e-2)
    assert "times bitsandbytes" in decode.quick_text(facts)
    turn = {**found_turn(), "resident_mb": 12.4, "processor_share": 0.99}
    found = Measurement(shape, "ours", Plan(contexts=(10,), decode_at=(10,)), [turn])
    assert turns.table([found], 0.1).splitlines()[-1].split() == [
        "ours", "5", "8", "/", "0.08", "12", "0.99"
    ]  # fmt: skip


def test_rates_are_what_the_clocks_say():
    """A reader of 10 tokens a second, and a decoder of a step in a quarter of one."""

    def answer(prompts, tokens, seconds):
        first = len(prompts) * len(prompts[0]) / 10
        return [0.0, first] + [first + (number + 1) / 4 for number in range(tokens)]

    plan = Plan(rows=2, contexts=(5, 50, 200), decode_at=(5, 200), tokens=3, limit=30.0)
    assert plan_of(plan.to_json()) == plan
    found = measure(answer, plan)
    assert found["prefill"] == {"5": 10.0, "50": 10.0, "200": None}, "400 tokens would take 40 s"
    assert found["decode"] == {"5": 8.0, "200": None}
    assert found["decoded"] == {"5": 3, "200": None}


def test_the_share_of_the_limit_is_bytes_by_bandwidth():
    shape, plan = Shape("full", "", SMALL, None), Plan(rows=2, contexts=(10,), decode_at=(10,))
    turn = found_turn()
    found = Measurement(shape, "ours", plan, [turn, turn | {"decode": {"10": 6.0}}, turn])
    assert found.median("decode", 10) == 8.0
    assert found.bytes_of_a_step(10) == 1_000_000 + 2 * 12 * 500
    assert found.share_of_limit(10, bandwidth=0.1) == pytest.approx(4 * 1_012_000 / 1e8)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_reading_reads_everything(threads):
    numbers = numpy.arange(-5, 1000, dtype=numpy.int64)
    total, seconds = read_all(numbers, threads)
    assert total == sum(range(-5, 1000)) and seconds > 0


def test_the_random_base_is_of_its_shape():
    base = random_base(SMALL, torch.float32)
    layer = base.model.model.layers[1].mlp.gate_up_proj
    assert tuple(bitsandbytes_form(layer)[1].shape) == (256, 192)
    with torch.no_grad():
        weight = layer(torch.eye(192)).T
    assert weight.shape == (256, 192)
    assert 0.01 < weight.std() < 0.05 and not torch.equal(weight[0], weight[1])
    four_bit = 2 * (4 * 192 * 192 + 3 * 192 * 128)
    norms, head = 5 * 192 * 4, 96 * 192 * 2  # the head as it is stored, in bfloat16
    expected = {"weights": four_bit // 2 + four_bit // 64 * 4 + norms + head,
                "a_token": 2 * 2 * 192 * 4}  # fmt: skip
    assert torch_sides.step_bytes(base) == expected


@pytest.mark.parametrize("tied", [False, True])
def test_llama_cpp_is_given_as_many_weights(tied):
    raw = SMALL | {"tie_word_embeddings": tied}
    with torch.device("meta"):
        ours = sum(p.numel() for p in LanguageModel(PHI3.decoder_config(raw)).parameters())
    shapes = language.shapes_of(PHI3.decoder_config(raw))
    theirs = {name: math.prod(shape) for name, shape in shapes.items()}
    factors = [theirs.pop(f"rope_factors_{kind}.weight") for kind in ("long", "short")]
    assert factors == [48, 48]
    assert sum(theirs.values()) == ours


def test_the_gguf_has_the_tensors_of_the_shape(tmp_path):
    gguf = pytest.importorskip("gguf", reason="gguf, which writes llama.cpp's files, is absent")
    path, again = tmp_path / "a.gguf", tmp_path / "b.gguf"
    config = SMALL | {"hidden_size": 256, "rope_scaling": None}
    written = PHI3.decoder_config(config)
    llama_cpp_side.write(path, written)
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    for name, shape in language.shapes_of(written).items():
        assert tuple(reversed(tensors[name].shape.tolist())) == shape
        kind = llama_cpp_side.kind_of(name, shape, 256)
        assert tensors.pop(name).tensor_type.name == kind
    assert not tensors
    head = next(t for t in gguf.GGUFReader(path).tensors if t.name == "output.weight")
    weights = gguf.quants.dequantize(head.data, head.tensor_type)
    assert weights.shape == (96, 256) and 0.005 < weights.std() < 0.05
    llama_cpp_side.requantise(path, again)  # has no Q4_1: the same file
    for one, other in zip(gguf.GGUFReader(path).tensors, gguf.GGUFReader(again).tensors):
        assert one.name == other.name and (one.data == other.data).all()
    bytes_ = llama_cpp_side.step_bytes(str(path))
    assert bytes_["a_token"] == 2 * 2 * 256 * 2


def test_what_cannot_be_measured_is_told(tmp_path, monkeypatch):
    shape = Shape("tiny", "", SMALL, Path("x"))
    with pytest.raises(PhiSightError, match="llama_cpp_q4_0: llama-cpp-python is not installed"):
        decode.find_sides(shape, None, ["llama_cpp_q4_0"])
    assert "llama_cpp_q4_0" not in decode.find_sides(shape, None, None)
    assert "llama_cpp_q4_0" in decode.find_sides(shape, sys.executable, None)
    with pytest.raises(PhiSightError, match="--llama-python .*: No such file"):
        find_llama(str(tmp_path / "none"))
    with pytest.raises(PhiSightError, match="benchmarks.nothing: ended with 1"):
        turns.in_a_process("benchmarks.nothing", {}, 1)
