"""Many answers at once: each is what it would be alone, whoever joins, leaves or fails beside."""

from __future__ import annotations

import threading
import time

import numpy
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from random_model import (
    FEATURES,
    NO_PICTURES,
    PLACEHOLDER,
    Row,
    continued,
    phi,
    reference_phi,
    tokens,
)

from assistant.answer import Answer
from assistant.decoding import Decoding
from assistant.engine import Engine
from assistant.prefix import CONVERSATIONS, SHORTEST, PrefixCache, token_keys
from assistant.refusals import Busy
from assistant.sampling import Sampling
from assistant.text_stream import TextStream
from errors import PhiSightError
from model.cache import KeyValues, Memory

LIMIT = 12
NEVER = frozenset({0})  # a stop id: the pad token, which random weights seldom say


@pytest.fixture(scope="module")
def model():
    """LongRoPE changes over at 64 tokens: some rows cross while they are decoded."""
    return phi(64)


def ask(words: list[int], names: list[str], limit: int = LIMIT, **options) -> Answer:
    """Pictures first, then text. Every token is a piece of the answer's text: see `Letters`."""
    features = torch.stack([picture(name) for name in names]) if names else NO_PICTURES
    ids = [1] + [PLACEHOLDER] * (FEATURES[0] * len(names)) + words
    stream = TextStream(Letters())
    return Answer(ids, limit, features, names, **{"text": stream} | options)


class Letters:
    """A tokenizer: every token is one letter."""

    def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
        return "".join(chr(0x100 + token) for token in ids)


def tokens_in(text: str) -> list[int]:
    return [ord(letter) - 0x100 for letter in text]


def picture(name: str) -> torch.Tensor:
    """(tokens, dim) features that belong to a name."""
    return torch.randn(FEATURES, generator=torch.Generator().manual_seed(ord(name)))


def questions() -> list[Answer]:
    """Prompts of different lengths with one, two and no pictures."""
    return [
        ask(tokens(20, 1), ["a"]),
        ask(tokens(45, 2), ["b", "c"]),
        ask(tokens(60, 3), []),
        ask(tokens(5, 4), ["a"]),
    ]


def alone(model, answer: Answer, stop_ids=NEVER) -> list[int]:
    """What the same prompt is continued with when nothing runs beside it."""
    prompt = answer.ids[: answer.prompt_tokens]
    (said,) = continued(
        model,
        [(prompt, answer.image_features)],
        stop_ids,
        answer.max_new_tokens,
        sampling=answer.sampling,
    )
    return said


def submitted(engine: Engine, answer: Answer) -> Answer:
    engine.submit(answer)
    return answer


def said_in(answer: Answer) -> list[int]:
    """Its tokens, by the text that its reader gets."""
    return tokens_in("".join(answer))


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
    said = [tuple(alone(model, answer)) for answer in variants]
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


def test_answers_together_are_the_answers_alone(engine, model):
    answers = questions()
    expected = [alone(model, answer) for answer in answers]
    one = engine(max_rows=3)  # the fourth waits until another has ended
    one.submit(*answers)
    assert [said_in(answer) for answer in answers] == expected
    assert [answer.tokens for answer in answers] == expected
    assert {answer.finish_reason for answer in answers} == {"length"}
    assert one.statistics()["running"] == one.statistics()["waiting"] == 0
    assert one.statistics()["tokens_generated"] == sum(map(len, expected))


def test_answers_that_come_later_join_the_batch(engine, model):
    answers = questions()
    expected = [alone(model, answer) for answer in answers]
    one = engine()
    firsts = []
    for answer in answers:
        firsts.append(submitted(one, answer).next_piece())  # the ones before are under way
    for answer, first, wanted in zip(answers, firsts, expected):
        assert tokens_in(first + "".join(answer)) == wanted == answer.tokens


def test_a_stop_id_ends_one_row_and_not_its_neighbours(model):
    answers = questions()
    whole = [alone(model, answer) for answer in answers]
    stop = frozenset({whole[0][3]})
    one = Engine(model, stop, FEATURES[0])
    one.submit(*answers)
    for answer, wanted in zip(answers, whole):
        said = said_in(answer)
        cut = [token in stop for token in wanted]
        assert said == (wanted[: cut.index(True)] if any(cut) else wanted)
        assert answer.finish_reason == ("stop" if any(cut) else "length")
    one.close()


def test_a_reader_who_goes_costs_at_most_a_token_more(engine):
    one = engine()
    answer = submitted(one, ask(tokens(20, 5), ["a"], 150))
    for _ in range(3):
        answer.next_piece()
    answer.cancel()
    had = len(answer.tokens)
    answer.wait()
    assert answer.finish_reason == "cancelled"
    assert len(answer.tokens) <= had + 1
    assert one.statistics()["running"] == 0


