"""Saved conversations: what is written is read back, what anybody else wrote is refused in a line,
nobody reaches another's, and nothing that was said is lost."""

from __future__ import annotations

import io
import json
import os
import tempfile
import threading
import time
import zipfile
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from data.dataset import Message, Part
from data.images import MAX_BYTES
from errors import PhiSightError
from web.chat import conversation as trees
from web.chat import store as conversation_store
from web.chat import sweep, told
from web.chat.conversation import (
    BEGINNING,
    Note,
    SavedConversation,
    answered_again,
    cut,
    dropping,
    messages_of,
    put_back,
    read_turns,
    showing,
    with_answer,
    with_question,
)
from web.chat.export import write_archive
from web.chat.form import cut_from_json, cut_to_json, from_json, to_json
from web.chat.store import CUT, FILE, TRASH, ConversationStore, new_id, new_key
from web.errors import NotThere, RequestError
from web.uploads import read_picture

NAME = "a" * 64 + ".png"
ID = "0" * 16
words = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)


def said(*texts: str, id: str = ID) -> SavedConversation:
    """Questions and answers in turn."""
    conversation = SavedConversation(id)
    for index, text in enumerate(texts):
        path = conversation.path
        parent = path[-1].number if path else BEGINNING
        if index % 2:
            conversation = with_answer(conversation, parent, text, Note("stop", 3, 0.5, 6.0))
        else:
            conversation = with_question(conversation, parent, text)
    return conversation


def texts(conversation: SavedConversation) -> list[str]:
    return [node.text for node in conversation.path]


def picture(colour: str = "red", kind: str = "PNG") -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (8, 8), colour).save(stream, kind)
    return stream.getvalue()


@pytest.fixture
def store(tmp_path) -> ConversationStore:
    return ConversationStore(tmp_path, new_key())


def begin(store: ConversationStore, *texts: str) -> SavedConversation:
    """A new conversation in a store."""
    id = new_id()
    made = said(*(texts or ("What is it?",)), id=id)
    return store.change(id, 0, lambda conversation: made)


# -- the tree --------------------------------------------------------------------------------------

OPERATIONS = ("ask", "answer", "again", "edit", "show", "cut", "undo", "drop", "system")
operations = st.lists(
    st.tuples(st.sampled_from(OPERATIONS), st.integers(0, 30), words, st.booleans()), max_size=25
)


class Grown:
    """A conversation that has gone through any operations; what is refused changes nothing."""

    def __init__(self, steps: list[tuple[str, int, str, bool]]) -> None:
        self.now, self.gone = SavedConversation(ID), None
        self.said: set[int] = set()
        for step in steps:
            try:
                self.take(*step)
            except RequestError:
                continue
            self.check()

    def take(self, operation: str, number: int, text: str, flag: bool) -> None:
        now = self.now
        numbers = sorted(now.nodes)
        node = numbers[number % len(numbers)] if numbers else 99
        path = now.path
        if operation == "ask":
            pictures = (NAME,) if flag else ()
            end = path[-1].number if path else BEGINNING
            self.now = with_question(now, end, text, pictures)
            assert read_turns(self.now)[-1] == self.now.path[-1]  # what is asked is read
        elif operation == "edit":
            question = now.question(node)
            self.now = with_question(now, question.parent, text, question.pictures)
            assert self.now.path[:-1][: len(now.above(question)) - 1] == now.above(question)[:-1]
            assert self.now.path[-1] in read_turns(self.now)
        elif operation == "answer":
            question = now.question(node)
            self.now = with_answer(now, question.number, text, None)
        elif operation == "again":
            self.now, question = answered_again(now, node)
            assert question in self.now.path and question in read_turns(self.now, question)
        elif operation == "show":
            self.now = showing(now, node)
            assert self.now.nodes[node] in self.now.path
        elif operation == "cut":
            self.now, self.gone = cut(now, node)
            assert put_back(self.now, self.gone).nodes == now.nodes
            self.gone = cut_from_json(cut_to_json(self.gone))
        elif operation == "undo" and self.gone is not None:
            self.now, self.gone = put_back(now, self.gone), None
            assert now.nodes.items() <= self.now.nodes.items()
        elif operation == "drop":
            self.now = dropping(now, number)
        elif operation == "system":
            self.now = replace(now, system=text.strip())
        if operation != "cut":
            assert now.nodes.items() <= self.now.nodes.items()  # nothing is ever lost

    def check(self) -> None:
        now = self.now
        assert from_json(to_json(now), "x") == now
        path = now.path
        assert [n.role for n in path] == (["user", "assistant"] * len(path))[: len(path)]
        assert all(a.number < b.number for a, b in zip(path, path[1:]))
        assert now.next > max(now.nodes, default=0)
        below = now.versions()
        assert below.keys() == now.shown.keys()  # wherever there is something, one is shown
        assert all(now.shown[parent] in numbers for parent, numbers in below.items())
        reachable = set(below.get(BEGINNING, ()))
        for number in sorted(now.nodes):
            reachable |= {*below.get(number, ())} if number in reachable else set()
        assert reachable == now.nodes.keys()
        assert now.dropped <= len(path)
        turns = read_turns(now)
        assert not turns or turns[0].role == "user"
        roles = [message.role for message in messages_of(now, turns)]
        assert roles[:1] == ["system"] if now.system else roles[:1] in ([], ["user"])
        spoken = roles[1:] if now.system else roles
        assert spoken == (["user", "assistant"] * len(spoken))[: len(spoken)]
        assert all(m.parts for m in messages_of(now, turns))


