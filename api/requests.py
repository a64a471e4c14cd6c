"""The bytes of a request for an answer -> what to ask, whatever its form."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from api.chat_form import UNSUPPORTED, ChatBody
from api.errors import ApiError, bad
from api.forms import Limits, Question, parse_form
from api.json_output import ANY_OBJECT, Schema
from api.pieces import Reader, Said, Sound, Turn
from assistant.sampling import Sampling
from data.dataset import Message, Part


@dataclass(frozen=True)
class ChatRequest:
    """A request that is sound in itself; picture parts name one of `pictures`."""

    turns: tuple[Turn, ...]
    pictures: dict[str, bytes] = field(repr=False)
    sampling: Sampling
    max_new_tokens: int
    seed: int | None
    stop: tuple[str, ...] = ()
    stream: bool = False
    include_usage: bool = False
    schema: Schema | None = None
    """what the answer has to be, as JSON; None: any text"""
    name: str = "messages"
    """of the field that holds the conversation"""

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
    given = parse_form(body, ChatBody, UNSUPPORTED, limits)
    check_model(given.model, model)
    if given.stream_options is not None and not given.stream:
        raise bad("stream_options", "is only for streams; set stream to true")
    reader = Reader(limits, "messages")
    said = [
        Said(where := f"messages[{place}]", message.role, message.pieces(where))
        for place, message in enumerate(given.messages)
    ]
    return ChatRequest(
        turns=reader.turns(said),
        pictures=reader.pictures,
        sampling=sampling_of(given),
        max_new_tokens=length_of(given.max_completion_tokens or given.max_tokens, limits),
        seed=seed_of(given),
        stop=tuple(given.stop),
        stream=given.stream,
        include_usage=given.stream_options is not None and given.stream_options.include_usage,
        schema=schema_of(given),
    )


def check_model(given: str | None, *names: str) -> None:
    """Raises `ApiError` of status 404 for a model that has none of the `names`."""
    if given is not None and given not in names:
        known = " and ".join(map(repr, names))
        raise ApiError(404, f"model: there is only {known} here", "model_not_found", "model")


def sampling_of(given: Question) -> Sampling:
    # OpenAI's top_p of 0 keeps the likeliest token alone, as every share under its own does.
    top_p = max(given.top_p, 1e-9)
    return Sampling(
        given.temperature,
        top_p,
        given.top_k,
        given.repetition_penalty,
        given.no_repeat_ngram_size,
    )


def length_of(asked: int | None, limits: Limits) -> int:
    """Tokens of the longest answer to a question that asks for so many."""
    return min(asked or limits.default_new_tokens, limits.new_tokens)


def seed_of(given: Question) -> int | None:
    return None if given.seed is None else given.seed % 2**64  # negative ones count from the end


def schema_of(given: ChatBody) -> Schema | None:
    form = given.response_format
    if form is None or form.type == "text":
        return None
    if form.type == "json_object":
        return Schema("response_format", ANY_OBJECT)
    if form.json_schema is None:
        raise bad("response_format.json_schema", "is missing; send an object with a schema")
    return Schema("response_format.json_schema.schema", form.json_schema.shape)
