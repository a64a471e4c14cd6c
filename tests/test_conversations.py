"""Saved conversations: what is written is read back, what anybody else wrote is refused in a line,
and nobody reaches another's."""

from __future__ import annotations

import io
import json
import os

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from data.dataset import Message, Part
from data.images import MAX_BYTES
from errors import PhiSightError
from web import conversation_store
from web.conversation import (
    SavedConversation,
    before_question,
    from_json,
    new_conversation,
    reworded,
    to_json,
    with_answer,
)
from web.conversation_store import ConversationStore, new_key
from web.errors import RequestError
from web.talk import text_so_far
from web.uploads import read_picture

NAME = "a" * 64 + ".png"
words = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
questions = st.builds(
    lambda pictures, text: Message("user", (*[Part("image", NAME)] * pictures, Part("text", text))),
    st.integers(0, 2),
    words,
)
answered = st.builds(lambda text: Message("assistant", (Part("text", text),)), words)


@st.composite
def saved_conversations(draw) -> SavedConversation:
    pairs = draw(st.lists(st.tuples(questions, answered), max_size=3))
    messages = [message for pair in pairs for message in pair]
    if draw(st.booleans()):
        messages.append(draw(questions))
    return SavedConversation("0" * 16, tuple(messages))


def question(text: str = "What is it?") -> SavedConversation:
    return SavedConversation(new_conversation().id, (Message("user", (Part("text", text),)),))


def picture(colour: str = "red", kind: str = "PNG") -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (8, 8), colour).save(stream, kind)
    return stream.getvalue()


@given(saved_conversations())
def test_what_is_written_is_read_back(saved):
    assert from_json(to_json(saved), "x") == saved


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.text(max_size=5)
    | st.sampled_from(["user", "assistant", "text", "image", NAME, "0" * 16]),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.sampled_from(["id", "messages", "role", "parts", "kind", "value", "x"]),
            inner,
            max_size=5,
        )
    ),
    max_leaves=20,
)


@given(st.binary(max_size=50) | json_values.map(lambda value: json.dumps(value).encode()))
def test_whatever_is_in_a_file_is_a_conversation_or_one_line(data):
    try:
        saved = from_json(data, "x")
    except PhiSightError as error:
        assert "\n" not in str(error)
    else:
        assert from_json(to_json(saved), "x") == saved


@pytest.mark.parametrize(
    "change",
    [
        lambda r: r.update(id="../../../etc"),
        lambda r: r.pop("messages"),
        lambda r: r["messages"].reverse(),
        lambda r: r["messages"][0].update(role="assistant"),
        lambda r: r["messages"][0]["parts"][0].update(value="/etc/passwd"),
        lambda r: r["messages"][0]["parts"][0].update(value="../" + NAME),
        lambda r: r["messages"][0]["parts"][1].update(value="\ud800"),
        lambda r: r["messages"][0].update(parts=[]),
        lambda r: r["messages"][0].update(parts="text"),
        lambda r: r["messages"][1]["parts"][0].update(kind="image", value=NAME),
        lambda r: r.update(messages=r["messages"] * 501),
    ],
)
def test_a_file_that_was_meddled_with_is_refused(change):
    record = {
        "id": "0" * 16,
        "messages": [
            {
                "role": "user",
                "parts": [{"kind": "image", "value": NAME}, {"kind": "text", "value": "What?"}],
            },
            {"role": "assistant", "parts": [{"kind": "text", "value": "A star."}]},
        ],
    }
    from_json(json.dumps(record).encode(), "x")
    change(record)
    with pytest.raises(PhiSightError, match="delete the conversation"):
        from_json(json.dumps(record).encode(), "x")


def test_a_store_lists_opens_and_deletes_what_it_keeps(tmp_path):
    store = ConversationStore(tmp_path, new_key())
    first, second = question("One?"), question("Two " + "long " * 40)
    store.save(first)
    name = store.keep_picture(second.id, picture(), "x.png")
    store.save(second)
    assert [id for id, _ in store.titles()] == [second.id, first.id]
    assert store.titles()[1][1] == "One?" and store.titles()[0][1].endswith("…")
    assert store.load(first.id) == first
    assert store.picture(second.id, name).read_bytes() == picture()
    store.delete(second.id)
    assert [id for id, _ in store.titles()] == [first.id]
    assert not store.picture(second.id, name).exists()
    with pytest.raises(PhiSightError, match="not there any more"):
        store.load(second.id)


def test_nobody_finds_the_conversations_of_another(tmp_path):
    key = new_key()
    saved = question()
    ConversationStore(tmp_path, key).save(saved)
    other = ConversationStore(tmp_path, new_key())
    assert other.titles() == []
    with pytest.raises(PhiSightError):
        other.load(saved.id)
    assert key not in "".join(str(path) for path in tmp_path.rglob("*"))


@pytest.mark.parametrize("key", ["", "..", "a" * 31, "A" * 32, "a" * 32 + "\n", None, 3])
def test_a_damaged_key_opens_nothing(tmp_path, key):
    with pytest.raises(PhiSightError):
        ConversationStore(tmp_path, key)


@pytest.mark.parametrize("id", ["", "..", "0" * 15 + "/", "../" + "0" * 13, None])
def test_a_damaged_id_opens_nothing(tmp_path, id):
    store = ConversationStore(tmp_path, new_key())
    for use in (store.load, store.delete, lambda id: store.picture(id, NAME)):
        with pytest.raises(PhiSightError):
            use(id)
    with pytest.raises(PhiSightError):
        store.picture("0" * 16, "../conversation.json")


