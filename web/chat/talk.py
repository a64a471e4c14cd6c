"""What happens to a question between the page and the assistant: recordings are listened to,
pictures kept, and the answer streamed, stopped and saved.

An answer is written by a task of its own, which goes on to its end however its reader leaves, and
saves what was said. A conversation has one at a time.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from starlette.concurrency import run_in_threadpool

from api.stream import in_thread, pieces_of
from assistant.refusals import Blocked, Busy, Closed
from web.chat.conversation import (
    BEGINNING,
    MAX_PICTURES,
    Note,
    Reason,
    SavedConversation,
    answered_again,
    clean_text,
    messages_of,
    read_turns,
    with_answer,
    with_question,
)
from web.chat.markdown import rendered_once
from web.chat.store import ConversationStore
from web.chat.told import conversation_json
from web.errors import RequestError
from web.replies import Event
from web.settings import SettingsForm, settings_from
from web.site import Site
from web.uploads import is_recording, read_picture

if TYPE_CHECKING:
    from assistant.answer import Answer
    from assistant.assistant import Assistant
    from web.settings import Settings

MOST_WORKS = 64  # answers of one server under way or waited for
THREADS = 16  # that prepare questions; recordings have turns of their own
REFRESH_SECONDS = 0.05  # a page that is redrawn for every token falls behind a fast model
PICTURE_BYTES = 256 * 2**20  # of all pictures that one answer is about
LONG = 1000  # characters of an answer, which take some milliseconds
ANSWER_BYTES = 2**20  # of a conversation's file, that are left for the answer to a question
ENDED_SECONDS = 10.0  # in which an answer that is told to end has ended


class Beginning(Protocol):
    """Makes of a conversation, what is asked and pictures that are kept the conversation that is to
    be answered, and the number of its question."""

    def __call__(
        self, conversation: SavedConversation, text: str, pictures: tuple[str, ...]
    ) -> tuple[SavedConversation, int]: ...


@dataclass(frozen=True)
class Asked:
    """What a window wants answered, in the version of the conversation that it has seen."""

    store: ConversationStore
    id: str
    version: int
    begin: Beginning
    settings: SettingsForm
    text: str = ""
    files: Sequence[Path] = ()

    @property
    def folder(self) -> Path:
        return self.store.folder_of(self.id)

    @property
    def visitor(self) -> str:
        """Tells whose turns these are."""
        return self.store.folder.name


def new_question(system: str | None) -> Beginning:
    """A question at the end of the path; `system`: of a conversation that it begins."""

    def begin(
        conversation: SavedConversation, text: str, pictures: tuple[str, ...]
    ) -> tuple[SavedConversation, int]:
        if system is not None and not conversation.version:
            conversation = replace(conversation, system=clean_text(system).strip())
        path = conversation.path
        parent = path[-1].number if path else BEGINNING
        asked = with_question(conversation, parent, text, pictures)
        return asked, asked.path[-1].number

    return begin


def edited_question(number: int) -> Beginning:
    """A question with other words, the same pictures and more, beside the former one."""

    def begin(
        conversation: SavedConversation, text: str, pictures: tuple[str, ...]
    ) -> tuple[SavedConversation, int]:
        former = conversation.question(number)
        kept = tuple(dict.fromkeys((*former.pictures, *pictures)))
        if pictures and len(kept) > MAX_PICTURES:
            raise RequestError("too_many_pictures", most=MAX_PICTURES)
        asked = with_question(conversation, former.parent, text, kept)
        return asked, asked.path[-1].number

    return begin


def former_question(number: int) -> Beginning:
    """A question that was asked, for another answer."""

    def begin(
        conversation: SavedConversation, text: str, pictures: tuple[str, ...]
    ) -> tuple[SavedConversation, int]:
        conversation, question = answered_again(conversation, number)
        return conversation, question.number

    return begin


class Work:
    """One answer under way: what its reader is told, and its end."""

    def __init__(self) -> None:
        self._stopped = threading.Event()
        self._answer: Answer | None = None
        self._told: deque[Event] = deque()
        self._news = asyncio.Event()
        self.ended = asyncio.Event()
        """set when it has ended and is saved"""

    def stop(self) -> None:
        """End it as soon as can be, from any thread."""
        self._stopped.set()
        if self._answer is not None:
            self._answer.cancel()

    @property
    def stopped(self) -> Callable[[], bool]:
        return self._stopped.is_set

    def take(self, answer: Answer) -> None:
        """From now on `stop` ends this answer."""
        self._answer = answer
        if self.stopped():
            answer.cancel()

    def tell(self, name: str, data: Any = None) -> None:
        """Tell the reader, from the event loop's thread; a text that was not read yet is replaced
        by a longer one."""
        if self._told and name == self._told[-1][0] == "text":
            self._told.pop()
        self._told.append((name, data))
        self._news.set()

    async def events(self) -> AsyncIterator[Event]:
        """What is told, a text at most every `REFRESH_SECONDS`; who leaves ends the answer. Raises
        what made it fail."""
        try:
            while True:
                await self._news.wait()
                self._news.clear()
                while self._told:
                    name, data = self._told.popleft()
                    if name == "failed":
                        raise data
                    if name == "end":
                        return
                    if name != "text":
                        yield name, data
                        continue
                    began = time.perf_counter()
                    html = await _html_of(data)
                    took = time.perf_counter() - began
                    yield name, {"text": data, "html": html}
                    await asyncio.sleep(max(REFRESH_SECONDS, 5 * took))
        finally:
            self.stop()


async def _html_of(text: str) -> str:
    """HTML of an answer that grows; a long one must not hold up the event loop."""
    if len(text) < LONG:
        return rendered_once(text)
    return await run_in_threadpool(rendered_once, text)


class Talk:
    """All answers of one site that are being written, by the folder of their conversation."""

    def __init__(self, site: Site) -> None:
        self.site = site
        self._works: dict[Path, Work] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._threads = asyncio.Semaphore(THREADS)
        self._savers = asyncio.Semaphore(THREADS)  # never held by who waits for the model

    def answering(self, folder: Path) -> bool:
        """Whether an answer to a conversation is being written."""
        return folder in self._works

    def must_be_idle(self, folder: Path) -> None:
        """Raises `RequestError` while an answer to a conversation is being written."""
        if self.answering(folder):
            raise RequestError("still_answering")

    def stop(self, folder: Path) -> None:
        """End the answer to a conversation, if one is being written."""
        if work := self._works.get(folder):
            work.stop()

    async def end(self, folder: Path) -> None:
        """The same, and wait until it is saved."""
        if work := self._works.get(folder):
            work.stop()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(work.ended.wait(), ENDED_SECONDS)

    def begin(self, asked: Asked) -> Work:
        """Begin to answer. Raises `RequestError` while another answer to the same conversation is
        being written, and `Busy` when there are too many."""
        self.must_be_idle(asked.folder)
        if len(self._works) >= MOST_WORKS:
            raise Busy("question: too many wait already; ask again in a moment")
        work = self._works[asked.folder] = Work()
        task = asyncio.create_task(self._work(asked, work))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return work

    async def _work(self, asked: Asked, work: Work) -> None:
        try:
            await self._answer(asked, work)
            work.tell("end")
        except Exception as error:
            work.tell("failed", error)
        finally:
            del self._works[asked.folder]
            work.ended.set()

    async def _answer(self, asked: Asked, work: Work) -> None:
        settings = await in_thread(self._threads, settings_from, asked.settings)
        text = await self._listen(asked, settings, work)
        # Behind the listening, during which another model may have taken the place of this one.
        assistant = await in_thread(self._threads, self.site.model.get, work.stopped)
        begun = await in_thread(self._threads, begin, asked, text, assistant, settings)
        work.take(begun.answer)
        ending = Ending(asked, begun)
        work.tell("asked", {"conversation": begun.told})
        try:
            await in_thread(self._threads, assistant.start, begun.answer)
            async for piece in pieces_of(begun.answer):
                ending.text += piece
                work.tell("text", ending.text)
        except Closed:  # another model has taken this one's place
            raise RequestError("batch_cut_off") from None
        finally:
            begun.answer.cancel()
            saved = await ending.saved(self._savers)
        told = await in_thread(self._threads, conversation_json, saved, self.site.model.loaded)
        work.tell("done", {"conversation": told})

    async def _listen(self, asked: Asked, settings: Settings, work: Work) -> str:
        """What is asked: what was typed, then what is said in the recordings."""
        recordings = [path for path in asked.files if is_recording(path.name)]
        if not recordings:
            return asked.text
        loop, said = asyncio.get_running_loop(), [asked.text.strip()] if asked.text.strip() else []

        def listen() -> None:
            heard: list[str] = []
            for path in recordings:
                for segment in self.site.ears.segments(
                    self.site.speech, path, settings, work.stopped, asked.visitor
                ):
                    if words := segment.text.strip():
                        heard.append(words)
                        told = {"text": " ".join(heard)}
                        loop.call_soon_threadsafe(work.tell, "heard", told)
            said.extend(heard)

        # Its own turn: the ears count who waits, and threads that wait must not hold up others.
        await in_thread(asyncio.Semaphore(1), listen)
        return " ".join(said)


@dataclass(frozen=True)
class Begun:
    """A question that is saved, and the answer to it, not yet started."""

    question: int
    answer: Answer
    told: dict[str, Any]
    """the conversation as the page is told of it"""


def begin(asked: Asked, text: str, assistant: Assistant, settings: Settings) -> Begun:
    """Keep the pictures of a question and save it, if the assistant takes it; blocks.

    Raises what `ConversationStore.change`, `keep_picture` and `Assistant.ask` raise; nothing is
    then kept.
    """
    store = asked.store
    store.seen(asked.id, asked.version)
    try:
        given = [path for path in asked.files if not is_recording(path.name)]
        kept = [store.keep_picture(asked.id, read_picture(path), path.name) for path in given]
        pictures = tuple(dict.fromkeys(kept))
        begun: list[tuple[int, Answer]] = []

        def change(conversation: SavedConversation) -> SavedConversation:
            conversation, question = asked.begin(conversation, text, pictures)
            begun.append((question, _ask(asked, conversation, question, assistant, settings)))
            return conversation

        conversation = store.change(asked.id, asked.version, change, ANSWER_BYTES)
    except BaseException:
        store.tidy(asked.id)
        raise
    question, answer = begun[0]
    told = conversation_json(conversation, assistant, question, answering=True)
    return Begun(question, answer, told)


def _ask(
    asked: Asked,
    conversation: SavedConversation,
    question: int,
    assistant: Assistant,
    settings: Settings,
) -> Answer:
    turns = read_turns(conversation, conversation.nodes[question])
    blocks = assistant.content_filter
    if conversation.system and blocks and blocks(conversation.system, True) is None:
        raise Blocked("system prompt: is not let through by the content filter; rephrase it")
    answer = assistant.ask(
        messages_of(conversation, turns), settings.max_new_tokens, settings.sampling, settings.seed
    )
    contents: dict[str, bytes] = {}
    left = PICTURE_BYTES
    for name in dict.fromkeys(name for name, _ in answer.pictures):
        contents[name] = read_picture(asked.store.picture(asked.id, name))
        left -= len(contents[name])
        if left < 0:
            raise RequestError("pictures_too_large", megabytes=PICTURE_BYTES >> 20)
    answer.pictures = [(name, contents[name]) for name, _ in answer.pictures]
    return answer


class Ending:
    """What was said so far, saved once however the answer ends."""

    def __init__(self, asked: Asked, begun: Begun) -> None:
        self.asked, self.begun = asked, begun
        self.text = ""
        self._began = time.perf_counter()
        self._lock = threading.Lock()
        self._saved: SavedConversation | None = None

    async def saved(self, threads: asyncio.Semaphore) -> SavedConversation:
        """The conversation with the answer. Raises what `ConversationStore.change` raises."""
        try:
            return await in_thread(threads, self._save)
        except asyncio.CancelledError:  # the server ends, and no other thread lives long enough
            self._save()
            raise

    def _save(self) -> SavedConversation:
        with self._lock:
            if self._saved is None:
                self._saved = self.asked.store.change(self.asked.id, None, self._answered)
            return self._saved

    def _answered(self, conversation: SavedConversation) -> SavedConversation:
        failed = self.begun.answer.error is not None
        if failed and not self.text.strip():
            return conversation
        note = None if failed else self._note()
        return with_answer(conversation, self.begun.question, self.text, note)

    def _note(self) -> Note:
        answer = self.begun.answer
        reason: Reason = "cancelled"
        if answer.cached:
            reason = "cached"
        elif answer.finish_reason in ("stop", "length", "filtered"):
            reason = answer.finish_reason  # type: ignore[assignment]
        now, tokens = time.perf_counter(), answer.completion_tokens
        written = now - (answer.submitted or self._began)
        return Note(
            reason, tokens, round(now - self._began, 2), round(tokens / max(written, 1e-3), 1)
        )