@given(operations)
def test_any_sequence_of_operations_leaves_a_whole_tree(steps):
    Grown(steps)


def test_versions_stand_beside_each_other_with_what_followed_them():
    first = said("One?", "1", "Two?", "2")
    edited = with_question(first, BEGINNING, "Uno?")
    assert texts(edited) == ["Uno?"] and edited.beside(edited.path[0]) == [1, 5]
    edited = with_answer(edited, 5, "I", None)
    assert texts(showing(edited, 1)) == ["One?", "1", "Two?", "2"]
    assert texts(showing(showing(edited, 4), 6)) == ["Uno?", "I"]
    again, question = answered_again(first, 2)
    assert question.text == "One?" and texts(again) == ["One?", "1", "Two?", "2"]
    again = with_answer(again, 1, "eins", None)
    assert texts(again) == ["One?", "eins"] and texts(showing(again, 2))[1:] == ["1", "Two?", "2"]


def test_an_answer_of_nothing_takes_no_other_answers_place():
    answered = said("One?", "1")
    assert with_answer(answered, 1, "  ", None) == answered
    unanswered = with_answer(said("One?"), 1, "", Note("cancelled", 0, 0.1, 0.0))
    assert texts(unanswered) == ["One?", ""]


def test_a_question_without_an_answer_is_read_with_the_next_one():
    asked = with_question(SavedConversation(ID), BEGINNING, "", (NAME,))
    asked = with_question(asked, 1, "What is it?")
    assert texts(asked) == ["", "", "What is it?"]
    (message,) = messages_of(asked, read_turns(asked))
    assert [part.kind for part in message.parts] == ["image", "text"]


def test_dropped_turns_are_not_read_and_what_is_asked_anew_is():
    conversation = replace(said("One?", "1", "Two?", "2", "Three?"), system="Be brief.")
    dropped = dropping(conversation, 1)  # an answer is not read without its question
    assert [node.text for node in read_turns(dropped)] == ["Two?", "2", "Three?"]
    read = messages_of(dropped, read_turns(dropped))
    assert [message.role for message in read] == ["system", "user", "assistant", "user"]
    again, question = answered_again(dropped, 2)
    assert question in read_turns(again)
    left, _ = cut(dropping(conversation, 4), 3)
    assert left.dropped == 2
    asked = with_question(left, 2, "Four?")
    assert [node.text for node in read_turns(asked)] == ["Four?"]
    assert dropping(dropped, 0).dropped == 0
    for number in range(20):
        assert dropping(conversation, number).dropped in (0, 2, 4, 5)


def test_what_was_cut_comes_back_beside_what_was_said_meanwhile():
    whole = said("One?", "1", "Two?", "2")
    left, gone = cut(whole, 2)
    assert texts(left) == ["One?"] and put_back(left, gone) == whole
    meanwhile = with_answer(left, 1, "eins", None)
    back = put_back(meanwhile, gone)
    assert texts(back) == ["One?", "1", "Two?", "2"] and back.beside(back.nodes[2]) == [2, 5]
    assert texts(showing(back, 5)) == ["One?", "eins"]
    for elsewhere in (whole, SavedConversation(ID)):
        with pytest.raises(RequestError, match="nothing_to_undo"):
            put_back(elsewhere, gone)


