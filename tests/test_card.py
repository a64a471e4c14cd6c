"""The model card, and the one chain from the data over the weights to what a server says."""

from __future__ import annotations

import functools
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import markdown_it
import pytest
import runs
import yaml
from exporting import merged
from huggingface_hub import ModelCard
from hypothesis import given, settings
from hypothesis import strategies as st
from live_server import live

import checkpoints
import export
import infer
import manifest
from checkpoint_state import Checkpoint
from errors import PhiSightError
from exports import peft_adapter
from exports.measure import CERTIFICATE
from reports.card import CARD, license_of_base, model_card, provenance
from reports.card_forms import FORMS
from reports.log import read_metrics

MARKDOWN = markdown_it.MarkdownIt("commonmark").enable("table")
ALIGNMENT = {"right": 50.0, "swapped": 48.0, "blank": 40.0, "gap": 2.0}


def finished() -> tuple[Checkpoint, list[dict]]:
    checkpoint = checkpoints.resolve(runs.finished_run())
    return checkpoint, checkpoints.records_of(checkpoint)


def head_of(card: str) -> dict:
    assert card.startswith("---\n")
    return yaml.safe_load(card.split("\n---\n", 1)[0])


def changed(checkpoint: Checkpoint, **fields: object) -> Checkpoint:
    config = checkpoint.config["config"] | fields
    return replace(checkpoint, config=checkpoint.config | {"config": config})


# -- one chain ------------------------------------------------------------------------------------


def test_one_digest_from_the_log_to_a_server(tmp_path, capsys):
    """Log, checkpoint, merged folder, adapter, infer.py and /v1/models say the same; another run
    says another."""
    run = runs.finished_run()
    records = read_metrics(run / "metrics.jsonl")
    digest = [record["weights_digest"] for record in records if "weights_digest" in record][-1]
    chain = provenance(*finished())
    assert chain["weights_digest"] == digest
    assert chain["weights_digest"] == manifest.weights_digest(finished()[0].state)
    assert chain["chain"] == records[-1]["chain"]
    assert chain["data_fingerprint"] == finished()[0].config["data_fingerprint"]

    assert json.loads((merged() / CERTIFICATE).read_text())["provenance"] == chain
    export.main([f"--peft={tmp_path / 'adapter'}", f"--run={run}", "--license=mit"])
    assert json.loads((tmp_path / f"adapter/{peft_adapter.PROVENANCE}").read_text())[
        "provenance"
    ] == (chain)
    for folder, form in ((merged(), "merge"), (tmp_path / "adapter", "peft")):
        card = (folder / CARD).read_text()
        for key in ("data_fingerprint", "steps_digest", "chain", "weights_digest"):
            assert card.count(chain[key]) >= 1, (folder, key)
        assert FORMS[form].what in card
    assert head_of((tmp_path / "adapter" / CARD).read_text())["license"] == "mit"
    with live(runs.assistant()) as server:
        assert server.client().models.retrieve("tiny").provenance == chain
    capsys.readouterr()
    infer.main(["--run", str(run), "--prompt", "What?", "--max-new-tokens=1", "--json"])
    assert json.loads(capsys.readouterr().out)["weights_digest"] == digest
    checkpoints.main(["show", str(run)])
    assert digest in capsys.readouterr().out

    other = provenance(checkpoints.resolve(runs.stopped_run()))
    differ = {key for key in chain if other[key] != chain[key]}
    assert {"step", "steps_digest", "chain", "weights_digest"} <= differ
    assert other["base_fingerprint"] == chain["base_fingerprint"]


def test_a_card_lists_the_files_that_its_certificate_hashes():
    assert CARD in json.loads((merged() / CERTIFICATE).read_text())["files"]


def test_the_log_of_another_run_makes_no_card():
    checkpoint, records = finished()
    others = read_metrics(runs.finished_run() / "metrics.jsonl")[:-1]
    with pytest.raises(PhiSightError, match="is not that of the log"):
        model_card(checkpoint, others)
    edited = [dict(record) for record in records]
    edited[0]["loss"] = 0.0
    with pytest.raises(PhiSightError, match="does not follow"):
        provenance(checkpoint, edited)
    # Records after the checkpoint, of steps that a resume makes again, are left out.
    later = {"kind": "train", "step": 10**6, "loss": 123456.0, "chain": "later"}
    assert "123456" not in model_card(checkpoint, [*records, later])
    assert model_card(checkpoint, [*records, later]) == model_card(checkpoint, records)


