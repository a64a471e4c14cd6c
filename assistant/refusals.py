"""Why a question is not answered, for whoever has to tell it; loads nothing of the model."""

from __future__ import annotations

from errors import PhiSightError


class Blocked(PhiSightError):
    """The content filter does not let a question pass."""


class Busy(PhiSightError):
    """More answers wait than the queue takes."""


class Closed(PhiSightError):
    """The model has been closed, as one is whose place another has taken."""


class ContextExceeded(PhiSightError):
    """A conversation leaves no room for an answer."""

    def __init__(self, tokens: int, context: int, pictures: bool) -> None:
        self.tokens, self.context = tokens, context
        self.remedy = "shorten it or send fewer pictures" if pictures else "shorten it"
        super().__init__(f"conversation: {tokens} tokens, the model reads {context}; {self.remedy}")
