"""How the JSON of a request is checked: limits, the base of all forms, and how a fault is told.

Each route's form is a pydantic model in a file of its own: the type and the range of every field.
What is done with a field:

- read: the fields of the form;
- refused, where it would change what an answer means and is not done here: a table of the form;
- ignored, where nothing is lost: everything else (user, metadata, store, ...).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeVar, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    model_validator,
)
from pydantic_core import PydanticCustomError

from api.errors import ApiError, bad, too_large
from assistant.sampling import LONGEST_NGRAM
from data.images import MAX_PIXELS
from data.stream import kind_of

MIB = 2**20
MOST_VALUES = 250_000  # in one request's JSON; each takes some 70 bytes and 5 us to be checked
LONGEST_NUMBER = 1000  # digits; reading them takes their square
Role = Literal["user", "assistant", "system"]


@dataclass(frozen=True)
class Limits:
    """How much one request may ask for. Bytes are those of the decoded file."""

    body_bytes: int = 32 * MIB
    picture_bytes: int = 20 * MIB
    audio_bytes: int = 20 * MIB
    pixels: int = MAX_PIXELS
    """of all pictures of a request together"""
    context_tokens: int = 2**31
    """that the model reads"""
    picture_tokens: int = 1
    """that each picture takes of them: all the room that is there for pictures"""
    sounds: int = 4
    characters: int = 1_000_000
    spoken_characters: int = 4096
    """of a text that is to be spoken"""
    messages: int = 1000
    """and parts of one message"""
    new_tokens: int = 1024
    """an answer is never longer; one that asks for more ends with "length" """
    default_new_tokens: int = 256
    body_seconds: float = 60.0
    """in which a request has to have arrived"""
    silent_seconds: float = 15.0
    """of a stream after which a comment is sent"""


# -- what forms are made of ------------------------------------------------------------------
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


AnyForm = TypeVar("AnyForm", bound=Form)
Unsupported = dict[str, tuple[object, ...]]
"""Fields that change what an answer means, with the values that ask for nothing."""


def not_done(value: object) -> object:
    if value:
        raise PydanticCustomError("unsupported_parameter", "is not supported here")
    return value


NotDone = Annotated[Any, AfterValidator(not_done)]
"""A field that may be there as long as it holds nothing."""


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


class Question(Form):
    """What all forms that ask for an answer have in common. Greedy where no temperature is given:
    an answer about a picture is not to be drawn by lot."""

    model: str | None = Field(None, description="send a text")
    stream: bool = Field(False, description="send true or false")
    temperature: float = Field(0.0, ge=0, le=2, description="must be a number from 0 to 2")
    top_p: float = Field(1.0, ge=0, le=1, description="must be a number from 0 to 1")
    top_k: int = Field(0, ge=0, le=2**31, description=f"must be a whole number from 0 to {2**31}")
    repetition_penalty: float = Field(
        1.0, ge=0.1, le=10, description="must be a number from 0.1 to 10"
    )
    no_repeat_ngram_size: int = Field(
        0, ge=0, le=LONGEST_NGRAM, description=f"must be a whole number from 0 to {LONGEST_NGRAM}"
    )
    seed: int | None = Field(
        None,
        ge=-(2**63),
        le=2**64 - 1,
        description=f"must be a whole number from {-(2**63)} to {2**64 - 1}",
    )


# -- a fault ---------------------------------------------------------------------------------

LISTS = ("messages", "input")  # whose places are named in errors
OBJECTS = {
    "ChatMessage": "an object with role and content",
    "InputMessage": "an object with role and content",
    "TextPart": "an object with a type",
    "InputText": "an object with a type",
}


def reason_at(form: type[Form], path: Iterable[str]) -> str:
    """The description of the field that a path of names leads to from a form."""
    forms, reason = [form], ""
    for name in path:
        for inner in forms:
            fields = {field.alias or own: field for own, field in inner.model_fields.items()}
            if name in fields:
                reason = fields[name].description or ""
                forms = list(forms_in(fields[name].annotation))
                break
    return reason


def forms_in(annotation: object) -> Iterator[type[Form]]:
    """The forms that a field's type names, such as those of a list's items."""
    if isinstance(annotation, type) and issubclass(annotation, Form):
        yield annotation
    for inner in get_args(annotation):
        yield from forms_in(inner)


def as_refusal(error: ValidationError, form: type[Form]) -> ApiError:
    """The first fault that pydantic found, named as the client wrote it."""
    fault = error.errors(include_url=False)[0]
    kind, found = fault["type"], fault["input"]
    first, *rest = fault["loc"]
    where, path = str(first), [str(first)]
    for step in rest:
        if isinstance(step, str) and not step.startswith("<"):
            where, path = f"{where}.{step}", [*path, step]
        elif isinstance(step, int) and first in LISTS:
            where += f"[{step}]"
    if kind == "too_large":
        return ApiError(413, f"{where}: {fault['msg']}", kind, where)
    if kind == "unsupported_parameter":
        return bad(where, fault["msg"], kind)
    if kind == "string_unicode" and where == "stop":
        return bad(where, "is not valid Unicode; send whole characters")
    reason = reason_at(form, path)
    if kind == "missing" and not rest:
        return bad(where, f"is missing; {reason}", "missing_required_parameter")
    if kind == "model_type":
        reason = f"send {OBJECTS.get(fault['ctx']['class_name'], 'an object')}"
    if not reason.startswith("must"):
        reason = f"is {kind_of(None if kind == 'missing' else found)}; {reason}"
    return bad(where, reason)


# -- a body -------------------------------------------------------------------------------------


def parse_form(
    body: bytes, form: type[AnyForm], unsupported: Mapping[str, tuple[object, ...]], limits: Limits
) -> AnyForm:
    """The checked fields of a request. Raises `ApiError` of status 400 or 413."""
    fields = parse_json(body)
    if not isinstance(fields, dict):
        raise bad(None, f"the body is {kind_of(fields)}; send a JSON object", "invalid_json")
    return checked(fields, form, unsupported, limits)


def checked(
    fields: Mapping[str, object],
    form: type[AnyForm],
    unsupported: Mapping[str, tuple[object, ...]],
    limits: Limits,
) -> AnyForm:
    """The fields of a request as its form. Raises `ApiError` of status 400 or 413."""
    for name, harmless in unsupported.items():
        value = fields.get(name)
        if value is not None and not any(
            value == one and isinstance(value, bool) == isinstance(one, bool) for one in harmless
        ):
            raise bad(name, "is not supported here; leave it out", "unsupported_parameter")
    try:
        return form.model_validate(fields, context=limits)
    except ValidationError as error:
        raise as_refusal(error, form) from None


def parse_json(body: bytes) -> object:
    """JSON without what JSON does not have: NaN, infinities, other encodings than UTF-8.

    Raises `ApiError` of status 400 or 413.
    """
    # Counted before it is read: "[],[],[]" takes twenty times its length in memory.
    if sum(map(body.count, (b",", b"[", b"{"))) > MOST_VALUES:
        raise too_large(None, "its number of values", f"{MOST_VALUES:,}", "send less")

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is not JSON")

    def whole_number(digits: str) -> int:
        if len(digits) > LONGEST_NUMBER:
            raise ValueError(f"a number of {len(digits):,} digits")
        return int(digits)

    try:
        return json.loads(body.decode("utf-8"), parse_constant=refuse, parse_int=whole_number)
    except RecursionError:
        raise bad(None, "the body is nested too deeply; send plain JSON", "invalid_json") from None
    except ValueError as error:
        reason = f"the body is not JSON ({error}); send UTF-8 JSON"
        raise bad(None, reason, "invalid_json") from None
