"""Every form of a record says the same conversation, and trains and resumes as LLaVA's does."""

from __future__ import annotations

import base64
import json
import os
from pathlib import Path

import pytest
import runs
import torch
from conftest import ROOT
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from reading import read_all
from safetensors.torch import load_file

import checkpoints
import data.prepare
from data import sources
from data.chat import ChatFormat, load_tokenizer
from data.dataset import (
    Conversation,
    Fault,
    Message,
    Part,
    conversation_or_fault,
    form_name,
    picture_names,
    unread_keys,
)
from data.features import FeatureStore
from data.forms import FORMS
from data.pictures import UNPACKED, PictureFolders, Pictures
from data.prepare import prepare
from data.record_content import picture_name
from data.record_keys import BadRecord
from errors import PhiSightError

SHARED = ROOT.parent / "shared/real"
COLOURS = ("red", "green", "blue", "black", "white", "grey", "brown", "pink")
QUESTION = "What is it?"


def llava(picture: str, answer: str) -> dict:
    asked = {"from": "human", "value": f"<image>\n{QUESTION}"}
    return {"image": picture, "conversations": [asked, {"from": "gpt", "value": answer}]}


def share_gpt(picture: str, answer: str) -> dict:
    asked = {"role": "user", "content": f"<image>{QUESTION}"}
    return {"images": [picture], "conversations": [asked, {"role": "assistant", "content": answer}]}


def openai(picture: str, answer: str) -> dict:
    parts = [{"type": "image", "image": picture}, {"type": "text", "text": QUESTION}]
    return {
        "messages": [{"role": "user", "content": parts}, {"role": "assistant", "content": answer}]
    }


