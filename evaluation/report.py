"""One page about one evaluation: figures, alignment, attention, confusions, pictures, curves.

The page is a single HTML file that needs nothing else: no network, no script. All that stands in it
is escaped by the template engine, and the page itself forbids scripts and anything from outside, so
that a question, an answer or a file's name stays text whatever it holds.
"""

from __future__ import annotations

import datetime
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from assistant.assistant import Assistant
from data.chat import ChatFormat, RenderedSample, render
from data.collate import Batch
from data.dataset import Message, Part
from data.features import FeatureStore
from data.pictures import PictureFolders
from errors import PhiSightError, printable
from evaluation import report_charts as charts
from evaluation import report_parts as parts
from evaluation.alignment import alignments
from evaluation.attention import AttentionShares, attention_shares
from evaluation.meter import ALL_CONDITIONS, in_batches, packed_batch
from evaluation.noise import SIGMA
from evaluation.pages import rendered
from evaluation.questions import REPORTED_ONLY
from evaluation.runner import RIGHT, Evaluation, with_instruction
from evaluation.task import Answered, Figure, Task
from files import write_whole
from reports.log import METRICS, read_metrics, without_abandoned

ATTENDED = 400  # answers whose attention is computed: spread over all of them
LONG = 90  # characters of an answer that is written below its picture instead of beside it
LETTERS = 12  # of a digest, in view
MEANINGS = {
    "swapped": "another question's picture",
    "blank": "a grey picture",
    "noised": "the right picture under noise",
}


def training_records(assistant: Assistant) -> list[Mapping[str, Any]]:
    """The log of the training that led to an assistant's weights, up to them; nothing where no log
    lies beside them. Raises `PhiSightError` for one that cannot be read: to be called before
    anything is asked."""
    log = Path(assistant.source).parent / METRICS
    step = assistant.provenance.get("step")
    records = without_abandoned(read_metrics(log)) if log.is_file() else []
    return [one for one in records if step is None or one.get("step", 0) <= step]


def write_report(path: Path, page: str) -> None:
    """Write the page, whole or not at all."""
    try:
        write_whole(path, page.encode())
    except OSError as error:
        raise PhiSightError(
            f"--report {path}: cannot be written ({error.strerror}); name a file in a writable"
            " folder"
        ) from None


# -- attention ------------------------------------------------------------------------------------


def sample_of(one: Answered, chat_format: ChatFormat, instruction: str = "") -> RenderedSample:
    """A question, as it was asked, with what was answered as ids; of a conversation whose loss was
    measured, that."""
    if one.asked.sample is not None:
        return one.asked.sample
    question = [Part("text", with_instruction(one.asked.text, instruction))]
    if one.asked.image:
        question.insert(0, Part("image", one.asked.image))
    answer = Message("assistant", (Part("text", one.answer),))
    return render(one.asked.messages or (Message("user", tuple(question)), answer), chat_format)