def test_cutting_takes_all_that_stand_at_a_place():
    both = with_question(said("One?", "1"), BEGINNING, "Uno?")
    left, gone = cut(both, 1)
    assert left.nodes == {} and left.path == [] and len(gone.nodes) == 3
    assert put_back(left, gone).nodes == both.nodes


@pytest.mark.parametrize("number", [0, -1, 5, 99])
def test_what_is_not_there_is_refused(number):
    conversation = said("One?", "1", "Two?", "2")
    for use in (showing, cut, answered_again):
        with pytest.raises(RequestError, match="nothing_there"):
            use(conversation, number)


def test_a_question_of_nothing_is_refused():
    for text in ("", "  \n"):
        with pytest.raises(RequestError, match="ask_something"):
            with_question(SavedConversation(ID), BEGINNING, text)
    assert with_question(SavedConversation(ID), BEGINNING, " ", (NAME,)).path[0].text == ""


def test_a_conversation_has_an_end(monkeypatch):
    conversation = said("One?", "1")
    monkeypatch.setattr(trees, "MAX_NODES", 2)
    with pytest.raises(RequestError, match="conversation_full"):
        with_question(conversation, 2, "Two?")
    with pytest.raises(RequestError, match="conversation_full"):
        answered_again(conversation, 1)
    left, gone = cut(conversation, 1)
    left = with_question(left, BEGINNING, "Other?")
    with pytest.raises(RequestError, match="conversation_full"):
        put_back(left, gone)


def test_no_question_is_taken_whose_answer_would_have_no_room(monkeypatch):
    """The answer would be written, and then be lost."""
    conversation = said("One?", "1")
    for most, is_taken in ((3, False), (4, True)):
        monkeypatch.setattr(trees, "MAX_NODES", most)
        if is_taken:
            asked = with_question(conversation, 2, "Two?")
            assert len(with_answer(asked, 3, "2", None).nodes) == 4
            continue
        with pytest.raises(RequestError, match="conversation_full"):
            with_question(conversation, 2, "Two?")


def test_what_was_cut_from_something_else_is_not_put_back():
    """Two files that do not belong together would make one that cannot be read."""
    whole = said("One?", "1", "Two?", "2")
    left, gone = cut(whole, 3)
    others = said("One?")
    for other in (replace(others, next=9), replace(left, next=3)):
        with pytest.raises(RequestError, match="nothing_to_undo"):
            put_back(other, gone)


# -- its file --------------------------------------------------------------------------------------

json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=5)
    | st.sampled_from(["user", "assistant", "text", "image", NAME, ID, 2]),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.sampled_from(
                "id messages role parts kind value x form nodes shown node parent text pictures"
                " note next version dropped".split()
            ),
            inner,
            max_size=5,
        )
    ),
    max_leaves=20,
)


def first_form() -> dict:
    """What the first version wrote."""
    return {
        "id": ID,
        "messages": [
            {
                "role": "user",
                "parts": [{"kind": "image", "value": NAME}, {"kind": "text", "value": "What?"}],
            },
            {"role": "assistant", "parts": [{"kind": "text", "value": "A star."}]},
            {"role": "user", "parts": [{"kind": "text", "value": "Where?"}]},
            {"role": "assistant", "parts": []},
        ],
    }


def second_form() -> dict:
    whole = with_question(said("One?", "1", "Two?", "2"), BEGINNING, "Uno?", (NAME,))
    return json.loads(to_json(dropping(replace(whole, name="Numbers", pinned=True), 0)))


@given(st.binary(max_size=50) | json_values.map(lambda value: json.dumps(value).encode()))
def test_whatever_is_in_a_file_is_a_conversation_or_one_line(data):
    for read in (lambda data: from_json(data, "x"), cut_from_json):
        try:
            saved = read(data)
        except PhiSightError as error:
            assert "\n" not in str(error)
        else:
            assert isinstance(saved, trees.Cut) or from_json(to_json(saved), "x") == saved


paths = st.lists(st.integers(0, 8), max_size=4)


