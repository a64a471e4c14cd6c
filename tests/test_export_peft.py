"""LoRA adapters in PEFT's form, out and in: what PEFT computes, and what is refused."""

from __future__ import annotations

import json
import re
from pathlib import Path

import peft
import pytest
import random_model
import runs
import torch
from exporting import BASE, VISION, draw, drawn_phi3, logits_of, text_ids
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    Phi3Config,
    Phi3ForCausalLM,
    PreTrainedConfig,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
)

import checkpoints
import export
from assistant.assistant import Assistant
from config import default_config
from errors import PhiSightError
from exports import peft_adapter, peft_config, peft_import
from lora.inject import inject
from lora.merge import merged_state
from lora.state import load_lora_state, lora_state
from model.base import language_model, load_base
from model.build import model_state
from model.decoder import DecoderConfig, LanguageModel
from model.families import FAMILIES, PHI3
from model.families.fused import PARTS, fused_parts, part_sizes


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
    rows, state = part_sizes(PHI3.decoder_config(phi3.config.to_dict())), {}
    for name, tensor in phi3.state_dict().items():
        kind = name.split(".")[-2]
        parts = PARTS.get(kind, (kind,))
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
        peft_import.PLACES,
        4,
        6.0,
        0.0,
        torch.Generator().manual_seed(1),
    )
    for number, layer in enumerate(layers.values()):
        layer.lora_B.data.copy_(draw(*layer.lora_B.shape, seed=number))
    expected = logits_of(ours, ids)
    assert (expected - bare).abs().max() > 1e-2
    decoder = PHI3.decoder_config(ours.config.to_dict())
    peft_adapter.write_peft(tmp_path, lora_state(ours), decoder, True, default_config("tiny"))
    names = {name.split(".")[-3] for name in load_file(tmp_path / peft_config.WEIGHTS)}
    assert names == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    theirs = peft_logits(as_llama(drawn_phi3()), tmp_path, ids)
    torch.testing.assert_close(theirs, expected, atol=1e-5, rtol=1e-5)


EVERY = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def trained_by_peft(model: nn.Module, folder: Path, **settings: object) -> peft.PeftModel:
    """An adapter over `model`, as PEFT trained and saved it: each layer has an A of its own."""
    config = peft.LoraConfig(**{"r": 4, "lora_alpha": 6, "task_type": "CAUSAL_LM"} | settings)
    torch.manual_seed(3)
    made = peft.get_peft_model(model, config)
    for name, parameter in made.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.1)
    made.save_pretrained(folder)
    return made


def taken_over(folder: Path, base: DecoderConfig) -> peft_import.Imported:
    tensors = load_file(folder / peft_config.WEIGHTS)
    settings = peft_config.read_peft_config(folder)
    return peft_import.lora_from_peft(folder, tensors, base, settings)


def with_adapter(model: LanguageModel, found: peft_import.Imported) -> LanguageModel:
    parts = fused_parts(model.config)
    inject(model, found.targets, found.rank, found.alpha, 0.0, torch.Generator(), fused=parts)
    load_lora_state(model, found.state)
    return model


@pytest.mark.parametrize(
    ("targets", "ours"),
    [
        (["q_proj", "v_proj"], ("q_proj", "v_proj")),
        (["k_proj", "up_proj", "down_proj"], ("k_proj", "up_proj", "down_proj")),
        (EVERY, tuple(EVERY)),
    ],
)
def test_an_adapter_that_peft_trained_on_llama_names_has_separate_targets(
    tmp_path, small, targets, ours
):
    ids = torch.arange(20)[None]
    theirs = trained_by_peft(as_llama(small[0]), tmp_path, target_modules=targets)
    model = random_model.ours_of(drawn_phi3())
    found = taken_over(tmp_path, model.config)
    assert set(found.targets) == set(ours) and (found.rank, found.alpha) == (4, 6)
    saved = load_file(tmp_path / peft_config.WEIGHTS)
    assert sorted(map(total, saved.values())) == sorted(
        total(tensor) for name, tensor in found.state.items() if "lora_" in name
    )
    expected = logits_of(theirs, ids)
    assert (expected - logits_of(small[1], ids)).abs().max() > 1e-2
    torch.testing.assert_close(
        logits_of(with_adapter(model, found), ids), expected, atol=1e-5, rtol=1e-5
    )


