"""The chat's routes: a real server, the real tiny model, and clients of every kind."""

from __future__ import annotations

import base64
import contextlib
import io
import json
import secrets
import shutil
import subprocess
import sys
import threading
import zipfile
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
import runs
import sounds
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from live_server import endless
from pages import Site, pictures, served, wait_for
from test_conversations import first_form, json_values

from data.chat import render
from web.chat import talk as talks
from web.chat.conversation import MAX_TEXT, messages_of
from web.chat.store import FILE, ConversationStore
from web.chat.sweep import prepare_root
from web.errors import RequestError
from web.texts import TEXTS

QUESTION = "What colour is the star?"


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Iterator[Site]:
    folder = tmp_path_factory.mktemp("conversations")
    runs_folder = runs.finished_run().parent
    with served(runs.assistant(), folder, runs_folder, speech=sounds.tiny) as site:
        yield site


@pytest.fixture(scope="module")
def endless_site(tmp_path_factory) -> Iterator[Site]:
    """One whose answers go on until they are stopped."""
    assistant = endless()
    folder = tmp_path_factory.mktemp("conversations")
    with served(assistant, folder, runs.finished_run().parent, speech=sounds.tiny) as site:
        yield site
    assistant.close()


class Window:
    """A window of a browser, on one conversation."""

    def __init__(self, site: Site, key: str = "", id: str = "") -> None:
        self.site, self.key = site, key or secrets.token_hex(16)
        self.id, self.version = id or secrets.token_hex(8), 0
        self.client = httpx.Client(
            base_url=f"{site.url}/app/", headers={"X-Browser-Key": self.key}, timeout=60
        )

    def another(self) -> Window:
        """Another window of the same browser, which has seen the same."""
        other = Window(self.site, self.key, self.id)
        other.version = self.version
        return other

    @property
    def store(self) -> ConversationStore:
        return ConversationStore(self.site.conversations, self.key)

    def saved(self) -> list[str]:
        return [node.text for node in self.store.load(self.id).path]

    def upload(self, data: bytes, name: str = "picture.png") -> str:
        sent = self.client.post("uploads", params={"name": name}, content=data)
        assert sent.status_code == 200, sent.text
        return sent.json()["id"]

    def get(self, path: str = "", **query: str) -> httpx.Response:
        return self.client.get(f"conversations/{self.id}{path}", params=query)

    def post(self, action: str, body: Any = None) -> httpx.Response:
        return self.client.post(f"conversations/{self.id}/{action}", json=body)

    def change(self, action: str, **fields: Any) -> dict[str, Any]:
        """What changes the conversation as this window has seen it, and what comes of it."""
        body = {"version": self.version} | fields
        done = (
            self.client.patch(f"conversations/{self.id}", json=body)
            if action == "patch"
            else self.post(action, body)
        )
        assert done.status_code == 200, done.text
        self.version = done.json()["version"]
        return done.json()

    @contextlib.contextmanager
    def streaming(self, action: str, **fields: Any) -> Iterator[Iterator[tuple[str, Any]]]:
        """The events of a question, and of an answer, as they come."""
        body = {"version": self.version} | fields
        path = f"conversations/{self.id}/{action}"
        with self.client.stream("POST", path, json=body) as response:
            assert response.status_code == 200, response.read()
            yield self._events(response)

    def _events(self, response: httpx.Response) -> Iterator[tuple[str, Any]]:
        name = ""
        for line in response.iter_lines():
            if line.startswith("event: "):
                name = line.removeprefix("event: ")
            elif line.startswith("data: "):
                data = json.loads(line.removeprefix("data: "))
                if name in ("asked", "done"):
                    self.version = data["conversation"]["version"]
                yield name, data

    def ask(self, text: str = QUESTION, **fields: Any) -> dict[str, Any]:
        """Ask, and return the conversation with the answer."""
        return self.answered("ask", text=text, **fields)

    def answered(self, action: str, **fields: Any) -> dict[str, Any]:
        with self.streaming(action, **fields) as stream:
            events = list(stream)
        assert events[0][0] in ("asked", "heard") and events[-1][0] == "done", events
        return events[-1][1]["conversation"]

    def refused(self, action: str, **fields: Any) -> tuple[int, str]:
        """The status and the key, or the text, of a refusal, also of one that comes on the way."""
        body = {"version": self.version} | fields
        done = (
            self.client.patch(f"conversations/{self.id}", json=body)
            if action == "patch"
            else self.post(action, body)
        )
        if done.status_code == 200:
            name, data = list(self._events(done))[-1]
            assert name == "error", done.text
            return 200, data["error"]["key"] or data["error"]["text"]
        error = done.json()["error"]
        if error["key"]:
            assert error["key"] in TEXTS
        return done.status_code, error["key"] or error["text"]