def test_leaving_the_loop_over_an_answer_ends_it(engine):
    answer = submitted(engine(), ask(tokens(20, 5), ["a"], 150))
    with pytest.raises(ZeroDivisionError):
        for _ in answer:
            raise ZeroDivisionError  # a page that fails: nobody reads on
    answer.wait()
    assert answer.finish_reason == "cancelled" and len(answer.tokens) < 150


def test_one_that_is_cancelled_while_it_waits_never_runs(engine):
    one = engine(max_rows=1)
    first, second = questions()[:2]
    one.submit(first, second)
    second.cancel()
    assert len(said_in(first)) == LIMIT
    assert said_in(second) == [] and second.finish_reason == "cancelled"


def test_one_that_is_cancelled_while_it_waits_ends_before_those_that_run(engine):
    one = engine(max_rows=1)
    running = submitted(one, ask(tokens(20, 5), [], 150))
    running.next_piece()
    waiting = submitted(one, questions()[2])
    waiting.cancel()
    waiting.wait()
    assert waiting.finish_reason == "cancelled" and running.finish_reason is None
    running.cancel()


def test_a_full_queue_says_so(engine):
    one = engine(max_rows=1, queue_limit=2)
    running = submitted(one, ask(tokens(20, 5), [], 150))
    running.next_piece()
    waiting = [submitted(one, questions()[2]) for _ in range(2)]
    with pytest.raises(Busy, match="2 questions wait"):
        one.submit(questions()[2])
    waiting[0].cancel()  # whoever has gone takes no place
    waiting.append(submitted(one, questions()[2]))
    assert said_in(waiting.pop(0)) == []
    running.cancel()
    assert all(len(said_in(answer)) == LIMIT for answer in waiting)


def test_without_a_queue_there_is_room_for_what_runs_at_once(engine):
    one = engine(max_rows=3, queue_limit=0)
    answers = questions()
    with pytest.raises(Busy):
        one.submit(*answers)  # all or none
    assert one.statistics()["waiting"] == 0
    one.submit(*answers[:3])
    assert all(len(said_in(answer)) == LIMIT for answer in answers[:3])


def test_an_answer_that_fails_tells_its_reader_and_harms_no_other(engine, model):
    one = engine()
    good = questions()
    broken = Answer(good[0].ids, LIMIT, good[0].image_features[:, :-1], ["a"])
    running = submitted(one, ask(tokens(20, 5), [], 40))
    first = running.next_piece()
    one.submit(broken)
    with pytest.raises(PhiSightError, match="picture slots"):
        list(broken)
    assert broken.finish_reason == "failed"
    assert tokens_in(first + "".join(running)) == alone(model, running)
    assert said_in(submitted(one, good[1])) == alone(model, good[1])


def test_closing_ends_what_runs(model):
    one = Engine(model, NEVER, FEATURES[0])
    answer = submitted(one, ask(tokens(20, 5), [], 5000))
    answer.next_piece()
    one.close()
    answer.wait()
    assert answer.finish_reason == "cancelled"
    with pytest.raises(PhiSightError, match="closed"):
        one.submit(questions()[0])


# -- who reads ------------------------------------------------------------------------------------


class Heard:
    """A subscriber that keeps what it is told, by which thread."""

    def __init__(self) -> None:
        self.pieces: list[str | None] = []
        self.threads: set[str] = set()
        self.ended = threading.Event()

    def __call__(self, piece: str | None) -> None:
        self.pieces.append(piece)
        self.threads.add(threading.current_thread().name)
        if piece is None:
            self.ended.set()


def test_a_subscriber_is_told_every_piece_and_the_end_by_the_engine(engine, model):
    answer, heard = questions()[0], Heard()
    answer.subscribe(heard)
    engine().submit(answer)
    assert heard.ended.wait(60)
    *pieces, end = heard.pieces
    assert tokens_in("".join(pieces)) == alone(model, answer) and end is None
    assert None not in pieces and "" not in pieces
    assert heard.threads == {"engine"} and answer.finish_reason == "length"


@pytest.mark.parametrize("when", ["under way", "ended"])
def test_who_subscribes_late_misses_nothing(engine, model, when):
    answer, heard = ask(tokens(20, 1), ["a"], 40), Heard()
    one = engine()
    one.submit(answer)
    deadline = time.monotonic() + 60
    while not (answer.finish_reason if when == "ended" else answer.tokens):
        assert time.monotonic() < deadline
    answer.subscribe(heard)
    assert heard.ended.wait(60)
    assert tokens_in("".join(heard.pieces[:-1])) == alone(model, answer)
    assert heard.pieces[-1] is None