def total(tensor: torch.Tensor) -> float:
    return tensor.double().sum().item()


@pytest.mark.parametrize(
    ("settings", "rank"),
    [
        ({"use_rslora": True}, 4),
        ({"rank_pattern": {"q_proj": 8}, "alpha_pattern": {"q_proj": 12}}, 8),  # of one scale
        ({"rank_pattern": {"layers.1.mlp.up_proj": 2, "o_proj": 1}}, 4),  # of 2 and 4 times it
        ({"alpha_pattern": {"layers.0.self_attn.v_proj": 24}, "use_rslora": True}, 4),
        ({"layers_to_transform": [1]}, 4),
    ],
)
def test_what_peft_writes_for_ranks_and_scales_is_computed_as_there(
    tmp_path, small, settings, rank
):
    ids = torch.arange(20)[None]
    theirs = trained_by_peft(as_llama(small[0]), tmp_path, target_modules=EVERY, **settings)
    model = random_model.ours_of(drawn_phi3())
    found = taken_over(tmp_path, model.config)
    assert found.rank == rank
    expected, got = logits_of(theirs, ids), logits_of(with_adapter(model, found), ids)
    assert (expected - logits_of(small[1], ids)).abs().max() > 1e-2
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


def test_scales_that_would_round_are_refused(tmp_path, small):
    trained_by_peft(as_llama(small[0]), tmp_path, target_modules=EVERY, rank_pattern={"v_proj": 3})
    message = (
        "adapter_config.json: B A is scaled by 2 in v_proj of layer 0 and by 1.5 elsewhere; a run"
        " has one scale, and B cannot take up the difference to the bit; merge it with PEFT and use"
        " the result as base"
    )
    with pytest.raises(PhiSightError, match=message):
        taken_over(tmp_path, random_model.ours_of(small[0]).config)


def test_a_layer_that_is_whole_goes_in_by_part_where_another_is_in_parts(tmp_path, small):
    """Phi-3's names in one layer and Llama's in the other: B of the whole one is cut by rows."""
    trained_by_peft(as_llama(small[0]), tmp_path, target_modules=["q_proj", "k_proj", "v_proj"])
    path, base = tmp_path / peft_config.WEIGHTS, random_model.ours_of(small[0]).config
    before = taken_over(tmp_path, base).state

    def join_the_first(tensors: dict) -> None:
        place = "base_model.model.model.layers.0.self_attn."
        ups = [tensors.pop(f"{place}{part}.lora_B.weight") for part in PARTS["qkv_proj"]]
        downs = [tensors.pop(f"{place}{part}.lora_A.weight") for part in PARTS["qkv_proj"]]
        tensors[f"{place}qkv_proj.lora_B.weight"] = torch.cat(ups)
        tensors[f"{place}qkv_proj.lora_A.weight"] = downs[0]

    change_tensors(path, join_the_first)
    found = taken_over(tmp_path, base)
    assert found.targets == PARTS["qkv_proj"]
    place = "model.layers.0.self_attn.qkv_proj"
    for part in PARTS["qkv_proj"]:
        assert torch.equal(found.state[f"{place}.{part}.lora_B"], before[f"{place}.{part}.lora_B"])
        assert torch.equal(found.state[f"{place}.{part}.lora_A"], before[f"{place}.q_proj.lora_A"])


# -- adapters of models that see ------------------------------------------------------------------

TEXT = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}
SEEING = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "image_size": 28,
          "num_attention_heads": 2, "patch_size": 14, "projection_dim": 32}  # fmt: skip
IN_TEXT = r".*language_model.*\.(q_proj|v_proj|o_proj|up_proj|qkv_proj|down_proj)"


