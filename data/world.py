"""The picture world of the tiny preset: scenes, their drawings, and conversations about them.

A scene is a handful of coloured shapes on a jittered 3 x 3 grid. All that is said about it is
computed from the scene, so every answer is known exactly. `write_world` puts real files on disk:
PNGs, a JSON in the form of LLaVA-Instruct-150K, and question files in the form of POPE.

    python -m data.world --out cache/world            # what the tiny preset trains on
    python -m data.world --out cache/hard --hard      # free places, more objects, rotation, texture
"""

from __future__ import annotations

import json
import math
import os
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw
from tqdm import tqdm

from config import Parser
from errors import PhiSightError, run_main

SHAPES = ("circle", "square", "triangle", "star", "cross")
COLOURS = {
    "red": (214, 40, 40),
    "green": (44, 150, 62),
    "blue": (40, 84, 204),
    "yellow": (240, 208, 30),
    "purple": (140, 50, 170),
    "orange": (242, 126, 20),
}
SIZES = {"big": 26.0, "small": 13.0}  # diameter in pixels of a 96 pixel picture
PLACES = (
    ("top left", "top middle", "top right"),
    ("middle left", "centre", "middle right"),
    ("bottom left", "bottom middle", "bottom right"),
)
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
PLURALS = {shape: "crosses" if shape == "cross" else shape + "s" for shape in SHAPES}

# Pairs that no training picture shows: neither the CLIP tower's nor the assistant's.
HELD_OUT_PAIRS = frozenset(
    {("star", "purple"), ("circle", "orange"), ("square", "green"), ("triangle", "blue")}
)

PIXELS = 96
CELL = PIXELS / 3
SUPERSAMPLING = 3

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


