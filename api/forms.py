"""OpenAI's chat form as pydantic models: the type and the range of every field of a request.

What is done with a field:

- read: the fields of `ChatBody`;
- refused, where it would change what an answer means and is not done here: `UNSUPPORTED`;
- ignored, where nothing is lost: everything else (user, metadata, store, ...).
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    FailFast,
    Field,
    Tag,
    ValidationError,
    ValidationInfo,
    model_validator,
)
from pydantic_core import PydanticCustomError

from api.errors import ApiError, bad, too_large
from data.images import MAX_PIXELS
from data.stream import kind_of

MIB = 2**20
MOST_VALUES = 1_000_000  # in one request's JSON; each takes some 70 bytes once it is read
Role = Literal["user", "assistant", "system"]
# Fields that change what an answer means, with the values that ask for nothing.
UNSUPPORTED: dict[str, tuple[object, ...]] = {
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
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "audio": (),
    "web_search_options": (),
}


@dataclass(frozen=True)
class Limits:
    """How much one request may ask for. Bytes are those of the decoded file."""

    body_bytes: int = 32 * MIB
    picture_bytes: int = 20 * MIB
    audio_bytes: int = 20 * MIB
    pictures: int = 16
    pixels: int = MAX_PIXELS
    """of all pictures of a request together"""
    sounds: int = 4
    characters: int = 1_000_000
    messages: int = 1000
    """and parts of one message"""
    new_tokens: int = 1024
    """an answer is never longer; one that asks for more ends with "length" """
    default_new_tokens: int = 256
    body_seconds: float = 60.0
    """in which a request has to have arrived"""


# -- the models ------------------------------------------------------------------------------
#
# A description says what the client is told when the field is not right: "must be ...", or what to
# send. Where a field has one of several forms, its tag stands between < and >.


class Form(BaseModel):
    """JSON types are not converted; null is as good as absent; unknown fields are ignored."""

    model_config = ConfigDict(strict=True, extra="ignore")

    @model_validator(mode="before")
    @classmethod
    def without_nulls(cls, value: object) -> object:
        if not isinstance(value, dict):
            return value
        return {name: inner for name, inner in value.items() if inner is not None}


def unsupported(value: object) -> object:
    if value:
        raise PydanticCustomError("unsupported_parameter", "is not supported here")
    return value


def few(what: str, remedy: str) -> BeforeValidator:
    """Refuses a list that is too long before what it holds is looked at."""

    def check(value: object, info: ValidationInfo) -> object:
        assert isinstance(info.context, Limits)
        limit = info.context.messages
        if isinstance(value, list) and len(value) > limit:
            size = f"{len(value):,}{what}"
            reason = f"{size} is over the limit of {limit:,}; {remedy}"
            raise PydanticCustomError("too_large", reason)
        return value

    return BeforeValidator(check)


class TextPart(Form):
    type: Literal["text"] = Field(description="must be text, image_url or input_audio")
    text: str = Field(description="send a text")


class ImageURL(Form):
    url: str = Field(description="send a data: URL")


class ImagePart(Form):
    image_url: ImageURL = Field(description="send an object")


class InputAudio(Form):
    format: Literal["wav", "mp3"] = Field(description="must be one of wav, mp3")
    data: str = Field(description="send base64")


class AudioPart(Form):
    input_audio: InputAudio = Field(description="send an object")


def tag_of_part(value: object) -> str:
    kind = value.get("type") if isinstance(value, dict) else None
    return f"<{kind}>" if kind in ("image_url", "input_audio") else "<text>"


ContentPart = Annotated[
    Annotated[TextPart, Tag("<text>")]
    | Annotated[ImagePart, Tag("<image_url>")]
    | Annotated[AudioPart, Tag("<input_audio>")],
    Discriminator(tag_of_part),
]
Content = Annotated[
    Annotated[str, Tag("<whole>")]
    | Annotated[list[ContentPart], few(" parts", "send fewer"), Tag("<parts>")],
    Discriminator(lambda value: "<whole>" if isinstance(value, str) else "<parts>"),
]
Unsupported = Annotated[Any, AfterValidator(unsupported)]


class ChatMessage(Form):
    role: Literal["system", "developer", "user", "assistant"] = Field(
        description="must be one of system, developer, user, assistant"
    )
    tool_calls: Unsupported = None
    function_call: Unsupported = None
    audio: Unsupported = None
    content: Content = Field(description="send a text or a list of parts")


class StreamOptions(Form):
    include_usage: bool = Field(False, description="send true or false")


def as_list(value: object) -> object:
    return [value] if isinstance(value, str) else value


class ChatBody(Form):
    """The fields of a chat completion that are read. Greedy where no temperature is given: an
    answer about a picture is not to be drawn by lot."""

    model: str | None = Field(None, description="send a text")
    messages: Annotated[list[ChatMessage], FailFast(), few("", "leave out the oldest")] = Field(
        min_length=1, description="send a list of messages"
    )
    stream: bool = Field(False, description="send true or false")
    stream_options: StreamOptions | None = Field(None, description="send an object")
    temperature: float = Field(0.0, ge=0, le=2, description="must be a number from 0 to 2")
    top_p: float = Field(1.0, ge=0, le=1, description="must be a number from 0 to 1")
    top_k: int = Field(0, ge=0, le=2**31, description=f"must be a whole number from 0 to {2**31}")
    repetition_penalty: float = Field(
        1.0, ge=0.1, le=10, description="must be a number from 0.1 to 10"
    )
    max_tokens: int | None = Field(None, ge=1, description="must be a whole number of at least 1")
    max_completion_tokens: int | None = Field(
        None, ge=1, description="must be a whole number of at least 1"
    )
    seed: int | None = Field(
        None,
        ge=-(2**63),
        le=2**64 - 1,
        description=f"must be a whole number from {-(2**63)} to {2**64 - 1}",
    )
    stop: Annotated[
        list[Annotated[str, Field(min_length=1, max_length=1000)]], BeforeValidator(as_list)
    ] = Field(
        [],
        max_length=4,
        description="must be a text or up to 4 of them, none empty or over 1,000 long",
    )


REASONS = {
    name: field.description or ""
    for form in Form.__subclasses__()
    for name, field in form.model_fields.items()
}
OBJECTS = {"ChatMessage": "an object with role and content", "TextPart": "an object with a type"}


def as_refusal(error: ValidationError) -> ApiError:
    """The first fault that pydantic found, named as the client wrote it."""
    fault = error.errors(include_url=False)[0]
    kind, found = fault["type"], fault["input"]
    first, *rest = fault["loc"]
    where = name = str(first)
    for step in rest:
        if isinstance(step, str) and not step.startswith("<"):
            where, name = f"{where}.{step}", step
        elif isinstance(step, int) and first == "messages":
            where += f"[{step}]"
    if kind == "too_large":
        return ApiError(413, f"{where}: {fault['msg']}", kind, where)
    if kind == "unsupported_parameter":
        return bad(where, fault["msg"], kind)
    if kind == "string_unicode" and where == "stop":
        return bad(where, "is not valid Unicode; send whole characters")
    if kind == "missing" and where == "messages":
        return bad(where, "is missing; send a list", "missing_required_parameter")
    if kind == "model_type":
        reason = f"send {OBJECTS.get(fault['ctx']['class_name'], 'an object')}"
    else:
        reason = REASONS[name]
    if not reason.startswith("must"):
        reason = f"is {kind_of(None if kind == 'missing' else found)}; {reason}"
    return bad(where, reason)


# -- a body -------------------------------------------------------------------------------------


def parse_body(body: bytes, limits: Limits) -> ChatBody:
    """The checked fields of a chat completion. Raises `ApiError` of status 400 or 413."""
    fields = parse_json(body)
    if not isinstance(fields, dict):
        raise bad(None, f"the body is {kind_of(fields)}; send a JSON object", "invalid_json")
    for name, harmless in UNSUPPORTED.items():
        value = fields.get(name)
        if value is not None and not any(
            value == one and isinstance(value, bool) == isinstance(one, bool) for one in harmless
        ):
            raise bad(name, "is not supported here; leave it out", "unsupported_parameter")
    try:
        return ChatBody.model_validate(fields, context=limits)
    except ValidationError as error:
        raise as_refusal(error) from None


def parse_json(body: bytes) -> object:
    """JSON without what JSON does not have: NaN, infinities, other encodings than UTF-8.

    Raises `ApiError` of status 400 or 413.
    """
    # Counted before it is read: "[],[],[]" takes twenty times its length in memory.
    if sum(map(body.count, (b",", b"[", b"{"))) > MOST_VALUES:
        raise too_large(None, "its number of values", f"{MOST_VALUES:,}", "send less")

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is not JSON")

    try:
        return json.loads(body.decode("utf-8"), parse_constant=refuse)
    except RecursionError:
        raise bad(None, "the body is nested too deeply; send plain JSON", "invalid_json") from None
    except ValueError as error:  # of the JSON, of its encoding, and of ints of 5,000 digits
        reason = f"the body is not JSON ({error}); send UTF-8 JSON"
        raise bad(None, reason, "invalid_json") from None
