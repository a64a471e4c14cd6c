"""The alignment meter: does the answer come from the picture?

The same questions are answered with the right picture, with another conversation's picture, and
with a blank one; by a task of `evaluate.py` also with the right one under noise. A model that
ignores the picture scores the same each time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from data.chat import RenderedSample
from data.collate import Batch, collate
from data.features import BLANK, FeatureStore
from data.sampler import pack
from data.team import ALONE, Team, in_order
from model.vlm import VisionLanguageModel

ROWS = 8
CONDITIONS = ("right", "swapped", "blank")
"""what training asks under, and writes into its log"""
NOISED = "noised"
ALL_CONDITIONS = (*CONDITIONS, NOISED)
"""what a task can be asked under; for the last, see `evaluation.noise`"""
LOSS = "loss"
Rows = list[list[RenderedSample]]


def swapped_names(names: Sequence[str], content_of: Callable[[str], str] = str) -> dict[str, str]:
    """Every picture -> another one: the next but half of the list, never itself if there are two.

    Names of one `content_of`, such as the hash of the file, are one picture.
    """
    first_name: dict[str, str] = {}  # content -> the first name that it has
    for name in names:
        first_name.setdefault(content_of(name), name)
    shift = max(1, len(first_name) // 2)
    distinct = list(first_name.values())
    other = {c: distinct[(i + shift) % len(distinct)] for i, c in enumerate(first_name)}
    return {name: other[content_of(name)] for name in names}


def features_under(
    condition: str,
    store: FeatureStore,
    swapped: dict[str, str],
    noised: FeatureStore | None = None,
) -> Callable[[str], Tensor]:
    """What stands in for a picture's (tokens, dim) features under one of `ALL_CONDITIONS`.

    noised: the store of `evaluation.noise.noised_store`, needed for "noised" alone.
    """
    if noised is not None and condition == NOISED:
        return noised.features_of
    return {
        "right": store.features_of,
        "swapped": lambda name: store.features_of(swapped[name]),
        "blank": lambda name: store.by_hash(BLANK),
    }[condition]


@dataclass(frozen=True)
class Shown:
    """What a task's pictures are replaced by."""

    store: FeatureStore
    """of the pictures as they are"""
    noised: FeatureStore | None = None
    """of the same under noise, where that is asked for"""

    def under(self, condition: str, names: Sequence[str]) -> Callable[[str], Tensor]:
        """Name of one of these pictures -> (tokens, dim) features under a condition."""
        swapped = swapped_names(names, self.store.hash_of)
        return features_under(condition, self.store, swapped, self.noised)


def in_batches(samples: Sequence[RenderedSample], row_tokens: int) -> list[Rows]:
    """All samples in packed rows, `ROWS` at a time."""
    rows = pack(range(len(samples)), [len(s.input_ids) for s in samples], row_tokens)
    return [
        [[samples[i] for i in row] for row in rows[start : start + ROWS]]
        for start in range(0, len(rows), ROWS)
    ]


def packed_batch(
    rows: Rows,
    features_of: Callable[[str], Tensor],
    padding_id: int,
    image_id: int,
    feature_shape: tuple[int, int],
    device: torch.device,
) -> tuple[Batch, list[RenderedSample]]:
    """The batch of some rows, and the samples of its segments in order."""
    batch = collate(rows, features_of, padding_id, image_id, feature_shape).to(device)
    return batch, [sample for row in rows for sample in row]


def packed_batches(
    samples: Sequence[RenderedSample],
    row_tokens: int,
    features_of: Callable[[str], Tensor],
    padding_id: int,
    image_id: int,
    feature_shape: tuple[int, int],
    device: torch.device,
) -> list[tuple[Batch, list[RenderedSample]]]:
    """All samples in packed batches, each with the samples of its segments in order."""
    return [
        packed_batch(rows, features_of, padding_id, image_id, feature_shape, device)
        for rows in in_batches(samples, row_tokens)
    ]


@torch.no_grad()
def loss_of(model: VisionLanguageModel, batch: Batch) -> tuple[float, int]:
    """Cross-entropy summed over the supervised tokens, in nats, and their number."""
    loss_sum, tokens = model(batch)
    return loss_sum.item(), tokens


@torch.no_grad()
def right_answers(
    model: VisionLanguageModel, batch: Batch, samples: Sequence[RenderedSample]
) -> tuple[int, int]:
    """How many conversations have the likeliest token in every supervised place, and how many there
    are.

    For a conversation of one answer that is exactly when greedy decoding would give the answer and
    stop, at the price of one forward pass.
    """
    logits, targets = model.supervised_logits(batch)
    correct = iter((logits.argmax(-1) == targets).tolist())
    right = sum(all([next(correct) for s in sample.supervised if s]) for sample in samples)
    return right, len(samples)


def validation_loss(model: VisionLanguageModel, batches: Sequence[tuple[Batch, list]]) -> float:
    """Mean cross-entropy over the supervised tokens, in nats."""
    total, count = summed([loss_of(model, batch) for batch, _ in batches])
    return total / count


def exact_answers(model: VisionLanguageModel, batches: Sequence[tuple[Batch, list]]) -> float:
    """Percent of conversations that are answered exactly, see `right_answers`."""
    right, total = summed([right_answers(model, batch, samples) for batch, samples in batches])
    return 100 * right / total


def summed(pairs: Sequence[tuple[float, int]]) -> tuple[float, int]:
    """Added up one by one: the same bits wherever the pairs were computed."""
    first, second = 0.0, 0
    for one, other in pairs:
        first, second = first + one, second + other
    return first, second


def evaluate(
    model: VisionLanguageModel,
    validation: Sequence[RenderedSample],
    first_exchanges: Sequence[RenderedSample],
    store: FeatureStore,
    row_tokens: int,
    padding_id: int,
    device: torch.device,
    team: Team = ALONE,
) -> dict[str, Any]:
    """{"validation_loss": nats a token, "alignment": {condition: percent exact}}; the model is put
    back into the mode it was in, and no random number is drawn.

    The processes of `team` share the batches, which are the same however many they are, and each
    gets the figures of all: equal to the bit to those of one process on as many threads.
    """
    was_training = model.training
    model.eval()
    with_picture = [sample for sample in first_exchanges if sample.images]
    asked = {LOSS: validation} | (dict.fromkeys(CONDITIONS, with_picture) if with_picture else {})
    work = [(what, rows) for what in asked for rows in in_batches(asked[what], row_tokens)]
    features_of = {}
    for what, samples in asked.items():
        names = [name for sample in samples for name in sample.images]
        swapped = swapped_names(names, store.hash_of)
        features_of[what] = features_under("right" if what == LOSS else what, store, swapped)

    def measured(what: str, rows: Rows) -> tuple[float, int]:
        batch, samples = packed_batch(
            rows, features_of[what], padding_id, model.placeholder_id, store.shape, device
        )
        return loss_of(model, batch) if what == LOSS else right_answers(model, batch, samples)

    mine = [measured(what, rows) for what, rows in team.share_of(work)]
    model.train(was_training)
    results = in_order(team.exchange(mine))
    totals = {
        what: summed([pair for (of, _), pair in zip(work, results, strict=True) if of == what])
        for what in asked
    }
    loss, tokens = totals.pop(LOSS)
    return {
        "validation_loss": loss / tokens,
        "alignment": {
            condition: round(100 * right / total, 2) for condition, (right, total) in totals.items()
        },
    }
