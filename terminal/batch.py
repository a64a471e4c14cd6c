"""Many questions from a file, their answers into another, resumable after any stop."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from tqdm import tqdm

from assistant.messages import Reply, user_message
from data.dataset import Message
from errors import PhiSightError

MAX_LINE = 1_000_000  # bytes; a question is not longer


@dataclass(frozen=True)
class Asked:
    """One line of the input."""

    line: int
    key: str
    """digest of the line: an answer belongs to this content"""
    record: dict[str, object]
    message: Message | None
    error: str | None


def parse_line(number: int, line: bytes) -> Asked:
    """A line such as {"prompt": "...", "image": "a.png"} (or "images": [...]; "id" is kept). What
    cannot be used becomes an `Asked` with its error."""
    key = hashlib.sha256(line.strip()).hexdigest()[:16]
    record: dict[str, object] = {}
    try:
        if len(line) > MAX_LINE:
            raise PhiSightError(f"is longer than {MAX_LINE:,} bytes; shorten it")
        try:
            found = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise PhiSightError(f"is no JSON ({' '.join(str(error).split())})") from None
        if not isinstance(found, dict):
            raise PhiSightError('is no JSON object; give {"prompt": ..., "image": ...}')
        if isinstance(found.get("id"), str | int):
            record["id"] = found["id"]
        prompt, images = found.get("prompt"), found.get("images", found.get("image", []))
        images = [images] if isinstance(images, str) else images
        if not isinstance(prompt, str):
            raise PhiSightError('has no text as "prompt"')
        if not isinstance(images, list) or not all(isinstance(name, str) for name in images):
            raise PhiSightError('has "images" that are no list of paths')
        record |= {"prompt": prompt, "images": images}
        return Asked(number, key, record, user_message(prompt, images), None)
    except PhiSightError as error:
        return Asked(number, key, record, None, f"line {number}: {error}")


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


def answer_file(
    source: Path,
    out_path: Path,
    ask: Callable[[Message, int], Reply],
    in_flight: int,
) -> tuple[int, int]:
    """Answer every line that has no answer yet; returns how many were answered and have failed.

    Args: `ask`: a message and its line number -> its answer, at once; `in_flight`: how many answers
    may be under way. Answers are written in the order of the lines, each as soon as it is there.
    Raises `PhiSightError` when the output belongs to other questions or is being written.
    """
    counts = {True: 0, False: 0}  # answered, failed
    try:
        lines = source.open("rb")
    except OSError as error:
        raise PhiSightError(f"{source}: {error.strerror}; give a JSONL file") from None
    with lines, _locked(out_path) as out:
        done = answered_lines(out, out_path)
        total = sum(1 for line in lines if line.strip())
        lines.seek(0)
        under_way: deque[tuple[Asked, Reply | PhiSightError]] = deque()

        def write_oldest() -> None:
            asked, answer = under_way.popleft()
            record = {"line": asked.line, "key": asked.key} | asked.record
            try:
                if isinstance(answer, PhiSightError):
                    raise answer
                record["answer"] = "".join(answer)
                record["finish_reason"] = answer.finish_reason
            except PhiSightError as error:
                record["error"] = " ".join(str(error).split())
            out.write((json.dumps(record, ensure_ascii=False) + "\n").encode(errors="replace"))
            out.flush()
            counts["answer" in record] += 1
            bar.update()

        with tqdm(total=total, unit="question", disable=None) as bar:
            for number, line in enumerate(lines, start=1):
                if not line.strip():
                    continue
                asked = parse_line(number, line)
                if number in done:
                    if done[number] != asked.key:
                        raise PhiSightError(
                            f"{out_path}: its line {number} answers another question than {source}"
                            " has there; give another --out"
                        )
                    bar.update()
                    continue
                try:
                    if asked.error:
                        raise PhiSightError(asked.error)
                    under_way.append((asked, ask(asked.message, number)))
                except PhiSightError as error:
                    under_way.append((asked, error))
                if len(under_way) >= in_flight:
                    write_oldest()
            while under_way:
                write_oldest()
        os.fsync(out.fileno())
    return counts[True], counts[False]


def _locked(path: Path) -> BinaryIO:
    """The output, open for reading and writing, by this process alone."""
    try:
        out = open(os.open(path, os.O_RDWR | os.O_CREAT, 0o666), "r+b")
        fcntl.flock(out, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise PhiSightError(f"{path}: another process writes it; wait, or give another") from None
    except OSError as error:
        raise PhiSightError(f"{path}: {error.strerror}; give another --out") from None
    return out
