"""What is asked about a scene, with the answers that are right, computed from the scene."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Literal, TypeVar

from data.world.scenes import COLOURS, HELD_OUT_PAIRS, SHAPES, SIZES, Scene, Thing

NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
PLURALS = {shape: "crosses" if shape == "cross" else shape + "s" for shape in SHAPES}

KINDS = (
    "colour",
    "shape",
    "size",
    "count",
    "count_by_property",
    "existence",
    "position",
    "left_of",
    "above",
)
TWO_STEP = "two_step"
DETAIL = "detail"

Exchange = tuple[str, str, str]  # (kind, question, answer)

Option = TypeVar("Option")


def with_article(words: str) -> str:
    return ("an " if words[0] in "aeiou" else "a ") + words


def describe(scene: Scene) -> str:
    """The detailed description: every thing with every attribute, in reading order."""
    phrases = [thing.phrase() for thing in scene.things]
    noun = "object" if len(phrases) == 1 else "objects"
    listed = phrases[0] if len(phrases) == 1 else ", ".join(phrases[:-1]) + " and " + phrases[-1]
    return f"The picture shows {NUMBERS[len(phrases)]} {noun}: {listed}."


def detail(scene: Scene, rng: random.Random) -> Exchange:
    question = rng.choice(
        (
            "Describe the picture in detail.",
            "What does the picture show?",
            "Give a detailed description of the picture.",
        )
    )
    return DETAIL, question, describe(scene)


def ask(scene: Scene, kind: str, rng: random.Random) -> Exchange | None:
    """One question of `kind` with its answer, or None where the scene does not allow the kind."""
    made = _ASKERS[kind](scene, rng)
    return None if made is None else (kind, *made)


def ask_many(scene: Scene, rng: random.Random, count: int) -> list[Exchange]:
    """Up to `count` different one-step questions, the kinds as even as the scene allows."""
    exchanges: list[Exchange] = []
    asked: set[str] = set()
    for _ in range(3):  # scenes with one thing run out of some kinds
        for kind in rng.sample(KINDS, len(KINDS)):
            exchange = ask(scene, kind, rng)
            if exchange is not None and exchange[1] not in asked:
                asked.add(exchange[1])
                exchanges.append(exchange)
            if len(exchanges) == count:
                return exchanges
    return exchanges


def _names(scene: Scene) -> list[tuple[str, Thing]]:
    """Every way to name exactly one thing: "the star", "the red object"."""
    names = []
    for thing in scene.things:
        if len(scene.where(shape=thing.shape)) == 1:
            names.append((f"the {thing.shape}", thing))
        if len(scene.where(colour=thing.colour)) == 1:
            names.append((f"the {thing.colour} object", thing))
    return names


def _pick(rng: random.Random, options: Sequence[Option]) -> Option | None:
    return rng.choice(options) if options else None


def _ask_colour(scene: Scene, rng: random.Random) -> tuple[str, str] | None:
    picked = _pick(rng, [t for t in scene.things if len(scene.where(shape=t.shape)) == 1])
    if picked is None:
        return None
    form = rng.choice(("What colour is the {}?", "What is the colour of the {}?"))
    return form.format(picked.shape), picked.colour


def _ask_shape(scene: Scene, rng: random.Random) -> tuple[str, str] | None:
    options = [
        (f"What shape is the {t.colour} object?", t.shape)
        for t in scene.things
        if len(scene.where(colour=t.colour)) == 1
    ]
    options += [
        (f"What shape is in the {t.place}?", t.shape)
        for t in scene.things
        if len(scene.where(place=t.place)) == 1
    ]
    return _pick(rng, options)


def _ask_size(scene: Scene, rng: random.Random) -> tuple[str, str] | None:
    picked = _pick(rng, _names(scene))
    if picked is None:
        return None
    name, thing = picked
    return rng.choice(("Is {} big or small?", "What size is {}?")).format(name), thing.size


def _ask_count(scene: Scene, rng: random.Random) -> tuple[str, str]:
    form = rng.choice(("How many objects are there?", "How many objects does the picture show?"))
    return form, NUMBERS[len(scene.things)]


def _ask_count_by_property(scene: Scene, rng: random.Random) -> tuple[str, str]:
    attribute = rng.choice(("shape", "colour", "size"))
    values = {"shape": list(SHAPES), "colour": list(COLOURS), "size": list(SIZES)}[attribute]
    present = [getattr(thing, attribute) for thing in scene.things]
    # A value that is there more often than not, so that "zero" is a poor guess.
    value = rng.choice(present if rng.random() < 0.7 else values)
    noun = PLURALS[value] if attribute == "shape" else f"{value} objects"
    return f"How many {noun} are there?", NUMBERS[present.count(value)]


def _ask_existence(scene: Scene, rng: random.Random) -> tuple[str, str]:
    """Yes and no equally often; a "no" differs from something shown in one attribute."""
    thing = rng.choice(scene.things)
    shape, colour = thing.pair
    answer = "yes"
    if rng.random() >= 0.5:
        options = [(other, colour) for other in SHAPES] + [(shape, other) for other in COLOURS]
        shown = {t.pair for t in scene.things}
        # Held-out pairs are not asked for either: "no" to all of them would be a lesson.
        options = [o for o in options if o not in shown and o not in HELD_OUT_PAIRS]
        if options:  # a crowded scene may show them all
            answer = "no"
            shape, colour = rng.choice(options)
    return f"Is there {with_article(f'{colour} {shape}')}?", answer


def _ask_position(scene: Scene, rng: random.Random) -> tuple[str, str] | None:
    picked = _pick(rng, _names(scene))
    if picked is None:
        return None
    name, thing = picked
    return f"Where is {name}?", thing.place


def _ask_relation(
    scene: Scene, rng: random.Random, word: str, axis: Literal["column", "row"]
) -> tuple[str, str] | None:
    names = _names(scene)
    options = [
        (first, second)
        for first in names
        for second in names
        if getattr(first[1], axis) != getattr(second[1], axis)
        and first[0].endswith("object") == second[0].endswith("object")
    ]
    picked = _pick(rng, options)
    if picked is None:
        return None
    (first_name, first), (second_name, second) = picked
    answer = "yes" if getattr(first, axis) < getattr(second, axis) else "no"
    return f"Is {first_name} {word} {second_name}?", answer


def _ask_left_of(scene: Scene, rng: random.Random) -> tuple[str, str] | None:
    return _ask_relation(scene, rng, "left of", "column")


def _ask_above(scene: Scene, rng: random.Random) -> tuple[str, str] | None:
    return _ask_relation(scene, rng, "above", "row")


def _ask_two_step(scene: Scene, rng: random.Random) -> tuple[str, str] | None:
    """ "What colour is the shape left of the star?": find one thing by another, then its colour."""
    options = []
    for word, axis, sign in (
        ("left of", "column", -1),
        ("right of", "column", 1),
        ("above", "row", -1),
        ("below", "row", 1),
    ):
        for name, anchor in _names(scene):
            if name.endswith("object"):
                continue
            beside = [
                t for t in scene.things if (getattr(t, axis) - getattr(anchor, axis)) * sign > 0
            ]
            if len(beside) == 1:
                options.append((f"What colour is the shape {word} {name}?", beside[0].colour))
    return _pick(rng, options)


_ASKERS = {
    "colour": _ask_colour,
    "shape": _ask_shape,
    "size": _ask_size,
    "count": _ask_count,
    "count_by_property": _ask_count_by_property,
    "existence": _ask_existence,
    "position": _ask_position,
    "left_of": _ask_left_of,
    "above": _ask_above,
    TWO_STEP: _ask_two_step,
}
