"""Questions to begin with: read from a folder, or about held-out pictures of the tiny preset's
world, drawn when they are needed, so that they are there where no data has been."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from data.world import DETAIL, draw, make_scene, questions_of
from documents import TEXT, json_bytes, read_json, require
from errors import PhiSightError

# (number of the held-out picture, kind of question): none of these was ever trained on.
CHOSEN = ((5, "colour"), (11, "position"), (4, "count"), (0, DETAIL))


@dataclass(frozen=True)
class Example:
    """A question about a picture that lies on the disk."""

    question: str
    picture: str


LISTED = "examples.json"
MOST_BYTES = 2**20  # of that file


def write_examples(folder: Path, examples: Sequence[Example]) -> None:
    """List the examples, whose pictures lie in `folder`, for `read_examples`."""
    listed = [{"question": e.question, "picture": Path(e.picture).name} for e in examples]
    (folder / LISTED).write_bytes(json_bytes(LISTED, {"examples": listed}))


def read_examples(folder: str | Path) -> list[Example]:
    """The examples of a folder: `examples.json` names each one's question and the file of its
    picture beside it. Raises PhiSightError."""
    path = Path(folder) / LISTED
    try:
        listed = read_json(path, MOST_BYTES)
        require(listed, {"examples": [{"question": TEXT, "picture": TEXT}]})
        examples = [Example(e["question"], e["picture"]) for e in listed["examples"]]
        for picture in {e.picture for e in examples}:
            if Path(picture).name != picture or not (path.parent / picture).is_file():
                raise PhiSightError(f"{picture} is not a file beside it")
    except (OSError, PhiSightError) as error:
        raise PhiSightError(f"{path}: {error}; write it again or leave --examples out") from None
    return [replace(e, picture=str(path.parent / e.picture)) for e in examples]


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
