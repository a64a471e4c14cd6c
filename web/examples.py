"""Questions to begin with: held-out pictures of the tiny preset's world, drawn when they are
needed, so that they are there where no data has been."""

from __future__ import annotations

import random
from pathlib import Path

from data.examples import Example
from data.world import DETAIL, draw, make_scene, questions_of

# (number of the held-out picture, kind of question): none of these was ever trained on.
CHOSEN = ((5, "colour"), (11, "position"), (4, "count"), (0, DETAIL))


def draw_examples(folder: str | Path) -> list[Example]:
    """Draw the pictures into `folder`; returns the examples about them."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    examples = []
    for number, kind in CHOSEN:
        rng = random.Random(f"0/held_out/{number}")  # as data/world.py draws the tiny preset's
        scene = make_scene(rng, "seen", False)
        path = folder / f"example_{number:02d}.png"
        draw(scene).save(path)
        question = next(q for q in questions_of(scene, path.name, rng) if q["kind"] == kind)
        examples.append(Example(question["text"], str(path)))
    return examples
