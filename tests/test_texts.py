"""The table of the interface's texts is whole, and a language is chosen as the browser asks."""

from __future__ import annotations

import ast
import re
import string
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from web.texts import DEFAULT, LANGUAGES, SPOKEN, TEXTS, best_language, text

ROOT = Path(__file__).resolve().parent.parent
MADE = ("status_", "state_", "knows_")  # the keys that are put together from a value begin so


def fields(template: str) -> set[str]:
    return {name for _, name, _, _ in string.Formatter().parse(template) if name}


@pytest.mark.parametrize("key", TEXTS)
def test_every_text_is_in_every_language_with_the_same_values(key):
    row = TEXTS[key]
    assert row.keys() == LANGUAGES.keys()
    assert all(value.strip() == value and value for value in row.values())
    assert {frozenset(fields(value)) for value in row.values()} == {frozenset(fields(row["en"]))}


def test_every_text_is_used_and_every_used_one_is_there():
    """Keys are plain strings in the page's scripts and in web/; this finds a forgotten one."""
    used = set()
    for path in (ROOT / "web").rglob("*.py"):
        used |= {
            node.value
            for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.Constant) and isinstance(node.value, str)
        }
    for path in (ROOT / "web/static").rglob("*.js"):
        used |= set(re.findall(r"[\"'`]([a-z0-9_]+)[\"'`]|\b([a-z0-9_]+):", path.read_text()))
    used = {key for found in used for key in ((found,) if isinstance(found, str) else found)}
    made = {key for key in TEXTS if key.startswith(MADE)}
    assert TEXTS.keys() - used - made == set()


def test_values_are_filled_in_and_an_unknown_language_gets_english():
    assert text("batch_done", "de", done=1, total=2) == "1 von 2 beantwortet"
    assert text("batch_done", "xx", done=1, total=2) == "1 of 2 answered"
    with pytest.raises(KeyError):
        text("no such text", "en")


@pytest.mark.parametrize(
    ("header", "language"),
    [
        ("de-DE,de;q=0.9,en;q=0.8", "de"),
        ("fr,es;q=0.5,zh;q=0.9", "zh"),
        ("zh-TW", "zh"),
        ("en;q=0.1,es;q=0.2", "es"),
        ("de;q=0,es;q=0.1", "es"),
        ("fr", "en"),
        ("", "en"),
        (None, "en"),
        ("*", "en"),
        ("de;q=nonsense,es", "es"),
        (" ES ", "es"),
    ],
)
def test_the_language_that_the_browser_likes_best(header, language):
    assert best_language(header) == language


@given(st.text())
def test_any_header_gives_a_language(header):
    assert best_language(header) in LANGUAGES


def test_spoken_languages_are_ones_that_whisper_knows():
    whisper = pytest.importorskip("whisper.tokenizer", reason="openai-whisper is not installed")
    assert set(SPOKEN) - {""} <= set(whisper.LANGUAGES) and DEFAULT in SPOKEN