@given(paths, json_values)
def test_a_value_that_was_exchanged_is_read_whole_or_refused(path, value):
    for record in (first_form(), second_form()):
        at = record
        for step in path:
            keys = list(at) if isinstance(at, dict) else list(range(len(at)))
            if not keys:
                break
            key = keys[step % len(keys)]
            if not isinstance(at[key], (dict, list)):
                at[key] = value
                break
            at = at[key]
        else:
            at.clear()
        try:
            saved = from_json(json.dumps(record).encode(), "x")
        except PhiSightError as error:
            assert str(error).endswith("; delete the conversation")
        else:
            assert from_json(to_json(saved), "x") == saved


def test_a_file_of_the_first_form_is_read():
    saved = from_json(json.dumps(first_form()).encode(), "x")
    assert texts(saved) == ["What?", "A star.", "Where?", ""]
    assert saved.path[0].pictures == (NAME,) and saved.version == 1 and saved.title == "What?"
    assert from_json(to_json(saved), "x") == saved
    assert from_json(json.dumps({"id": ID, "messages": []}).encode(), "x").path == []


def refused(record: dict) -> None:
    with pytest.raises(PhiSightError, match="delete the conversation"):
        from_json(json.dumps(record).encode(), "x")


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
def test_a_file_of_the_first_form_that_was_meddled_with_is_refused(change):
    record = first_form()
    change(record)
    refused(record)


@pytest.mark.parametrize(
    "change",
    [
        lambda r: r.update(form=3),
        lambda r: r.update(id=ID + "/"),
        lambda r: r.update(version=-1),
        lambda r: r.update(version=True),
        lambda r: r.update(next=5),
        lambda r: r.update(pinned="yes"),
        lambda r: r.update(system="x" * 8001),
        lambda r: r.update(name=None),
        lambda r: r.update(dropped=2),
        lambda r: r.update(updated=-1),
        lambda r: r.update(nodes=None),
        lambda r: r.update(nodes=r["nodes"] * 500),
        lambda r: r.update(nodes=r["nodes"][::-1]),
        lambda r: r.update(shown=[]),
        lambda r: r.update(shown=[*r["shown"], 1]),
        lambda r: r.update(shown=[2, 3, 4, 99]),
        lambda r: r["nodes"].append(r["nodes"][0]),
        lambda r: r["nodes"][0].update(node=0),
        lambda r: r["nodes"][0].update(parent=1),
        lambda r: r["nodes"][1].update(parent=0),
        lambda r: r["nodes"][2].update(parent=1),
        lambda r: r["nodes"][0].update(role="system"),
        lambda r: r["nodes"][0].update(text=""),
        lambda r: r["nodes"][0].update(pictures=["../x.png"]),
        lambda r: r["nodes"][0].update(note={"reason": "stop"}),
        lambda r: r["nodes"][1].update(pictures=[NAME]),
        lambda r: r["nodes"][1].update(note={"reason": "x", "tokens": 1, "seconds": 1, "rate": 1}),
        lambda r: r["nodes"][1]["note"].update(seconds=float("inf")),
        lambda r: r["nodes"][1].update(note=None),
    ],
)
def test_a_file_that_was_meddled_with_is_refused(change):
    record = second_form()
    from_json(json.dumps(record).encode(), "x")
    change(record)
    refused(record)


# -- the store -------------------------------------------------------------------------------------


def test_a_store_lists_opens_and_deletes_what_it_keeps(store):
    first = begin(store, "One?")
    second = begin(store, "Two " + "long " * 40)
    name = store.keep_picture(second.id, picture(), "x.png")
    listed = store.overview()
    assert [one.id for one in listed] == [second.id, first.id]
    assert listed[1].title == "One?" and listed[0].title.endswith("…") and listed[0].turns == 1
    assert store.load(first.id) == first
    assert store.picture(second.id, name).read_bytes() == picture()
    store.delete(second.id)
    assert [one.id for one in store.overview()] == [first.id]
    assert not store.picture(second.id, name).exists()
    with pytest.raises(NotThere):
        store.load(second.id)
    assert store.restore(second.id) == second
    assert store.picture(second.id, name).read_bytes() == picture()
    with pytest.raises(NotThere):
        store.restore(new_id())