@dataclass(frozen=True)
class Thing:
    """One coloured shape. `x` and `y` are the centre in pixels, `angle` in degrees."""

    shape: str
    colour: str
    size: str
    x: float
    y: float
    angle: float = 0.0
    texture: str = "plain"

    @property
    def column(self) -> int:
        return min(2, int(self.x // CELL))

    @property
    def row(self) -> int:
        return min(2, int(self.y // CELL))

    @property
    def place(self) -> str:
        return PLACES[self.row][self.column]

    @property
    def pair(self) -> tuple[str, str]:
        return self.shape, self.colour

    def phrase(self) -> str:
        return f"a {self.size} {self.colour} {self.shape} in the {self.place}"


@dataclass(frozen=True)
class Scene:
    """Things in reading order (row, then column) over a tinted background (RGB, 0 to 255)."""

    things: tuple[Thing, ...]
    background: tuple[int, int, int]

    def where(self, **wanted: str) -> list[Thing]:
        """The things whose named attributes all have the wanted values."""
        return [
            thing
            for thing in self.things
            if all(getattr(thing, name) == value for name, value in wanted.items())
        ]

    @property
    def has_held_out_pair(self) -> bool:
        return any(thing.pair in HELD_OUT_PAIRS for thing in self.things)


# -- scenes ---------------------------------------------------------------------------------------


def make_scene(rng: random.Random, pairs: str = "seen", hard: bool = False) -> Scene:
    """Draw one scene. `pairs`: "seen" (no held-out pair), "novel" (at least one), "all"."""
    if pairs not in ("seen", "novel", "all"):
        raise ValueError(f"pairs must be seen, novel or all, not {pairs!r}")
    count = rng.randint(1, 8 if hard else 4)
    centres = _free_centres(rng, count) if hard else _grid_centres(rng, count)
    novel_index = rng.randrange(len(centres)) if pairs == "novel" else -1
    things: list[Thing] = []
    for index, (x, y) in enumerate(centres):
        shape, colour = _draw_pair(rng, things, pairs, must_be_novel=index == novel_index)
        size = rng.choice(list(SIZES))
        slack = (CELL - SIZES[size]) / 2 - 1
        things.append(
            Thing(
                shape,
                colour,
                size,
                x if hard else x + rng.uniform(-slack, slack),
                y if hard else y + rng.uniform(-slack, slack),
                angle=rng.uniform(-30, 30) if hard else 0.0,
                texture=rng.choice(("plain", "stripes", "dots")) if hard else "plain",
            )
        )
    things.sort(key=lambda thing: (thing.row, thing.column, thing.x))
    tint = rng.randint(205, 250)
    background = tuple(max(0, min(255, tint + rng.randint(-14, 14))) for _ in range(3))
    return Scene(tuple(things), background)


def _grid_centres(rng: random.Random, count: int) -> list[tuple[float, float]]:
    cells = rng.sample([(row, column) for row in range(3) for column in range(3)], count)
    return [((column + 0.5) * CELL, (row + 0.5) * CELL) for row, column in cells]


def _free_centres(rng: random.Random, count: int) -> list[tuple[float, float]]:
    """Places anywhere in the picture, at least a big thing's width apart; fewer if it gets full."""
    centres: list[tuple[float, float]] = []
    for _ in range(count * 40):
        x, y = rng.uniform(14, PIXELS - 14), rng.uniform(14, PIXELS - 14)
        if all(math.dist((x, y), other) > SIZES["big"] for other in centres):
            centres.append((x, y))
        if len(centres) == count:
            break
    return centres


def _draw_pair(
    rng: random.Random, former: list[Thing], pairs: str, must_be_novel: bool
) -> tuple[str, str]:
    if must_be_novel:
        return rng.choice(sorted(HELD_OUT_PAIRS))
    while True:
        shape, colour = rng.choice(SHAPES), rng.choice(list(COLOURS))
        if former and rng.random() < 0.35:  # repeats make counting by property worth asking
            twin = rng.choice(former)
            shape, colour = (twin.shape, colour) if rng.random() < 0.5 else (shape, twin.colour)
        if pairs != "seen" or (shape, colour) not in HELD_OUT_PAIRS:
            return shape, colour


# -- drawings -------------------------------------------------------------------------------------


def draw(scene: Scene) -> Image.Image:
    """The scene as a 96 x 96 RGB picture, drawn larger and averaged down for smooth edges."""
    scale = SUPERSAMPLING
    picture = Image.new("RGB", (PIXELS * scale, PIXELS * scale), scene.background)
    for thing in scene.things:
        mask = Image.new("L", picture.size, 0)
        _draw_mask(ImageDraw.Draw(mask), thing, scale)
        fill = Image.new("RGB", picture.size, COLOURS[thing.colour])
        _draw_texture(ImageDraw.Draw(fill), thing, scale)
        picture.paste(fill, (0, 0), mask)
    return picture.reduce(scale)


def _draw_mask(pen: ImageDraw.ImageDraw, thing: Thing, scale: int) -> None:
    radius = SIZES[thing.size] / 2
    if thing.shape == "circle":
        box = [thing.x - radius, thing.y - radius, thing.x + radius, thing.y + radius]
        pen.ellipse([edge * scale for edge in box], fill=255)
        return
    turn = math.radians(thing.angle)
    cosine, sine = math.cos(turn), math.sin(turn)
    pen.polygon(
        [
            (
                (thing.x + radius * (cosine * x - sine * y)) * scale,
                (thing.y + radius * (sine * x + cosine * y)) * scale,
            )
            for x, y in OUTLINES[thing.shape]
        ],
        fill=255,
    )


def _draw_texture(pen: ImageDraw.ImageDraw, thing: Thing, scale: int) -> None:
    if thing.texture == "plain":
        return
    dark = tuple(int(channel * 0.7) for channel in COLOURS[thing.colour])
    side = PIXELS * scale
    for offset in range(0, side, 4 * scale):
        if thing.texture == "stripes":
            pen.line([(0, offset), (side, offset)], fill=dark, width=scale)
        else:
            for other in range(0, side, 4 * scale):
                pen.ellipse([other, offset, other + scale, offset + scale], fill=dark)


def _star_outline() -> list[tuple[float, float]]:
    points = []
    for index in range(10):
        radius = 1.08 if index % 2 == 0 else 0.45
        angle = math.pi * index / 5 - math.pi / 2
        points.append((radius * math.cos(angle), radius * math.sin(angle)))
    return points


# Outlines in units of the radius, y downwards.
_ARM = 0.33
OUTLINES = {
    "square": [(-0.88, -0.88), (0.88, -0.88), (0.88, 0.88), (-0.88, 0.88)],
    "triangle": [(0.0, -1.0), (1.0, 0.85), (-1.0, 0.85)],
    "star": _star_outline(),
    "cross": [
        (-_ARM, -1),
        (_ARM, -1),
        (_ARM, -_ARM),
        (1, -_ARM),
        (1, _ARM),
        (_ARM, _ARM),
        (_ARM, 1),
        (-_ARM, 1),
        (-_ARM, _ARM),
        (-1, _ARM),
        (-1, -_ARM),
        (-_ARM, -_ARM),
    ],
}


# -- what is said ---------------------------------------------------------------------------------


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


def _pick(rng: random.Random, options: list) -> object | None:
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
    # A value that is there more often than not, so that "zero" is no safe guess.
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


def _ask_relation(scene: Scene, rng: random.Random, word: str, axis: str) -> tuple[str, str] | None:
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


# -- files ----------------------------------------------------------------------------------------


def records_of(scene: Scene, name: str, rng: random.Random, turns: int) -> Iterator[dict]:
    """LLaVA's three kinds of record about one picture."""
    conversations = [ask_many(scene, rng, turns), [detail(scene, rng)]]
    two_step = ask(scene, TWO_STEP, rng)
    if two_step is not None:
        conversations.append([two_step])
    for exchanges in conversations:
        messages = []
        for index, (_, question, answer) in enumerate(exchanges):
            # `<image>` stands at the start or the end of the first turn, as in LLaVA-Instruct.
            if index == 0:
                question = rng.choice((f"<image>\n{question}", f"{question}\n<image>"))
            messages += [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
        yield {"id": Path(name).stem, "image": name, "conversations": messages}


def questions_of(scene: Scene, name: str, rng: random.Random) -> list[dict]:
    """Questions about one held-out picture: POPE's form, with the kind beside the label."""
    exchanges = [e for e in (ask(scene, kind, rng) for kind in (*KINDS, TWO_STEP)) if e is not None]
    exchanges.append(detail(scene, rng))
    return [
        {"image": name, "text": question, "label": answer, "kind": kind}
        for kind, question, answer in exchanges
    ]


def write_world(
    out: Path,
    pictures: int = 8000,
    held_out: int = 100,
    seed: int = 0,
    turns: int = 9,
    hard: bool = False,
) -> None:
    """Write `train.json`, `held_out.jsonl`, `novel_pairs.jsonl`, `world.json` and `images/`.

    `world.json` says what was asked for and is written last: a folder without it is unfinished.
    """
    (out / "images").mkdir(parents=True, exist_ok=True)
    settings = {
        "pictures": pictures,
        "held_out": held_out,
        "seed": seed,
        "turns": turns,
        "hard": hard,
    }
    done = out / "world.json"
    if done.exists() and json.loads(done.read_text()) == settings:
        print(f"{out}: already there ({pictures} pictures)")
        return
    done.unlink(missing_ok=True)

    def scenes(split: str, count: int, pairs: str) -> Iterator[tuple[Scene, str, random.Random]]:
        for index in tqdm(range(count), desc=f"drawing {split}", unit="picture", disable=None):
            rng = random.Random(f"{seed}/{split}/{index}")
            scene = make_scene(rng, pairs, hard)
            name = f"{split}_{index:06d}.png"
            draw(scene).save(out / "images" / name, compress_level=1)
            yield scene, name, rng

    records = [
        record
        for scene, name, rng in scenes("train", pictures, "seen")
        for record in records_of(scene, name, rng, turns)
    ]
    _write(out / "train.json", json.dumps(records, indent=1))
    for split, pairs in (("held_out", "seen"), ("novel_pairs", "novel")):
        rows = [
            row
            for scene, name, rng in scenes(split, held_out, pairs)
            for row in questions_of(scene, name, rng)
        ]
        lines = [json.dumps({"question_id": i, **row}) for i, row in enumerate(rows)]
        _write(out / f"{split}.jsonl", "\n".join(lines) + "\n")
    _write(done, json.dumps(settings))


def _write(path: Path, text: str) -> None:
    partial = path.with_suffix(".partial")
    partial.write_text(text)
    os.replace(partial, path)


def main() -> None:
    parser = Parser(prog="data.world", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("cache/world"), help="folder to write")
    parser.add_argument("--pictures", type=int, default=8000, help="training pictures")
    parser.add_argument("--held-out", type=int, default=100, help="pictures a held-out set")
    parser.add_argument("--turns", type=int, default=9, help="most questions a conversation")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--hard", action="store_true", help="free places, more, turned, textured")
    options = parser.parse_args()
    if min(options.pictures, options.held_out, options.turns) < 1:
        raise PhiSightError("--pictures, --held-out and --turns: must be at least 1; ask for more")
    try:
        write_world(
            options.out,
            options.pictures,
            options.held_out,
            options.seed,
            options.turns,
            options.hard,
        )
    except OSError as error:
        raise PhiSightError(
            f"{options.out}: cannot be written ({error.strerror or error}); make room or give"
            " another --out"
        ) from None


if __name__ == "__main__":
    run_main(main)
