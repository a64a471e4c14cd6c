"""OpenAI's chat form: the bytes of a request -> what to ask; an answer -> the JSON of a response.

Everything in a request was written by a stranger, so this border checks every type and every size,
and raises `ApiError`, which knows its HTTP status and its JSON. What is done with a field:

- read: model, messages, max_tokens, max_completion_tokens, temperature, top_p, seed, stop, stream,
  stream_options, and, beyond OpenAI's, top_k and repetition_penalty;
- refused, where it would change what an answer means and is not done here: `UNSUPPORTED`;
- ignored, where nothing is lost: everything else (user, metadata, store, ...).
"""

from __future__ import annotations

import base64
import binascii
import json
import math
import re
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from io import BytesIO
from typing import Any

from PIL import Image

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
SOUNDS = ("wav", "mp3")
DATA_URL = re.compile(r"data:([\w.+-]+/[\w.+-]+)?((?:;[\w.+-]+=[\w.+-]+)*);base64,", re.ASCII)
FINISH_REASONS = {"filtered": "content_filter"}  # by ours; the others are called the same


class ApiError(Exception):
    """A request that is refused or failed: what the client is told."""

    def __init__(
        self,
        status: int,
        message: str,
        code: str,
        param: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.param = status, message, code, param
        self.headers = headers or {}

    def json(self) -> dict[str, object]:
        if self.status >= 500:
            kind = "server_error"
        else:
            kind = "authentication_error" if self.status == 401 else "invalid_request_error"
        return {
            "error": {
                "message": " ".join(self.message.split()),
                "type": kind,
                "param": self.param,
                "code": self.code,
            }
        }


def bad(param: str | None, reason: str, code: str = "invalid_value") -> ApiError:
    """A 400 whose message begins with the field that is at fault."""
    return ApiError(400, f"{param}: {reason}" if param else reason, code, param)


def too_large(param: str | None, size: str, limit: str, remedy: str) -> ApiError:
    message = f"{param or 'the body'}: {size} is over the limit of {limit}; {remedy}"
    return ApiError(413, message, "too_large", param)


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
    new_tokens: int = 1024
    """an answer is never longer; one that asks for more ends with "length" """
    default_new_tokens: int = 256
    body_seconds: float = 60.0
    """in which a request has to have arrived"""


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


# -- a request ------------------------------------------------------------------------------------


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
    asked = _text(fields, "model", default=model)
    if asked != model:
        raise ApiError(404, f"model: there is only {model!r} here", "model_not_found", "model")
    turns, pictures = _Messages(limits).parse(fields.get("messages"))
    options = fields.get("stream_options")
    stream = _boolean(fields, "stream")
    if options is not None and not isinstance(options, dict):
        raise bad("stream_options", f"is {kind_of(options)}; send an object")
    if options is not None and not stream:
        raise bad("stream_options", "is only for streams; set stream to true")
    return ChatRequest(
        turns,
        pictures,
        _sampling(fields),
        _new_tokens(fields, limits),
        _seed(fields),
        _stop(fields),
        stream,
        _boolean(options or {}, "include_usage"),
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
        raise bad(
            None, f"the body is not JSON ({error}); send UTF-8 JSON", "invalid_json"
        ) from None


class _Messages:
    """Reads the messages of one request, counting what they hold together."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.pictures: dict[str, bytes] = {}
        self.pixels = self.sounds = self.characters = 0

    def parse(self, value: object) -> tuple[tuple[Turn, ...], dict[str, bytes]]:
        """Neighbours of one role become one turn."""
        if value is None:
            raise bad("messages", "is missing; send a list", "missing_required_parameter")
        if not isinstance(value, list) or not value:
            found = "empty" if value == [] else kind_of(value)
            raise bad("messages", f"is {found}; send a list of messages")
        if len(value) > self.limits.messages:
            raise too_large(
                "messages", f"{len(value):,}", f"{self.limits.messages:,}", "leave out the oldest"
            )
        turns: list[Turn] = []
        for place, message in enumerate(value):
            where = f"messages[{place}]"
            turn = self._turn(message, where)
            if turn.role == "system" and turns and turns[-1].role != "system":
                raise bad(f"{where}.role", "a system message comes before all others; move it")
            if turns and turns[-1].role == turn.role:
                turn = Turn(turn.role, turns.pop().parts + turn.parts)
            turns.append(turn)
        if turns[-1].role != "user":
            raise bad("messages", "the last one is not the user's; end with a question")
        if not any(
            not isinstance(part, Part) or part.kind == "image" or part.value.strip()
            for part in turns[-1].parts
        ):
            raise bad("messages", "the last one is empty; ask something")
        return tuple(turns), self.pictures

    def _turn(self, message: object, where: str) -> Turn:
        if not isinstance(message, dict):
            raise bad(where, f"is {kind_of(message)}; send an object with role and content")
        role = message.get("role")
        if not isinstance(role, str) or role not in ROLES:
            raise bad(f"{where}.role", f"must be one of {', '.join(ROLES)}")
        for name in ("tool_calls", "function_call", "audio"):
            if message.get(name):
                raise bad(f"{where}.{name}", "is not supported here", "unsupported_parameter")
        content = message.get("content")
        if isinstance(content, str):
            return Turn(ROLES[role], (self._said(content, f"{where}.content"),))
        if not isinstance(content, list):
            raise bad(f"{where}.content", f"is {kind_of(content)}; send a text or a list of parts")
        if len(content) > self.limits.messages:
            raise too_large(
                f"{where}.content",
                f"{len(content):,} parts",
                f"{self.limits.messages:,}",
                "send fewer",
            )
        return Turn(
            ROLES[role],
            tuple(
                self._part(part, ROLES[role], f"{where}.content[{place}]")
                for place, part in enumerate(content)
            ),
        )

    def _part(self, part: object, role: str, where: str) -> Part | Sound:
        if not isinstance(part, dict):
            raise bad(where, f"is {kind_of(part)}; send an object with a type")
        kind = part.get("type")
        if kind == "text":
            return self._said(part.get("text"), f"{where}.text")
        if kind not in ("image_url", "input_audio"):
            raise bad(f"{where}.type", "must be text, image_url or input_audio")
        if role != "user":
            raise bad(where, "pictures and speech stand in the user's messages only; move it")
        content = part.get(kind)
        where = f"{where}.{kind}"
        if not isinstance(content, dict):
            raise bad(where, f"is {kind_of(content)}; send an object")
        return (self._picture if kind == "image_url" else self._sound)(content, where)

    def _said(self, text: object, where: str) -> Part:
        if not isinstance(text, str):
            raise bad(where, f"is {kind_of(text)}; send a text")
        check_unicode(text, where)
        self.characters += len(text)
        if self.characters > self.limits.characters:
            raise too_large(
                where,
                f"{self.characters:,} characters",
                f"{self.limits.characters:,}",
                "shorten the conversation",
            )
        return Part("text", text)

    def _picture(self, content: dict, where: str) -> Part:
        url = content.get("url")
        if not isinstance(url, str):
            raise bad(f"{where}.url", f"is {kind_of(url)}; send a data: URL")
        opening = DATA_URL.match(url[:1000])
        if opening is None or not (opening[1] or "").lower().startswith("image/"):
            raise bad(
                f"{where}.url",
                "only data:image/...;base64 URLs are read, no addresses and"
                " no paths; send the picture itself",
                "invalid_image_url",
            )
        if len(self.pictures) == self.limits.pictures:
            raise too_large(where, "one more picture", f"{self.limits.pictures}", "send fewer")
        data = decode_base64(url[opening.end() :], f"{where}.url", self.limits.picture_bytes)
        self.pixels += pixels_claimed(data)
        if self.pixels > self.limits.pixels:
            raise too_large(
                where,
                f"{self.pixels:,} pixels in all",
                f"{self.limits.pixels:,}",
                "send smaller pictures",
            )
        name = f"{where}.url"
        self.pictures[name] = data
        return Part("image", name)

    def _sound(self, content: dict, where: str) -> Sound:
        if content.get("format") not in SOUNDS:
            raise bad(f"{where}.format", f"must be one of {', '.join(SOUNDS)}")
        if not isinstance(content.get("data"), str):
            raise bad(f"{where}.data", f"is {kind_of(content.get('data'))}; send base64")
        self.sounds += 1
        if self.sounds > self.limits.sounds:
            raise too_large(where, "one more recording", f"{self.limits.sounds}", "send fewer")
        return Sound(
            where, decode_base64(content["data"], f"{where}.data", self.limits.audio_bytes)
        )


def decode_base64(text: str, where: str, max_bytes: int) -> bytes:
    """Standard base64 of at most `max_bytes` bytes, strictly."""
    size = len(text) // 4 * 3 - text[-2:].count("=")
    if size > max_bytes:
        raise too_large(where, f"{size:,} bytes", f"{max_bytes:,}", "send a smaller copy")
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise bad(
            where, f"is not base64 ({error}); encode the file again", "invalid_base64"
        ) from None


def pixels_claimed(data: bytes) -> int:
    """Width times height by a picture's header; 0 for what is no picture, which is refused when it
    is decoded."""
    try:
        with Image.open(BytesIO(data), formats=FORMATS) as image:
            return image.width * image.height
    except Image.DecompressionBombError:
        return 2**62
    except Exception:  # strangers' bytes make PIL raise anything: see data/images.py
        return 0


def check_unicode(text: str, where: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError:  # JSON can spell half a character
        raise bad(where, "is not valid Unicode; send whole characters") from None


def _text(fields: dict, name: str, default: str) -> str:
    value = fields.get(name)
    if value is not None and not isinstance(value, str):
        raise bad(name, f"is {kind_of(value)}; send a text")
    return default if value is None else value


def _boolean(fields: dict, name: str) -> bool:
    value = fields.get(name)
    if value is not None and not isinstance(value, bool):
        raise bad(name, f"is {kind_of(value)}; send true or false")
    return bool(value)


def _number(fields: dict, name: str, default: float, low: float, high: float) -> float:
    value = fields.get(name)
    if value is None:
        return default
    # The comparison comes before any conversion: an int may be too large for a float.
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high:
        raise bad(name, f"must be a number from {low:g} to {high:g}")
    return float(value)


def _whole(fields: dict, name: str, default: int | None, low: int, high: float) -> int | None:
    value = fields.get(name)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        limit = f"from {low} to {high}" if math.isfinite(high) else f"of at least {low}"
        raise bad(name, f"must be a whole number {limit}")
    return value


def _sampling(fields: dict) -> Sampling:
    """Greedy where no temperature is given: an answer about a picture is not to be drawn by lot."""
    return Sampling(
        temperature=_number(fields, "temperature", 0.0, 0, 2),
        # OpenAI's 0 keeps the likeliest token alone, as every share under its own does.
        top_p=max(_number(fields, "top_p", 1.0, 0, 1), 1e-9),
        top_k=_whole(fields, "top_k", 0, 0, 2**31),
        repetition_penalty=_number(fields, "repetition_penalty", 1.0, 0.1, 10),
    )


def _new_tokens(fields: dict, limits: Limits) -> int:
    older = _whole(fields, "max_tokens", limits.default_new_tokens, 1, math.inf)
    return min(_whole(fields, "max_completion_tokens", older, 1, math.inf), limits.new_tokens)


def _seed(fields: dict) -> int | None:
    """From 0 to 2^64 - 1, as torch takes it; negative ones are counted from the end."""
    seed = _whole(fields, "seed", None, -(2**63), 2**64 - 1)
    return None if seed is None else seed % 2**64


def _stop(fields: dict) -> tuple[str, ...]:
    value = fields.get("stop")
    marks = [] if value is None else [value] if isinstance(value, str) else value
    if (
        not isinstance(marks, list)
        or len(marks) > 4
        or not all(isinstance(mark, str) and 0 < len(mark) <= 1000 for mark in marks)
    ):
        raise bad("stop", "must be a text or up to 4 of them, none empty or over 1,000 long")
    for mark in marks:
        check_unicode(mark, "stop")
    return tuple(marks)


# -- a response -----------------------------------------------------------------------------------


class Answer:
    """The JSON of one answer, whole or in chunks."""

    def __init__(self, model: str) -> None:
        self.head = {
            "id": f"chatcmpl-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": model,
        }

    def whole(self, text: str, finish_reason: str, usage: dict[str, int]) -> dict[str, Any]:
        message = {"role": "assistant", "content": text, "refusal": None}
        return self.head | {
            "object": "chat.completion",
            "usage": usage,
            "choices": [
                {
                    "index": 0,
                    "message": message,
                    "logprobs": None,
                    "finish_reason": FINISH_REASONS.get(finish_reason, finish_reason),
                }
            ],
        }

    def chunk(self, delta: dict[str, str], finish_reason: str | None = None) -> dict[str, Any]:
        choice = {
            "index": 0,
            "delta": delta,
            "logprobs": None,
            "finish_reason": FINISH_REASONS.get(finish_reason, finish_reason),
        }
        return self.head | {"object": "chat.completion.chunk", "choices": [choice]}

    def usage_chunk(self, usage: dict[str, int]) -> dict[str, Any]:
        return self.head | {"object": "chat.completion.chunk", "choices": [], "usage": usage}


def usage(prompt_tokens: int, completion_tokens: int) -> dict[str, int]:
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
    }
