"""The chat tab: one conversation, asked by text or by voice, and the list of saved ones.

What a conversation holds is decided here on the server: the page's own copy of it is never read
back, so a browser can name no file that it has not uploaded.
"""

from __future__ import annotations

import dataclasses
import html
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr

from assistant.sampling import Sampling
from data.dataset import Message, Part
from errors import PhiSightError
from web import texts
from web.conversations import Saved, Shelf, new_conversation, new_key
from web.page import Browser, Translated, told
from web.talk import Refused, Settings, Talk, Unready, before, reworded, text_of

STORAGE_KEY = "phisight"
NARROW = 768  # pixels: below, the sidebar covers the page and is opened only when it is wanted
UPLOADS = ["image", "audio"]


@dataclass(frozen=True)
class Session:
    """One window: whose it is and what is open in it."""

    key: str
    saved: Saved
    language: str


@dataclass(frozen=True)
class Example:
    """A question about pictures that lie on the disk."""

    question: str
    files: tuple[str, ...]


class ChatPage:
    """Builds the tab inside the open `gr.Blocks` and answers its events."""

    def __init__(self, talk: Talk, examples: Sequence[Example], translated: Translated) -> None:
        self.talk, self.examples, self.translated = talk, list(examples), translated

    # -- the page --------------------------------------------------------------------------------

    def build_sidebar(self) -> None:
        t = self.translated
        self.session = gr.State(None)
        # The value is scrambled with a word that anybody can read here; what keeps conversations
        # apart is the key inside, which no other browser has.
        self.browser = gr.BrowserState({}, storage_key=STORAGE_KEY, secret="phisight")
        self.width = gr.Number(visible=False)
        self.new = t(
            gr.Button(variant="primary", size="md", elem_id="new-conversation"),
            value="new_conversation",
        )
        self.saved = t(gr.Radio([], elem_id="conversations"), label="conversations")
        self.delete = t(
            gr.Button(variant="secondary", size="sm", elem_id="delete-conversation"),
            value="delete_conversation",
        )
        with t(gr.Accordion(open=False, elem_id="settings"), label="settings"):
            self._build_settings()

    def _build_settings(self) -> None:
        t = self.translated
        self.language = t(
            gr.Dropdown(
                [(name, code) for code, name in texts.LANGUAGES.items()],
                value="en",
                elem_id="language",
            ),
            label="interface_language",
        )
        self.temperature = t(
            gr.Slider(0, 2, 0, step=0.05, elem_id="temperature"),
            label="temperature",
            info="temperature_info",
        )
        self.top_p = t(gr.Slider(0.05, 1, 1, step=0.05), label="top_p")
        self.top_k = t(gr.Slider(0, 200, 0, step=1), label="top_k")
        self.penalty = t(gr.Slider(1, 2, 1, step=0.05), label="repetition_penalty")
        self.length = t(
            gr.Slider(1, 2048, 256, step=1, elem_id="max-new-tokens"), label="max_new_tokens"
        )
        self.seed = t(gr.Textbox("", max_lines=1, elem_id="seed"), label="seed")
        self.spoken = t(
            gr.Dropdown(spoken_choices(texts.DEFAULT), value="", elem_id="spoken"),
            label="spoken_language",
            choices=spoken_choices,
        )
        self.translate = t(gr.Checkbox(False), label="translate")
        self.denoise = t(gr.Checkbox(False), label="denoise")
        self.aloud = t(gr.Checkbox(False, elem_id="aloud"), label="speak_answers")
        self.settings = [
            self.temperature,
            self.top_p,
            self.top_k,
            self.penalty,
            self.length,
            self.seed,
            self.spoken,
            self.translate,
            self.denoise,
            self.aloud,
        ]

    def build_main(self) -> None:
        t = self.translated
        self.chat = t(
            gr.Chatbot(
                elem_id="chat",
                show_label=False,
                height="auto",
                min_height="42vh",
                layout="bubble",
                editable="user",
                buttons=["copy"],
                feedback_options=None,
                allow_tags=False,
                allow_file_downloads=False,
                group_consecutive_messages=False,
                examples=[
                    {"text": e.question, "display_text": e.question, "files": list(e.files)}
                    for e in self.examples
                ],
            ),
            placeholder=lambda language: f"## PhiSight\n{texts.text('welcome', language)}",
        )
        for example in self.chat.examples:  # served as long as the app runs, unlike uploads
            self.chat.keep_in_cache.update(file["path"] for file in example["files"])
        self.note = gr.Markdown(elem_id="note")
        self.speech = t(
            gr.Audio(
                interactive=False,
                autoplay=True,
                visible=False,
                elem_id="spoken-answer",
                buttons=["download"],
            ),
            label="spoken_answer",
        )
        with gr.Tabs(elem_id="ways"):
            with t(gr.Tab(id="text"), label="by_text"):
                self.box = t(
                    gr.MultimodalTextbox(
                        elem_id="question",
                        file_count="multiple",
                        file_types=UPLOADS,
                        show_label=False,
                        autofocus=True,
                        max_plain_text_length=100_000,
                    ),
                    placeholder="question_here",
                )
            with t(gr.Tab(id="voice"), label="by_voice"):
                self._build_voice()

    def _build_voice(self) -> None:
        t = self.translated
        with gr.Row(equal_height=True):
            self.recording = t(
                gr.Audio(sources=["microphone", "upload"], type="filepath", elem_id="recording"),
                label="record",
            )
            self.gallery = t(
                gr.Gallery(
                    type="filepath",
                    interactive=True,
                    columns=4,
                    height=170,
                    object_fit="contain",
                    allow_preview=False,
                    buttons=[],
                    file_types=["image"],
                    elem_id="voice-pictures",
                ),
                label="pictures_optional",
            )
        with gr.Row():
            self.ask = t(gr.Button(variant="primary", elem_id="ask-by-voice"), value="ask")
            self.stop = t(gr.Button(elem_id="stop-voice"), value="stop")
        self.heard = t(gr.Textbox(interactive=False, lines=1, elem_id="heard"), label="heard")

    def connect(self, blocks: gr.Blocks, sidebar: gr.Sidebar) -> None:
        """Attach the events; every component is there by now."""
        answering = {
            "concurrency_limit": None,
            "show_progress": "hidden",
            "api_visibility": "private",
        }
        quick = {
            "queue": True,
            "concurrency_limit": None,
            "show_progress": "hidden",
            "api_visibility": "private",
        }
        shown = [
            self.session,
            self.chat,
            self.box,
            self.saved,
            self.note,
            self.speech,
            self.browser,
        ]
        settings = self.settings
        self.box.submit(self.on_text, [self.session, self.box, *settings], shown, **answering)
        self.chat.example_select(self.on_example, [self.session, *settings], shown, **answering)
        self.chat.retry(self.on_retry, [self.session, *settings], shown, **answering)
        self.chat.edit(self.on_edit, [self.session, *settings], shown, **answering)
        self.chat.undo(self.on_undo, [self.session], shown, **quick)
        self.chat.clear(self.on_delete, [self.session], shown, **quick)
        self.ask.click(
            self.on_voice,
            [self.session, self.recording, self.gallery, *settings],
            [*shown, self.heard, self.recording, self.gallery],
            **answering,
        )
        for stopping in (self.box.stop, self.stop.click):
            stopping(self.on_stop, None, None, queue=False, api_visibility="private")
        self.new.click(self.on_new, [self.session], shown, **quick)
        self.delete.click(self.on_delete, [self.session], shown, **quick)
        self.saved.input(self.on_open, [self.session, self.saved], shown, **quick)
        every = [*shown, *(c for c in self.translated.components if c not in shown)]
        self.language.input(self.on_language, [self.session, self.language], every, **quick)
        blocks.load(self.on_load, [self.browser], every, **quick)
        blocks.load(
            lambda width: gr.update(open=width > NARROW),
            [self.width],
            [sidebar],
            js="() => window.innerWidth",
            queue=False,
            api_visibility="private",
        )
        blocks.unload(self.on_unload)

    # -- what is shown ---------------------------------------------------------------------------

    def shelf(self, session: Session) -> Shelf:
        return Shelf(self.talk.root, session.key)

    def messages(self, session: Session) -> list[dict[str, Any]]:
        """The conversation as the chat component takes it."""
        shelf, saved = self.shelf(session), session.saved
        shown = []
        for index, parts in bubbles(saved):
            content = [
                {"path": _served(shelf.picture(saved.id, part.value))}
                if part.kind == "image"
                else part.value
                for part in parts
            ]
            shown.append(
                {
                    "role": saved.messages[index].role,
                    "content": content or [texts.text("no_answer", session.language)],
                }
            )
        return shown

    def everything(self, session: Session) -> dict[Any, Any]:
        """What follows from the open conversation. Writing is possible again."""
        titles = self.shelf(session).titles()
        names = {
            "": texts.text("untitled", session.language),
            "?": texts.text("unreadable", session.language),
        }
        listed = [(names.get(title, title), id) for id, title in titles]
        is_saved = any(id == session.saved.id for id, _ in titles)
        return {
            self.session: session,
            self.chat: self.messages(session),
            self.saved: gr.update(choices=listed, value=session.saved.id if is_saved else None),
            self.browser: Browser(session.key, session.saved.id, session.language).to_storage(),
            self.box: gr.update(interactive=True, submit_btn=True, stop_btn=False),
        }

    # -- events ----------------------------------------------------------------------------------

    def on_load(self, request: gr.Request, browser: object) -> dict[Any, Any]:
        """A page was opened: find its browser's conversations, and the one that was open."""
        known = Browser.from_storage(browser)
        language = known.language or texts.best_language(request.headers.get("accept-language"))
        session = Session(known.key or new_key(), new_conversation(), language)
        if known.open and any(id == known.open for id, _ in self.shelf(session).titles()):
            with told(language):
                session = dataclasses.replace(session, saved=self.shelf(session).load(known.open))
        return {
            **self.translations(session),
            self.note: "",
            self.language: gr.update(
                value=language, label=texts.text("interface_language", language)
            ),
        }

    def on_language(self, session: Session, language: str) -> dict[Any, Any]:
        return self.translations(dataclasses.replace(session, language=language))

    def translations(self, session: Session) -> dict[Any, Any]:
        """Everything, with all texts in the session's language."""
        shown = self.everything(session)
        for component, update in zip(
            self.translated.components, self.translated.updates(session.language), strict=True
        ):
            more = shown.get(component, {})
            more = more if isinstance(more, dict) else {"value": more}
            shown[component] = {**more, **update}
        return shown

    def on_text(
        self, request: gr.Request, session: Session, box: dict[str, Any], *values: Any
    ) -> Iterator[dict[Any, Any]]:
        yield from self._ask(session, box["text"], box["files"], values, request)

    def on_example(
        self, request: gr.Request, event: gr.SelectData, session: Session, *values: Any
    ) -> Iterator[dict[Any, Any]]:
        if not isinstance(event.index, int) or not 0 <= event.index < len(self.examples):
            return
        example = self.examples[event.index]
        yield from self._ask(session, example.question, example.files, values, request)

    def on_voice(
        self,
        request: gr.Request,
        session: Session,
        recording: str | None,
        gallery: list[tuple[str, Any]] | None,
        *values: Any,
    ) -> Iterator[dict[Any, Any]]:
        yield {self.heard: "", self.note: ""}
        heard = ""
        with told(session.language):
            self.talk.must_be_idle(request.session_hash)
            if not recording:
                raise Unready("no_recording")
            settings = settings_of(session, values)
            for segment in self.talk.segments(recording, settings):
                heard = f"{heard} {segment.text.strip()}".strip()
                yield {self.heard: heard}
            files = [path for path, _ in gallery or ()]
            yield {self.recording: None, self.gallery: None}
            yield from self._ask(session, heard, files, values, request)

    def on_retry(
        self, request: gr.Request, event: gr.RetryData, session: Session, *values: Any
    ) -> Iterator[dict[Any, Any]]:
        with told(session.language):
            settings = settings_of(session, values)
            earlier, question = before(session.saved, place_of(session.saved, event.index))
            yield from self._answer(session, earlier, question, settings, request)

    def on_edit(
        self, request: gr.Request, event: gr.EditData, session: Session, *values: Any
    ) -> Iterator[dict[Any, Any]]:
        with told(session.language):
            settings = settings_of(session, values)
            earlier, question = before(session.saved, place_of(session.saved, event.index))
            question = reworded(question, str(event.value or ""))
            yield from self._answer(session, earlier, question, settings, request)
            return
        yield {self.chat: self.messages(session)}  # undo what the page shows of a refused edit

    def on_undo(self, request: gr.Request, event: gr.UndoData, session: Session) -> dict[Any, Any]:
        """Take the question back, with all after it, into the box where it was typed."""
        with told(session.language):
            self.talk.must_be_idle(request.session_hash)
            earlier, question = before(session.saved, place_of(session.saved, event.index))
            files = [
                _served(self.shelf(session).picture(earlier.id, part.value))
                for part in question.parts
                if part.kind == "image"
            ]
            if earlier.messages:
                self.shelf(session).save(earlier)
            session = dataclasses.replace(session, saved=earlier)
            text = {"text": text_of(question), "files": files}
            return {
                **self.everything(session),
                self.note: "",
                self.box: gr.update(value=text, interactive=True),
            }
        return {self.chat: self.messages(session)}

    def on_new(self, request: gr.Request, session: Session) -> dict[Any, Any]:
        with told(session.language):
            self.talk.must_be_idle(request.session_hash)
            session = dataclasses.replace(session, saved=new_conversation())
        return {**self.everything(session), self.note: "", self.speech: _silent()}

    def on_open(self, request: gr.Request, session: Session, id: str) -> dict[Any, Any]:
        with told(session.language):
            self.talk.must_be_idle(request.session_hash)
            session = dataclasses.replace(session, saved=Saved(id))  # damaged, it can be deleted
            session = dataclasses.replace(session, saved=self.shelf(session).load(id))
        return {**self.everything(session), self.note: "", self.speech: _silent()}

    def on_delete(self, request: gr.Request, session: Session) -> dict[Any, Any]:
        with told(session.language):
            self.talk.must_be_idle(request.session_hash)
            self.shelf(session).delete(session.saved.id)
            session = dataclasses.replace(session, saved=new_conversation())
        return {**self.everything(session), self.note: "", self.speech: _silent()}

    def on_stop(self, request: gr.Request) -> None:
        self.talk.stop(request.session_hash)

    def on_unload(self, request: gr.Request) -> None:
        """The page was closed."""
        self.talk.stop(request.session_hash)

    # -- asking ----------------------------------------------------------------------------------

    def _ask(
        self,
        session: Session,
        text: str,
        files: Sequence[str],
        values: Sequence[Any],
        request: gr.Request,
    ) -> Iterator[dict[Any, Any]]:
        """A new question at the end of the conversation. One that is refused goes back into the
        box, without the upload that was the reason."""
        with told(session.language):
            self.talk.must_be_idle(request.session_hash)
            settings = settings_of(session, values)
            try:
                question = self.talk.question(
                    self.shelf(session), session.saved, text, files, settings
                )
            except Refused as error:
                files = [path for path in files if Path(path) != error.path]
                raise
            yield from self._answer(session, session.saved, question, settings, request)
            return
        if not session.saved.messages:
            self.shelf(session).delete(session.saved.id)  # pictures of a question never asked
        yield {self.box: gr.update(value={"text": text, "files": list(files)}, interactive=True)}

    def _answer(
        self,
        session: Session,
        earlier: Saved,
        question: Message,
        settings: Settings,
        request: gr.Request,
    ) -> Iterator[dict[Any, Any]]:
        saved = Saved(earlier.id, (*earlier.messages, question))
        first = True
        shelf = self.shelf(session)
        for progress in self.talk.answer(request.session_hash, shelf, saved, settings):
            session = dataclasses.replace(session, saved=progress.saved)
            if first:
                first = False
                yield {
                    **self.everything(session),
                    self.note: "",
                    self.speech: _silent(),
                    self.box: gr.update(value=None, submit_btn=False, stop_btn=True),
                }
            elif progress.note is None:
                yield {self.chat: self.messages(session)}
            else:
                key, values = progress.note
                note = html.escape(texts.text(key, session.language, **values))
                yield {**self.everything(session), self.note: note}
        if settings.aloud:
            yield from self._speak(session, settings.spoken or texts.DEFAULT)

    def _speak(self, session: Session, language: str) -> Iterator[dict[Any, Any]]:
        """The page may skip what follows fast upon it, so this says all that came before again."""
        text = text_of(session.saved.messages[-1])
        if text:
            with told(session.language):
                spoken = _wav(*self.talk.speak(text, language))
                yield {
                    **self.everything(session),
                    self.speech: gr.update(value=spoken, visible=True),
                }


