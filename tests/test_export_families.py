"""Every family of bases, and every encoder, through every export, or the line that refuses it."""

from __future__ import annotations

import dataclasses
import functools
import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import bitsandbytes as bnb
import numpy
import pytest
import random_model
import runs
import torch
from exporting import logits_of, logits_over, pictures, text_ids
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoProcessor,
    LlamaConfig,
    LlavaForConditionalGeneration,
    Phi3Config,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

import config as configs
import export
import exports.llava
import exports.measured
import exports.merge
import exports.prune
import exports.requantize
import exports.seed
from assistant.assistant import Assistant
from data.chat import render
from data.dataset import Message, Part
from errors import PhiSightError
from exports import measure
from exports.folder import hub_config
from exports.llama_cpp import asked, certificate, language
from exports.llama_cpp import export as gguf_export
from exports.measure import Tolerance
from lora.layer import secure_four_bit
from model.base import load_base
from model.decoder import Rope, Stretch
from model.families import FAMILIES
from model.vision import VisionTower
from tools.small.encoders import write_encoder
from tools.small.tokenizers import write_tokenizer

SIZE = 640  # tokens
COMMON = {
    "vocab_size": SIZE,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
PARTIAL = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.75}
# tokenizer -> its base, and the encoder that the run over it sees by
CONFIGS: dict[str, tuple[PreTrainedConfig, str]] = {
    "phi4": (Phi3Config(**COMMON, tie_word_embeddings=True, rope_parameters=PARTIAL), "clip"),
    "llama3": (LlamaConfig(**COMMON, tie_word_embeddings=True, rope_parameters=LLAMA3), "siglip"),
    "smollm2": (LlamaConfig(**COMMON), "dinov2"),
    "qwen2.5": (Qwen2Config(**COMMON), "clip"),
    "qwen3": (Qwen3Config(**COMMON, head_dim=32, tie_word_embeddings=True), "siglip"),
}
EXACT = Tolerance(1e-4, 100)
LLAMA = asked.find_llama()
needs_llama = pytest.mark.skipif(
    LLAMA is None, reason=f"llama-cpp-python is not installed: {asked.INSTALL}"
)
each_family = pytest.mark.parametrize("name", CONFIGS)


@functools.cache
def base_of(name: str) -> Path:
    """A small base of random weights as transformers writes it, with a tokenizer of the family."""
    folder = runs.shared() / f"base-{name}"
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[name][0])
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(folder)
    return write_tokenizer(name, folder, SIZE)


def run_over(base: Path, encoder: str, **fields: object) -> Assistant:
    """A run of two steps."""
    said = "-".join(map(str, [encoder, *fields.values()]))
    run = runs.shared() / f"run-{base.name}-{said}"
    vision = runs.shared() / f"encoder-{encoder}"
    if not vision.exists():
        write_encoder(encoder, vision)
    more = {"learning_rate": 1e-2, "picture_fit": "crop"} | fields
    runs.start(run, base=base, vision=vision, **(runs.SHORT | more))
    return Assistant.load(run)


@functools.cache
def assistant_of(name: str) -> Assistant:
    return run_over(base_of(name), CONFIGS[name][1])


@functools.cache
def probe_of(name: str) -> measure.Probe:
    return measure.make_probe(assistant_of(name), 2)


@each_family
def test_merged_is_a_model_of_the_family(name, tmp_path):
    out, assistant = tmp_path / "merged", assistant_of(name)
    base = assistant.parts.base
    found = exports.merge.export_merged(assistant, out, torch.float32, probe_of(name), EXACT)
    assert found["greedy_equal"] == 100 and found["family"] == base.family.name
    given, written = (load_file(path / "model.safetensors") for path in (base_of(name), out))
    assert {n: t.shape for n, t in written.items()} == {n: t.shape for n, t in given.items()}
    theirs = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    assert type(theirs).__name__ == base.family.architecture
    ids = text_ids(assistant)
    ours = logits_of(base.model, ids)
    torch.testing.assert_close(logits_of(theirs, ids), ours, rtol=1e-5, atol=1e-5)
    again = load_base(out, None, torch.float32, "cpu", "none")
    torch.testing.assert_close(logits_of(again.model, ids), ours, rtol=1e-5, atol=1e-5)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        assert (out / file).read_bytes() == (base_of(name) / file).read_bytes()


