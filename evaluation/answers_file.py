"""Answers on a disk: JSONL that grows by whole lines, so that a killed evaluation goes on.

The first line says what was asked of what: the task, the run with its step and the digest of its
weights, digests of the questions and of the pictures, and the settings. Every other line is one
answer: `id`, `image`, `question`, `labels`, `kind`, `condition`, `answer`, `scores`. A file of
anything else than what is asked now is refused, so that no figure is made of two runs.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from alone import opened_alone
from documents import NUMBER, TEXT, parse_json, require
from errors import PhiSightError
from evaluation.task import Answered

LINE_BYTES = 2**24  # a question, its labels and its answer are far shorter
HEADER_START = b'{"task": '
MAY_DIFFER = ("run",)  # a run that was moved is the same: its weights' digest says so
# Not finite: the loss of a run that diverged.
LINE = {"id": TEXT, "condition": TEXT, "answer": TEXT, "scores": {"*": NUMBER}}

Key = tuple[str, str]  # (condition, id)
Given = tuple[str, dict[str, float]]  # (answer, scores)


class AnswersFile:
    """What was answered before, and a place to write what is answered now.

    Attributes:
        known: what the file answers already.
    """

    def __init__(self, out: BinaryIO | None, path: Path | None, known: dict[Key, Given]) -> None:
        self._out, self._path, self.known = out, path, known

    def add(self, answered: Sequence[Answered]) -> None:
        """Write answers, in one go. Raises `PhiSightError` where the disk is full."""
        if self._out is None:
            return
        lines = "".join(json.dumps(_record(one), ensure_ascii=False) + "\n" for one in answered)
        self._write(lines.encode(errors="backslashreplace"))

    def _write(self, data: bytes) -> None:
        assert self._out is not None and self._path is not None
        left = memoryview(data)
        with _told(self._path):
            while left:  # past the buffer, which would try again what the disk refused, at the end
                left = left[os.write(self._out.fileno(), left) :]


@contextlib.contextmanager
def answers_file(path: Path | None, header: Mapping[str, Any]) -> Iterator[AnswersFile]:
    """The file of an evaluation, held by this process alone while the block runs; without a path,
    nothing is known and nothing written.

    Raises `PhiSightError` for a file that another process writes, that this command has not
    written, or that answers something else than `header` says.
    """
    if path is None:
        yield AnswersFile(None, None, {})
        return
    with opened_alone(path, is_read=True) as out:
        with _told(path):
            known, kept = _read(out, path, header)
            out.truncate(kept)
            os.lseek(out.fileno(), kept, os.SEEK_SET)
        file = AnswersFile(out, path, known)
        if not kept:
            file._write((json.dumps(header) + "\n").encode())
        yield file
        with _told(path):
            os.fsync(out.fileno())


@contextlib.contextmanager
def _told(path: Path) -> Iterator[None]:
    """Raise `PhiSightError` for what the disk refuses."""
    try:
        yield
    except OSError as error:
        raise PhiSightError(
            f"{path}: {error.strerror or error}; make room and run again, it goes on there"
        ) from None


def _record(one: Answered) -> dict[str, Any]:
    asked = one.asked
    return {
        "id": asked.id,
        "image": asked.image,
        "question": asked.text,
        "labels": list(asked.labels),
        "kind": asked.kind,
        "condition": one.condition,
        "answer": one.answer,
        "scores": dict(one.scores),
    }


def _read(out: BinaryIO, path: Path, header: Mapping[str, Any]) -> tuple[dict[Key, Given], int]:
    """What a file answers, and how many of its bytes are whole lines."""
    known: dict[Key, Given] = {}
    kept = 0
    for end, record in _whole_lines(out, path):
        if kept:
            known[record["condition"], record["id"]] = (record["answer"], record["scores"])
        else:
            _compare(path, record, json.loads(json.dumps(header)))
        kept = end
    return known, kept


def _compare(path: Path, found: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    for name in dict.fromkeys([*wanted, *found]):
        if name not in MAY_DIFFER and found.get(name) != wanted.get(name):
            raise PhiSightError(
                f"{path}: answers something else: {name} is {found.get(name)!r:.80} there and"
                f" {wanted.get(name)!r:.80} now; give another --out"
            )


def _whole_lines(file: BinaryIO, path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(where it ends, its object) of every whole line: the header, then answers. A last line that
    was being written when its program ended is left out."""
    file.seek(0)
    end = 0
    while line := file.readline(LINE_BYTES + 1):
        if not end and not (line + HEADER_START).startswith(HEADER_START[: len(line)]):
            raise _foreign(path)
        if not line.endswith(b"\n"):
            if len(line) > LINE_BYTES:
                raise _foreign(path)
            return
        try:
            record = parse_json(line)
            require(record, LINE if end else {"task": TEXT})
        except PhiSightError:
            raise _foreign(path) from None
        end += len(line)
        yield end, record


def _foreign(path: Path) -> PhiSightError:
    return PhiSightError(f"{path}: was not written by this command; give another --out")