WRITTEN = {
    "llava": llava,
    "sharegpt": share_gpt,
    "openai": openai,
    "query": lambda p, a: {"images": [p], "query": f"<image>{QUESTION}", "response": a},
    "alpaca": lambda p, a: {"image": p, "instruction": QUESTION, "input": "", "output": a},
    "prompt": lambda p, a: {"image": p, "prompt": QUESTION, "completion": a},
    "question": lambda p, a: {"image": p, "question": QUESTION, "answer": a},
    "texts": lambda p, a: {"images": [p], "texts": [{"user": QUESTION, "assistant": a}]},
    "messages": lambda p, a: {
        "images": [p],
        "messages": [
            {"role": "user", "content": QUESTION},
            {"role": "assistant", "content": a},
        ],
    },
    "backslashes": lambda p, a: llava(f".\\{p}", a),
}
CAPTIONS = {
    "caption": lambda p, a: {"image": p, "caption": a},
    "text": lambda p, a: {"images": [p], "text": a},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Pictures of eight colours, and a data file of each form about them."""
    made = tmp_path_factory.mktemp("forms")
    (made / "images").mkdir()
    for colour in COLOURS:
        Image.new("RGB", (24, 24), colour).save(made / "images" / f"{colour}.png")
    for name, write in (WRITTEN | CAPTIONS).items():
        records = [write(f"{colour}.png", f"It is {colour}.") for colour in COLOURS]
        if name == "query":  # one a line, the others as one list
            lines = "".join(json.dumps(record) + "\n" for record in records)
            (made / f"{name}.json").write_text(lines)
        else:
            (made / f"{name}.json").write_text(json.dumps(records))
    absolute = [llava(str(made / "images" / f"{c}.png"), f"It is {c}.") for c in COLOURS]
    (made / "absolute.json").write_text(json.dumps(absolute))
    return made


def test_each_form_of_the_table_has_an_example_that_is_read_whole():
    shown = (ROOT / "docs/data.md").read_text("utf-8")
    for form in FORMS:
        assert f"| `{form.example}` |" in shown
        record = json.loads(form.example)
        assert form_name(record) == form.name and not list(unread_keys(record))
        conversation = conversation_or_fault(record)
        assert isinstance(conversation, Conversation) and conversation.images == ("a.jpg",)
        assert "cat" in conversation.messages[-1].parts[0].value


@pytest.mark.parametrize("name", WRITTEN)
def test_every_form_says_the_same(name):
    expected = conversation_or_fault(llava("a.png", "It is red."))
    assert conversation_or_fault(WRITTEN[name]("a.png", "It is red.")).messages == expected.messages
    assert expected.images == ("a.png",)


@pytest.mark.parametrize("name", CAPTIONS)
def test_a_caption_follows_its_picture_alone(name):
    conversation = conversation_or_fault(CAPTIONS[name]("a.png", "A red square."))
    assert conversation.messages == (
        Message("user", (Part("image", "a.png"),)),
        Message("assistant", (Part("text", "A red square."),)),
    )


def test_what_was_said_before_comes_before():
    turns = [["<image>Who?", "A cat."], ["Where?", "There."]]
    more = {"images": ["a.png"], "history": turns, "system": "Be brief."}
    query = conversation_or_fault({"query": "Why?", "response": "So.", **more})
    alpaca = conversation_or_fault({"instruction": "Why", "input": "?", "output": "So.", **more})
    said = [(m.role, m.parts[-1].value) for m in query.messages]
    assert said == [
        ("system", "Be brief."),
        ("user", "Who?"),
        ("assistant", "A cat."),
        ("user", "Where?"),
        ("assistant", "There."),
        ("user", "Why?"),
        ("assistant", "So."),
    ]
    assert alpaca.messages[:-2] == query.messages[:-2] and alpaca.images == ("a.png",)
    assert alpaca.messages[-2].parts[0].value == "Why\n?"


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({"query": "a", "response": "b", "history": "c"}, "`history` is text, not a list"),
        ({"query": "a", "response": "b", "history": [["c"]]}, "`history`: its item 1 is not"),
        ({"query": "a", "response": 5}, "turn 2: `content` is a number, not text"),
        ({"query": "a", "response": "b", "prompt": "c", "completion": "d"}, "keep one of them"),
        ({"instruction": "a", "input": ["b"], "output": "c"}, "`input` is a list, not text"),
        ({"instruction": ["a"], "input": "b", "output": "c"}, "`instruction` is a list, not text"),
        ({"texts": [{"user": "a"}]}, "`texts`: `assistant` of its item 1 is missing"),
        ({"texts": [{"user": "a", "assistant": 1}]}, "is a number, not text"),
        ({"caption": "a"}, "none of the forms"),
        ({"image": "a.png", "caption": ["a"]}, "part 1 of turn 2 is text, not an object"),
        ({"image": "a.png", "instruction": "a"}, "none of the forms"),
        ({"conversations": [{"role": "user", "value": "a"}]}, "turn 1: `content` is missing"),
    ],
)
def test_a_record_that_is_not_quite_of_a_form(record, reason):
    fault = conversation_or_fault(record)
    assert isinstance(fault, Fault) and reason in fault.reason


def test_a_list_of_turns_goes_before_other_keys():
    record = llava("a.png", "red") | {"text": "x", "question": "y", "answer": "z", "caption": "c"}
    conversation = conversation_or_fault(record)
    assert conversation.messages == conversation_or_fault(llava("a.png", "red")).messages
    assert sorted(unread_keys(record)) == ["answer", "caption", "question", "text"]


# -- pictures and marks ---------------------------------------------------------------------------


def test_in_an_answer_the_mark_is_a_word():
    record = llava("a.png", "You wrote <image> there.")
    record["system"] = "Look at <image>."
    conversation = conversation_or_fault(record)
    assert conversation.messages[0].parts == (Part("text", "Look at <image>."),)
    assert conversation.messages[-1].parts == (Part("text", "You wrote <image> there."),)
    assert conversation.images == ("a.png",) and not conversation.put_first


def test_pictures_without_a_mark_come_first_and_are_counted(folder, tmp_path):
    records = [WRITTEN["question"](f"{colour}.png", "x") for colour in COLOURS]
    records[0]["question"] = "<image>" + QUESTION
    (tmp_path / "d.json").write_text(json.dumps(records))
    read, _ = read_all(tmp_path / "d.json")
    assert [c.put_first for c in read] == [False] + [True] * 7
    assert [c.messages[0].parts[0].kind for c in read] == ["image"] * 8


@pytest.mark.parametrize("empty", ["", [], None])
def test_a_record_of_text_may_name_an_empty_picture(empty):
    record = {"image": empty, "question": "Who?", "answer": "Me."}
    assert conversation_or_fault(record).images == ()
    turns = [
        {"role": "user", "content": "Who?", "image": empty},
        {"role": "assistant", "content": "Me."},
    ]
    assert conversation_or_fault({"messages": turns}).images == ()


STEPS = ["..", ".", "a", "a b", "#2", UNPACKED, "C:", "", "...", "con", "\u2025", "a\0", "~"]
NAMES = st.builds(
    lambda start, steps, mark: start + mark.join(steps),
    st.sampled_from(["", "/", "//", "\\", "\\\\server\\", "C:\\", "C:", "/made/"]),
    st.lists(st.sampled_from(STEPS), min_size=1, max_size=5),
    st.sampled_from(["/", "\\", "//", "\\/"]),
)


@given(NAMES | st.text(max_size=20))
def test_no_name_leads_out_of_the_folders(name):
    """And none of a record's reaches the folder of another source."""
    folders = PictureFolders(["/made", "/other"], "/kept")
    for number, inside in ((0, ("/made/",)), (1, ("/other/",))):
        try:
            known = folders.of_source(number).named(picture_name(name))
        except BadRecord:
            continue
        place = str(folders.path_of(known))
        assert ".." not in place.split("/")
        assert place.startswith((*inside, "/kept/"))
        if place.startswith("/kept/"):
            assert name.replace("\\", "/").lstrip("./").startswith(UNPACKED)


def test_an_absolute_name_is_one_of_the_folder(tmp_path):
    pictures = Pictures(tmp_path)
    assert pictures.named(picture_name(str(tmp_path / "a/b.png"))) == "a/b.png"
    for outside in ("/etc/passwd", f"{tmp_path}2/a.png", str(tmp_path.parent)):
        with pytest.raises(BadRecord, match="lies outside the image folder"):
            pictures.named(picture_name(outside))
    with pytest.raises(BadRecord, match="none is given"):
        Pictures().named("/a.png")


def test_a_picture_in_the_record_itself_is_unpacked_once(folder, tmp_path):
    content = (folder / "images/red.png").read_bytes()
    address = "data:image/png;base64," + base64.b64encode(content).decode()
    parts = [{"type": "image_url", "image_url": {"url": address}}, {"type": "text", "text": "It?"}]
    record = {
        "messages": [{"role": "user", "content": parts}, {"role": "assistant", "content": "x"}]
    }
    pictures = Pictures(unpacked=tmp_path)
    (name,) = conversation_or_fault(record, pictures).images
    assert name.startswith(UNPACKED) and picture_names(record, pictures) == [name]
    place = PictureFolders([], tmp_path).path_of(name)
    assert place.read_bytes() == content and len(list(tmp_path.rglob("*.png"))) == 1
    for wrong, reason in ((address[:-3] + "!", "not valid base64"), ("data:,x", "is not of base64"),
                          ("data:image/png;base64,QUJD", "of no kind that is read")):  # fmt: skip
        parts[0]["image_url"]["url"] = wrong
        fault = conversation_or_fault(record, pictures)
        assert isinstance(fault, Fault) and reason in fault.reason
        assert picture_names(record, pictures) == []


# -- through training -----------------------------------------------------------------------------


def trained(run: Path, *, folder: Path, data: list[str], cut: bool) -> dict[str, torch.Tensor]:
    """The weights after two steps, in one go or in two."""
    recipe = runs.RECIPE | runs.SHORT
    recipe |= {"data_fraction": 1, "run": run, "features": folder / "features"}
    given = [f"--{name.replace('_', '-')}={value}" for name, value in recipe.items()]
    given += [f"--data={folder / text}" for text in data] + [f"--images={folder / 'images'}"]
    runs.train.main([*given, *(["--stop-at-step=1"] if cut else [])])
    if cut:
        runs.resume(run)
    newest = checkpoints.resolve(run)
    assert newest.step == 2
    return load_file(newest.path / "lora_weights.safetensors") | load_file(
        newest.path / "image_projector.safetensors"
    )


@pytest.fixture(scope="module")
def unbroken(folder, tmp_path_factory) -> dict[str, dict[str, torch.Tensor]]:
    made = tmp_path_factory.mktemp("unbroken")
    return {
        name: trained(made / name, folder=folder, data=[f"{name}.json"], cut=False)
        for name in ("llava", "caption")
    }


@pytest.mark.parametrize("name", [*WRITTEN, *CAPTIONS, "absolute"])
def test_every_form_trains_and_resumes_to_the_same_bits(name, folder, unbroken, tmp_path):
    weights = trained(tmp_path / "run", folder=folder, data=[f"{name}.json"], cut=True)
    expected = unbroken["caption" if name in CAPTIONS else "llava"]
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[key], expected[key]) for key in weights)