def test_a_checkpoint_of_before_the_counts_goes_on(tmp_path, capsys):
    run = runs.copy_of(runs.stopped_run(), tmp_path)
    folder = checkpoints.checkpoints_in(run)[-1]
    config = json.loads((folder / "config.json").read_text())
    counts = config.pop("data_counts")
    assert counts["training_conversations"] > 0 and counts["pictures"] > 0
    (folder / "config.json").write_text(json.dumps(config))
    body = json.loads((folder / "MANIFEST.json").read_text())
    for row in body["files"]:
        row |= manifest.file_row(folder, row["file"])
    (folder / "MANIFEST.json").write_bytes(manifest.manifest_bytes(body))
    assert checkpoints.verify(folder) == []
    card = model_card(checkpoints.load(folder), [])
    assert "conversations trained on" not in card and "## Where it comes from" in card
    runs.resume(run)
    assert "warning" not in capsys.readouterr().out
    assert checkpoints.resolve(run).config["data_counts"] == counts


# -- what it says ---------------------------------------------------------------------------------


def test_a_card_is_what_the_hub_reads():
    checkpoint, records = finished()
    card = ModelCard(model_card(checkpoint, records, repository="ann/sees"))
    data = card.data
    assert (data.license, data.pipeline_tag, data.library_name) == (
        "apache-2.0",
        "image-text-to-text",
        "phisight",
    )
    assert data.model_name == "sees"
    last = [record for record in records if record.get("kind") == "evaluation"][-1]
    values = {
        (result.metric_type, result.metric_name): result.metric_value
        for result in data.eval_results
    }
    assert values["loss", "nats an answer token"] == last["validation_loss"]
    assert last["alignment"]["right"] in values.values()
    assert "python infer.py --run hf:ann/sees --image" in card.text
    assert "(curves.png)" in card.text and "rank 16, alpha 16" in card.text
    assert "It was trained for" in card.text, "few steps are told"
    counts = checkpoint.config["data_counts"]
    assert f"| conversations trained on | {counts['training_conversations']:,} |" in card.text


def test_the_base_of_the_hub_is_named_and_a_folder_is_not():
    checkpoint, records = finished()
    card = model_card(changed(checkpoint, base="owner/base"), records)
    head = head_of(card)
    assert (head["base_model"], head["base_model_relation"]) == ("owner/base", "adapter")
    card = model_card(changed(checkpoint, base="/home/ann/secret place/base"), records)
    assert "base_model" not in head_of(card) and "home" not in card and "secret" not in card
    assert "`--base`" in card, "who runs it has to say where the base lies"
    whole = model_card(*finished())
    assert str(runs.shared()) not in whole and str(runs.ROOT) not in whole


def test_what_it_cannot_do_follows_from_the_facts():
    checkpoint, records = finished()
    blind = [record for record in records if record.get("kind") != "evaluation"]
    state = checkpoint.trainer_state | {"chain": blind[-1]["chain"] if blind else ""}
    card = model_card(replace(checkpoint, trainer_state=state | {"chain": ""}), [])
    assert "It was not evaluated" in card
    assert "## Curves" not in card
    warned = {"what": "llava", "alignment": ALIGNMENT | {"warning": "it | hardly <b>sees</b>"}}
    card = model_card(checkpoint, records, [warned], form="llava")
    assert "**Warning:** it \\| hardly \\<b\\>sees" in card and "2.0 |" in card
    assert "sees no pictures" in model_card(checkpoint, records, form="merge")
    pooled = changed(checkpoint, vision_features="pooled")
    assert "one vector a picture" in model_card(pooled, records)


def test_the_license_is_the_bases_or_is_given(tmp_path):
    checkpoint, records = finished()
    base = Path(shutil.copytree(runs.BASE, tmp_path / "base"))
    config = replace(runs.assistant().config, base=str(base))
    assert license_of_base(config) == "apache-2.0"
    (base / CARD).unlink()
    assert license_of_base(config) == ""
    (base / CARD).write_text("---\nlanguage: en\nlicense: MIT\n---\nlicense: gpl-3.0\n")
    assert license_of_base(config) == "mit"
    card = model_card(changed(checkpoint, base=str(base)), records)
    assert head_of(card)["license"] == "mit"
    assert head_of(model_card(checkpoint, records, license="apache-2.0"))["license"] == "apache-2.0"
    for wrong in ("MIT license", "a\nb: c", "[x]"):
        with pytest.raises(PhiSightError, match="not an id of the hub"):
            model_card(checkpoint, records, license=wrong)
    (base / CARD).write_text("license: mit\n")
    assert license_of_base(config) == "", "there is no head"
    with pytest.raises(PhiSightError, match="--license"):
        export.main(["--merge", "--out=x", "--license=no such"])