def test_an_answer_has_one_reader(engine):
    answer = questions()[0]
    answer.subscribe(Heard())
    for again in (lambda: answer.subscribe(Heard()), answer.next_piece, lambda: list(answer)):
        with pytest.raises(RuntimeError, match="a reader already"):
            again()


def test_a_subscriber_that_fails_ends_its_answer_and_no_other(engine, model, caplog):
    one, broken, good = engine(), ask(tokens(20, 5), [], 150), questions()[0]

    def fail(piece: str | None) -> None:
        raise ZeroDivisionError

    broken.subscribe(fail)
    one.submit(broken, good)
    assert said_in(good) == alone(model, good)
    deadline = time.monotonic() + 60
    while broken.finish_reason is None:
        assert time.monotonic() < deadline
    assert broken.finish_reason == "cancelled" and len(broken.tokens) <= 2
    assert "ZeroDivisionError" in caplog.text


def test_a_subscriber_may_cancel(engine):
    answer, heard = ask(tokens(20, 5), [], 150), Heard()

    def one_piece_is_enough(piece: str | None) -> None:
        heard(piece)
        answer.cancel()

    answer.subscribe(one_piece_is_enough)
    engine().submit(answer)
    assert heard.ended.wait(60)
    assert len(heard.pieces) == 2 and answer.finish_reason == "cancelled"


def test_a_filter_that_fails_harms_no_other_answer(engine, model):
    def fail(text: str, final: bool) -> int | None:
        raise ZeroDivisionError

    one, good = engine(), questions()[0]
    broken = ask(tokens(5, 4), ["a"], text=TextStream(Letters(), content_filter=fail))
    one.submit(broken, good)
    with pytest.raises(ZeroDivisionError):
        broken.wait()
    assert broken.finish_reason == "failed" and said_in(good) == alone(model, good)


def test_a_stop_string_ends_its_row_at_its_token(engine, model):
    whole = alone(model, questions()[0])
    mark = Letters().decode(whole[4:6], True)
    place = Letters().decode(whole, True).index(mark)
    answer = ask(tokens(20, 1), ["a"], text=TextStream(Letters(), [mark]))
    one = engine()
    one.submit(answer)
    assert said_in(answer) == whole[:place] and answer.finish_reason == "stop"
    assert answer.tokens == whole[: place + 2] and answer.completion_tokens == place + 2 < LIMIT


# -- each by its own settings ---------------------------------------------------------------------


def test_a_seed_means_the_same_among_others(engine):
    def sampled(one: Engine, seed: int, beside: int) -> list[int]:
        answer = ask(tokens(20, 1), ["a"], sampling=Sampling(temperature=2.0), seed=seed)
        others = questions()[1 : 1 + beside]
        one.submit(answer, *others)
        for other in others:
            other.wait()
        return said_in(answer)

    assert sampled(engine(), 1, 0) == sampled(engine(), 1, 3)
    assert sampled(engine(), 1, 0) != sampled(engine(), 2, 0)


@torch.no_grad()
def test_the_repetition_penalty_is_that_of_transformers(engine, model):
    request = ask(tokens(20, 1), [], sampling=Sampling(repetition_penalty=1.3))
    theirs = reference_phi(64).generate(
        input_ids=torch.tensor([request.ids]),
        max_new_tokens=LIMIT,
        do_sample=False,
        attention_mask=torch.ones(1, request.prompt_tokens, dtype=torch.long),
        repetition_penalty=1.3,
        eos_token_id=sorted(NEVER),
        suppress_tokens=[PLACEHOLDER],
    )[0, request.prompt_tokens :]
    assert said_in(submitted(engine(), request)) == theirs.tolist() == alone(model, request)
    assert theirs.tolist() != alone(model, ask(tokens(20, 1), []))


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
        again, anew = (
            Answer(list(ids), LIMIT, features, names, text=TextStream(Letters())) for _ in range(2)
        )
        said = said_in(submitted(kept, again))
        assert said == said_in(submitted(fresh, anew)) == alone(model, again)
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
        answer = submitted(kept, ask(tokens(20, 1), [name]))
        assert said_in(answer) == alone(model, answer)


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
def test_rows_keep_their_logits_whoever_joins_and_leaves(model):
    """The batch itself: logits after joins and drops are those of a batch of one."""
    rows = [Row(list(a.ids), a.image_features) for a in questions()]
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


def test_time_to_first_token_is_told(engine):
    answer = submitted(engine(), questions()[0])
    started = time.perf_counter()
    list(answer)
    assert 0 < answer.seconds_to_first_token <= time.perf_counter() - started + 1
