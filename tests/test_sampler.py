"""The order of the data, how rows are packed, and the tensors of a batch."""

import hashlib
import json
import random

import pytest
import torch
from conftest import ROOT
from hypothesis import given
from hypothesis import strategies as st

from data import sampler
from data.chat import ChatFormat, RenderedSample, load_tokenizer, render
from data.collate import IGNORED, collate
from data.dataset import conversation_or_fault
from data.sampler import pack, plan, shuffled
from data.world import make_scene, records_of
from errors import PhiSightError

PLAN_DIGEST = "4e531f22ba4c7caf1adf7e0a55f13dde97194c5c80e472d7e14ffbcbb5ae9f0c"

lengths_and_row = st.lists(st.integers(1, 60), max_size=80).flatmap(
    lambda lengths: st.tuples(
        st.just(lengths), st.integers(max(lengths, default=1), max(lengths, default=1) + 90)
    )
)


# -- the plan -------------------------------------------------------------------------------------


@given(lengths_and_row, st.integers(0, 5), st.integers(0, 3))
def test_every_conversation_once_and_no_row_too_long(given_lengths, seed, epoch):
    lengths, row_tokens = given_lengths
    rows = plan(seed, epoch, lengths, row_tokens)
    assert sorted(index for row in rows for index in row) == list(range(len(lengths)))
    assert all(0 < sum(lengths[index] for index in row) <= row_tokens for row in rows)
    assert rows == plan(seed, epoch, list(lengths), row_tokens)


@given(lengths_and_row)
def test_no_two_rows_of_a_window_would_fit_into_one(given_lengths):
    lengths, row_tokens = given_lengths
    filled = sorted(sum(lengths[i] for i in row) for row in plan(0, 0, lengths, row_tokens))
    assert len(filled) < 2 or filled[0] + filled[1] > row_tokens


def test_windows_are_packed_separately(monkeypatch):
    monkeypatch.setattr(sampler, "PACKING_WINDOW", 4)
    rows = plan(0, 0, [1] * 10, 100)
    assert sorted(map(len, rows)) == [2, 4, 4]


def test_epochs_and_seeds_give_other_orders():
    lengths = [5 + index % 40 for index in range(200)]
    plans = [plan(seed, epoch, lengths, 100) for seed in range(3) for epoch in range(3)]
    assert all(first != second for i, first in enumerate(plans) for second in plans[:i])


def test_rows_come_in_no_order_of_length():
    lengths = list(range(1, 401))
    firsts = [lengths[row[0]] for row in plan(0, 0, lengths, 400)]
    assert firsts not in (sorted(firsts), sorted(firsts, reverse=True))


@given(st.integers(0, 60), st.integers(0, 9), st.integers(0, 9))
def test_shuffled_is_a_permutation(count, seed, epoch):
    order = shuffled(count, seed, epoch, "order")
    assert sorted(order) == list(range(count))
    assert order == shuffled(count, seed, epoch, "order")


def test_purposes_are_independent():
    assert shuffled(50, 0, 0, "order") != shuffled(50, 0, 0, "rows")


def test_a_conversation_longer_than_a_row_names_both_numbers():
    with pytest.raises(PhiSightError, match=r"--row-tokens 30.*\b31 tokens"):
        plan(0, 0, [5, 31, 8], 30)


def test_best_fit_takes_the_fullest_row_that_has_room():
    assert pack(range(5), [6, 5, 4, 3, 2], 10) == [[0, 2], [1, 3, 4]]


def test_the_order_is_the_one_that_checkpoints_rely_on():
    """A change of this digest makes every saved position point at other rows: then say so."""
    lengths = [random.Random(index).randint(5, 300) for index in range(1500)]
    plans = [plan(7, epoch, lengths, 512) for epoch in range(2)]
    assert hashlib.sha256(json.dumps(plans).encode()).hexdigest() == PLAN_DIGEST


