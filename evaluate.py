"""How often is the answer exactly right, and does it come from the picture?

    python evaluate.py                # a table
    python evaluate.py --json         # one object, percentages
    python evaluate.py compare RUN RUN    # runs side by side

Every question is asked on its own, answered by greedy decoding, and compared with its label after
folding case and dropping a final full stop. The questions about held-out pictures are asked three
times: with the right picture, with another one, and with a blank one.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import threads  # noqa: F401 (before torch is loaded)

import config as configs
from assistant.flags import add_length_flag, add_model_flags, check_length, load_assistant
from data.dataset import load_questions
from data.features import FeatureStore
from data.prepare import DATA_REMEDY
from errors import run_main
from evaluation import compare
from evaluation.questions import score_table, scores_of_sets
from paths import need_file


def main(arguments: list[str] | None = None) -> int:
    if (arguments if arguments is not None else sys.argv[1:])[:1] == ["compare"]:
        return compare.main((arguments if arguments is not None else sys.argv[1:])[1:])
    parser = configs.Parser(prog="evaluate.py", description=__doc__.splitlines()[0])
    add_model_flags(parser)
    parser.add_argument("--held-out-questions", help="JSONL, in place of the run's own")
    parser.add_argument("--novel-pair-questions", help="JSONL, in place of the run's own")
    parser.add_argument("--images", help="folder of the questions' pictures")
    parser.add_argument("--features", help="folder of the feature store")
    add_length_flag(parser, 96)
    parser.add_argument("--json", action="store_true", help="one JSON object instead of the table")
    options = parser.parse_args(arguments)
    check_length(options)  # no answer at all would be scored as a wrong one
    assistant = load_assistant(options)
    config = assistant.config
    held_out = options.held_out_questions or config.held_out_questions
    sets = {"held_out": load_questions(need_file(held_out, "--held-out-questions", DATA_REMEDY))}
    novel = options.novel_pair_questions or config.novel_pair_questions
    if novel:
        sets["novel_pairs"] = load_questions(
            need_file(novel, "--novel-pair-questions", DATA_REMEDY)
        )
    vision = assistant.parts.vision
    store = FeatureStore(
        options.features or config.features, vision.key, vision.shape, config.feature_storage
    )
    started = time.perf_counter()
    results = scores_of_sets(
        assistant, sets, Path(options.images or config.images), store, options.max_new_tokens
    )
    if options.json:
        summary = {name: result["exact"] for name, result in results.items()}
        first, others = results["held_out"], results.get("novel_pairs")
        print(
            json.dumps(
                summary
                | {
                    "questions": first["questions"],
                    "by_kind": first["by_kind"],
                    "novel_by_kind": others["by_kind"] if others else {},
                    "alignment": round(first["exact"] - results["swapped"]["exact"], 2),
                    "checkpoint": assistant.source,
                    "seconds": round(time.perf_counter() - started, 1),
                }
            )
        )
        return 0
    print(score_table(results))
    gap = results["held_out"]["exact"] - results["swapped"]["exact"]
    print(
        f"alignment: {gap:.1f} points between the right picture and a swapped one"
        f" ({assistant.source}, {time.perf_counter() - started:.0f} s)"
    )
    return 0


if __name__ == "__main__":
    run_main(main)
