"""A turn's words and pictures: text with `<image>` in it, or a list of parts, in one form.

Both become pieces in their order: ("text", words), ("image", the picture's name), and ("mark", "")
where a picture belongs that the record names elsewhere.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import PurePosixPath, PureWindowsPath
from typing import Any

from data.record_keys import (
    NOT_DONE,
    PART_KEYS,
    PICTURE_KEYS,
    UNLIKE_PICTURES,
    BadRecord,
    check_keys,
    checked_text,
    named,
    says_learn,
)
from data.stream import kind_of

IMAGE_TAG = "<image>"
Piece = tuple[str, str]
MARK: Piece = ("mark", "")

# What other programs put in a text for something that is not there; no such word is written by
# people, but <video> and <audio> are HTML, so that an answer may hold them.
OTHER_MARKS = {
    "user": re.compile(r"<(?:video|audio|speech|sound|bbox|ref-object)>"),
    "system": re.compile(r"<(?:video|audio|speech|sound|bbox|ref-object)>"),
    "assistant": re.compile(r"<(?:bbox|ref-object)>"),
}
# Other spellings of `<image>`, such as <|image_1|>: a picture would stand beside them.
OTHER_IMAGE_MARK = re.compile(
    r"<\|?/?\s*(?:image|img|picture|photo|im_(?:start|end|patch))[\w\s-]*\|?>|\[(?:image|img)\]",
    re.IGNORECASE,
)
TEXT_TYPES, IMAGE_TYPES = (
    ("text", "input_text", "output_text"),
    ("image", "image_url", "input_image"),
)
NAME_KEYS = ("image", "image_url", "path", "url")
NAME_BYTES, STEP_BYTES = 4096, 255  # of a path and of each name in it: what Linux takes
CONTROL = re.compile(r"[\x01-\x1f\x7f-\x9f]")


# --- pictures' names ----------------------------------------------------------------------------


def picture_names_of(fields: Mapping[str, Any]) -> list[str]:
    """The pictures under `image` or `images` of a record or of a turn: one, a list, or none."""
    given = [fields[key] for key in PICTURE_KEYS if fields.get(key) is not None]
    if len(given) == 2:
        raise BadRecord("it has both `image` and `images`")
    if not given or given[0] == "":  # as LLaVA's text-only records have it
        return []
    return [picture_name(name) for name in (given[0] if isinstance(given[0], list) else given)]


def picture_name(name: object) -> str:
    """A clean path: `a.jpg`, `./a.jpg` and `.\\a.jpg` are one picture and must get one name.

    It is relative, or absolute on this system; where it leads is checked by `Pictures.named`. A
    `data:` address, which holds the picture, stays as it is.
    """
    if not isinstance(name, str):
        raise BadRecord(f"a picture's name is {kind_of(name)}, not text")
    checked_text(name, "picture's name")
    if name[:5].lower() == "data:":
        return name  # the picture itself, which `Pictures.named` unpacks
    shown = f"{name!r:.100}"
    if "://" in name:
        raise BadRecord(f"the picture {shown} is a web address, not a file in the image folder")
    path = PurePosixPath(name.replace("\\", "/"))  # as a record written on Windows has it
    if "\0" in name or not path.name:
        raise BadRecord(f"the picture's name {shown} is not a file name")
    elsewhere = PureWindowsPath(name).anchor and not os.path.isabs(name)  # C:\\..., not on Windows
    if elsewhere or ".." in path.parts:
        raise BadRecord(f"the picture {shown} lies outside the image folder")
    if CONTROL.search(name):
        raise BadRecord(f"the picture's name {shown} has a control character in it")
    if len(name.encode()) > NAME_BYTES or any(len(p.encode()) > STEP_BYTES for p in path.parts):
        raise BadRecord(f"the picture's name {shown} is longer than a file's can be")
    return str(path)


# --- a turn -------------------------------------------------------------------------------------


def pieces_of_turn(turn: Mapping[str, Any], key: str, role: str, what: str) -> list[Piece]:
    """What one turn says under `key`, with its own pictures (`image` beside the text) in place.

    Only in the user's words `<image>` marks a picture: in others' it is a word.
    """
    pieces = list(_pieces(turn.get(key), key, what, has_marks=role == "user"))
    for kind, value in pieces:
        if kind == "text" and (mark := OTHER_MARKS[role].search(value)):
            raise BadRecord(
                f"{what}: {mark[0]} in the text, where only {IMAGE_TAG} is read", NOT_DONE
            )
    own = picture_names_of(turn)
    return placed(pieces, own, what) if own else pieces


def _pieces(content: object, key: str, what: str, has_marks: bool) -> Iterator[Piece]:
    if isinstance(content, str):
        yield from _cut(checked_text(content, f"text of {what}"), has_marks)
        return
    if not isinstance(content, list):
        raise BadRecord(f"{what}: `{key}` is {kind_of(content)}, not text")
    if not content:
        raise BadRecord(f"{what}: `{key}` is empty")
    for number, part in enumerate(content, start=1):
        yield from _part_pieces(part, f"part {number} of {what}", has_marks)


def _cut(text: str, has_marks: bool) -> Iterator[Piece]:
    """The text between the marks, stripped, and the marks."""
    for number, words in enumerate(text.split(IMAGE_TAG) if has_marks else [text]):
        if number:
            yield MARK
        if words.strip():
            yield "text", words.strip()


def _part_pieces(part: object, what: str, has_marks: bool) -> Iterator[Piece]:
    """One part: {"type": "text", "text": ...}, or {"type": "image"} with a name or without."""
    if not isinstance(part, dict):
        raise BadRecord(f"{what} is {kind_of(part)}, not an object")
    names = [part[key] for key in NAME_KEYS if part.get(key) is not None]
    check_keys(part, what, bool(names), PART_KEYS)
    if says_learn(part, what) is not None:
        raise BadRecord(f"{what} says whether it is learnt; only a whole turn can", NOT_DONE)
    text, kind = part.get("text"), part.get("type")
    if kind is None:  # as Qwen-VL writes it: {"image": ...} or {"text": ...}
        kind = "image" if names else "text"
    if not isinstance(kind, str) or kind not in (*TEXT_TYPES, *IMAGE_TYPES):
        shown = named(kind) if isinstance(kind, str) else kind_of(kind)
        raise BadRecord(f"{what} is of the type {shown}; only text and image are read", NOT_DONE)
    if kind in TEXT_TYPES:
        if names:
            raise BadRecord(f"{what} is of the type {kind} and names a picture")
        if not isinstance(text, str):
            raise BadRecord(f"{what}: `text` is {kind_of(text)}, not text")
        yield from _cut(checked_text(text, f"text of {what}"), has_marks)
    elif len(names) > 1 or text not in (None, ""):
        raise BadRecord(f"{what} holds more than one picture; give each thing a part of its own")
    elif names:
        name = names[0]
        yield "image", picture_name(name.get("url") if isinstance(name, dict) else name)
    else:
        index = part.get("index")  # as TRL writes it: which picture of the record
        yield "mark", "" if index is None else str(index)


# --- the pictures of a record, in the turns -----------------------------------------------------


def placed(pieces: Sequence[Piece], names: Sequence[str], what: str) -> list[Piece]:
    """The pictures in the places of the marks, in their order; before all where there is no mark.

    Raises BadRecord if they are not as many.
    """
    marks = [value for kind, value in pieces if kind == "mark"]
    if names and not marks:
        for kind, value in pieces:
            if kind == "text" and (other := OTHER_IMAGE_MARK.search(value)):
                raise BadRecord(
                    f"{what}: {named(other[0])} in the text, where only {IMAGE_TAG} is read",
                    UNLIKE_PICTURES,
                )
        return [*(("image", name) for name in names), *pieces]
    if len(marks) != len(names):
        raise BadRecord(
            f"{len(names)} picture(s) but {len(marks)} {IMAGE_TAG} in the text", UNLIKE_PICTURES
        )
    if any(value not in ("", str(place)) for place, value in enumerate(marks)):
        raise BadRecord("its parts take the pictures in another order than they are named in")
    remaining = iter(names)
    return [
        ("image", next(remaining)) if kind == "mark" else (kind, value) for kind, value in pieces
    ]


def place_pictures(turns: Sequence[Sequence[Piece]], names: Sequence[str]) -> list[list[Piece]]:
    """The user's turns with the pictures of their record in them, as `placed` does it; what comes
    before all comes before the first of them."""
    everything = [piece for turn in turns for piece in turn]
    in_parts = [value for kind, value in everything if kind == "image"]
    has_marks = any(kind == "mark" for kind, _ in everything)
    if in_parts and names and not has_marks:
        if in_parts != list(names):
            raise BadRecord("its turns name other pictures than the record does", UNLIKE_PICTURES)
        names = ()  # said twice
    filled = placed(everything, names, "the record")
    before = filled[: len(filled) - len(everything)]
    rest = iter(filled[len(before) :])
    result = [list(islice(rest, len(turn))) for turn in turns]
    result[0] = before + result[0]
    return result
