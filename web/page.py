"""What the tabs of the web app share: how events are attached, texts in the reader's language, and
errors as one line."""

from __future__ import annotations

import html
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias, TypedDict, TypeVar

import gradio as gr
from gradio.blocks import Block

from errors import PhiSightError
from web import texts
from web.errors import RequestError

Updates: TypeAlias = dict[Block, Any]
"""What an event changes: components, each with its new value or a `gr.update`."""

AnyBlock = TypeVar("AnyBlock", bound=Block)
Text = str | Callable[[str], str | list[str] | list[tuple[str, str]]]
"""What a field of a component shows: a key of web/texts.py, or a function of the language."""


class Page(gr.Blocks):
    """The whole page, and what is done for it outside Gradio."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.on_left: list[Callable[[str], None]] = []
        """called with the name of a window that has gone"""

    def left(self, window: str) -> None:
        for call in self.on_left:
            call(window)


class EventOptions(TypedDict):
    """Keywords of Gradio's event listeners."""

    concurrency_limit: None
    show_progress: Literal["hidden"]
    api_visibility: Literal["private"]


QUEUED: EventOptions = {
    "concurrency_limit": None,
    "show_progress": "hidden",
    "api_visibility": "private",
}


def window_of(request: gr.Request) -> str:
    """Names the window that an event came from, as long as it is open."""
    return request.session_hash or ""


@dataclass
class Translated:
    """Components and which of their fields show which text; `updates` gives them in a language."""

    rows: list[tuple[Block, dict[str, Text]]] = field(default_factory=list)

    def __call__(self, component: AnyBlock, **fields: Text) -> AnyBlock:
        """Register `component`, and return it."""
        self.rows.append((component, fields))
        return component

    @property
    def components(self) -> list[Block]:
        return [component for component, _ in self.rows]

    def updates(self, language: str) -> list[dict[str, Any]]:
        """One update for each of `components`."""
        return [
            gr.update(**{name: in_language(text, language) for name, text in fields.items()})
            for _, fields in self.rows
        ]


def in_language(text: Text, language: str) -> Any:
    """The value that a field of a component gets: a text, or what its function returns."""
    return text(language) if callable(text) else texts.text(text, language)


@contextmanager
def errors_shown(language: str) -> Iterator[None]:
    """A PhiSightError inside becomes one line that the page shows; nothing else is caught."""
    try:
        yield
    except RequestError as error:
        gr.Info(texts.text(str(error), language), title="")
    except PhiSightError as error:
        # Gradio takes the line for HTML, and a file's name in it is untrusted.
        gr.Warning(html.escape(" ".join(str(error).split())), title="")
