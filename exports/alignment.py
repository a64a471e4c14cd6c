"""Does an export still see? The alignment meter over its answers, and the gate of the exports.

The questions are answered with the right pictures, with other ones, and with a blank one. The gap
is how many more are exactly right, in points of a hundred, with the right picture than with another
one. A model that does not see gives the same answers to all of them.

Few questions are asked, so chance makes points too. What counts is therefore the gap that is left
at the lower end of a 95 % confidence interval for two shares of the same questions, of Agresti and
Min (Statistics in Medicine 24, 2005): it holds for a handful of questions as well.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from PIL import Image

from assistant.assistant import Assistant
from data.features import blank_picture
from data.images import load_image
from data.pictures import PictureFolders
from errors import PhiSightError
from evaluation.meter import CONDITIONS, features_under, swapped_names
from evaluation.questions import REPORTED_ONLY, answer_prompts, normalised
from exports.asked import Questions, feature_store, prepared, questions_of

# Points of the gap that have to be certain, or the certificate warns. A model that sees nothing has
# a gap of 0 but for chance, which the interval takes away; of what is left, 5 points say that one
# answer in twenty is right because of the picture. Of 100 questions that is a gap of 11 to 15, as
# few or many answers change with the picture for no good.
WANTED_GAP = 5.0
ONE_SIDED_95 = 1.645  # standard deviations
LONGEST_ANSWER = 96  # tokens, as in evaluate.py
STORED_BY = {"gguf": "--quantize"}  # the flag that says how weights are stored, if not --dtype
OWN_DECODER = "this project's own decoder"

Alignment = dict[str, Any]
"""What a certificate and a card say under "alignment": percent of exact answers "right", "swapped",
"blank"; "gap" and "gap_at_least" in points; "questions", "questions_from", "answered_by"; the
"wanted_gap"; "warning", a sentence or ""; and for an export "of_the_run", the same of the run
itself. Where nothing could be measured all figures are None, and the warning says why."""


def add_flags(parser: argparse._ActionsContainer) -> None:
    """The flag of the gate."""
    parser.add_argument(
        "--require-alignment",
        type=float,
        metavar="POINTS",
        help="refuse an export with pictures unless its answers are certainly so many points better"
        f" with the right picture than with another one (default: warn under {WANTED_GAP:g})",
    )


def check_flags(required: float | None, carries_pictures: bool, flag: str) -> None:
    """Raise `PhiSightError` for points out of range, or for an export (`flag`) without pictures."""
    if required is None:
        return
    if not 0 <= required <= 100:
        raise PhiSightError(f"--require-alignment {required:g}: must be 0 to 100 points")
    if not carries_pictures:
        raise PhiSightError(
            f"--require-alignment: {flag} writes no pictures' part, so it cannot be asked to see;"
            " leave it out"
        )


def alignment_of(
    assistant: Assistant, questions: Questions, right: Sequence[str] | None = None
) -> Alignment:
    """Of the run itself, by our own decoder over stored features.

    Args: `right`: its greedy answers with the right pictures, where they are known already.
    """
    swapped = swapped_pictures(questions)
    answers = {
        condition: right
        if right is not None and condition == "right"
        else answer_prompts(
            assistant,
            questions.prompts,
            features_under(condition, questions.store, swapped),
            LONGEST_ANSWER,
            f"{condition} picture",
        )
        for condition in CONDITIONS
    }
    return scored(questions, answers, OWN_DECODER)


def alignment_of_run(assistant: Assistant, count: int) -> Alignment:
    """`alignment_of` for what carries a run as it is, on at most `count` questions. Where there is
    nothing to measure with, such as data that are gone, the warning says so and nothing is raised
    but for a bad `count`."""
    store = feature_store(assistant)
    try:
        questions = questions_of(assistant, count, store, lambda: prepared(assistant, store))
    except PhiSightError as error:
        if count < 1:
            raise
        return unmeasured(str(error))
    return alignment_of(assistant, questions)


def swapped_pictures(questions: Questions) -> dict[str, str]:
    """The name of every picture that is asked about -> that of another one."""
    names = [name for prompt in questions.prompts for name in prompt.images]
    return swapped_names(names, questions.store.hash_of)


def pictures_under(
    condition: str, questions: Questions, folders: PictureFolders
) -> Callable[[str], Image.Image]:
    """For a program that reads pictures itself: the name of a picture -> what stands in for it."""
    swapped = swapped_pictures(questions)
    return {
        "right": lambda name: load_image(folders.path_of(name)),
        "swapped": lambda name: load_image(folders.path_of(swapped[name])),
        "blank": lambda name: blank_picture(),
    }[condition]


def scored(
    questions: Questions,
    answers: Mapping[str, Sequence[str]],
    answered_by: str,
    of_the_run: Alignment | None = None,
) -> Alignment:
    """The figures of some answers, {condition: in the order of the questions}."""
    pictures = [name for prompt in questions.prompts for name in prompt.images]
    if len({questions.store.hash_of(name) for name in pictures}) < 2:
        return unmeasured("the questions are all about one picture, and none can be swapped for it")
    counted = [i for i, one in enumerate(questions.asked) if one.kind not in REPORTED_ONLY]
    if not counted:
        return unmeasured(f"all questions are of the kinds {', '.join(REPORTED_ONLY)}")
    exact = {
        condition: [
            normalised(answers[condition][i]) == normalised(questions.asked[i].answer)
            for i in counted
        ]
        for condition in CONDITIONS
    }
    percent = {condition: round(100 * sum(e) / len(e), 2) for condition, e in exact.items()}
    found: Alignment = {
        **percent,
        "gap": round(percent["right"] - percent["swapped"], 2),
        "gap_at_least": round(certain_gap(exact["right"], exact["swapped"]), 2),
        "questions": len(counted),
        "questions_from": questions.facts["questions_from"],
        "answered_by": answered_by,
        "wanted_gap": WANTED_GAP,
    }
    if of_the_run is not None:
        found["of_the_run"] = of_the_run
    return found | {"warning": warning_of(found)}


def certain_gap(right: Sequence[bool], swapped: Sequence[bool]) -> float:
    """Points that `right` is ahead of `swapped` with 95 % confidence, of the same questions: half a
    question is added to each of the four cases (Agresti and Min 2005)."""
    better = sum(r and not s for r, s in zip(right, swapped, strict=True))
    worse = sum(s and not r for r, s in zip(right, swapped, strict=True))
    count = len(right) + 2
    difference = (better - worse) / count
    deviation = math.sqrt(better + worse + 1 - (better - worse) ** 2 / count) / count
    return 100 * (difference - ONE_SIDED_95 * deviation)


def warning_of(found: Mapping[str, Any]) -> str:
    """One sentence where the gap is not certainly as wide as is wanted, else nothing."""
    if found["gap_at_least"] >= found["wanted_gap"]:
        return ""
    sentence = (
        f"its answers may not come from the picture: {found['right']:g} % of"
        f" {found['questions']} are exact with the right one and {found['swapped']:g} % with"
        f" another one, and at least {found['wanted_gap']:g} points between them are wanted with"
        f" 95 % confidence, where {certain(found):g} were found"
    )
    run = found.get("of_the_run")
    if run and not run["warning"]:
        sentence += f"; the run itself has {run['gap']:g}, so the export lost them"
    return sentence


def certain(found: Mapping[str, Any]) -> float:
    """Points of the gap that are certain, as they are told: none where they might be negative."""
    return max(0.0, found["gap_at_least"])


def unmeasured(reason: str) -> Alignment:
    """What stands in place of the figures where there are none."""
    figures = (*CONDITIONS, "gap", "gap_at_least", "questions", "questions_from", "answered_by")
    return {
        **dict.fromkeys(figures),
        "wanted_gap": WANTED_GAP,
        "warning": f"whether its answers come from the picture was not measured: {reason}",
    }


def check_alignment(alignment: Mapping[str, Any], required: float | None, what: str) -> None:
    """Raise `PhiSightError`, before anything gets its name, where fewer points than `required` are
    certain; None requires nothing. `what`: the export, such as "llava"."""
    if required is None:
        return
    if alignment["gap_at_least"] is None:
        raise PhiSightError(f"{what}: refused, nothing was written: {alignment['warning']}")
    if alignment["gap_at_least"] >= required:
        return
    remedy = "ask more questions with --greedy-answers, or train a run that sees"
    run = alignment.get("of_the_run")
    if run and run["gap_at_least"] >= required:
        remedy = (
            f"the run itself has {run['gap']:g}, so the export lost them: use another"
            f" {STORED_BY.get(what, '--dtype')}"
        )
    raise PhiSightError(
        f"{what}: refused, nothing was written: {alignment['right']:g} % of"
        f" {alignment['questions']} answers are exact with the right picture and"
        f" {alignment['swapped']:g} % with another one, a gap of {alignment['gap']:g} points,"
        f" of which {certain(alignment):g} are certain and --require-alignment asks"
        f" {required:g}; {remedy}"
    )


def alignment_line(alignment: Mapping[str, Any]) -> str:
    """The figures in a line to print, or the warning."""
    if alignment["gap"] is None:
        return f"warning: {alignment['warning']}"
    line = (
        f"alignment: {alignment['gap']:.1f} points between the right picture"
        f" ({alignment['right']:.1f} % exact) and a swapped one ({alignment['swapped']:.1f} %), at"
        f" least {certain(alignment):.1f} with 95 % confidence, on"
        f" {alignment['questions']} questions"
    )
    if run := alignment.get("of_the_run"):
        line += f"; the run itself has {run['gap']:.1f}"
    return line + (f"\nwarning: {alignment['warning']}" if alignment["warning"] else "")