def test_the_family_is_the_bases(tmp_path):
    """By the name that its config.json has for it, in the head's tags and in the first lines."""
    checkpoint, records = finished()
    card = model_card(checkpoint, records)
    assert head_of(card)["tags"] == ["phisight", "lora", "phi3", "vision"]
    base = tmp_path / "base"
    base.mkdir()
    elsewhere = changed(checkpoint, base=str(base))
    for described, tags in (
        ('{"model_type": "qwen3"}', ["phisight", "lora", "qwen3", "vision"]),
        ('{"model_type": "a: [b"}', ["phisight", "lora", "vision"]),
        ('{"model_type": 3}', ["phisight", "lora", "vision"]),
        ("no JSON", ["phisight", "lora", "vision"]),
    ):
        (base / "config.json").write_text(described)
        assert head_of(model_card(elsewhere, records))["tags"] == tags
    (base / "config.json").unlink()
    assert "of the type" not in model_card(elsewhere, records)
    card = model_card(elsewhere, records, model_type="llama")
    assert "The base is a folder `base`, of the type `llama`." in card
    assert head_of(card)["tags"] == ["phisight", "lora", "llama", "vision"]


# -- text of unknown origin -----------------------------------------------------------------------

HOSTILE = st.one_of(
    st.text(max_size=40),
    st.sampled_from(
        [
            "x: y\n---\nlicense: mit",
            "](http://evil.example) ![x](http://evil.example/x.png)",
            "<script>alert(1)</script>",
            "`|`` a | b \\| c\n\n# heading",
            "{where} %s {0}",
            "- !!python/object:os.system",
            "\ud800\x1b[2J\u202e",
            "<!-- ",
            "www.evil.example http://evil.example",
        ]
    ),
)


@settings(max_examples=25)
@given(HOSTILE, HOSTILE, HOSTILE, st.lists(HOSTILE, min_size=1, max_size=3))
def test_no_text_of_a_config_does_anything_in_a_card(run, base, vision, targets):
    checkpoint, records = finished_once()
    fields = {"run": run or "x", "base": base, "vision": vision, "lora_targets": targets}
    versions = {"torch": run, base: "1"}
    hostile = changed(checkpoint, **fields)
    hostile = replace(hostile, config=hostile.config | {"versions": versions, "device": vision})
    try:
        card = model_card(hostile, records)
    except PhiSightError as error:  # a null character in a path
        assert "null character" in str(error) or "not UTF-8" in str(error)
        return
    card.encode()  # no half of a character
    plain = plain_card()
    head, known = head_of(card), head_of(plain)
    for varying in ("base_model", "base_model_relation", "license"):
        assert isinstance(head.pop(varying, ""), str)
        known.pop(varying, "")
    if "phi3" not in head["tags"]:  # the type of a base that can be read
        known["tags"].remove("phi3")
    if "model-index" in known:
        assert isinstance(head["model-index"][0].pop("name"), str)
        known["model-index"][0].pop("name")
    assert head == known
    body, usual = (text.split("\n---\n", 1)[1] for text in (card, plain))
    headings = re.findall(r"^#+ .*$", body, re.MULTILINE)[1:]
    assert headings == re.findall(r"^#+ .*$", usual, re.MULTILINE)[1:]
    for token in MARKDOWN.parse(body):
        for inner in (token, *(token.children or ())):
            assert not inner.type.startswith("html"), inner
            if inner.type == "link_open":
                assert inner.attrs["href"].startswith("https://huggingface.co/")
            if inner.type == "image":
                assert inner.attrs["src"] == "curves.png"
    shapes = [len(re.findall(r"(?<!\\)\|", line)) for line in body.splitlines() if line[:1] == "|"]
    assert set(shapes) <= {3, 5, 6, 7}, "no text makes a column"


@functools.cache
def finished_once() -> tuple[Checkpoint, list[dict]]:
    return finished()


@functools.cache
def plain_card() -> str:
    return model_card(*finished_once())
