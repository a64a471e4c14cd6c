"""What happens to a question between the page and the assistant: uploads read, speech recognised,
answers streamed, stopped and saved. Knows nothing of Gradio."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy

from assistant.answer import Answer
from assistant.assistant import Assistant
from data.dataset import Message, Part
from data.reading import check_image
from errors import PhiSightError
from speech.recordings import read_audio
from speech.voice import Voice
from speech.whisper import NoSpeech, Segment, Speech
from web.conversation import SavedConversation, question_of, with_answer
from web.conversation_store import ConversationStore
from web.errors import RequestError, UploadError
from web.settings import Settings
from web.uploads import is_recording, read_picture
from workers.pool import Cancelled

LOOK_SECONDS = 0.05  # how often one who waits for his turn looks whether he is stopped
LISTENED_TO = 4  # recordings at once; Whisper's windows take turns
WAITING_TO_BE_HEARD = 12  # each takes a thread of the page's, which has 40
REFRESH_SECONDS = 0.05  # a page that is redrawn for every token falls behind a fast model


@dataclass(frozen=True)
class Progress:
    """A conversation while its answer is written; `note` is (key of the text, its values) once the
    answer is finished."""

    conversation: SavedConversation
    note: tuple[str, dict[str, str | int]] | None = None


@dataclass
class Talk:
    """One assistant, its Whisper and its voices, and the answers that are being written.

    `speech`, and `voice` with a language, give a loaded model, which they keep, or raise
    PhiSightError; None where recordings are not understood, or answers not spoken.
    """

    assistant: Assistant
    speech: Callable[[], Speech] | None = None
    voice: Callable[[str], Voice] | None = None
    _running: dict[str, Answer] = field(default_factory=dict)  # by window
    _heard: dict[str, threading.Event] = field(default_factory=dict)  # what stops it, by window
    _listening: threading.Semaphore = field(
        default_factory=lambda: threading.Semaphore(LISTENED_TO)
    )
    _lock: threading.Lock = field(default_factory=threading.Lock)

    # -- in --------------------------------------------------------------------------------------

    def question(
        self,
        store: ConversationStore,
        conversation: SavedConversation,
        text: str,
        files: Iterable[str | Path],
        settings: Settings,
        window: str = "",
    ) -> Message:
        """A user's turn from typed text and uploads: pictures first, then what was typed, then what
        was said in recordings. Pictures are kept with the conversation.

        Raises `UploadError` for an upload that is neither, `RequestError` when nothing is left.
        """
        pictures, spoken = [], []
        for path in map(Path, files):
            try:
                if is_recording(path.name):
                    spoken += [
                        segment.text.strip() for segment in self.segments(path, settings, window)
                    ]
                else:
                    pictures.append((read_picture(path), path.name))
                    check_image(*pictures[-1])  # all are judged before the first is kept
            except RequestError:
                raise
            except PhiSightError as error:
                raise UploadError(str(error), path) from error
        kept = [store.keep_picture(conversation.id, data, name) for data, name in pictures]
        return question_of(tuple(Part("image", name) for name in kept), " ".join([text, *spoken]))

    def segments(self, path: str | Path, settings: Settings, window: str = "") -> Iterator[Segment]:
        """What is recognised in a recording, piece by piece as it goes, for as long as its window
        is open and does not stop it.

        Raises PhiSightError for what is not a recording or holds no speech, `RequestError` without
        a model, when too many recordings wait, and when it was stopped.
        """
        if self.speech is None:
            raise RequestError("no_speech_model")
        found_words = False
        with self._ears(window) as stopped:
            try:
                audio = read_audio(path, stopped)
                for segment in self.speech().transcribe(
                    audio, settings.spoken, settings.translate, settings.denoise, stopped
                ):
                    found_words = found_words or bool(segment.text.strip())
                    yield segment
            except Cancelled:
                raise RequestError("not_heard") from None
        if not found_words:
            raise NoSpeech

    @contextmanager
    def _ears(self, window: str) -> Iterator[Callable[[], bool]]:
        """A turn to be listened to; gives what says whether the window stopped it or has gone.

        Raises `RequestError` when too many wait, and when it was stopped before its turn came.
        """
        stop = threading.Event()
        with self._lock:
            if window in self._heard:
                raise RequestError("still_answering")
            if len(self._heard) >= LISTENED_TO + WAITING_TO_BE_HEARD:
                raise RequestError("too_many_recordings")
            self._heard[window] = stop
        try:
            while not self._listening.acquire(timeout=LOOK_SECONDS):
                if stop.is_set():
                    raise RequestError("not_heard")
            try:
                yield stop.is_set
            finally:
                self._listening.release()
        finally:
            with self._lock:
                del self._heard[window]

    def speak(self, text: str, language: str) -> tuple[numpy.ndarray, int]:
        """(samples,) float32 and their rate in Hz of a text spoken in a language; `RequestError`
        without a voice."""
        if self.voice is None:
            raise RequestError("no_voice")
        return self.voice(language).speak(text)

    # -- out -------------------------------------------------------------------------------------

    def answer(
        self,
        window: str,
        store: ConversationStore,
        conversation: SavedConversation,
        settings: Settings,
    ) -> Iterator[Progress]:
        """Stream the answer to a conversation that ends with a question, and save it as it ends:
        finished, stopped, or left by a page that was closed.

        Raises PhiSightError before the first yield for what the assistant refuses, and
        `RequestError` while another answer of this window is being written.
        """
        pictures = {
            part.value: read_picture(store.picture(conversation.id, part.value))
            for message in conversation.messages
            for part in message.parts
            if part.kind == "image"
        }
        self.must_be_idle(window)
        reply = self.assistant.reply(
            conversation.messages,
            settings.max_new_tokens,
            settings.sampling,
            settings.seed,
            pictures=pictures,
        )
        with self._lock:
            if window in self._running:  # asked twice at the same moment
                reply.cancel()
                raise RequestError("still_answering")
            self._running[window] = reply
        text, started = "", time.perf_counter()
        try:
            store.save(conversation)
            yield Progress(conversation)
            for text in text_so_far(reply):
                yield Progress(with_answer(conversation, text))
        finally:  # also when the page was closed, and nobody waits for more
            reply.cancel()
            with self._lock:
                self._running.pop(window, None)
            store.save(with_answer(conversation, text))
        seconds = time.perf_counter() - started
        yield Progress(with_answer(conversation, text), closing_note(reply, seconds))

    def must_be_idle(self, window: str) -> None:
        """Raises `RequestError` while an answer of a window is being written."""
        if window in self._running or window in self._heard:
            raise RequestError("still_answering")

    def stop(self, window: str) -> None:
        """End the answer of a window within a token, and the listening to its recording; what
        iterates over it then ends."""
        heard = self._heard.get(window)
        if heard is not None:
            heard.set()
        reply = self._running.get(window)
        if reply is not None:
            reply.cancel()


def text_so_far(pieces: Iterable[str], seconds: float = REFRESH_SECONDS) -> Iterator[str]:
    """The growing text, at most once every so many seconds, and all of it last."""
    text, shown, last = "", "", 0.0
    for piece in pieces:
        text += piece
        now = time.perf_counter()
        if now - last >= seconds:
            yield text
            shown, last = text, now
    if shown != text:
        yield text


def closing_note(reply: Answer, seconds: float) -> tuple[str, dict[str, str | int]]:
    """What to tell of a finished answer, as a key of web/texts.py and its values."""
    if reply.cached:
        return "status_cached", {}
    reason = (
        reply.finish_reason
        if reply.finish_reason in ("length", "cancelled", "filtered")
        else "stop"
    )
    rate = reply.completion_tokens / max(seconds, 1e-6)
    return f"status_{reason}", {"tokens": reply.completion_tokens, "rate": f"{rate:.0f}"}
