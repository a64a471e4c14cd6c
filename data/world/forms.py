"""Sets of questions about a world's held-out pictures in the forms of POPE, VQA v2, GQA and COCO
captions, so that every task of `evaluate.py` runs from end to end with nothing downloaded.

    python -m data.world.forms --world cache/world      # writes cache/world/tasks

They are made of the scenes that the pictures were drawn from, with a generator of each picture's
own: a world has one set of each form, byte for byte.
"""

from __future__ import annotations

import argparse
import json
import random
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from config import Parser
from data.world.files import numbered_scene, settings_in
from data.world.questions import KINDS, NUMBERS, ask, describe, with_article
from data.world.scenes import COLOURS, HELD_OUT_PAIRS, SHAPES, Scene, draw
from errors import PhiSightError, run_main
from files import sweep_stale, write_whole
from paths import command, located

VERSION = 1  # of the sets; a world whose sets are of another one gets them anew
FOLDER, DONE = "tasks", "tasks.json"
SPLIT = "held_out"
ASKED_FOR = 3  # things that are there, and as many that are not, about a picture at most (POPE)
PEOPLE = 10  # answers to a question of VQA

Pair = tuple[str, str]  # (shape, colour)
Pictured = tuple[Scene, str, str]
"""A scene, the name of its picture, and what its generators are seeded with"""
PAIRS: list[Pair] = [
    (shape, colour)
    for shape in SHAPES
    for colour in COLOURS
    if (shape, colour) not in HELD_OUT_PAIRS  # "no" to all of them would be a lesson
]


def forms_beside(images: str | Path) -> Path:
    """The folder of the sets about the world whose pictures lie in `images`, made where it is not
    there yet.

    Raises:
        PhiSightError: there is no such world, its pictures are not of its scenes, or the sets
            cannot be written.
    """
    world = Path(images).parent
    settings = settings_in(world / "world.json") if images else None
    if settings is None:
        raise PhiSightError(
            f"--data: not given, and {world} is no picture world to make a set of; give --data"
            f" FILE, or make a world with: {command('-m data.world')}"
        )
    try:
        return write_forms(world, settings)
    except OSError as error:
        raise PhiSightError(
            f"{world / FOLDER}: cannot be written ({error.strerror or error}); make room, or write"
            f" the sets elsewhere with: {command('-m data.world.forms')} --out FOLDER"
        ) from None


def write_forms(world: Path, settings: dict, out: Path | None = None) -> Path:
    """Write every set, `tasks.json` last; nothing where they are there already. Returns the
    folder."""
    out = world / FOLDER if out is None else out
    wanted = {"version": VERSION, "world": settings}
    if settings_in(out / DONE) == wanted:
        return out
    pictured = _scenes(world, settings)
    out.mkdir(parents=True, exist_ok=True)
    sweep_stale(out, ".tmp-*", by_age=False)
    (out / DONE).unlink(missing_ok=True)
    for sampling in SAMPLINGS:
        rows = pope(pictured, sampling)
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        write_whole(out / f"pope_{sampling}.json", lines.encode())
    questions, annotations = vqa(pictured)
    wholes = {"vqa_questions": questions, "vqa_annotations": annotations}
    wholes |= {"gqa": gqa(pictured), "captions": captions(pictured)}
    for name, whole in wholes.items():
        write_whole(out / f"{name}.json", (json.dumps(whole, indent=1) + "\n").encode())
    write_whole(out / DONE, json.dumps(wanted).encode())
    return out


def _scenes(world: Path, settings: dict) -> list[Pictured]:
    """The scenes of a world's held-out pictures, which must be those that the pictures show: an
    older program may have drawn them otherwise."""
    try:
        seed, count, hard = settings["seed"], int(settings["held_out"]), bool(settings["hard"])
    except (LookupError, TypeError, ValueError):
        raise PhiSightError(
            f"{world / 'world.json'}: does not say what the world was made with; make it again"
        ) from None
    pictured = []
    for index in range(count):
        scene, name, _ = numbered_scene(seed, SPLIT, index, hard)
        try:
            with Image.open(world / "images" / name) as picture:
                same = picture.convert("RGB").tobytes() == draw(scene).tobytes()
        except OSError as error:
            reason = error.strerror or "not a picture"
            raise PhiSightError(
                f"{world / 'images' / name}: {reason}; make the world again, in a new folder"
            ) from None
        if not same:
            raise PhiSightError(
                f"{world / 'images' / name}: is not the picture that its scene gives now; make the"
                " world again, in a new folder"
            )
        pictured.append((scene, name, f"{seed}/{SPLIT}/{index}"))
    return pictured


# -- POPE -----------------------------------------------------------------------------------------


def _at_random(scene: Scene, frequent: Sequence[Pair], rng: random.Random) -> list[Pair]:
    return rng.sample(frequent, len(frequent))


def _popular(scene: Scene, frequent: Sequence[Pair], rng: random.Random) -> list[Pair]:
    """What other pictures show most often comes first."""
    return list(frequent)


