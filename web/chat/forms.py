"""What the page sends to the routes of the chat, with the bounds of every field."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from web.chat.conversation import MAX_NAME, MAX_NODES, MAX_PICTURES, MAX_SYSTEM, MAX_TEXT
from web.errors import RequestError
from web.settings import SettingsForm

MAX_COUNT = 2**53  # what a browser's numbers hold


class Form(BaseModel):
    model_config = ConfigDict(extra="forbid")


class VersionForm(Form):
    """`version`: of the conversation that the page has seen; 0 for one that is not there yet."""

    version: int = Field(ge=0, le=MAX_COUNT)


class NodeForm(VersionForm):
    node: int = Field(ge=1, le=MAX_COUNT)


class DropForm(VersionForm):
    turns: int = Field(ge=0, le=MAX_NODES)


class DeleteForm(Form):
    version: int | None = Field(None, ge=0, le=MAX_COUNT)


class ChangeForm(VersionForm):
    title: str | None = Field(None, max_length=MAX_NAME)
    pinned: bool | None = None
    system: str | None = Field(None, max_length=MAX_SYSTEM)


class QuestionForm(VersionForm):
    text: str = ""
    uploads: list[Annotated[str, Field(max_length=64)]] = Field([], max_length=MAX_PICTURES)
    settings: SettingsForm = SettingsForm()

    @property
    def checked_text(self) -> str:
        """Raises `RequestError` for a text that is too long."""
        if len(self.text) > MAX_TEXT:
            raise RequestError("question_too_long", most=MAX_TEXT)
        return self.text


class AskForm(QuestionForm):
    example: str | None = Field(None, max_length=64)
    system: str | None = Field(None, max_length=MAX_SYSTEM)


class EditForm(QuestionForm):
    node: int = Field(ge=1, le=MAX_COUNT)


class RegenerateForm(NodeForm):
    settings: SettingsForm = SettingsForm()
