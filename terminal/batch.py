"""Many questions from a file, their answers into another, resumable after any stop.

Either may be a pipe (`/dev/stdin`, `/dev/fd/3`, a named one): questions are then asked as they
come, and answers that go into a pipe are all asked for, since nothing can be read back from it.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import stat
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from tqdm import tqdm

from alone import opened_alone
from assistant.answer import Answer
from assistant.messages import user_message
from data.dataset import Message
from documents import COUNT, TEXT, parse_json, require
from errors import PhiSightError
from files import write_whole

MAX_LINE = 1_000_000  # bytes; a question is not longer
MAX_ANSWER = 16 * MAX_LINE  # of a line of the output: its question and its answer, escaped
RECORD_START = b'{"line": '  # of every line of the output

Ask = Callable[[Message, int], Answer]
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


def lines_of(file: BinaryIO, limit: int = MAX_LINE) -> Iterator[bytes]:
    """The lines of a file; of a longer one the first `limit` + 1 bytes, however long it is."""
    while line := file.readline(limit + 1):
        yield line
        while not line.endswith(b"\n") and len(line) > limit:
            line = file.readline(limit + 1)


def questions_in(lines: Iterable[bytes]) -> Iterator[LineQuestion]:
    """The question of every line that is not blank."""
    for number, line in enumerate(lines, start=1):
        if line.strip():
            yield parse_line(number, line)


def answered_lines(
    out: BinaryIO, path: Path, keep_failed: bool = True
) -> tuple[dict[int, str], set[int], bytes]:
    """The lines that an output file answers, by number, with their digests; those of them that have
    failed; and the content that says so. A last line that was being written when its program ended
    is left out, and without `keep_failed` so are those that have failed.

    Raises `PhiSightError` for a file that this command has not written.
    """
    done: dict[int, str] = {}
    failed: set[int] = set()
    kept: list[bytes] = []
    out.seek(0)
    for line in lines_of(out, MAX_ANSWER):
        try:
            if not (line + RECORD_START).startswith(RECORD_START[: len(line)]):
                raise PhiSightError("another beginning")
            if not line.endswith(b"\n"):
                break
            record = parse_json(line)
            require(record, {"line": COUNT, "key": TEXT})
        except PhiSightError:
            raise PhiSightError(
                f"{path}: was not written by this command; give another --out"
            ) from None
        number = record["line"]
        if "error" in record and not keep_failed:
            continue
        done[number] = record["key"]
        failed = failed | {number} if "error" in record else failed - {number}
        kept.append(line)
    return done, failed, b"".join(kept)


class AnswersUnderWay:
    """Answers that are being generated, to be written in the order of their questions.

    Attributes:
        answered, failed: how many have been written.
    """

    def __init__(self, out: BinaryIO, ask: Ask) -> None:
        self.out, self.ask = out, ask
        self.answered = self.failed = 0
        self._waiting: deque[tuple[LineQuestion, Answer | PhiSightError]] = deque()

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


def answer_file(
    source: Path, out_path: Path, ask: Ask, in_flight: int, retry_failed: bool = False
) -> tuple[int, int]:
    """Answer every line that has no answer yet; returns how many were answered, and how many lines
    of the output have failed, now or in an earlier run.

    `in_flight`: how many answers may be under way; they are written in the order of the lines, each
    as soon as it is there. `retry_failed`: lines that have failed are asked again, behind the
    others. Raises `PhiSightError` when the output belongs to other questions, is being written, or
    cannot be written.
    """
    try:
        lines = source.open("rb")
    except OSError as error:
        raise PhiSightError(f"{source}: {error.strerror}; give a JSONL file") from None
    try:
        with lines, contextlib.ExitStack() as stack:
            out = stack.enter_context(opened_alone(out_path))
            done, failed = _what_is_there(out, out_path, retry_failed)
            if retry_failed and _is_file(out):
                out = stack.enter_context(opened_alone(out_path))  # it has been replaced
                out.seek(0, os.SEEK_END)
            answers = AnswersUnderWay(out, ask)
            _answer_all(lines, source, out_path, answers, done, in_flight)
            if _is_file(out):
                os.fsync(out.fileno())
    except BrokenPipeError:
        raise
    except OSError as error:
        raise PhiSightError(
            f"{out_path}: {error.strerror or error}; make room and run again, it goes on there"
        ) from None
    return answers.answered, answers.failed + len(failed)


def _is_file(out: BinaryIO) -> bool:
    """Whether what was written can be read again; not so in a pipe or device."""
    return stat.S_ISREG(os.fstat(out.fileno()).st_mode)


def _what_is_there(out: BinaryIO, path: Path, retry_failed: bool) -> tuple[dict[int, str], set]:
    """What an output has already: its lines with their digests, and those that have failed. What is
    not kept is gone from it after this."""
    if not _is_file(out):
        return {}, set()
    done, failed, kept = answered_lines(out, path, keep_failed=not retry_failed)
    if retry_failed:
        write_whole(path, kept)
    else:
        out.truncate(len(kept))
        out.seek(len(kept))
    return done, failed


def _answer_all(
    lines: BinaryIO,
    source: Path,
    out_path: Path,
    answers: AnswersUnderWay,
    done: dict[int, str],
    in_flight: int,
) -> None:
    """Ask what is not done, a few at a time, and write every answer."""
    total = None
    if lines.seekable():
        total = sum(1 for line in lines_of(lines) if line.strip())
        lines.seek(0)
    with tqdm(total=total, unit="question", disable=None) as bar:
        for question in questions_in(lines_of(lines)):
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


def run(options: argparse.Namespace, ask: Callable[[list[Message], int], Answer]) -> int:
    """`infer.py --batch FILE --out FILE`: 1 where lines of the output have failed, else 0."""
    out = Path(options.out)
    answered, failed = answer_file(
        Path(options.batch),
        out,
        lambda message, line: ask([message], line),
        2 * options.max_rows,
        options.retry_failed,
    )
    again = "; --retry-failed asks these again" if failed and out.is_file() else ""
    # Where the answers go to standard output, nothing else may.
    told = sys.stderr if _is_standard_output(out) else sys.stdout
    print(f"{options.out}: {answered} answered, {failed} failed{again}", file=told)
    return 1 if failed else 0


def _is_standard_output(path: Path) -> bool:
    with contextlib.suppress(OSError, ValueError):  # a test's has no number
        return os.path.samestat(path.stat(), os.fstat(sys.stdout.fileno()))
    return False