def llava_over(text: PreTrainedConfig) -> nn.Module:
    return LlavaForConditionalGeneration(
        LlavaConfig(vision_config=CLIPVisionConfig(**SEEING), text_config=text, image_token_id=95)
    )


def qwen2_vl() -> nn.Module:
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}
    vision = {"depth": 1, "embed_dim": 32, "hidden_size": 64, "num_heads": 2, "patch_size": 14}
    return Qwen2VLForConditionalGeneration(
        Qwen2VLConfig(text_config=TEXT | {"rope_parameters": rope}, vision_config=vision)
    )


SEEING_MODELS = {
    "LLaVA over Phi-3": (lambda: llava_over(Phi3Config(**TEXT)), "phi3"),
    "LLaVA over Llama": (lambda: llava_over(LlamaConfig(**TEXT)), "llama"),
    "Qwen2-VL": (qwen2_vl, "qwen2"),
}


@pytest.mark.parametrize("name", SEEING_MODELS)
def test_an_adapter_of_the_language_model_within_a_seeing_one_is_taken_over(tmp_path, name):
    """Trained and saved by PEFT over the whole model; the text's logits are those of the whole."""
    make, family = SEEING_MODELS[name]
    torch.manual_seed(0)
    hub, ids = make().eval(), torch.arange(3, 23)[None]
    for parameter in hub.parameters():
        nn.init.normal_(parameter, std=0.2)
    language = {f"model.{n}": t.clone() for n, t in hub.model.language_model.state_dict().items()}
    language["lm_head.weight"] = hub.lm_head.weight.detach().clone()
    decoder = FAMILIES[family].decoder_config(hub.config.get_text_config().to_dict())
    weights = FAMILIES[family].from_stored(language, decoder)
    model = language_model(decoder, weights.items())
    bare = logits_of(hub, ids)
    torch.testing.assert_close(logits_of(model, ids), bare, atol=2e-5, rtol=1e-5)
    theirs = trained_by_peft(hub, tmp_path, target_modules=IN_TEXT, task_type=None)
    expected = logits_of(theirs, ids)
    found = taken_over(tmp_path, decoder)
    assert any("language_model" in key for key in load_file(tmp_path / peft_config.WEIGHTS))
    assert (expected - bare).abs().max() > 1e-2
    got = logits_of(with_adapter(model, found), ids)
    torch.testing.assert_close(got, expected, atol=2e-5, rtol=1e-5)


# -- a run of separate targets goes out -----------------------------------------------------------


@pytest.fixture(scope="module")
def separate(tmp_path_factory) -> Path:
    """A run with adapters of its own for some parts, rank-stabilised. Tests only read it."""
    run = tmp_path_factory.mktemp("separate") / "run"
    fields = {"lora_targets": "q_proj,v_proj,o_proj", "rank_stabilized": "true", "lora_rank": 4}
    runs.start(run, **runs.SHORT | fields)
    return run


def test_separate_targets_go_out_put_together_for_a_base_that_has_the_whole_alone(
    tmp_path, separate
):
    """transformers' Phi-3 has no q_proj for PEFT to adapt; the ranks differ by layer then."""
    assert export.main([f"--peft={tmp_path / 'adapter'}", f"--run={separate}"]) == 0
    assistant = Assistant.load(separate)
    settings = json.loads((tmp_path / "adapter" / peft_config.CONFIG).read_text())
    assert settings["target_modules"] == ["o_proj", "qkv_proj"] and settings["use_rslora"] is True
    assert settings["r"] == 4 and settings["rank_pattern"] == {"qkv_proj": 8}
    base, ids = dequantised_base(assistant), text_ids(assistant)
    bare = logits_of(base, ids)
    theirs = peft_logits(base, tmp_path / "adapter", ids)
    assert (bare - theirs).abs().max() > 1e-5
    ours = logits_of(assistant.parts.base.model, ids)
    torch.testing.assert_close(theirs, ours, atol=1e-5, rtol=1e-5)
    import_peft(tmp_path / "adapter", tmp_path / "run")
    back = Assistant.load(tmp_path / "run")
    again = logits_of(back.parts.base.model, ids)
    torch.testing.assert_close(again, ours, atol=1e-5, rtol=1e-5)