@each_family
def test_requantized_is_read_by_transformers_and_by_us_alike(name, tmp_path):
    out, assistant = tmp_path / "model", assistant_of(name)
    exports.requantize.export_requantized(
        assistant, out, torch.float32, probe_of(name), Tolerance(9, 0), conversations=2
    )
    ours = exports.requantize.read_back(assistant, out).parts.base.model
    theirs = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    for layer in theirs.modules():
        if isinstance(layer, bnb.nn.Linear4bit):
            secure_four_bit(layer)
    ids = text_ids(assistant)
    torch.testing.assert_close(logits_of(theirs, ids), logits_of(ours, ids), rtol=1e-5, atol=1e-5)


@each_family
def test_pruned_is_a_narrower_model_of_the_family(name, tmp_path):
    out, assistant = tmp_path / "model", assistant_of(name)
    exports.prune.export_pruned(
        assistant, out, torch.float32, probe_of(name), None, share=0.3, conversations=2
    )
    theirs = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    assert theirs.config.intermediate_size == 64
    again = load_base(out, None, torch.float32, "cpu", "none")
    ids = text_ids(assistant)
    expected = logits_of(theirs, ids)
    torch.testing.assert_close(logits_of(again.model, ids), expected, rtol=1e-5, atol=1e-5)


# -- LLaVA ----------------------------------------------------------------------------------------


@each_family
def test_llava_gives_the_logits_of_the_run(name, tmp_path):
    """Of every family, with each of the encoders that it reads; the adapter apart for one."""
    out, assistant = tmp_path / "llava", assistant_of(name)
    apart = name == "qwen2.5"
    found = exports.llava.export_llava(
        assistant, out, torch.float32, probe_of(name), EXACT, unmerged=apart
    )
    assert found["greedy_equal"] == 100
    processor = AutoProcessor.from_pretrained(out)
    theirs = LlavaForConditionalGeneration.from_pretrained(out, dtype=torch.float32).eval()
    if apart:
        exports.llava.add_adapter(theirs, out / "adapter")
    said = [{"type": "image"}, {"type": "image"}, {"type": "text", "text": "Which is it?"}]
    text = processor.apply_chat_template(
        [{"role": "user", "content": said}], add_generation_prompt=True
    )
    # As transformers' pipelines call it: a template writes the beginning of a text itself.
    inputs = processor(images=pictures(), text=text, return_tensors="pt", add_special_tokens=False)
    message = Message(
        "user", (Part("image", "a"), Part("image", "b"), Part("text", "Which is it?"))
    )
    ours = render([message], assistant.parts.chat_format, add_generation_prompt=True)
    assert inputs["input_ids"][0].tolist() == ours.input_ids
    features = VisionTower(assistant.parts.vision)(pictures())
    with torch.no_grad():
        embeddings = assistant.model.embed(inputs["input_ids"], features)
        expected = logits_over(assistant.parts.base.model, embeddings)
        found = theirs(**inputs).logits
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


# -- GGUF -----------------------------------------------------------------------------------------


