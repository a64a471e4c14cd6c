"""GGUF: what is written, read back; and what llama.cpp makes of it, where it is installed."""

from __future__ import annotations

import builtins
import dataclasses
import json
from pathlib import Path
from typing import Any

import gguf
import numpy
import pytest
import random_model
import runs
import torch
from hypothesis import given
from hypothesis import strategies as st

import export
from assistant.assistant import Assistant
from data.chat import load_tokenizer
from errors import PhiSightError
from exports.llama_cpp import asked, certificate, eyes, language, weights
from exports.llama_cpp import export as gguf_export
from exports.llama_cpp.vocabulary import SPACE, Kind, vocabulary_of
from lora.merge import merged_state
from model.decoder import LanguageModel
from model.families import PHI3
from model.vision import load_clip, read_vision_spec
from tools import llama_cpp as builder

REAL_TOKENIZER = runs.ROOT.parent / "shared" / "real" / "phi-3-mini-tokenizer"
LLAMA = asked.find_llama()
needs_llama = pytest.mark.skipif(
    LLAMA is None, reason=f"llama-cpp-python is not installed: {asked.INSTALL}"
)
TINY = json.loads((Path(runs.BASE) / "tokenizer.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def assistant() -> Assistant:
    return runs.assistant()


@pytest.fixture(scope="module")
def folder(assistant, tmp_path_factory) -> Path:
    """Both files of the tiny run in float16, and its Modelfile."""
    folder = tmp_path_factory.mktemp("gguf")
    model = gguf_export.write_language_model(assistant, folder, "f16", "")
    gguf_export.write_eyes(assistant, folder)
    gguf_export.write_modelfile(assistant, folder, model)
    return folder


def tensors_of(path: Path) -> dict[str, gguf.ReaderTensor]:
    return {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}


def fields_of(path: Path) -> dict[str, Any]:
    return {name: field.contents() for name, field in gguf.GGUFReader(path).fields.items()}


# -- what is written ------------------------------------------------------------------------------


def test_the_weights_are_the_merged_ones(assistant, folder):
    written = tensors_of(folder / "model-f16.gguf")
    for name, tensor in merged_state(assistant.parts.base.model):
        data = written.pop(language.gguf_name(name)).data
        dtype = torch.float32 if tensor.dim() == 1 else torch.float16
        assert torch.equal(torch.from_numpy(data.copy()), tensor.to(dtype)), name
    assert not written


def test_the_eyes_are_clip_and_projector(assistant, folder):
    written = tensors_of(folder / gguf_export.MMPROJ)
    spec = assistant.parts.vision
    clip, projector = load_clip(spec).state_dict(), assistant.model.projector.state_dict()
    for theirs, ours in (
        ("v.class_embd", clip["embeddings.class_embedding"]),
        ("v.patch_embd.weight", clip["embeddings.patch_embedding.weight"]),
        ("v.position_embd.weight", clip["embeddings.position_embedding.weight"]),
        ("v.pre_ln.bias", clip["pre_layrnorm.bias"]),
        ("v.blk.2.attn_out.weight", clip["encoder.layers.2.self_attn.out_proj.weight"]),
        ("v.blk.1.ffn_up.weight", clip["encoder.layers.1.mlp.fc1.weight"]),
        ("v.blk.1.ln2.bias", clip["encoder.layers.1.layer_norm2.bias"]),
        ("mm.0.weight", projector["linear_1.weight"]),
        ("mm.2.bias", projector["linear_2.bias"]),
    ):
        data = torch.from_numpy(written[theirs].data.copy())
        assert torch.equal(data, ours.to(data.dtype)), theirs
    assert written["v.class_embd"].tensor_type.name == "F32"
    assert "v.post_ln.weight" not in written  # a state before the last norm is read
    fields = fields_of(folder / gguf_export.MMPROJ)
    assert fields["clip.vision.block_count"] == 4 and "clip.vision.feature_layer" not in fields
    assert fields["clip.projector_type"] == "mlp" and not fields["clip.use_gelu"]
    assert fields["clip.vision.image_size"] == 96 and fields["clip.vision.patch_size"] == 16


@pytest.mark.parametrize(("layer", "kept", "named"), [(-2, 4, None), (-1, 4, [4]), (1, 2, None)])
def test_as_many_layers_are_written_as_llama_cpp_goes_through(layer, kept, named, tmp_path):
    spec = read_vision_spec(runs.VISION, layer=layer)
    writer = gguf.GGUFWriter(tmp_path / "a.gguf", eyes.ARCHITECTURE)
    eyes.describe(writer, spec, 128)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    fields = fields_of(tmp_path / "a.gguf")
    assert fields["clip.vision.block_count"] == kept
    assert fields.get("clip.vision.feature_layer") == named


def test_the_file_says_what_it_is_and_of_which_run(assistant, folder):
    fields = fields_of(folder / "model-f16.gguf")
    chain = assistant.provenance
    for path in (folder / "model-f16.gguf", folder / gguf_export.MMPROJ):
        assert fields_of(path)["phisight.weights_digest"] == chain["weights_digest"]
    assert "phi-3" in fields["general.name"]  # or llama.cpp keeps white space behind marks
    assert fields["phi3.context_length"] == 2048
    assert fields["phi3.rope.dimension_count"] == 8 and fields["phi3.attention.head_count"] == 8
    assert fields["tokenizer.ggml.eos_token_id"] == 1179
    assert fields["tokenizer.ggml.eot_token_id"] == 1186
    assert not fields["tokenizer.ggml.add_bos_token"]
    modelfile = (folder / "Modelfile").read_text()
    assert "FROM ./model-f16.gguf\nFROM ./mmproj-f16.gguf\n" in modelfile
    for end in ("<|end|>", "<|endoftext|>"):
        assert f'PARAMETER stop "{end}"' in modelfile


def test_longrope_goes_along_and_a_window_limits_the_context(tmp_path):
    hub = random_model.longrope_config(64)
    config = PHI3.decoder_config(hub.to_dict())
    assert language.usual_context(config) == 64 and language.context_of(config) == 256
    windowed = dataclasses.replace(config, sliding_window=100)
    assert language.context_of(windowed) == 100
    path = tmp_path / "a.gguf"
    write_random(path, random_model.ours_of(random_model.hub_model(hub)))
    fields, tensors = fields_of(path), tensors_of(path)
    assert fields["phi3.rope.scaling.original_context_length"] == 64
    assert fields["phi3.rope.scaling.attn_factor"] == pytest.approx(config.rope.scaling)
    assert tensors[language.LONG].data.tolist() == [40.0] * 8
    assert tensors[language.SHORT].data.tolist() == [1.0] * 8


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0"])
def test_rounding_keeps_within_half_a_step(kind):
    values = torch.randn(8, 64, generator=torch.Generator().manual_seed(0))
    data = weights._data(gguf, "x", values, kind)
    back = gguf.quants.dequantize(data, gguf.GGMLQuantizationType[kind])
    largest = values.reshape(8, 2, 32).abs().amax(-1, keepdim=True)
    # Q4_0 counts from -8 to 7: a value at the other end than the largest may be a whole step off.
    step = largest / 127 / 2 if kind == "Q8_0" else largest / 8
    wrong = (torch.from_numpy(back) - values).reshape(8, 2, 32).abs()
    rounded_scale = largest / 2048  # the scale is a float16
    assert (wrong <= step + rounded_scale).all() and wrong.max() > 0


def test_embeddings_and_head_keep_8_bits():
    assert weights.kind_of("token_embd.weight", (64, 64), "q4_0") == "Q8_0"
    assert weights.kind_of("blk.0.attn_qkv.weight", (64, 64), "q4_0") == "Q4_0"
    assert weights.kind_of("blk.0.attn_qkv.weight", (64, 48), "q4_0") == "F16"
    assert weights.kind_of("blk.0.attn_norm.weight", (64,), "q4_0") == "F32"


# -- tokens ---------------------------------------------------------------------------------------


def pieces_by_score(text: str, tokens: list[str], scores: list[float]) -> list[int]:
    """SentencePiece's way (arXiv:1808.06226): the pair whose token has the highest score is merged
    first, the leftmost of equals; what has no token is spelled in bytes."""
    ids = {token: number for number, token in enumerate(tokens)}
    symbols = list(text)
    while True:
        pairs = [
            (scores[ids[a + b]], -place)
            for place, (a, b) in enumerate(zip(symbols, symbols[1:]))
            if a + b in ids
        ]
        if not pairs:
            break
        place = -max(pairs)[1]
        symbols[place : place + 2] = [symbols[place] + symbols[place + 1]]
    found = []
    for symbol in symbols:
        spelled = [f"<0x{byte:02X}>" for byte in symbol.encode()]
        found += [ids[symbol]] if symbol in ids else [ids[byte] for byte in spelled]
    return found


@given(st.text(alphabet="abcdehinorst .,?AT\n\té€漢", max_size=40))
def test_scores_merge_as_the_ranks_do(text):
    vocabulary = vocabulary_of(TINY, 1280)
    tokenizer = load_tokenizer(runs.BASE)
    expected = tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids
    spelled = SPACE + text.replace(" ", SPACE) if text else ""
    assert pieces_by_score(spelled, vocabulary.tokens, vocabulary.scores) == expected


def test_every_token_has_its_kind():
    vocabulary = vocabulary_of(TINY, 1280)
    assert vocabulary.model == "llama" and len(vocabulary.tokens) == len(vocabulary.kinds) == 1280
    kinds = dict(zip(vocabulary.tokens, vocabulary.kinds))
    assert kinds["<unk>"] == Kind.UNKNOWN and kinds["<0x41>"] == Kind.BYTE
    assert kinds["<|end|>"] == Kind.CONTROL and kinds["</s>"] == Kind.USER_DEFINED
    assert kinds[f"{SPACE}the"] == Kind.NORMAL and kinds["[PAD1279]"] == Kind.UNUSED


def test_byte_level_bpe_has_merges_and_a_split_of_a_known_name():
    split = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
    content = {
        "model": {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2}, "merges": [["a", "b"]]},
        "normalizer": None,
        "pre_tokenizer": split,
        "added_tokens": [{"id": 3, "content": "<|end|>", "special": True}],
    }
    vocabulary = vocabulary_of(content, 5)
    assert (vocabulary.model, vocabulary.split) == ("gpt2", "gpt-2")
    assert vocabulary.merges == ["a b"] and not vocabulary.scores
    assert vocabulary.tokens == ["a", "b", "ab", "<|end|>", "[PAD4]"]
    digits = {"type": "Digits", "individual_digits": True}
    content["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [digits, split]}
    assert vocabulary_of(content, 5).split == "smollm"
    content["pre_tokenizer"] = {"type": "Whitespace"}
    with pytest.raises(PhiSightError, match="splits text by Whitespace, which this export"):
        vocabulary_of(content, 5)
    content["model"]["type"] = "Unigram"
    with pytest.raises(PhiSightError, match="its tokenizer is Unigram, not BPE"):
        vocabulary_of(content, 5)


@pytest.mark.skipif(not REAL_TOKENIZER.is_dir(), reason="../shared/real is absent")
def test_the_real_tokenizer_is_sentencepiece_with_all_its_ids():
    content = json.loads((REAL_TOKENIZER / "tokenizer.json").read_text(encoding="utf-8"))
    vocabulary = vocabulary_of(content, 32064)
    tokenizer = load_tokenizer(REAL_TOKENIZER)
    for text in ("Hello world", "  What's  the weather, naïve café? 12345", "x" * 30):
        ids = tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids
        spelled = SPACE + text.replace(" ", SPACE)
        assert pieces_by_score(spelled, vocabulary.tokens, vocabulary.scores) == ids


def test_texts_have_the_ids_that_llama_cpp_is_to_give(assistant):
    probe = runs_probe()
    chat_format = assistant.parts.chat_format
    tokenizer = assistant.parts.base.tokenizer
    samples = [*certificate.samples_of(probe), *probe.prompts]
    texts = certificate.chat_texts(samples, tokenizer, chat_format, "\n")
    assert len(texts) == len(samples)
    texts += certificate.template_texts(certificate.template_of(chat_format, "\n"), chat_format)
    for text, ids in texts:
        assert tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids == ids, text
    shown = texts[-2][0]
    assert shown == "<|user|>\nIs<|placeholder1|>a cat?<|end|>\n<|assistant|>\n"


def runs_probe():
    import exporting

    return exporting.probe()


# -- refused --------------------------------------------------------------------------------------


def refused(assistant: Assistant, flags: list[str], match: str) -> None:
    with pytest.raises(PhiSightError, match=match):
        export.main([f"--run={runs.finished_run()}", *flags])


def test_without_the_packages_it_says_how_to_get_them(assistant, tmp_path, monkeypatch):
    out = tmp_path / "out"
    flags = [f"--gguf={out}"]
    monkeypatch.setattr(gguf_export, "find_llama", lambda python: None)
    refused(assistant, flags, "llama-cpp-python is not installed.*tools.llama_cpp ../llama")
    refused(assistant, [*flags, "--dtype=float32"], "--dtype: --gguf stores weights as --quantize")
    refused(
        assistant, ["--merge", f"--out={out}", "--quantize=f16"], "--quantize: goes with --gguf"
    )
    found = builtins.__import__

    def without_gguf(name, *more):
        if name == "gguf":
            raise ImportError(name)
        return found(name, *more)

    monkeypatch.setattr(builtins, "__import__", without_gguf)
    refused(assistant, flags, "the package gguf is not installed; pip install gguf")
    assert not out.exists()


def test_an_interpreter_without_llama_cpp_is_told(tmp_path, monkeypatch):
    import sys

    monkeypatch.setenv(asked.PYTHON, str(tmp_path / "none"))
    with pytest.raises(PhiSightError, match="PHISIGHT_LLAMA_PYTHON=.*: No such file"):
        asked.find_llama()
    with pytest.raises(PhiSightError, match="--llama-python .*No module named 'nothing_cpp'"):
        asked.find_llama(sys.executable, "nothing_cpp")
    with pytest.raises(PhiSightError, match="llama.cpp: ModuleNotFoundError: .*; if its version"):
        asked.run_llama(sys.executable, '{"quantise": "a", "to": "b", "as": "Q4_K_M"}')


def test_what_llama_cpp_cannot_hold_is_refused(assistant):
    config = assistant.parts.base.model.config
    with pytest.raises(PhiSightError, match="8 heads of 32, which are not its width of 128"):
        language.architecture_for("phi3", dataclasses.replace(config, head_dim=32))
    pooled = dataclasses.replace(assistant.config, feature_pooling=2)
    blind = dataclasses.replace(assistant.config, vision_features="pooled")
    for other, match in ((pooled, "llama.cpp reads every patch"), (blind, "one pooled vector")):
        changed = Assistant(assistant.parts, other, assistant.source)
        with pytest.raises(PhiSightError, match=f"--gguf: .*{match}"):
            gguf_export.export_gguf(changed, "x", torch.float16, runs_probe(), None, "f16", "")
    with pytest.raises(PhiSightError, match="--gguf: x has values that are not finite"):
        weights._data(gguf, "x", torch.tensor([[float("nan")] * 32]), "F16")
    with pytest.raises(PhiSightError, match="float16 cannot hold; use --quantize q8_0"):
        weights._data(gguf, "x", torch.tensor([[7e4] * 32]), "F16")


@pytest.mark.parametrize("missing", [None, "</s>"])
def test_marks_have_a_line_end_where_llama_cpp_lets_them_swallow_it(missing, assistant, tmp_path):
    content = json.loads((Path(runs.BASE) / "tokenizer.json").read_text(encoding="utf-8"))
    if missing:
        content["added_tokens"] = [m for m in content["added_tokens"] if m["content"] != missing]
        content["model"]["vocab"]["<other>"] = content["model"]["vocab"].pop(missing)
    vocabulary = vocabulary_of(content, 1280)
    assert vocabulary.line_end == ("" if missing else "\n")
    chat_format = assistant.parts.chat_format
    template = certificate.template_of(chat_format, vocabulary.line_end)
    texts = certificate.template_texts(template, chat_format)
    end = vocabulary.line_end
    assert texts[-2][0] == f"<|user|>{end}Is<|placeholder1|>a cat?<|end|>{end}<|assistant|>{end}"


def test_a_full_disk_leaves_nothing(assistant, tmp_path, monkeypatch):
    def full(self, data):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(gguf.GGUFWriter, "write_tensor_data", full)
    out = tmp_path / "out"
    with pytest.raises(PhiSightError, match="out: not written .No space left on device"):
        gguf_export.export_gguf(assistant, out, torch.float16, runs_probe(), None, "f16", "python")
    assert [*tmp_path.iterdir()] == []


def test_llama_cpp_is_mended_in_one_place_or_not_at_all():
    wrong = f"a\n        inp = {builder.WRONG};\nb\n"
    right = f"a\n        inp = {builder.RIGHT};\nb\n"
    assert builder.mended(wrong) == right and builder.mended(right) == right
    with pytest.raises(
        PhiSightError, match="is not as this tool knows it; see whether issue 25814"
    ):
        builder.mended("something else")


def test_the_fault_of_llama_cpp_is_told_from_others(assistant, monkeypatch):
    """Embeddings as a llama.cpp gives them that reads pictures one place off, and as a right one
    does, rounded."""
    probe, spec = runs_probe(), assistant.parts.vision
    names = [*dict.fromkeys(name for prompt in probe.prompts for name in prompt.images)][:2]
    pictures = [certificate.load_image(Path(assistant.config.images[0]) / name) for name in names]
    shifted = eyes.embeddings_behind_class(spec, assistant.model, pictures)
    right = assistant.model.projector(torch.stack([probe.store.features_of(n) for n in names]))

    def told(values: torch.Tensor) -> asked.Told:
        made = {
            prefix + name: value.half().float().numpy()
            for prefix in (certificate.RIGHT, certificate.PREPARED)
            for name, value in zip(names, values.detach())
        }
        return asked.Told([], [], [], made, "0.0", "")

    facts = certificate.picture_differences(assistant, probe, told(right))
    assert 0 < facts["relative_difference"]["prepared_by_us"]["largest"] < 1e-3
    with pytest.raises(PhiSightError, match="one place off, its issue 25814"):
        certificate.picture_differences(assistant, probe, told(shifted))
    other = certificate.picture_differences(assistant, probe, told(-right))  # told, not named
    assert other["relative_difference"]["prepared_by_us"]["mean"] == pytest.approx(2, abs=0.01)


# -- what llama.cpp makes of it -------------------------------------------------------------------


def write_random(path: Path, model: LanguageModel, quantise: str = "f16") -> None:
    """A GGUF of a decoder of ours, without a vocabulary."""

    def describe(writer: Any) -> None:
        writer.add_string("tokenizer.ggml.model", "no_vocab")
        writer.add_quantization_version(2)
        language.describe(writer, model.config)

    values = [
        (language.gguf_name(name), tensor)
        for name, tensor in merged_state(model)
        if not (name == "lm_head.weight" and model.config.tie_word_embeddings)
    ]
    factors = language.factors_of(model.config)
    values += [(name, torch.tensor(value)) for name, value in factors.items()]
    shapes = language.shapes_of(model.config)
    kinds = {n: (shapes[n], weights.kind_of(n, shapes[n], quantise)) for n, _ in values}
    assert kinds.keys() == shapes.keys()
    weights.write(path, language.PHI3.name, describe, kinds, values)


@needs_llama
@pytest.mark.parametrize("length", [200, 300])
@pytest.mark.parametrize("fields", [{}, {"tie_word_embeddings": True}], ids=["own", "tied"])
def test_llama_cpp_computes_the_decoder(length, fields, tmp_path):
    """Grouped heads and LongRoPE on both sides of its crossing, from logits of our own decoder."""
    hub = random_model.longrope_config(256)
    for name, value in fields.items():
        setattr(hub, name, value)
    model = random_model.ours_of(random_model.hub_model(hub)).eval()
    for parameter in model.parameters():
        parameter.data = parameter.data.half().float()
    write_random(tmp_path / "a.gguf", model)
    ids = torch.randint(0, 96, (length,), generator=torch.Generator().manual_seed(length))
    ours = random_model.logits_of(model, ids).double().log_softmax(-1)
    expected = ours[:-1].gather(1, ids[1:, None])[:, 0]
    assert LLAMA is not None
    told = asked.ask(
        LLAMA,
        asked.Asked(
            tmp_path / "a.gguf",
            None,
            image_id=96,
            conversations=[asked.Conversation(ids.tolist(), [True] * length)],
            longest=0,
        ),
    )
    [values] = told.log_probabilities
    assert len(values) == length - 1
    wrong = numpy.abs(values - expected.numpy())
    assert wrong.mean() < 0.02 and wrong.max() < 0.2, (wrong.mean(), wrong.max())


@needs_llama
def test_a_file_that_is_none_is_one_line(tmp_path):
    (tmp_path / "a.gguf").write_bytes(b"GGUF nothing")
    reason = "llama.cpp: .*gguf.*; .*a.gguf: llama.cpp does not load it; if its version"
    with pytest.raises(PhiSightError, match=reason):
        asked.ask(str(LLAMA), asked.Asked(tmp_path / "a.gguf", None, 0))


@needs_llama
@pytest.mark.parametrize("quantise", ["f16", "q8_0", "q4_0", "q4_k_m"])
def test_llama_cpp_says_what_the_run_says(quantise, tmp_path):
    out = tmp_path / "out"
    flags = [f"--run={runs.finished_run()}", f"--gguf={out}", f"--quantize={quantise}"]
    try:
        loose = ["--greedy-answers=8", "--max-loss-difference=0.1", "--min-greedy-equal=60"]
        assert export.main([*flags, *loose]) == 0
    except PhiSightError as error:
        assert "one place off, its issue 25814" in str(error) and not out.exists()
        pytest.skip("this llama.cpp reads pictures one place off, and was refused for it")
    found = json.loads((out / gguf_export.CERTIFICATE).read_text())
    exact = quantise in ("f16", "q8_0")
    for seen in ("with_picture", "without_picture"):
        assert found[seen]["mean_difference"] < (0.03 if exact else 0.2)
        assert found[seen]["greedy_equal"] >= (99 if exact else 60)
    assert found["pictures"]["relative_difference"]["prepared_by_us"]["largest"] < 0.002
    assert found["files"].keys() >= {f"model-{quantise}.gguf", "mmproj-f16.gguf", "Modelfile"}
    assert not (out / gguf_export.IN_16_BITS).exists() or quantise == "f16"
