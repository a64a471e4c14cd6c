"""Untrusted JSON in, checked conversations out; splits that share no picture."""

import json
import random
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from reading import read_all

from data.dataset import (
    Conversation,
    Fault,
    Message,
    Part,
    Quarantined,
    conversation_or_fault,
    load_questions,
    write_quarantine,
)
from data.record_keys import MALFORMED
from data.splits import split_by_image, take_fraction
from errors import PhiSightError

SHARED = Path(__file__).resolve().parents[2] / "shared" / "real"


def record(*turns: tuple[str, object], **keys) -> dict:
    """A LLaVA record; turns are (speaker, text)."""
    turns = turns or (("human", "<image>\nWhat is it?"), ("gpt", "A bus."))
    keys = {"id": "7", "image": "bus.jpg"} | keys
    keys = {key: value for key, value in keys.items() if value is not ...}
    return {"conversations": [{"from": who, "value": text} for who, text in turns], **keys}


GOOD = record()


def about(*images: str, id: str = "x") -> Conversation:
    """A minimal conversation about some pictures."""
    parts = (*[Part("image", name) for name in images], Part("text", "q"))
    return Conversation(id, (Message("user", parts), Message("assistant", (Part("text", "a"),))))


# --- one record ---------------------------------------------------------------------------------


def test_llava_record():
    turns = [
        ("system", "Be brief."),
        ("human", " What is it?\n<image>"),
        ("gpt", " A bus.\n"),
        ("human", "And <image> here? <image>"),
        ("gpt", "Two more."),
    ]
    conversation = conversation_or_fault(record(*turns, image=["a.jpg", "./b/c.jpg", "a.jpg"]))
    text, image = (lambda value: Part("text", value)), (lambda value: Part("image", value))
    messages = (
        Message("system", (text("Be brief."),)),
        Message("user", (text("What is it?"), image("a.jpg"))),
        Message("assistant", (text("A bus."),)),
        Message("user", (text("And"), image("b/c.jpg"), text("here?"), image("a.jpg"))),
        Message("assistant", (text("Two more."),)),
    )
    assert conversation == Conversation("7", messages)
    assert conversation.images == ("a.jpg", "b/c.jpg", "a.jpg")


def test_messages_form_and_id_from_content():
    form = {
        "messages": [
            {"role": "user", "content": "<image>Who?"},
            {"role": "assistant", "content": "Kane."},
        ],
        "images": ["1.jpg"],
    }
    conversation = conversation_or_fault(form)
    llava = record(("human", "<image>\nWho?"), ("gpt", "Kane."), image="1.jpg")
    assert conversation.messages == conversation_or_fault(llava).messages
    assert conversation.id == conversation_or_fault(dict(reversed(form.items()))).id
    assert conversation.id != conversation_or_fault(form | {"images": ["2.jpg"]}).id


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        ([], "empty, not an object"),
        ("text", "text, not an object"),
        (None, "missing, not an object"),
        ({}, "none of the forms that are read: `conversations`; `messages`; `query`"),
        (GOOD | {"messages": []}, "it has `conversations` and `messages`; keep one of them"),
        (GOOD | {"images": ["a.jpg"]}, "both `image` and `images`"),
        (GOOD | {"conversations": []}, "empty, not a list"),
        (GOOD | {"conversations": {"from": "human"}}, "not a list"),
        (GOOD | {"conversations": ["hi"]}, "turn 1 is text"),
        (GOOD | {"id": True}, "id is true or false"),
        (GOOD | {"id": []}, "id is empty"),
        (GOOD | {"id": "\ud800"}, "not valid Unicode"),
        (record(("human", "<image>"), ("gpt", "\ud800")), "text of turn 2 is not valid Unicode"),
        (record(("human", "<image>"), ("gpt", 5)), "`value` is a number"),
        (record(("human", "<image>"), ("gpt", None)), "`value` is missing"),
        (record(("human", "<image>"), ("robot", "x")), "unknown `from` 'robot'"),
        (record(("human", "<image>"), (None, "x")), "`from` is missing"),
        (record(("human", "<image>"), ("gpt", " \n")), "empty turn of the assistant"),
        (record(("human", ""), ("gpt", "x"), image=...), "empty turn of the user"),
        (record(("system", ""), ("human", "<image>"), ("gpt", "x")), "empty turn of the system"),
        (record(("human", "<image>")), "no assistant turn"),
        (record(("system", "<image>")), "no assistant turn"),
        (record(("gpt", "x"), ("human", "<image>")), "turn 1 is the assistant's"),
        (record(("human", "<image>"), ("human", "b"), ("gpt", "c")), "turn 2 is the user's"),
        (record(("human", "<image>"), ("gpt", "b"), ("gpt", "c")), "turn 3 is the assistant's"),
        (record(("human", "<image>"), ("gpt", "b"), ("system", "c")), "turn 3 is the system's"),
        (record(("human", "<image>"), ("gpt", "b"), ("human", "c")), "has no answer"),
        (record(("human", "<image>"), ("gpt", [{"type": "image"}])), "assistant's text"),
        (record(image=...), "0 picture(s) but 1 <image>"),
        (record(image=None), "0 picture(s) but 1 <image>"),
        (record(image=["a", "b", "c"]), "3 picture(s) but 1 <image>"),
        (record(image=5), "name is a number"),
        (record(image=""), "0 picture(s) but 1 <image>"),
        (record(image="."), "not a file name"),
        (record(image="a\0b"), "not a file name"),
        (record(image="/etc/passwd"), "outside"),
        (record(image="../a.jpg"), "outside"),
        (record(image="a/../../b.jpg"), "outside"),
        (record(image="..\\a.jpg"), "outside"),
        (record(image="C:\\a.jpg"), "outside"),
        (record(image="\\\\server\\share\\a.jpg"), "outside"),
        (record(image="https://x.org/a.jpg"), "web address"),
    ],
)
def test_bad_record(bad, reason, tmp_path):
    fault = conversation_or_fault(bad)
    assert isinstance(fault, Fault) and reason in fault.reason

    path = tmp_path / "train.json"
    path.write_text(json.dumps([GOOD, bad]))
    conversations, quarantined = read_all(path)
    assert [c.id for c in conversations] == ["7"]
    assert [q.where for q in quarantined] == ["train.json record 2"]
    assert reason in quarantined[0].reason
    with pytest.raises(PhiSightError) as caught:
        read_all(path, strict=True)
    assert str(caught.value).startswith("train.json record 2: ") and reason in str(caught.value)
    write_quarantine(tmp_path / "q.jsonl", quarantined)
    assert json.loads((tmp_path / "q.jsonl").read_text())["where"] == "train.json record 2"


