"""What happens to a question between the page and the assistant: uploads read, speech recognised,
answers streamed, stopped and saved. Knows nothing of Gradio."""

from __future__ import annotations

import mimetypes
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from assistant.messages import Reply
from assistant.sampling import Sampling
from data.dataset import Message, Part
from data.images import MAX_BYTES, decode_image
from errors import PhiSightError
from web.conversations import Saved, Shelf, clean_text

REFRESH_SECONDS = 0.05  # a page that is redrawn for every token falls behind a fast model


class Assistant(Protocol):
    """What the pages need of infer.py's Assistant."""

    source: str

    def reply(
        self,
        messages: Sequence[Message],
        max_new_tokens: int,
        sampling: Sampling,
        seed: int | None,
        *,
        pictures: Mapping[str, bytes],
    ) -> Reply: ...


@dataclass(frozen=True)
class Settings:
    """What a person has set for the next answer."""

    sampling: Sampling = Sampling()
    max_new_tokens: int = 256
    seed: int | None = None
    spoken: str | None = None  # language of recordings; None is detected
    translate: bool = False
    denoise: bool = False
    aloud: bool = False
    language: str = "en"  # of the interface


@dataclass(frozen=True)
class Progress:
    """A conversation as it stands; `note` is (key of the text, its values) once it is finished."""

    saved: Saved
    note: tuple[str, dict[str, object]] | None = None


class Unready(PhiSightError):
    """Something is missing in a request; the message is a key of web/texts.py."""


class Refused(PhiSightError):
    """An upload that cannot be used; `path` says which."""

    def __init__(self, message: str, path: Path) -> None:
        super().__init__(message)
        self.path = path


@dataclass
class Talk:
    """One assistant, its ears and voice if it has them, and the answers that are being written.

    `speech`, and `voice` with a language, are called once, when first needed: each returns a loaded
    model or raises PhiSightError. None: there is none.
    """

    assistant: Assistant
    root: Path
    speech: Callable[[], Any] | None = None
    voice: Callable[[str], Any] | None = None
    _running: dict[str, Reply] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _loading: threading.Lock = field(default_factory=threading.Lock)  # loading takes long
    _loaded: dict[str, Any] = field(default_factory=dict)

    # -- in --------------------------------------------------------------------------------------

    def question(
        self,
        shelf: Shelf,
        saved: Saved,
        text: str,
        files: Iterable[str | Path],
        settings: Settings,
    ) -> Message:
        """A user's turn from typed text and uploads: pictures first, then what was typed, then what
        was said in recordings. Pictures are kept with the conversation.

        Raises `Refused` for an upload that is neither, `Unready` when nothing is left.
        """
        pictures, said = [], []
        for path in map(Path, files):
            try:
                if is_recording(path.name):
                    said += [segment.text.strip() for segment in self.segments(path, settings)]
                else:
                    pictures.append((read_upload(path), path.name))
                    decode_image(*pictures[-1])  # all are judged before the first is kept
            except Unready:
                raise
            except PhiSightError as error:
                raise Refused(str(error), path) from error
        text = clean_text(" ".join([text, *said])).strip()
        if not text and not pictures:
            raise Unready("ask_something")
        kept = [shelf.keep_picture(saved.id, data, name) for data, name in pictures]
        return Message(
            "user",
            (*(Part("image", name) for name in kept), *((Part("text", text),) if text else ())),
        )

    def segments(self, path: str | Path, settings: Settings) -> Iterator[Any]:
        """What is recognised in a recording, piece by piece as it goes.

        Raises PhiSightError for what is no recording or holds no speech, `Unready` without a model.
        """
        if self.speech is None:
            raise Unready("no_speech_model")
        speech = self._once("speech", self.speech)
        from speech.recordings import read_audio  # only where there is a Whisper
        from speech.whisper import NoSpeech

        heard = False
        for segment in speech.transcribe(
            read_audio(path), settings.spoken, settings.translate, settings.denoise
        ):
            heard = heard or bool(segment.text.strip())
            yield segment
        if not heard:
            raise NoSpeech

    def speak(self, text: str, language: str) -> tuple[Any, int]:
        """(samples float32, rate) of a text spoken in a language; `Unready` without a voice."""
        if self.voice is None:
            raise Unready("no_voice")
        return self._once(f"voice {language}", self.voice, language).speak(text)

    def _once(self, name: str, load: Callable[..., Any], *arguments: str) -> Any:
        with self._loading:
            if name not in self._loaded:
                self._loaded[name] = load(*arguments)
            return self._loaded[name]

    # -- out -------------------------------------------------------------------------------------

    def answer(
        self, session: str, shelf: Shelf, saved: Saved, settings: Settings
    ) -> Iterator[Progress]:
        """Stream the answer to a conversation that ends with a question, and save it as it ends:
        whole, stopped, or left by a page that was closed.

        Raises PhiSightError before the first yield for what the assistant refuses, and `Unready`
        while another answer of this `session` is being written.
        """
        pictures = {
            part.value: read_upload(shelf.picture(saved.id, part.value))
            for message in saved.messages
            for part in message.parts
            if part.kind == "image"
        }
        self.must_be_idle(session)
        reply = self.assistant.reply(
            saved.messages,
            settings.max_new_tokens,
            settings.sampling,
            settings.seed,
            pictures=pictures,
        )
        with self._lock:
            if session in self._running:  # asked twice at the same moment
                reply.cancel()
                raise Unready("still_answering")
            self._running[session] = reply
        text, started = "", time.perf_counter()
        try:
            shelf.save(saved)
            yield Progress(saved)
            for text in grown(reply):
                yield Progress(with_answer(saved, text))
        finally:  # runs too when the page was closed: nobody waits for a token more
            reply.cancel()
            with self._lock:
                self._running.pop(session, None)
            shelf.save(with_answer(saved, text))
        yield Progress(with_answer(saved, text), note(reply, time.perf_counter() - started))

    def must_be_idle(self, session: str) -> None:
        """Raises `Unready` while an answer of `session` is being written."""
        if session in self._running:
            raise Unready("still_answering")

    def stop(self, session: str | None) -> None:
        """End the answer of a session within a token; the iteration over it then ends."""
        reply = self._running.get(session or "")
        if reply is not None:
            reply.cancel()


