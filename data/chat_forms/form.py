"""What a chat looks like to one family of models."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ChatForm:
    """The marks and texts that stand around what is said, as the family's own template has them.

    A mark is one token that no text can spell. A conversation is `begin`, its messages, and in
    training `end`. A message is its opening, what is said, `closing` and `after`. What is said is
    stripped, so an opening may end with newlines: no tokenizer of these families joins a newline
    with the text behind it.
    """

    name: str
    models: str
    """whose form it is, as a person calls them"""
    marks: tuple[str, ...]
    """tokens that a tokenizer of this form has; together they tell it from every other form"""
    opening: str
    """what opens a message; "{role}" stands for the role's name"""
    closing: str
    """the mark that closes a message: the last token of an answer that is learnt"""
    padding: str
    stops: tuple[str, ...]
    """tokens at which an answer ends"""
    slots: tuple[str, ...]
    """Tokens of which the first that a tokenizer has takes the places of pictures. The projected
    features stand there and the token's embedding is never read, so any token does that the
    tokenizer has already and no chat writes: the vocabulary stays as it is."""
    after: str = ""
    """what follows the closing mark, which is not learnt"""
    begin: str = ""
    end: str = ""
    """what follows the last message in training alone"""
    system_lead: str = ""
    """what every system message begins with"""
    answer_lead: str = ""
    """what every answer begins with, past ones and the one that is asked for; not learnt"""
    default_system: str | None = None
    """the system message of a conversation that has none; None where nothing is added"""

    def opening_of(self, role: str) -> str:
        """The text that opens a message of `role`; a model that is to answer continues that of
        "assistant"."""
        leads = {"system": self.system_lead, "assistant": self.answer_lead}
        return self.opening.replace("{role}", role) + leads.get(role, "")

    def before(self, role: str) -> str:
        """The text before the first message of a conversation, which is one of `role`."""
        if role == "system" or self.default_system is None:
            return self.begin
        return self.begin + self.message("system", self.default_system)

    def message(self, role: str, content: str) -> str:
        """A whole message as text; `content` is stripped already."""
        return self.opening_of(role) + content + self.closing + self.after
