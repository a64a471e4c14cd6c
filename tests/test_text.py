"""Tokens to text: the pieces are the whole, and nothing shows that may not."""

from __future__ import annotations

import pytest
import runs
from hypothesis import given, settings
from hypothesis import strategies as st

from assistant.text_stream import TextStream, held_back
from data.chat import load_tokenizer

HALF = "\N{REPLACEMENT CHARACTER}"
TEXTS = st.one_of(
    st.text(st.characters(exclude_categories=("Cs", "Cc")), max_size=30),
    st.text("ab .\n é好🙂", max_size=30),
)


@pytest.fixture(scope="module", params=["tiny", "phi-3-mini"])
def tokenizer(request):
    if request.param == "tiny":
        return load_tokenizer(runs.BASE)
    folder = runs.ROOT.parent / "shared/real/phi-3-mini-tokenizer"
    if not folder.is_dir():
        pytest.skip("the real tokenizer is not here")
    return load_tokenizer(folder)


def ids_of(tokenizer, text: str) -> list[int]:
    return tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids


def pieces_of(tokenizer, ids, **settings_) -> tuple[list[str], TextStream]:
    stream = TextStream(tokenizer, **settings_)
    pieces = [stream.push(token) for token in ids]
    return [*pieces, stream.end()], stream


@settings(max_examples=60, deadline=None)
@given(text=TEXTS)
def test_the_pieces_are_the_whole(tokenizer, text):
    ids = ids_of(tokenizer, text)
    pieces, stream = pieces_of(tokenizer, ids)
    assert "".join(pieces) == tokenizer.decode(ids, skip_special_tokens=True) == stream.shown
    assert stream.finished is None


def test_a_piece_waits_for_no_other_and_is_never_half_a_character(tokenizer):
    text = "\N{SNOWMAN} a star, \N{LATIN SMALL LETTER E WITH ACUTE}"
    pieces, _ = pieces_of(tokenizer, ids_of(tokenizer, text))
    assert len([piece for piece in pieces if piece]) > 2
    assert pieces[-1] == ""  # all was shown when it came
    assert not any(HALF in piece for piece in pieces)


def test_half_a_character_at_the_end_is_not_shown(tokenizer):
    ids = ids_of(tokenizer, "so \N{SNOWMAN}")
    assert len(ids) > 3  # the snowman is three bytes
    pieces, _ = pieces_of(tokenizer, ids[:-1])
    assert "".join(pieces).strip() == "so"


def test_a_special_token_costs_no_space(tokenizer):
    end = tokenizer.backend_tokenizer.token_to_id("<|end|>")
    ids = [*ids_of(tokenizer, "a star"), end, *ids_of(tokenizer, "a star")]
    pieces, _ = pieces_of(tokenizer, ids)
    assert "".join(pieces) == tokenizer.decode(ids, skip_special_tokens=True)


@settings(max_examples=60, deadline=None)
@given(
    text=st.text("ab ", max_size=20),
    stop=st.lists(st.text("ab", min_size=1, max_size=4), min_size=1, max_size=3),
)
def test_an_answer_ends_before_its_first_stop_string(text, stop):
    tokenizer = load_tokenizer_once()
    ids = ids_of(tokenizer, text)
    whole = tokenizer.decode(ids, skip_special_tokens=True)
    places = [whole.find(mark) for mark in stop if mark in whole]
    stream = TextStream(tokenizer, stop)
    shown = ""
    for token in ids:
        shown += stream.push(token)
        assert not any(mark in shown for mark in stop)
        assert whole.startswith(shown)
    shown += stream.end()
    # Where two marks could end it, the one that is whole first does.
    assert (stream.finished == "stop") == bool(places)
    assert shown == whole if not places else len(shown) in places


def load_tokenizer_once(cache=[]):  # noqa: B006 - one load for all examples
    if not cache:
        cache.append(load_tokenizer(runs.BASE))
    return cache[0]


@pytest.mark.parametrize(
    ("text", "stop", "held"),
    [
        ("abc", ["cd"], 1),
        ("abc", ["bcx", "cx"], 2),
        ("abc", ["x"], 0),
        ("", ["a"], 0),
        ("aa", ["aaa"], 2),
    ],
)
def test_what_may_become_a_stop_string_is_held_back(text, stop, held):
    assert held_back(text, stop) == held


def test_a_filter_ends_an_answer_without_a_trace():
    tokenizer = load_tokenizer_once()

    def no_red(text: str, final: bool) -> int | None:
        if "red" in text:
            return None
        return len(text) if final else max(0, len(text) - 2)

    pieces, stream = pieces_of(
        tokenizer, ids_of(tokenizer, "a star and a red square"), content_filter=no_red
    )
    assert stream.finished == "filtered"
    assert "a star and a red".startswith(stream.shown.strip()) and "r" not in stream.shown[7:]
    pieces, stream = pieces_of(tokenizer, ids_of(tokenizer, "a blue star"), content_filter=no_red)
    assert "".join(pieces) == "a blue star" and stream.finished is None
