"""What the tabs of the web app share: who is asking, in which language, and errors as one line."""

from __future__ import annotations

import html
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import gradio as gr

from errors import PhiSightError
from web import texts
from web.conversations import ID, KEY
from web.talk import Unready


@dataclass(frozen=True)
class Browser:
    """What a browser remembers: its key, the conversation that is open, the interface language."""

    key: str | None = None
    open: str | None = None
    language: str | None = None

    @classmethod
    def from_storage(cls, value: object) -> Browser:
        """From local storage, which anybody may have written: what is not sound is forgotten."""
        found = value if isinstance(value, dict) else {}

        def sound(name: str, good: Callable[[str], object]) -> str | None:
            given = found.get(name)
            return given if isinstance(given, str) and good(given) else None

        return cls(
            sound("key", KEY.match),
            sound("open", ID.match),
            sound("language", texts.LANGUAGES.__contains__),
        )

    def to_storage(self) -> dict[str, str | None]:
        return {"key": self.key, "open": self.open, "language": self.language}


@dataclass
class Translated:
    """Components and which of their fields show which text; `updates` gives them in a language."""

    rows: list[tuple[Any, dict[str, Callable[[str], Any]]]] = field(default_factory=list)

    def __call__(self, component: Any, **fields: str | Callable[[str], Any]) -> Any:
        """Register `component`: each field is a key of the table, or a function of the language."""
        self.rows.append(
            (
                component,
                {
                    name: value
                    if callable(value)
                    else (lambda language, key=value: texts.text(key, language))
                    for name, value in fields.items()
                },
            )
        )
        return component

    @property
    def components(self) -> list[Any]:
        return [component for component, _ in self.rows]

    def updates(self, language: str) -> list[Any]:
        """One update for each of `components`."""
        return [
            gr.update(**{name: make(language) for name, make in fields.items()})
            for _, fields in self.rows
        ]


@contextmanager
def told(language: str) -> Iterator[None]:
    """A PhiSightError inside becomes one line that the page shows; nothing else is caught."""
    try:
        yield
    except Unready as error:
        gr.Info(texts.text(str(error), language), title="")
    except PhiSightError as error:
        warn(error)


def warn(error: PhiSightError) -> None:
    """Show one line. Gradio takes it for HTML, and names of files are strangers' words."""
    gr.Warning(html.escape(" ".join(str(error).split())), title="")