def test_the_later_write_is_refused_and_nothing_is_lost(store):
    seen = begin(store, "One?", "1")

    def asking(text):
        return lambda conversation: with_question(conversation, 2, text)

    later = store.change(seen.id, seen.version, asking("Two?"))
    assert later.version == seen.version + 1
    with pytest.raises(RequestError, match="changed_elsewhere"):
        store.change(seen.id, seen.version, asking("Other?"))
    with pytest.raises(RequestError, match="changed_elsewhere"):
        store.cut(seen.id, seen.version, 1)
    with pytest.raises(RequestError, match="changed_elsewhere"):
        store.delete(seen.id, seen.version)
    with pytest.raises(RequestError, match="changed_elsewhere"):
        store.change(seen.id, 0, asking("New?"))
    assert store.load(seen.id) == later
    with pytest.raises(NotThere):
        store.change(new_id(), 1, asking("Gone?"))


steps_of_windows = st.lists(
    st.tuples(
        st.integers(0, 2),
        st.sampled_from(["ask", "ask", "look", "cut", "undo", "name", "delete", "restore"]),
        st.integers(1, 6),
    ),
    max_size=20,
)


@settings(max_examples=80)
@given(steps_of_windows)
def test_whatever_windows_do_only_who_has_seen_the_newest_is_taken(steps):
    """Each window knows the version that it last saw; what is refused changes no byte."""
    with tempfile.TemporaryDirectory() as root:
        store, id, seen = ConversationStore(root, new_key()), new_id(), [0, 0, 0]
        file = store.folder / id / FILE
        for window, action, number in steps:
            before = file.read_bytes() if file.exists() else None
            now = store.load(id).version if before else 0
            version = seen[window]
            try:
                if action == "ask":
                    done = store.change(
                        id, version, lambda one: with_question(one, end_of(one), f"{number}?")
                    )
                elif action == "cut":
                    done = store.cut(id, version, number)
                elif action == "undo":
                    done = store.undo(id, version)
                elif action == "name":
                    done = store.change(id, version, lambda one: replace(one, name=f"{number}"))
                elif action == "delete":
                    store.delete(id, version)
                    continue
                elif action == "restore":
                    done = store.restore(id)
                else:
                    done = store.load(id)
            except RequestError as error:
                assert (file.read_bytes() if file.exists() else None) == before
                if error.key == "changed_elsewhere" and action != "restore":
                    assert version != now
                continue
            assert action in ("restore", "look") or version == now
            seen[window] = done.version
            assert store.load(id) == done
            if action not in ("cut", "undo", "restore", "look"):
                assert done.version == now + 1
            if now:
                assert len(done.nodes) >= len(from_json(before, "x").nodes) or action == "cut"


def end_of(conversation: SavedConversation) -> int:
    path = conversation.path
    return path[-1].number if path else BEGINNING