def _adversarial(scene: Scene, frequent: Sequence[Pair], rng: random.Random) -> list[Pair]:
    """A shape and a colour that are both there, on different things, come first; then what shares
    one of them with something. Who binds a colour to the wrong thing says yes."""
    shapes = {thing.shape for thing in scene.things}
    colours = {thing.colour for thing in scene.things}
    drawn = rng.sample(frequent, len(frequent))
    return sorted(drawn, key=lambda pair: -((pair[0] in shapes) + (pair[1] in colours)))


Sampling = Callable[[Scene, Sequence[Pair], random.Random], list[Pair]]
SAMPLINGS: dict[str, Sampling] = {
    "random": _at_random,
    "popular": _popular,
    "adversarial": _adversarial,
}


def pope(pictured: Sequence[Pictured], sampling: str) -> list[dict[str, Any]]:
    """Is it there? As many times yes as no about each picture. `sampling`: which of the things that
    are not there are asked for, a name of `SAMPLINGS`."""
    shown = Counter(pair for scene, _, _ in pictured for pair in {t.pair for t in scene.things})
    frequent = sorted(PAIRS, key=lambda pair: (-shown[pair], pair))
    rows: list[dict[str, Any]] = []
    for scene, name, key in pictured:
        all_there = {thing.pair for thing in scene.things}
        there = sorted(all_there & set(PAIRS))
        there = random.Random(f"{key}/there").sample(there, min(ASKED_FOR, len(there)))
        absent = [pair for pair in frequent if pair not in all_there]
        others = SAMPLINGS[sampling](scene, absent, random.Random(f"{key}/{sampling}"))
        for yes, no in zip(there, others):
            for (shape, colour), label in ((yes, "yes"), (no, "no")):
                question = f"Is there {with_article(f'{colour} {shape}')}?"
                number = len(rows) + 1
                row = {"question_id": number, "image": name, "text": question, "label": label}
                rows.append(row)
    return rows


# -- VQA v2 and GQA -------------------------------------------------------------------------------


def _exchanges(pictured: Pictured) -> list[tuple[str, str, str]]:
    """One question of every kind that a scene allows, each time the same."""
    scene, _, key = pictured
    rng = random.Random(f"{key}/questions")
    asked = (ask(scene, kind, rng) for kind in KINDS)
    return [exchange for exchange in asked if exchange is not None]


def answer_type(answer: str) -> str:
    """As VQA has it."""
    if answer in ("yes", "no"):
        return "yes/no"
    return "number" if answer in NUMBERS else "other"


def vqa(pictured: Sequence[Pictured]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Questions and annotations as VQA v2 has them, with each picture's file in `image`. The ten
    answers agree; those of a number are given in words by most and in digits by some, which are the
    same after normalisation."""
    questions: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for place, one in enumerate(pictured):
        for kind, question, answer in _exchanges(one):
            identity = {"question_id": 1000 * place + len(questions), "image_id": place}
            questions.append(identity | {"image": one[1], "question": question})
            digits = str(NUMBERS.index(answer)) if answer in NUMBERS else answer
            given = [answer if person < 7 else digits for person in range(PEOPLE)]
            annotations.append(
                identity
                | {
                    "question_type": kind,
                    "answer_type": answer_type(answer),
                    "multiple_choice_answer": answer,
                    "answers": [
                        {"answer_id": number, "answer": text, "answer_confidence": "yes"}
                        for number, text in enumerate(given, 1)
                    ],
                }
            )
    about = {"data_type": "world", "data_subtype": SPLIT}
    return about | {"questions": questions}, about | {"annotations": annotations}


def gqa(pictured: Sequence[Pictured]) -> dict[str, Any]:
    """The same questions as GQA has them."""
    return {
        f"{place:06d}-{kind}": {
            "imageId": one[1],
            "question": question,
            "answer": answer,
            "types": {"semantic": kind},
        }
        for place, one in enumerate(pictured)
        for kind, question, answer in _exchanges(one)
    }


# -- captions -------------------------------------------------------------------------------------


def captions(pictured: Sequence[Pictured]) -> dict[str, Any]:
    """Three descriptions of every picture, as COCO has them."""
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for place, (scene, name, _) in enumerate(pictured):
        images.append({"id": place, "file_name": name})
        phrases = [thing.phrase() for thing in scene.things]
        backwards = " and ".join(reversed(phrases))
        for caption in (
            describe(scene),
            f"There {'is' if len(phrases) == 1 else 'are'} {' and '.join(phrases)}.",
            f"{backwards[0].upper()}{backwards[1:]}.",
        ):
            annotations.append({"id": len(annotations), "image_id": place, "caption": caption})
    return {"images": images, "annotations": annotations}


def main(arguments: list[str] | None = None) -> int:
    parser = Parser(
        prog="data.world.forms",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--world", type=Path, default=Path(located("cache/world")))
    parser.add_argument("--out", type=Path, help="folder to write, if not tasks in the world's")
    options = parser.parse_args(arguments)
    if options.out is None:
        print(forms_beside(options.world / "images"))
        return 0
    settings = settings_in(options.world / "world.json")
    if settings is None:
        raise PhiSightError(f"{options.world}: is no picture world; give --world FOLDER")
    try:
        print(write_forms(options.world, settings, options.out))
    except OSError as error:
        raise PhiSightError(
            f"{options.out}: cannot be written ({error.strerror or error}); give another --out"
        ) from None
    return 0


if __name__ == "__main__":
    run_main(main)
