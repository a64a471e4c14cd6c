"""The form of `/v1/chat/completions`, as programs send it and as they send back what they got."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Discriminator, FailFast, Field, Tag, model_validator

from api.forms import Form, NotDone, Question, Unsupported, few
from api.pieces import SOUND_FORMATS, Piece

UNSUPPORTED: Unsupported = {
    "n": (1,),
    "best_of": (1,),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "echo": (False,),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "logit_bias": ({},),
    "min_p": (0,),
    "tools": ([],),
    "functions": ([],),
    "tool_choice": ("none", "auto"),
    "function_call": ("none", "auto"),
    "modalities": (["text"],),
    "audio": (),
    "web_search_options": (),
}


class TextPart(Form):
    type: Literal["text"] = Field(description="must be text, image_url or input_audio")
    text: str = Field(description="send a text")

    def piece(self, where: str) -> Piece:
        return Piece("text", self.text, where, f"{where}.text")


class RefusalPart(Form):
    refusal: str = Field(description="send a text")

    def piece(self, where: str) -> Piece:
        return Piece("text", self.refusal, where, f"{where}.refusal")


class ImageURL(Form):
    url: str = Field(description="send a data: URL")


class ImagePart(Form):
    image_url: ImageURL = Field(description="send an object")

    def piece(self, where: str) -> Piece:
        return Piece("image", self.image_url.url, where, f"{where}.image_url", ".url")


class InputAudio(Form):
    format: str = Field(
        pattern=f"(?i)^({'|'.join(SOUND_FORMATS)})$",
        description=f"must be one of {', '.join(SOUND_FORMATS)}",
    )
    data: str = Field(description="send base64")


class AudioPart(Form):
    input_audio: InputAudio = Field(description="send an object")

    def piece(self, where: str) -> Piece:
        return Piece("sound", self.input_audio.data, where, f"{where}.input_audio", ".data")


def tag_of_part(*kinds: str) -> Discriminator:
    """A part is of the one of these types that it names, else a text."""

    def tag(value: object) -> str:
        kind = value.get("type") if isinstance(value, dict) else None
        return f"<{kind}>" if kind in kinds else "<text>"

    return Discriminator(tag)


ContentPart = Annotated[
    Annotated[TextPart, Tag("<text>")]
    | Annotated[RefusalPart, Tag("<refusal>")]
    | Annotated[ImagePart, Tag("<image_url>")]
    | Annotated[AudioPart, Tag("<input_audio>")],
    tag_of_part("image_url", "input_audio", "refusal"),
]
Content = Annotated[
    Annotated[str, Tag("<whole>")]
    | Annotated[list[ContentPart], few(" parts", "send fewer"), Tag("<parts>")],
    Discriminator(lambda value: "<whole>" if isinstance(value, str) else "<parts>"),
]


def with_content() -> Any:
    """A validator of a message: an assistant's may be without content, as one that refused or that
    called a tool has it."""

    def check(value: object) -> object:
        if not isinstance(value, dict) or value.get("role") != "assistant":
            return value
        return value | {"content": []} if value.get("content") is None else value

    return model_validator(mode="before")(check)


class ChatMessage(Form):
    """A turn, as a program writes it or as it got it."""

    role: Literal["system", "developer", "user", "assistant"] = Field(
        description="must be one of system, developer, user, assistant"
    )
    tool_calls: NotDone = None
    function_call: NotDone = None
    audio: NotDone = None
    content: Content = Field(description="send a text or a list of parts")
    refusal: str | None = Field(None, description="send a text")

    _with_content = with_content()

    def pieces(self, where: str) -> Iterator[Piece]:
        """What was said, in order; `where` names the turn in errors."""
        if isinstance(self.content, str):
            yield Piece("text", self.content, f"{where}.content", f"{where}.content")
        else:
            for place, part in enumerate(self.content):
                yield part.piece(f"{where}.content[{place}]")
        if self.refusal:
            yield Piece("text", self.refusal, where, f"{where}.refusal")


class StreamOptions(Form):
    include_usage: bool = Field(False, description="send true or false")


class JsonSchema(Form):
    # pydantic's own models have a method named `schema`.
    shape: dict[str, Any] = Field({}, alias="schema", description="send a JSON schema")


class ResponseFormat(Form):
    type: Literal["text", "json_object", "json_schema"] = Field(
        description="must be one of text, json_object, json_schema"
    )
    json_schema: JsonSchema | None = Field(None, description="send an object")


def as_list(value: object) -> object:
    return [value] if isinstance(value, str) else value


class ChatBody(Question):
    """The fields of a chat completion that are read."""

    messages: Annotated[list[ChatMessage], FailFast(), few("", "leave out the oldest")] = Field(
        min_length=1, description="send a list of messages"
    )
    stream_options: StreamOptions | None = Field(None, description="send an object")
    response_format: ResponseFormat | None = Field(None, description="send an object")
    max_tokens: int | None = Field(None, ge=1, description="must be a whole number of at least 1")
    max_completion_tokens: int | None = Field(
        None, ge=1, description="must be a whole number of at least 1"
    )
    stop: Annotated[
        list[Annotated[str, Field(min_length=1, max_length=1000)]], BeforeValidator(as_list)
    ] = Field(
        [],
        max_length=4,
        description="must be a text or up to 4 of them, none empty or over 1,000 long",
    )
