"""Whether a run says the same by the 4-bit kernels of this CPU as without them.

    python -m tools.same_answers                      # of the tiny preset, all held-out questions
    python -m tools.same_answers --run runs/mine --first 40

Greedy answers to the run's held-out questions and those about novel pairs, each with the right
picture: by the compiled decoder over keys and values in float16, and by PyTorch in float32 with
the weights that bitsandbytes dequantises; in a process each. Ends with 1 where one answer differs.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import config as configs
from assistant.assistant import Assistant
from config import Config, Parser
from data.dataset import Question, load_questions
from data.features import FeatureStore
from data.pictures import PictureFolders
from errors import PhiSightError, run_main
from evaluation.questions import add_pictures, answer_questions
from model.compiled import compiled_for
from ops.kernels.target import SWITCH

ROOT = Path(__file__).resolve().parent.parent
SIDES = ("kernels", "reference")


def questions_of(config: Config, first: int | None) -> list[Question]:
    paths = filter(None, (config.held_out_questions, config.novel_pair_questions))
    return [question for path in paths for question in load_questions(path)[:first]]


def answers_of(run: str, first: int | None, most: int, side: str) -> list[str]:
    """Raises `PhiSightError` where kernels are asked for that this machine or model has not."""
    assistant = Assistant.load(run, cache=False, device="cpu")
    compiled, reason = compiled_for(assistant.model.language_model)
    if (side == "kernels") != (compiled is not None):
        raise PhiSightError(f"{run}: {reason}; compare on a machine with the kernels")
    config, vision = assistant.config, assistant.parts.vision
    questions = questions_of(config, first)
    store = FeatureStore(config.features, vision.key, vision.shape, config.feature_storage)
    add_pictures(assistant, questions, PictureFolders.of(config), store)
    started = time.perf_counter()
    answers = answer_questions(assistant, questions, store.features_of, most, side)
    seconds = time.perf_counter() - started
    print(f"{len(answers)} answers in {seconds:.1f} s: {reason}", file=sys.stderr)
    return answers


def in_a_process(side: str, arguments: Sequence[str]) -> list[str]:
    """The kernels are chosen once a process, by its environment."""
    environment = {name: value for name, value in os.environ.items() if name != SWITCH}
    if side == "reference":
        environment[SWITCH] = "off"
    command = [sys.executable, "-m", "tools.same_answers", *arguments, "--side", side]
    done = subprocess.run(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, check=False)
    if done.returncode:
        raise PhiSightError(f"{side}: ended with {done.returncode}; see above")
    return json.loads(done.stdout)


def main(arguments: Sequence[str] | None = None) -> int:
    given = sys.argv[1:] if arguments is None else list(arguments)
    parser = Parser(prog="same_answers.py", description=__doc__.splitlines()[0])
    parser.add_argument("--run", default=configs.default_config(configs.DEFAULT_PRESET).run)
    parser.add_argument("--first", type=int, help="only so many questions of each set")
    parser.add_argument("--max-new-tokens", type=int, default=96)
    parser.add_argument("--side", choices=SIDES, help="one process; for this program itself")
    options = parser.parse_args(given)
    if options.side:
        most = options.max_new_tokens
        print(json.dumps(answers_of(options.run, options.first, most, options.side)))
        return 0
    found, expected = (in_a_process(side, given) for side in SIDES)
    different = [(a, b) for a, b in zip(found, expected, strict=True) if a != b]
    print(f"{len(found) - len(different)} of {len(found)} answers are equal")
    for ours, reference in different[:10]:
        print(f"  {ours!r}\n  {reference!r}")
    return 1 if different else 0


if __name__ == "__main__":
    run_main(main)
