"""A file of questions: pipes on both sides, lines that have failed, and what is not ours."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import runs

import infer
from errors import PhiSightError
from terminal.batch import MAX_LINE, answer_file, lines_of

QUESTIONS = [
    {"prompt": "What is it?"},
    {"prompt": "Where?", "image": "nope.png"},
    {"prompt": "Who?"},
]


def text_of(questions: list[dict]) -> bytes:
    return "".join(json.dumps(question) + "\n" for question in questions).encode()


def ask(message, line):
    return runs.assistant().reply([message], 2)


def records_in(data: bytes) -> list[dict]:
    return [json.loads(line) for line in data.splitlines()]


@pytest.fixture
def source(tmp_path) -> Path:
    path = tmp_path / "in.jsonl"
    path.write_bytes(text_of(QUESTIONS))
    return path


@pytest.fixture
def expected(tmp_path, source) -> bytes:
    """What a file in gives in a file out."""
    assert answer_file(source, tmp_path / "expected.jsonl", ask, 2) == (2, 1)
    return (tmp_path / "expected.jsonl").read_bytes()


@pytest.mark.parametrize("kind", ["/dev/fd", "named"])
def test_questions_come_through_a_pipe(tmp_path, expected, kind):
    out = tmp_path / "out.jsonl"
    if kind == "named":
        pipe = tmp_path / "pipe"
        os.mkfifo(pipe)
        writing = threading.Thread(target=pipe.write_bytes, args=(text_of(QUESTIONS),))
        writing.start()
        result = answer_file(pipe, out, ask, 2)
        writing.join()
    else:
        reader, writer = os.pipe()
        os.write(writer, text_of(QUESTIONS))
        os.close(writer)
        result = answer_file(Path(f"/dev/fd/{reader}"), out, ask, 2)
        os.close(reader)
    assert result == (2, 1) and out.read_bytes() == expected


def test_answers_go_into_a_pipe(source, expected):
    reader, writer = os.pipe()
    assert answer_file(source, Path(f"/dev/fd/{writer}"), ask, 2) == (2, 1)
    os.close(writer)
    with open(reader, "rb") as file:
        assert file.read() == expected


def test_a_device_takes_answers_and_a_full_one_is_one_line(source):
    assert answer_file(source, Path("/dev/null"), ask, 2) == (2, 1)
    with pytest.raises(PhiSightError, match="/dev/full: No space left on device; make room"):
        answer_file(source, Path("/dev/full"), ask, 2)


def test_standard_input_and_output_of_a_process(source, tmp_path, expected):
    """In a pipe and in a file that the shell opened: nothing but answers on standard output."""
    command = [sys.executable, "infer.py", "--run", str(runs.finished_run()), "--max-new-tokens=2"]
    command += ["--batch=/dev/stdin", "--out=/dev/stdout"]
    for target in ("pipe", "file"):
        with (tmp_path / "answers").open("wb") as file:
            done = subprocess.run(
                command,
                input=source.read_bytes(),
                stdout=subprocess.PIPE if target == "pipe" else file,
                stderr=subprocess.PIPE,
                cwd=runs.ROOT,
                env=runs.environment(),
                timeout=120,
                check=False,
            )
        said = done.stdout if target == "pipe" else (tmp_path / "answers").read_bytes()
        assert done.returncode == 1 and said == expected, done
        assert done.stderr.endswith(b"/dev/stdout: 2 answered, 1 failed\n") or target == "file"


def test_what_has_failed_is_asked_again_when_it_is_wished(tmp_path, source, expected):
    out = tmp_path / "expected.jsonl"
    assert answer_file(source, out, ask, 2) == (0, 1)  # the result still has a line that failed
    assert out.read_bytes() == expected
    assert answer_file(source, out, ask, 2, retry_failed=True) == (0, 1)
    lines = expected.splitlines(keepends=True)
    assert out.read_bytes() == lines[0] + lines[2] + lines[1]

    def now_there(message, line):
        return runs.assistant().reply([type(message)("user", message.parts[-1:])], 2)

    assert answer_file(source, out, now_there, 2, retry_failed=True) == (1, 0)
    assert [r["line"] for r in records_in(out.read_bytes()) if "answer" in r] == [1, 3, 2]
    assert answer_file(source, out, ask, 2) == (0, 0)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["expected.jsonl", "in.jsonl"]


@pytest.mark.parametrize(
    "content",
    [
        b'{"prompt": "my only copy"}',
        b"x",
        b'{"line": 1e999, "key": "a"}\n',
        b'{"line": "1", "key": "a"}\n',
        b'{"line": 1, "line": 2, "key": "a"}\n',
        b'{"line": [1], "key": 2}\n',
    ],
)
def test_a_file_that_this_command_has_not_written_stays(tmp_path, source, content):
    """Without the end of a line too: it might be taken for an answer that was being written."""
    out = tmp_path / "mine"
    out.write_bytes(content)
    with pytest.raises(PhiSightError, match="mine: was not written by this command"):
        answer_file(source, out, ask, 1)
    assert out.read_bytes() == content


def test_a_line_without_an_end_takes_bounded_memory(tmp_path):
    path = tmp_path / "long"
    path.write_bytes(b"a" * (3 * MAX_LINE) + b"\nshort\n" + b"b" * 2 * MAX_LINE)
    with path.open("rb") as file:
        assert [len(line) for line in lines_of(file)] == [MAX_LINE + 1, 6, MAX_LINE + 1]


def test_retrying_belongs_to_a_file_of_questions():
    with pytest.raises(PhiSightError, match="--retry-failed belongs to --batch"):
        infer.main(["--prompt", "Who?", "--retry-failed"])