def test_a_mixture_trains_and_resumes_to_the_same_bits(folder, tmp_path):
    data = ["llava.json:2", "alpaca.json:0.5", "caption.json:1.25"]
    whole = trained(tmp_path / "whole", folder=folder, data=data, cut=False)
    cut = trained(tmp_path / "cut", folder=folder, data=data, cut=True)
    assert all(torch.equal(whole[key], cut[key]) for key in whole)


# -- mixtures -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a.json", ("a.json", 1.0)),
        ("a.json:2", ("a.json", 2.0)),
        ("a:b.json:0.25", ("a:b.json", 0.25)),
        ("C:\\data\\a.json", ("C:\\data\\a.json", 1.0)),
        ("C:\\data\\a.json:3", ("C:\\data\\a.json", 3.0)),
        ("hf:owner/name@main:2", ("hf:owner/name@main", 2.0)),
        ("a.json:x", ("a.json:x", 1.0)),
        ("a:2:1", ("a:2", 1.0)),
        ("a.json:\u0663", ("a.json:\u0663", 1.0)),
    ],
)
def test_a_weight_is_the_number_behind_the_last_colon(text, expected):
    assert sources.split_weight(text) == expected


def prepared(folder: Path, *data: str, **fields):
    chat_format = ChatFormat.from_tokenizer(load_tokenizer(runs.BASE), 3)
    config = runs.configs.replace(
        runs.configs.default_config("tiny"),
        **{
            "data": tuple(str(folder / text) for text in data),
            "images": (str(folder / "images"),),
            "validation_fraction": 0.25,
            **fields,
        },
    )
    store = FeatureStore(folder / "fake", "fake", (3, 2))
    return prepare(
        config,
        chat_format,
        store,
        lambda: lambda pictures: torch.zeros(len(pictures), 3, 2),
        positions=2048,
    )


