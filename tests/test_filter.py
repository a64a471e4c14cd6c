"""The content filter: what it blocks, and that nothing blocked is shown while a text streams."""

from __future__ import annotations

import unicodedata

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from assistant.filter import SPACELESS, WordFilter, fold, load_words
from errors import PhiSightError

BLOCKED = ("bad", "very bad word", "café", "c++", "坏", "straße", "ba")
FILTER = WordFilter(BLOCKED)


def is_blocked(text: str) -> bool:
    return FILTER(text, True) is None


@pytest.mark.parametrize(
    "text",
    [
        "bad", "Bad", "BAD!", "a bad thing", "(bad)", "_bad_", "not-bad", "bad's", "bad\n",
        "very bad word", "very\n\tbad \u00a0 word", "\uff22\uff21\uff24",  # full-width BAD
        "caf\u00e9", "cafe\u0301", "CAFE\u0301 au lait", "b\u200bad", "b\u00adad", "I like C++.",
        "c+++", "这是坏人", "STRASSE", "strasse", "Stra\u1e9ee", "\U0001d41b\U0001d41a\U0001d41d",
    ],
)  # fmt: skip
def test_is_blocked(text):
    assert is_blocked(text)


@pytest.mark.parametrize(
    "text",
    [
        "", "badge", "forbad", "bad1", "bade", "cafe", "cafes", "ba\u0301d", "bad\u0301", "c+",
        "abc++", "straßen", "very  good", "b a d", "\u00e9bad", "好人",
    ],
)  # fmt: skip
def test_is_shown(text):
    assert FILTER(text, True) == len(text)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("so b", 3), ("so bad", 3), ("so badg", 7), ("so v", 3), ("so very  ", 3),
        ("so very good", 12), ("xb", 2), ("so cafe", 3), ("so cafes", 8), ("so strasse", 3),
        ("so \ufb01", 4), ("so ba\u0316", 3), ("so b\u200b", 3), ("so s", 3), ("so z ", 5),
    ],
)  # fmt: skip
def test_only_a_tail_that_could_become_a_blocked_word_is_held_back(text, shown):
    assert FILTER(text, False) == shown


def test_a_blocked_word_is_refused_as_soon_as_it_is_certain():
    assert FILTER("bad", False) == 0
    assert FILTER("bad ", False) is None


def test_an_empty_list_blocks_nothing():
    assert WordFilter([])("anything", False) == len("anything")


@pytest.mark.parametrize("word", ["", "  ", "\u200b", "\u0301a"])
def test_a_word_of_nothing_is_refused(word):
    with pytest.raises(PhiSightError, match="blocked word .*remove it"):
        WordFilter([word])


# -- properties -----------------------------------------------------------------------------------

# Pieces of blocked words, near misses, marks that reorder, and what joins or separates words.
PIECES = st.sampled_from(
    ["b", "a", "d", "bad", "ba", "very", " ", "  ", "\n", "word", "caf", "e", "\u0301", "\u0316",
     "\u00e9", "c", "+", "坏", "か", "\u3099", "stra", "ß", "ss", "\u1e9e", "\ufb01", "x", "1",
     ".", "'", "_", "\u200b", "\u00ad", "\u00a8", "\uff22", "A", "D", "\u0345", "\u1fb3"]
)  # fmt: skip
TEXTS = st.lists(PIECES | st.characters(), max_size=14).map("".join)


def blocked_places(text: str) -> list[int]:
    """Where in the text its blocked phrases begin, found the slow way."""
    pairs = fold(text)
    pairs = [
        pair
        for n, pair in enumerate(pairs)
        if not (pair[0].isspace() and n and pairs[n - 1][0].isspace())
    ]
    folded = "".join(" " if c.isspace() else c for c, _ in pairs)
    found = []
    for phrase in map(reference, BLOCKED):
        for start in range(len(folded)):
            before, after = folded[:start][-1:], folded[start + len(phrase) :][:1]
            if (
                folded.startswith(phrase, start)
                and not is_mark(after)
                and not in_one_word(before, phrase[0])
                and not in_one_word(phrase[-1], after)
            ):
                found.append(pairs[start][1])
    return found


def is_mark(character: str) -> bool:
    return bool(character) and unicodedata.category(character)[0] == "M"


def in_one_word(left: str, right: str) -> bool:
    """Both are there, letters, digits or marks, and neither is Chinese or Japanese."""
    return all(
        c and (c.isalnum() or is_mark(c)) and not unicodedata.name(c, "").startswith(SPACELESS)
        for c in (left, right)
    )


def reference(text: str) -> str:
    """Unicode's own caseless matching (D146), on the whole text at once."""
    visible = "".join(c for c in text if unicodedata.category(c) != "Cf")
    decomposed = unicodedata.normalize("NFKD", visible)
    return unicodedata.normalize("NFKD", decomposed.casefold())


@settings(max_examples=300)
@given(TEXTS)
def test_folding_by_character_is_folding_the_whole(text):
    pairs = fold(text)
    assert "".join(c for c, _ in pairs) == reference(text)
    starters = [origin for c, origin in pairs if not unicodedata.combining(c)]
    assert starters == sorted(starters)


@settings(max_examples=500)
@given(TEXTS)
@example("c++\u0301")
@example("\u1fb3\u0301")
def test_a_whole_text_is_blocked_exactly_if_a_blocked_word_stands_in_it(text):
    assert FILTER(text, True) == (None if blocked_places(text) else len(text))


@settings(max_examples=500)
@given(TEXTS, st.lists(st.integers(1, 6), max_size=20))
@example("so very bad word then", [1] * 20)
@example("ba\u0301\u0316d bad", [1] * 20)
def test_however_a_text_is_cut_nothing_blocked_is_shown_even_in_part(text, cuts):
    """And what is not blocked is shown whole in the end; what was shown is not taken back."""
    places = [0]
    for cut in cuts:
        places.append(places[-1] + cut)
    shown, blocked = 0, False
    for place in [p for p in places if p < len(text)] + [len(text)]:
        final = place == len(text)
        allowed = FILTER(text[:place], final)
        if allowed is None:
            blocked = True
            break
        assert shown <= allowed <= place
        shown = allowed
    found = blocked_places(text)
    assert blocked == bool(found)
    assert shown <= min(found) if blocked else shown == len(text)


# -- the file -------------------------------------------------------------------------------------


def test_a_list_is_read_one_word_a_line(tmp_path):
    path = tmp_path / "words.txt"
    path.write_text("# rude\n\n bad \nvery bad\tword\n#c\nc#\n", encoding="utf-8-sig")
    assert load_words(path) == ["bad", "very bad\tword", "c#"]
    assert WordFilter(load_words(path))("so very  BAD word", True) is None


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "has no words"),
        (b"# only\n", "has no words"),
        (b"\xff\xfe\x00", "not UTF-8"),
        (None, "cannot be read"),
    ],
)
def test_a_list_that_cannot_be_used_says_why(tmp_path, content, reason):
    path = tmp_path / "words.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(PhiSightError, match=reason):
        load_words(path)
