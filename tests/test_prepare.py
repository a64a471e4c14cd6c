"""From files to rendered conversations: what is set aside, what stops, what is fingerprinted."""

import hashlib
import json
import tracemalloc
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from PIL import Image
from reading import read_all

from config import Config, default_config, replace
from data import sources
from data.chat import (
    ChatFormat,
    Limits,
    RenderedSample,
    load_tokenizer,
    render,
    render_to_limit,
)
from data.dataset import Message, Part, conversation_or_fault
from data.features import FeatureStore
from data.packed import ChosenSamples, PackedSamples
from data.prepare import TrainingData, evenly_spaced, prepare
from data.splits import split_by_image
from errors import PhiSightError

TOKENS = 3  # a picture, for a tower that is not there


@pytest.fixture(scope="module")
def chat_format() -> ChatFormat:
    return ChatFormat.from_tokenizer(load_tokenizer(ROOT / "assets/tiny/phi3"), TOKENS)


def record(picture: str | None, question: str = "What colour is it?", turns: int = 1) -> dict:
    tag = "" if picture is None else "<image>\n"
    messages = [{"from": "human", "value": tag + question}, {"from": "gpt", "value": "red"}]
    for turn in range(1, turns):
        messages += [{"from": "human", "value": f"And {turn}?"}, {"from": "gpt", "value": "blue"}]
    named = {} if picture is None else {"image": picture}
    return {"id": f"about {picture}", **named, "conversations": messages}


class Workspace:
    """A data file and a picture folder to write and to break."""

    positions = 2048  # of a base that is not there

    def __init__(self, folder, chat_format: ChatFormat) -> None:
        self.folder, self.chat_format = folder, chat_format
        (folder / "images").mkdir()
        self.names = [self.paint(f"{index:02d}.png", index) for index in range(20)]
        self.records = [record(name, turns=3) for name in self.names]

    def paint(self, name: str, red: int) -> str:
        Image.new("RGB", (3, 3), (red, 0, 0)).save(self.folder / "images" / name)
        return name

    def config(self, **fields) -> Config:
        (self.folder / "data.json").write_text(json.dumps(self.records))
        return replace(
            default_config("tiny"),
            **{
                "data": str(self.folder / "data.json"),
                "images": str(self.folder / "images"),
                "features": str(self.folder / "features"),
                "run": str(self.folder / "run"),
                "validation_fraction": 0.3,
                **fields,
            },
        )

    def prepare(self, **fields) -> TrainingData:
        config = self.config(**fields)
        self.store = FeatureStore(config.features, "fake", (TOKENS, 2))
        return prepare(
            config,
            self.chat_format,
            self.store,
            lambda: lambda pictures: torch.zeros(len(pictures), TOKENS, 2),
            positions=self.positions,
        )


@pytest.fixture
def workspace(tmp_path, chat_format) -> Workspace:
    return Workspace(tmp_path, chat_format)


def pictures_of(samples) -> set[str]:
    return {name for sample in samples for name in sample.images}


# -- good data ------------------------------------------------------------------------------------


def test_the_world_is_used_whole_and_split_by_picture(prepared, world):
    conversations = read_all(world / "train.json")[0]
    assert prepared.quarantined == []
    assert len(prepared.train) + len(prepared.validation) == len(conversations)
    train, validation = pictures_of(prepared.train), pictures_of(prepared.validation)
    assert train and validation and not train & validation
    assert train | validation == {name for c in conversations for name in c.images}
    assert pictures_of(prepared.first_exchanges) <= validation


def test_samples_are_what_the_renderer_gives(workspace):
    data = workspace.prepare()
    conversations = read_all(workspace.folder / "data.json")[0]
    expected = {c.images: render(c.messages, workspace.chat_format) for c in conversations}
    samples = data.train + data.validation
    assert {sample.images: sample for sample in samples} == expected
    assert len(samples) == len(conversations)
    assert all(workspace.store.features_of(n).shape == (TOKENS, 2) for n in workspace.names)


def test_first_exchanges_are_the_first_question_and_answer(workspace, chat_format):
    data = workspace.prepare()
    assert [s.images for s in data.first_exchanges] == [s.images for s in data.validation]
    short = workspace.records[0]["conversations"][:2]
    assert len(short) == 2
    for exchange, whole in zip(data.first_exchanges, data.validation, strict=True):
        length = len(exchange.input_ids) - 1  # but <|endoftext|>
        assert exchange.input_ids[:length] == whole.input_ids[:length]
        assert exchange.input_ids[-1:] == [*chat_format.ending]
        assert exchange.input_ids.count(*chat_format.openings["assistant"]) == 1
        assert sum(exchange.supervised) == len(chat_format.encode_text("red")) + 1


