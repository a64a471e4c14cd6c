"""The command, merging, and the certificate: what is measured, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import exporting
import pytest
import runs
import torch
from exporting import ANSWERS, logits_of, text_ids
from safetensors.torch import load_file
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Phi3ForCausalLM,
)

import checkpoints
import export
import exports.llava
import exports.merge
import exports.prune
import exports.requantize
from assistant.assistant import Assistant
from config import replace
from data.chat import load_tokenizer
from errors import PhiSightError
from exports import measure, table
from exports.folder import new_folder
from exports.form import Form
from exports.measure import CERTIFICATE, Tolerance
from lora.layer import LoRALinear
from lora.merge import merged_state, merged_weight
from model.base import load_base
from ops.nf4 import base_weight


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


def test_the_merged_folder_is_a_phi3_of_transformers_with_equal_logits(merged, assistant):
    theirs = AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32)
    assert type(theirs) is Phi3ForCausalLM
    for name, layer in assistant.parts.base.model.named_modules():
        if isinstance(layer, LoRALinear):
            assert torch.equal(theirs.get_submodule(name).weight, merged_weight(layer)), name
    ids = text_ids(assistant)
    ours = logits_of(assistant.parts.base.model, ids)
    torch.testing.assert_close(logits_of(theirs, ids), ours, atol=1e-5, rtol=1e-5)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (merged / name).read_bytes() == (runs.BASE / name).read_bytes()
    assert load_tokenizer(merged).full("a red star").input_ids == (
        assistant.parts.base.tokenizer.full("a red star").input_ids
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
    assert found["provenance"]["weights_digest"] == checkpoints.weights_digest(checkpoint.state)
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


def without_scaling(model: nn.Module, adapter: bool = True):
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
    found = measure.certificate_of(
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
        assert list(tmp_path.iterdir()) == []  # nor the folder that was made for it
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
        (["--peft=x", "--out=y"], "--out: --peft x names the folder already"),
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
        assert prompt.input_ids[-1:] == [*assistant.parts.chat_format.openings["assistant"]]
        assert prompt.images and not any(prompt.supervised)


def test_the_merged_tokenizer_gives_its_ids_in_transformers_too(merged, assistant):
    theirs = AutoTokenizer.from_pretrained(merged)
    text = "<|user|>\nWhat is it?<|end|>\n<|assistant|>\n"
    assert theirs(text, add_special_tokens=False).input_ids == (
        assistant.parts.base.tokenizer.full(text, add_special_tokens=False).input_ids
    )


# -- the fields of the run that an export depends on -----------------------------------------------


def test_features_are_read_as_the_run_stored_them(tmp_path):
    """With float16 features the data would not be those of a run that was trained on int8 ones."""
    run, features = tmp_path / "run", tmp_path / "features"
    runs.start(run, features=features, feature_storage="int8", **runs.SHORT)
    before = runs.contents(features)
    probe = measure.make_probe(Assistant.load(run), 2)
    assert probe.store.storage == "int8"
    assert probe.facts["data_are_those_of_the_run"]
    [stored] = [path for path in features.iterdir() if path.name != "pictures"]
    assert stored.name.endswith("-int8")
    shards = {name for name in runs.contents(features) if name.endswith(".safetensors")}
    assert {name for name in before if name.startswith(stored.name)} <= shards


def test_data_that_have_moved_are_found_by_flags(tmp_path):
    """The errors about missing data name these flags."""
    moved, out = tmp_path / "moved", tmp_path / "out"
    shutil.copytree(runs.world(), moved)
    export.main(
        [
            *("--merge", f"--out={out}", f"--run={runs.finished_run()}", "--greedy-answers=2"),
            *(f"--data={moved / 'train.json'}", f"--images={moved / 'images'}"),
            f"--held-out-questions={moved / 'held_out.jsonl'}",
            f"--features={tmp_path / 'features'}",
            "--dtype=float32",
        ]
    )
    on = json.loads((out / CERTIFICATE).read_text())["measured_on"]
    assert on["data"] == str(moved / "train.json") and on["data_are_those_of_the_run"]
    assert on["questions_from"] == str(moved / "held_out.jsonl")
    assert list((tmp_path / "features").glob("*-float16/shard-*.safetensors"))


# -- the table of forms ----------------------------------------------------------------------------


def test_a_new_form_is_one_line_in_the_table(tmp_path, capsys, monkeypatch):
    form = Form(
        lambda options: f"{options.demo}, {options.letters}",
        {"metavar": "DIR"},
        {"--letters": {"type": int, "default": 3}},
    )
    monkeypatch.setitem(table.FORMS, "--demo", form)
    assert export.main(["--demo=x", "--letters=4"]) == 0
    assert capsys.readouterr().out == "x, 4\n"
    with pytest.raises(PhiSightError, match="--letters: goes with --demo only"):
        export.main(["--merge", "--out=x", "--letters=4"])
    with pytest.raises(PhiSightError, match="not allowed with"):
        export.main(["--merge", "--demo=x"])


@pytest.mark.parametrize("flag", ["--llava", "--peft"])
def test_a_folder_without_a_name_is_refused(flag):
    with pytest.raises(PhiSightError, match=f"{flag}: not given; name the folder to write"):
        export.main([f"{flag}="])