def test_a_damaged_conversation_is_listed_so_that_it_can_be_deleted(tmp_path):
    store = ConversationStore(tmp_path, new_key())
    saved = question()
    store.save(saved)
    file = store.folder / saved.id / conversation_store.FILE
    file.write_bytes(file.read_bytes()[:-5])
    assert store.titles() == [(saved.id, "?")]
    other = question()
    store.save(other)
    file.write_bytes((store.folder / other.id / conversation_store.FILE).read_bytes())
    with pytest.raises(PhiSightError, match="holds another one"):
        store.load(saved.id)


def test_the_oldest_goes_when_there_are_too_many(tmp_path, monkeypatch):
    monkeypatch.setattr(conversation_store, "MAX_CONVERSATIONS", 2)
    store = ConversationStore(tmp_path, new_key())
    kept = [question(str(number)) for number in range(3)]
    for saved in kept:
        store.save(saved)
    assert [title for _, title in store.titles()] == ["2", "1"]


def test_pictures_of_questions_that_were_never_asked_go_at_the_next_start(tmp_path):
    store = ConversationStore(tmp_path, new_key())
    asked, unasked, new = (new_conversation() for _ in range(3))
    store.save(asked)
    for conversation in (asked, unasked, new):
        store.keep_picture(conversation.id, picture_bytes(), "a.png")
    for conversation in (asked, unasked):
        os.utime(store.folder / conversation.id, (1, 1))
    conversation_store.prepare_root(tmp_path)
    left = {path.name for path in store.folder.iterdir()}
    assert left == {asked.id, new.id} and store.load(asked.id).id == asked.id


def test_a_nearly_full_disk_keeps_no_picture(tmp_path, monkeypatch):
    monkeypatch.setattr("web.temporary.SPARE_BYTES", 2**62)
    store, id = ConversationStore(tmp_path, new_key()), new_conversation().id
    with pytest.raises(PhiSightError, match="disk is nearly full"):
        store.keep_picture(id, picture_bytes(), "a.png")


def picture_bytes() -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (4, 4)).save(file, format="PNG")
    return file.getvalue()


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    store = ConversationStore(tmp_path / "file", new_key())
    for use in (store.titles, lambda: store.save(question())):
        with pytest.raises(PhiSightError, match="make room or make the folder writable"):
            use()
    with pytest.raises(PhiSightError, match="--conversations .*; name a folder that can be"):
        conversation_store.prepare_root(tmp_path / "file" / "below")


@pytest.mark.parametrize(
    ("kind", "suffix"),
    [("PNG", ".png"), ("JPEG", ".jpg"), ("GIF", ".gif"), ("TIFF", ".png"), ("BMP", ".png")],
)
def test_a_picture_is_kept_as_browsers_show_it(tmp_path, kind, suffix):
    store = ConversationStore(tmp_path, new_key())
    name = store.keep_picture("0" * 16, picture(kind=kind), "x")
    assert name.endswith(suffix)
    kept = Image.open(store.picture("0" * 16, name)).convert("RGB")
    assert kept.getpixel((0, 0))[0] > 250


def test_what_is_not_a_picture_is_not_kept(tmp_path):
    store = ConversationStore(tmp_path, new_key())
    with pytest.raises(PhiSightError, match="x.png: not a picture"):
        store.keep_picture("0" * 16, b"<svg onload='alert(1)'/>", "x.png")
    assert list(tmp_path.rglob("*")) == []


def test_a_picture_that_cannot_be_read_is_named_without_its_folder(tmp_path):
    path = tmp_path / "x.png"
    with pytest.raises(PhiSightError, match="^x.png: cannot be read .*; send it again"):
        read_picture(path)
    with path.open("wb") as file:
        file.truncate(MAX_BYTES + 1)
    with pytest.raises(PhiSightError, match="^x.png: .* is over the limit"):
        read_picture(path)


# -- back in a conversation ------------------------------------------------------------------------


def test_going_back_to_a_question():
    saved = with_answer(question("One?"), "1")
    saved = with_answer(
        SavedConversation(saved.id, (*saved.messages, *question("Two?").messages)), "2"
    )
    for index, start in ((0, 0), (1, 0), (2, 2), (3, 2)):
        earlier, asked = before_question(saved, index)
        assert earlier.messages == saved.messages[:start] and asked == saved.messages[start]
    for index in (-1, 4, None, "0"):
        with pytest.raises(RequestError):
            before_question(saved, index)


def test_other_words_keep_the_pictures():
    asked = Message("user", (Part("image", NAME), Part("text", "One?")))
    assert reworded(asked, " Two? ").parts == (Part("image", NAME), Part("text", "Two?"))
    assert reworded(asked, "").parts == (Part("image", NAME),)
    with pytest.raises(RequestError):
        reworded(Message("user", (Part("text", "One?"),)), " ")


@given(st.lists(st.text(max_size=3), max_size=10))
def test_a_growing_answer_ends_whole(pieces):
    for seconds in (0, 1000):
        seen = list(text_so_far(pieces, seconds))
        assert (seen[-1] if seen else "") == "".join(pieces)
        assert all(later.startswith(earlier) for earlier, later in zip(seen, seen[1:]))
