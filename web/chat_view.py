"""What the chat tab and the sidebar consist of, and how they show an open conversation."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import gradio as gr
from gradio.processing_utils import save_file_to_cache
from gradio.utils import get_upload_folder

from data.dataset import Part
from data.examples import Example
from web import texts
from web.conversation import SavedConversation
from web.conversation_store import ConversationStore
from web.page import Translated, Updates
from web.session import Browser, Session
from web.settings_panel import SettingsPanel

STORAGE_KEY = "phisight"
UPLOADS = ["image", "audio"]


class ChatView:
    """Builds the components inside the open `gr.Blocks`, and gives the updates that show a session.

    `root` is the folder of all saved conversations.
    """

    def __init__(self, root: Path, examples: Sequence[Example], translated: Translated) -> None:
        self.root, self.examples, self.translated = root, list(examples), translated

    # -- the components --------------------------------------------------------------------------

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
        self.settings = SettingsPanel(t)

    def build_main(self) -> None:
        t = self.translated
        self._build_conversation()
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

    def _build_conversation(self) -> None:
        self.chat = self.translated(
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
                    {"text": e.question, "display_text": e.question, "files": [e.picture]}
                    for e in self.examples
                ],
            ),
            placeholder=lambda language: f"## PhiSight\n{texts.text('welcome', language)}",
        )
        for example in self.chat.examples or ():
            for file in example["files"]:
                if not isinstance(file, str):  # Gradio's copy: kept as long as the app runs
                    self.chat.keep_in_cache.add(file["path"])

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

    # -- what they show --------------------------------------------------------------------------

    def store(self, session: Session) -> ConversationStore:
        """The saved conversations of the session's browser."""
        return ConversationStore(self.root, session.key)

    def of_session(self, session: Session) -> Updates:
        """All that follows from the open conversation. Writing is possible again."""
        titles = self.store(session).titles()
        names = {
            "": texts.text("untitled", session.language),
            "?": texts.text("unreadable", session.language),
        }
        listed = [(names.get(title, title), id) for id, title in titles]
        open_id = session.conversation.id
        is_saved = any(id == open_id for id, _ in titles)
        return {
            self.session: session,
            self.chat: self.messages(session),
            self.saved: gr.update(choices=listed, value=open_id if is_saved else None),
            self.browser: Browser(session.key, open_id, session.language).to_storage(),
            self.box: gr.update(interactive=True, submit_btn=True, stop_btn=False),
        }

    def of_opened(self, session: Session) -> Updates:
        """`of_session` for another conversation: the note and the sound of the last answer go."""
        return {**self.of_session(session), self.note: "", self.speech: silence()}

    def of_language(self, session: Session) -> Updates:
        """`of_session`, and all texts in the session's language."""
        shown = self.of_session(session)
        for component, update in zip(
            self.translated.components, self.translated.updates(session.language), strict=True
        ):
            more = shown.get(component, {})
            more = more if isinstance(more, dict) else {"value": more}
            shown[component] = {**more, **update}
        return shown

    def messages(self, session: Session) -> list[dict[str, Any]]:
        """The conversation as the chat component takes it."""
        conversation = session.conversation
        shown = []
        for index, parts in bubbles(conversation):
            content = [
                self.served_picture(session, part) if part.kind == "image" else part.value
                for part in parts
            ]
            shown.append(
                {
                    "role": conversation.messages[index].role,
                    "content": content or [texts.text("no_answer", session.language)],
                }
            )
        return shown

    def served_picture(self, session: Session, part: Part) -> dict[str, str]:
        """The file of a picture part, copied into the folder that Gradio serves files from."""
        kept = self.store(session).picture(session.conversation.id, part.value)
        return {"path": save_file_to_cache(kept, get_upload_folder())}


def silence() -> dict[str, Any]:
    """Hides the spoken answer."""
    return gr.update(value=None, visible=False)


def bubbles(conversation: SavedConversation) -> Iterator[tuple[int, tuple[Part, ...]]]:
    """What is shown in one bubble each: the number of the message, and some of its parts.

    Pictures have a bubble to themselves: Gradio's page can edit no text that shares one with them.
    """
    for index, message in enumerate(conversation.messages):
        pictures = tuple(part for part in message.parts if part.kind == "image")
        words = tuple(part for part in message.parts if part.kind == "text")
        if pictures:
            yield index, pictures
        if words or not pictures:
            yield index, words


def message_at(conversation: SavedConversation, bubble: int | Sequence[int]) -> int:
    """The number of the message that a bubble shows, -1 for no message. Gradio names a bubble by
    its place, or by its place and that of a part in it."""
    place = bubble if isinstance(bubble, int) else bubble[0]
    numbers = [number for number, _ in bubbles(conversation)]
    return numbers[place] if 0 <= place < len(numbers) else -1