KEYS = ("id", "image", "images", "conversations", "messages", "from", "value", "role", "content")
WORDS = ("<image>", "human", "gpt", "\ud800", "a.jpg", "..")
plain_values = st.none() | st.booleans() | st.integers() | st.floats() | st.text()
json_values = st.recursive(
    plain_values | st.sampled_from(WORDS),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(KEYS), inner, max_size=5)
    ),
    max_leaves=12,
)
near_turns = st.fixed_dictionaries(
    {
        "from": st.sampled_from(["human", "gpt", "system"]) | json_values,
        "value": st.text() | st.sampled_from(["<image>", "a <image> b"]) | json_values,
    }
)
near_records = st.fixed_dictionaries(
    {"conversations": st.lists(near_turns, max_size=4) | json_values},
    optional={"id": json_values, "image": st.text() | json_values},
)


@given(json_values | near_records)
def test_any_json_gives_a_sound_conversation_or_an_error(value):
    conversation = conversation_or_fault(value)
    if isinstance(conversation, Fault):
        assert conversation.reason
        return
    roles = [message.role for message in conversation.messages]
    roles = roles[1:] if roles[0] == "system" else roles
    assert roles == ["user", "assistant"] * (len(roles) // 2) and roles
    for message in conversation.messages:
        assert message.parts
        texts = [part.value for part in message.parts if part.kind == "text"]
        assert all(text and text == text.strip() for text in texts)
    assert not any(name.startswith(("/", "..")) for name in conversation.images)


@given(st.lists(json_values | near_records, max_size=3))
def test_a_file_of_any_json_loses_only_its_bad_records(tmp_path_factory, values):
    path = tmp_path_factory.mktemp("data") / "train.json"
    path.write_text(json.dumps([*values, GOOD]))
    conversations, quarantined = read_all(path)
    assert len(conversations) + len(quarantined) == len(values) + 1
    assert conversations[-1].images == ("bus.jpg",)
    write_quarantine(path.with_name("q.jsonl"), quarantined)


# --- whole files --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "empty"),
        (b" \n", "empty"),
        (b"[", "not JSON"),
        (b"hello", "not JSON"),
        (b"5", "a number, not a list"),
        (b"[]", "no usable record among 0"),
        (
            b'[{"id": 1}]',
            "no usable record among 1, the first (d.json record 1): it has turns in none",
        ),
        (b"{}", "no usable record"),
        (b'{\n"id": 1}', "neither a JSON list nor one JSON object a line"),
        (b"\xff\xfe\0", "not UTF-8"),
        (b"PK\x03\x04\x14\0\0\0\x08\0\xff", "not text, and of none of the kinds"),
        (b"[" * 100_000, "nested too deeply"),
        (b"[" + b"1" * 5000 + b"]", "a number is too long"),
    ],
)
def test_bad_file(tmp_path, content, reason):
    path = tmp_path / "d.json"
    path.write_bytes(content)
    with pytest.raises(PhiSightError) as caught:
        read_all(path)
    assert reason in str(caught.value)