def test_padding_of_world_conversations_is_under_five_percent():
    tokenizer = load_tokenizer(ROOT / "assets/tiny/phi3")
    chat_format = ChatFormat.from_tokenizer(tokenizer, 36)
    lengths = []
    for index in range(120):
        rng = random.Random(index)
        for record in records_of(make_scene(rng), "a.png", rng, turns=9):
            messages = conversation_or_fault(record).messages
            lengths.append(len(render(messages, chat_format).input_ids))
    assert max(lengths) > 2 * min(lengths)
    rows = plan(0, 0, lengths, 512)
    assert sum(lengths) / (512 * len(rows)) > 0.95


# -- the batch ------------------------------------------------------------------------------------

SLOT = 9  # the placeholder's id in the samples below
FIRST = RenderedSample([1, SLOT, SLOT, 20, 2, 3, 30, 2], [False] * 6 + [True] * 2, ("a",))
SECOND = RenderedSample([1, 21, 2, 3, 31, 2], [False] * 4 + [True] * 2, ())
THIRD = RenderedSample([1, SLOT, SLOT, SLOT, SLOT, 3, 32], [False] * 6 + [True], ("b", "a"))
FEATURES = {"a": torch.full((2, 3), 1.0), "b": torch.full((2, 3), 2.0)}


def test_collate_against_tensors_written_by_hand():
    batch = collate([[THIRD, SECOND], [FIRST]], FEATURES.__getitem__, 99, SLOT, (2, 3))
    no = IGNORED
    assert batch.input_ids.tolist() == [
        [1, 9, 9, 9, 9, 3, 32, 1, 21, 2, 3, 31, 2],
        [1, 9, 9, 20, 2, 3, 30, 2, 99, 99, 99, 99, 99],
    ]
    assert batch.labels.tolist() == [
        [no, no, no, no, no, no, 32, no, no, no, no, 31, 2],
        [no, no, no, no, no, no, 30, 2, no, no, no, no, no],
    ]
    assert batch.position_ids.tolist() == [
        [0, 1, 2, 3, 4, 5, 6, 0, 1, 2, 3, 4, 5],
        [0, 1, 2, 3, 4, 5, 6, 7, 0, 0, 0, 0, 0],
    ]
    assert batch.segment_ids.tolist() == [
        [1, 1, 1, 1, 1, 1, 1, 2, 2, 2, 2, 2, 2],
        [1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0, 0, 0],
    ]
    assert torch.equal(batch.image_features, torch.stack([FEATURES[name] for name in "baa"]))
    assert (batch.tokens, batch.supervised_tokens) == (21, 5)
    for name in ("input_ids", "labels", "position_ids", "segment_ids"):
        assert getattr(batch, name).dtype == torch.int64


def test_collate_without_pictures_keeps_the_feature_shape():
    batch = collate([[SECOND]], FEATURES.__getitem__, 99, SLOT, (2, 3))
    assert batch.image_features.shape == (0, 2, 3)
    assert batch.image_features.is_floating_point()
    assert batch.to(torch.device("cpu")).image_features.shape == (0, 2, 3)


@given(
    st.lists(
        st.lists(st.sampled_from([FIRST, SECOND, THIRD]), min_size=1, max_size=4),
        min_size=1,
        max_size=4,
    )
)
def test_a_label_is_the_token_that_stands_there(rows):
    batch = collate(rows, FEATURES.__getitem__, 99, SLOT, (2, 3))
    trained = batch.labels != IGNORED
    assert torch.equal(batch.labels[trained], batch.input_ids[trained])
    samples = [sample for row in rows for sample in row]
    assert batch.supervised_tokens == sum(sum(sample.supervised) for sample in samples)
    assert batch.tokens == sum(len(sample.input_ids) for sample in samples)
    assert (batch.input_ids == SLOT).sum() == 2 * len(batch.image_features)
    assert (batch.segment_ids > 0).any(0).all()  # no column is padding alone
