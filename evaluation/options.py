"""The flags of `evaluate.py`."""

from __future__ import annotations

import argparse
from pathlib import Path

from assistant.flags import add_length_flag, add_model_flags, check_length
from config import Config, Parser, replace
from data.pictures import PictureFolders
from errors import PhiSightError
from evaluation.meter import ALL_CONDITIONS, CONDITIONS
from evaluation.runner import RIGHT, Settings
from evaluation.tasks import TASKS

DEFAULT = "world"


def parser(about: str) -> Parser:
    """The parser of `evaluate.py`."""
    made = Parser(
        prog="evaluate.py",
        description=about,
        epilog="evaluate.py compare RUN RUN shows runs side by side (evaluate.py compare --help)."
        " docs/evaluation.md says what the figures mean.",
    )
    add_model_flags(made)
    tasks = "; ".join(f"{name}: {task.about} ({task.form})" for name, task in TASKS.items())
    made.add_argument("--task", choices=TASKS, default=DEFAULT, help=f"{tasks} ({DEFAULT})")
    made.add_argument(
        "--data",
        nargs="+",
        metavar="FILE",
        help="of the task's form; without, the run's own or one made of its picture world",
    )
    made.add_argument(
        "--limit", type=int, default=0, help="ask the first so many questions; 0 for all"
    )
    made.add_argument(
        "--conditions",
        metavar="NAMES",
        help=f"which picture is shown, of {','.join(ALL_CONDITIONS)} (right; of world, the first"
        " three; for a report, all)",
    )
    made.add_argument(
        "--instruction", default="", metavar="TEXT", help="a sentence behind every question"
    )
    made.add_argument(
        "--out",
        type=Path,
        metavar="FILE",
        help="every answer as JSONL; the same command goes on after a kill",
    )
    made.add_argument(
        "--report",
        type=Path,
        metavar="FILE",
        help="one page about it, as HTML, with all conditions",
    )
    made.add_argument("--held-out-questions", help="JSONL, in place of the run's own (world)")
    made.add_argument("--novel-pair-questions", help="JSONL, in place of the run's own (world)")
    made.add_argument("--images", help="folder of the questions' pictures")
    made.add_argument("--features", help="folder of the picture feature store")
    add_length_flag(made, 0, "longest answer (the task's own)")
    made.set_defaults(max_new_tokens=None)
    made.add_argument("--json", action="store_true", help="one JSON object instead of the table")
    return made


def settings_of(options: argparse.Namespace) -> Settings:
    """What the flags ask for. Raises `PhiSightError` for flags that do not go together."""
    task = TASKS[options.task]
    if options.max_new_tokens is None:
        options.max_new_tokens = task.longest
    check_length(options)  # no answer at all would be scored as a wrong one
    if options.limit < 0:
        raise PhiSightError(f"--limit {options.limit}: must be 0, for all, or more")
    of_world = options.held_out_questions or options.novel_pair_questions
    if of_world and (options.task != DEFAULT or options.data):
        raise PhiSightError(
            "--held-out-questions and --novel-pair-questions: belong to --task world without --data"
        )
    if options.instruction and not task.generates:
        raise PhiSightError(f"--instruction: --task {options.task} asks nothing; leave it out")
    conditions = conditions_of(options)
    if options.report and RIGHT not in conditions:
        raise PhiSightError(f"--report: needs the {RIGHT} picture; add it to --conditions")
    check_written(options)
    return Settings(
        options.task,
        conditions,
        options.max_new_tokens,
        options.instruction,
        options.limit,
        options.out,
    )


def conditions_of(options: argparse.Namespace) -> tuple[str, ...]:
    """Which pictures are shown. Raises `PhiSightError` for one that is not known."""
    if options.conditions is None:
        default = CONDITIONS if options.task == DEFAULT else (RIGHT,)
        return ALL_CONDITIONS if options.report else default
    conditions = tuple(dict.fromkeys(name.strip() for name in options.conditions.split(",")))
    for name in conditions:
        if name not in ALL_CONDITIONS:
            raise PhiSightError(
                f"--conditions: {name!r} is not one of them; use {', '.join(ALL_CONDITIONS)}"
            )
    return conditions


def check_written(options: argparse.Namespace) -> None:
    """Raise `PhiSightError` where a report or a file of answers could not be written, or would take
    the place of something that is read or written too: before anything is asked."""
    others = [Path(path).absolute() for path in options.data or ()]
    for flag, path in (("--out", options.out), ("--report", options.report)):
        if path is None:
            continue
        try:
            if path.is_dir() or not path.parent.is_dir():
                raise PhiSightError(f"{flag} {path}: name a file in a folder that is there")
        except OSError as error:
            raise PhiSightError(f"{flag} {path}: {error.strerror}; name another file") from None
        if path.absolute() in others:
            raise PhiSightError(f"{flag} {path}: is named by another flag too; name another file")
        others.append(path.absolute())


def data_of(options: argparse.Namespace, config: Config) -> list[Path]:
    """The task's own files; none for a task that reads the run's validation conversations."""
    named = {
        "held_out_questions": options.held_out_questions,
        "novel_pair_questions": options.novel_pair_questions,
    }
    given = {name: path for name, path in named.items() if path}
    folder = Path(options.images or next(iter(config.images), ""))
    return TASKS[options.task].default_data(replace(config, **given), folder)


def images_of(options: argparse.Namespace, config: Config) -> PictureFolders:
    """Where the questions' pictures lie."""
    folders = [options.images] if options.images else config.images
    return PictureFolders(folders, config.unpacked)
