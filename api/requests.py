"""OpenAI's chat form: the bytes of a request -> what to ask.

Everything in a request is untrusted. It is read in three steps, each of which raises `ApiError`:
`parse_json` bounds what the JSON may hold, the pydantic models check the type and the range of
every field, and `_Reader` adds up what the messages hold together. What is done with a field:

- read: the fields of `ChatBody`;
- refused, where it would change what an answer means and is not done here: `UNSUPPORTED`;
- ignored, where nothing is lost: everything else (user, metadata, store, ...).
"""

from __future__ import annotations

import base64
import binascii
import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from io import BytesIO
from typing import Annotated, Any, Literal

from PIL import Image
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
from assistant.sampling import Sampling
from data.dataset import Message, Part
from data.images import FORMATS, MAX_PIXELS
from data.stream import kind_of

MIB = 2**20
MOST_VALUES = 1_000_000  # in one request's JSON; each takes some 70 bytes once it is read
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
ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
DATA_URL = re.compile(r"data:([\w.+-]+/[\w.+-]+)?((?:;[\w.+-]+=[\w.+-]+)*);base64,", re.ASCII)


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


# -- the form: what type and what range each field has --------------------------------------------
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
    image_url: ImageURL


class InputAudio(Form):
    format: Literal["wav", "mp3"] = Field(description="must be one of wav, mp3")
    data: str = Field(description="send base64")


class AudioPart(Form):
    input_audio: InputAudio


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
        description=f"must be one of {', '.join(ROLES)}"
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
    stream_options: StreamOptions | None = None
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


FORMS = (TextPart, ImageURL, InputAudio, ChatMessage, StreamOptions, ChatBody)
REASONS = {name: f.description for form in FORMS for name, f in form.model_fields.items()}
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
    if kind == "string_unicode":
        return bad(where, "is not valid Unicode; send whole characters")
    if kind == "missing" and where == "messages":
        return bad(where, "is missing; send a list", "missing_required_parameter")
    if kind == "model_type":
        reason = f"send {OBJECTS.get(fault['ctx']['class_name'], 'an object')}"
    else:
        reason = REASONS[name] or "send an object"
    if not reason.startswith("must"):
        reason = f"is {kind_of(None if kind == 'missing' else found)}; {reason}"
    return bad(where, reason)


# -- what is asked --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sound:
    """Speech that stands in a message, to be written down; `where` names it in errors."""

    where: str
    data: bytes = field(repr=False)


@dataclass(frozen=True)
class Turn:
    role: str
    parts: tuple[Part | Sound, ...]


@dataclass(frozen=True)
class ChatRequest:
    """A request that is sound in itself; picture parts name one of `pictures`."""

    turns: tuple[Turn, ...]
    pictures: dict[str, bytes] = field(repr=False)
    sampling: Sampling
    max_new_tokens: int
    seed: int | None
    stop: tuple[str, ...]
    stream: bool
    include_usage: bool

    @property
    def sounds(self) -> list[Sound]:
        return [part for turn in self.turns for part in turn.parts if isinstance(part, Sound)]

    def conversation(self, write_down: Callable[[Sound], str]) -> tuple[Message, ...]:
        """The messages, with speech written down. Raises what `write_down` raises."""
        messages = []
        for turn in self.turns:
            parts = tuple(
                Part("text", write_down(part)) if isinstance(part, Sound) else part
                for part in turn.parts
            )
            messages.append(Message(turn.role, parts))
        return tuple(messages)


def parse_request(body: bytes, model: str, limits: Limits = Limits()) -> ChatRequest:
    """Read the body of a chat completion. Raises `ApiError` of status 400, 404 or 413."""
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
        given = ChatBody.model_validate(fields, context=limits)
    except ValidationError as error:
        raise as_refusal(error) from None
    if given.model is not None and given.model != model:
        raise ApiError(404, f"model: there is only {model!r} here", "model_not_found", "model")
    if given.stream_options is not None and not given.stream:
        raise bad("stream_options", "is only for streams; set stream to true")
    reader = _Reader(limits)
    asked = given.max_completion_tokens or given.max_tokens or limits.default_new_tokens
    # OpenAI's top_p of 0 keeps the likeliest token alone, as every share under its own does.
    sampling = Sampling(
        given.temperature, max(given.top_p, 1e-9), given.top_k, given.repetition_penalty
    )
    return ChatRequest(
        reader.turns(given.messages),
        reader.pictures,
        sampling,
        min(asked, limits.new_tokens),
        None if given.seed is None else given.seed % 2**64,  # negative ones count from the end
        tuple(given.stop),
        given.stream,
        given.stream_options is not None and given.stream_options.include_usage,
    )


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


