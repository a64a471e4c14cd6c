"""A conversation as a file to take away: JSON as chat APIs take it, or Markdown."""

from __future__ import annotations

import base64
import json
import mimetypes
import zipfile
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import IO

from web import texts
from web.chat.conversation import Node, SavedConversation
from web.replies import zip_time

Picture = Callable[[str], bytes]
"""the bytes of a kept picture by its name"""
FOLDER = "pictures"


def file_name(conversation: SavedConversation, suffix: str) -> str:
    """What a file is called: the title, as far as any disk takes it, and the suffix."""
    plain = "".join(c if c.isalnum() or c in "-_ " else " " for c in conversation.title)
    return f"{' '.join(plain.split())[:60].strip() or 'conversation'}{suffix}"


def as_json(conversation: SavedConversation, picture: Picture) -> Iterator[str]:
    """JSON text, piece by piece, with the pictures in it: its "messages" are those of a request to
    /v1/chat/completions."""
    about = {
        "title": conversation.title,
        "updated": datetime.fromtimestamp(conversation.updated, UTC).isoformat(timespec="seconds"),
    }
    yield json.dumps(about, ensure_ascii=False)[:-1] + ', "messages": ['
    comma = "\n"
    if conversation.system:
        yield comma + _dumped({"role": "system", "content": conversation.system})
        comma = ",\n"
    for node in conversation.path:
        yield comma
        yield from _message(node, picture)
        comma = ",\n"
    yield "\n]}\n"


def _dumped(value: object) -> str:
    return json.dumps(value, ensure_ascii=False)


def _message(node: Node, picture: Picture) -> Iterator[str]:
    if not node.pictures:
        yield _dumped({"role": node.role, "content": node.text})
        return
    yield f'{{"role": "{node.role}", "content": ['
    for place, name in enumerate(node.pictures):
        kind = mimetypes.guess_type(name)[0] or "image/png"
        data = base64.b64encode(picture(name)).decode()
        part = {"type": "image_url", "image_url": {"url": f"data:{kind};base64,{data}"}}
        yield (", " if place else "") + _dumped(part)
    if node.text:
        yield ", " + _dumped({"type": "text", "text": node.text})
    yield "]}"


def as_markdown(conversation: SavedConversation, language: str) -> str:
    """Questions as quotations, answers as they are; pictures are named as they lie in the archive
    of `write_archive`."""
    lines = [f"# {_one_line(conversation.title) or 'PhiSight'}", ""]
    if conversation.system:
        lines += [_heading("export_system", language), "", _quoted(conversation.system), ""]
    for node in conversation.path:
        if node.role == "user":
            lines += [_heading("export_question", language), ""]
            lines += [f"![]({FOLDER}/{name})\n" for name in node.pictures]
            lines += [_quoted(node.text), ""] if node.text else []
        else:
            lines += [_heading("export_answer", language), "", node.text, ""]
    return "\n".join(lines)


def _heading(key: str, language: str) -> str:
    return f"**{texts.text(key, language)}**"


def _quoted(text: str) -> str:
    """Text as a quotation in which nothing is Markdown or HTML."""
    return "\n".join(f"> {_literal(line)}".rstrip() for line in text.splitlines())


def _one_line(text: str) -> str:
    return _literal(" ".join(text.split()))


def _literal(text: str) -> str:
    return "".join(f"\\{c}" if c in "\\`*_{}[]<>()#+-!|~" else c for c in text)


def write_archive(
    file: IO[bytes], conversation: SavedConversation, picture: Callable[[str], Path], language: str
) -> None:
    """Write a ZIP archive of the Markdown and its pictures."""
    text = zipfile.ZipInfo("conversation.md", zip_time(conversation.updated))
    text.external_attr = 0o100644 << 16
    with zipfile.ZipFile(file, "w", strict_timestamps=False) as archive:
        archive.writestr(text, as_markdown(conversation, language))
        for name in dict.fromkeys(n for node in conversation.path for n in node.pictures):
            path = picture(name)
            if path.is_file():
                archive.write(path, f"{FOLDER}/{name}")
