"""BLEU, ROUGE-L and CIDEr-D against sacrebleu and pycocoevalcap, where they are installed."""

from __future__ import annotations

import numpy
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from errors import PhiSightError
from evaluation.captions import Cider, common_subsequence, rouge_l, words
from evaluation.task import Answered, Asked
from evaluation.tasks.caption import Caption

SENTENCE = st.lists(st.sampled_from("a big red blue star cross in the middle".split()),
                    min_size=1, max_size=12)  # fmt: skip
PICTURE = st.tuples(SENTENCE, st.lists(SENTENCE, min_size=1, max_size=4))
PICTURES = st.lists(PICTURE, min_size=2, max_size=8)


@settings(max_examples=60, deadline=None)
@given(PICTURES)
def test_cider_is_the_one_of_pycocoevalcap(pictures):
    scorer = pytest.importorskip("pycocoevalcap.cider.cider_scorer").CiderScorer(n=4, sigma=6.0)
    for answer, references in pictures:
        scorer += (" ".join(answer), [" ".join(reference) for reference in references])
    _, expected = scorer.compute_score()
    ours = Cider([references for _, references in pictures])
    found = [ours.score(answer, references) for answer, references in pictures]
    assert found == pytest.approx(expected.tolist(), abs=1e-9)


@settings(max_examples=100, deadline=None)
@given(PICTURE)
def test_rouge_l_is_the_one_of_pycocoevalcap(picture):
    answer, references = picture
    rouge = pytest.importorskip("pycocoevalcap.rouge.rouge").Rouge()
    expected = rouge.calc_score([" ".join(answer)], [" ".join(r) for r in references])
    assert rouge_l(answer, references) == pytest.approx(expected)


def test_rouge_l_and_cider_by_hand():
    assert common_subsequence("a red star".split(), "a big red cross".split()) == 2
    precision, recall = 2 / 3, 2 / 4
    assert rouge_l("a red star".split(), ["a big red cross".split()]) == pytest.approx(
        (1 + 1.44) * precision * recall / (recall + 1.44 * precision)
    )
    assert rouge_l([], ["a".split()]) == rouge_l("b".split(), ["a".split()]) == 0
    references = [["a red star in it".split()], ["a blue cross in it".split()]]
    cider = Cider(references)
    assert cider.score(references[0][0], references[0]) == pytest.approx(10)
    assert cider.score(["nothing"], references[0]) == 0
    assert words("A big, red star - it's “there”.") == ["a", "big", "red", "star", "it's", "there"]


def answered(pictures: list) -> list[Answered]:
    task = Caption()
    found = []
    for number, (answer, references) in enumerate(pictures):
        labels = tuple(" ".join(reference) + "." for reference in references)
        asked = Asked(str(number), f"{number}.png", "?", labels)
        text = " ".join(answer).capitalize() + "."
        found.append(Answered(asked, "right", text, task.scored(asked, text)))
    return found


@settings(max_examples=20, deadline=None)
@given(PICTURES)
def test_bleu_is_sacrebleus_of_the_whole_corpus(pictures):
    sacrebleu = pytest.importorskip("sacrebleu")
    given = answered(pictures)
    most = max(len(one.asked.labels) for one in given)
    streams = [
        [one.asked.labels[i] if i < len(one.asked.labels) else None for one in given]
        for i in range(most)
    ]
    expected = sacrebleu.BLEU().corpus_score([one.answer for one in given], streams).score
    found = Caption().figures(given)
    assert found["bleu_4"].value == pytest.approx(expected)
    for one in found.values():
        assert one.low - 1e-6 <= one.high and numpy.isfinite([one.low, one.high]).all()


def test_a_missing_package_is_told_before_anything_is_asked(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(PhiSightError, match="needs the package sacrebleu.*install it"):
        Caption().check()
