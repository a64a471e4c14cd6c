"""An exported folder in transformers' own pipelines, which are given messages and pictures only,
and the adapter over it in PEFT and as vLLM names it."""

from __future__ import annotations

import dataclasses
import functools
import json
import shutil
from pathlib import Path

import exporting
import pytest
import runs
import torch
from peft import PeftModel
from PIL import Image
from safetensors.torch import load_file
from transformers import (
    AutoProcessor,
    LlavaForConditionalGeneration,
    LogitsProcessor,
    LogitsProcessorList,
    pipeline,
)

import export
import exports.llava
from assistant.assistant import Assistant
from config import replace
from data.dataset import Message, Part, Role
from errors import PhiSightError
from exports.measure import CERTIFICATE
from exports.peft_adapter import add_adapter
from lora.layer import LoRALinear
from model.vision import read_vision_spec

PADS, CROPS = "pad", "crop"


@functools.cache
def pictures() -> dict[str, Path]:
    """Picture files by name: square, wide, tall, small, and one that a camera took on its side."""
    folder = runs.shared() / "pictures"
    folder.mkdir()
    first, second = exporting.pictures()
    exif = Image.Exif()
    exif[0x0112] = 6
    made = {
        "square": first,
        "wide": second.crop((10, 20, 96, 60)).resize((300, 140)),
        "tall": second.crop((30, 0, 60, 96)),
    }
    for name, picture in made.items():
        picture.save(folder / f"{name}.png")
    made["wide"].save(folder / "turned.jpg", exif=exif)
    return {path.stem: path for path in folder.iterdir()}


@functools.cache
def side(fit: str) -> tuple[Assistant, Path]:
    """The tests' run with its pictures padded or cropped, and its LLaVA folder."""
    run = runs.assistant()
    if run.config.picture_fit == fit:
        return run, exporting.llava()
    config = replace(run.config, picture_fit=fit)
    vision = read_vision_spec(config.vision, layer=config.vision_layer, picture_fit=fit)
    other = Assistant(dataclasses.replace(run.parts, vision=vision), config, run.source)
    folder = Path(shutil.copytree(exporting.llava(), runs.shared() / f"llava-{fit}"))
    exports.llava.write_processor(other, folder, Path(config.base))
    return other, folder


@functools.cache
def chat(folder: Path):
    return pipeline("image-text-to-text", model=folder)


def ours(assistant: Assistant, chats: list[tuple[Role, list[str]]]) -> str:
    """The answer to turns of words and names of pictures."""
    known = pictures()
    messages = [
        Message(
            role,
            tuple(Part("image", str(known[p])) if p in known else Part("text", p) for p in said),
        )
        for role, said in chats
    ]
    return "".join(assistant.reply(messages)).strip()


def theirs(folder: Path, chats: list[tuple[Role, list[str]]], opened: bool = False) -> str:
    """The same of a pipeline, by the files' paths or by pictures that PIL opened."""
    known = pictures()

    def part(said: str) -> dict:
        if said not in known:
            return {"type": "text", "text": said}
        path = known[said]
        return {"type": "image", **({"image": Image.open(path)} if opened else {"path": str(path)})}

    given = [{"role": role, "content": [part(p) for p in said]} for role, said in chats]
    made = chat(folder)(text=given, return_full_text=False)
    return made[0]["generated_text"].strip()


CHATS: dict[str, list[tuple[Role, list[str]]]] = {
    "a wide picture": [("user", ["wide", "Describe the picture."])],
    "a tall one": [("user", ["tall", "Describe the picture."])],
    "one on its side": [("user", ["turned", "Describe the picture."])],
    "the picture after the words": [("user", ["What is there?", "square"])],
    "several": [("user", ["Compare", "square", "with", "wide", "and", "tall", "now."])],
    "several turns": [
        ("user", ["wide", "How many objects are there?"]),
        ("assistant", ["three"]),
        ("user", ["square", "And here?"]),
        ("assistant", ["The picture shows two objects."]),
        ("user", [" Describe the first picture. "]),
    ],
    "words alone": [("user", ["How many red stars are there?"])],
    "a system message": [("system", ["Be brief."]), ("user", ["square", "Describe it."])],
}


@pytest.mark.parametrize("fit", [PADS, CROPS])
@pytest.mark.parametrize("which", CHATS)
def test_a_pipeline_gives_our_answer(which, fit):
    assistant, folder = side(fit)
    said = ours(assistant, CHATS[which])
    assert said and theirs(folder, CHATS[which]) == said


def test_a_picture_may_be_given_opened():
    turns = CHATS["several"]
    assert theirs(side(PADS)[1], turns, opened=True) == theirs(side(PADS)[1], turns)


def test_the_answers_tell_the_chats_and_the_fits_apart():
    """Or their being equal would say little."""
    said = {which: [ours(side(fit)[0], CHATS[which]) for fit in (PADS, CROPS)] for which in CHATS}
    assert len({padded for padded, _ in said.values()}) >= 5
    assert any(padded != cropped for padded, cropped in said.values())


