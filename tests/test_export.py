"""Ways out and in: what other programs compute with what was written, and what is refused."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
from pathlib import Path

import bitsandbytes as bnb
import peft
import pytest
import random_model
import runs
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoProcessor,
    AutoTokenizer,
    CLIPModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaForConditionalGeneration,
    Phi3Config,
    Phi3ForCausalLM,
)

import checkpoints
import export
import exports.llava
import exports.merge
import exports.prune
import exports.requantize
from assistant.assistant import Assistant
from config import default_config, replace
from data.chat import ChatFormat, load_tokenizer, render
from data.dataset import Message, Part
from errors import PhiSightError
from exports import calibrate, measure, peft_adapter, seed
from exports.folder import new_folder
from exports.measure import CERTIFICATE, Tolerance
from lora.inject import inject
from lora.layer import LoRALinear, secure_four_bit
from lora.merge import base_weight, merged_state, merged_weight
from lora.state import lora_state
from model.base import load_base
from model.build import model_state
from model.decoder import LanguageModel
from model.phi3 import decoder_config
from model.vision import VisionTower

REAL_TOKENIZER = runs.ROOT.parent / "shared" / "real" / "phi-3-mini-tokenizer"
ANSWERS = "--greedy-answers=8"
BASE, VISION = f"--base={runs.BASE}", f"--vision={runs.VISION}"


@pytest.fixture(scope="module")
def assistant() -> Assistant:
    """A trained run whose adapter and projector do something. Tests only read it."""
    return runs.assistant()


@pytest.fixture(scope="module")
def probe(assistant) -> measure.Probe:
    return measure.make_probe(assistant, 8)


@pytest.fixture(scope="module")
def merged(tmp_path_factory) -> Path:
    """What `--merge --dtype float32` writes: without rounding, so that equal means equal."""
    out = tmp_path_factory.mktemp("merged") / "model"
    assert (
        export.main(
            ["--merge", f"--out={out}", f"--run={runs.finished_run()}", "--dtype=float32", ANSWERS]
        )
        == 0
    )
    return out


@pytest.fixture(scope="module")
def llava(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("llava") / "model"
    assert (
        export.main([f"--llava={out}", f"--run={runs.finished_run()}", "--dtype=float32", ANSWERS])
        == 0
    )
    return out


def test_losses_are_measured_on_as_many_conversations_as_asked(tmp_path):
    out = tmp_path / "model"
    assert (
        export.main(
            [
                "--merge",
                f"--out={out}",
                f"--run={runs.finished_run()}",
                "--dtype=float32",
                "--evaluation-conversations=2",
                ANSWERS,
            ]
        )
        == 0
    )
    [certificate] = out.glob("*certificate.json")
    assert json.loads(certificate.read_text())["measured_on"]["conversations"] == 2
    with pytest.raises(PhiSightError, match="--evaluation-conversations must be at least 1"):
        export.main(
            [
                "--merge",
                f"--out={tmp_path / 'no'}",
                f"--run={runs.finished_run()}",
                "--evaluation-conversations=0",
            ]
        )
    assert not (tmp_path / "no").exists()


def text_ids(assistant: Assistant) -> torch.Tensor:
    asked = [Message("user", (Part("text", "How many red stars are there?"),))]
    prompt = render(asked, assistant.parts.chat_format, add_generation_prompt=True)
    return torch.tensor([prompt.input_ids])


@torch.no_grad()
def logits_of(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """(1, tokens, vocabulary) of a model of transformers or of ours."""
    if isinstance(model, LanguageModel):
        return random_model.logits_of(model.eval(), ids[0])[None]
    return model.eval()(input_ids=ids).logits


def logits_over(model: LanguageModel, embeddings: torch.Tensor) -> torch.Tensor:
    """(1, tokens, dim) embeddings -> (1, tokens, vocabulary)."""
    length = embeddings.shape[1]
    return model.lm_head(model.model(embeddings, torch.arange(length)[None], [length]))


def drawn_phi3(seed: int = 0, **fields: object) -> Phi3ForCausalLM:
    """A small Phi-3 with grouped keys and values; with full rotary it is Llama, fused."""
    config = Phi3Config(
        **{
            "vocab_size": 96,
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 64,
            "original_max_position_embeddings": 64,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "tie_word_embeddings": False,
            "sliding_window": None,
        }
        | fields
    )
    torch.manual_seed(seed)
    model = Phi3ForCausalLM(config).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    return model


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


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) / 8


# -- merging ---------------------------------------------------------------------------------------


def test_the_merged_folder_is_a_phi3_of_transformers_with_equal_logits(merged, assistant):
    theirs = AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32)
    assert type(theirs) is Phi3ForCausalLM
    for name, layer in assistant.parts.base.model.named_modules():
        if isinstance(layer, LoRALinear):
            assert torch.equal(theirs.get_submodule(name).weight, merged_weight(layer)), name
    ids = text_ids(assistant)
    ours = logits_of(assistant.parts.base.model, ids)
    torch.testing.assert_close(logits_of(theirs, ids), ours, atol=1e-5, rtol=1e-5)
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (merged / name).read_bytes() == (runs.BASE / name).read_bytes()
    assert load_tokenizer(merged)("a red star").input_ids == (
        assistant.parts.base.tokenizer("a red star").input_ids
    )


def test_the_certificate_says_what_was_measured_and_on_what(merged, assistant, probe):
    found = json.loads((merged / CERTIFICATE).read_text())
    before = measure.measure(assistant, probe, "")
    assert found["loss_before"] == before.loss
    assert found["loss_difference"] == found["loss_after"] - found["loss_before"]
    assert abs(found["loss_difference"]) < 1e-5 and found["greedy_equal"] == 100
    assert found["tolerance"] == {"loss_difference": 0.01, "greedy_equal": 99.0}
    checkpoint = checkpoints.resolve(runs.finished_run())
    on = found["measured_on"]
    assert on["data_fingerprint"] == checkpoint.config["data_fingerprint"]
    assert on["data_are_those_of_the_run"] and on["questions"] == 8
    assert on["conversations"] == sum(len(samples) for _, samples in probe.batches)
    assert found["weights_digest"] == checkpoints.weights_digest(checkpoint.state)
    assert found["dtype"] == "float32" and found["versions"]["torch"] == torch.__version__
    assert set(found["files"]) == {path.name for path in merged.iterdir()} - {CERTIFICATE}


def test_sixteen_bits_are_measured_as_they_were_written(tmp_path, assistant, probe):
    found = exports.merge.export_merged(
        assistant, tmp_path / "half", torch.bfloat16, probe, Tolerance(0.05, 0)
    )
    assert found["loss_difference"] != 0 and found["dtype"] == "bfloat16"
    state = load_file(tmp_path / "half/model.safetensors")
    assert {tensor.dtype for tensor in state.values()} == {torch.bfloat16}
    for name, tensor in merged_state(assistant.parts.base.model):
        assert torch.equal(state[name], tensor.to(torch.bfloat16)), name
    assert (tmp_path / "half/model.safetensors").stat().st_mode & 0o777 == (
        tmp_path / "half/config.json"
    ).stat().st_mode & 0o777


def original_weights(model: nn.Module):
    """The merge that goes wrong: into the weights as they were before NF4 rounded them."""
    original = load_base(runs.BASE, None, torch.float32, "cpu", "none").model.state_dict()
    for name, tensor in merged_state(model):
        layer = model.get_submodule(name.removesuffix(".weight"))
        if isinstance(layer, LoRALinear):
            tensor = tensor - base_weight(layer.base) + original[name]
        yield name, tensor


def without_scaling(model: nn.Module):
    for name, tensor in merged_state(model):
        layer = model.get_submodule(name.removesuffix(".weight"))
        if isinstance(layer, LoRALinear):
            tensor = base_weight(layer.base) + 30 * layer.lora_B @ layer.lora_A
        yield name, tensor


def test_a_merge_into_the_original_weights_shows_in_the_certificate(
    tmp_path, assistant, probe, merged, monkeypatch
):
    right = json.loads((merged / CERTIFICATE).read_text())
    monkeypatch.setattr(exports.merge, "merged_state", original_weights)
    wrong = exports.merge.export_merged(
        assistant, tmp_path / "wrong", torch.float32, probe, Tolerance(1e9, 0)
    )
    assert abs(wrong["loss_difference"]) > 100 * abs(right["loss_difference"])


@pytest.mark.parametrize("module", [exports.merge, exports.llava])
def test_past_the_tolerance_nothing_is_written(tmp_path, monkeypatch, module, assistant, probe):
    monkeypatch.setattr(module, "merged_state", without_scaling)
    write = module.export_merged if module is exports.merge else module.export_llava
    with pytest.raises(PhiSightError, match=r"refused.* loss went from \d.*greedy answers"):
        write(assistant, tmp_path / "out", torch.float32, probe, Tolerance())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("loss", "equal", "within"),
    [
        (0.01, 99.0, True),
        (-0.01, 100.0, True),
        (0.011, 100.0, False),
        (-0.011, 100.0, False),
        (0.0, 98.0, False),
        (float("nan"), 100.0, False),
    ],
)
def test_tolerance_is_two_sided_and_no_number_is_within_none(assistant, probe, loss, equal, within):
    answers = [str(i) for i in range(100)]
    other = ["another"] * int(100 - equal) + answers[int(100 - equal) :]
    found = measure.certificate(
        "merge",
        assistant,
        probe,
        measure.Measured(0.0, answers),
        measure.Measured(loss, other),
        Tolerance(),
    )
    assert found["within_tolerance"] is within and found["greedy_equal"] == equal
    if not within:
        with pytest.raises(PhiSightError, match="refused"):
            measure.check(found)


def test_a_weight_that_float16_cannot_hold_is_refused(tmp_path, assistant, probe, monkeypatch):
    def large(model):
        for name, tensor in merged_state(model):
            yield name, tensor * (1e6 if name == "lm_head.weight" else 1)

    monkeypatch.setattr(exports.merge, "merged_state", large)
    with pytest.raises(PhiSightError, match="lm_head.weight: holds values that float16"):
        exports.merge.export_merged(assistant, tmp_path / "out", torch.float16, probe, Tolerance())
    assert list(tmp_path.iterdir()) == []


def test_a_folder_is_written_whole_or_not_at_all(tmp_path):
    out = tmp_path / "deep" / "out"
    for error in (KeyboardInterrupt, PhiSightError, OSError):
        with pytest.raises((error, PhiSightError)), new_folder(out) as folder:
            (folder / "half.json").write_text("{")
            raise error
        assert list(out.parent.iterdir()) == []
    with new_folder(out) as folder:
        (folder / "whole.json").write_text("{}")
    assert [path.name for path in out.iterdir()] == ["whole.json"]
    with pytest.raises(PhiSightError, match="is there already"), new_folder(out):
        pass


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--merge"], "--out: not given"),
        ([], "required"),
        (["--merge", "--peft=x"], "not allowed"),
        (["--merge", "--out=x", "--split"], "--split: goes with --peft"),
        (["--merge", "--out=x", "--max-loss-difference=nan"], "must be 0 or more"),
        (["--merge", "--out=x", "--min-greedy-equal=101"], "0 to 100"),
        (["--merge", "--out=x", "--greedy-answers=0"], "at least 1"),
        (["--merge", "--out=x", "--run=nowhere"], "no checkpoint in nowhere"),
        (["--import-seed=nowhere"], "--out: not given"),
        (["--merg", "--out=x"], "required"),
    ],
)
def test_bad_flags_are_told_in_words(arguments, message):
    if "--run=nowhere" not in arguments:
        arguments = [*arguments, f"--run={runs.finished_run()}"]
    with pytest.raises(PhiSightError, match=message):
        export.main(arguments)


def test_the_command_prints_one_line_and_exits_with_a_code(tmp_path):
    out = tmp_path / "out"
    done = runs.command(
        "export.py",
        "--merge",
        "--out",
        out,
        "--run",
        runs.finished_run(),
        ANSWERS,
        "--max-loss-difference",
        "0",
        "--min-greedy-equal",
        "100",
    )
    assert "refused" in runs.assert_one_line_error(done) and not out.exists()


def test_a_run_without_held_out_questions_is_asked_about_its_validation(assistant):
    config = replace(assistant.config, held_out_questions="")
    asked = Assistant(assistant.parts, config, assistant.source)
    probe = measure.make_probe(asked, 3)
    assert probe.facts["questions_from"] == "validation conversations"
    assert 0 < len(probe.prompts) <= 3
    for prompt in probe.prompts:
        assert prompt.input_ids[-1] == assistant.parts.chat_format.assistant_id
        assert prompt.images and not any(prompt.supervised)


# -- PEFT ------------------------------------------------------------------------------------------


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


# -- LLaVA -----------------------------------------------------------------------------------------


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


def pictures() -> list[Image.Image]:
    return [Image.open(runs.world() / f"images/train_00000{i}.png").convert("RGB") for i in (0, 1)]


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


@torch.no_grad()
def test_llava_generates_what_we_answer(llava, assistant):
    processor = AutoProcessor.from_pretrained(llava)
    theirs = LlavaForConditionalGeneration.from_pretrained(llava, dtype=torch.float32).eval()
    path = str(runs.world() / "images/train_000000.png")
    message = Message("user", (Part("image", path), Part("text", "Describe the picture.")))
    inputs = processor(
        images=pictures()[:1],
        return_tensors="pt",
        text=(processor.apply_chat_template(their_form([message]), add_generation_prompt=True)),
    )
    made = theirs.generate(**inputs, max_new_tokens=12, do_sample=False)
    answer = processor.decode(made[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert answer.strip() == "".join(assistant.reply([message], 12)).strip()


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


# -- the seed project's checkpoints ----------------------------------------------------------------


@pytest.fixture
def seed_folder(tmp_path) -> Path:
    """A checkpoint as the seed project's training wrote it, for the tiny base and CLIP."""
    base = load_base(runs.BASE, None, torch.float32, "cpu", "none").model
    lora: dict[str, object] = {}
    for number, (name, layer) in enumerate(base.named_modules()):
        if name.endswith(("o_proj", "down_proj")):
            outputs, inputs = layer.weight.shape
            lora[f"{name}.lora_A.weight"] = draw(4, inputs, seed=number).half()
            lora[f"{name}.lora_B.weight"] = draw(outputs, 4, seed=number + 99).half()
            lora[f"{name}.scaling"] = {"default": 1.5}
    read = CLIPModel.from_pretrained(runs.VISION).visual_projection.out_features
    hidden, dim = 24, base.config.hidden_size
    projector = {
        "layer1.weight": draw(hidden, read, seed=1),
        "layer1.bias": draw(hidden, seed=2),
        "layer2.weight": draw(dim, hidden, seed=3),
        "layer2.bias": draw(dim, seed=4),
        "initial_weights1": draw(hidden, read),
        "initial_weights2": draw(dim, hidden),
    }
    folder = tmp_path / "checkpoint-50"
    folder.mkdir()
    torch.save(lora, folder / seed.LORA)
    torch.save(projector, folder / seed.PROJECTOR)
    return folder


