"""What is printed of texts that anybody may have written."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from conftest import ROOT
from hypothesis import given
from hypothesis import strategies as st

from errors import printable, run_main

anything = st.text(st.characters(), max_size=30) | st.text(st.sampled_from("a\ud800\x1b\n \u202e"))


@given(anything)
def test_a_printable_text_is_one_line_that_any_terminal_can_show(text):
    line = printable(text)
    assert line.isprintable() and line == printable(line)
    line.encode()
    if text.isprintable():
        assert line == " ".join(text.split())


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("a\n b\t", "a b"),
        ("\x1b[2J", "\\x1b[2J"),
        ("\ud800", "\\ud800"),
        ("x\u202ey", "x\\u202ey"),
        ("naïve 字 🚌", "naïve 字 🚌"),
    ],
)
def test_what_is_not_seen_becomes_an_escape(text, line):
    assert printable(text) == line


def test_a_long_text_is_cut():
    assert printable("a" * 20, 10) == "aaaaaaa..." and printable("a" * 10, 10) == "a" * 10


@pytest.mark.parametrize("encoding", ["ascii", "utf-8"])
def test_a_command_prints_whatever_it_must_name(encoding):
    """On standard output in any encoding, and in its one line of an error."""
    script = """
from errors import PhiSightError, run_main
def main():
    print("id \\ud800 \\xe9")
    raise PhiSightError("a\\x1b[2J \\ud800: gone")
run_main(main)
"""
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=ROOT,
        env=os.environ | {"PYTHONIOENCODING": encoding},
        capture_output=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 2
    assert done.stdout.startswith(b"id \\ud800 ")
    assert done.stderr == b"error: a\\x1b[2J \\ud800: gone\n"


@pytest.mark.parametrize(
    ("program", "said"),
    [
        ("infer.py", "interrupted: what was saved is kept\n"),
        ("train.py", "interrupted: what was saved is kept; --resume goes on from there\n"),
    ],
)
def test_an_interrupted_program_names_a_flag_of_its_own(program, said, monkeypatch, capsys):
    def interrupted() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(sys, "argv", [f"/somewhere/{program}"])
    with pytest.raises(SystemExit) as ended:
        run_main(interrupted)
    assert ended.value.code == 130
    assert capsys.readouterr().err == said
