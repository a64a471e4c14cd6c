"""Strangers' JSON in, checked conversations out; splits that share no picture."""

import json
import random
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from data.dataset import (
    Conversation,
    Message,
    Part,
    Quarantined,
    check_images,
    load_conversations,
    load_questions,
    parse_record,
    split_by_image,
    take_fraction,
    write_quarantine,
)
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
        ("system", "Be brief."), ("human", " What is it?\n<image>"), ("gpt", " A bus.\n"),
        ("human", "And <image> here? <image>"), ("gpt", "Two more."),
    ]  # fmt: skip
    conversation = parse_record(record(*turns, image=["a.jpg", "./b/c.jpg", "a.jpg"]), "x")
    text, image = (lambda value: Part("text", value)), (lambda value: Part("image", value))
    assert conversation == Conversation("7", (
        Message("system", (text("Be brief."),)),
        Message("user", (text("What is it?"), image("a.jpg"))),
        Message("assistant", (text("A bus."),)),
        Message("user", (text("And"), image("b/c.jpg"), text("here?"), image("a.jpg"))),
        Message("assistant", (text("Two more."),)),
    ))  # fmt: skip
    assert conversation.images == ("a.jpg", "b/c.jpg", "a.jpg")


def test_messages_form_and_id_from_content():
    form = {
        "messages": [{"role": "user", "content": "<image>Who?"},
                     {"role": "assistant", "content": "Kane."}],
        "images": ["1.jpg"],
    }  # fmt: skip
    conversation = parse_record(form, "x")
    assert (
        conversation.messages
        == parse_record(
            record(("human", "<image>\nWho?"), ("gpt", "Kane."), image="1.jpg"), "x"
        ).messages
    )
    assert conversation.id == parse_record(dict(reversed(form.items())), "y").id
    assert conversation.id != parse_record(form | {"images": ["2.jpg"]}, "x").id


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        ([], "empty, not an object"),
        ("text", "text, not an object"),
        (None, "missing, not an object"),
        ({}, "one of `conversations` and `messages`"),
        (GOOD | {"messages": []}, "one of `conversations` and `messages`"),
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
        (record(("human", "q"), ("gpt", "<image>")), "assistant's text"),
        (record(image=...), "0 picture(s) but 1 <image>"),
        (record(image=None), "0 picture(s) but 1 <image>"),
        (record(image=["a", "b", "c"]), "3 picture(s) but 1 <image>"),
        (record(("human", "What?"), ("gpt", "x")), "1 picture(s) but 0 <image>"),
        (record(image=5), "name is a number"),
        (record(image=""), "not a file name"),
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
    with pytest.raises(PhiSightError) as caught:
        parse_record(bad, "train.json record 3")
    assert str(caught.value).startswith("train.json record 3: ") and reason in str(caught.value)

    path = tmp_path / "train.json"
    path.write_text(json.dumps([GOOD, bad]))
    loaded = load_conversations(path)
    assert [c.id for c in loaded.conversations] == ["7"]
    assert [q.where for q in loaded.quarantined] == ["train.json record 2"]
    assert reason in loaded.quarantined[0].reason
    with pytest.raises(PhiSightError, match="train.json record 2: "):
        load_conversations(path, strict=True)
    write_quarantine(tmp_path / "q.jsonl", loaded.quarantined)
    assert json.loads((tmp_path / "q.jsonl").read_text())["where"] == "train.json record 2"


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats()
    | st.text() | st.sampled_from(["<image>", "human", "gpt", "\ud800", "a.jpg", ".."]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(
        st.sampled_from(["id", "image", "images", "conversations", "messages", "from", "value",
                         "role", "content"]), inner, max_size=5),
    max_leaves=12,
)  # fmt: skip
near_records = st.fixed_dictionaries(
    {
        "conversations": st.lists(
            st.fixed_dictionaries({
                "from": st.sampled_from(["human", "gpt", "system"]) | json_values,
                "value": st.text() | st.sampled_from(["<image>", "a <image> b"]) | json_values,
            }), max_size=4) | json_values,
    },
    optional={"id": json_values, "image": st.text() | json_values},
)  # fmt: skip


