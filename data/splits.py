"""Train and validation, so that no picture is on both sides; and a part of the data.

Which side a picture is on depends on the hash of its name, not on the file's order. Pictures of the
same content go to one side whatever their names; a picture without a copy goes where its name says.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

from errors import PhiSightError


class HasPictures(Protocol):
    """What is split: a conversation, or its outline."""

    @property
    def id(self) -> str: ...

    @property
    def images(self) -> tuple[str, ...]: ...


Pictured = TypeVar("Pictured", bound=HasPictures)


@dataclass(frozen=True, slots=True)
class Outline:
    """A conversation without its text."""

    record: int
    """its place among the records of its source, the bad ones among them"""
    source: int
    id: str
    images: tuple[str, ...]
    sample: int = -1
    """its place among the rendered ones; -1 where it was not rendered"""
    reason: str = ""
    """why it cannot be used, being too long"""
    by_pictures: bool = False
    """it is too long by its pictures alone"""


def split_by_image(
    conversations: Sequence[Pictured],
    fraction: float,
    seed: int,
    content_of: Callable[[str], str] | None = None,
) -> tuple[list[Pictured], list[Pictured]]:
    """Split into (train, validation) so that no picture is on both sides.

    Conversations that share a picture, directly or through others, form a group; a text-only one
    belongs to the group of its id. Pictures are the same that have one name or, where it is given,
    one `content_of` their names, such as the hash of their files. A group goes to validation if the
    hash of the seed and its first name lies below `fraction`: the side depends neither on the
    file's order nor on what else is in the file (unless a new record ties two groups together).
    Each list keeps the given order.
    `fraction` 0 asks for no validation; otherwise each side gets at least one group.

    Raises PhiSightError for a fraction outside [0, 1) or if there are fewer than two groups.
    """
    if not 0 <= fraction < 1:
        raise PhiSightError(f"validation fraction {fraction}: out of range; give 0 <= it < 1")
    if fraction == 0:
        return list(conversations), []
    groups = _group_names(conversations, content_of)
    places = {name: _place_in_unit_interval("split", seed, name) for name in set(groups)}
    if len(places) < 2:
        raise PhiSightError(
            f"validation split: needs at least 2 pictures with separate conversations, found "
            f"{len(places)}; add data, or train without validation, early stopping and a best"
            " checkpoint: --validation-fraction 0"
        )
    # The nearest group goes over where chance left a side empty.
    threshold = max(fraction, math.nextafter(min(places.values()), 1))
    threshold = min(threshold, max(places.values()))
    train: list[Pictured] = []
    validation: list[Pictured] = []
    for conversation, group in zip(conversations, groups):
        (validation if places[group] < threshold else train).append(conversation)
    return train, validation


def take_fraction(
    conversations: Sequence[Pictured], fraction: float, seed: int, purpose: str = "take"
) -> list[Pictured]:
    """Keep about `fraction` of the picture groups (see `split_by_image`), at least one.

    A smaller fraction keeps a subset of what a larger one keeps. The choices for two purposes are
    independent of each other, and of the split's, so that taking first and splitting afterwards
    still gives fair shares.

    Raises PhiSightError for a fraction outside (0, 1].
    """
    if not 0 < fraction <= 1:
        raise PhiSightError(f"data fraction {fraction}: out of range; give 0 < it <= 1")
    groups = _group_names(conversations)
    places = {name: _place_in_unit_interval(purpose, seed, name) for name in set(groups)}
    threshold = max(fraction, math.nextafter(min(places.values(), default=0.0), 1))
    return [c for c, group in zip(conversations, groups) if places[group] < threshold]


def _place_in_unit_interval(purpose: str, seed: int, name: str) -> float:
    """A fixed pseudo-random number in [0, 1) for a name: 53 bits of its hash, exact in a float."""
    digest = hashlib.sha256(f"{purpose}\0{seed}\0{name}".encode()).digest()
    return (int.from_bytes(digest[:8], "big") >> 11) / 2**53


def _group_names(
    conversations: Sequence[Pictured], content_of: Callable[[str], str] | None = None
) -> list[str]:
    """For each conversation the name of its group: the alphabetically first picture in it.

    Union-find over picture names and contents; the smaller name is always the root, so that the
    name of a group does not depend on the order of the records. "same" comes after "image" and
    "id": contents tie groups together and name none.
    """
    parent: dict[str, str] = {}

    def root(name: str) -> str:
        while parent.setdefault(name, name) != name:
            parent[name] = parent[parent[name]]  # halve the path: the next walk is shorter
            name = parent[name]
        return name

    firsts = []
    for conversation in conversations:
        names = [f"image\0{name}" for name in conversation.images] or [f"id\0{conversation.id}"]
        firsts.append(names[0])
        if content_of:
            names += [f"same\0{content_of(name)}" for name in conversation.images]
        for name in names:
            low, high = sorted((root(names[0]), root(name)))
            parent[high] = low
    return [root(first) for first in firsts]
