"""What `make demo` runs: draw the picture world, train the tiny preset, evaluate it, ask it.

Run again, it finds the run finished and only asks and answers.
"""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import checkpoints  # noqa: E402
import config as configs  # noqa: E402
import evaluate  # noqa: E402
import train  # noqa: E402
from assistant.assistant import Assistant  # noqa: E402
from assistant.messages import user_message  # noqa: E402
from data import world  # noqa: E402
from data.dataset import Question, load_questions  # noqa: E402
from errors import run_main  # noqa: E402

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
    world.write_world(Path(config.data).parent)
    if is_finished(config.run):
        print(f"{config.run}: already trained")
    else:
        train.main(["--resume-if-any"])
        print("\nevaluating on pictures that were held out ...")
        evaluate.main([])
    assistant = Assistant.load(config.run)
    print()
    for question in chosen_questions(config.held_out_questions):
        image = str(Path(config.images) / question.image)
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
