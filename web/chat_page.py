"""The events of the chat tab: a conversation asked by text or by voice, edited, opened and deleted.

What a conversation holds is decided here on the server: the page's own copy of it is never read
back, so a browser can name no file that it has not uploaded.
"""

from __future__ import annotations

import dataclasses
import html
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import gradio as gr

from data.dataset import Message
from speech.voice import write_wav
from web import texts
from web.chat_view import ChatView, message_at
from web.conversation import (
    SavedConversation,
    before_question,
    new_conversation,
    reworded,
    text_of,
)
from web.conversation_store import new_key
from web.errors import RequestError, UploadError
from web.page import QUEUED, Updates, errors_shown, window_of
from web.session import Browser, Session
from web.settings import Settings, settings_from
from web.talk import Talk
from web.temporary import made_file

NARROW = 768  # pixels: below, the sidebar covers the page and is opened only when it is wanted


class ChatPage:
    """Answers the events of a `ChatView`."""

    def __init__(self, talk: Talk, view: ChatView) -> None:
        self.talk, self.view = talk, view

    def connect(self, blocks: gr.Blocks, sidebar: gr.Sidebar) -> None:
        """Attach the events; every component is there by now."""
        view, session = self.view, self.view.session
        settings = view.settings.components
        shown = [session, view.chat, view.box, view.saved, view.note, view.speech, view.browser]
        view.box.submit(self.on_text, [session, view.box, *settings], shown, **QUEUED)
        view.chat.example_select(self.on_example, [session, *settings], shown, **QUEUED)
        view.chat.retry(self.on_retry, [session, *settings], shown, **QUEUED)
        view.chat.edit(self.on_edit, [session, *settings], shown, **QUEUED)
        view.chat.undo(self.on_undo, [session], shown, **QUEUED)
        view.chat.clear(self.on_delete, [session], shown, **QUEUED)
        view.ask.click(
            self.on_voice,
            [session, view.recording, view.gallery, *settings],
            [*shown, view.heard, view.recording, view.gallery],
            **QUEUED,
        )
        for stopping in (view.box.stop, view.stop.click):
            stopping(self.on_stop, None, None, queue=False, api_visibility="private")
        view.new.click(self.on_new, [session], shown, **QUEUED)
        view.delete.click(self.on_delete, [session], shown, **QUEUED)
        view.saved.input(self.on_open, [session, view.saved], shown, **QUEUED)
        every = [*shown, *(c for c in view.translated.components if c not in shown)]
        language = view.settings.language
        language.input(self.on_language, [session, language], every, **QUEUED)
        blocks.load(self.on_load, [view.browser], every, **QUEUED)
        blocks.load(
            lambda width: gr.update(open=width > NARROW),
            [view.width],
            [sidebar],
            js="() => window.innerWidth",
            queue=False,
            api_visibility="private",
        )
        blocks.unload(self.on_stop)

    # -- the window ------------------------------------------------------------------------------

    def on_load(self, request: gr.Request, browser: object) -> Updates:
        """A page was opened: find its browser's conversations, and the one that was open."""
        known = Browser.from_storage(browser)
        language = known.language or texts.best_language(request.headers.get("accept-language"))
        session = Session(known.key or new_key(), new_conversation(), language)
        store = self.view.store(session)
        if known.open and any(id == known.open for id, _ in store.titles()):
            with errors_shown(language):
                session = session.showing(store.load(known.open))
        return {
            **self.view.of_language(session),
            self.view.note: "",
            self.view.settings.language: gr.update(
                value=language, label=texts.text("interface_language", language)
            ),
        }

    def on_language(self, session: Session, language: str) -> Updates:
        return self.view.of_language(dataclasses.replace(session, language=language))

    def on_stop(self, request: gr.Request) -> None:
        """Stop was clicked, or the page was closed."""
        self.talk.stop(window_of(request))

    # -- other conversations ---------------------------------------------------------------------

    def on_new(self, request: gr.Request, session: Session) -> Updates:
        with errors_shown(session.language):
            self.talk.must_be_idle(window_of(request))
            session = session.showing(new_conversation())
        return self.view.of_opened(session)

    def on_open(self, request: gr.Request, session: Session, id: str) -> Updates:
        with errors_shown(session.language):
            self.talk.must_be_idle(window_of(request))
            session = session.showing(SavedConversation(id))  # damaged, it can be deleted
            session = session.showing(self.view.store(session).load(id))
        return self.view.of_opened(session)

    def on_delete(self, request: gr.Request, session: Session) -> Updates:
        with errors_shown(session.language):
            self.talk.must_be_idle(window_of(request))
            self.view.store(session).delete(session.conversation.id)
            session = session.showing(new_conversation())
        return self.view.of_opened(session)

    # -- asking ----------------------------------------------------------------------------------

    def on_text(
        self, request: gr.Request, session: Session, box: dict[str, Any], *values: Any
    ) -> Iterator[Updates]:
        yield from self._ask(request, session, box["text"], box["files"], values)

    def on_example(
        self, request: gr.Request, event: gr.SelectData, session: Session, *values: Any
    ) -> Iterator[Updates]:
        examples = self.view.examples
        if not isinstance(event.index, int) or not 0 <= event.index < len(examples):
            return
        example = examples[event.index]
        yield from self._ask(request, session, example.question, [example.picture], values)

    def on_voice(
        self,
        request: gr.Request,
        session: Session,
        recording: str | None,
        gallery: list[tuple[str, str | None]] | None,
        *values: Any,
    ) -> Iterator[Updates]:
        view = self.view
        yield {view.heard: "", view.note: ""}
        heard = ""
        with errors_shown(session.language):
            self.talk.must_be_idle(window_of(request))
            if not recording:
                raise RequestError("no_recording")
            for segment in self.talk.segments(recording, settings_from(values), window_of(request)):
                heard = f"{heard} {segment.text.strip()}".strip()
                yield {view.heard: heard}
            files = [path for path, _ in gallery or ()]
            yield {view.recording: None, view.gallery: None}
            yield from self._ask(request, session, heard, files, values)

    def _ask(
        self,
        request: gr.Request,
        session: Session,
        text: str,
        files: Sequence[str],
        values: Sequence[Any],
    ) -> Iterator[Updates]:
        """A new question at the end of the conversation. One that is refused goes back into the
        box, without the upload that was the reason."""
        store, conversation = self.view.store(session), session.conversation
        with errors_shown(session.language):
            self.talk.must_be_idle(window_of(request))
            settings = settings_from(values)
            try:
                question = self.talk.question(
                    store, conversation, text, files, settings, window_of(request)
                )
            except UploadError as error:
                files = [path for path in files if Path(path) != error.path]
                raise
            yield from self._answer(request, session, conversation, question, settings)
            return
        if not conversation.messages:
            store.delete(conversation.id)  # pictures of a question that was never asked
        refused = {"text": text, "files": list(files)}
        yield {self.view.box: gr.update(value=refused, interactive=True)}

    # -- back in the conversation ----------------------------------------------------------------

    def on_retry(
        self, request: gr.Request, event: gr.RetryData, session: Session, *values: Any
    ) -> Iterator[Updates]:
        yield from self._ask_again(request, session, event.index, None, values)

    def on_edit(
        self, request: gr.Request, event: gr.EditData, session: Session, *values: Any
    ) -> Iterator[Updates]:
        yield from self._ask_again(request, session, event.index, str(event.value or ""), values)

    def _ask_again(
        self,
        request: gr.Request,
        session: Session,
        bubble: int | Sequence[int],
        new_text: str | None,
        values: Sequence[Any],
    ) -> Iterator[Updates]:
        """The question that a bubble shows or answers, in other words if they are given; what came
        after it is dropped."""
        with errors_shown(session.language):
            settings = settings_from(values)
            earlier, question = _question_at(session, bubble)
            if new_text is not None:
                question = reworded(question, new_text)
            yield from self._answer(request, session, earlier, question, settings)
            return
        yield {self.view.chat: self.view.messages(session)}  # in place of a refused edit

    def on_undo(self, request: gr.Request, event: gr.UndoData, session: Session) -> Updates:
        """Take the question back, with all after it, into the box where it was typed."""
        view = self.view
        with errors_shown(session.language):
            self.talk.must_be_idle(window_of(request))
            earlier, question = _question_at(session, event.index)
            files = [
                view.served_picture(session, part)["path"]
                for part in question.parts
                if part.kind == "image"
            ]
            if earlier.messages:
                view.store(session).save(earlier)
            taken_back = {"text": text_of(question), "files": files}
            return {
                **view.of_session(session.showing(earlier)),
                view.note: "",
                view.box: gr.update(value=taken_back, interactive=True),
            }
        return {view.chat: view.messages(session)}

    # -- the answer ------------------------------------------------------------------------------

    def _answer(
        self,
        request: gr.Request,
        session: Session,
        earlier: SavedConversation,
        question: Message,
        settings: Settings,
    ) -> Iterator[Updates]:
        view = self.view
        asked = SavedConversation(earlier.id, (*earlier.messages, question))
        first = True
        for progress in self.talk.answer(window_of(request), view.store(session), asked, settings):
            session = session.showing(progress.conversation)
            if first:
                first = False
                yield {
                    **view.of_opened(session),
                    view.box: gr.update(value=None, submit_btn=False, stop_btn=True),
                }
            elif progress.note is None:
                yield {view.chat: view.messages(session)}
            else:
                key, values = progress.note
                note = html.escape(texts.text(key, session.language, **values))
                yield {**view.of_session(session), view.note: note}
        if settings.aloud:
            yield from self._speak(session, settings.spoken or texts.DEFAULT)

    def _speak(self, session: Session, language: str) -> Iterator[Updates]:
        """The finished answer as sound. Everything else is sent once more with it, since the page
        may skip an update that another follows at once."""
        text = text_of(session.conversation.messages[-1])
        if not text:
            return
        with errors_shown(session.language):
            samples, rate = self.talk.speak(text, language)
            file = made_file(".wav")
            try:
                write_wav(file, samples, rate)
                yield {
                    **self.view.of_session(session),
                    self.view.speech: gr.update(value=str(file), visible=True),
                }
            finally:  # Gradio has copied it by now
                file.unlink(missing_ok=True)


def _question_at(
    session: Session, bubble: int | Sequence[int]
) -> tuple[SavedConversation, Message]:
    """The conversation before the question that a bubble shows or answers, and that question."""
    return before_question(session.conversation, message_at(session.conversation, bubble))