def import_seed(folder: Path, out: Path) -> int:
    return export.main([f"--import-seed={folder}", f"--out={out}", BASE, VISION])


@torch.no_grad()
def test_a_seed_checkpoint_becomes_a_run_that_computes_the_same(seed_folder, tmp_path):
    assert import_seed(seed_folder, tmp_path / "run") == 0
    back = Assistant.load(tmp_path / "run")
    lora = torch.load(seed_folder / seed.LORA, weights_only=True)
    state = lora_state(back.parts.base.model)
    assert len(state) == len(lora)
    for name, tensor in state.items():
        given = lora.get(f"{name}.weight", lora.get(name))
        wanted = torch.tensor(given["default"]) if isinstance(given, dict) else given.float()
        assert torch.equal(tensor, wanted), name
    # Its projector read what CLIP gives after its own projection, with a hidden layer of its own.
    tower = VisionTower(back.parts.vision)
    clip = CLIPModel.from_pretrained(runs.VISION, dtype=torch.float32).eval()
    vector = clip.get_image_features(tower.prepare(pictures()[:1]))
    vector = getattr(vector, "pooler_output", vector)
    weights = torch.load(seed_folder / seed.PROJECTOR, weights_only=True)
    hidden = nn.functional.gelu(vector @ weights["layer1.weight"].T + weights["layer1.bias"])
    wanted = hidden @ weights["layer2.weight"].T + weights["layer2.bias"]
    torch.testing.assert_close(
        back.model.projector(tower(pictures()[:1]))[:, 0], wanted, atol=1e-5, rtol=1e-4
    )
    message = Message(
        "user",
        (Part("image", str(runs.world() / "images/train_000000.png")), Part("text", "What is it?")),
    )
    assert isinstance("".join(back.reply([message], 4)), str)