def test_separate_targets_go_out_as_they_are_and_come_back_bit_for_bit(tmp_path, separate):
    adapter = tmp_path / "adapter"
    assert export.main([f"--peft={adapter}", "--split", f"--run={separate}"]) == 0
    settings = json.loads((adapter / peft_config.CONFIG).read_text())
    assert settings["target_modules"] == ["o_proj", "q_proj", "v_proj"]
    assert not settings["rank_pattern"] and settings["lora_alpha"] == 16
    import_peft(adapter, tmp_path / "run")
    source, back = checkpoints.resolve(separate), checkpoints.resolve(tmp_path / "run")
    assert back.state["lora_weights"].keys() == source.state["lora_weights"].keys()
    for name, tensor in source.state["lora_weights"].items():
        assert torch.equal(back.state["lora_weights"][name], tensor), name
    config = Assistant.load(tmp_path / "run").config
    assert config.rank_stabilized and config.lora_alpha == 16 and config.lora_rank == 4
    assert set(config.lora_targets) == {"q_proj", "v_proj", "o_proj"}


# -- what is refused ------------------------------------------------------------------------------


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
        ("rank_pattern", {"o_proj": 2}, "not a float tensor of 2x"),
        ("rank_pattern", {"(a+)+": 2}, "rank_pattern .* make no adapter"),
        ("rank_pattern", {"o_proj": 0}, "rank_pattern .* make no adapter"),
        ("alpha_pattern", {"o_proj": 7.0}, "in o_proj of layer 0 and by .*merge it with PEFT"),
        ("alpha_pattern", ["o_proj"], "alpha_pattern .* make no adapter"),
        ("use_rslora", "yes", "use_rslora 'yes', .* make no adapter"),
        (
            "target_modules",
            ["c_attn", "transformer.h.0.attn.c_proj"],
            r"adapts c_attn, c_proj, which the base .*phi3 \(Phi-3\) has not \(it has qkv_proj,"
            r" .*up_proj\): an adapter of another family, and adapter_config.json names '.*' as its"
            " base; give one that was trained over this base",
        ),
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
    path = adapter / peft_config.CONFIG
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
    change_tensors(adapter / peft_config.WEIGHTS, damage)
    with pytest.raises(PhiSightError, match=message):
        export.main([f"--import-peft={adapter}", f"--out={tmp_path / 'run'}", BASE, VISION])
    assert not (tmp_path / "run").exists()


VLM_PREFIXES = (
    "base_model.model.language_model.model.",  # LLaVA until transformers 4.51
    "base_model.model.model.language_model.",  # and since
    "base_model.model.model.language_model.model.",
    "base_model.model.language_model.",  # Gemma 3
    "base_model.model.model.text_model.",  # SmolVLM
    "base_model.model.thinker.model.",  # Qwen2.5-Omni
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
    change_tensors(adapter / peft_config.WEIGHTS, rename)
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
        (FIRST.replace("lora_A", "base_layer.lora_A"), "is there twice"),
        (FIRST.replace("lora_A", "base_layer"), "is a weight of the base itself.*save the adapter"),
        (FIRST.replace("self_attn", "cross_attn"), "looks at the picture encoder.*train the"),
        (
            FIRST.replace("lora_A", "lora_A.speech"),
            r"several adapters \(one without a name, speech\); save one of them with PEFT's",
        ),
    ],
)
def test_a_tensor_that_is_not_read_is_refused_with_its_true_reason(adapter, tmp_path, key, reason):
    def add(tensors: dict) -> None:
        tensors[key] = tensors[FIRST].clone()

    change_tensors(adapter / peft_config.WEIGHTS, add)
    with pytest.raises(PhiSightError, match=reason) as error:
        import_peft(adapter, tmp_path / "out" / "run")
    assert ("right base" in str(error.value)) == ("layers.77" in key)
    assert not (tmp_path / "out").exists()