@needs_llama
@each_family
def test_llama_cpp_computes_the_family_and_has_its_ids(name, tmp_path):
    """Log-probabilities of random tokens, and the ids of chats, by llama.cpp and by us."""
    assistant, probe = assistant_of(name), probe_of(name)
    parts = assistant.parts
    path = gguf_export.write_language_model(assistant, tmp_path, "f16", "")
    ids = torch.randint(0, SIZE, (150,), generator=torch.Generator().manual_seed(1))
    ids[ids == parts.chat_format.image_id] += 1
    ours = random_model.logits_of(parts.base.model.eval(), ids).double().log_softmax(-1)
    expected = ours[:-1].gather(1, ids[1:, None])[:, 0]
    end = gguf_export.vocabulary_in(assistant).line_end
    samples = [*certificate.samples_of(probe), *probe.prompts]
    texts = certificate.chat_texts(samples, parts.base.tokenizer, parts.chat_format, end)
    template = certificate.template_of(parts.chat_format, end)
    texts += certificate.template_texts(template, parts.chat_format)
    encode = parts.base.tokenizer.backend_tokenizer.encode
    for words in ("I'm 12345 of naïve\n\n  cafés, WE'LL see:\t(x)", "漢字 CamelCase99  don't"):
        texts.append((words, encode(words, add_special_tokens=False).ids))
    conversation = asked.Conversation(ids.tolist(), [True] * len(ids))
    question = asked.Asked(
        path, None, parts.chat_format.image_id, texts=texts, conversations=[conversation]
    )
    told = asked.ask(str(LLAMA), question)
    assert not told.wrong_texts, texts[told.wrong_texts[0]]
    wrong = numpy.abs(told.log_probabilities[0] - expected.numpy())
    assert wrong.mean() < 0.005 and wrong.max() < 0.05, (wrong.mean(), wrong.max())


# -- refused --------------------------------------------------------------------------------------


@functools.cache
def other_run(**fields: object) -> Assistant:
    encoder = str(fields.pop("encoder", "siglip"))
    return run_over(base_of("qwen3"), encoder, **fields)


def refused(assistant: Assistant, flag: str) -> str:
    """The line by which `--llava` or `--gguf` refuses a run, which it does before it writes."""
    out, probe = runs.shared() / "refused", probe_of("qwen3")
    with pytest.raises(PhiSightError) as error:
        if flag == "--llava":
            exports.llava.export_llava(assistant, out, torch.float32, probe, None)
        else:
            gguf_export.export_gguf(assistant, out, torch.float32, probe, None, "f16", "")
    assert not out.exists()
    return str(error.value)


@pytest.mark.parametrize("encoder", ["siglip2", "dinov2_with_registers"])
def test_encoders_that_llava_does_not_read_are_refused(encoder):
    assistant = other_run(encoder=encoder)
    name = assistant.parts.vision.config.NAME
    assert refused(assistant, "--llava") == (
        f"--llava: {assistant.source} sees by {name}, LLaVA reads CLIP or SigLIP or DINOv2 alone;"
        " export a run that was trained with --vision of CLIP or SigLIP or DINOv2, or this one with"
        " --peft"
    )


def test_gguf_is_refused_but_for_clip():
    assistant = assistant_of("qwen3")
    assert refused(assistant, "--gguf") == (
        f"--gguf: {assistant.source} sees by SigLIP, llama.cpp reads CLIP alone; export a run that"
        " was trained with --vision of CLIP, or this one with --peft"
    )


@pytest.mark.parametrize("projector", ["linear", "pixel-shuffle", "resampler"])
def test_projectors_that_llava_lacks_are_refused(projector):
    assistant = other_run(projector=projector)
    assert refused(assistant, "--llava") == (
        f"--llava: {assistant.source} has the projector {projector}, LLaVA reads mlp; export a run"
        " that was trained with --projector mlp, or this one with --peft"
    )


def test_padding_that_a_processor_lacks_is_refused():
    assistant = other_run(picture_fit="pad")
    assert refused(assistant, "--llava") == (
        f"--llava: {assistant.source} pads the pictures of a SigLIP, which LLaVA's own processor"
        " does not; export a run that was trained with --picture-fit crop, or this one with --peft"
    )


def test_all_that_llava_reads_otherwise_is_named_in_one_line():
    """So that a run which was trained again as it says is not refused for the next reason."""
    assistant = other_run(picture_fit="pad", projector="resampler")
    assert refused(assistant, "--llava") == (
        f"--llava: {assistant.source} pads the pictures of a SigLIP, which LLaVA's own processor"
        " does not; it has the projector resampler, LLaVA reads mlp; export a run that was trained"
        " with --picture-fit crop and --projector mlp, or this one with --peft"
    )