def test_each_conversation_is_parsed_and_tokenised_once(workspace, monkeypatch):
    encoded: list[str] = []
    opened: list[Path] = []
    encode, read = ChatFormat.encode_text, sources.read_records
    monkeypatch.setattr(
        ChatFormat, "encode_text", lambda self, text: encoded.append(text) or encode(self, text)
    )
    monkeypatch.setattr(
        sources, "read_records", lambda path, pictures: opened.append(path) or read(path, pictures)
    )
    data = workspace.prepare()
    assert data.first_exchanges and data.validation
    texts = [turn for record in workspace.records for turn in record["conversations"]]
    assert len(encoded) == len(texts) + 2 * len(data.first_exchanges)  # compared when read again
    assert opened == [workspace.folder / "data.json"] * 2


def test_all_is_what_a_plain_preparation_gives(workspace, chat_format):
    """Each part from its definition, with conversations that are cut, too long, and bad."""
    for number, record_ in enumerate(workspace.records):
        record_["conversations"][2]["value"] += " please" * (7 * number)
    workspace.records[5]["conversations"][0]["value"] += " please" * 90
    workspace.records[6]["conversations"].pop()
    (workspace.folder / "images" / workspace.names[7]).unlink()
    limit = 100
    data = workspace.prepare(max_text_tokens=limit, evaluation_conversations=2)

    def fits(messages) -> bool:
        ids = render(messages, chat_format).input_ids
        return sum(i != chat_format.image_id for i in ids) <= limit

    conversations, malformed = read_all(workspace.folder / "data.json")
    usable = [c for c in conversations if workspace.names[7] not in c.images]
    sides = split_by_image(usable, 0.3, 0)
    samples, too_long, cut = ([], []), [], 0
    for side, chosen in zip(sides, samples):
        for conversation in side:
            lengths = [n for n in (6, 4, 2) if fits(conversation.messages[:n])]
            if lengths:
                chosen.append(render(conversation.messages[: lengths[0]], chat_format))
                cut += lengths[0] < 6
            else:
                too_long.append(conversation.id)
    asked = evenly_spaced(sides[1], 2)
    assert list(data.train) == samples[0]
    assert data.validation == evenly_spaced(samples[1], 2)
    assert data.first_exchanges == [
        render(c.messages[:2], chat_format) for c in asked if fits(c.messages[:2])
    ]
    assert data.shortened == cut > 0
    assert [q.id for q in data.quarantined] == [malformed[0].id, "about 07.png", *too_long]
    assert too_long == ["about 05.png"] and len(malformed) == 1
    total = hashlib.sha256()
    for sample in samples[0] + samples[1]:
        hashes = [(workspace.store.hash_of(n), workspace.store.check_of(n)) for n in sample.images]
        total.update(json.dumps([sample.input_ids, sample.supervised, hashes]).encode())
    assert data.fingerprint == total.hexdigest()


def test_evaluation_looks_at_as_many_conversations_as_asked(workspace):
    everything = workspace.prepare(validation_fraction=0.6)
    data = workspace.prepare(validation_fraction=0.6, evaluation_conversations=3)
    assert len(everything.validation) > 3
    assert len(data.validation) == len(data.first_exchanges) == 3
    assert pictures_of(data.validation) <= pictures_of(everything.validation)
    assert data.fingerprint == everything.fingerprint  # the data is the same, less is looked at


def test_packed_samples_are_the_samples(chat_format):
    image = [chat_format.image_id] * TOKENS
    samples = [
        RenderedSample([5, *image, 7, 0], [False] * (TOKENS + 2) + [True], ("a",)),
        RenderedSample([0], [False], ()),
        RenderedSample([0, 1, 2], [True, True, False], ()),
        RenderedSample(
            [*image, *image, 3, *image],
            [False] * (2 * TOKENS) + [True] + [False] * TOKENS,
            ("b", "b", "a"),
        ),
        RenderedSample([], [], ()),
    ]
    packed = PackedSamples(chat_format)
    assert not packed
    for sample in samples:
        packed.append(sample)
    assert list(packed) == samples and packed[1:4] == samples[1:4] and packed[-2] == samples[3]
    assert packed.lengths == [len(sample.input_ids) for sample in samples]
    for place in (5, -6):
        with pytest.raises(IndexError):
            packed[place]
    chosen = ChosenSamples(packed, [3, 0, 3])
    assert list(chosen) == [samples[3], samples[0], samples[3]] and chosen[1:] == list(chosen)[1:]
    assert chosen.lengths == [len(sample.input_ids) for sample in chosen]
    assert chosen.images == [samples[3].images, ("a",), samples[3].images]
    assert chosen + samples[:1] == [*chosen, samples[0]]