@pytest.fixture
def window(site) -> Window:
    return Window(site)


@pytest.fixture
def slow(endless_site) -> Window:
    return Window(endless_site)


def roles(conversation: dict) -> list[str]:
    return [turn["role"] for turn in conversation["turns"]]


def star() -> bytes:
    return pictures(1)[0].read_bytes()


# -- asking ----------------------------------------------------------------------------------------


def test_a_question_about_a_picture_is_answered_streamed_and_saved(window):
    with window.streaming("ask", text=QUESTION, uploads=[window.upload(star())]) as stream:
        events = list(stream)
    names = [name for name, _ in events]
    assert names[0] == "asked" and names[-1] == "done" and set(names[1:-1]) == {"text"}
    asked, done = events[0][1]["conversation"], events[-1][1]["conversation"]
    assert roles(asked) == ["user"] and asked["answering"] and asked["version"] == 1
    texts = [data["text"] for name, data in events if name == "text"]
    assert all(later.startswith(text) for text, later in zip(texts, texts[1:]))
    question, answer = done["turns"]
    assert answer["text"] == texts[-1] and answer["html"].startswith("<p>")
    assert question["text"] == QUESTION and question["versions"] == [question["node"]]
    assert "html" not in question
    note = answer["note"]
    assert note["reason"] == "stop" and note["tokens"] > 0 and note["seconds"] > 0 < note["rate"]
    assert not done["answering"] and done["title"] == QUESTION and not done["named"]
    assert window.get().json() == done
    (name,) = question["pictures"]
    kept = window.get(f"/pictures/{name}")
    assert kept.content == star() and kept.headers["content-type"] == "image/png"
    assert "private" in kept.headers["cache-control"]
    (listed,) = window.client.get("conversations").json()["conversations"]
    assert listed == {
        "id": window.id,
        "title": QUESTION,
        "updated": done["updated"],
        "pinned": False,
        "thumbnail": name,
        "turns": 2,
    }


def test_what_was_asked_before_is_told_from_the_cache(window):
    first = window.ask("Is there a star?")
    again = window.answered("regenerate", node=1)
    assert again["turns"][1]["text"] == first["turns"][1]["text"]
    assert again["turns"][1]["note"]["reason"] == "cached"


def test_an_example_is_asked_about_by_its_key(window):
    examples = window.client.get("start").json()["examples"]
    done = window.ask(examples[1]["question"], example=examples[1]["key"])
    (name,) = done["turns"][0]["pictures"]
    assert window.get(f"/pictures/{name}").content == (
        window.client.get(examples[1]["picture"]).content
    )
    assert window.refused("ask", text="x", example="of-another") == (404, "example_gone")


def test_the_system_prompt_is_read_by_the_model(window, site, monkeypatch):
    read = []
    ask = site.assistant.ask
    monkeypatch.setattr(
        site.assistant, "ask", lambda messages, *more: read.append(messages) or ask(messages, *more)
    )
    done = window.ask(system="  Answer in one word. ")
    assert done["system"] == "Answer in one word."
    assert [message.role for message in read[0]] == ["system", "user"]
    window.change("patch", system="")
    window.ask("And now?", system="Not of a conversation that is there.")
    assert [message.role for message in read[1]] == ["user", "assistant", "user"]