def test_missing_file_and_folder(tmp_path):
    with pytest.raises(PhiSightError, match="no such file"):
        read_all(tmp_path / "none.json")
    with pytest.raises(PhiSightError, match="holds no data that is read"):
        read_all(tmp_path)


def test_json_lines(tmp_path):
    path = tmp_path / "d.jsonl"
    odd = record(("human", "<image> one\u2028line"), ("gpt", "x"))
    lines = [json.dumps(GOOD), "", json.dumps(odd, ensure_ascii=False), "{broken", "[]"]
    path.write_text("\ufeff" + "\n".join(lines) + "\n", encoding="utf-8")
    conversations, quarantined = read_all(path)
    assert len(conversations) == 2
    assert [q.where for q in quarantined] == ["d.jsonl line 4", "d.jsonl line 5"]
    assert "not JSON" in quarantined[0].reason


def test_repeated_ids_are_fine(tmp_path):
    path = tmp_path / "d.json"
    path.write_text(json.dumps([GOOD, GOOD]))
    assert len(read_all(path)[0]) == 2


def test_quarantine_file_is_whole_or_absent(tmp_path):
    path = tmp_path / "new" / "q.jsonl"
    reasons = (("line 1", "\ud800", "bad"), ("line 2", "", "worse"))
    entries = [Quarantined(*reason, MALFORMED) for reason in reasons]
    write_quarantine(path, entries)
    assert [Quarantined(**json.loads(line)) for line in path.read_text().splitlines()] == entries
    write_quarantine(path, entries[:1])
    assert len(path.read_text().splitlines()) == 1
    assert [p.name for p in path.parent.iterdir()] == ["q.jsonl"]
    with pytest.raises(PhiSightError, match="cannot be written"):
        write_quarantine(path / "below a file" / "q.jsonl", entries)
    path.with_name("folder").mkdir()
    with pytest.raises(PhiSightError, match="cannot be written"):
        write_quarantine(path.with_name("folder"), entries)
    assert sorted(p.name for p in path.parent.iterdir()) == ["folder", "q.jsonl"]


def test_real_files():
    if not SHARED.exists():
        pytest.skip("the shared data files are not here")
    conversations, quarantined = read_all(SHARED / "llava" / "mllm_demo.json")
    assert len(conversations) == 6 and not quarantined
    assert conversations[0].images == ("mllm_demo_data/1.jpg",) * 2
    questions = load_questions(SHARED / "pope" / "coco_pope_random.json")
    assert len(questions) == 3000
    assert questions[0].image == "COCO_val2014_000000310196.jpg"
    assert {question.answer for question in questions} == {"yes", "no"}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"question_id": None}, "`question_id` is missing"),
        ({"question_id": 1}, "occurs twice"),
        ({"image": None}, "name is missing"),
        ({"image": "../a.jpg"}, "outside"),
        ({"text": " "}, "`text` is empty"),
        ({"label": ["yes"]}, "`label` is a list"),
        ({"kind": 3}, "`kind` is a number"),
        ({"text": "\ud800"}, "not valid Unicode"),
        ({"question_id": "\ud800"}, "not valid Unicode"),
    ],
)
def test_bad_question(tmp_path, change, reason):
    good = {"question_id": 1, "image": "a.jpg", "text": "Is it?", "label": "yes"}
    path = tmp_path / "q.json"
    path.write_text(json.dumps(good) + "\n" + json.dumps(good | {"question_id": 2} | change))
    with pytest.raises(PhiSightError, match="q.json line 2: ") as caught:
        load_questions(path)
    assert reason in str(caught.value)
    path.write_text(json.dumps(good) + "\n" + json.dumps(good | {"question_id": "b", "kind": "k"}))
    assert [(q.id, q.kind) for q in load_questions(path)] == [("1", ""), ("b", "k")]
    path.write_text("[]")
    with pytest.raises(PhiSightError, match="not an object"):
        load_questions(path)


