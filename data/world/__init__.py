"""The picture world of the tiny preset: scenes, their drawings, and conversations about them.

A scene is a handful of coloured shapes on a jittered 3 x 3 grid. All that is said about it is
computed from the scene, so every answer is known exactly. `write_world` puts real files on disk:
PNGs, a JSON in the form of LLaVA-Instruct-150K, and question files in the form of POPE.

    python -m data.world --out cache/world            # what the tiny preset trains on
    python -m data.world --out cache/hard --hard      # free places, more objects, rotation, texture
"""

from data.world.files import questions_of, records_of, world_fields, write_world
from data.world.questions import (
    DETAIL,
    KINDS,
    NUMBERS,
    PLURALS,
    TWO_STEP,
    ask,
    ask_many,
    describe,
    detail,
    with_article,
)
from data.world.scenes import (
    CELL,
    COLOURS,
    HELD_OUT_PAIRS,
    PIXELS,
    PLACES,
    SHAPES,
    SIZES,
    Scene,
    Thing,
    draw,
    make_scene,
)

__all__ = [
    "CELL",
    "COLOURS",
    "DETAIL",
    "HELD_OUT_PAIRS",
    "KINDS",
    "NUMBERS",
    "PIXELS",
    "PLACES",
    "PLURALS",
    "SHAPES",
    "SIZES",
    "TWO_STEP",
    "Scene",
    "Thing",
    "ask",
    "ask_many",
    "describe",
    "detail",
    "draw",
    "make_scene",
    "questions_of",
    "records_of",
    "with_article",
    "world_fields",
    "write_world",
]