class EndsWith(LogitsProcessor):
    """Makes a model say one id when it has said so many."""

    def __init__(self, id: int, after: int) -> None:
        self.id, self.after = id, after

    def __call__(self, ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if ids.shape[1] == self.after:
            scores[:, self.id] = torch.inf
        return scores


def test_every_stop_id_ends_an_answer():
    assistant, folder = side(PADS)
    ask = chat(folder)
    given = [{"role": "user", "content": [{"type": "text", "text": "Describe the picture."}]}]
    length = ask.processor.apply_chat_template(
        given, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )["input_ids"].shape[1]
    assert len(assistant.stop_ids) == 2
    for id in assistant.stop_ids:
        forced = LogitsProcessorList([EndsWith(id, length + 3)])
        made = ask(text=given, return_tensors=True, generate_kwargs={"logits_processor": forced})
        assert made[0]["generated_token_ids"].tolist()[length + 3 :] == [id]


def test_a_text_model_answers_in_a_pipeline():
    ask = pipeline("text-generation", model=exporting.merged())
    assistant = runs.assistant()
    for chats in (CHATS["words alone"], [("system", ["Be brief."]), ("user", [" What is red? "])]):
        given = [{"role": role, "content": said[0]} for role, said in chats]
        made = ask(given, return_full_text=False)
        assert made[0]["generated_text"].strip() == ours(assistant, chats)


# -- the adapter apart -----------------------------------------------------------------------------


@functools.cache
def apart() -> Path:
    """What `--llava DIR --unmerged --dtype float32` writes."""
    out = runs.shared() / "apart"
    typed = [f"--llava={out}", "--unmerged", f"--run={runs.finished_run()}"]
    assert export.main([*typed, "--dtype=float32", exporting.ANSWERS]) == 0
    return out


@torch.no_grad()
def test_peft_over_the_folder_gives_the_logits_of_the_run():
    assistant, known = runs.assistant(), pictures()
    processor = AutoProcessor.from_pretrained(apart())
    base = LlavaForConditionalGeneration.from_pretrained(apart()).eval()
    given = [
        {"role": "user", "content": [{"type": "image", "path": str(known["wide"])}]},
        {"role": "assistant", "content": "A star."},
        {"role": "user", "content": [{"type": "text", "text": "Describe the picture."}]},
    ]
    inputs = processor.apply_chat_template(
        given, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    plain = base(**inputs).logits
    adapted = PeftModel.from_pretrained(base, apart() / "adapter").eval()
    found = adapted(**inputs).logits
    merged = LlavaForConditionalGeneration.from_pretrained(exporting.llava()).eval()
    expected = merged(**inputs).logits
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    assert (plain - expected).abs().max() > 0.1  # the adapter does something

    ask = pipeline("image-text-to-text", model=adapted.merge_and_unload(), processor=processor)
    for turns in (CHATS["a wide picture"], CHATS["words alone"]):
        content = [
            {"type": "image", "path": str(known[p])} if p in known else {"type": "text", "text": p}
            for p in turns[0][1]
        ]
        made = ask(text=[{"role": "user", "content": content}], return_full_text=False)
        assert made[0]["generated_text"].strip() == ours(assistant, turns)


@torch.no_grad()
def test_our_own_way_to_put_an_adapter_on_is_that_of_peft():
    """The certificate is measured with it, where PEFT need not be installed."""
    base = LlavaForConditionalGeneration.from_pretrained(apart())
    theirs = PeftModel.from_pretrained(base, apart() / "adapter").merge_and_unload()
    mine = LlavaForConditionalGeneration.from_pretrained(apart())
    add_adapter(mine, apart() / "adapter")
    for name, weight in theirs.state_dict().items():
        torch.testing.assert_close(mine.state_dict()[name], weight, atol=1e-6, rtol=1e-6)
    found = json.loads((apart() / CERTIFICATE).read_text())
    assert found["what"] == "llava, adapter apart" and abs(found["loss_difference"]) < 1e-5
    assert found["greedy_equal"] == 100 and found["alignment"]["questions"] == 8
    assert {"adapter/adapter_model.safetensors", "config.json"} <= set(found["files"])
    other = LlavaForConditionalGeneration.from_pretrained(apart()).model.language_model
    with pytest.raises(PhiSightError, match="is no layer of the model"):
        add_adapter(other, apart() / "adapter")


def test_the_adapter_has_the_names_that_vllm_takes():
    """By its LoRAModel.from_local_checkpoint, PEFTHelper, and LlavaForConditionalGeneration:
    - "base_model.model." is taken off, and `hf_to_vllm_mapper` renames what is left;
    - the last name must be one of its linear layers', those of `packed_modules_mapping` in parts;
    - bias, DoRA and further modules are refused, and a rank over --max-lora-rank."""
    packed = {
        "qkv_proj": ["q_proj", "k_proj", "v_proj"],
        "gate_up_proj": ["gate_proj", "up_proj"],
    }
    linear = {"qkv_proj", "o_proj", "gate_up_proj", "down_proj"}
    expected = {part for name in linear for part in packed.get(name, [name])}
    folder = apart() / "adapter-vllm"
    settings = json.loads((folder / "adapter_config.json").read_text())
    tensors = load_file(folder / "adapter_model.safetensors")
    model = runs.assistant().parts.base.model
    found: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in tensors.items():
        name, side, last = key.removeprefix("base_model.model.").rsplit(".", 2)
        assert key.startswith("base_model.model.model.language_model.layers.")
        renamed = name.replace("model.language_model.", "language_model.model.", 1)
        assert renamed.startswith("language_model.model.layers.") and last == "weight"
        assert renamed.rsplit(".", 1)[-1] in expected
        found.setdefault(renamed.removeprefix("language_model."), {})[side] = tensor
    for name, layer in model.named_modules():
        if isinstance(layer, LoRALinear):
            place, kind = name.rsplit(".", 1)
            parts = [found.pop(f"{place}.{part}") for part in packed.get(kind, [kind])]
            assert all(torch.equal(part["lora_A"], layer.lora_A) for part in parts)
            assert torch.equal(torch.cat([part["lora_B"] for part in parts]), layer.lora_B)
            assert settings["lora_alpha"] / settings["r"] == layer.scaling.item()
    assert found == {} and set(settings["target_modules"]) <= expected
    assert settings["r"] <= 16  # its default of --max-lora-rank
    assert settings["bias"] == "none" and settings["modules_to_save"] is None
    assert not settings.get("use_dora") and not settings.get("use_rslora")


@pytest.mark.parametrize("folder", [exporting.llava, apart])
def test_the_config_has_the_fields_that_vllm_reads(folder):
    """By its registry, its LlavaForConditionalGeneration with a CLIP, and its chat server."""
    parts = runs.assistant().parts
    config = json.loads((folder() / "config.json").read_text())
    text, vision = config["text_config"], config["vision_config"]
    assert config["architectures"] == ["LlavaForConditionalGeneration"]
    assert (
        config["model_type"] == "llava"
        and config["image_token_index"] == parts.chat_format.image_id
    )
    assert text["architectures"] == ["Phi3ForCausalLM"] and text["model_type"] == "phi3"
    ours = parts.base.model.config
    for name in (
        *("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
        *("num_key_value_heads", "vocab_size", "max_position_embeddings", "rms_norm_eps"),
    ):
        assert text[name] == getattr(ours, name), name
    assert text["rope_parameters"]["rope_type"] in ("default", "longrope")
    assert text["tie_word_embeddings"] is ours.tie_word_embeddings
    assert vision["model_type"] == "clip_vision_model"
    # Its CLIP is built up to the layer that is read, which is one number.
    assert config["vision_feature_layer"] == parts.vision.layer
    assert config["vision_feature_select_strategy"] == "default"
    patches = (vision["image_size"] // vision["patch_size"]) ** 2  # "default": no class token
    assert patches == parts.chat_format.tokens_per_image == config["image_seq_length"]
    assert config["projector_hidden_act"] == "gelu" and config["multimodal_projector_bias"] is True
    # Its pictures must come out of the processor as large as the CLIP reads them.
    processor = json.loads((folder() / "processor_config.json").read_text())
    assert processor["processor_class"] == "LlavaProcessor"
    size = {"height": vision["image_size"], "width": vision["image_size"]}
    assert processor["image_processor"]["crop_size"] == size
    # Its "openai" form of content goes into the template as parts, which writes the picture's mark.
    template = (folder() / "chat_template.jinja").read_text()
    assert "for part in message['content']" in template


@pytest.mark.parametrize("folder", [exporting.llava, apart])
def test_the_weights_have_the_names_that_vllm_and_older_programs_find(folder):
    """Of each module the one name: vLLM's CLIPVisionModel has its layers in `vision_model`, and its
    language model is a Phi3ForCausalLM of that name."""
    names = set(load_file(folder() / "model.safetensors"))
    layers = [
        f"language_model.model.layers.{layer}.{part}.weight"
        for layer in range(runs.assistant().parts.base.model.config.num_hidden_layers)
        for part in ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj")
    ]
    assert names > {
        *layers,
        "language_model.model.embed_tokens.weight",
        "language_model.model.norm.weight",
        "language_model.lm_head.weight",
        *(
            f"multi_modal_projector.linear_{n}.{kind}"
            for n in (1, 2)
            for kind in ("weight", "bias")
        ),
        "vision_tower.vision_model.embeddings.patch_embedding.weight",
        "vision_tower.vision_model.encoder.layers.0.self_attn.q_proj.weight",
        "vision_tower.vision_model.pre_layrnorm.weight",
    }
    known = ("language_model.model.", "language_model.lm_head.", "multi_modal_projector.")
    assert all(name.startswith((*known, "vision_tower.vision_model.")) for name in names)
    _, found = LlavaForConditionalGeneration.from_pretrained(folder(), output_loading_info=True)
    assert not any(found[what] for what in ("missing_keys", "unexpected_keys", "mismatched_keys"))
