"""Write a data file of LLaVA-Instruct-150K's size and form, to measure with: nothing to learn from.

    python -m tools.make_large_json cache/large/data.json --images cache/large/images

158,000 records about 81,000 pictures, about 229 MB: a third each of many short turns, one long
description and one long explanation, as in LLaVA-Instruct-150K. `--broken N` puts N of every kind
of fault into it. The pictures are small JPEGs, each with bytes of its own.
"""

from __future__ import annotations

import io
import json
import random
from collections.abc import Iterator
from pathlib import Path

from PIL import Image, ImageDraw
from tqdm import tqdm

from config import Parser
from errors import PhiSightError, run_main

RECORDS, PICTURES = 158_000, 81_000
TEMPLATES = 64  # drawings that the pictures are made of
THINGS = (
    "man",
    "woman",
    "child",
    "dog",
    "cat",
    "horse",
    "bus",
    "truck",
    "bicycle",
    "motorcycle",
    "kite",
    "surfboard",
    "skateboard",
    "tennis racket",
    "umbrella",
    "backpack",
    "bench",
    "traffic light",
    "fire hydrant",
    "parking meter",
    "pizza",
    "sandwich",
    "cake",
    "laptop",
    "keyboard",
    "vase",
    "teddy bear",
    "toothbrush",
    "refrigerator",
    "dining table",
)
LOOKS = (
    "red",
    "blue",
    "white",
    "black",
    "wooden",
    "small",
    "large",
    "shiny",
    "old",
    "striped",
    "parked",
    "colorful",
    "silver",
    "half-eaten",
    "crowded",
)
PLACES = (
    "on the street",
    "near the beach",
    "in the kitchen",
    "beside the fence",
    "at the park",
    "in front of a building",
    "under a tree",
    "on the left side of the image",
    "in the background",
    "next to the sidewalk",
    "on a sunny day",
    "close to the camera",
)
FORMS = (
    "The image features a {0} {1} {2}.",
    "There is also a {0} {1} {2}.",
    "A {0} {1} can be seen {2}, adding to the liveliness of the scene.",
    "Additionally, a {0} {1} is visible {2}, which suggests a relaxed and social atmosphere.",
    "In the scene, the {0} {1} stands out {2}, drawing the attention of people nearby.",
    "This indicates that the {0} {1} {2} may play an important role in the activity.",
)
QUESTIONS = (
    "What is the color of the {1}?",
    "Is there a {0} {1} {2}?",
    "Where is the {0} {1}?",
    "What is the {1} doing {2}?",
    "How many {0} {1}s are visible in the image?",
)
DETAIL = "Can you describe the main features of this image for me?"
FAULTS = 5  # the kinds of fault in `spoil`


def conversations_of(rng: random.Random, sentences: list[str], questions: list[str]) -> list[dict]:
    """The turns of one record, with `<image>` at either end of the first."""
    kind = rng.random()
    if kind < 0.36:
        pairs = [
            (rng.choice(questions), " ".join(rng.choices(sentences, k=rng.choice((1, 2, 3)))))
            for _ in range(rng.randint(3, 6))
        ]
    else:
        first = DETAIL if kind < 0.5 else rng.choice(questions)
        pairs = [(first, " ".join(rng.choices(sentences, k=rng.randint(11, 21))))]
    turns = []
    for number, (question, answer) in enumerate(pairs):
        if number == 0:
            question = rng.choice((f"<image>\n{question}", f"{question}\n<image>"))
        turns += [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    return turns


def records(count: int, names: list[str], broken: int, seed: int) -> Iterator[dict]:
    """`count` records; every picture is used, and as evenly as may be."""
    rng = random.Random(seed)

    def said(forms: tuple[str, ...], many: int) -> list[str]:
        return [
            rng.choice(forms).format(rng.choice(LOOKS), rng.choice(THINGS), rng.choice(PLACES))
            for _ in range(many)
        ]

    sentences, questions = said(FORMS, 20_000), said(QUESTIONS, 5_000)
    for number in range(count):
        name = names[number % len(names)]
        record = {
            "id": Path(name).stem,
            "image": name,
            "conversations": conversations_of(rng, sentences, questions),
        }
        if number < broken * FAULTS:
            spoil(record, number % FAULTS)
        yield record


def spoil(record: dict, fault: int) -> None:
    """One of the faults that a data file has in the wild."""
    turns = record["conversations"]
    if fault == 0:
        turns.pop()  # a question without its answer
    elif fault == 1:
        turns[0]["value"] += "\n<image>"  # one place more than there are pictures
    elif fault == 2:
        record["image"] = "missing-" + record["image"]
    elif fault == 3:
        turns[1]["from"] = "robot"
    else:
        turns[1]["value"] = " "


def write_json(path: Path, made: Iterator[dict], count: int) -> None:
    """One JSON list, written record by record."""
    with open(path, "w", encoding="utf-8", newline="\n") as file:
        file.write("[")
        for number, record in enumerate(tqdm(made, total=count, desc="records", disable=None)):
            file.write(",\n" if number else "\n")
            json.dump(record, file, ensure_ascii=False)
        file.write("\n]\n")


def write_pictures(folder: Path, names: list[str], broken: int) -> None:
    """Small JPEGs; a comment makes each file's bytes its own. The last `broken` are cut short."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = random.Random(0)
    templates = []
    for _ in range(TEMPLATES):
        picture = Image.new("RGB", (64, 48), tuple(rng.choices(range(256), k=3)))
        corners = (rng.randrange(30), rng.randrange(20), 34 + rng.randrange(30), 44)
        ImageDraw.Draw(picture).ellipse(corners, fill=tuple(rng.choices(range(256), k=3)))
        made = io.BytesIO()
        picture.save(made, "JPEG")
        templates.append(made.getvalue())
    for number, name in enumerate(tqdm(names, desc="pictures", disable=None)):
        body = templates[number % TEMPLATES]
        comment = name.encode()
        marker = b"\xff\xfe" + (len(comment) + 2).to_bytes(2, "big") + comment
        data = body[:2] + marker + body[2:]
        whole = number < len(names) - broken
        (folder / name).write_bytes(data if whole else data[: len(data) // 2])


def main() -> None:
    parser = Parser(prog="make_large_json.py", description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, help="the JSON file to write")
    parser.add_argument("--records", type=int, default=RECORDS)
    parser.add_argument("--pictures", type=int, default=PICTURES, help="distinct pictures")
    parser.add_argument("--images", type=Path, help="write the pictures too, into this folder")
    parser.add_argument("--broken", type=int, default=0, help="faults of every kind")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    if min(options.records, options.pictures) < 1 or options.broken < 0:
        raise PhiSightError("--records and --pictures: must be at least 1, --broken 0 or more")
    names = [f"{7 * number:012d}.jpg" for number in range(1, options.pictures + 1)]
    try:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        write_json(
            options.out,
            records(options.records, names, options.broken, options.seed),
            options.records,
        )
        if options.images:
            write_pictures(options.images, names, options.broken)
    except OSError as error:
        raise PhiSightError(
            f"{options.out}: cannot be written ({error.strerror}); make room or give another path"
        ) from None
    print(f"{options.out}: {options.records:,} records, {options.out.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    run_main(main)
