"""The LLaVA folder: what transformers computes with it, and with its processor."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import exporting
import pytest
import runs
import torch
from exporting import logits_over, pictures
from PIL import Image
from transformers import (
    AutoModelForCausalLM,
    AutoProcessor,
    AutoTokenizer,
    GenerationConfig,
    LlavaForConditionalGeneration,
)

import exports.llava
import exports.merge
import exports.prune
import exports.requantize
import infer
from assistant.assistant import Assistant
from config import replace
from data.chat import ChatFormat, load_tokenizer, render
from data.dataset import Message, Part
from errors import PhiSightError
from exports import measure
from exports.measure import Tolerance
from model.base import load_base
from model.vision import VisionTower, read_vision_spec

REAL_TOKENIZER = runs.ROOT.parent / "shared" / "real" / "phi-3-mini-tokenizer"


@pytest.fixture(scope="module")
def assistant() -> Assistant:
    """A trained run whose adapter and projector do something. Tests only read it."""
    return runs.assistant()


@pytest.fixture(scope="module")
def probe(assistant) -> measure.Probe:
    return exporting.probe()


@pytest.fixture(scope="module")
def merged() -> Path:
    return exporting.merged()


@pytest.fixture(scope="module")
def llava() -> Path:
    return exporting.llava()


ASKED = (
    Part("text", "Compare"),
    Part("image", "a"),
    Part("text", "with"),
    Part("image", "b"),
    Part("text", "Then:"),
    Part("text", "which has a star?"),
)


def their_form(messages) -> list[dict]:
    """Messages as processors of transformers take them."""
    return [
        {
            "role": m.role,
            "content": [
                {"type": "image"} if part.kind == "image" else {"type": "text", "text": part.value}
                for part in m.parts
            ],
        }
        for m in messages
    ]


@torch.no_grad()
def test_llava_gives_the_logits_of_our_model_bit_for_bit(llava, merged, assistant):
    processor = AutoProcessor.from_pretrained(llava)
    theirs = LlavaForConditionalGeneration.from_pretrained(llava, dtype=torch.float32).eval()
    messages = [Message("user", ASKED)]
    text = processor.apply_chat_template(their_form(messages), add_generation_prompt=True)
    inputs = processor(images=pictures(), text=text, return_tensors="pt")
    ours = render(messages, assistant.parts.chat_format, add_generation_prompt=True)
    assert inputs["input_ids"][0].tolist() == ours.input_ids
    expected = theirs(**inputs).logits

    base = load_base(merged, None, torch.float32, "cpu", "none")
    same = measure.with_language_model(assistant, base)
    features = VisionTower(assistant.parts.vision)(pictures())  # not rounded as the store does
    embeddings = same.model.embed(inputs["input_ids"], features)
    assert torch.equal(logits_over(base.model, embeddings), expected)
    mixed = logits_over(base.model, same.model.embed(inputs["input_ids"], features.flip(0)))
    assert (mixed - expected).abs().max() > 1e-4  # the order of the pictures was compared too


@pytest.mark.parametrize("picture_fit", ["pad", "crop"])
def test_the_processor_fits_a_picture_that_is_not_square_as_the_run_does(
    tmp_path, assistant, picture_fit
):
    config = replace(assistant.config, picture_fit=picture_fit)
    spec = read_vision_spec(config.vision, layer=config.vision_layer, picture_fit=picture_fit)
    parts = dataclasses.replace(assistant.parts, vision=spec)
    other = Assistant(parts, config, assistant.source)
    exports.llava.write_processor(other, tmp_path, Path(config.base))
    other.close()
    processor = AutoProcessor.from_pretrained(tmp_path)
    wide = pictures()[0].resize((150, 60)).rotate(7)
    for picture in (wide, wide.transpose(Image.Transpose.ROTATE_90), wide.resize((40, 40))):
        pixels = processor(images=[picture], text=processor.image_token, return_tensors="pt")[
            "pixel_values"
        ]
        assert torch.equal(pixels, spec.preparation([picture]))


CHATS = [
    [Message("user", ASKED)],
    [Message("user", (Part("image", "a"), Part("text", " what\nis it?  ")))],
    [
        Message("system", (Part("text", "Be brief."),)),
        Message("user", (Part("text", "hi"),)),
        Message("assistant", (Part("text", "Hello."),)),
        Message("user", (Part("image", "a"),)),
    ],
]


@pytest.mark.parametrize("chat", range(len(CHATS)))
@pytest.mark.parametrize("which", ["tiny", "real"])
def test_the_processor_gives_the_ids_that_the_model_was_trained_on(
    tmp_path, llava, assistant, which, chat
):
    folder, chat_format = llava, assistant.parts.chat_format
    if which == "real":
        if not REAL_TOKENIZER.is_dir():
            pytest.skip("the real tokenizer is not here")
        tokenizer = load_tokenizer(REAL_TOKENIZER)
        parts = dataclasses.replace(
            assistant.parts, base=dataclasses.replace(assistant.parts.base, tokenizer=tokenizer)
        )
        folder = tmp_path
        shutil.copy(llava / "config.json", folder)
        exports.llava.write_processor(
            Assistant(parts, assistant.config, ""), folder, REAL_TOKENIZER
        )
        chat_format = ChatFormat.from_tokenizer(tokenizer, chat_format.tokens_per_image)
    processor, messages = AutoProcessor.from_pretrained(folder), CHATS[chat]
    count = sum(part.kind == "image" for message in messages for part in message.parts)
    text = processor.apply_chat_template(their_form(messages), add_generation_prompt=True)
    inputs = processor(images=pictures()[:count] or None, text=text)
    wanted = render(messages, chat_format, add_generation_prompt=True)
    assert inputs["input_ids"][0] == wanted.input_ids


def test_a_run_of_pooled_pictures_is_no_llava(tmp_path, assistant, probe):
    config = replace(assistant.config, vision_features="pooled")
    pooled = Assistant(assistant.parts, config, assistant.source)
    with pytest.raises(PhiSightError, match="one pooled vector"):
        exports.llava.export_llava(pooled, tmp_path / "out", torch.float32, probe, Tolerance())


def test_a_run_of_averaged_patches_is_no_llava(tmp_path, assistant, probe):
    """LLaVA would read four times as many tokens a picture as the run was trained on."""
    config = replace(assistant.config, feature_pooling=2)
    pooled = Assistant(assistant.parts, config, assistant.source)
    with pytest.raises(PhiSightError, match="averages 2 x 2 patches into one token"):
        exports.llava.export_llava(pooled, tmp_path / "out", torch.float32, probe, Tolerance())
    assert list(tmp_path.iterdir()) == []


@torch.no_grad()
def test_every_folder_ends_an_answer_by_its_own_defaults(llava, merged, assistant):
    """Nothing is given to `generate` but the question: as a user of the other program does it."""
    path = str(runs.world() / "images/train_000000.png")
    message = Message("user", (Part("image", path), Part("text", "Describe the picture.")))
    said = "".join(assistant.reply([message])).strip()
    processor = AutoProcessor.from_pretrained(llava)
    text = processor.apply_chat_template(their_form([message]), add_generation_prompt=True)
    inputs = processor(images=pictures()[:1], text=text, return_tensors="pt")
    made = LlavaForConditionalGeneration.from_pretrained(llava).generate(**inputs)
    ids = made[0, inputs["input_ids"].shape[1] :]
    assert processor.decode(ids, skip_special_tokens=True).strip() == said
    assert int(ids[-1]) in assistant.stop_ids or len(ids) == 256

    question = [{"role": "user", "content": " How many red stars are there? "}]
    tokenizer = AutoTokenizer.from_pretrained(merged)
    inputs = tokenizer.apply_chat_template(
        question, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    made = AutoModelForCausalLM.from_pretrained(merged).generate(**inputs)
    ids = made[0, inputs["input_ids"].shape[1] :]
    asked = Message("user", (Part("text", question[0]["content"]),))
    said = "".join(assistant.reply([asked])).strip()
    assert tokenizer.decode(ids, skip_special_tokens=True).strip() == said
    assert int(ids[-1]) in assistant.stop_ids or len(ids) == 256


@pytest.mark.parametrize("which", ["llava", "merged"])
def test_the_defaults_of_a_folder_are_those_of_infer(which, llava, merged, assistant):
    folder = {"llava": llava, "merged": merged}[which]
    defaults = GenerationConfig.from_pretrained(folder)
    typed = infer.parse(["--prompt", "x"])
    assert set(defaults.eos_token_id) == assistant.stop_ids
    assert defaults.max_new_tokens == typed.max_new_tokens and not defaults.do_sample
    assert defaults.pad_token_id == assistant.parts.chat_format.padding_id
    assert typed.temperature == 0


def test_a_folder_that_ends_elsewhere_is_refused(tmp_path, assistant, probe, monkeypatch):
    """Its weights are right, its defaults are not: our decoder would never see it."""
    said = measure.measure(assistant, probe, "").answers
    tokenizer = assistant.parts.base.tokenizer.full
    words = sorted({id for text in said for id in tokenizer(text).input_ids})
    assert words
    write = exports.merge.write_causal_model

    def with_other_defaults(folder, *rest):
        write(folder, *rest)
        path = folder / "generation_config.json"
        settings = json.loads(path.read_text())
        path.write_text(json.dumps(settings | {"eos_token_id": words}))

    monkeypatch.setattr(exports.merge, "write_causal_model", with_other_defaults)
    with pytest.raises(PhiSightError, match="refused, nothing was written"):
        exports.merge.export_merged(
            assistant, tmp_path / "out", torch.float32, probe, Tolerance(0.01, 99)
        )
    assert list(tmp_path.iterdir()) == []