@pytest.mark.parametrize("learns_all", [False, True])
def test_samples_are_written_as_json_writes_them(chat_format, workspace, learns_all):
    packed = PackedSamples(chat_format)
    workspace.config()
    for conversation in read_all(workspace.folder / "data.json")[0]:
        packed.append(render(conversation.messages, chat_format))
    chosen = ChosenSamples(packed, range(len(packed)), learns_all)
    assert [*chosen.written()] == [
        (json.dumps(sample.input_ids), json.dumps(sample.supervised), sample.images)
        for sample in chosen
    ]


def test_packed_samples_take_little_memory(chat_format):
    """The ids of a picture cost nothing, and a token of text the size of its number."""
    packed = PackedSamples(chat_format)
    sample = RenderedSample(
        [*[chat_format.image_id] * TOKENS, *range(1000)], [False] * (TOKENS + 1000), ("a",)
    )
    tracemalloc.start()
    for _ in range(1000):
        packed.append(sample)
    taken, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert taken < 5_000_000


def test_a_file_that_changes_while_it_is_in_use_is_not_trained_on_by_halves(workspace):
    """It was read once; only the questions that are asked in words are read again."""
    config = workspace.config()
    path = workspace.folder / "data.json"
    whole = path.read_text()
    before = workspace.prepare()

    def with_(changed: str):
        def extract():
            path.write_text(changed)
            return lambda pictures: torch.zeros(len(pictures), TOKENS, 2)

        path.write_text(whole)
        store = FeatureStore(workspace.folder / str(hash(changed)), "fake", (TOKENS, 2))
        return prepare(config, workspace.chat_format, store, extract, positions=2048)

    same = with_(whole.replace("about 03.png", "another"))
    assert (same.fingerprint, same.first_messages) == (before.fingerprint, before.first_messages)
    for changed in (
        "[]",
        json.dumps(workspace.records[::-1]),
        whole.replace("What colour", "Which"),
    ):
        with pytest.raises(PhiSightError, match="was changed while|holds no record|no usable"):
            with_(changed)


def test_evenly_spaced():
    assert evenly_spaced(range(10), 4) == [0, 2, 5, 7]
    assert evenly_spaced("abc", 3) == evenly_spaced("abc", 9) == list("abc")


def test_text_only_conversations_need_no_picture_folder(workspace):
    workspace.records = [dict(record(None), id=str(index)) for index in range(12)]
    data = workspace.prepare(images="")
    assert data.quarantined == [] and data.train and data.validation
    assert pictures_of(data.train + data.validation) == set()


def test_a_fraction_of_the_data_is_used(workspace):
    whole, half = workspace.prepare(), workspace.prepare(data_fraction=0.5)
    used = pictures_of(half.train + half.validation)
    assert 0 < len(used) < len(workspace.names)
    assert used < pictures_of(whole.train + whole.validation)


# -- copies of pictures ---------------------------------------------------------------------------


def with_copies(workspace: Workspace) -> None:
    """Every picture once more under a name of its own, with a record of its own."""
    for name in workspace.names:
        source = workspace.folder / "images" / name
        copy = f"z{name}"
        (workspace.folder / "images" / copy).write_bytes(source.read_bytes())
        workspace.records.append(record(copy))


def sides_of(workspace: Workspace, **fields) -> tuple[set[str], set[str]]:
    data = workspace.prepare(**fields)
    return pictures_of(data.train), pictures_of(data.validation)


def test_copies_of_a_picture_are_on_its_side(workspace):
    train, validation = sides_of(workspace)
    with_copies(workspace)
    assert sides_of(workspace) == (
        train | {f"z{name}" for name in train},
        validation | {f"z{name}" for name in validation},
    )


def test_a_copy_ties_conversations_together_through_others(workspace):
    """a and b share nothing but copies of one picture each with a third conversation."""
    workspace.paint("a.png", 100), workspace.paint("b.png", 101)
    both = record("a copy.png", turns=1)
    workspace.paint("a copy.png", 100), workspace.paint("b copy.png", 101)
    both["image"] = ["a copy.png", "b copy.png"]
    both["conversations"][0]["value"] += "<image>"
    workspace.records += [record("a.png"), record("b.png"), both]
    for seed in range(6):
        for side in sides_of(workspace, seed=seed):
            assert len(side & {"a.png", "b.png", "a copy.png", "b copy.png"}) in (0, 4)


