"""Saved conversations: one folder a conversation, kept apart by browser, read back with suspicion.

    ROOT/<digest of the browser's key>/<id>/conversation.json
                                          /<digest of its bytes>.png

The browser keeps only its key, which nobody else knows; the disk keeps only the key's digest.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import secrets
import shutil
from dataclasses import dataclass
from pathlib import Path

from data.dataset import Message, Part
from data.images import decode_image
from errors import PhiSightError

KEY = re.compile(r"[0-9a-f]{32}\Z")
ID = re.compile(r"[0-9a-f]{16}\Z")
PICTURE = re.compile(r"[0-9a-f]{64}\.(?:png|jpg|gif|webp|bmp)\Z")
FILE = "conversation.json"
MAX_BYTES = 8 * 1024 * 1024
MAX_MESSAGES = 1000
MAX_CONVERSATIONS = 100  # of one browser; the oldest goes when another is begun
TITLE_LENGTH = 48
# What browsers show as it is. Anything else that can be decoded is kept as PNG.
SUFFIXES = {b"\x89PNG": ".png", b"\xff\xd8\xff": ".jpg", b"GIF8": ".gif"}


@dataclass(frozen=True)
class Saved:
    """A conversation: user and assistant in turn. Its picture parts are names of files beside it;
    the last question may be without an answer."""

    id: str
    messages: tuple[Message, ...] = ()

    @property
    def title(self) -> str:
        """The first words that were asked, or "" where only pictures were sent."""
        text = " ".join(
            " ".join(part.value for part in message.parts if part.kind == "text")
            for message in self.messages[:1]
        )
        text = " ".join(text.split())
        return text if len(text) <= TITLE_LENGTH else text[: TITLE_LENGTH - 1].rstrip() + "…"


def new_key() -> str:
    """What a browser that has none yet is given."""
    return secrets.token_hex(16)


def new_conversation() -> Saved:
    return Saved(secrets.token_hex(8))


def to_json(saved: Saved) -> bytes:
    messages = [
        {"role": message.role, "parts": [{"kind": p.kind, "value": p.value} for p in message.parts]}
        for message in saved.messages
    ]
    return json.dumps({"id": saved.id, "messages": messages}, ensure_ascii=False).encode()


def from_json(data: bytes, name: str) -> Saved:
    """The conversation in the bytes of a file; `name` stands in the errors.

    Raises PhiSightError (name, reason, remedy) for whatever `to_json` would not have written.
    """

    def refuse(reason: str) -> PhiSightError:
        return PhiSightError(f"{name}: {reason}; delete the conversation")

    try:
        record = json.loads(data)
    except (ValueError, RecursionError):
        raise refuse("is not JSON") from None
    if not isinstance(record, dict) or not isinstance(record.get("messages"), list):
        raise refuse("is not a conversation")
    if not isinstance(record.get("id"), str) or not ID.match(record["id"]):
        raise refuse("has no id")
    if len(record["messages"]) > MAX_MESSAGES:
        raise refuse(f"has over {MAX_MESSAGES} messages")
    messages = []
    for index, raw in enumerate(record["messages"]):
        role = ("user", "assistant")[index % 2]
        message = _message(raw, role)
        if message is None:
            raise refuse(f"message {index + 1} is not one of the {role}")
        messages.append(message)
    return Saved(record["id"], tuple(messages))


def _message(raw: object, role: str) -> Message | None:
    """One message of `role`, or None where `raw` is none."""
    if (
        not isinstance(raw, dict)
        or raw.get("role") != role
        or not isinstance(raw.get("parts"), list)
    ):
        return None
    parts = []
    for part in raw["parts"]:
        kind, value = (part.get("kind"), part.get("value")) if isinstance(part, dict) else ("", "")
        good = isinstance(value, str) and (
            kind == "text"
            and value == clean_text(value)
            or kind == "image"
            and role == "user"
            and PICTURE.match(value) is not None
        )
        if not good:
            return None
        parts.append(Part(kind, value))
    return Message(role, tuple(parts)) if parts or role == "assistant" else None


def clean_text(text: str) -> str:
    """`text` without halves of characters, which JSON can carry and UTF-8 cannot."""
    return text.encode("utf-8", "replace").decode()


def prepare_root(root: str | Path) -> Path:
    """The folder of all shelves, made if it is not there; PhiSightError if nothing can be saved."""
    try:
        Path(root).mkdir(mode=0o700, parents=True, exist_ok=True)
        (Path(root) / ".writable").write_bytes(b"")
    except OSError as error:
        raise PhiSightError(
            f"--conversations {root}: {error.strerror or error}; name a folder that can be written"
        ) from None
    return Path(root)


class Shelf:
    """The saved conversations of one browser."""

    def __init__(self, root: str | Path, key: str) -> None:
        if not isinstance(key, str) or not KEY.match(key):
            raise PhiSightError("conversations: the browser's key is damaged; reload the page")
        self.folder = Path(root) / hashlib.sha256(key.encode()).hexdigest()[:32]

    def titles(self) -> list[tuple[str, str]]:
        """(id, title) of every conversation, the newest first; an unreadable one has the title "?",
        so that it can be seen and deleted."""
        found = []
        for id in self._newest_first():
            try:
                found.append((id, self.load(id).title))
            except PhiSightError:
                found.append((id, "?"))
        return found

    def load(self, id: str) -> Saved:
        """Raises PhiSightError for an unknown conversation and for a file that is damaged."""
        path = self._of(id) / FILE
        try:
            if path.stat().st_size > MAX_BYTES:
                raise PhiSightError(f"conversation {id}: is too large; delete it")
            saved = from_json(path.read_bytes(), f"conversation {id}")
        except OSError:
            raise PhiSightError(
                f"conversation {id}: is not there any more; begin a new one"
            ) from None
        if saved.id != id:
            raise PhiSightError(f"conversation {id}: holds another one; delete it")
        return saved

    def save(self, saved: Saved) -> None:
        """Write the whole conversation or leave the former one."""
        folder = self._of(saved.id)
        data = to_json(saved)
        if len(data) > MAX_BYTES or len(saved.messages) > MAX_MESSAGES:
            raise PhiSightError("conversation: is too long to be saved; begin a new one")
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            partial = folder / f".{FILE}.{secrets.token_hex(4)}"
            partial.write_bytes(data)
            os.replace(partial, folder / FILE)
        except OSError as error:
            raise self._refused(error) from None
        for id in self._newest_first()[MAX_CONVERSATIONS:]:
            self.delete(id)

    def delete(self, id: str) -> None:
        """Remove a conversation and its pictures; one that is not there is not missed."""
        shutil.rmtree(self._of(id), ignore_errors=True)

    def keep_picture(self, id: str, data: bytes, name: str) -> str:
        """Keep the bytes of a picture with conversation `id`; returns the name to call it by.

        `name` stands in the errors. Raises PhiSightError for all that `decode_image` refuses.
        """
        picture = decode_image(data, name)
        suffix = next((s for start, s in SUFFIXES.items() if data.startswith(start)), None)
        kept = f"{hashlib.sha256(data).hexdigest()}{suffix or '.png'}"
        path = self._of(id) / kept
        try:
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            if suffix is None:
                picture.save(path)
            else:
                path.write_bytes(data)
        except OSError as error:
            raise self._refused(error) from None
        return kept

    def picture(self, id: str, name: str) -> Path:
        """Where a kept picture lies."""
        if not PICTURE.match(name):
            raise PhiSightError(f"picture {name!r}: is no name of a kept picture; send it again")
        return self._of(id) / name

    def _of(self, id: str) -> Path:
        if not isinstance(id, str) or not ID.match(id):
            raise PhiSightError("conversation: its id is damaged; reload the page")
        return self.folder / id

    def _newest_first(self) -> list[str]:
        """Ids of what is on the shelf."""
        dated = []
        try:
            for path in self.folder.iterdir():
                if ID.match(path.name) and (path / FILE).is_file():
                    dated.append(((path / FILE).stat().st_mtime_ns, path.name))
        except FileNotFoundError:  # nothing saved yet, or deleted in another window
            pass
        except OSError as error:
            raise self._refused(error) from None
        return [id for _, id in sorted(dated, reverse=True)]

    def _refused(self, error: OSError) -> PhiSightError:
        return PhiSightError(
            f"{self.folder}: {error.strerror or error}; make room or make the folder writable"
        )
