"""The picture world on disk: PNGs, conversations and questions about them."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tqdm import tqdm

from data.world.questions import KINDS, TWO_STEP, ask, ask_many, detail
from data.world.scenes import Scene, draw, make_scene
from documents import read_json
from errors import PhiSightError
from files import sweep_stale, write_whole


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


def numbered_scene(
    seed: int, split: str, index: int, hard: bool = False
) -> tuple[Scene, str, random.Random]:
    """A scene of a world, the name of its picture, and the generator that drew it, which goes on to
    draw what is asked about it. `split`: "train", "held_out" or "novel_pairs"."""
    rng = random.Random(f"{seed}/{split}/{index}")
    scene = make_scene(rng, "novel" if split == "novel_pairs" else "seen", hard)
    return scene, f"{split}_{index:06d}.png", rng


def settings_in(done: Path) -> dict | None:
    """What a finished world was made with; None where there is none, or none that can be read."""
    try:
        return read_json(done)
    except (OSError, PhiSightError):
        return None


def world_fields(out: Path) -> dict[str, str]:
    """The config fields that name what `write_world` writes, for a run on that world."""
    return {
        "data": str(out / "train.json"),
        "images": str(out / "images"),
        "held_out_questions": str(out / "held_out.jsonl"),
        "novel_pair_questions": str(out / "novel_pairs.jsonl"),
    }


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
    Raises `PhiSightError` where the folder cannot be written to.
    """
    settings = {
        "pictures": pictures,
        "held_out": held_out,
        "seed": seed,
        "turns": turns,
        "hard": hard,
    }
    try:
        _write_world(out, settings)
    except OSError as error:
        raise PhiSightError(
            f"{out}: cannot be written ({error.strerror or error}); make room or give another --out"
        ) from None


def _write_world(out: Path, settings: dict[str, Any]) -> None:
    pictures, held_out, seed, turns, hard = settings.values()
    (out / "images").mkdir(parents=True, exist_ok=True)
    sweep_stale(out, ".tmp-*", by_age=False)
    done = out / "world.json"
    if settings_in(done) == settings:
        print(f"{out}: already there ({pictures} pictures)")
        return
    done.unlink(missing_ok=True)

    def scenes(split: str, count: int) -> Iterator[tuple[Scene, str, random.Random]]:
        for index in tqdm(range(count), desc=f"drawing {split}", unit="picture", disable=None):
            scene, name, rng = numbered_scene(seed, split, index, hard)
            draw(scene).save(out / "images" / name, compress_level=1)
            yield scene, name, rng

    records = [
        record
        for scene, name, rng in scenes("train", pictures)
        for record in records_of(scene, name, rng, turns)
    ]
    write_whole(out / "train.json", json.dumps(records, indent=1).encode())
    for split in ("held_out", "novel_pairs"):
        rows = [
            row
            for scene, name, rng in scenes(split, held_out)
            for row in questions_of(scene, name, rng)
        ]
        lines = [json.dumps({"question_id": i, **row}) for i, row in enumerate(rows)]
        write_whole(out / f"{split}.jsonl", ("\n".join(lines) + "\n").encode())
    write_whole(done, json.dumps(settings).encode())
