"""What the turns of a request hold, whatever form it has: bounded, decoded, and added up.

Everything is untrusted. A form checks types (api/chat_form.py, api/responses_form.py) and gives the
pieces of each turn; what they hold together is counted here. Raises `ApiError`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from api.attachments import decode_base64, read_data_url
from api.errors import ApiError, bad, too_large
from api.forms import Limits, Role
from data.dataset import Part
from data.reading import claimed_size
from errors import PhiSightError

# As programs name them. A name is a hint: speech/recordings.py knows a recording by its bytes.
SOUND_FORMATS = (
    *("wav", "mp3", "flac", "ogg", "oga", "opus", "webm", "m4a", "mp4", "mpeg", "mpga"),
    *("aac", "aiff", "aif"),
)
TOO_MANY = 2**40  # pixels; a header that claims more is a lie, and its number tells nothing
SOUND_KINDS = ("audio/", "video/", "application/ogg")  # media types; browsers record video/webm
ROLES: dict[str, Role] = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "assistant": "assistant",
}


@dataclass(frozen=True)
class Piece:
    """A text, a picture's URL or a recording's base64 as it was sent, and what names it in errors:
    the part that it is, the field that holds it, and within that field its data."""

    kind: Literal["text", "image", "sound"]
    value: str = field(repr=False)
    part: str
    where: str
    data: str = ""


@dataclass(frozen=True)
class Said:
    """A turn as it was sent; `where` names it in errors."""

    where: str
    role: str
    pieces: Iterable[Piece]


@dataclass(frozen=True)
class Sound:
    """Speech that stands in a message, to be written down; `where` names it in errors."""

    where: str
    data: bytes = field(repr=False)


@dataclass(frozen=True)
class Turn:
    role: Role
    parts: tuple[Part | Sound, ...]


class Reader:
    """Reads the turns of one request, counting what they hold together."""

    def __init__(self, limits: Limits, name: str) -> None:
        """`name`: of the field that holds all turns."""
        self.limits, self.name = limits, name
        self.pictures: dict[str, bytes] = {}
        self.pixels = self.sounds = self.characters = 0

    def turns(self, said: Sequence[Said]) -> tuple[Turn, ...]:
        """Neighbours of one role become one turn."""
        turns: list[Turn] = []
        for one in said:
            role = ROLES[one.role]
            if role == "system" and turns and turns[-1].role != "system":
                reason = "a system message comes before all others; move it"
                raise bad(f"{one.where}.role", reason)
            parts = tuple(self._part(piece, role) for piece in one.pieces)
            if turns and turns[-1].role == role:
                parts = turns.pop().parts + parts
            turns.append(Turn(role, parts or (Part("text", ""),)))
        if not turns or turns[-1].role != "user":
            raise bad(self.name, "the last one is not the user's; end with a question")
        if not any(
            not isinstance(part, Part) or part.kind == "image" or part.value.strip()
            for part in turns[-1].parts
        ):
            raise bad(self.name, "the last one is empty; ask something")
        return tuple(turns)

    def _part(self, piece: Piece, role: Role) -> Part | Sound:
        if piece.kind == "text":
            return self._text(piece)
        if role != "user":
            reason = "pictures and speech stand in the user's messages only; move it"
            raise bad(piece.part, reason)
        return self._picture(piece) if piece.kind == "image" else self._sound(piece)

    def _text(self, piece: Piece) -> Part:
        try:
            piece.value.encode()
        except UnicodeEncodeError:  # JSON can spell half a character
            raise bad(piece.where, "is not valid Unicode; send whole characters") from None
        self.characters += len(piece.value)
        if self.characters > self.limits.characters:
            size, limit = f"{self.characters:,} characters", f"{self.limits.characters:,}"
            raise too_large(piece.where, size, limit, "shorten the conversation")
        return Part("text", piece.value)

    def _picture(self, piece: Piece) -> Part:
        name = piece.where + piece.data
        url = read_data_url(piece.value)
        if url is None or not url.kind.startswith("image/"):
            reason = "only data:image/... URLs are read, no addresses and no paths;"
            raise bad(name, f"{reason} send the picture itself", "invalid_image_url")
        tokens, context = self.limits.picture_tokens, self.limits.context_tokens
        count = len(self.pictures) + 1
        if count * tokens > context:  # before any of them is looked at
            reason = (
                f"this model's maximum context length is {context} tokens, and {count} pictures"
                f" take {count * tokens}; send fewer"
            )
            raise bad(self.name, reason, "context_length_exceeded")
        data = url.decode(name, self.limits.picture_bytes)
        self.pixels += pixels_claimed(data, name)
        if self.pixels > self.limits.pixels:
            limit = f"{self.limits.pixels:,} pixels in all"
            size = f"{self.pixels:,}" if self.pixels < TOO_MANY else "a header of far more pixels"
            raise too_large(piece.where, size, limit, "send smaller pictures")
        self.pictures[name] = data
        return Part("image", name)

    def _sound(self, piece: Piece) -> Sound:
        self.sounds += 1
        if self.sounds > self.limits.sounds:
            limit = f"{self.limits.sounds}"
            raise too_large(piece.where, "one more recording", limit, "send fewer")
        name, most = piece.where + piece.data, self.limits.audio_bytes
        url = read_data_url(piece.value)  # as some programs write it; OpenAI's have its data alone
        if url is None:
            return Sound(piece.where, decode_base64(piece.value, name, most))
        if not url.kind.startswith(SOUND_KINDS):
            reason = f"a data: URL of {url.kind or 'no type'}; send audio/... or base64 alone"
            raise ApiError(400, f"{name}: is {reason}", "invalid_base64", name)
        return Sound(piece.where, url.decode(name, most))


def pixels_claimed(data: bytes, where: str) -> int:
    """Width times height by a picture's header; 0 for what is not a picture, which is refused when
    it is decoded. Raises `ApiError` for a header that cannot be read within limits."""
    try:
        width, height = claimed_size(data, where) or (0, 0)
    except PhiSightError as error:
        raise bad(where, str(error).removeprefix(f"{where}: ")) from None
    return width * height