def test_the_context_is_counted_as_the_model_reads_it(window, site):
    done = window.ask(uploads=[window.upload(star())], system="Be brief.")
    done = window.ask("And its size?")
    conversation = window.store.load(window.id)
    messages = messages_of(conversation, conversation.path)
    read = render(messages, site.assistant.parts.chat_format).input_ids
    assert done["context"] == {"used": len(read) - 1, "of": site.assistant.context_tokens}
    dropped = window.change("drop", turns=2)
    assert [turn["unread"] for turn in dropped["turns"]] == [True, True, False, False]
    assert dropped["context"]["used"] < done["context"]["used"]
    assert window.change("drop", turns=0)["context"] == done["context"]


@sounds.needs_espeak
def test_a_recording_is_listened_to_and_asked(window):
    recording = sounds.encoded(sounds.said(QUESTION), sounds.RATE, "WAV")
    files = [
        window.upload(recording, "question.wav"),
        window.upload(star()),
    ]
    with window.streaming("ask", text="Look:", uploads=files) as stream:
        events = list(stream)
    assert ("heard", {"text": QUESTION}) in events
    (question, _) = events[-1][1]["conversation"]["turns"]
    assert question["text"] == f"Look: {QUESTION}" and len(question["pictures"]) == 1


def test_a_recording_of_nothing_asks_nothing(window):
    silence = sounds.encoded(sounds.tone(seconds=0.5) * 0, sounds.RATE, "WAV")
    upload = window.upload(silence, "silence.wav")
    assert window.refused("ask", text="x", uploads=[upload]) == (200, "nothing_heard")
    broken = window.upload(b"RIFF nothing", "broken.wav")
    status, text = window.refused("ask", text="x", uploads=[broken])
    assert status == 200 and text.startswith("broken.wav: ")
    assert window.get().status_code == 404 and not window.store.folder_of(window.id).exists()


def test_who_leaves_is_not_listened_to_any_more(window, monkeypatch):
    waited = threading.Event()

    def stuck(self, speech, path, settings, stopped, visitor):
        wait_for(stopped)
        waited.set()
        raise RequestError("not_heard")
        yield

    monkeypatch.setattr("web.speech.ears.Ears.segments", stuck)
    upload = window.upload(sounds.encoded(sounds.tone(), sounds.RATE, "WAV"), "a.wav")
    body = {"version": 0, "text": "x", "uploads": [upload]}
    path = f"conversations/{window.id}/ask"
    with window.client.stream("POST", path, json=body) as response:
        assert response.status_code == 200
        assert window.another().refused("ask", text="y") == (409, "still_answering")
    assert waited.wait(30)
    monkeypatch.undo()
    wait_for(lambda: window.post("ask", {"version": 0, "text": "y"}).status_code == 200)
    assert window.saved()[0] == "y"


# -- versions --------------------------------------------------------------------------------------


def test_answers_and_questions_have_versions_that_are_switched(window):
    window.ask("One?")
    window.ask("Two?")
    again = window.answered("regenerate", node=2, settings={"temperature": 2.0, "seed": "5"})
    assert again["turns"][1]["versions"] == [2, 5] and len(again["turns"]) == 2
    former = window.change("show", node=2)
    assert [turn["node"] for turn in former["turns"]] == [1, 2, 3, 4]
    edited = window.answered("edit", node=3, text="Three?")
    assert edited["turns"][2]["versions"] == [3, 6] and edited["turns"][2]["text"] == "Three?"
    assert [turn["node"] for turn in window.change("show", node=4)["turns"]] == [1, 2, 3, 4]
    assert window.get().json()["turns"] == window.change("show", node=4)["turns"]


def test_an_edited_question_keeps_its_pictures_and_takes_more(window, monkeypatch):
    one, two = (path.read_bytes() for path in pictures(2))
    first = window.ask(uploads=[window.upload(one)])
    kept = first["turns"][0]["pictures"]
    edited = window.answered("edit", node=1, text="And now?", uploads=[window.upload(two)])
    assert edited["turns"][0]["pictures"][:1] == kept and len(edited["turns"][0]["pictures"]) == 2
    monkeypatch.setattr(talks, "MAX_PICTURES", 2)
    third = window.upload(pictures(3)[2].read_bytes())
    more = edited["turns"][0]["node"]
    assert window.refused("edit", node=more, uploads=[third]) == (200, "too_many_pictures")
    assert window.change("show", node=1)["turns"] == [
        {**turn, "versions": edited["turns"][0]["versions"] if place == 0 else turn["versions"]}
        for place, turn in enumerate(first["turns"])
    ]


