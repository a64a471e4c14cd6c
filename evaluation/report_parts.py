"""What a report shows of answers: what was said for what was right, wrong answers, thumbnails.

Everything is plain values for `report_page.html`, which escapes all of it. Texts and numbers of
parts are bounded here, so that a page stays one that a browser opens, whatever was asked.
"""

from __future__ import annotations

import base64
import io
import itertools
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image

from data.pictures import PictureFolders
from data.reading import fit_files
from errors import PhiSightError, printable
from evaluation.questions import normalised
from evaluation.task import Answered
from workers.fitting import Fit

NO_KIND = "question"  # what a question without a kind is called
KINDS = 40  # rows of the table by kind, and confusion tables
LABELS, SAID = 10, 4  # rows of a confusion table, and columns beside those
COVERED = 0.5  # of the answers, by labels that have rows, uncut: else a table says nothing
WRONG = 24  # pictures shown
TEXT, WORD = 400, 32  # characters shown of a question or answer, and of a label in a table
THUMBNAIL = 160  # pixels of its shorter side; the longer has twice as many at most
OTHER = "other answers"


def kind_of(one: Answered) -> str:
    return printable(one.asked.kind or NO_KIND, WORD)


# -- what was said for what was right -------------------------------------------------------------


@dataclass(frozen=True)
class Confusion:
    """Of one kind of question: right answers down, what was said across."""

    kind: str
    count: int
    right: int
    said: tuple[str, ...] = ()
    """columns: the rows' own labels first, so that the diagonal is what was right"""
    rows: tuple[tuple[str, tuple[int, ...]], ...] = ()
    """the n-th has its right answers in the n-th column; none where nearly every question has a
    right answer of its own, or one that is a sentence"""
    labels: int = 0
    """different right answers"""


def confusion_of(kind: str, answered: Sequence[Answered], main: str) -> Confusion:
    """The most frequent labels and answers of one kind, and the rest as `OTHER`. An answer with
    full score counts as its label, whatever its wording."""
    pairs = [_label_and_said(one, main) for one in answered]
    right = sum(one.scores[main] >= 1 for one in answered)
    frequent = Counter(label for label, _ in pairs).most_common()
    told = sum(count for label, count in frequent[:LABELS] if len(label) <= WORD)
    if told < COVERED * len(pairs):
        return Confusion(kind, len(pairs), right, labels=len(frequent))
    labels: list[str | None] = [*sorted(label for label, _ in frequent[:LABELS])]
    further = Counter(said for _, said in pairs if said not in labels)
    columns = labels + [said for said, _ in further.most_common(SAID)]
    counts = Counter(  # None: one of the rest, which no text can be mistaken for
        (label if label in labels else None, said if said in columns else None)
        for label, said in pairs
    )
    if any(said is None for _, said in counts):
        columns.append(None)
    rows = labels + ([None] if len(frequent) > LABELS else [])
    return Confusion(
        kind,
        len(pairs),
        right,
        tuple(_shown(said) for said in columns),
        tuple((_shown(label), tuple(counts[label, said] for said in columns)) for label in rows),
        len(frequent),
    )


def _label_and_said(one: Answered, main: str) -> tuple[str, str]:
    said = normalised(one.answer)
    labels = [normalised(label) for label in one.asked.labels] or [""]
    label = said if said in labels else Counter(labels).most_common(1)[0][0]
    return label, label if one.scores[main] >= 1 else said


def _shown(text: str | None) -> str:
    return OTHER if text is None else printable(text, WORD) or "(nothing)"


def confusions(answered: Sequence[Answered], main: str) -> list[Confusion]:
    """One for each kind, those with the most wrong answers first."""
    by_kind: dict[str, list[Answered]] = defaultdict(list)
    for one in answered:
        by_kind[kind_of(one)].append(one)
    made = [confusion_of(kind, of_kind, main) for kind, of_kind in by_kind.items()]
    return sorted(made, key=lambda one: (one.right - one.count, one.kind))[:KINDS]


# -- the pictures that it got wrong ---------------------------------------------------------------


def wrong_answers(answered: Sequence[Answered], main: str, most: int = WRONG) -> list[Answered]:
    """Answers below full score, of every kind in turn, the lowest first; one for each picture as
    long as there are others."""
    by_kind: dict[str, list[Answered]] = defaultdict(list)
    for one in sorted(answered, key=lambda one: one.scores[main]):
        if one.scores[main] < 1:
            by_kind[kind_of(one)].append(one)
    in_turn = [
        one for turn in itertools.zip_longest(*by_kind.values()) for one in turn if one is not None
    ]
    seen: set[str] = set()
    first: list[Answered] = []
    later: list[Answered] = []
    for one in in_turn:
        (later if one.asked.image in seen else first).append(one)
        seen.add(one.asked.image)
    return [*first, *later][:most]


def thumbnails(names: Sequence[str], folders: PictureFolders) -> dict[str, str]:
    """Name of a picture -> a small WebP as a data URI; a picture that cannot be read has none.

    Pictures are untrusted: they are decoded and made small in a child process.
    """
    distinct = list(dict.fromkeys(names))
    fit = Fit(THUMBNAIL, None, Image.Resampling.BICUBIC, None)
    found = {}
    for name, fitted in zip(distinct, fit_files(map(folders.path_of, distinct), fit)):
        if isinstance(fitted, PhiSightError):
            continue
        picture = Image.fromarray(fitted.pixels)
        picture.thumbnail((2 * THUMBNAIL, 2 * THUMBNAIL))
        file = io.BytesIO()
        picture.save(file, format="WEBP", quality=85)
        found[name] = "data:image/webp;base64," + base64.b64encode(file.getvalue()).decode()
    return found
