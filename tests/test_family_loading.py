"""Bases whose files hold an own weight for each projection: fused as they are read."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import bitsandbytes as bnb
import pytest
import torch
from random_model import assert_near
from safetensors.torch import load_file, save_file
from test_base import VOCABULARY, edit_weights, load, logits, save_model
from test_base_cache import assert_same
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config, Qwen3Config

from errors import PhiSightError
from model.base import load_base
from model.base_tensors import EMBEDDING, HEAD
from model.families.fused import PARTS
from ops.nf4 import bitsandbytes_form

KINDS = {
    "llama": {"kind": LlamaConfig, "tie_word_embeddings": True},
    "qwen2": {"kind": Qwen2Config},
    "qwen3": {"kind": Qwen3Config, "tie_word_embeddings": True, "head_dim": 32},
}
ATTENTION = "model.layers.1.self_attn"


@pytest.fixture(scope="module", params=KINDS)
def saved(request, tmp_path_factory) -> Path:
    return save_model(tmp_path_factory.mktemp(request.param), **KINDS[request.param])


@pytest.fixture
def llama(tmp_path) -> Path:
    return save_model(tmp_path / "llama", **KINDS["llama"])


@pytest.fixture
def scattered(saved, tmp_path) -> Path:
    """In three files, so that the parts of every projection lie in different ones."""
    folder = shutil.copytree(saved, tmp_path / "scattered")
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors, key=lambda name: (name.rpartition("_proj")[2], name))
    places = {name: f"model-{1 + n % 3:05d}-of-00003.safetensors" for n, name in enumerate(names)}
    for file in sorted(set(places.values())):
        save_file({name: tensors[name] for name in names if places[name] == file}, folder / file)
    assert len({places[f"{ATTENTION}.{part}.weight"] for part in PARTS["qkv_proj"]}) > 1
    index = json.dumps({"weight_map": places})
    (folder / "model.safetensors.index.json").write_text(index, encoding="utf-8")
    return folder


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_parts_are_found_in_whatever_files_they_lie(saved, scattered, dtype):
    whole, apart = load(saved, dtype=dtype), load(scattered, dtype=dtype)
    assert_same(apart.model, whole.model)
    expected = AutoModelForCausalLM.from_pretrained(saved, dtype=dtype)
    with torch.no_grad():
        wanted = expected(torch.arange(24)[None]).logits[0]
    if dtype == torch.float32:
        assert_near(logits(apart.model), wanted)
    else:
        torch.testing.assert_close(logits(apart.model), wanted, rtol=0.05, atol=0.05 * wanted.std())


@pytest.mark.parametrize("quantization", ["nf4", "nf4-nested"])
def test_a_fused_weight_in_nf4_is_its_parts_in_nf4(saved, quantization):
    """To the bit, so that figures can be compared with those of bitsandbytes' users: blocks lie
    within rows. Nested scales are quantised 256 at a time, and so depend on what lies around."""
    stored = load_file(saved / "model.safetensors")
    model = load(saved, quantization).model
    for place, fused in ((ATTENTION, "qkv_proj"), ("model.layers.1.mlp", "gate_up_proj")):
        parts = [
            bnb.functional.quantize_4bit(
                stored[f"{place}.{part}.weight"], compress_statistics=False, quant_type="nf4"
            )
            for part in PARTS[fused]
        ]
        codes, state = bitsandbytes_form(model.get_submodule(f"{place}.{fused}"))
        assert torch.equal(codes, torch.cat([part for part, _ in parts]))
        scales = torch.cat([one.absmax for _, one in parts])
        if quantization == "nf4":
            assert torch.equal(state.absmax, scales)
        else:
            torch.testing.assert_close(state.absmax, scales, rtol=0.05, atol=1e-3)


@pytest.mark.parametrize("quantization", ["nf4", "nf4-nested"])
def test_a_kept_base_is_the_quantised_one_and_made_anew_when_damaged(
    scattered, tmp_path, quantization, capsys
):
    fresh = load(scattered, quantization).model

    def again() -> None:
        kept = load_base(
            scattered, None, torch.float32, "cpu", quantization, tmp_path / "cache"
        ).model
        assert_same(kept, fresh)
        assert torch.equal(logits(kept), logits(fresh))

    again()
    again()
    assert "damaged" not in capsys.readouterr().err
    (part,) = (tmp_path / "cache").glob("*/part-*.safetensors")
    content = bytearray(part.read_bytes())
    content[-1] ^= 1
    part.write_bytes(content)
    again()
    assert "the quantised base that was kept is damaged" in capsys.readouterr().err
    again()
    assert "damaged" not in capsys.readouterr().err


def test_a_head_that_is_stored_though_it_is_the_embedding_must_be_it(llama, tmp_path):
    expected = logits(load(llama).model)
    edit_weights(llama, lambda w: w.update({HEAD: w[EMBEDDING].clone()}))
    assert torch.equal(logits(load(llama).model), expected)
    edit_weights(llama, lambda w: w[HEAD][VOCABULARY - 1].mul_(2))
    for cache in ("", tmp_path / "cache"):
        with pytest.raises(PhiSightError) as caught:
            load_base(llama, None, torch.float32, "cpu", "nf4", cache)
        assert str(caught.value) == (
            f"{llama / 'model.safetensors'}: lm_head.weight is not model.embed_tokens.weight,"
            " though config.json ties the two; set tie_word_embeddings to false there if the model"
            " has a head of its own"
        )
    assert not list((tmp_path / "cache").glob("*/*.safetensors"))
    edit_weights(llama, lambda w: w.update({HEAD: torch.zeros(3, 64)}))
    with pytest.raises(PhiSightError, match=r"lm_head.weight has shape \(3, 64\), not \(100, 64\)"):
        load(llama)


def test_frequencies_in_old_files_are_passed_over(llama):
    """transformers computes them from config.json too."""
    expected = logits(load(llama).model)
    name = f"{ATTENTION}.rotary_emb.inv_freq"
    edit_weights(llama, lambda w: w.update({name: torch.ones(8)}))
    assert torch.equal(logits(load(llama).model), expected)


def test_a_part_that_is_missing_is_named_and_long_lists_are_cut(llama):
    edit_weights(llama, lambda w: w.pop(f"{ATTENTION}.k_proj.weight"))
    with pytest.raises(PhiSightError) as caught:
        load(llama)
    end = "; the weight files do not belong to this config.json, download both again"
    assert str(caught.value) == f"base model {llama}: missing {ATTENTION}.k_proj.weight{end}"
    edit_weights(llama, lambda w: [w.pop(name) for name in list(w) if "layers.0" in name])
    with pytest.raises(PhiSightError) as caught:
        load(llama)
    assert str(caught.value).endswith(f"layers.0.mlp.up_proj.weight, and 4 more{end}")
