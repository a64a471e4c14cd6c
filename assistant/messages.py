"""What a person typed -> a message."""

from __future__ import annotations

from collections.abc import Sequence

from data.dataset import IMAGE_TAG, Message, Part
from errors import PhiSightError


def user_message(prompt: str, images: Sequence[str]) -> Message:
    """A user's turn. Each `<image>` in the prompt takes the next picture; without any, the pictures
    come before the text. Raises `PhiSightError` naming both numbers when they differ."""
    try:
        prompt.encode()  # a shell can pass on bytes that are not text, which no tokenizer takes
    except UnicodeEncodeError:
        raise PhiSightError("--prompt: is not valid Unicode; type it as UTF-8") from None
    pieces = prompt.split(IMAGE_TAG)
    if len(pieces) == 1:
        pieces = [""] * len(images) + pieces
    if len(pieces) - 1 != len(images):
        raise PhiSightError(
            f"--prompt: has {len(pieces) - 1} <image> places and {len(images)} pictures are given;"
            " give one --image for each"
        )
    parts = [Part("text", pieces[0])]
    for image, piece in zip(images, pieces[1:], strict=True):
        parts += [Part("image", image), Part("text", piece)]
    kept = tuple(
        Part(p.kind, p.value.strip()) for p in parts if p.kind == "image" or p.value.strip()
    )
    if not kept:
        raise PhiSightError("--prompt: is empty; ask something")
    return Message("user", kept)


def answer_message(text: str) -> Message:
    """What the assistant said, as a turn of the conversation so far."""
    return Message("assistant", (Part("text", text),))