def spoken_choices(language: str) -> list[tuple[str, str]]:
    return [(name or texts.text("detect", language), code) for code, name in texts.SPOKEN.items()]


def _silent() -> dict[str, Any]:
    return gr.update(value=None, visible=False)


def _wav(samples: Any, rate: int) -> str:
    from speech.voice import write_wav  # only where there is a voice

    with tempfile.NamedTemporaryFile(suffix=".wav", delete=False) as file:
        write_wav(file.name, samples, rate)
    return file.name


def _served(path: Path) -> str:
    """A copy of a kept picture in the folder that Gradio serves files from."""
    from gradio.processing_utils import save_file_to_cache
    from gradio.utils import get_upload_folder

    return save_file_to_cache(path, get_upload_folder())


def bubbles(saved: Saved) -> Iterator[tuple[int, tuple[Part, ...]]]:
    """What is shown in one bubble each: the number of the message, and some of its parts.

    Pictures have a bubble to themselves: Gradio's page can edit no text that shares one with them.
    """
    for index, message in enumerate(saved.messages):
        pictures = tuple(part for part in message.parts if part.kind == "image")
        words = tuple(part for part in message.parts if part.kind == "text")
        if pictures:
            yield index, pictures
        if words or not pictures:
            yield index, words


def place_of(saved: Saved, index: int | Sequence[int]) -> int:
    """The number of the message in whose bubble something was clicked, -1 for none. Gradio names
    a bubble by its place, or by its place and that of a part in it."""
    place = index if isinstance(index, int) else index[0]
    numbers = [number for number, _ in bubbles(saved)]
    return numbers[place] if 0 <= place < len(numbers) else -1


def settings_of(session: Session, values: Sequence[Any]) -> Settings:
    """From the values of the settings' components, in their order. Raises PhiSightError for what
    their sliders do not give, `Unready` for a seed that is no whole number."""
    temperature, top_p, top_k, penalty, length, seed, spoken, translate, denoise, aloud = values
    try:
        numbers = float(temperature), float(top_p), int(top_k), float(penalty)
        longest = int(length)
    except (TypeError, ValueError, OverflowError):
        raise PhiSightError("settings: one is no number; move the sliders back") from None
    return Settings(
        Sampling(*numbers),
        max(1, longest),
        seed_of(str(seed or "")),
        spoken or None,
        bool(translate),
        bool(denoise),
        bool(aloud),
        session.language,
    )


def seed_of(typed: str) -> int | None:
    """None where nothing was typed."""
    typed = typed.strip()
    if not typed:
        return None
    if not (len(typed) <= 20 and typed.isascii() and typed.isdecimal() and int(typed) < 2**64):
        raise Unready("bad_seed")
    return int(typed)
