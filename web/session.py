"""Who is asking: what a browser remembers between visits, and what is open in one window."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

from web import texts
from web.conversation import ID, SavedConversation
from web.conversation_store import KEY


@dataclass(frozen=True)
class Session:
    """One window: the key of its browser, the open conversation, the interface language."""

    key: str
    conversation: SavedConversation
    language: str

    def showing(self, conversation: SavedConversation) -> Session:
        """The same window with another conversation, or with another state of this one."""
        return dataclasses.replace(self, conversation=conversation)


@dataclass(frozen=True)
class Browser:
    """What a browser remembers: its key, the conversation that is open, the interface language."""

    key: str | None = None
    open: str | None = None
    language: str | None = None

    @classmethod
    def from_storage(cls, value: object) -> Browser:
        """From local storage, which anybody may have written: what is not valid is forgotten."""
        stored = value if isinstance(value, dict) else {}

        def valid(name: str, accepts: Callable[[str], object]) -> str | None:
            given = stored.get(name)
            return given if isinstance(given, str) and accepts(given) else None

        return cls(
            valid("key", KEY.match),
            valid("open", ID.match),
            valid("language", texts.LANGUAGES.__contains__),
        )

    def to_storage(self) -> dict[str, str | None]:
        return {"key": self.key, "open": self.open, "language": self.language}