@given(json_values | near_records)
def test_any_json_gives_a_sound_conversation_or_an_error(value):
    try:
        conversation = parse_record(value, "here")
    except PhiSightError as error:
        assert str(error).startswith("here: ")
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
    loaded = load_conversations(path)
    assert len(loaded.conversations) + len(loaded.quarantined) == len(values) + 1
    assert loaded.conversations[-1].images == ("bus.jpg",)
    write_quarantine(path.with_name("q.jsonl"), loaded.quarantined)


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
        (b'[{"id": 1}]', "no usable record among 1, the first (d.json record 1): it must"),
        (b"{}", "no usable record"),
        (b'{\n"id": 1}', "neither a JSON list nor one JSON object a line"),
        (b"\xff\xfe\0", "not UTF-8"),
        (b"[" * 100_000, "nested too deeply"),
        (b"[" + b"1" * 5000 + b"]", "a number is too long"),
    ],
)
def test_bad_file(tmp_path, content, reason):
    path = tmp_path / "d.json"
    path.write_bytes(content)
    with pytest.raises(PhiSightError) as caught:
        load_conversations(path)
    assert reason in str(caught.value)


def test_missing_file_and_folder(tmp_path):
    with pytest.raises(PhiSightError, match="no such file"):
        load_conversations(tmp_path / "none.json")
    with pytest.raises(PhiSightError, match="cannot be read"):
        load_conversations(tmp_path)


def test_json_lines(tmp_path):
    path = tmp_path / "d.jsonl"
    odd = record(("human", "<image> one\u2028line"), ("gpt", "x"))
    lines = [json.dumps(GOOD), "", json.dumps(odd, ensure_ascii=False), "{broken", "[]"]
    path.write_text("\ufeff" + "\n".join(lines) + "\n", encoding="utf-8")
    loaded = load_conversations(path)
    assert len(loaded.conversations) == 2
    assert [q.where for q in loaded.quarantined] == ["d.jsonl line 4", "d.jsonl line 5"]
    assert "not JSON" in loaded.quarantined[0].reason


def test_repeated_ids_are_fine(tmp_path):
    path = tmp_path / "d.json"
    path.write_text(json.dumps([GOOD, GOOD]))
    assert len(load_conversations(path).conversations) == 2


def test_quarantine_file_is_whole_or_absent(tmp_path):
    path = tmp_path / "new" / "q.jsonl"
    entries = [Quarantined("line 1", "\ud800", "bad"), Quarantined("line 2", "", "worse")]
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
    loaded = load_conversations(SHARED / "llava" / "mllm_demo.json")
    assert len(loaded.conversations) == 6 and not loaded.quarantined
    assert loaded.conversations[0].images == ("mllm_demo_data/1.jpg",) * 2
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


def test_check_images(tmp_path):
    Image.new("RGB", (5, 5)).save(tmp_path / "good.png")
    (tmp_path / "broken.png").write_bytes((tmp_path / "good.png").read_bytes()[:-30])
    conversations = [
        about("good.png", id="a"), about("good.png", "broken.png", id="b"),
        about("none.png", id="c"), about(id="d"), about("good.png/x", id="e"),
    ]  # fmt: skip
    checked = check_images(conversations, tmp_path)
    assert [c.id for c in checked.conversations] == ["a", "d"]
    assert [(q.id, q.where) for q in checked.quarantined] == [
        ("b", "picture broken.png"), ("c", "picture none.png"), ("e", "picture good.png/x"),
    ]  # fmt: skip
    assert "truncated" in checked.quarantined[0].reason
    present = check_images(conversations, tmp_path, decode=False)
    assert [c.id for c in present.conversations] == ["a", "b", "d"]
    with pytest.raises(PhiSightError, match="no such image folder"):
        check_images(conversations, tmp_path / "none")


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
