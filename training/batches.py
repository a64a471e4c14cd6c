"""Rows of the plan -> the micro-batches of one step."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TypeVar

from data.collate import Batch, collate
from lora.dropout import key_of
from training.run import Run

Item = TypeVar("Item")


def load_batches(run: Run, row_numbers: Sequence[int]) -> list[Batch]:
    """Micro-batches of these rows of the epoch; each row brings the key that its dropout draws by.

    All rows are padded to one length, so that a row is the same whatever shares its micro-batch.
    """
    config, epoch = run.config, run.progress.epoch
    rows = run.rows.of_epoch(epoch)
    return [
        collate(
            [[run.data.train[i] for i in rows[number]] for number in chunk],
            run.store.features_of,
            run.parts.chat_format.end_of_text_id,
            run.parts.chat_format.image_id,
            run.store.shape,
            run.rows.row_tokens,
            [key_of(config.seed, epoch, number) for number in chunk],
        ).to(run.parts.device)
        for chunk in chunks(row_numbers, config.batch_size)
    ]


def chunks(items: Sequence[Item], size: int) -> Iterator[list[Item]]:
    """`size` items at a time, and at the end what is left."""
    for start in range(0, len(items), size):
        yield list(items[start : start + size])