# -- names, pins, deletions ------------------------------------------------------------------------


def test_a_conversation_is_named_pinned_and_found(window):
    window.ask("Where is the circle?")
    named = window.change("patch", title="  My\n shapes ", pinned=True)
    assert (named["title"], named["named"], named["pinned"]) == ("My shapes", True, True)
    newer = Window(window.site, window.key)
    newer.ask("Where is the star?")
    found = window.client.get("conversations").json()["conversations"]
    assert [one["id"] for one in found] == [window.id, newer.id]
    for query, ids in (("SHAPES", [window.id]), ("the", [window.id, newer.id]), ("zebra", [])):
        found = window.client.get("conversations", params={"query": query}).json()
        assert [one["id"] for one in found["conversations"]] == ids
    plain = window.change("patch", title="", pinned=False)
    assert (plain["title"], plain["named"]) == ("Where is the circle?", False)


def test_a_deleted_conversation_is_restored_with_its_pictures(window):
    done = window.ask(uploads=[window.upload(star())])
    assert window.client.delete(f"conversations/{window.id}").json() == {}
    assert window.get().status_code == 404
    assert window.client.get("conversations").json() == {"conversations": []}
    assert window.refused("ask", text="x") == (404, "conversation_gone")
    restored = window.post("restore").json()
    assert restored["turns"] == done["turns"]
    assert window.get(f"/pictures/{done['turns'][0]['pictures'][0]}").content == star()
    gone = window.client.request("DELETE", f"conversations/{window.id}", json={"version": 1})
    assert gone.status_code == 409 and gone.json()["error"]["key"] == "changed_elsewhere"


def test_what_is_deleted_from_here_is_put_back(window):
    window.ask("One?")
    done = window.ask("Two?")
    left = window.change("cut", node=3)
    assert left["turns"] == done["turns"][:2]
    assert window.change("undo")["turns"] == done["turns"]
    assert window.refused("undo") == (409, "nothing_to_undo")
    assert window.change("cut", node=1)["turns"] == []
    assert window.change("undo")["turns"] == done["turns"]
    assert window.refused("cut", node=99) == (409, "nothing_there")
    assert window.refused("show", node=99) == (409, "nothing_there")


def test_a_conversation_of_the_former_form_is_opened_and_continued(window):
    record = first_form() | {"id": window.id}
    for message in record["messages"]:
        message["parts"] = [part for part in message["parts"] if part["kind"] == "text"]
    folder = window.store.folder_of(window.id)
    folder.mkdir(parents=True)
    (folder / FILE).write_text(json.dumps(record))
    found = window.get().json()
    assert [turn["text"] for turn in found["turns"]] == ["What?", "A star.", "Where?", ""]
    assert found["turns"][1]["note"] is None
    window.version = found["version"]
    assert len(window.ask()["turns"]) == 6


def test_a_damaged_conversation_is_told_and_deleted(window):
    window.ask()
    (window.store.folder_of(window.id) / FILE).write_bytes(b"{")
    (listed,) = window.client.get("conversations").json()["conversations"]
    assert listed["title"] is None
    told = window.get()
    assert told.status_code == 400 and "delete the conversation" in told.json()["error"]["text"]
    assert window.client.delete(f"conversations/{window.id}").status_code == 200
    assert window.client.get("conversations").json() == {"conversations": []}


# -- taken away ------------------------------------------------------------------------------------


def test_a_conversation_is_exported_with_its_pictures(window):
    done = window.ask("# <b>What?</b>", uploads=[window.upload(star())], system="Be *brief*.")
    sent = window.get("/export", form="json")
    assert sent.headers["content-disposition"].startswith("attachment; filename=")
    messages = sent.json()["messages"]
    assert messages[0] == {"role": "system", "content": "Be *brief*."}
    picture, text = messages[1]["content"]
    data = picture["image_url"]["url"].removeprefix("data:image/png;base64,")
    assert base64.b64decode(data) == star() and text["text"] == "# <b>What?</b>"
    assert messages[2] == {"role": "assistant", "content": done["turns"][1]["text"]}
    sent = window.get("/export", form="markdown", language="de")
    with zipfile.ZipFile(io.BytesIO(sent.content)) as archive:
        page = archive.read("conversation.md").decode()
        name = done["turns"][0]["pictures"][0]
        assert archive.read(f"pictures/{name}") == star() and f"![](pictures/{name})" in page
    assert "**Frage**" in page and r"> \# \<b\>What?\</b\>" in page
    assert window.get("/export", form="pdf").status_code == 422
    assert window.get("/export").status_code == 422


