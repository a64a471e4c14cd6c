"""One question about many pictures: answered side by side, each row by itself."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from web.errors import RequestError
from web.replies import refusal_of
from web.uploads import Upload, read_picture

if TYPE_CHECKING:
    from assistant.answer import Answer
    from assistant.assistant import Assistant
    from web.settings import Settings

AT_ONCE = 8  # questions of one batch that wait for the engine, which computes them together
BUSY_SECONDS = 0.25  # after which one asks again whom the engine had no room for
LOOK_SECONDS = 0.2  # how often it is looked whether the page has left


@dataclass(frozen=True)
class Row:
    """What became of one picture: an answer, or the refusal that says why there is none."""

    upload: str
    answer: str | None
    error: dict[str, Any] | None
    """as `web.replies.refusal_of` tells it"""
    seconds: float

    def told(self) -> dict[str, Any]:
        """As the page is told of it."""
        seconds = round(self.seconds, 3)
        return {
            "upload": self.upload,
            "answer": self.answer,
            "error": self.error,
            "seconds": seconds,
        }


def answers(
    assistant: Assistant,
    uploads: Sequence[str],
    find: Callable[[str], Upload],
    question: str,
    settings: Settings,
    left: Callable[[], bool],
) -> Iterator[Row]:
    """A row for every upload as it is ready, in no order. Once `left` says so nothing more comes,
    and what is being answered is cancelled. An upload is found, and its picture read, when its turn
    comes: of many pictures few are in memory."""
    batch = _Batch(assistant, find, question, settings)
    with ThreadPoolExecutor(AT_ONCE, thread_name_prefix="batch") as pool:
        waiting = {pool.submit(batch.row, id) for id in uploads}
        try:
            while waiting and not left():
                ready, waiting = wait(waiting, LOOK_SECONDS, return_when=FIRST_COMPLETED)
                yield from (future.result() for future in ready)
        finally:  # also when nobody reads on
            batch.stop()
            pool.shutdown(wait=False, cancel_futures=True)


class _Batch:
    """The rows that are being answered, which end together."""

    def __init__(
        self,
        assistant: Assistant,
        find: Callable[[str], Upload],
        question: str,
        settings: Settings,
    ) -> None:
        self.assistant, self.find = assistant, find
        self.question, self.settings = question, settings
        self._stopped = threading.Event()
        self._running: set[Answer] = set()
        self._lock = threading.Lock()

    def row(self, id: str) -> Row:
        """Answer one upload; what goes wrong is told in its row."""
        started = time.perf_counter()
        answer, error = None, None
        try:
            answer = self._answer(self.find(id))
        except Exception as failure:  # logged if it is none of the visitor's
            error = refusal_of(failure, "a row of a batch")[1]["error"]
        return Row(id, answer, error, time.perf_counter() - started)

    def stop(self) -> None:
        with self._lock:
            self._stopped.set()
            running = list(self._running)
        for reply in running:
            reply.cancel()

    def _answer(self, upload: Upload) -> str:
        """Raises PhiSightError for what is not a picture, or cannot be asked about."""
        from assistant.refusals import Busy, Closed

        if upload.kind != "picture":
            raise RequestError("batch_not_picture", name=upload.name)
        while True:
            reply = self._ask(upload)
            try:
                with self._held(reply):
                    self.assistant.start(reply)
                    text = "".join(reply).strip()
            except Busy:  # others ask too: their questions come first
                if self._stopped.wait(BUSY_SECONDS):
                    raise
                continue
            except Closed:
                raise RequestError("batch_cut_off") from None
            if reply.finish_reason == "cancelled":  # another model took this one's place
                raise RequestError("batch_cut_off")
            return text

    def _ask(self, upload: Upload) -> Answer:
        from data.dataset import Message, Part

        message = Message("user", (Part("image", upload.name), Part("text", self.question)))
        return self.assistant.ask(
            [message],
            self.settings.max_new_tokens,
            self.settings.sampling,
            self.settings.seed,
            pictures={upload.name: read_picture(upload.path)},
        )

    @contextmanager
    def _held(self, reply: Answer) -> Iterator[None]:
        """Where `stop` finds an answer that is written; one that comes after it ends at once."""
        with self._lock:
            self._running.add(reply)
            if self._stopped.is_set():
                reply.cancel()
        try:
            yield
        finally:
            with self._lock:
                self._running.discard(reply)