def test_a_run_that_llama_cpp_cannot_hold_is_refused_before_llama_cpp_is_asked_for(monkeypatch):
    """Nobody should build llama.cpp, which takes up to 40 minutes, to be told that."""
    pytest.importorskip("gguf")
    monkeypatch.setattr(gguf_export, "find_llama", lambda python: None)
    assistant = assistant_of("qwen3")
    monkeypatch.setattr(exports.measured, "load_assistant", lambda options: assistant)
    with pytest.raises(PhiSightError, match="sees by SigLIP, llama.cpp reads CLIP alone"):
        export.main(["--gguf=out"])


def test_the_seeds_checkpoints_are_of_phi_3_alone(tmp_path):
    base = base_of("qwen3")
    config = configs.replace(configs.default_config("tiny"), base=str(base))
    with pytest.raises(PhiSightError) as error:
        exports.seed.import_seed(tmp_path, tmp_path / "out", config)
    assert str(error.value) == (
        f"--import-seed: {base} is a Qwen3, and the seed project trained Phi-3 alone; name the base"
        " that it was trained with by --base"
    )


@pytest.mark.parametrize(
    ("model_type", "changed", "said"),
    [
        ("mamba", {}, "is a mamba, and what is proven with llama.cpp is phi3, llama,"),
        ("phi3", {"head_dim": 32}, "4 heads of 32, which are not its width of 64, and"),
        (
            "qwen2",
            {"head_dim": 32},
            "4 heads of 32, which are not its width of 64, and llama.cpp's",
        ),
        ("llama", {"rope": Rope(1e4, 8)}, "turns 8 of 16 dims of a head, which are not all, and"),
        (
            "qwen3",
            {"rope": Rope(1e4, 16, stretch=Stretch(8, 1, 4, 64))},
            "has llama3's rotary positions, and llama.cpp's qwen3 has the usual rotary positions",
        ),
        (
            "llama",
            {"rope": Rope(1e4, 16, (1.0,) * 8, (2.0,) * 8, 64)},
            "has LongRoPE, and llama.cpp's llama has the usual rotary positions alone; export it",
        ),
    ],
)
def test_bases_that_llama_cpp_does_not_hold_are_refused(model_type, changed, said):
    plain = FAMILIES["llama"].decoder_config(LlamaConfig(**COMMON).to_dict())
    config = dataclasses.replace(plain, **changed)
    with pytest.raises(PhiSightError, match=f"^--gguf: this base .*{re.escape(said)}"):
        language.architecture_for(model_type, config)
    assert language.architecture_for("llama", plain).name == "llama"


# -- what transformers makes of a config.json ------------------------------------------------------


def described(**changes: Any) -> Any:
    """The config of an exported Phi-3 whose own config.json has `changes`."""
    raw = json.loads((runs.BASE / "config.json").read_text()) | changes
    base = SimpleNamespace(family=FAMILIES["phi3"], hub_config=raw, name="a/base")
    return hub_config(base, torch.float32)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["su", "yarn", "longrope"])
def test_positions_of_an_older_name_are_written_by_todays(kind):
    dims = described().hidden_size // described().num_attention_heads // 2
    rope = {"type": kind, "short_factor": [1.0] * dims, "long_factor": [2.0] * dims}
    changes = {"rope_scaling": rope, "original_max_position_embeddings": 64}
    written = described(**changes).rope_parameters
    assert written["rope_type"] == "longrope" and rope["type"] == kind
    assert written["original_max_position_embeddings"] == 64


def test_a_config_that_transformers_does_not_take_is_one_line():
    with pytest.raises(PhiSightError) as error:
        described(use_cache=None)
    line = str(error.value)
    assert line.startswith("a/base: transformers does not take its config.json (")
    assert "use_c" in line
    assert line.endswith("this run can be exported by --peft") and "\n" not in line
