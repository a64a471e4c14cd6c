"""Exports that change the weights: their flags, and the measurement before and after.

Each of them is a function that writes a folder and its certificate; `export_measured` loads the
run, prepares what both sides are measured on, and calls it.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch

import config as configs
from assistant.assistant import Assistant
from assistant.flags import load_assistant
from exports import alignment, measure
from exports.form import add_config_flags, typed
from exports.measure import Probe, Tolerance
from model.build import DTYPES

GREEDY_EQUAL_IN_4_BITS = 90.0  # percent: NF4 rounds far coarser than 16 bits
# The run's own data are measured on; these say where they lie now, or how many to look at.
DATA_FIELDS = ("data", "images", "held_out_questions", "features", "validation_fraction")
REFUSES_NOTHING = Tolerance(1e9, 0.0)

Write = Callable[[Assistant, str, torch.dtype, Probe, Tolerance | None], dict[str, Any]]
"""(run, folder to write, type of the weights, what to measure on, tolerance) -> certificate"""


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The flags that the measured exports share."""
    parser.add_argument(
        "--dtype", choices=tuple(DTYPES), default="bfloat16", help="of merged weights (%(default)s)"
    )
    parser.add_argument(
        "--max-loss-difference",
        type=float,
        help="refuse past this, in nats an answer token (default:"
        f" {measure.LOSS_DIFFERENCE}; none for --prune)",
    )
    parser.add_argument(
        "--min-greedy-equal",
        type=float,
        help="refuse below this percentage of equal greedy answers (default:"
        f" {measure.GREEDY_EQUAL}; {GREEDY_EQUAL_IN_4_BITS} for --requantize;"
        " none for --prune)",
    )
    parser.add_argument(
        "--calibration",
        type=int,
        default=400,
        metavar="CONVERSATIONS",
        help="training conversations that --requantize and --prune look at (%(default)s)",
    )
    parser.add_argument(
        "--evaluation-conversations",
        type=int,
        metavar="CONVERSATIONS",
        help="validation conversations that losses are measured on (default: as many"
        " as the training looked at)",
    )
    parser.add_argument(
        "--greedy-answers",
        type=int,
        default=100,
        help="how many questions are asked of both models (%(default)s)",
    )
    alignment.add_flags(parser)
    add_config_flags(parser.add_argument_group("where the run's data lie now"), DATA_FIELDS)


def tolerance_of(
    options: argparse.Namespace, usual: Tolerance | None = Tolerance()
) -> Tolerance | None:
    """What was typed, over what is usual for the form; None where nothing is refused.

    `usual` None: nothing is refused unless a limit is typed, and then by that limit alone.
    Raises `PhiSightError` for a limit out of range.
    """
    loss, equal = options.max_loss_difference, options.min_greedy_equal
    if usual is None:
        if loss is None and equal is None:
            return None
        usual = REFUSES_NOTHING
    return Tolerance(
        usual.loss_difference if loss is None else loss,
        usual.greedy_equal if equal is None else equal,
        options.require_alignment,
    )


def export_measured(
    options: argparse.Namespace,
    out: str,
    write: Write,
    usual: Tolerance | None = Tolerance(),
    check: Callable[[Assistant], None] = lambda assistant: None,
) -> str:
    """Load the run of the options and let `write` export it to `out`. Returns a line about it.

    check: raises `PhiSightError` for a run that `write` would refuse, before its data are read.
    """
    tolerance = tolerance_of(options, usual)
    assistant = load_assistant(options)
    check(assistant)
    assistant.config = configs.replace(
        assistant.config, **typed(options, (*DATA_FIELDS, "evaluation_conversations"))
    )
    probe = measure.make_probe(assistant, options.greedy_answers)
    return measure.summary(write(assistant, out, DTYPES[options.dtype], probe, tolerance), out)