def test_an_old_run_splits_by_name_as_it_always_did(workspace):
    with_copies(workspace)
    train, validation = sides_of(workspace, split_by="name")
    conversations = read_all(workspace.folder / "data.json")[0]
    by_name = split_by_image(conversations, 0.3, 0)
    assert [train, validation] == [{n for c in side for n in c.images} for side in by_name]
    assert any(f"z{name}" in train for name in validation)  # which is why it is done no more
    assert sides_of(workspace) != (train, validation)


def test_a_run_without_validation_trains_on_everything(workspace):
    data = workspace.prepare(validation_fraction=0)
    assert len(data.train) == len(workspace.records)
    assert data.validation == data.first_exchanges == []
    workspace.records = workspace.records[:1]
    with pytest.raises(PhiSightError, match="found 1; .*--validation-fraction 0"):
        workspace.prepare()
    assert len(workspace.prepare(validation_fraction=0).train) == 1


# -- what is set aside ----------------------------------------------------------------------------


def break_missing(workspace: Workspace) -> str:
    (workspace.folder / "images" / workspace.names[0]).unlink()
    return "No such file"


def break_picture(workspace: Workspace) -> str:
    (workspace.folder / "images" / workspace.names[0]).write_bytes(b"\x89PNG broken")
    return "broken"


def break_record(workspace: Workspace) -> str:
    workspace.records[0] = {"id": "about 00.png", "image": workspace.names[0]}
    return "none of the forms"


def break_tags(workspace: Workspace) -> str:
    workspace.records[0]["conversations"][0]["value"] = "<image> or <image>?"
    return "1 picture(s) but 2 <image>"


def break_length(workspace: Workspace) -> str:
    workspace.records[0] = record(workspace.names[0], question="what " * 300)
    return "the limit is 256"


BREAKS = [break_missing, break_picture, break_record, break_tags, break_length]


@pytest.mark.parametrize("damage", BREAKS)
def test_a_bad_record_is_set_aside_with_its_reason(workspace, damage):
    whole = workspace.prepare()
    words = damage(workspace)
    data = workspace.prepare()
    (bad,) = data.quarantined
    assert bad.id == "about 00.png" and words in bad.reason
    used = pictures_of(data.train + data.validation)
    assert used == set(workspace.names[1:])
    assert data.fingerprint != whole.fingerprint
    assert pictures_of(data.first_exchanges) <= used


@pytest.mark.parametrize("damage", BREAKS)
def test_strict_stops_at_a_bad_record(workspace, damage):
    workspace.prepare(strict=True)
    words = damage(workspace)
    with pytest.raises(PhiSightError) as caught:
        workspace.prepare(strict=True)
    assert words in str(caught.value)


def test_all_kinds_of_damage_at_once(workspace):
    (workspace.folder / "images" / "00.png").unlink()
    (workspace.folder / "images" / "01.png").write_bytes(b"")
    (workspace.folder / "images" / "02.png").write_bytes(b"")  # as another broken one
    workspace.records[3] = "no record"
    workspace.records[4]["conversations"].pop()
    workspace.records[5] = record("05.png", question="what " * 300)
    data = workspace.prepare()
    assert len(data.quarantined) == 6
    assert pictures_of(data.train + data.validation) == set(workspace.names[6:])
    for sample in data.train + data.validation + data.first_exchanges:
        for name in sample.images:
            workspace.store.features_of(name)


def test_long_conversations_lose_their_last_turns(workspace, chat_format):
    # The length of a first exchange: the second and third turns have no room.
    limit = len(workspace.prepare().first_exchanges[0].input_ids) - TOKENS
    data = workspace.prepare(max_text_tokens=limit)
    assert data.quarantined == [] and data.shortened == len(workspace.records)
    for sample in data.train + data.validation:
        assert sample.input_ids.count(*chat_format.openings["assistant"]) == 1
    with pytest.raises(PhiSightError, match="nothing left to train on"):
        workspace.prepare(max_text_tokens=limit - 1)


def test_a_wrong_picture_folder_says_that_pictures_are_missing(workspace, tmp_path):
    (tmp_path / "other").mkdir()
    with pytest.raises(PhiSightError, match="20 records.*No such file.*; give .* --images"):
        workspace.prepare(images=str(tmp_path / "other"))
    with pytest.raises(PhiSightError, match="no such folder; give --images"):
        workspace.prepare(images=str(tmp_path / "nowhere"))


def test_a_missing_data_file_says_what_to_do(workspace):
    for data in ("", str(workspace.folder / "nowhere.json")):
        with pytest.raises(PhiSightError, match="give --data FILE"):
            workspace.prepare(data=data)