class Bomb:
    """Its pickle would run a command."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self):
        return os.system, (f"touch {self.mark}",)


@pytest.mark.parametrize("name", [seed.LORA, seed.PROJECTOR])
def test_code_in_a_seed_file_is_refused_and_does_not_run(seed_folder, tmp_path, name):
    content = torch.load(seed_folder / name, weights_only=True)
    mark = tmp_path / "ran"
    torch.save(content | {"extra": Bomb(mark)}, seed_folder / name)
    with pytest.raises(PhiSightError, match=f"{name}: is not read, .*such as code"):
        import_seed(seed_folder, tmp_path / "run")
    assert not mark.exists() and not (tmp_path / "run").exists()


O_PROJ = "model.layers.0.self_attn.o_proj"


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        (seed.LORA, {f"{O_PROJ}.lora_A.weight": torch.zeros(4, 3)}, "not a float tensor of anyx"),
        (seed.LORA, {f"{O_PROJ}.lora_A.weight": [1, 2]}, "is list, not a tensor"),
        (seed.LORA, {f"{O_PROJ}.lora_A.weight": torch.zeros(3, 128)}, "ranks"),
        (seed.LORA, {f"{O_PROJ}.scaling": {"default": "1"}}, "not a positive number"),
        (seed.LORA, {f"{O_PROJ}.scaling": 2.0}, r"scales \[1.5, 2.0\]"),
        (seed.LORA, {f"{O_PROJ}.lora_embedding_A": {"x": torch.zeros(1)}}, "belongs to no layer"),
        (seed.LORA, {"model.layers.99.mlp.down_proj.scaling": 1.5}, "belongs to no layer"),
        (seed.LORA, {"model.layers.0.self_attn.q_proj.scaling": 1.5}, "belongs to no layer"),
        (seed.LORA, {"model.layers.99.mlp\n.x": 1.5}, "belongs to no layer"),
        (seed.LORA, {f"{O_PROJ}.lora_B.weight": None}, "is NoneType"),
        (seed.PROJECTOR, {"linear.weight": torch.zeros(1)}, "holds .*linear.weight"),
        (seed.PROJECTOR, {"layer1.bias": torch.zeros(3)}, "layer1.bias is .3,. float32"),
        (seed.PROJECTOR, {"layer1.weight": torch.zeros(24, 5)}, "reads vectors of 5 numbers"),
        (seed.PROJECTOR, {"layer2.bias": torch.tensor(float("nan")).expand(1)}, "layer2.bias"),
    ],
)
def test_a_seed_file_with_anything_unexpected_is_refused(
    seed_folder, tmp_path, name, change, message
):
    content = torch.load(seed_folder / name, weights_only=True)
    torch.save(content | change, seed_folder / name)
    with pytest.raises(PhiSightError, match=message) as caught:
        import_seed(seed_folder, tmp_path / "run")
    assert name in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04" + b"\0" * 40, b"not a torch file", None])
def test_a_seed_file_that_is_none_is_named(seed_folder, tmp_path, content):
    (seed_folder / seed.LORA).unlink()
    if content is not None:
        (seed_folder / seed.LORA).write_bytes(content)
    with pytest.raises(PhiSightError, match=seed.LORA):
        import_seed(seed_folder, tmp_path / "run")
    torch.save([1, 2], seed_folder / seed.LORA)
    with pytest.raises(PhiSightError, match="no dictionary of names"):
        import_seed(seed_folder, tmp_path / "run")


def test_a_layer_that_a_seed_file_lacks_is_named(seed_folder, tmp_path):
    content = torch.load(seed_folder / seed.LORA, weights_only=True)
    short = {key: value for key, value in content.items() if not key.startswith(O_PROJ)}
    torch.save(short, seed_folder / seed.LORA)
    with pytest.raises(PhiSightError, match=f"missing {re.escape(O_PROJ)}.lora_A"):
        import_seed(seed_folder, tmp_path / "run")


def test_the_merged_tokenizer_gives_its_ids_in_transformers_too(merged, assistant):
    theirs = AutoTokenizer.from_pretrained(merged)
    text = "<|user|>\nWhat is it?<|end|>\n<|assistant|>\n"
    assert theirs(text, add_special_tokens=False).input_ids == (
        assistant.parts.base.tokenizer(text, add_special_tokens=False).input_ids
    )


# -- 4 bits again ----------------------------------------------------------------------------------


def bnb_weight(weight: torch.Tensor, block: int) -> torch.Tensor:
    """What bitsandbytes makes of a weight in NF4."""
    data, state = bnb.functional.quantize_4bit(weight, blocksize=block, quant_type="nf4")
    return bnb.functional.dequantize_4bit(data, state)


@pytest.mark.parametrize("block", [32, 64])
def test_naive_rounding_is_that_of_bitsandbytes(block):
    weight = draw(6, 2 * block, seed=block)
    ours = exports.requantize.round_naively(weight, block).weight()
    torch.testing.assert_close(ours, bnb_weight(weight, block), atol=1e-6, rtol=1e-6)


def test_without_correlations_there_is_nothing_to_compensate():
    weight = draw(6, 128)
    plain = exports.requantize.round_naively(weight, 64)
    same = exports.requantize.round_with_compensation(weight, torch.eye(128), 64)
    assert torch.equal(plain.codes, same.codes) and torch.equal(plain.scales, same.scales)


def test_compensation_takes_most_of_the_error_at_the_output():
    inputs = draw(500, 24, seed=1) @ draw(24, 128, seed=2) + draw(500, 128, seed=3) / 20
    weight, moment = draw(16, 128), inputs.T @ inputs
    errors = {}
    for name, made in (
        ("naive", exports.requantize.round_naively(weight, 64)),
        ("gptq", exports.requantize.round_with_compensation(weight, moment, 64)),
    ):
        errors[name] = (inputs @ (made.weight() - weight).T).norm()
        assert made.codes.max() < 16
    assert errors["gptq"] < errors["naive"] / 2


def test_packed_codes_are_what_bitsandbytes_multiplies_by():
    value = exports.requantize.round_naively(draw(6, 128), 64)
    tensors = exports.requantize.packed("x", value, 64, torch.float32)
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
    ours = exports.requantize.read_back(assistant, requantized, torch.float32).parts.base.model
    ids = text_ids(assistant)
    torch.testing.assert_close(logits_of(theirs, ids), logits_of(ours, ids), atol=1e-5, rtol=1e-5)
    assert not torch.equal(logits_of(ours, ids), logits_of(assistant.parts.base.model, ids))


def test_its_certificate_has_both_roundings(requantized, assistant, probe):
    found = json.loads((requantized / exports.requantize.CERTIFICATE).read_text())
    before = measure.measure(assistant, probe, "").loss
    written = exports.requantize.read_back(assistant, requantized, torch.float32)
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

    def error(made: exports.requantize.FourBit) -> float:
        change = made.weight() - weight
        return (change @ moment * change).sum().item()

    better = exports.requantize.round_with_compensation(weight, moment, 64)
    assert error(better) < error(exports.requantize.round_naively(weight, 64)) / 2


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
    model, batches = (
        calibrate.language_model_in(merged),
        calibrate.calibration_batches(assistant, probe, 4),
    )
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
    model, batches = (
        calibrate.language_model_in(merged),
        calibrate.calibration_batches(assistant, probe, 8),
    )
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