# --- splits -------------------------------------------------------------------------------------

names = st.integers(0, 30).map(lambda number: f"{number}.jpg")
conversation_lists = st.lists(
    st.tuples(st.lists(names, max_size=3), st.integers(0, 9).map(str)).map(
        lambda pair: about(*pair[0], id=pair[1])
    ),
    max_size=30,
)


def sides(conversations, fraction, seed):
    """The split as a set of ids and pictures each side, or None if it cannot be made."""
    try:
        train, validation = split_by_image(conversations, fraction, seed)
    except PhiSightError:
        return None
    return set(train), set(validation)


@given(conversation_lists, st.floats(0.001, 0.999), st.integers(0, 5), st.randoms())
def test_split_shares_nothing_and_ignores_order(conversations, fraction, seed, shuffler):
    split = sides(conversations, fraction, seed)
    shuffled = list(conversations)
    shuffler.shuffle(shuffled)
    assert sides(shuffled, fraction, seed) == split
    if split is None:
        return
    train, validation = split_by_image(conversations, fraction, seed)
    assert len(train) + len(validation) == len(conversations) and train and validation

    def marks(side):
        return {name for c in side for name in c.images or [f"id {c.id}"]}

    assert not marks(train) & marks(validation)
    assert train == [c for c in conversations if c in split[0]]  # the order is kept


def test_split_refuses_one_group_and_strange_fractions():
    together = [about("a", "b"), about("b", "c"), about("c")]
    with pytest.raises(PhiSightError, match="at least 2 pictures"):
        split_by_image(together, 0.5, 0)
    with pytest.raises(PhiSightError, match="found 0"):
        split_by_image([], 0.5, 0)
    assert split_by_image(together, 0, 0) == (together, [])
    for fraction in (-0.1, 1, 2, float("nan")):
        with pytest.raises(PhiSightError, match="out of range"):
            split_by_image(together, fraction, 0)


def test_split_is_fair_stable_and_seeded():
    conversations = [about(f"{n // 2}.jpg", id=str(n)) for n in range(20_000)]
    _, validation = split_by_image(conversations, 0.1, seed=3)
    assert 0.09 < len(validation) / len(conversations) < 0.11
    _, part = split_by_image(conversations[:7000], 0.1, seed=3)
    assert part == [c for c in validation if int(c.id) < 7000]  # more data moves nobody
    assert split_by_image(conversations, 0.1, seed=4)[1] != validation
    # Fixed for ever: a changed hash would let old validation pictures into new training runs.
    first = [c.images[0] for c in split_by_image(conversations[:200], 0.1, seed=3)[1]]
    assert sorted(set(first)) == EXPECTED_SPLIT


EXPECTED_SPLIT = ["28.jpg", "36.jpg", "61.jpg", "70.jpg", "76.jpg", "8.jpg"]


@pytest.mark.parametrize("fraction", [1e-9, 1 - 1e-9])
def test_split_never_leaves_a_side_empty(fraction):
    conversations = [about(f"{n}.jpg") for n in range(10)]
    train, validation = split_by_image(conversations, fraction, 0)
    assert min(len(train), len(validation)) == 1


def test_chain_of_shared_pictures_stays_together():
    chain = [about(f"{n}.jpg", f"{n + 1}.jpg", id=str(n)) for n in range(3000)]
    random.Random(0).shuffle(chain)
    others = [about(f"other {n}.jpg") for n in range(50)]
    for seed in range(5):
        _, validation = split_by_image([*chain, *others], 0.5, seed)
        assert len(set(validation) & set(chain)) in (0, len(chain))


def test_take_fraction():
    conversations = [about(f"{n // 2}.jpg", id=str(n)) for n in range(20_000)]
    tenth = take_fraction(conversations, 0.1, seed=1)
    assert 1800 < len(tenth) < 2200
    assert set(tenth) < set(take_fraction(conversations, 0.2, seed=1))
    assert take_fraction(conversations, 1, seed=1) == conversations
    assert len(take_fraction(conversations, 1e-12, seed=1)) == 2  # both about one picture
    assert take_fraction([], 0.5, seed=1) == []
    _, validation = split_by_image(tenth, 0.1, seed=1)  # the same seed, yet independent
    assert 0.05 < len(validation) / len(tenth) < 0.15
    for fraction in (0, -1, 1.1, float("nan")):
        with pytest.raises(PhiSightError, match="out of range"):
            take_fraction(conversations, fraction, seed=1)
