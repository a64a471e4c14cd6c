"""LoRA adapters in PEFT's form, out and in: what PEFT computes, and what is refused."""

from __future__ import annotations

import json
import re
from pathlib import Path

import peft
import pytest
import runs
import torch
from exporting import BASE, VISION, draw, drawn_phi3, logits_of, text_ids
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
)

import checkpoints
import export
from assistant.assistant import Assistant
from config import default_config
from errors import PhiSightError
from exports import peft_adapter
from lora.inject import inject
from lora.merge import merged_state
from lora.state import lora_state
from model.base import load_base
from model.build import model_state
from model.phi3 import decoder_config


@pytest.fixture(scope="module")
def assistant() -> Assistant:
    """A trained run whose adapter and projector do something. Tests only read it."""
    return runs.assistant()


def as_llama(phi3: Phi3ForCausalLM) -> LlamaForCausalLM:
    """The same model with its projections apart."""
    names = (
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "rms_norm_eps",
        "num_attention_heads",
        "num_key_value_heads",
        "max_position_embeddings",
    )
    config = LlamaConfig(
        **{name: getattr(phi3.config, name) for name in names},
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    )
    rows, state = peft_adapter.part_sizes(decoder_config(phi3.config.to_dict())), {}
    for name, tensor in phi3.state_dict().items():
        kind = name.split(".")[-2]
        parts = peft_adapter.PARTS.get(kind, (kind,))
        pieces = tensor.split([rows[part] for part in parts]) if len(parts) > 1 else [tensor]
        state |= {name.replace(kind, part): piece for part, piece in zip(parts, pieces)}
    llama = LlamaForCausalLM(config).eval()
    llama.load_state_dict(state, strict=True)
    return llama


def peft_logits(base: nn.Module, folder: Path, ids: torch.Tensor) -> torch.Tensor:
    model = peft.PeftModel.from_pretrained(base, folder)
    assert any(
        parameter.abs().max() > 0
        for name, parameter in model.named_parameters()
        if "lora_B" in name
    )
    return logits_of(model, ids)


def dequantised_base(assistant: Assistant) -> Phi3ForCausalLM:
    """A plain model of the weights that the adapter was trained over."""
    base = load_base(runs.BASE, None, torch.float32, "cpu", assistant.config.quantization).model
    plain = Phi3ForCausalLM(Phi3Config.from_pretrained(runs.BASE)).eval()
    plain.load_state_dict(dict(merged_state(base)), strict=True)
    return plain


