"""Many answers at once: each is what it would be alone, whoever joins, leaves or fails beside."""

from __future__ import annotations

import threading
import time

import numpy
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from random_model import FEATURES, NO_PICTURES, PLACEHOLDER, phi, reference_phi, tokens

from assistant.decoding import Decoding, Row
from assistant.engine import Busy, Engine, Generation, Request
from assistant.prefix import CONVERSATIONS, SHORTEST, PrefixCache, token_keys
from assistant.sampling import Sampling, generate
from errors import PhiSightError
from model.cache import KeyValues, Memory

LIMIT = 12
NEVER = frozenset({0})  # a stop id: the pad token, which random weights seldom say


@pytest.fixture(scope="module")
def model():
    """LongRoPE changes over at 64 tokens: some rows cross while they are decoded."""
    return phi(64)


@pytest.fixture
def requests() -> list[Request]:
    """Prompts of different lengths with one, two and no pictures."""
    return [
        ask(tokens(20, 1), ["a"]),
        ask(tokens(45, 2), ["b", "c"]),
        ask(tokens(60, 3), []),
        ask(tokens(5, 4), ["a"]),
    ]


def picture(name: str) -> torch.Tensor:
    """(tokens, dim) features that belong to a name."""
    return torch.randn(FEATURES, generator=torch.Generator().manual_seed(ord(name)))


def ask(text: list[int], names: list[str], limit: int = LIMIT, *more, **options) -> Request:
    """Pictures first, then text."""
    features = torch.stack([picture(name) for name in names]) if names else NO_PICTURES
    ids = [1] + [PLACEHOLDER] * (FEATURES[0] * len(names)) + text
    return Request(ids, features, names, limit, *more, **options)


def alone(model, request: Request, stop_ids=NEVER) -> list[int]:
    return [
        token
        for (token,) in generate(
            model,
            [request.input_ids],
            request.image_features,
            stop_ids,
            request.max_new_tokens,
            request.sampling,
        )
    ]


def test_answers_here_depend_on_every_picture_and_token(model):
    """What gives the comparisons below their worth."""
    text = tokens(20, 1)
    variants = [
        ask(text, ["a"], 30),
        ask(text, ["b"], 30),
        ask(text, ["a", "b"], 30),
        ask(text, ["b", "a"], 30),
        ask(text, [], 30),
        ask([3, *text[1:]], ["a"], 30),
    ]
    said = [tuple(alone(model, request)) for request in variants]
    assert len(set(said)) >= len(said) - 1 and all(len(set(tokens)) > 3 for tokens in said)


@pytest.fixture
def engine(model):
    made, before = [], set(threading.enumerate())

    def make(**options) -> Engine:
        made.append(Engine(model, NEVER, FEATURES[0], **options))
        return made[-1]

    yield make
    for one in made:
        one.close()
    assert not set(threading.enumerate()) - before


def test_answers_together_are_the_answers_alone(engine, model, requests):
    expected = [alone(model, request) for request in requests]
    one = engine(max_rows=3)  # the fourth waits until another has ended
    generations = [one.submit(request) for request in requests]
    assert [list(generation) for generation in generations] == expected
    assert {generation.finish_reason for generation in generations} == {"length"}
    assert one.statistics()["running"] == one.statistics()["waiting"] == 0
    assert one.statistics()["tokens_generated"] == sum(map(len, expected))


def test_requests_that_come_later_join_the_batch(engine, model, requests):
    expected = [alone(model, request) for request in requests]
    one = engine()
    generations = []
    for request in requests:
        generations.append(one.submit(request))
        next(iter(generations[-1]))  # the ones before are under way
    for generation, wanted in zip(generations, expected):
        assert wanted[:1] + list(generation) == wanted == generation.tokens


def test_a_stop_id_ends_one_row_and_not_its_neighbours(model, requests):
    whole = [alone(model, request) for request in requests]
    stop = frozenset({whole[0][3]})
    one = Engine(model, stop, FEATURES[0])
    generations = [one.submit(request) for request in requests]
    for generation, wanted in zip(generations, whole):
        said = list(generation)
        cut = [token in stop for token in wanted]
        assert said == (wanted[: cut.index(True)] if any(cut) else wanted)
        assert generation.finish_reason == ("stop" if any(cut) else "length")
    one.close()


