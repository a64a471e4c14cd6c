"""What `make demo` runs: draw the picture world, train the tiny preset, evaluate it, ask it.

Run again, it finds the run finished and only asks and answers.
"""

from __future__ import annotations

from pathlib import Path

import checkpoints
import config as configs
import evaluate
import train
from assistant.assistant import Assistant
from assistant.messages import user_message
from data import world
from data.dataset import Question, load_questions
from errors import run_main

ASKED = ("colour", "position", "count")  # one question of each kind, about three pictures


def chosen_questions(path: str) -> list[Question]:
    """One held-out question of each kind in `ASKED`, each about another picture."""
    chosen: list[Question] = []
    for kind in ASKED:
        used = {question.image for question in chosen}
        chosen.append(
            next(q for q in load_questions(path) if q.kind == kind and q.image not in used)
        )
    return chosen


def is_finished(run: str) -> bool:
    existing = checkpoints.checkpoints_in(run)
    return bool(existing) and bool(checkpoints.resolve(run).trainer_state["finished"])


def main() -> None:
    config = configs.default_config(configs.DEFAULT_PRESET)
    world.write_world(Path(config.data[0]).parent)
    if is_finished(config.run):
        print(f"{config.run}: already trained")
    else:
        train.main(["--resume-if-any"])
        print("\nevaluating on pictures that were held out ...")
        evaluate.main([])
    assistant = Assistant.load(config.run)
    print()
    for question in chosen_questions(config.held_out_questions):
        image = str(Path(config.images[0]) / question.image)
        print(f"{image}\n  {question.text}")
        answer = "".join(assistant.reply([user_message(question.text, [image])]))
        print(f"  -> {answer}   (right answer: {question.answer})")
    print(f"""
next:
  python infer.py --image {image} --prompt "Describe the picture in detail."
  python evaluate.py
  python checkpoints.py show {config.run}
  python train.py --run runs/mine --stop-at-step 100; python train.py --run runs/mine --resume
(with .venv/bin on the PATH: source .venv/bin/activate)""")


if __name__ == "__main__":
    run_main(main)
