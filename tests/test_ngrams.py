"""No n-gram twice: the ids of transformers, a naive count, pictures, and an end that always may."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from random_model import NO_PICTURES, PLACEHOLDER, VOCABULARY, continued, phi, reference_phi, tokens
from transformers import NoRepeatNGramLogitsProcessor

from assistant.ngrams import Ngrams
from assistant.sampling import Sampling

LIMIT = 48
NEVER = frozenset({0})  # a stop id that the prompts here do not have


@pytest.fixture(scope="module")
def model():
    return phi(64)


@pytest.fixture(scope="module")
def reference():
    return reference_phi(64)


@torch.no_grad()
@pytest.mark.parametrize("penalty", [1.0, 0.8])
@pytest.mark.parametrize("size", [1, 2, 3])
def test_the_ids_are_those_of_transformers(model, reference, size, penalty):
    """Greedy, past LongRoPE's crossing, with a penalty that favours what came before."""
    sampling = Sampling(repetition_penalty=penalty, no_repeat_ngram_size=size)
    prompts = [tokens(5, 1) * 3, tokens(30, 2), tokens(2, 3)]
    ours = continued(model, [(p, NO_PICTURES) for p in prompts], NEVER, LIMIT, sampling=sampling)
    plain = Sampling(repetition_penalty=penalty)
    free = continued(model, [(p, NO_PICTURES) for p in prompts], NEVER, LIMIT, sampling=plain)
    assert ours != free  # else nothing was compared
    for prompt, said in zip(prompts, ours, strict=True):
        theirs = reference.generate(
            input_ids=torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            max_new_tokens=LIMIT,
            do_sample=False,
            no_repeat_ngram_size=size,
            repetition_penalty=penalty,
            eos_token_id=sorted(NEVER),
            suppress_tokens=[PLACEHOLDER],
        )[0, len(prompt) :]
        assert said == [token for token in theirs.tolist() if token not in NEVER]


ids = st.lists(st.integers(0, 4), min_size=1, max_size=40)


@given(ids, st.integers(1, 5))
def test_what_is_forbidden_is_what_transformers_forbids(sequence, size):
    scores = torch.zeros(1, 5)
    theirs = NoRepeatNGramLogitsProcessor(size)(torch.tensor([sequence]), scores)
    ours = Ngrams(size, slot=9, ends=())
    for length in range(len(sequence)):  # token by token, as they are chosen
        ours.repeating(sequence[:length])
    assert torch.equal(ours.forbid(scores[0], sequence), theirs[0])
    assert torch.equal(Ngrams(size, 9, ()).forbid(scores[0], sequence), theirs[0])


@settings(max_examples=400)
@example([0, 4, 1, 4], 2, 0)  # behind a picture as behind the one before
@example([4, 0, 1, 4, 0], 3, 4)
@given(ids, st.integers(1, 5), st.integers(0, 40))
def test_pictures_do_not_count_and_an_answer_may_always_end(sequence, size, told):
    """Slot 4, end 3, against a count of every window."""
    ngrams = Ngrams(size, slot=4, ends={3})
    ngrams.repeating(sequence[:told])
    windows = [tuple(sequence[i : i + size]) for i in range(len(sequence) - size + 1)]
    last = tuple(sequence[len(sequence) - size + 1 :]) if size > 1 else ()
    expected = {
        token
        for token in range(3)
        if len(sequence) >= size - 1 and 4 not in last and (*last, token) in windows
    }
    assert set(ngrams.repeating(sequence)) == expected


def test_where_every_token_is_used_up_the_answer_ends(model):
    """Not one token may come twice, and the prompt has all of them."""
    prompt = list(range(1, VOCABULARY - 1))
    for temperature in (0.0, 2.0):
        sampling = Sampling(temperature, no_repeat_ngram_size=1)
        assert continued(model, [(prompt, NO_PICTURES)], {0}, LIMIT, sampling=sampling) == [[]]


def test_each_row_has_its_own(model):
    """Beside a row without, and drawn: the first is as it is alone, and repeats nothing."""
    prompt = tokens(5, 1) * 3
    sampling = Sampling(0.3, repetition_penalty=0.8, no_repeat_ngram_size=2)
    options = {"sampling": sampling, "seed": 5}
    [alone] = continued(model, [(prompt, NO_PICTURES)], NEVER, LIMIT, **options)
    together = continued(
        model, [(prompt, NO_PICTURES), (tokens(9, 4), NO_PICTURES)], NEVER, LIMIT, **options
    )
    assert together[0] == alone
    pairs = list(pairwise([*prompt, *alone]))[len(prompt) - 1 :]
    assert len(set(pairs)) == len(pairs) > 10