def test_peft_computes_the_same_over_the_dequantised_base(tmp_path, assistant):
    assert export.main([f"--peft={tmp_path / 'adapter'}", f"--run={runs.finished_run()}"]) == 0
    base, ids = dequantised_base(assistant), text_ids(assistant)
    bare = logits_of(base, ids)
    theirs = peft_logits(base, tmp_path / "adapter", ids)
    assert (bare - theirs).abs().max() > 1e-3  # the adapter does something
    ours = logits_of(assistant.parts.base.model, ids)
    torch.testing.assert_close(theirs, ours, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("split", [False, True])
def test_an_adapter_goes_out_and_comes_back_bit_for_bit(tmp_path, assistant, split):
    export.main(
        [
            f"--peft={tmp_path / 'adapter'}",
            f"--run={runs.finished_run()}",
            *(["--split"] if split else []),
        ]
    )
    adapter, out = tmp_path / "adapter", tmp_path / "run"
    export.main([f"--import-peft={adapter}", f"--out={out}", BASE, VISION])
    back = Assistant.load(tmp_path / "run")
    for stem, tensors in model_state(assistant.model).items():
        for name, tensor in model_state(back.model)[stem].items():
            assert torch.equal(tensor, tensors[name]), name
    assert back.config.lora_rank == assistant.config.lora_rank
    assert checkpoints.verify(checkpoints.resolve(tmp_path / "run").path) == []
    done = runs.command("train.py", "--resume", "--run", tmp_path / "run")
    assert done.returncode == 0 and "imported from" in done.stdout


@pytest.fixture(scope="module")
def small() -> tuple[Phi3ForCausalLM, LlamaForCausalLM]:
    """One model under two names, without an adapter."""
    phi3 = drawn_phi3()
    llama = as_llama(phi3)
    ids = torch.arange(20)[None]
    torch.testing.assert_close(logits_of(llama, ids), logits_of(phi3, ids), atol=1e-5, rtol=1e-5)
    return phi3, llama


def test_a_split_adapter_does_in_llama_what_the_fused_one_does_in_phi3(tmp_path, small):
    ours, ids = drawn_phi3(), torch.arange(20)[None]
    bare = logits_of(ours, ids)
    layers = inject(
        ours.requires_grad_(False),
        peft_adapter.PLACES,
        4,
        6.0,
        0.0,
        torch.Generator().manual_seed(1),
    )
    for number, layer in enumerate(layers.values()):
        layer.lora_B.data.copy_(draw(*layer.lora_B.shape, seed=number))
    expected = logits_of(ours, ids)
    assert (expected - bare).abs().max() > 1e-2
    rows = peft_adapter.part_sizes(decoder_config(ours.config.to_dict()))
    peft_adapter.write_peft(tmp_path, lora_state(ours), rows, default_config("tiny"))
    names = {name.split(".")[-3] for name in load_file(tmp_path / peft_adapter.WEIGHTS)}
    assert names == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    theirs = peft_logits(as_llama(drawn_phi3()), tmp_path, ids)
    torch.testing.assert_close(theirs, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "targets",
    [
        ["q_proj", "v_proj"],
        ["k_proj", "up_proj", "down_proj"],
        ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    ],
)
def test_an_adapter_that_peft_trained_on_llama_names_becomes_a_fused_one(tmp_path, small, targets):
    ids = torch.arange(20)[None]
    settings = peft.LoraConfig(r=4, lora_alpha=6, target_modules=targets, task_type="CAUSAL_LM")
    torch.manual_seed(3)
    theirs = peft.get_peft_model(as_llama(small[0]), settings)
    for name, parameter in theirs.named_parameters():
        if "lora_" in name:  # each part has an A of its own
            nn.init.normal_(parameter, std=0.1)
    theirs.save_pretrained(tmp_path)
    found = peft_adapter.read_peft_config(tmp_path)
    state, fused, rank = peft_adapter.lora_from_peft(
        tmp_path,
        load_file(tmp_path / peft_adapter.WEIGHTS),
        decoder_config(small[0].config.to_dict()),
        found["r"],
        found["lora_alpha"] / found["r"],
    )
    ours = drawn_phi3()
    layers = inject(ours.requires_grad_(False), fused, rank, 1.5 * rank, 0.0, torch.Generator())
    for name, layer in layers.items():
        layer.lora_A.data.copy_(state[f"{name}.lora_A"])
        layer.lora_B.data.copy_(state[f"{name}.lora_B"])
        assert torch.equal(layer.scaling, state[f"{name}.scaling"])
    assert state.keys() == lora_state(ours).keys()
    expected = logits_of(theirs, ids)
    assert (expected - logits_of(small[1], ids)).abs().max() > 1e-2
    torch.testing.assert_close(logits_of(ours, ids), expected, atol=1e-5, rtol=1e-5)


@given(
    st.sets(st.sampled_from(["q_proj", "k_proj", "v_proj"]), min_size=1),
    st.booleans(),
    st.integers(1, 3),
)
def test_fused_parts_have_the_product_of_each(present, shared, rank):
    rows = {"q_proj": 5, "k_proj": 2, "v_proj": 3}
    pairs = {
        part: {
            "A": draw(rank, 7, seed=0 if shared else place + 1),
            "B": draw(rows[part], rank, seed=place + 9),
        }
        for place, part in enumerate(rows)
        if part in present
    }
    down, up = peft_adapter.fuse(pairs, "qkv_proj", rows)
    wanted = torch.cat(
        [pairs[p]["B"] @ pairs[p]["A"] if p in pairs else torch.zeros(rows[p], 7) for p in rows]
    )
    torch.testing.assert_close(up @ down, wanted, atol=1e-6, rtol=1e-6)
    assert len(down) == (rank if shared else rank * len(pairs))


@pytest.fixture
def adapter(tmp_path, assistant) -> Path:
    export.main([f"--peft={tmp_path / 'adapter'}", f"--run={runs.finished_run()}"])
    return tmp_path / "adapter"


def change_tensors(path: Path, change) -> None:
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def first(tensors: dict, ending: str) -> str:
    return next(name for name in sorted(tensors) if name.endswith(ending))


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("use_dora", True, "use_dora True: not plain LoRA"),
        ("peft_type", "IA3", "peft_type 'IA3'"),
        ("rank_pattern", {"o_proj": 2}, "rank_pattern"),
        ("use_rslora", True, "use_rslora"),
        ("modules_to_save", ["lm_head"], "modules_to_save"),
        ("bias", "all", "bias 'all'"),
        ("init_lora_weights", "pissa", "init_lora_weights 'pissa'"),
        ("r", True, "make no adapter"),
        ("something_new", {"a": 1}, "something_new"),
        ("lora_alpha", "16", "make no adapter"),
        ("lora_alpha", 10**400, "make no adapter"),
        ("lora_dropout", 1.5, "make no adapter"),
        ("r", 7, r"not a float tensor of 7x"),
    ],
)
def test_an_adapter_that_does_more_than_lora_is_refused(adapter, tmp_path, field, value, message):
    path = adapter / peft_adapter.CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | {field: value}))
    with pytest.raises(PhiSightError, match=message):
        export.main([f"--import-peft={adapter}", f"--out={tmp_path / 'run'}", BASE, VISION])
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda t: t.pop(first(t, "lora_B.weight")), "lacks its A or B"),
        (
            lambda t: t.update({"base_model.model.lm_head.lora_A.weight": torch.zeros(1, 1)}),
            "belongs to no layer",
        ),
        (
            lambda t: t.update(
                {first(t, "A.weight").replace("layers.0", "layers.99"): torch.zeros(1)}
            ),
            "layers.99.* belongs to no layer",
        ),
        (lambda t: t[first(t, "A.weight")].fill_(float("nan")), "not finite"),
        (lambda t: t.update({first(t, "A.weight"): torch.zeros(2, 2)}), "not a float tensor of"),
        (lambda t: t.update({first(t, "A.weight"): torch.zeros(8, 8, dtype=torch.int8)}), "int8"),
        (lambda t: t.clear() or t.update(x=torch.zeros(1)), "x belongs to no layer"),
    ],
)
def test_tensors_that_are_no_adapter_of_this_base_are_refused(adapter, tmp_path, damage, message):
    change_tensors(adapter / peft_adapter.WEIGHTS, damage)
    with pytest.raises(PhiSightError, match=message):
        export.main([f"--import-peft={adapter}", f"--out={tmp_path / 'run'}", BASE, VISION])
    assert not (tmp_path / "run").exists()