def attention_of(
    assistant: Assistant, answered: Sequence[Answered], store: FeatureStore, instruction: str = ""
) -> AttentionShares | None:
    """How much attention answers give to their pictures, see `evaluation.attention`.

    Args:
        answered: with the right picture. Of many, `ATTENDED` spread over all are looked at.
        store: which has the features of the pictures.
        instruction: what was asked behind every question.
    """
    chat, model = assistant.parts.chat_format, assistant.model
    some = answered[:: -(-len(answered) // ATTENDED) or 1]
    samples = [s for s in (sample_of(one, chat, instruction) for one in some) if s.images]
    if not samples:
        return None
    row_tokens = max(assistant.config.row_tokens, *(len(one.input_ids) for one in samples), 1)

    def batches() -> Iterator[tuple[Batch, list[RenderedSample]]]:
        for rows in in_batches(samples, row_tokens):  # one at a time: features take memory
            yield packed_batch(
                rows, store.features_of, chat.padding_id, model.placeholder_id,
                store.shape, torch.device(assistant.parts.device),
            )  # fmt: skip

    return attention_shares(model, batches())


# -- the page -------------------------------------------------------------------------------------


def report_page(
    evaluation: Evaluation,
    shares: AttentionShares | None,
    records: Sequence[Mapping[str, Any]],
    images: PictureFolders,
) -> str:
    """The page about an evaluation.

    Args:
        evaluation: under the right picture, and whatever other conditions were asked.
        shares: see `attention_of`.
        records: see `training_records`.
        images: where the pictures lie, for those that are shown.
    """
    task = evaluation.task
    columns = evaluation.answered | evaluation.further
    if not columns.get(RIGHT):
        raise PhiSightError(f"--report: needs answers with the {RIGHT} picture; ask under it too")
    figures = {column: task.figures(given) for column, given in columns.items()}
    values = (
        _head(evaluation, figures[RIGHT][task.main])
        | _figures(evaluation, columns, figures)
        | _answers(task, columns, images)
        | {
            "attention": charts.attention_columns(shares) if shares else None,
            "curves": charts.curves(records) if records else [],
            "how": _how(evaluation),
            "width": charts.WIDTH,
            "height": charts.HEIGHT,
            "left": charts.LEFT,
            "right": charts.RIGHT,
            "bottom": charts.BOTTOM,
        }
    )
    return rendered("report_page.html", **values)


def _head(evaluation: Evaluation, main: Figure) -> dict[str, Any]:
    task, header = evaluation.task, evaluation.header
    digest, step = str(header.get("weights_digest") or ""), header.get("step")
    right = evaluation.answered[RIGHT]
    name, figure = header["task"], task.main  # by the names of the table and of docs/evaluation.md
    title = f"{name}: {charts.number(main)} {main.unit}"
    return {
        "title": title if name == figure else f"{title} {figure}",
        "about": task.about,
        "main": figure,
        "facts": [
            ("run", printable(header.get("run", ""), parts.TEXT), ""),
            ("step", "not known" if step is None else f"{step:,}", ""),
            ("weights", digest[:LETTERS] or "not known", digest),
            ("questions", f"{len(right):,}", ""),
            ("pictures", f"{len({one.asked.image for one in right} - {''}):,}", ""),
            ("date", datetime.datetime.now(datetime.UTC).date().isoformat(), ""),
        ],
        "conditions": ALL_CONDITIONS,
    }


def _figures(
    evaluation: Evaluation,
    columns: Mapping[str, Sequence[Answered]],
    figures: Mapping[str, Mapping[str, Figure]],
) -> dict[str, Any]:
    """The bars, the gaps and the tables of figures."""
    task = evaluation.task
    main = {column: table[task.main] for column, table in figures.items()}
    gaps = alignments(task, evaluation.answered)
    than = "above" if task.generates else "below"  # of a loss, less is better
    names = list(dict.fromkeys(name for table in figures.values() for name in table))
    is_partial = main[RIGHT].count < len(columns[RIGHT])
    kinds = _by_kind(task, columns, is_partial)
    return {
        "bars": charts.bars(main),
        "gaps": [
            (one, charts.number(gap), gap.unit, charts.interval(gap), f"{than} {MEANINGS[one]}")
            for one, gap in gaps.items()
        ],
        "columns": list(columns),
        "counts": [f"{one.count:,}" for one in main.values()],
        "figures": [
            (
                name,
                figures[RIGHT][name].unit,
                [_cell(table.get(name)) for table in figures.values()],
            )
            for name in names
        ],
        "kinds": kinds[: parts.KINDS],
        "reported_only": is_partial,
        "more_kinds": max(0, len(kinds) - parts.KINDS),
        "kind_gap": "swapped" in columns,
    }


def _by_kind(
    task: Task, columns: Mapping[str, Sequence[Answered]], is_partial: bool
) -> list[tuple[str, str, list[tuple[str, str] | None], str]]:
    """The main figure of every kind and column; none where all questions are of one kind.
    is_partial: some kinds are only reported, and get a mark."""
    grouped: dict[str, dict[str, list[Answered]]] = defaultdict(lambda: defaultdict(list))
    for column, of_column in columns.items():
        for one in of_column:
            grouped[parts.kind_of(one)][column].append(one)
    if len(grouped) < 2:
        return []
    rows = []
    for kind, by_column in grouped.items():
        found = {column: task.figures(of_kind)[task.main] for column, of_kind in by_column.items()}
        right, swapped = found.get(RIGHT), found.get("swapped")
        gap = ""
        if right and swapped:
            difference = right.value - swapped.value
            gap = charts.number(Figure(difference, 0, 0, 0, right.unit))
        count = len(by_column.get(RIGHT, ()))
        order = right.value if right else float("inf")
        cells = [_cell(found.get(column)) for column in columns]
        mark = " *" if kind in REPORTED_ONLY and is_partial else ""
        rows.append((order if task.generates else -order, kind + mark, f"{count:,}", cells, gap))
    return [row[1:] for row in sorted(rows, key=lambda row: row[:2])]


def _answers(
    task: Task, columns: Mapping[str, Sequence[Answered]], images: PictureFolders
) -> dict[str, Any]:
    """Confusions, and the pictures that it got wrong."""
    if not task.generates:
        return {
            "confusions": [], "wrong": [], "wrong_count": "0", "other": parts.OTHER,
            "no_answers": "This task generates no answers: it measures how likely given ones are.",
        }  # fmt: skip
    right = columns[RIGHT]
    wrong = parts.wrong_answers(right, task.main)
    pictures = parts.thumbnails([one.asked.image for one in wrong if one.asked.image], images)
    blind = {one.asked.id: one.answer for one in columns.get("blank", ())}
    return {
        "confusions": parts.confusions(right, task.main),
        "wrong": [
            {
                "picture": pictures.get(one.asked.image),
                "image": printable(one.asked.image, parts.TEXT),
                "kind": parts.kind_of(one),
                "score": _partly(one.scores[task.main]),
                "question": printable(one.asked.text, parts.TEXT),
                "said": printable(one.answer, parts.TEXT) or "(nothing)",
                "truth": printable(" / ".join(dict.fromkeys(one.asked.labels)), parts.TEXT),
                "is_long": len(one.answer) > LONG or len(one.asked.labels[0]) > LONG,
                "blind": blind.get(one.asked.id) == one.answer,
            }
            for one in wrong
        ],
        "wrong_count": f"{sum(one.scores[task.main] < 1 for one in right):,}",
        "other": parts.OTHER,
        "no_answers": "",
    }


def _how(evaluation: Evaluation) -> list[tuple[str, str]]:
    """What every condition means, and how answers and intervals came about."""
    told = [
        ("right", "each question with its own picture"),
        (
            "swapped",
            "with another picture of the same questions, always the same one",
        ),
        ("blank", "with a uniform grey picture"),
        (
            "noised",
            "with its own picture, to each of whose pixels, as the encoder reads them, Gaussian"
            f" noise of {SIGMA} of the range of values is added; equal pictures get equal noise",
        ),
    ]
    shown = [(name, text) for name, text in told if name in evaluation.answered]
    further = "further questions, asked with their own pictures alone"
    shown += [(name, further) for name in evaluation.further]
    if evaluation.task.generates:
        most, behind = evaluation.header["max_new_tokens"], evaluation.header["instruction"]
        said = f"greedy decoding, {most} tokens at most, every question on its own"
        shown.append(("answers", f"{said}, and behind it: {behind}" if behind else said))
    intervals = (
        "95 %, from the 2.5th to the 97.5th percentile of the figure over pictures drawn again with"
        " replacement, each with all of its questions; a difference is taken question by question"
    )
    return [*shown, ("intervals", intervals)]


def _cell(one: Figure | None) -> tuple[str, str] | None:
    return (charts.number(one), charts.interval(one)) if one else None


def _partly(score: float) -> str:
    return f"{100 * score:.0f} % right" if score > 0 else ""
