"""Rows of the plan -> the micro-batches of one step, made by a thread while a step runs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from threading import Event
from time import perf_counter
from typing import TypeVar

from data.collate import Batch, collate
from lora.dropout import key_of
from training.run import Run

Item = TypeVar("Item")


class BatchesAhead:
    """This process's micro-batches of each step, those of the next one made beside the step.

    What is ahead is not part of a run's state: which rows come next is computed from the place of
    the run, and a step whose rows are not those that were made gets its own.
    """

    def __init__(self, run: Run) -> None:
        self._run = run
        self._thread = ThreadPoolExecutor(1, "batches")
        self._unwanted = Event()
        self._ahead: tuple[tuple[int, range], Future[list[Batch]]] | None = None

    def __enter__(self) -> BatchesAhead:
        return self

    def __exit__(self, *_: object) -> None:
        self._unwanted.set()
        self._thread.shutdown(cancel_futures=True)  # waits for at most one micro-batch

    def take(self, rows: range) -> list[Batch]:
        """The batches of the step over these `rows`, on the device; the next ones are begun.

        Raises:
            PhiSightError: a picture's features cannot be read, whenever that was noticed.
        """
        run, step = self._run, (self._run.progress.epoch, rows)
        is_ahead = self._ahead is not None and self._ahead[0] == step
        if not is_ahead:
            self._begin(*step)
        assert self._ahead is not None
        clock = perf_counter()
        made = self._ahead[1].result()
        if is_ahead:  # else nothing was begun that could have been ready
            run.progress.add_to_window("wait_seconds", perf_counter() - clock)
        if run.progress.step + 1 < run.total_steps:
            self._begin(*run.rows.of_next_step(*step))
        return [batch.to(run.parts.device) for batch in made]

    def _begin(self, epoch: int, rows: range) -> None:
        self._ahead = (epoch, rows), self._thread.submit(self._make, epoch, rows)

    def _make(self, epoch: int, rows: range) -> list[Batch]:
        # On a GPU the copies are begun by the training thread, whose current device is the right
        # one; out of pinned memory they take none of its time.
        on_gpu = self._run.parts.device.type == "cuda"
        made = []
        for batch in make_batches(self._run, epoch, self._run.ranks.share_of(rows)):
            made.append(batch.pinned() if on_gpu else batch)
            if self._unwanted.is_set():
                break
        return made


def make_batches(run: Run, epoch: int, row_numbers: Sequence[int]) -> Iterator[Batch]:
    """Micro-batches of these rows of an epoch, on the CPU; each row brings the key that its dropout
    draws by.

    All rows are padded to one length, so that a row is the same whatever shares its micro-batch.
    """
    config, chat_format = run.config, run.parts.chat_format
    rows = run.rows.of_epoch(epoch)
    for chunk in chunks(row_numbers, config.batch_size):
        yield collate(
            [[run.data.train[i] for i in rows[number]] for number in chunk],
            run.store.features_of,
            chat_format.padding_id,
            chat_format.image_id,
            run.store.shape,
            run.rows.row_tokens,
            [key_of(config.seed, epoch, number) for number in chunk],
        )


def chunks(items: Sequence[Item], size: int) -> Iterator[list[Item]]:
    """`size` items at a time, and at the end what is left."""
    for start in range(0, len(items), size):
        yield list(items[start : start + size])