def test_a_weight_is_how_often_a_conversation_is_taken(folder):
    once, twice = prepared(folder, "llava.json"), prepared(folder, "llava.json:2")
    assert list(twice.train) == [sample for sample in once.train for _ in range(2)]
    assert twice.validation == once.validation and twice.fingerprint != once.fingerprint
    part = prepared(folder, "llava.json:0.5", "caption.json")
    names = [name for sample in part.train for name in sample.images]
    assert len(once.train) < len(names) < 2 * len(once.train)
    more = prepared(folder, "llava.json:1.5", "caption.json")
    of_llava = [list(sample.images) for sample in more.train]
    assert len(of_llava) == len(names) + len(once.train)
    again = prepared(folder, "llava.json:1.5", "caption.json")
    assert again.fingerprint == more.fingerprint
    assert prepared(folder, "llava.json:1", "caption.json").fingerprint != more.fingerprint


def test_two_folders_hold_pictures_of_one_name(folder, tmp_path):
    (tmp_path / "images").mkdir()
    for colour in COLOURS:
        Image.new("RGB", (9, 9), "yellow").save(tmp_path / "images" / f"{colour}.png")
    both = {"images": (str(folder / "images"), str(tmp_path / "images"))}
    found = prepared(folder, "llava.json", "caption.json", **both)
    names = {name for sample in found.train for name in sample.images}
    assert {name.startswith("#2/") for name in names} == {True, False}
    with pytest.raises(PhiSightError, match="--images: 2 folders for 1 --data"):
        prepared(folder, "llava.json", **both)