def test_without_pictures_markdown_is_one_file(window):
    done = window.ask("What?")
    sent = window.get("/export", form="markdown")
    assert sent.headers["content-type"].startswith("text/markdown")
    assert ".md" in sent.headers["content-disposition"]
    answer = done["turns"][1]["text"]
    assert sent.text == f"# What?\n\n**Question**\n\n> What?\n\n**Answer**\n\n{answer}\n"


# -- two windows -----------------------------------------------------------------------------------


def test_the_later_window_is_refused_and_both_keep_what_was_said(window):
    window.ask("One?")
    other = window.another()
    done = window.ask("Two?")
    for action, fields in (
        ("ask", {"text": "Other?"}),
        ("edit", {"node": 1, "text": "Other?"}),
        ("regenerate", {"node": 2}),
        ("show", {"node": 1}),
        ("cut", {"node": 1}),
        ("undo", {}),
        ("drop", {"turns": 1}),
        ("patch", {"title": "Other"}),
    ):
        assert other.refused(action, **fields) == (409, "changed_elsewhere")
    assert window.get().json() == done
    assert Window(window.site, window.key, window.id).refused("ask", text="New?") == (
        409,
        "changed_elsewhere",
    )
    other.version = window.version
    assert [turn["text"] for turn in other.ask("Three?")["turns"]][::2] == [
        "One?",
        "Two?",
        "Three?",
    ]


def test_while_an_answer_is_written_another_window_changes_nothing_of_it(slow):
    settings = {"max_new_tokens": 2000}
    with slow.streaming("ask", text="One?", settings=settings) as stream:
        assert next(stream)[0] == "asked"
        late, other = slow.another(), slow.another()
        late.version = 0
        assert late.refused("ask", text="Other?") == (409, "changed_elsewhere")
        for action, fields in (
            ("ask", {"text": "Other?"}),
            ("cut", {"node": 1}),
            ("show", {"node": 1}),
            ("drop", {"turns": 1}),
            ("undo", {}),
            ("edit", {"node": 1, "text": "Other?"}),
        ):
            assert other.refused(action, **fields) == (409, "still_answering")
        assert other.get().json()["answering"]
        assert other.change("patch", title="Named meanwhile", pinned=True)["answering"]
        assert slow.post("stop").json() == {}
        name, data = list(stream)[-1]
    done = data["conversation"]
    assert name == "done" and done["title"] == "Named meanwhile" and done["pinned"]
    assert roles(done) == ["user", "assistant"] and not done["answering"]
    assert done["turns"][1]["note"]["reason"] == "cancelled"
    assert other.refused("ask", text="Other?") == (409, "changed_elsewhere")


def test_of_windows_that_ask_at_the_same_moment_one_is_answered(slow):
    windows = [slow.another() for _ in range(6)]
    ready, outcomes = threading.Barrier(len(windows)), []

    def ask(window: Window) -> None:
        ready.wait()
        body = {"version": 0, "text": "One?", "settings": {"max_new_tokens": 4}}
        sent = window.post("ask", body)
        outcomes.append((sent.status_code, "event: done" in sent.text))

    threads = [threading.Thread(target=ask, args=(window,)) for window in windows]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(outcomes) == [(200, True)] + [(409, False)] * 5
    assert len(slow.saved()) == 2


# -- stopped, left, killed -------------------------------------------------------------------------


def read_until_text(stream: Iterator[tuple[str, Any]]) -> str:
    for name, data in stream:
        if name == "text":
            return data["text"]
    raise AssertionError("nothing was said")