# -- limits of all tokens -------------------------------------------------------------------------


def about_all(pictures: list[str], turns: int = 1) -> dict:
    """A record whose first question has all these pictures."""
    made = record(pictures[0], turns=turns) | {"id": "many", "image": pictures}
    made["conversations"][0]["value"] = "<image>" * len(pictures) + "What?"
    return made


@pytest.mark.parametrize("limit", ["row", "positions"])
def test_one_record_of_too_many_pictures_is_set_aside(workspace, limit):
    usual = workspace.prepare()
    longest = max(lengths(usual))
    assert longest < 20 * TOKENS + 15  # of 20 pictures with few words
    workspace.records.append(about_all(workspace.names))
    if limit == "row":
        data = workspace.prepare(row_tokens=longest)
        expected = f"60 of them of 20 pictures, and --row-tokens {longest} is less; raise it"
    else:
        workspace.positions = longest
        data = workspace.prepare(row_tokens=0)
        expected = f"60 of them of 20 pictures, and the base has {longest} positions"
    (bad,) = data.quarantined
    assert bad.id == "many" and expected in bad.reason
    assert list(data.train) == list(usual.train) and data.validation == usual.validation


def lengths(data: TrainingData) -> list[int]:
    return sorted(len(sample.input_ids) for sample in data.train + data.validation)


def test_a_record_loses_the_turns_whose_tokens_do_not_fit(workspace, chat_format):
    several = about_all(workspace.names[:2], turns=3)
    several["conversations"][4]["value"] = "<image> What?"
    several["image"] = workspace.names[:3]
    workspace.records = [several, *workspace.records[3:]]
    messages = conversation_or_fault(several).messages
    two_turns = len(render(messages[:4], chat_format).input_ids)
    data = workspace.prepare(row_tokens=two_turns, validation_fraction=0)
    assert not data.quarantined
    assert data.train[0] == render(messages[:4], chat_format) and data.train[0].images == (
        *workspace.names[:2],
    )
    shorter = workspace.prepare(row_tokens=two_turns - 1, validation_fraction=0)
    assert shorter.train[0] == render(messages[:2], chat_format)


def test_a_million_pictures_in_one_record_take_no_million_slots(workspace, chat_format):
    parts = (*[Part("image", "a.png")] * 100_000, Part("text", "What?"))
    messages = (Message("user", parts), Message("assistant", (Part("text", "red"),)))
    tracemalloc.start()
    with pytest.raises(PhiSightError, match="300000 of them of 100000 pictures"):
        render_to_limit(messages, chat_format, Limits(256, 0, 2048))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 500_000  # bytes; the slots would take 2.4 MB


def test_a_conversation_whose_learnt_answers_do_not_fit_is_set_aside(workspace):
    unlearnt = record("00.png", turns=2)
    unlearnt["conversations"][1]["loss"] = False
    unlearnt["conversations"][3]["value"] = "blue " * 300
    workspace.records[0] = unlearnt
    (bad,) = workspace.prepare().quarantined
    assert bad.id == "about 00.png" and "none of the answers that fit is to be learnt" in bad.reason


# -- the fingerprint ------------------------------------------------------------------------------


def test_the_fingerprint_is_that_of_the_data(workspace):
    first = workspace.prepare()
    assert workspace.prepare().fingerprint == first.fingerprint
    assert len(first.fingerprint) == 64


@pytest.mark.parametrize(
    "change",
    [
        *("a picture's pixels", "an answer", "the order", "a record less", "the seed"),
        *("a system text", "an answer not to learn"),
    ],
)
def test_the_fingerprint_sees_every_change_of_the_data(workspace, change):
    before = workspace.prepare().fingerprint
    fields = {}
    if change == "a picture's pixels":
        workspace.paint(workspace.names[0], 99)
    elif change == "an answer":
        workspace.records[0]["conversations"][1]["value"] = "green"
    elif change == "a system text":
        workspace.records[0]["system"] = "Answer like a pirate."
    elif change == "an answer not to learn":
        workspace.records[0]["conversations"][1]["loss"] = False
    elif change == "the order":
        workspace.records.reverse()
    elif change == "a record less":
        workspace.records.pop()
    else:
        fields = {"seed": 5}
    assert workspace.prepare(**fields).fingerprint != before


def test_the_fingerprint_does_not_see_where_pictures_lie(workspace):
    before = workspace.prepare().fingerprint
    (workspace.folder / "images").rename(workspace.folder / "moved")
    assert workspace.prepare(images=str(workspace.folder / "moved")).fingerprint == before
