"""The form of `/v1/responses`, as far as it is text, pictures and recordings -> what to ask."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Discriminator, FailFast, Field, Tag
from pydantic_core import PydanticCustomError

from api.chat_form import AudioPart, tag_of_part, with_content
from api.errors import bad
from api.forms import Form, Limits, NotDone, Question, Unsupported, few, parse_form
from api.json_output import ANY_OBJECT, Schema
from api.pieces import Piece, Reader, Said
from api.requests import ChatRequest, check_model, length_of, sampling_of, seed_of

UNSUPPORTED: Unsupported = {
    "previous_response_id": (),
    "conversation": (),
    "prompt": (),
    "context_management": ([],),
    "background": (False,),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "truncation": ("disabled",),
    "top_logprobs": (0,),
    "modalities": (["text"],),
}
LOGPROBS = "message.output_text.logprobs"


class InputText(Form):
    type: Literal["input_text", "output_text", "text"] = Field(
        description="must be input_text, input_image or input_audio"
    )
    text: str = Field(description="send a text")

    def piece(self, where: str) -> Piece:
        return Piece("text", self.text, where, f"{where}.text")


class InputRefusal(Form):
    refusal: str = Field(description="send a text")

    def piece(self, where: str) -> Piece:
        return Piece("text", self.refusal, where, f"{where}.refusal")


class InputImage(Form):
    file_id: NotDone = None
    image_url: str = Field(description="send a data: URL")

    def piece(self, where: str) -> Piece:
        return Piece("image", self.image_url, where, f"{where}.image_url")


InputPart = Annotated[
    Annotated[InputText, Tag("<text>")]
    | Annotated[InputRefusal, Tag("<refusal>")]
    | Annotated[InputImage, Tag("<input_image>")]
    | Annotated[AudioPart, Tag("<input_audio>")],
    tag_of_part("input_image", "input_audio", "refusal"),
]


def whole_or(parts: str) -> Discriminator:
    """A text, or a list whose tag is `parts`."""
    return Discriminator(lambda value: "<whole>" if isinstance(value, str) else parts)


class InputMessage(Form):
    """A turn, as a program writes it or as it got it."""

    type: Literal["message"] = Field(
        "message", description="must be message: calls, files and references are not read here"
    )
    role: Literal["system", "developer", "user", "assistant"] = Field(
        description="must be one of system, developer, user, assistant"
    )
    content: Annotated[
        Annotated[str, Tag("<whole>")]
        | Annotated[list[InputPart], few(" parts", "send fewer"), Tag("<parts>")],
        whole_or("<parts>"),
    ] = Field(description="send a text or a list of parts")

    _with_content = with_content()

    def pieces(self, where: str) -> Iterator[Piece]:
        """What was said, in order; `where` names the turn in errors."""
        if isinstance(self.content, str):
            yield Piece("text", self.content, f"{where}.content", f"{where}.content")
            return
        for place, part in enumerate(self.content):
            yield part.piece(f"{where}.content[{place}]")


class TextFormat(Form):
    type: Literal["text", "json_object", "json_schema"] = Field(
        description="must be one of text, json_object, json_schema"
    )
    # pydantic's own models have a method named `schema`.
    shape: dict[str, Any] | None = Field(None, alias="schema", description="send a JSON schema")


class TextSettings(Form):
    format: TextFormat | None = Field(None, description="send an object")


def without_logprobs(include: list[str]) -> list[str]:
    if LOGPROBS in include:
        raise PydanticCustomError("unsupported_parameter", f"{LOGPROBS} is not supported here")
    return include


class AtFirst(FailFast):
    """FailFast that can stand in a union, whose members have to be hashable."""

    __hash__ = object.__hash__


class ResponsesBody(Question):
    """The fields of `/v1/responses` that are read."""

    input: Annotated[
        Annotated[str, Tag("<whole>")]
        | Annotated[list[InputMessage], AtFirst(), few("", "leave out the oldest"), Tag("<items>")],
        whole_or("<items>"),
    ] = Field(description="send a text or a list of messages")
    instructions: str | None = Field(None, description="send a text")
    max_output_tokens: int | None = Field(
        None, ge=1, description="must be a whole number of at least 1"
    )
    text: TextSettings | None = Field(None, description="send an object")
    include: Annotated[list[str], AfterValidator(without_logprobs)] = Field(
        [], description="send a list of texts"
    )
    metadata: dict[str, str] = Field({}, description="send an object of texts")


@dataclass(frozen=True)
class ResponsesRequest(ChatRequest):
    """A request to `/v1/responses`; the reply repeats the fields in `echo`."""

    echo: dict[str, Any] = field(default_factory=dict)


def parse_responses(body: bytes, model: str, limits: Limits = Limits()) -> ResponsesRequest:
    """Read the body of a request to `/v1/responses`. Raises `ApiError` of status 400, 404, 413."""
    given = parse_form(body, ResponsesBody, UNSUPPORTED, limits)
    check_model(given.model, model)
    reader = Reader(limits, "input")
    form = None if given.text is None else given.text.format
    return ResponsesRequest(
        turns=reader.turns(list(turns_of(given))),
        pictures=reader.pictures,
        sampling=sampling_of(given),
        max_new_tokens=length_of(given.max_output_tokens, limits),
        seed=seed_of(given),
        stream=given.stream,
        schema=schema_of(form),
        name="input",
        echo={
            "instructions": given.instructions,
            "max_output_tokens": given.max_output_tokens,
            "metadata": given.metadata,
            "temperature": given.temperature,
            "top_p": given.top_p,
            "text": {"format": format_of(form)},
        },
    )


def turns_of(given: ResponsesBody) -> Iterator[Said]:
    if given.instructions is not None:
        where = "instructions"
        yield Said(where, "system", [Piece("text", given.instructions, where, where)])
    if isinstance(given.input, str):
        yield Said("input", "user", [Piece("text", given.input, "input", "input")])
        return
    for place, message in enumerate(given.input):
        where = f"input[{place}]"
        yield Said(where, message.role, message.pieces(where))


def schema_of(form: TextFormat | None) -> Schema | None:
    if form is None or form.type == "text":
        return None
    if form.type == "json_object":
        return Schema("text.format", ANY_OBJECT)
    if form.shape is None:
        raise bad("text.format.schema", "is missing; send a JSON schema")
    return Schema("text.format.schema", form.shape)


def format_of(form: TextFormat | None) -> dict[str, object]:
    if form is None or form.type == "text":
        return {"type": "text"}
    return {"type": form.type} | ({} if form.shape is None else {"schema": form.shape})
