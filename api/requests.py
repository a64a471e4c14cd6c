"""The bytes of a chat request -> what to ask.

Everything in a request is untrusted. api/forms.py bounds its JSON and checks the type and the range
of every field; what the messages hold together is added up here. Both raise `ApiError`.
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Callable
from dataclasses import dataclass, field

from api.errors import ApiError, bad, too_large
from api.forms import ChatMessage, ContentPart, ImagePart, Limits, Role, TextPart, parse_body
from assistant.sampling import Sampling
from data.dataset import Message, Part
from data.reading import claimed_size
from errors import PhiSightError

ROLES: dict[str, Role] = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "assistant": "assistant",
}
DATA_URL = re.compile(r"data:([\w.+-]+/[\w.+-]+)?((?:;[\w.+-]+=[\w.+-]+)*);base64,", re.ASCII)


@dataclass(frozen=True)
class Sound:
    """Speech that stands in a message, to be written down; `where` names it in errors."""

    where: str
    data: bytes = field(repr=False)


@dataclass(frozen=True)
class Turn:
    role: Role
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
    given = parse_body(body, limits)
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
        self, content: str | list[ContentPart], role: Role, where: str
    ) -> tuple[Part | Sound, ...]:
        if isinstance(content, str):
            return (self._text(content, where),)
        return tuple(
            self._part(part, role, f"{where}[{place}]") for place, part in enumerate(content)
        )

    def _part(self, part: ContentPart, role: Role, where: str) -> Part | Sound:
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
        self.pixels += pixels_claimed(data, name)
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


def pixels_claimed(data: bytes, where: str) -> int:
    """Width times height by a picture's header; 0 for what is not a picture, which is refused when
    it is decoded. Raises `ApiError` for a header that cannot be read within limits."""
    try:
        width, height = claimed_size(data, where) or (0, 0)
    except PhiSightError as error:
        raise bad(where, str(error).removeprefix(f"{where}: ")) from None
    return width * height
