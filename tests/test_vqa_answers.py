"""VQA's normalisation and accuracy, by examples worked out from their definition."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from evaluation.vqa_answers import CONTRACTIONS, accuracy, normalised, token_f1

EXAMPLES = {
    "Yes.": "yes",
    "A dog": "dog",
    "the cat and the  dog": "cat and dog",
    "Two": "2",
    "none": "0",
    "ten apples": "10 apples",
    "eleven": "eleven",  # number words go to ten
    "1,000": "1000",  # a comma between digits goes
    "red, white": "red white",
    "red,white": "red white",  # a mark between letters is a space
    "black-and-white": "black and white",
    "wi-fi .": "wi fi",
    "yes/no": "yes no",
    "3.5 feet": "3.5 feet",  # a point in front of a digit stays
    "Mr. Smith": "mr smith",
    "it isnt": "it isn't",
    "dont": "don't",
    "couldnt've": "couldn't've",
    "couldn'tve": "couldn't've",
    "twas": "'twas",
    "yalld've": "yalld've",  # two apostrophes are missing: not in the list
    "shed": "shed",  # a word
    "what?\n": "what",
    "left\tside": "left side",
    "(left)": "left",
    "a": "",
}


@pytest.mark.parametrize(("answer", "expected"), EXAMPLES.items())
def test_an_answer_is_normalised(answer, expected):
    assert normalised(answer) == expected


def test_the_list_of_contractions_is_the_one_of_vqa():
    """Counted in VQA's script: 120 entries, of which four begin with a capital and so meet no
    lower-cased word, and two stand for themselves."""
    assert len(CONTRACTIONS) == 120 - 4 - 2
    assert CONTRACTIONS["youre"] == "you're" and CONTRACTIONS["ow's'at"] == "'ow's'at"
    assert CONTRACTIONS["somebody'd"] == "somebodyd"
    assert all(key == key.lower() != value for key, value in CONTRACTIONS.items())


@pytest.mark.parametrize(
    ("agreeing", "expected"), [(0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (10, 1.0)]
)
def test_accuracy_is_the_mean_over_leaving_each_person_out(agreeing, expected):
    """Of ten people three agree with the answer: left out is one of the three, 3 times, which
    leaves two (2/3), or another one, 7 times (1): 0.3 * 2/3 + 0.7 = 0.9."""
    labels = ["two"] * agreeing + [f"other {i}" for i in range(10 - agreeing)]
    assert accuracy("2", labels) == pytest.approx(expected)


def test_few_answers_are_enough_where_few_were_given():
    assert accuracy("The Dog.", ["dog"]) == 1.0
    assert accuracy("cat", ["dog"]) == 0.0
    assert accuracy("dog", ["dog", "puppy", "animal"]) == 1.0
    assert accuracy("dog", ["dog", "puppy", "animal", "pet"]) == pytest.approx(1 / 4)


def test_token_f1():
    assert token_f1("a big red star", "red star") == pytest.approx(2 * 2 / (3 + 2))
    assert token_f1("red red", "red") == pytest.approx(2 / 3)
    assert token_f1("", "the") == 1.0 and token_f1("", "star") == 0.0


@given(st.text(max_size=40), st.text(max_size=40))
def test_scores_are_shares_and_equal_texts_are_right(first, second):
    assert accuracy(first, [first]) == token_f1(first, first) == 1.0
    assert 0 <= token_f1(first, second) == token_f1(second, first) <= 1
    assert 0 <= accuracy(first, [second] * 10) <= 1
