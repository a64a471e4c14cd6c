"""The alignment meter: does the answer come from the picture?

The same questions are answered with the right picture, with another conversation's picture, and
with a blank one. A model that ignores the picture scores the same three times.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from data.chat import RenderedSample
from data.collate import Batch, collate
from data.features import BLANK, FeatureStore
from data.sampler import pack
from model.vlm import VisionLanguageModel

ROWS = 8
CONDITIONS = ("right", "swapped", "blank")


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
    condition: str, store: FeatureStore, swapped: dict[str, str]
) -> Callable[[str], Tensor]:
    """What stands in for a picture's (tokens, dim) features under one of `CONDITIONS`."""
    return {
        "right": store.features_of,
        "swapped": lambda name: store.features_of(swapped[name]),
        "blank": lambda name: store.by_hash(BLANK),
    }[condition]


def packed_batches(
    samples: Sequence[RenderedSample],
    row_tokens: int,
    features_of: Callable[[str], Tensor],
    padding_id: int,
    feature_shape: tuple[int, int],
    device: torch.device,
) -> list[tuple[Batch, list[RenderedSample]]]:
    """All samples in packed batches, each with the samples of its segments in order."""
    rows = pack(range(len(samples)), [len(s.input_ids) for s in samples], row_tokens)
    made = []
    for start in range(0, len(rows), ROWS):
        chosen = [[samples[i] for i in row] for row in rows[start : start + ROWS]]
        batch = collate(chosen, features_of, padding_id, feature_shape).to(device)
        made.append((batch, [sample for row in chosen for sample in row]))
    return made


@torch.no_grad()
def validation_loss(model: VisionLanguageModel, batches: Sequence[tuple[Batch, list]]) -> float:
    """Mean cross-entropy over the supervised tokens, in nats."""
    total, count = 0.0, 0
    for batch, _ in batches:
        loss_sum, tokens = model(batch)
        total, count = total + loss_sum.item(), count + tokens
    return total / count


@torch.no_grad()
def exact_answers(model: VisionLanguageModel, batches: Sequence[tuple[Batch, list]]) -> float:
    """Percent of conversations whose every supervised token is the likeliest one.

    For a conversation of one answer that is exactly when greedy decoding would give the answer and
    stop, at the price of one forward pass.
    """
    right = total = 0
    for batch, samples in batches:
        logits, targets = model.supervised_logits(batch)
        correct = (logits.argmax(-1) == targets).tolist()
        start = 0
        for sample in samples:
            length = sum(sample.supervised)
            right += all(correct[start : start + length])
            start += length
        total += len(samples)
    return 100 * right / total


def evaluate(
    model: VisionLanguageModel,
    validation: Sequence[RenderedSample],
    first_exchanges: Sequence[RenderedSample],
    store: FeatureStore,
    row_tokens: int,
    padding_id: int,
    device: torch.device,
) -> dict[str, object]:
    """{"validation_loss": nats a token, "alignment": {condition: percent exact}}; the model is put
    back into the mode it was in, and no random number is drawn."""
    was_training = model.training
    model.eval()

    def batches(samples: Sequence[RenderedSample], condition: str) -> list:
        names = [name for sample in samples for name in sample.images]
        features_of = features_under(condition, store, swapped_names(names, store.hash_of))
        return packed_batches(samples, row_tokens, features_of, padding_id, store.shape, device)

    loss = validation_loss(model, batches(validation, "right"))
    with_picture = [sample for sample in first_exchanges if sample.images]
    alignment = (
        {
            condition: round(exact_answers(model, batches(with_picture, condition)), 2)
            for condition in CONDITIONS
        }
        if with_picture
        else {}
    )
    model.train(was_training)
    return {"validation_loss": loss, "alignment": alignment}