def test_a_reader_who_goes_costs_at_most_a_token_more(engine, requests):
    one = engine()
    generation = one.submit(ask(tokens(20, 5), ["a"], 150))
    for count, _ in enumerate(generation, start=1):
        if count == 3:
            generation.cancel()
            had = len(generation.tokens)
    assert generation.finish_reason == "cancelled"
    assert len(generation.tokens) <= had + 1
    assert one.statistics()["running"] == 0


def test_one_that_is_cancelled_while_it_waits_never_runs(engine, requests):
    one = engine(max_rows=1)
    first, second = one.submit(requests[0]), one.submit(requests[1])
    second.cancel()
    assert len(list(first)) == LIMIT
    assert list(second) == [] and second.finish_reason == "cancelled"


def test_a_full_queue_says_so(engine, requests):
    one = engine(max_rows=1, queue_limit=2)
    running = one.submit(ask(tokens(20, 5), [], 150))
    next(iter(running))
    waiting = [one.submit(requests[2]) for _ in range(2)]
    with pytest.raises(Busy, match="2 questions wait"):
        one.submit(requests[2])
    waiting[0].cancel()  # whoever has gone takes no place
    waiting.append(one.submit(requests[2]))
    assert list(waiting.pop(0)) == []
    running.cancel()
    assert all(len(list(generation)) == LIMIT for generation in waiting)


def test_a_request_that_fails_tells_its_reader_and_harms_no_other(engine, model, requests):
    one = engine()
    ids = requests[0].input_ids
    broken = Request(ids, requests[0].image_features[:, :-1], ["a"], LIMIT)
    running = one.submit(ask(tokens(20, 5), [], 40))
    said = [next(iter(running))]
    with pytest.raises(PhiSightError, match="picture slots"):
        list(one.submit(broken))
    assert said + list(running) == alone(model, running.request)
    assert list(one.submit(requests[1])) == alone(model, requests[1])


def test_closing_ends_what_runs(model, requests):
    one = Engine(model, NEVER, FEATURES[0])
    generation = one.submit(ask(tokens(20, 5), [], 5000))
    next(iter(generation))
    one.close()
    list(generation)
    assert generation.finish_reason == "cancelled"
    with pytest.raises(PhiSightError, match="closed"):
        one.submit(requests[0])


# -- each by its own settings ---------------------------------------------------------------------


def test_a_seed_means_the_same_among_others(engine, requests):
    def sampled(one: Engine, seed: int, beside: int) -> list[int]:
        generation = one.submit(ask(tokens(20, 1), ["a"], LIMIT, Sampling(temperature=2.0), seed))
        others = [one.submit(requests[n]) for n in range(1, 1 + beside)]
        said = list(generation)
        for other in others:
            list(other)
        return said

    assert sampled(engine(), 1, 0) == sampled(engine(), 1, 3)
    assert sampled(engine(), 1, 0) != sampled(engine(), 2, 0)


@torch.no_grad()
def test_the_repetition_penalty_is_that_of_transformers(engine, model):
    request = ask(tokens(20, 1), [], LIMIT, Sampling(repetition_penalty=1.3))
    theirs = (
        reference_phi(64)
        .generate(
            input_ids=torch.tensor([request.input_ids]),
            max_new_tokens=LIMIT,
            do_sample=False,
            attention_mask=torch.ones(1, len(request.input_ids), dtype=torch.long),
            repetition_penalty=1.3,
            eos_token_id=sorted(NEVER),
            suppress_tokens=[PLACEHOLDER],
        )[0, len(request.input_ids) :]
        .tolist()
    )
    assert list(engine().submit(request)) == theirs == alone(model, request)
    assert theirs != alone(model, ask(tokens(20, 1), []))


# -- what was read before -------------------------------------------------------------------------


@pytest.mark.parametrize("crosses", [False, True])
def test_a_next_turn_is_not_read_from_its_start_and_says_the_same(engine, model, crosses):
    """Three turns, each with a new picture; the last one may pass the 64 tokens of LongRoPE."""
    fresh, kept = engine(), engine(prefix_bytes=2**30)
    ids, names, fed = [1], [], 0
    for turn, name in enumerate("abc"):
        names = [*names, name]
        text = tokens(25 if crosses and turn == 2 else 2, turn)
        ids = [*ids, *[PLACEHOLDER] * FEATURES[0], *text]
        features = torch.stack([picture(n) for n in names])
        request = Request(ids, features, names, LIMIT)
        again = kept.submit(request)
        said = list(again)
        assert said == list(fresh.submit(request)) == alone(model, request)
        past_crossing = len(ids) > 64
        assert past_crossing == (crosses and turn == 2)
        assert again.reused_tokens == (0 if past_crossing or not turn else fed - 1)
        ids = [*ids, *said]
        fed = len(ids)  # the last token was said and not fed
    assert kept.statistics()["prefix_cache_hits"] > 0
    assert fresh.statistics()["prefix_cache_hits"] == 0


