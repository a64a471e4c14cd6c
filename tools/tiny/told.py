"""Scenes of the picture world told in words, and the lessons that the base learns to read by."""

from __future__ import annotations

import random
from dataclasses import dataclass

from data import world

EMPTY = "nothing"
Turn = tuple[str, str, str]  # kind, user text, answer


def code_word(thing: world.Thing) -> str:
    """Everything about a thing in one word of the tokenizer: "bigredstartopleft"."""
    return f"{thing.size}{thing.colour}{thing.shape}{thing.place.replace(' ', '')}"


def every_thing() -> list[world.Thing]:
    """One thing of every shape, colour, size and place."""
    return [
        world.Thing(shape, colour, size, (column + 0.5) * world.CELL, (row + 0.5) * world.CELL)
        for shape in world.SHAPES
        for colour in world.COLOURS
        for size in world.SIZES
        for row in range(3)
        for column in range(3)
    ]


def tell(scene: world.Scene, rng: random.Random, told: str, fewest: int = 2) -> str:
    """The scene in words, one of four ways, so that the base learns to read and not to match.

    Two are prose, for `told` "any" only. Two are shorthand with one word a thing: a list ("list"
    tells this way alone), and a raster of 6 x 6 words in which a thing fills some of the four
    places of its cell, `fewest` of them or more. Reading a raster takes what reading patches takes:
    find the word that fits, count things and not words, skip what is empty.
    """
    if told == "any" and rng.random() < 0.2:
        if rng.random() < 0.5:
            return world.describe(scene)
        phrases = [f"{t.place}: {t.size} {t.colour} {t.shape}" for t in scene.things]
        return "; ".join(phrases) + "."
    if told == "list" or rng.random() < 0.25:
        return " ".join(code_word(thing) for thing in scene.things)
    raster = [EMPTY] * 36
    for thing in scene.things:
        corner = 12 * thing.row + 2 * thing.column
        places = [corner, corner + 1, corner + 6, corner + 7]
        for place in rng.sample(places, rng.randint(fewest, 4)):
            raster[place] = code_word(thing)
    return " ".join(raster)


@dataclass(frozen=True)
class Lesson:
    """One part of the base's curriculum: how scenes are told, what is asked, how many turns.

    Without `kinds` everything is asked, descriptions and two-step questions too; `review` asks more
    of what takes several steps: counting some of the things, finding one by another, telling all.
    """

    told: str
    kinds: tuple[str, ...]
    turns: int
    review: bool = False


# Looking up one attribute by another is what every other kind builds on, and it is learnt at once
# or hardly at all: asked alone, about a short list, "colour" is right after 400 steps; with all
# kinds asked from the start it takes ten thousand (benchmarks/RESULTS.md). So the kinds come one
# after another, simplest first (curriculum learning, Bengio et al. 2009).
LOOK_UPS = ("colour", "shape", "size", "position")
LESSONS = (
    Lesson("list", ("colour",), 4),
    Lesson("list", ("colour", "shape"), 8),
    Lesson("list", LOOK_UPS, 10),
    Lesson("shorthand", LOOK_UPS, 10),
    Lesson("list", ("left_of", "above"), 10),
    Lesson("list", ("left_of", "above", "count_by_property", "existence"), 10),
    Lesson("shorthand", world.KINDS, 10),
    Lesson("any", (), 10),
)
# What the lessons leave half learnt, asked evenly: after them 43 % of the descriptions, 71 % of the
# two-step questions and 86 % of the counts by property are right, and 96 % of the rest.
REVIEW = Lesson("any", (), 10, review=True)
REVIEWED = (world.TWO_STEP, world.TWO_STEP, "count_by_property", "count_by_property", "existence")
PASSED = 90.0  # percent of its own questions that ends a lesson


def text_conversation(rng: random.Random, lesson: Lesson) -> list[Turn]:
    """(kind, user text, answer) turns about one scene; the first user turn tells the scene."""
    exchanges: list[Turn] = []
    while not exchanges:
        scene = world.make_scene(rng, "all")
        if not lesson.kinds:
            exchanges = world.ask_many(scene, rng, lesson.turns)
        elif len(scene.things) > 1:  # one thing alone leaves nothing to tell apart
            drawn = [
                world.ask(scene, rng.choice(lesson.kinds), rng) for _ in range(3 * lesson.turns)
            ]
            unique = {exchange[1]: exchange for exchange in drawn if exchange is not None}
            exchanges = list(unique.values())[: lesson.turns]
    if lesson.review:
        more = [world.ask(scene, kind, rng) for kind in REVIEWED if rng.random() < 0.8]
        more += [world.detail(scene, rng)] if rng.random() < 0.5 else []
        asked = {exchange[1] for exchange in exchanges}
        for exchange in more:
            if exchange is not None and exchange[1] not in asked:
                asked.add(exchange[1])
                exchanges.insert(rng.randint(0, len(exchanges)), exchange)
    elif not lesson.kinds:
        two_step = world.ask(scene, world.TWO_STEP, rng)
        if two_step is not None and rng.random() < 0.7:
            exchanges.insert(rng.randint(0, len(exchanges)), two_step)
        if rng.random() < 0.2:
            exchanges.insert(rng.randint(0, len(exchanges)), world.detail(scene, rng))
    kind, question, answer = exchanges[0]
    told = tell(scene, rng, lesson.told, fewest=1 if lesson.review else 2)
    # The lessons tell first and ask then, as do half of the conversations that follow them.
    first = f"{told}\n{question}"
    if not lesson.kinds and rng.random() < 0.5:
        first = f"{question}\n{told}"
    return [(kind, first, answer), *exchanges[1:]]