def test_a_stopped_answer_is_kept_as_far_as_it_was_said(slow):
    with slow.streaming("ask", text="One?", settings={"max_new_tokens": 2000}) as stream:
        said = read_until_text(stream)
        slow.post("stop")
        rest = list(stream)
    turn = rest[-1][1]["conversation"]["turns"][1]
    assert turn["text"].startswith(said) and turn["note"]["reason"] == "cancelled"
    assert slow.saved() == ["One?", turn["text"]]
    assert slow.post("stop").json() == {}  # there is nothing to stop


@pytest.mark.parametrize("action", ["ask", "edit", "regenerate"])
def test_who_leaves_ends_the_answer_and_what_was_said_is_saved(slow, action):
    few = {"max_new_tokens": 3}
    fields: dict[str, Any] = {"text": "Two?"}
    if action != "ask":
        slow.ask("One?", settings=few)
        fields = {"node": 1} | ({"text": "Two?"} if action == "edit" else {})
    fields["settings"] = {"max_new_tokens": 2000, "temperature": 1.0, "seed": "1"}
    with slow.streaming(action, **fields) as stream:
        said = read_until_text(stream)
    wait_for(lambda: not slow.get().json()["answering"])
    question, answer = slow.saved()
    assert question == ("One?" if action == "regenerate" else "Two?")
    assert answer.startswith(said)
    note = slow.store.load(slow.id).path[-1].note
    assert note.reason == "cancelled" and note.tokens < 2000
    assert slow.site.assistant.statistics()["running"] == 0
    slow.version = slow.get().json()["version"]
    slow.ask("Three?", settings=few)


def test_deleting_a_conversation_ends_its_answer_first(slow):
    with slow.streaming("ask", text="One?", settings={"max_new_tokens": 2000}) as stream:
        said = read_until_text(stream)
        assert slow.client.delete(f"conversations/{slow.id}").status_code == 200
        rest = list(stream)
    assert rest[-1][0] == "done"
    restored = slow.post("restore").json()
    assert restored["turns"][1]["text"].startswith(said)


def test_a_regenerated_answer_of_nothing_leaves_the_former(slow, monkeypatch):
    slow.ask("One?", settings={"max_new_tokens": 3})
    former = slow.saved()
    start = slow.site.assistant.start
    ready, go = threading.Event(), threading.Event()

    def late(answer):
        ready.set()
        assert go.wait(30)
        start(answer)

    monkeypatch.setattr(slow.site.assistant, "start", late)
    with slow.streaming("regenerate", node=2) as stream:
        assert next(stream)[0] == "asked" and ready.wait(30)
        slow.post("stop")
        go.set()
        assert [name for name, _ in stream] == ["done"]
    assert slow.saved() == former


def test_a_failing_model_is_told_and_what_was_said_is_saved(slow, monkeypatch):
    engine = slow.site.assistant.engine
    step = engine._step
    steps = iter(range(40))

    def failing() -> None:
        if next(steps, None) is None:
            raise RuntimeError("out of order")
        step()

    monkeypatch.setattr(engine, "_step", failing)
    with slow.streaming("ask", text="One?", settings={"max_new_tokens": 2000}) as stream:
        events = list(stream)
    assert events[-1] == ("error", {"error": {"key": "server_failed", "values": {}, "text": None}})
    monkeypatch.undo()
    found = slow.get().json()
    assert not found["answering"] and found["turns"][0]["text"] == "One?"
    assert all(turn["note"] is None for turn in found["turns"][1:])
    slow.version = found["version"]
    slow.answered("regenerate", node=1, settings={"max_new_tokens": 3})


PROGRAM = """
import sys
sys.path[:0] = sys.argv[1:3]
import threads, runs
from assistant.assistant import Assistant
runs.assistant = lambda: Assistant.load(sys.argv[3])
from live_server import endless
from api.server import listening_socket, address_of, run
from web.app import build_site, web_application
from web.model import Model
model = Model(endless())
site = build_site(model, conversations=sys.argv[4], runs=None)
bound = listening_socket("127.0.0.1", 0)
run(web_application(site), bound, address_of(bound), grace=0.0, hurry=model.close)
"""