def test_an_adapter_of_a_base_with_other_sizes_names_both(adapter, tmp_path):
    """In one line: what was found, what fits, whose it is, what to do."""

    def widen(tensors: dict) -> None:
        for name in [name for name in tensors if name.endswith("lora_A.weight")]:
            tensors[name] = torch.zeros(len(tensors[name]), 4096)

    path = adapter / peft_config.CONFIG
    named = {"base_model_name_or_path": "other/base"}
    path.write_text(json.dumps(json.loads(path.read_text()) | named))
    change_tensors(adapter / peft_config.WEIGHTS, widen)
    with pytest.raises(PhiSightError) as error:
        import_peft(adapter, tmp_path / "run")
    message = str(error.value)
    assert re.search(
        r"lora_A.weight is \(16, 4096\) float32, not a float tensor of 16x\d+;", message
    )
    assert message.endswith(
        "the base and the rank in adapter_config.json ask for that, and adapter_config.json names"
        " 'other/base' as its base; give the base that it was trained over with --base,"
        " and its --vision and --projector"
    )


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (peft_config.WEIGHTS, b"\xff" * 64, "not readable"),
        (peft_config.CONFIG, b"{", "download"),
        (peft_config.CONFIG, None, "missing"),
        (peft_config.WEIGHTS, None, "not readable"),
        (peft_config.PROJECTOR, None, "pictures mean nothing"),
        (peft_config.PROJECTOR, b"", "not readable"),
    ],
)
def test_files_that_are_damaged_or_missing_are_named(adapter, tmp_path, name, content, message):
    (adapter / name).unlink()
    if content is not None:
        (adapter / name).write_bytes(content)
    with pytest.raises(PhiSightError, match=f"{re.escape(name)}.*{message}"):
        export.main([f"--import-peft={adapter}", f"--out={tmp_path / 'run'}", BASE, VISION])


@pytest.mark.parametrize(
    ("typed", "fact", "message"),
    [
        ([], "base", f"another base than {runs.BASE}; give the right one with --base"),
        ([], "vision", f"another picture encoder, or way to read it, than {runs.VISION}; give --v"),
        (["--vision-layer=-1"], None, "another picture encoder, or way to read it, than"),
        (["--vision-features=pooled"], None, "another picture encoder, or way to read it, than"),
    ],
)
def test_an_adapter_whose_folder_names_other_members_is_refused(
    adapter, tmp_path, typed, fact, message
):
    """Its tensors fit by their shapes, and what they would answer means nothing."""
    path = adapter / peft_config.PROVENANCE
    said = json.loads(path.read_text())
    if fact:
        said["provenance"][f"{fact}_fingerprint"] = "0" * 64
    path.write_text(json.dumps(said))
    with pytest.raises(PhiSightError) as error:
        export.main([f"--import-peft={adapter}", f"--out={tmp_path / 'run'}", BASE, VISION, *typed])
    assert f"was trained with {message}" in str(error.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("content", [b"{", b"[]", b"{}", b'{"provenance": 3}'])
def test_a_provenance_that_says_nothing_is_told(adapter, tmp_path, content):
    (adapter / peft_config.PROVENANCE).write_bytes(content)
    with pytest.raises(PhiSightError, match=r"provenance\.json: .*; export the adapter again"):
        export.main([f"--import-peft={adapter}", f"--out={tmp_path / 'run'}", BASE, VISION])


def test_an_imported_run_is_what_was_typed(adapter, tmp_path):
    """The base is kept quantised where --base-cache says, and pictures are read as typed."""
    (adapter / peft_config.PROVENANCE).unlink()  # as another program's, which does not say it
    cache, out = tmp_path / "bases", tmp_path / "run"
    typed = [f"--base-cache={cache}", "--vision-features=pooled", "--feature-storage=int8"]
    export.main([f"--import-peft={adapter}", f"--out={out}", BASE, VISION, *typed])
    config = Assistant.load(out).config
    assert config.base_cache == str(cache)
    assert (config.vision_features, config.feature_storage) == ("pooled", "int8")
    assert [path for path in cache.rglob("*.safetensors")]
