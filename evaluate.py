"""How good are the answers of a run, and do they come from the picture?

    python evaluate.py                          # the picture world's questions, a table
    python evaluate.py --task pope --json       # one object, every figure with its interval
    python evaluate.py --task vqa --data questions.json annotations.json --out answers.jsonl
    python evaluate.py --report report.html     # one page about it, with pictures and curves
    python evaluate.py compare RUN RUN          # runs side by side

Every question is asked on its own and answered by greedy decoding. The tasks are in
evaluation/tasks/; docs/evaluation.md says what their files hold and what their figures mean.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import threads  # noqa: F401 (before torch is loaded)

from assistant.flags import load_assistant
from errors import run_main
from evaluation import compare, table
from evaluation.options import DEFAULT, data_of, images_of, parser, settings_of
from evaluation.runner import RIGHT, Evaluation, evaluated, store_of, validation_conversations
from evaluation.task import Asked
from evaluation.tasks import TASKS


def evaluation_of(options: argparse.Namespace) -> Evaluation:
    """Ask what the flags ask for, and write the report."""
    settings, task = settings_of(options), TASKS[options.task]
    task.check()
    asked: list[Asked] = []
    if options.data:  # what cannot be read is told before the model is loaded
        asked = task.questions([Path(path) for path in options.data], settings.limit)
    assistant = load_assistant(options)
    store = store_of(assistant, options.features)
    if not asked:
        data = data_of(options, assistant.config)
        if data:
            asked = task.questions(data, settings.limit)
        else:
            asked = validation_conversations(assistant, store, settings.limit)
    images = images_of(options, assistant.config)
    if not options.report:
        return evaluated(assistant, task, asked, images, store, settings)
    from evaluation import report  # what it is made with takes time that others need not wait

    records = report.training_records(assistant)
    evaluation = evaluated(assistant, task, asked, images, store, settings)
    given = evaluation.answered[RIGHT]
    shares = report.attention_of(assistant, given, store, settings.instruction)
    report.write_report(options.report, report.report_page(evaluation, shares, records, images))
    return evaluation


def main(arguments: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments[:1] == ["compare"]:
        return compare.main(arguments[1:])
    options = parser(__doc__.splitlines()[0]).parse_args(arguments)
    evaluation = evaluation_of(options)
    of_world = options.task == DEFAULT
    if options.json:
        shown = table.world_json(evaluation) if of_world else table.as_json(evaluation)
        print(json.dumps(shown))
        return 0
    print(table.world_table(evaluation) if of_world else table.as_table(evaluation))
    return 0


if __name__ == "__main__":
    run_main(main)