def test_a_server_that_closes_saves_what_was_said(tmp_path):
    """Also where nobody tells the model to end."""
    assistant = endless()
    with contextlib.ExitStack() as stopping:
        site = stopping.enter_context(served(assistant, tmp_path, runs.finished_run().parent))
        window = Window(site)
        with window.streaming("ask", text="One?", settings={"max_new_tokens": 2000}) as stream:
            said = read_until_text(stream)
            stopping.close()
            with contextlib.suppress(httpx.HTTPError):
                list(stream)
    assistant.close()
    question, answer = window.saved()
    assert question == "One?" and answer.startswith(said)


def test_a_server_that_ends_in_the_middle_leaves_a_whole_conversation(tmp_path):
    """Killed, what the disk holds at that moment; told to end, also what was said."""
    folder, killed = tmp_path / "conversations", tmp_path / "killed"
    given = (runs.ROOT / "tests", runs.ROOT, runs.finished_run(), folder)
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, *map(str, given)],
        cwd=runs.ROOT,
        env=runs.environment(),
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        window = Window(Site(process.stdout.readline().strip(), None, folder))
        with window.streaming("ask", text="One?", settings={"max_new_tokens": 2000}) as stream:
            said = read_until_text(stream)
            shutil.copytree(folder, killed)
            process.terminate()
            with contextlib.suppress(httpx.HTTPError):
                list(stream)
        assert process.wait(timeout=60) == 0
    finally:
        process.kill()
        process.communicate()
    question, answer = window.saved()
    assert question == "One?" and answer.startswith(said)
    window.site.conversations = prepare_root(killed)
    assert window.saved() == ["One?"]


# -- what is refused -------------------------------------------------------------------------------


def test_what_is_asked_wrongly_is_refused_and_nothing_is_kept(window):
    for fields, outcome in (
        ({"text": " "}, (409, "ask_something")),
        ({"text": "x" * (MAX_TEXT + 1)}, (409, "question_too_long")),
        ({"text": "x", "settings": {"seed": "seven"}}, (409, "bad_seed")),
        ({"text": "x", "uploads": ["0" * 32]}, (404, "upload_gone")),
        ({"text": "x", "uploads": ["../../etc/passwd"]}, (404, "upload_gone")),
        ({"text": "x", "version": 3}, (404, "conversation_gone")),
    ):
        assert window.refused("ask", **fields) == outcome
    other = Window(window.site)
    foreign = other.upload(star())
    assert window.refused("ask", text="x", uploads=[foreign]) == (404, "upload_gone")
    status, text = window.refused("ask", text="x", settings={"temperature": -1})
    assert status == 200 and "temperature" in text
    status, text = window.refused("ask", text="word " * 15_000, uploads=[window.upload(star())])
    assert status == 200 and "the model reads" in text
    assert window.get().status_code == 404
    assert not window.store.folder_of(window.id).exists()


def test_what_is_refused_leaves_a_conversation_as_it_was(window):
    done = window.ask(uploads=[window.upload(star())])
    before = sorted(window.store.folder_of(window.id).iterdir())
    two = pictures(2)[1].read_bytes()
    assert window.refused("ask", text="word " * 15_000, uploads=[window.upload(two)])[0] == 200
    assert window.refused("edit", node=9, text="x") == (200, "nothing_there")
    assert window.refused("regenerate", node=9) == (200, "nothing_there")
    assert window.get().json() == done
    assert sorted(window.store.folder_of(window.id).iterdir()) == before


@pytest.mark.parametrize(
    "fields",
    [
        {"more": 1},
        {"version": -1},
        {"version": 2**60},
        {"version": "x"},
        {"version": None},
        {"text": None},
        {"text": ["x"]},
        {"uploads": "x"},
        {"uploads": ["0" * 32] * 21},
        {"uploads": ["x" * 65]},
        {"uploads": [None]},
        {"example": 1},
        {"example": "a" * 65},
        {"system": "x" * 8001},
        {"settings": {"temperature": "hot"}},
        {"settings": {"other": 1}},
        {"settings": [1]},
    ],
)
def test_a_field_that_is_not_what_it_should_be_is_one_line(window, fields):
    status, text = window.refused("ask", **({"text": "x"} | fields))
    assert status == 422 and "\n" not in text