def is_recording(name: str) -> bool:
    """Whether a file's name is one of audio; all else is taken for a picture, and judged as one."""
    kind = mimetypes.guess_type(name)[0] or ""
    return kind.startswith("audio/") or Path(name).suffix.lower() in (".webm", ".opus", ".weba")


def with_answer(saved: Saved, text: str) -> Saved:
    parts = (Part("text", clean_text(text)),) if text.strip() else ()
    return Saved(saved.id, (*saved.messages, Message("assistant", parts)))


def grown(pieces: Iterable[str], seconds: float = REFRESH_SECONDS) -> Iterator[str]:
    """The text so far, at most once every so many seconds, and the whole of it last."""
    text, shown, last = "", "", 0.0
    for piece in pieces:
        text += piece
        now = time.perf_counter()
        if now - last >= seconds:
            yield text
            shown, last = text, now
    if shown != text:
        yield text


def note(reply: Reply, seconds: float) -> tuple[str, dict[str, object]]:
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


# -- back in a conversation ------------------------------------------------------------------------


def before(saved: Saved, index: int) -> tuple[Saved, Message]:
    """The conversation before the question that message `index` is or answers, and that question.
    Raises `Unready` for an index that is not in it."""
    if not isinstance(index, int) or not 0 <= index < len(saved.messages):
        raise Unready("nothing_there")
    start = index - index % 2
    return Saved(saved.id, saved.messages[:start]), saved.messages[start]


def reworded(message: Message, text: str) -> Message:
    """A question with other words and the same pictures; `Unready` if nothing is left."""
    pictures = tuple(part for part in message.parts if part.kind == "image")
    text = clean_text(text).strip()
    if not text and not pictures:
        raise Unready("ask_something")
    return Message("user", (*pictures, *((Part("text", text),) if text else ())))


def text_of(message: Message) -> str:
    return " ".join(part.value for part in message.parts if part.kind == "text")


def read_upload(path: Path) -> bytes:
    """The bytes of a file; PhiSightError, naming it without its folder, if it is too large."""
    try:
        if path.stat().st_size > MAX_BYTES:
            raise PhiSightError(
                f"{path.name}: {path.stat().st_size:,} bytes is over the limit of"
                f" {MAX_BYTES:,}; save a smaller copy"
            )
        return path.read_bytes()
    except OSError as error:
        raise PhiSightError(
            f"{path.name}: cannot be read ({error.strerror}); send it again"
        ) from None
