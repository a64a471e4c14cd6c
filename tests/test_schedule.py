"""Prompts read in pieces between the tokens of others: who waits for whom, and for what memory."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from random_model import FEATURES, NO_PICTURES, PLACEHOLDER, Row, continued, phi, tokens

from assistant import schedule
from assistant.answer import Answer
from assistant.decoding import PIECE, Decoding, piece_of
from assistant.engine import Engine
from assistant.sampling import Sampling
from assistant.schedule import OLDEST_EVERY, PATIENCE, STEP, Schedule
from errors import PhiSightError
from model.cache import BLOCK, default_kv_bytes

SMALL = 16  # tokens of a piece in the tests with a model
NEVER = frozenset({0})


@pytest.fixture(scope="module")
def model():
    """LongRoPE changes over at 64 tokens."""
    return phi(64)


@pytest.fixture
def small_pieces(monkeypatch):
    monkeypatch.setattr("assistant.decoding.PIECE", SMALL)
    monkeypatch.setattr("assistant.schedule.STEP", SMALL)


@pytest.fixture
def engine(model, small_pieces) -> Iterator:
    made = []

    def make(**options) -> Engine:
        made.append(Engine(model, NEVER, FEATURES[0], **options))
        return made[-1]

    yield make
    for one in made:
        one.close()


@pytest.fixture
def passes(model) -> Iterator[list[list[list[int]]]]:
    """Of every pass through the model, the positions that are fed of each row."""
    seen: list[list[list[int]]] = []

    def look(_, arguments) -> None:
        positions = arguments[1][0]
        seen.append([part.tolist() for part in positions.split(list(arguments[2]))])

    with model.language_model.model.register_forward_pre_hook(look):
        yield seen


def question(length: int, seed: int = 0, limit: int = 8, **options) -> Answer:
    return Answer(tokens(length, seed), limit, NO_PICTURES, **options)


class EveryToken:
    """A text of which every token is a piece."""

    shown, finished, stop = "", None, ()

    def push(self, token: int) -> str:
        return "x"

    def end(self) -> str:
        return ""


def wait_for(condition) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


# -- what is read in pieces means the same ---------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("length", [15, 16, 17, 40, 60, 64, 65, 130])
def test_pieces_give_the_logits_of_the_whole(model, length, monkeypatch):
    """Pictures are cut by pieces too, and the factors of LongRoPE are those of the whole."""
    features = torch.randn(3, *FEATURES, generator=torch.Generator().manual_seed(1))
    ids = tokens(length, 2)
    for start in (1, 6, 10):
        ids[start : start + FEATURES[0]] = [PLACEHOLDER] * FEATURES[0]
    found = []
    for piece in (10**9, SMALL, 3):
        monkeypatch.setattr("assistant.decoding.PIECE", piece)
        decoding = Decoding(model)
        decoding.add([Row(list(ids), features), Row(tokens(20), NO_PICTURES)])
        found.append({len(row.ids): logits for row, logits in zip(decoding.rows, decoding.logits)})
    for pieces in found[1:]:
        for total, whole in found[0].items():
            torch.testing.assert_close(pieces[total], whole, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(temperature=2.0)])
def test_answers_in_company_are_the_answers_alone(model, small_pieces, sampling):
    """Some cross to the long factors while they are decoded, and are read again, in pieces."""
    prompts = [(tokens(n, n), NO_PICTURES) for n in (5, 58, 62, 100, 17, 63)]
    options = {"sampling": sampling, "seed": 7}
    alone = [continued(model, [prompt], NEVER, 12, **options)[0] for prompt in prompts]
    assert continued(model, prompts, NEVER, 12, **options) == alone


@given(st.integers(1, 2000), st.integers(0, 1999))
def test_pieces_end_at_the_same_places_wherever_reading_begins(total, known):
    """After a beginning that is known from before, too."""
    place = min(known, total - 1)
    while place < total:
        place += piece_of(total, total - place)
        assert place == total or place % PIECE == 0
    assert place == total


# -- in between the tokens of others ---------------------------------------------------------------


def test_a_stream_has_a_token_between_any_two_pieces(engine, passes):
    one, long = engine(), question(170, 1, 3)
    stream = question(70, limit=60, text=EveryToken())

    def told(piece: str | None) -> None:
        if len(stream.tokens) == 3:
            one.submit(long)

    stream.subscribe(told)
    one.submit(stream)
    wait_for(lambda: long.submitted)
    long.wait()
    reads = [i for i, fed in enumerate(passes) if len(fed[0]) > 1]
    assert len(reads) == -(-70 // SMALL) + -(-170 // SMALL)
    assert all(sum(map(len, passes[i])) <= SMALL for i in reads)
    of_the_long_one = reads[-(-70 // SMALL) :]
    assert [b - a for a, b in zip(of_the_long_one, of_the_long_one[1:])] == [2] * 10
    wait_for(lambda: stream.finish_reason)
    assert len(stream.tokens) == 60


def test_a_short_prompt_is_not_behind_long_ones(engine):
    one, order = engine(), []
    lengths = [150, 160, 170, 9]
    answers = [question(length, length, 4) for length in lengths]
    for answer in answers:
        answer.remember = lambda _, length=len(answer.ids): order.append(length)
    one.submit(*answers)
    for answer in answers:
        answer.wait()
    assert order[0] == 9 and sorted(order) == sorted(lengths)


def test_who_leaves_while_being_read_is_read_no_further(model, engine, passes):
    one, long, after = engine(), question(250, 1), question(5, 2)

    def leave(*_) -> None:
        if len(passes) == 2:
            long.cancel()

    with model.language_model.model.register_forward_pre_hook(leave):
        one.submit(long)
        long.wait()
    assert long.finish_reason == "cancelled" and long.tokens == []
    assert one.statistics()["running"] == one.statistics()["kv_bytes_reserved"] == 0
    one.submit(after)
    after.wait()
    assert [len(fed[0]) for fed in passes[:3]] == [SMALL, SMALL, 5]


def test_a_pass_that_fails_harms_only_those_that_are_read_in_it(engine, monkeypatch):
    one = engine()
    running = question(10, limit=40)
    one.submit(running)
    wait_for(lambda: running.tokens)
    read = one._decoding.read

    def fail(readings) -> None:
        if any(len(reading.row.ids) == 33 for reading in readings):
            raise MemoryError("no room")
        read(readings)

    monkeypatch.setattr(one._decoding, "read", fail)
    broken, good = question(33), question(50, 3)
    one.submit(broken, good)
    with pytest.raises(MemoryError):
        broken.wait()
    for answer, count in ((running, 40), (good, 8)):
        answer.wait()
        assert len(answer.tokens) == count


# -- the schedule alone ---------------------------------------------------------------------------


@dataclass(eq=False)
class Asked:
    ids: list[int]
    unread: int
    submitted: float


def asked(length: int, when: float) -> Asked:
    return Asked([0] * length, length, when)


class Line:
    """Prompts that come, begin where `room` allows it, and are read to their end."""

    def __init__(self, room=lambda prompt: True) -> None:
        self.schedule, self.room = Schedule(), room
        self.waiting: list[Asked] = []
        self.begun: list[Asked] = []

    def begin(self, prompt: Asked) -> bool:
        if not self.room(prompt):
            return False
        self.waiting.remove(prompt)
        self.begun.append(prompt)
        return True

    def step(self) -> list[Asked]:
        """Those that were read to their end in it."""
        for prompt in self.schedule.choose(list(self.begun), list(self.waiting), self.begin):
            prompt.unread -= piece_of(len(prompt.ids), prompt.unread)
        ended = [prompt for prompt in self.begun if not prompt.unread]
        self.begun = [prompt for prompt in self.begun if prompt.unread]
        return ended


@given(st.lists(st.integers(1, 3000), min_size=1, max_size=20))
def test_every_step_reads_something_and_no_more_than_a_step(lengths):
    line = Line()
    line.waiting = [asked(length, n) for n, length in enumerate(lengths)]
    left = sum(lengths)
    while line.waiting or line.begun:
        line.step()
        now = sum(prompt.unread for prompt in (*line.waiting, *line.begun))
        assert 0 < left - now <= STEP
        left = now
    assert left == 0


@given(st.integers(1, 8), st.integers(1, STEP))
def test_a_long_prompt_is_read_although_short_ones_never_stop_coming(pieces, short):
    line = Line()
    long = asked(pieces * PIECE, 0.0)
    line.waiting = [long]
    for step in range(1, (pieces + 1) * OLDEST_EVERY + 1):
        line.waiting += [asked(short, float(step)) for _ in range(-(-STEP // short))]
        if long in line.step():
            return
    raise AssertionError(f"{long.unread} tokens are left")


def test_a_short_prompt_waits_for_two_steps_at_most():
    line = Line()
    line.waiting = [asked(3000, float(n)) for n in range(14)]
    for step in range(40):
        line.step()
        short = asked(20, 100.0 + step)
        line.waiting.append(short)
        assert short in line.step() + line.step()


def test_one_that_needs_much_memory_is_not_passed_by_for_ever():
    """Room for ten; the large one needs all of it, small ones always hold two of it."""
    held = [asked(5, 0.0), asked(5, 0.0)]
    line = Line(lambda prompt: len(held) + (10 if len(prompt.ids) > 99 else 1) <= 10)
    large = asked(100, 0.0)
    line.waiting, overtook = [large], 0
    for step in range(10 * PATIENCE):
        line.waiting.append(asked(5, 1.0 + step))
        ended = line.step()
        if large in ended:
            break
        overtook += len(ended)
        held = [*held, *ended][-2:] if ended else held[1:]
    assert large not in line.waiting and overtook <= PATIENCE


# -- memory ---------------------------------------------------------------------------------------


def test_a_long_row_beside_short_ones_holds_what_it_needs_and_they_do_not(engine, model):
    one = engine()
    answers = [question(180, 1, 60), *(question(4, n, 60) for n in range(15))]
    token = model.language_model.model.empty_cache().bytes_of(BLOCK) / BLOCK
    worst = 0.0

    def look(piece: str | None) -> None:
        nonlocal worst
        rows = [*one._decoding.rows, *(reading.row for reading in one._decoding.reading)]
        needed = sum(len(row.ids) * 1.25 + BLOCK for row in rows) * token
        worst = max(worst, one._decoding.bytes / needed)

    for answer in answers:
        answer.text = EveryToken()
        answer.subscribe(look)
    one.submit(*answers)
    wait_for(lambda: all(answer.finish_reason for answer in answers))
    assert 0.1 < worst <= 1


def test_what_does_not_fit_waits_and_what_never_fits_is_refused_with_its_numbers(engine, model):
    bytes_of = model.language_model.model.empty_cache().bytes_of
    one = engine(kv_bytes=bytes_of(3 * BLOCK))
    answers = [question(2 * BLOCK - 20, n, 12) for n in range(4)]  # two blocks each: one at a time
    expected = [continued(model, [(a.ids, NO_PICTURES)], NEVER, 12)[0] for a in answers]
    small = [question(5, n, 12) for n in range(4)]  # a block each
    with pytest.raises(PhiSightError, match=r"200 tokens .* 50 .* MiB .* limit .*--kv-memory"):
        one.submit(*answers, question(200, 1, 50))
    assert one.statistics()["waiting"] == 0  # all or none
    seen = []
    passes = one._decoding.read

    def read(readings) -> None:
        passes(readings)
        seen.append((one.statistics()["kv_bytes_reserved"], one._decoding.bytes))

    one._decoding.read = read
    one.submit(*answers, *small)
    for answer in (*answers, *small):
        answer.wait()
    assert [answer.tokens for answer in answers] == expected
    assert all(held <= reserved <= one.kv_bytes for reserved, held in seen)
    assert max(reserved for reserved, _ in seen) == one.kv_bytes
    assert one.statistics()["kv_bytes_reserved"] == 0
    wait_for(lambda: one.statistics()["kv_bytes"] == 0)


def test_the_memory_of_the_machine_is_the_default(monkeypatch):
    cpu = torch.device("cpu")
    assert 2**26 < default_kv_bytes(cpu) < 2**45
    monkeypatch.setattr("os.sysconf", lambda name: 2**16 if "PAGES" in name else 2**12)
    assert default_kv_bytes(cpu) <= 2**26
    assert schedule.STEP == PIECE