VLM_PREFIXES = (
    "base_model.model.language_model.model.",  # LLaVA until transformers 4.51
    "base_model.model.model.language_model.",  # and since
    "base_model.model.model.language_model.model.",
    "base_model.model.llm.model.",
    "model.",  # saved by hand
)


@pytest.mark.parametrize("prefix", VLM_PREFIXES)
def test_an_adapter_of_a_language_model_within_another_is_read(adapter, tmp_path, prefix):
    def rename(tensors: dict) -> None:
        for name in list(tensors):
            renamed = name.replace("base_model.model.model.", prefix)
            tensors[renamed.replace(".weight", ".default.weight")] = tensors.pop(name)

    import_peft(adapter, tmp_path / "plain")
    change_tensors(adapter / peft_adapter.WEIGHTS, rename)
    import_peft(adapter, tmp_path / "nested")
    plain, nested = (checkpoints.resolve(tmp_path / name) for name in ("plain", "nested"))
    assert plain.state["lora_weights"].keys() == nested.state["lora_weights"].keys()
    assert checkpoints.weights_digest(plain.state) == checkpoints.weights_digest(nested.state)


def import_peft(adapter: Path, out: Path) -> None:
    export.main([f"--import-peft={adapter}", f"--out={out}", BASE, VISION])


