"""Many questions from a file, their answers into another, resumable after any stop."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from tqdm import tqdm

from assistant.assistant import Reply
from assistant.messages import user_message
from data.dataset import Message
from errors import PhiSightError

MAX_LINE = 1_000_000  # bytes; a question is not longer

Ask = Callable[[Message, int], Reply]
"""A message and the number of its line -> its answer, at once."""


@dataclass(frozen=True)
class LineQuestion:
    """One line of the input: its question, or why it cannot be asked."""

    line: int
    key: str
    """digest of the line: an answer belongs to this content"""
    record: dict[str, str | int | list[str]]
    """what of the line is written beside its answer"""
    message: Message | None
    error: str | None


def parse_line(number: int, line: bytes) -> LineQuestion:
    """A line such as {"prompt": "...", "image": "a.png"} (or "images": [...]; "id" is kept). What
    cannot be used becomes a `LineQuestion` with its error."""
    key = hashlib.sha256(line.strip()).hexdigest()[:16]
    record: dict[str, str | int | list[str]] = {}
    try:
        if len(line) > MAX_LINE:
            raise PhiSightError(f"is longer than {MAX_LINE:,} bytes; shorten it")
        try:
            given = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise PhiSightError(f"holds no JSON ({' '.join(str(error).split())})") from None
        if not isinstance(given, dict):
            raise PhiSightError('holds no JSON object; give {"prompt": ..., "image": ...}')
        if isinstance(given.get("id"), str | int):
            record["id"] = given["id"]
        prompt, images = given.get("prompt"), given.get("images", given.get("image", []))
        images = [images] if isinstance(images, str) else images
        if not isinstance(prompt, str):
            raise PhiSightError('has no text as "prompt"')
        if not isinstance(images, list) or not all(isinstance(name, str) for name in images):
            raise PhiSightError('has "images" that are not a list of paths')
        record |= {"prompt": prompt, "images": images}
        return LineQuestion(number, key, record, user_message(prompt, images), None)
    except PhiSightError as error:
        return LineQuestion(number, key, record, None, f"line {number}: {error}")


def questions_in(lines: Iterable[bytes]) -> Iterator[LineQuestion]:
    """The question of every line that is not blank."""
    for number, line in enumerate(lines, start=1):
        if line.strip():
            yield parse_line(number, line)


def answered_lines(out: BinaryIO, path: Path) -> dict[int, str]:
    """The lines that an output file answers, by number, with their digests; a last line that was
    being written when its program ended is cut off. Raises `PhiSightError` for other content."""
    done: dict[int, str] = {}
    out.seek(0)
    end = 0
    for line in out:
        if not line.endswith(b"\n"):
            break
        try:
            record = json.loads(line)
            done[int(record["line"])] = str(record["key"])
        except (ValueError, TypeError, KeyError, RecursionError):
            raise PhiSightError(
                f"{path}: was not written by this command; give another --out"
            ) from None
        end += len(line)
    out.truncate(end)
    out.seek(end)
    return done


class AnswersUnderWay:
    """Answers that are being generated, to be written in the order of their questions.

    Attributes:
        answered, failed: how many have been written.
    """

    def __init__(self, out: BinaryIO, ask: Ask) -> None:
        self.out, self.ask = out, ask
        self.answered = self.failed = 0
        self._waiting: deque[tuple[LineQuestion, Reply | PhiSightError]] = deque()

    def __len__(self) -> int:
        return len(self._waiting)

    def begin(self, question: LineQuestion) -> None:
        """Ask a question; its answer, or what is wrong with it, joins those that wait."""
        try:
            if question.message is None:
                raise PhiSightError(question.error)
            self._waiting.append((question, self.ask(question.message, question.line)))
        except PhiSightError as error:
            self._waiting.append((question, error))

    def write_oldest(self) -> None:
        """Write the first of those that wait, as soon as it is finished."""
        question, reply = self._waiting.popleft()
        record = {"line": question.line, "key": question.key} | question.record
        try:
            if isinstance(reply, PhiSightError):
                raise reply
            record["answer"] = "".join(reply)
            record["finish_reason"] = reply.finish_reason
            self.answered += 1
        except PhiSightError as error:
            record["error"] = " ".join(str(error).split())
            self.failed += 1
        self.out.write((json.dumps(record, ensure_ascii=False) + "\n").encode(errors="replace"))
        self.out.flush()


def answer_file(source: Path, out_path: Path, ask: Ask, in_flight: int) -> tuple[int, int]:
    """Answer every line that has no answer yet; returns how many were answered and have failed.

    `in_flight`: how many answers may be under way. Answers are written in the order of the lines,
    each as soon as it is there. Raises `PhiSightError` when the output belongs to other questions
    or is being written.
    """
    try:
        lines = source.open("rb")
    except OSError as error:
        raise PhiSightError(f"{source}: {error.strerror}; give a JSONL file") from None
    with lines, _opened_alone(out_path) as out:
        done = answered_lines(out, out_path)
        total = sum(1 for line in lines if line.strip())
        lines.seek(0)
        answers = AnswersUnderWay(out, ask)
        with tqdm(total=total, unit="question", disable=None) as bar:
            for question in questions_in(lines):
                if question.line in done:
                    if done[question.line] != question.key:
                        raise PhiSightError(
                            f"{out_path}: its line {question.line} answers another question than"
                            f" {source} has there; give another --out"
                        )
                    bar.update()
                    continue
                answers.begin(question)
                if len(answers) >= in_flight:
                    answers.write_oldest()
                    bar.update()
            while len(answers):
                answers.write_oldest()
                bar.update()
        os.fsync(out.fileno())
    return answers.answered, answers.failed


def _opened_alone(path: Path) -> BinaryIO:
    """The output, open for reading and writing, by this process alone."""
    try:
        out = open(os.open(path, os.O_RDWR | os.O_CREAT, 0o666), "r+b")
        fcntl.flock(out, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise PhiSightError(f"{path}: another process writes it; wait, or give another") from None
    except OSError as error:
        raise PhiSightError(f"{path}: {error.strerror}; give another --out") from None
    return out