@pytest.mark.parametrize("weight", ["0", "0.0"])
def test_a_weight_of_nothing_is_refused(folder, weight):
    with pytest.raises(PhiSightError, match="--data must be files or folders"):
        prepared(folder, f"llava.json:{weight}")


def test_a_folder_that_is_called_as_a_mark_hides_no_picture(folder, tmp_path):
    (folder / "images/#2").mkdir()
    for place in (folder / "images/#2", tmp_path):
        Image.new("RGB", (9, 9), "yellow").save(place / "odd.png")
    odd = [*json.loads((folder / "llava.json").read_text()), llava("#2/odd.png", "yellow")]
    (folder / "odd.json").write_text(json.dumps(odd))
    both = (str(folder / "images"), str(tmp_path))
    found = prepared(folder, "odd.json", "llava.json", images=both, validation_fraction=0.0)
    assert "#2/odd.png" not in {name for sample in found.train for name in sample.images}
    assert "another --images folder" in found.quarantined[0].reason
    alone = prepared(folder, "odd.json", validation_fraction=0.0)
    assert ("#2/odd.png",) in alone.train.images and not alone.quarantined


@pytest.mark.parametrize("weight", ["1e6", "-1", ".5", "1000000", "0.0000001"])
def test_a_weight_in_another_form_is_told(folder, weight):
    with pytest.raises(PhiSightError, match="write it as 2 or 0.25"):
        prepared(folder, f"llava.json:{weight}")


def test_a_file_whose_name_ends_as_a_weight(folder):
    (folder / "odd:2").write_text((folder / "llava.json").read_text())
    with pytest.raises(PhiSightError, match="write .*odd:2:1$"):
        prepared(folder, "odd:2")
    assert len(prepared(folder, "odd:2:1").train) == len(prepared(folder, "llava.json").train)


def test_an_epoch_that_no_memory_holds_is_refused(folder, monkeypatch):
    monkeypatch.setattr(data.prepare, "MOST_OF_AN_EPOCH", 1000)
    assert prepared(folder, "llava.json:10")
    with pytest.raises(PhiSightError, match="make an epoch of [0-9,]+ conversations; give smaller"):
        prepared(folder, "llava.json:999999")


@pytest.mark.parametrize("given", [(), ("",), ("llava.json", "")])
def test_a_source_without_a_name_is_none(given):
    with pytest.raises(PhiSightError, match="^--data: not given"):
        sources.sources(given, PictureFolders(), "give one")


def test_a_pipe_is_refused_as_it_can_be_read_once(folder):
    if not hasattr(os, "mkfifo"):
        pytest.skip("this system has no named pipes")
    os.mkfifo(folder / "pipe")
    with pytest.raises(PhiSightError, match="is a pipe, which is read only once"):
        prepared(folder, "pipe")


# -- the real ones --------------------------------------------------------------------------------


@pytest.mark.skipif(not SHARED.is_dir(), reason="the shared data files are not here")
def test_the_real_files_are_read_whole():
    read, bad = read_all(SHARED / "llava/coco2014_val_gpt4_qa_30x3.jsonl")
    assert (len(read), bad) == (90, []) and all(c.put_first for c in read)
    assert len({c.images for c in read}) == 30
    read, bad = read_all(SHARED / "llava/mllm_demo.json")
    assert len(read) == 6 and bad == []