FIRST = "base_model.model.model.layers.0.self_attn.o_proj.lora_A.weight"


@pytest.mark.parametrize(
    ("key", "reason"),
    [
        ("base_model.model.model.embed_tokens.weight", "of the embedding or the head.*merge"),
        ("base_model.model.model.embed_tokens.lora_embedding_A", "of the embedding.*merge"),
        ("base_model.model.language_model.lm_head.lora_A.weight", "of the embedding.*merge"),
        (
            "base_model.model.vision_tower.vision_model.encoder.layers.0.self_attn.q_proj.lora_A"
            ".weight",
            "of the picture encoder.*train the adapter again",
        ),
        ("base_model.model.model.multi_modal_projector.linear_1.weight", "is of a projector"),
        (FIRST.replace("lora_A.weight", "lora_magnitude_vector"), "is of DoRA.*merge"),
        (FIRST.replace("o_proj", "Wqkv"), "its layers have qkv_proj, .*of a model with these"),
        (FIRST.replace("layers.0", "layers.77"), r"the base has \d+.*--base"),
        (FIRST.replace("model.model.model.", "model.language_model.model."), "is there twice"),
    ],
)
def test_a_tensor_that_is_not_read_is_refused_with_its_true_reason(adapter, tmp_path, key, reason):
    def add(tensors: dict) -> None:
        tensors[key] = tensors[FIRST].clone()

    change_tensors(adapter / peft_adapter.WEIGHTS, add)
    with pytest.raises(PhiSightError, match=reason) as error:
        import_peft(adapter, tmp_path / "out" / "run")
    assert ("right base" in str(error.value)) == ("layers.77" in key)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (peft_adapter.WEIGHTS, b"\xff" * 64, "not readable"),
        (peft_adapter.CONFIG, b"{", "download"),
        (peft_adapter.CONFIG, None, "missing"),
        (peft_adapter.WEIGHTS, None, "not readable"),
        (peft_adapter.PROJECTOR, None, "pictures mean nothing"),
        (peft_adapter.PROJECTOR, b"", "not readable"),
    ],
)
def test_files_that_are_damaged_or_missing_are_named(adapter, tmp_path, name, content, message):
    (adapter / name).unlink()
    if content is not None:
        (adapter / name).write_bytes(content)
    with pytest.raises(PhiSightError, match=f"{re.escape(name)}.*{message}"):
        export.main([f"--import-peft={adapter}", f"--out={tmp_path / 'run'}", BASE, VISION])


def test_an_imported_run_is_what_was_typed(adapter, tmp_path):
    """The base is kept quantised where --base-cache says, and pictures are read as typed."""
    cache, out = tmp_path / "bases", tmp_path / "run"
    typed = [f"--base-cache={cache}", "--vision-features=pooled", "--feature-storage=int8"]
    export.main([f"--import-peft={adapter}", f"--out={out}", BASE, VISION, *typed])
    config = Assistant.load(out).config
    assert config.base_cache == str(cache)
    assert (config.vision_features, config.feature_storage) == ("pooled", "int8")
    assert [path for path in cache.rglob("*.safetensors")]
