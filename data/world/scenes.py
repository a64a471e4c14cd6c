"""Scenes of the picture world, a handful of coloured shapes, and how they are drawn."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping
from dataclasses import dataclass

from PIL import Image, ImageDraw

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

# Pairs that no training picture shows: neither the CLIP tower's nor the assistant's.
HELD_OUT_PAIRS = frozenset(
    {("star", "purple"), ("circle", "orange"), ("square", "green"), ("triangle", "blue")}
)

PIXELS = 96
CELL = PIXELS / 3
SUPERSAMPLING = 3


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
    red, green, blue = (max(0, min(255, tint + rng.randint(-14, 14))) for _ in range(3))
    return Scene(tuple(things), (red, green, blue))


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


def draw(scene: Scene, palette: Mapping[str, tuple[int, int, int]] = COLOURS) -> Image.Image:
    """The scene as a 96 x 96 RGB picture, drawn larger and averaged down for smooth edges.
    `palette`: the name of a colour -> RGB, 0 to 255."""
    scale = SUPERSAMPLING
    picture = Image.new("RGB", (PIXELS * scale, PIXELS * scale), scene.background)
    for thing in scene.things:
        mask = Image.new("L", picture.size, 0)
        _draw_mask(ImageDraw.Draw(mask), thing, scale)
        fill = Image.new("RGB", picture.size, palette[thing.colour])
        _draw_texture(ImageDraw.Draw(fill), thing, palette[thing.colour], scale)
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


def _draw_texture(
    pen: ImageDraw.ImageDraw, thing: Thing, colour: tuple[int, int, int], scale: int
) -> None:
    if thing.texture == "plain":
        return
    dark = tuple(int(channel * 0.7) for channel in colour)
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