def test_another_picture_is_not_taken_for_the_one_before(engine, model):
    kept = engine(prefix_bytes=2**30)
    for name in "abab":
        request = ask(tokens(20, 1), [name])
        assert list(kept.submit(request)) == alone(model, request)


def keys_values(length: int) -> KeyValues:
    return KeyValues(Memory(torch.zeros(1, 2, 1, length, 2), length), length)


@given(
    st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=30), min_size=1, max_size=6),
    st.lists(st.integers(0, 2), min_size=1, max_size=30),
)
def test_the_longest_common_beginning_is_found(known, asked):
    cache = PrefixCache(2**20, crossing=None, whole=4)
    for ids in known:
        cache.put(numpy.array(ids), keys_values(len(ids)))
    common = [
        next((i for i, (a, b) in enumerate(zip(ids, asked)) if a != b), min(len(ids), len(asked)))
        for ids in known
    ]
    best = min(max(common), len(asked) - 1)
    found = cache.longest(numpy.array(asked))
    assert (found.length if found else 0) == (best if best >= SHORTEST else 0)


def test_no_more_bytes_than_allowed_and_the_oldest_goes():
    one = keys_values(10).bytes
    cache = PrefixCache(2 * one, crossing=None, whole=4)
    for number in range(3):
        cache.put(numpy.full(10, number), keys_values(10))
        assert cache.bytes <= 2 * one
    asked = [numpy.append(numpy.full(10, number), 9) for number in range(3)]
    assert cache.longest(asked[0]) is None
    assert cache.longest(asked[1]) is not None and cache.longest(asked[2]) is not None
    cache.put(numpy.full(30, 7), keys_values(30))  # larger than the whole cache
    assert cache.bytes == 2 * one


def test_no_more_conversations_than_can_be_compared():
    cache = PrefixCache(2**30, crossing=None, whole=4)
    for number in range(CONVERSATIONS + 5):
        cache.put(numpy.full(10, number), keys_values(10))
    assert cache.bytes == CONVERSATIONS * keys_values(10).bytes


def test_keys_of_other_longrope_factors_are_not_used():
    cache = PrefixCache(2**20, crossing=16, whole=4)
    cache.put(numpy.arange(12), keys_values(12))
    assert cache.longest(numpy.arange(16)).length == 12
    assert cache.longest(numpy.arange(17)) is None


def test_a_picture_is_reused_whole_or_not_at_all():
    ids = [1] * 8 + [PLACEHOLDER] * 8 + [2, 3]
    keys = token_keys(ids, PLACEHOLDER, ["a", "b"], 4)
    assert len(set(keys[8:16].tolist())) == 8 and (keys[8:16] < 0).all()
    cache = PrefixCache(2**20, crossing=None, whole=4)
    cache.put(keys[:14], keys_values(14))  # ends within the second picture
    assert cache.longest(keys).length == 12


@torch.no_grad()
def test_rows_keep_their_logits_whoever_joins_and_leaves(model, requests):
    """The batch itself: logits after joins and drops are those of a batch of one."""
    rows = [Row(list(r.input_ids), r.image_features) for r in requests]
    batch = Decoding(model)
    batch.add(rows[:2])
    batch.advance([5, 6])
    batch.add(rows[2:])
    batch.keep([3, 1, 0])
    batch.advance([7, 8, 9])
    for row, logits in zip(batch.rows, batch.logits):
        single = Decoding(model)
        single.add([Row(list(row.ids), row.image_features)])
        torch.testing.assert_close(logits, single.logits[0], rtol=1e-4, atol=1e-4)
    assert batch.past_of(0).length == len(batch.rows[0].ids)


def test_time_to_first_token_is_told(engine, requests):
    generation = engine().submit(requests[0])
    started = time.perf_counter()
    list(generation)
    assert 0 < generation.seconds_to_first_token <= time.perf_counter() - started + 1
    assert isinstance(generation, Generation)
