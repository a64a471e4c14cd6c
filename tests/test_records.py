"""What a record asks for beside its turns: honoured, or set aside with a reason, or counted."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from conftest import ROOT
from hypothesis import given
from hypothesis import strategies as st

from data.chat import ChatFormat, load_tokenizer, render
from data.dataset import (
    Conversation,
    Fault,
    Part,
    conversation_or_fault,
    picture_names,
    unread_keys,
)
from data.record_keys import NOT_DONE, UNLIKE_PICTURES, UNSUPERVISED
from data.stream import decode

FAULTS = Path(__file__).resolve().parents[2] / "shared" / "faults" / "records.jsonl"
QUESTION = {"from": "human", "value": "<image>\nWhat colour?"}
ANSWER = {"from": "gpt", "value": "red"}


def llava(*turns: dict, **keys) -> dict:
    record = {"id": "x", "image": "a.png", "conversations": list(turns) or [QUESTION, ANSWER]}
    return {key: value for key, value in (record | keys).items() if value is not ...}


def messages(question: object, answer: object = "red", **keys) -> dict:
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"id": "x", "messages": turns, **keys}


def two_answers(**keys) -> dict:
    """The first answer has these keys; the second has none."""
    wrong = {"from": "gpt", "value": "WRONG", **keys}
    return llava(QUESTION, wrong, {"from": "human", "value": "Look again."}, ANSWER)


def said(record: object) -> str:
    """A good record in short: "u:a.png+What? a:red", with ~ before what is not learnt."""
    conversation = conversation_or_fault(record)
    assert isinstance(conversation, Conversation), conversation
    return " ".join(
        f"{'' if m.learnt else '~'}{m.role[0]}:{'+'.join(part.value for part in m.parts)}"
        for m in conversation.messages
    )


def refused(record: object) -> Fault:
    fault = conversation_or_fault(record)
    assert isinstance(fault, Fault), fault
    return fault


@pytest.fixture(scope="module")
def chat_format() -> ChatFormat:
    return ChatFormat.from_tokenizer(load_tokenizer(ROOT / "assets/tiny/phi3"), 2)


def test_the_records_that_failed():
    if not FAULTS.exists():
        pytest.skip("the shared records that failed are not here")
    records = [json.loads(line) for line in FAULTS.read_text("utf-8").splitlines()]
    by_id = {record["id"]: record for record in records}
    ask = "u:a.png+What colour is it?"
    assert said(by_id["system_beside"]) == f"s:Answer like a pirate. {ask} a:red"
    assert "<video>" in refused(by_id["video"]).reason
    assert said(by_id["turn_not_to_learn"]) == f"{ask} ~a:WRONG u:Look again. a:red"
    assert "the id is not valid Unicode" in refused(by_id["\ud800"]).reason
    assert said(by_id["content_list"]) == said(by_id["no_mark"]) == f"{ask} a:red"


# -- the system message ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "key",
    ["system", "system_prompt", "system_message", "System", "systemPrompt", "system-message"],
)
def test_a_system_text_beside_the_turns_is_the_first_message(key):
    among = llava({"from": "system", "value": " Be brief."}, QUESTION, ANSWER)
    beside = llava(**{key: "Be brief.\n"})
    assert conversation_or_fault(beside) == conversation_or_fault(among)
    assert said(among | {key: "Be brief."}) == said(among)
    assert "another one among them" in refused(among | {key: "Be long."}).reason


@pytest.mark.parametrize("empty", [None, "", " \n", [], {}])
def test_an_empty_system_text_is_none(empty):
    assert conversation_or_fault(llava(system=empty)) == conversation_or_fault(llava())


@pytest.mark.parametrize(
    ("keys", "reason"),
    [
        ({"system": ["Be brief."]}, "`system` is a list"),
        ({"system": 3}, "`system` is a number"),
        ({"system": "\ud800"}, "not valid Unicode"),
        ({"system": "<image> Look", "image": ["a.png", "b.png"]}, "2 picture(s) but 1 <image>"),
        ({"system": "<video> Look"}, "<video> in the text"),
        ({"system": "a", "system_prompt": "b"}, "two system messages"),
        ({"system": "a", "System": "b"}, "`system` and `System` are two system messages"),
    ],
)
def test_a_system_text_that_cannot_be_used(keys, reason):
    assert reason in refused(llava(**keys)).reason


# -- what is learnt -------------------------------------------------------------------------------

LEARN = ("loss", "weight", "loss_weight", "loss_scale", "train", "training", "trainable", "learn")
MASK = ("mask", "masked", "ignore", "skip_loss", "maskLoss")
NOT_LEARNT = "u:a.png+What colour? ~a:WRONG u:Look again. a:red"
LEARNT = NOT_LEARNT.replace("~", "")


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        *[
            ({key: value}, NOT_LEARNT)
            for key in (*LEARN, "lossWeight")
            for value in (False, 0, 0.0)
        ],
        *[({key: value}, LEARNT) for key in LEARN for value in (True, 1, 1.0, None)],
        *[({key: True}, NOT_LEARNT) for key in MASK],
        *[({key: value}, LEARNT) for key in MASK for value in (False, None)],
        ({"loss": False, "weight": 0, "mask": True}, NOT_LEARNT),
    ],
)
def test_an_answer_that_is_not_to_be_learnt_is_read_only(keys, expected):
    assert said(two_answers(**keys)) == expected


@pytest.mark.parametrize(
    ("keys", "reason"),
    [
        ({"weight": 0.5}, "`weight` is 0.5"),
        ({"weight": float("nan")}, "`weight` is nan"),
        ({"loss": -1}, "`loss` is -1"),
        ({"loss": "false"}, "`loss` is text"),
        ({"train": [0, 5]}, "`train` is a list"),
        ({"mask": 0}, "`mask` is 0"),  # of a loss mask it would mean the opposite
        ({"training_detail": [{"train": False}]}, "`training_detail`"),
        ({"requires_grad": False}, "`requires_grad`"),
        ({"is_masked": True}, "`is_masked`"),
        ({"loss": True, "weight": 0}, "contradict each other"),
        ({"label": False}, "its answer is a bad one"),
        ({"system": "Be brief."}, "turn 2 has `system`"),
        ({"backprop": False}, "`backprop`"),
    ],
)
def test_what_cannot_be_learnt_as_asked_is_set_aside(keys, reason):
    fault = refused(two_answers(**keys))
    assert reason in fault.reason and fault.reason.count("turn 2") == 1


@pytest.mark.parametrize(
    ("keys", "kind"),
    [
        ({"weight": 0}, UNSUPERVISED),
        ({"train": False}, UNSUPERVISED),
        ({"weight": 0.3}, NOT_DONE),
        ({"loss_mask": [0, 1]}, NOT_DONE),
        ({"turn_weights": [0, 1]}, NOT_DONE),
        ({"train_on_inputs": True}, NOT_DONE),
        ({"skip": True}, NOT_DONE),
        ({"excluded": True}, NOT_DONE),
        ({"noLoss": True}, NOT_DONE),
        ({"use_for_training": False}, NOT_DONE),
        ({"mask": "Assistant"}, NOT_DONE),
        ({"kto_tag": False}, NOT_DONE),
    ],
)
def test_a_record_that_is_not_to_be_learnt_as_a_whole(keys, kind):
    assert refused(llava(**keys)).kind == kind


@pytest.mark.parametrize(
    "keys",
    [
        *[{"weight": 1}, {"mask": "User"}, {"train_id": 7}, {"label": 3}, {"skip": False}],
        *[{"train_on_inputs": False}, {"in_train_split": True}, {"not_for_training": False}],
    ],
)
def test_what_says_no_more_than_what_is_done_anyway(keys):
    assert conversation_or_fault(llava(**keys)) == conversation_or_fault(llava())


def test_words_of_the_user_are_never_learnt():
    off = llava({**QUESTION, "loss": False, "weight": 0}, ANSWER)
    assert conversation_or_fault(off) == conversation_or_fault(llava())
    assert "the user's words" in refused(llava({**QUESTION, "weight": 1}, ANSWER)).reason
    assert refused(llava(QUESTION, {**ANSWER, "loss": False})).kind == UNSUPERVISED


def test_the_ids_of_an_answer_that_is_not_learnt_are_not_supervised(chat_format):
    sample = render(conversation_or_fault(two_answers(loss=False)).messages, chat_format)
    whole = render(conversation_or_fault(two_answers()).messages, chat_format)
    assert sample.input_ids == whole.input_ids
    learnt = [i for i, learn in zip(sample.input_ids, sample.supervised) if learn]
    assert learnt == [*chat_format.encode_text("red"), chat_format.end_id]


# -- pictures and what is no picture --------------------------------------------------------------


@pytest.mark.parametrize(
    "keys",
    [
        *[{key: ["a.mp4"]} for key in ("video", "videos", "audio", "audios", "speech", "sound")],
        *[{key: "a.mp4"} for key in ("video_path", "videoUrl", "Audio", "input_audio", "media")],
        {"tools": [{"name": "f"}]},
        {"documents": ["Long ago"]},
    ],
)
def test_what_is_neither_text_nor_a_picture_sets_the_record_aside(keys):
    fault = refused(llava(**keys))
    assert fault.kind == NOT_DONE and f"`{next(iter(keys))}`" in fault.reason
    turn = llava({**QUESTION, **keys}, ANSWER)
    assert refused(turn).kind == NOT_DONE
    empty = dict.fromkeys(keys, [])
    assert conversation_or_fault(llava(**empty)) == conversation_or_fault(llava())


@pytest.mark.parametrize("mark", ["<video>", "<audio>", "<speech>", "<bbox>", "<ref-object>"])
def test_a_mark_for_what_is_not_there_is_no_word_of_a_question(mark):
    asked = {"from": "human", "value": f"{mark}What happens?"}
    assert mark in refused(llava(asked, ANSWER, image=...)).reason
    html = {"from": "gpt", "value": "Write <video> into the page."}
    assert "<video>" in said(llava({"from": "human", "value": "How?"}, html, image=...))


def test_pictures_without_a_mark_come_before_the_first_question():
    asked = {"from": "human", "value": "What colour?"}
    again = {"from": "human", "value": "And now?"}
    assert said(llava(asked, ANSWER)) == said(llava())
    record = llava(asked, ANSWER, again, ANSWER, image=["a.png", "b.png"], system="S")
    assert said(record) == "s:S u:a.png+b.png+What colour? a:red u:And now? a:red"


@pytest.mark.parametrize(
    "mark", ["<|image_1|>", "<IMAGE>", "<image_1>", "<img>", "[IMG]", "<Image >"]
)
def test_a_picture_that_another_mark_stands_for_is_not_guessed(mark):
    asked = {"from": "human", "value": f"{mark}\nWhat colour?"}
    assert refused(llava(asked, ANSWER)).kind == UNLIKE_PICTURES
    assert said(llava(asked, ANSWER, image=...))  # without a picture they are words


@pytest.mark.parametrize(
    "keys", [{"image_path": "a.png"}, {"img": "a"}, {"imageUrl": "a.png"}, {"file_name": "x/a.JPG"}]
)
def test_a_picture_under_another_key_is_not_lost(keys):
    asked = {"from": "human", "value": "What colour?"}
    assert "call it `image`" in refused(llava(asked, ANSWER, image=..., **keys)).reason
    assert said(llava(**keys)) == said(llava())  # beside a picture it is data about it
    assert "`image_2`" in refused(llava(image_2="b.png")).reason


def test_pictures_of_a_turn():
    turns = [{"role": "user", "content": "One?", "images": ["a.png"]}, {"role": "assistant"}]
    turns[1]["content"] = "1"
    second = [{"role": "user", "content": "Two <image> two?", "image": "b.png"}, turns[1]]
    record = {"id": "x", "messages": [*turns, *second]}
    assert said(record) == "u:a.png+One? a:1 u:Two+b.png+two? a:1"
    assert picture_names(record) == ["a.png", "b.png"]
    assert refused(record | {"images": ["c.png"]}).kind == UNLIKE_PICTURES
    assert said(record | {"images": ["a.png", "b.png"]}) == said(record)
    turns[0]["content"] = "<image><image> One?"
    assert refused(record).kind == UNLIKE_PICTURES


TEXT = {"type": "text", "text": "What?"}


@pytest.mark.parametrize(
    ("content", "keys"),
    [
        ([{"type": "image", "image": "a.png"}, TEXT], {}),
        ([{"type": "image", "image": "./a.png", "text": None}, {**TEXT, "image": None}], {}),
        ([{"type": "image", "path": "a.png"}, TEXT], {}),
        ([{"type": "image_url", "image_url": {"url": "a.png", "detail": "low"}}, TEXT], {}),
        ([{"type": "input_image", "image_url": "a.png"}, {**TEXT, "type": "input_text"}], {}),
        ([{"image": "a.png"}, {"text": "What?"}], {}),
        ([{"type": "image"}, TEXT], {"images": ["a.png"]}),
        ([{"type": "image", "index": 0}, TEXT], {"images": ["a.png"]}),
        ([{"type": "text", "text": "<image>What?"}], {"images": ["a.png"]}),
        ([TEXT], {"images": ["a.png"]}),
        ([{"type": "image", "image": "a.png"}, TEXT], {"images": ["a.png"]}),
    ],
)
def test_a_list_of_parts_is_what_its_text_would_be(content, keys):
    record = messages(content, [{"type": "text", "text": "red"}], **keys)
    assert said(record) == said(messages("<image>What?", images=["a.png"])) == "u:a.png+What? a:red"
    assert picture_names(record)[0] == "a.png"


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ([], "`content` is empty"),
        (["What?"], "part 1 of turn 1 is text"),
        ([TEXT, {"type": "video", "video": "a.mp4"}], "part 2 of turn 1 has `video`"),
        ([{"type": "input_audio", "input_audio": {"data": "x"}}], "`input_audio`"),
        ([{"type": "refusal", "refusal": "No."}], "the type `refusal`"),
        ([{"type": 3}], "the type a number"),
        ([{"type": "text", "text": 3}], "`text` is a number"),
        ([{"type": "text", "text": "\ud800"}], "not valid Unicode"),
        ([{"type": "text", "text": "a", "image": "a.png"}], "names a picture"),
        ([{"type": "image", "image": "a.png", "text": "a"}], "more than one"),
        ([{"type": "image", "image": "a.png", "url": "b.png"}], "more than one"),
        ([{"type": "image", "image": "../a.png"}], "outside the image folder"),
        ([{"type": "image", "image": "data:image/png;base64,AA"}], "is not valid base64"),
        ([{"type": "image", "image": "a.png"}, {**TEXT, "text": "<image>"}], "0 picture(s) but 1"),
        ([{"type": "image"}, TEXT], "0 picture(s) but 1"),
        ([{**TEXT, "loss": False}], "only a whole turn can"),
        ([{**TEXT, "weight": 0.5}], "`weight` is 0.5"),
    ],
)
def test_parts_that_cannot_be_used(content, reason):
    assert reason in refused(messages(content)).reason


def test_parts_take_pictures_in_the_order_in_which_they_are_named():
    parts = [{"type": "image", "index": 1}, TEXT, {"type": "image", "index": 0}]
    assert "another order" in refused(messages(parts, images=["a.png", "b.png"])).reason
    assert "where no picture can be" in refused(messages("Q", [{"image": "a.png"}])).reason


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("a\x1b[2J.png", "control character"),
        ("a\nb.png", "control character"),
        ("a" * 256, "longer than"),
        ("a/" * 2100 + "b", "longer than"),
        ("é" * 128, "longer than"),
        ("data:image/png;base64," + "A" * 100_000, "of no kind that is read"),
    ],
)
def test_a_name_that_no_file_should_have_is_told_in_short(name, reason):
    fault = refused(llava(image=name))
    assert reason in fault.reason and len(fault.reason) < 250 and fault.reason.isprintable()


# -- keys that nothing reads ----------------------------------------------------------------------


def test_every_key_that_nothing_reads_is_named():
    turns = [{**QUESTION, "name": "Ann", "loss": False}, {**ANSWER, "markdown": None}]
    record = llava(*turns, source="web", width=3, system="S", weight=1)
    assert sorted(unread_keys(record)) == ["source", "turn: markdown", "turn: name", "width"]
    parts = messages([{"type": "image", "image": "a.png", "detail": "low"}, TEXT], metadata={})
    assert sorted(unread_keys(parts)) == ["metadata", "part: detail"]
    assert list(unread_keys("text")) == list(unread_keys({"conversations": "x"})) == []


def test_a_key_that_stands_twice_is_not_the_last_of_the_two():
    text = json.dumps(llava())
    for before, after, key in (
        ('"image"', '"image": "b.png", "image"', "image"),
        ('"value": "red"', '"value": "blue", "value": "red"', "value"),
        ('"id"', '"system": "a", "system": "b", "id"', "system"),
    ):
        repeated = decode(text.replace(before, after))
        assert f"has `{key}` twice" in refused(repeated).reason
    part = '{"messages": [{"role": "user", "content": [{"text": "a", "text": "b"}]}]}'
    assert "has `text` twice" in refused(decode(part)).reason
    assert refused(decode("[[1, 2]]")).reason.endswith("a list, not an object")


# -- anything -------------------------------------------------------------------------------------

keys = st.sampled_from(
    "id image images system videos source loss weight mask train label role content from value "
    "conversations messages type text url index tools image_path name \ud800".split()
) | st.text(max_size=4)
scalars = st.none() | st.booleans() | st.integers(-1, 2) | st.floats() | st.text(max_size=5)
values = st.recursive(
    scalars | st.sampled_from(["<image>", "human", "gpt", "user", "assistant", "system", "a.png"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(keys, inner, max_size=4),
    max_leaves=10,
)
odd = st.dictionaries(keys, values, max_size=2)


@st.composite
def near_records(draw) -> dict:
    """A good record of either form with a few keys put into it, its turns or its parts."""
    role, text, form = draw(
        st.sampled_from([("from", "value", "conversations"), ("role", "content", "messages")])
    )
    roles = ["human", "gpt"] if role == "from" else ["user", "assistant"]
    turns = []
    for place in range(draw(st.sampled_from([2, 4]))):
        words = st.sampled_from(["What?", "red", "<image> see"])
        parts = st.lists(
            st.builds(lambda part, more: part | more, st.just(TEXT) | st.just({"image": "b"}), odd),
            max_size=3,
        )
        turns.append({role: roles[place % 2], text: draw(words | parts), **draw(odd)})
    return {form: turns, "id": "x", **draw(st.just({}) | st.just({"image": "a.png"})), **draw(odd)}


@given(values | near_records())
def test_a_record_of_any_kind_is_used_whole_or_set_aside(chat_format, record):
    assert all(isinstance(key, str) for key in unread_keys(record))
    result = conversation_or_fault(record)
    if isinstance(result, Fault):
        assert result.reason and result.reason.isprintable()
        return
    assert set(result.images) <= set(picture_names(record))
    sample = render(result.messages, chat_format)
    learnt = [m for m in result.messages if m.role == "assistant" and m.learnt]
    wanted = [i for m in learnt for i in (*ids_of(m.parts, chat_format), chat_format.end_id)]
    assert learnt and wanted == [
        i for i, learn in zip(sample.input_ids, sample.supervised) if learn
    ]


def ids_of(parts: tuple[Part, ...], chat_format: ChatFormat) -> list[int]:
    return chat_format.encode_text("\n".join(part.value for part in parts))