@pytest.mark.parametrize(
    "id", ["x", "0" * 15, "A" * 16, "..%2f..%2fetc", ".trash-" + "0" * 16, "%00"]
)
def test_a_hostile_id_opens_nothing(window, id):
    window.ask()
    for method, path, body in (
        ("GET", f"conversations/{id}", None),
        ("DELETE", f"conversations/{id}", None),
        ("PATCH", f"conversations/{id}", {"version": 0, "title": "x"}),
        ("POST", f"conversations/{id}/ask", {"version": 0, "text": "x"}),
        ("POST", f"conversations/{id}/cut", {"version": 0, "node": 1}),
        ("POST", f"conversations/{id}/restore", None),
        ("POST", f"conversations/{id}/stop", None),
        ("GET", f"conversations/{id}/export?form=json", None),
        ("GET", f"conversations/{window.id}/pictures/{id}", None),
        ("GET", f"conversations/{window.id}/pictures/conversation.json", None),
    ):
        sent = window.client.request(method, path, json=body)
        assert sent.status_code in (400, 404, 405), (method, path, sent.text)
        assert str(window.site.conversations) not in sent.text


@pytest.mark.parametrize("key", ["", "x", "0" * 31, "A" * 32, "0" * 33])
def test_without_a_browser_key_nothing_is_opened(window, key):
    window.ask()
    for path in ("conversations", f"conversations/{window.id}"):
        sent = httpx.get(f"{window.site.url}/app/{path}", headers={"X-Browser-Key": key})
        assert sent.status_code == 409 and sent.json()["error"]["key"] == "key_damaged"
    stranger = Window(window.site, id=window.id)
    assert stranger.get().status_code == 404
    assert stranger.client.get("conversations").json() == {"conversations": []}
    name = "a" * 64 + ".png"
    assert stranger.get(f"/pictures/{name}").status_code == 404
    assert stranger.post("restore").status_code == 404


ROUTES = ("ask", "edit", "regenerate", "show", "cut", "undo", "drop", "patch", "stop", "restore")


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.sampled_from(ROUTES),
    json_values
    | st.dictionaries(
        st.sampled_from(["version", "node", "text", "turns", "uploads", "title", "pinned"]),
        json_values,
    ),
)
def test_whatever_is_sent_the_server_goes_on(window, action, value):
    body = json.dumps(value).encode()
    path = f"conversations/{window.id}" + ("" if action == "patch" else f"/{action}")
    sent = window.client.request(
        "PATCH" if action == "patch" else "POST",
        path,
        content=body,
        headers={"content-type": "application/json"},
    )
    assert sent.status_code < 500
    if sent.status_code != 200:
        assert "error" in sent.json()


def test_json_that_is_none_is_one_line(window):
    for body in (
        b"",
        b"{",
        b"[" * 100_000,
        b"\xff",
        b'{"version": 1e999}',
        b'{"version": "\\ud800"}',
    ):
        sent = window.client.post(
            f"conversations/{window.id}/undo",
            content=body,
            headers={"content-type": "application/json"},
        )
        assert sent.status_code in (400, 422) and "error" in sent.json(), (body[:10], sent.text)


def test_no_more_wait_for_an_answer_than_there_is_room_for(slow, monkeypatch):
    monkeypatch.setattr(talks, "MOST_WORKS", 1)
    with slow.streaming("ask", text="One?", settings={"max_new_tokens": 2000}) as stream:
        read_until_text(stream)
        other = Window(slow.site, slow.key)
        status, text = other.refused("ask", text="Other?")
        assert status == 400 and "ask again" in text
    wait_for(lambda: not slow.get().json()["answering"])
    other.ask("Other?", settings={"max_new_tokens": 2})


def test_a_list_reads_again_only_what_was_changed(window, monkeypatch):
    window.ask()
    other = Window(window.site, window.key)
    other.ask()
    reads = []
    load = ConversationStore.load
    monkeypatch.setattr(
        ConversationStore, "load", lambda store, id: reads.append(id) or load(store, id)
    )
    window.client.get("conversations")
    reads.clear()
    window.client.get("conversations")
    assert reads == []
    other.change("patch", title="Other")
    reads.clear()
    window.client.get("conversations")
    assert reads == [other.id]