def test_of_many_writers_at_once_one_is_taken(store):
    seen, outcomes = begin(store, "One?", "1"), []
    ready = threading.Barrier(8)

    def write(number: int) -> None:
        ready.wait()
        try:
            store.change(seen.id, 1, lambda one: with_question(one, 2, f"{number}?"))
            outcomes.append(number)
        except RequestError:
            outcomes.append(None)

    threads = [threading.Thread(target=write, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    (taken,) = [number for number in outcomes if number is not None]
    assert len(outcomes) == 8 and texts(store.load(seen.id)) == ["One?", "1", f"{taken}?"]


def test_nobody_finds_the_conversations_of_another(tmp_path):
    key = new_key()
    saved = begin(ConversationStore(tmp_path, key))
    other = ConversationStore(tmp_path, new_key())
    assert other.overview() == []
    with pytest.raises(PhiSightError):
        other.load(saved.id)
    assert key not in "".join(str(path) for path in tmp_path.rglob("*"))


@pytest.mark.parametrize("key", ["", "..", "a" * 31, "A" * 32, "a" * 32 + "\n", None, 3])
def test_a_damaged_key_opens_nothing(tmp_path, key):
    with pytest.raises(PhiSightError):
        ConversationStore(tmp_path, key)


@pytest.mark.parametrize("id", ["", "..", "0" * 15 + "/", "../" + "0" * 13, ".trash-" + ID, None])
def test_a_damaged_id_opens_nothing(store, id):
    for use in (store.load, store.delete, store.restore, lambda id: store.picture(id, NAME)):
        with pytest.raises(PhiSightError):
            use(id)
    with pytest.raises(PhiSightError):
        store.picture(ID, "../conversation.json")


def test_a_damaged_conversation_is_listed_so_that_it_can_be_deleted(store):
    saved = begin(store)
    file = store.folder / saved.id / FILE
    file.write_bytes(file.read_bytes()[:-5])
    assert [(one.id, one.title) for one in store.overview()] == [(saved.id, None)]
    assert store.overview("what") == []
    other = begin(store)
    file.write_bytes((store.folder / other.id / FILE).read_bytes())
    with pytest.raises(PhiSightError, match="holds another one"):
        store.load(saved.id)
    store.delete(saved.id)
    assert [one.id for one in store.overview()] == [other.id]


def test_titles_and_all_that_was_said_are_searched(store):
    first = begin(store, "What is it?", "A Größe")
    second = begin(store, "Where?", "There.")
    store.change(second.id, 1, lambda one: replace(one, name="Vacation"))
    for query, found in (("größE", first), ("GRÖSSE", first), ("vacat", second), ("there", second)):
        assert [one.id for one in store.overview(query)] == [found.id]
    hidden = store.change(first.id, 1, lambda one: with_question(one, BEGINNING, "Other?"))
    assert [one.id for one in store.overview("größe")] == [hidden.id]
    assert store.overview("nowhere") == [] and len(store.overview(" ")) == 2


def test_pinned_ones_come_first_and_never_have_to_go(store, monkeypatch):
    monkeypatch.setattr(conversation_store, "MAX_CONVERSATIONS", 2)
    monkeypatch.setattr(conversation_store, "MAX_PINNED", 1)
    pinned = begin(store, "0")
    pinned = store.change(pinned.id, 1, lambda one: store.pin(one.id, one))
    kept = [begin(store, str(number)) for number in range(1, 5)]
    assert [one.title for one in store.overview()] == ["0", "4", "3"]
    assert store.overview()[0].pinned
    with pytest.raises(RequestError, match="too_many_pinned"):
        store.change(kept[3].id, 1, lambda one: store.pin(one.id, one))
    assert store.restore(kept[0].id) == kept[0]  # it had gone to the trash


def test_naming_and_pinning_leave_the_date(store):
    saved = begin(store)
    changed = store.change(saved.id, 1, lambda one: replace(one, name="Stars", pinned=True))
    assert changed.updated == saved.updated and changed.title == "Stars"


def test_what_was_cut_is_put_back(store):
    saved = begin(store, "One?", "1", "Two?", "2")
    left = store.cut(saved.id, 1, 3)
    assert texts(left) == ["One?", "1"] and texts(store.load(saved.id)) == ["One?", "1"]
    back = store.undo(saved.id, left.version)
    assert back.nodes == saved.nodes and back.version == 3
    with pytest.raises(RequestError, match="nothing_to_undo"):
        store.undo(saved.id, back.version)
    assert store.load(saved.id) == back


def test_a_kill_between_the_two_files_of_a_cut_loses_nothing(store, monkeypatch):
    saved = begin(store, "One?", "1")
    with monkeypatch.context() as patched:
        patched.setattr(store, "_write", lambda conversation, spare: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            store.cut(saved.id, 1, 1)
    assert store.load(saved.id) == saved
    with pytest.raises(RequestError, match="nothing_to_undo"):
        store.undo(saved.id, 1)
    left = store.cut(saved.id, 1, 1)
    with monkeypatch.context() as patched:
        patched.setattr(store, "_write", lambda conversation, spare: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            store.undo(saved.id, left.version)
    assert store.undo(saved.id, left.version).nodes == saved.nodes


def test_what_was_cut_and_damaged_is_one_line(store):
    saved = begin(store, "One?", "1")
    left = store.cut(saved.id, 1, 2)
    (store.folder / saved.id / CUT).write_text('{"nodes": [3]}')
    with pytest.raises(PhiSightError, match="cannot be put back"):
        store.undo(saved.id, left.version)
    assert store.load(saved.id) == left


def test_a_damaged_conversation_is_deleted_and_restored_as_it_was(store):
    saved = begin(store, "One?", "1")
    (store.folder / saved.id / FILE).write_text("{")
    store.delete(saved.id, saved.version)
    assert store.overview() == []
    assert store.restore(saved.id) is None
    assert (store.folder / saved.id / FILE).read_text() == "{"
    assert [(one.id, one.title) for one in store.overview()] == [(saved.id, None)]


def test_a_restore_of_nothing_leaves_the_pictures_of_a_question_that_is_about_to_be_asked(store):
    id = new_id()
    name = store.keep_picture(id, picture(), "x.png")
    with pytest.raises(NotThere):
        store.restore(id)
    assert store.picture(id, name).exists()


def test_what_is_restored_stays_where_there_are_too_many(store, monkeypatch):
    monkeypatch.setattr(conversation_store, "MAX_CONVERSATIONS", 2)
    oldest, other = begin(store, "1"), begin(store, "2")
    store.delete(oldest.id)
    newest = begin(store, "3")
    assert store.restore(oldest.id) == oldest
    assert {one.id for one in store.overview()} == {oldest.id, newest.id}
    assert store.restore(other.id) == other


def test_a_file_keeps_room_for_the_answer(store, monkeypatch):
    saved = begin(store, "One?", "1")
    monkeypatch.setattr(conversation_store, "MAX_BYTES", 1000)
    with pytest.raises(RequestError, match="conversation_full"):
        store.change(saved.id, 1, lambda one: one, spare=900)
    assert store.load(saved.id) == saved
    assert store.change(saved.id, 1, lambda one: one).version == 2


def test_pictures_that_nothing_shows_are_removed(store):
    id = new_id()
    names = [store.keep_picture(id, picture(colour), "x.png") for colour in ("red", "blue")]
    first = with_question(SavedConversation(id), BEGINNING, "One?", (names[0],))
    store.change(id, 0, lambda one: with_question(first, BEGINNING, "Two?", (names[1],)))
    unused = store.keep_picture(id, picture("green"), "x.png")
    store.tidy(id, age=60)
    assert store.picture(id, unused).exists()  # it may be about to be asked about
    store.tidy(id)
    assert not store.picture(id, unused).exists()
    left = store.cut(id, 1, 1)
    assert left.nodes == {} and all(store.picture(id, name).exists() for name in names)
    os.utime(store.folder / id / CUT, (1, 1))
    for name in names:
        os.utime(store.picture(id, name), (1, 1))
    sweep.sweep_trash(store.folder.parent)
    assert not any(store.picture(id, name).exists() for name in names)
    with pytest.raises(RequestError, match="nothing_to_undo"):
        store.undo(id, left.version)
    nothing = new_id()
    store.keep_picture(nothing, picture(), "x.png")
    store.tidy(nothing)
    assert not (store.folder / nothing).exists()


def test_what_was_deleted_goes_after_a_day(store):
    kept, old = begin(store), begin(store)
    store.delete(kept.id)
    store.delete(old.id)
    os.utime(store.folder / f"{TRASH}{old.id}", (time.time() - 90_000,) * 2)
    sweep.prepare_root(store.folder.parent)
    assert store.restore(kept.id) == kept
    with pytest.raises(NotThere):
        store.restore(old.id)


def test_what_strangers_deleted_is_forgotten_too(store):
    kept, deleted = begin(store), begin(store)
    store.delete(deleted.id)
    for folder in store.folder.iterdir():
        for path in (*folder.iterdir(), folder):
            os.utime(path, (time.time() - 90_000,) * 2)
    os.utime(store.folder / kept.id / FILE)
    sweep.forget(store.folder.parent)
    assert [path.name for path in store.folder.iterdir()] == [kept.id]


def test_there_is_no_more_in_the_trash_than_it_takes(store, monkeypatch):
    monkeypatch.setattr(conversation_store, "MAX_TRASH", 2)
    for number in range(4):
        saved = begin(store, str(number))
        store.delete(saved.id)
        os.utime(store.folder / f"{TRASH}{saved.id}", (time.time() - 100 + number,) * 2)
    assert len(list(store.folder.glob(f"{TRASH}*"))) == 2
    store.delete(saved.id)  # deleted already
    begun = store.change(saved.id, 0, lambda one: said("Again?", id=saved.id))
    with pytest.raises(RequestError, match="changed_elsewhere"):
        store.restore(saved.id)
    assert store.load(saved.id) == begun


def test_pictures_of_questions_that_were_never_asked_go_at_the_next_start(store):
    asked, unasked, new = begin(store), new_id(), new_id()
    for id in (asked.id, unasked, new):
        store.keep_picture(id, picture(), "a.png")
    for id in (asked.id, unasked):
        os.utime(store.folder / id, (1, 1))
    sweep.prepare_root(store.folder.parent)
    left = {path.name for path in store.folder.iterdir()}
    assert left == {asked.id, new} and store.load(asked.id) == asked


def test_a_nearly_full_disk_keeps_nothing_more(store, monkeypatch):
    saved = begin(store)
    monkeypatch.setattr("web.temporary.SPARE_BYTES", 2**62)
    with pytest.raises(PhiSightError, match="disk is nearly full"):
        store.keep_picture(saved.id, picture(), "a.png")
    with pytest.raises(PhiSightError, match="disk is nearly full"):
        store.change(saved.id, 1, lambda one: replace(one, name="x"))
    assert store.load(saved.id) == saved


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    store = ConversationStore(tmp_path / "file", new_key())
    for use in (store.overview, lambda: begin(store)):
        with pytest.raises(PhiSightError, match="make room or make the folder writable"):
            use()
    with pytest.raises(PhiSightError, match="--conversations .*; name a folder that can be"):
        sweep.prepare_root(tmp_path / "file" / "below")


@pytest.mark.parametrize(
    ("kind", "suffix"),
    [("PNG", ".png"), ("JPEG", ".jpg"), ("GIF", ".gif"), ("TIFF", ".png"), ("BMP", ".png")],
)
def test_a_picture_is_kept_as_browsers_show_it(store, kind, suffix):
    for _ in range(2):
        name = store.keep_picture(ID, picture(kind=kind), "x")
    assert name.endswith(suffix)
    kept = Image.open(store.picture(ID, name)).convert("RGB")
    assert kept.getpixel((0, 0))[0] > 250


def test_what_is_not_a_picture_is_not_kept(store):
    with pytest.raises(PhiSightError, match="x.png: not a picture"):
        store.keep_picture(ID, b"<svg onload='alert(1)'/>", "x.png")
    assert not store.folder.exists()


def test_a_picture_that_cannot_be_read_is_named_without_its_folder(tmp_path):
    path = tmp_path / "x.png"
    with pytest.raises(PhiSightError, match="^x.png: cannot be read .*; send it again"):
        read_picture(path)
    with path.open("wb") as file:
        file.truncate(MAX_BYTES + 1)
    with pytest.raises(PhiSightError, match="^x.png: .* is over the limit"):
        read_picture(path)


def test_an_archive_takes_pictures_of_any_time(store):
    """A machine without a clock of its own begins in 1970, which no ZIP can hold."""
    id = new_id()
    name = store.keep_picture(id, picture(), "x.png")
    os.utime(store.picture(id, name), (0, 0))
    asked = with_question(SavedConversation(id), BEGINNING, "One?", (name,))
    for updated in (0.0, 1.7e9, 2e11):
        file = io.BytesIO()
        dated = replace(asked, updated=updated)
        write_archive(file, dated, lambda name: store.picture(id, name), "en")
        with zipfile.ZipFile(file) as archive:
            assert archive.testzip() is None and len(archive.namelist()) == 2


def test_a_time_that_no_date_has_is_damage():
    record = json.loads(to_json(said("One?")))
    with pytest.raises(PhiSightError, match="at no time"):
        from_json(json.dumps(record | {"updated": 1e300}).encode(), "x")


def test_tokens_are_counted_by_the_model_that_reads_them():
    """Another model's encoder may lie in memory where a former one has lain."""

    class Encoded(list):
        tokens_per_image = 4
        heads = {"user": (7, 7, 7)}
        text_encoder = property(lambda self: self)

        def frame_tokens(self, role: str) -> int:
            return 2

        def encode_text(self, text: str) -> list[int]:
            return list(self)

    counts = []
    for length in range(1, 30):
        asked = [Message("user", (Part("text", "Hi"),))]
        counts.append(told.tokens_of(asked, Encoded([0] * length)))  # type: ignore[arg-type]
    assert counts == [length + 5 for length in range(1, 30)]