class _Reader:
    """Reads the messages of one request, counting what they hold together."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.pictures: dict[str, bytes] = {}
        self.pixels = self.sounds = self.characters = 0

    def turns(self, messages: list[ChatMessage]) -> tuple[Turn, ...]:
        """Neighbours of one role become one turn."""
        turns: list[Turn] = []
        for place, message in enumerate(messages):
            where, role = f"messages[{place}]", ROLES[message.role]
            if role == "system" and turns and turns[-1].role != "system":
                raise bad(f"{where}.role", "a system message comes before all others; move it")
            parts = self._parts(message.content, role, f"{where}.content")
            if turns and turns[-1].role == role:
                parts = turns.pop().parts + parts
            turns.append(Turn(role, parts))
        if turns[-1].role != "user":
            raise bad("messages", "the last one is not the user's; end with a question")
        if not any(
            not isinstance(part, Part) or part.kind == "image" or part.value.strip()
            for part in turns[-1].parts
        ):
            raise bad("messages", "the last one is empty; ask something")
        return tuple(turns)

    def _parts(
        self, content: str | list[ContentPart], role: str, where: str
    ) -> tuple[Part | Sound, ...]:
        if isinstance(content, str):
            return (self._text(content, where),)
        return tuple(
            self._part(part, role, f"{where}[{place}]") for place, part in enumerate(content)
        )

    def _part(self, part: ContentPart, role: str, where: str) -> Part | Sound:
        if isinstance(part, TextPart):
            return self._text(part.text, f"{where}.text")
        if role != "user":
            raise bad(where, "pictures and speech stand in the user's messages only; move it")
        if isinstance(part, ImagePart):
            return self._picture(part.image_url.url, f"{where}.image_url")
        return self._sound(part.input_audio.data, f"{where}.input_audio")

    def _text(self, text: str, where: str) -> Part:
        try:
            text.encode()
        except UnicodeEncodeError:  # JSON can spell half a character
            raise bad(where, "is not valid Unicode; send whole characters") from None
        self.characters += len(text)
        if self.characters > self.limits.characters:
            size, limit = f"{self.characters:,} characters", f"{self.limits.characters:,}"
            raise too_large(where, size, limit, "shorten the conversation")
        return Part("text", text)

    def _picture(self, url: str, where: str) -> Part:
        name = f"{where}.url"
        opening = DATA_URL.match(url[:1000])
        if opening is None or not (opening[1] or "").lower().startswith("image/"):
            reason = (
                "only data:image/...;base64 URLs are read, no addresses and no paths;"
                " send the picture itself"
            )
            raise bad(name, reason, "invalid_image_url")
        if len(self.pictures) == self.limits.pictures:
            raise too_large(where, "one more picture", f"{self.limits.pictures}", "send fewer")
        data = decode_base64(url[opening.end() :], name, self.limits.picture_bytes)
        self.pixels += pixels_claimed(data)
        if self.pixels > self.limits.pixels:
            size, limit = f"{self.pixels:,} pixels in all", f"{self.limits.pixels:,}"
            raise too_large(where, size, limit, "send smaller pictures")
        self.pictures[name] = data
        return Part("image", name)

    def _sound(self, data: str, where: str) -> Sound:
        self.sounds += 1
        if self.sounds > self.limits.sounds:
            raise too_large(where, "one more recording", f"{self.limits.sounds}", "send fewer")
        return Sound(where, decode_base64(data, f"{where}.data", self.limits.audio_bytes))


def decode_base64(text: str, where: str, max_bytes: int) -> bytes:
    """Standard base64 of at most `max_bytes` bytes, strictly."""
    size = len(text) // 4 * 3 - text[-2:].count("=")
    if size > max_bytes:
        raise too_large(where, f"{size:,} bytes", f"{max_bytes:,}", "send a smaller copy")
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        reason = f"is not base64 ({error}); encode the file again"
        raise bad(where, reason, "invalid_base64") from None


def pixels_claimed(data: bytes) -> int:
    """Width times height by a picture's header; 0 for what is not a picture, which is refused when
    it is decoded."""
    try:
        with Image.open(BytesIO(data), formats=FORMATS) as image:
            return image.width * image.height
    except Image.DecompressionBombError:
        return 2**62
    except Exception:  # untrusted bytes make PIL raise anything: see data/images.py
        return 0
