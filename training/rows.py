"""Which rows a run trains on, in which order, and in how many steps."""

from __future__ import annotations

from collections.abc import Sequence

from config import Config
from data.sampler import plan
from training.progress import Progress


class Rows:
    """The rows of every epoch, computed from the config when they are asked for.

    Attributes:
        row_tokens: length of a row.
        room: tokens of a row that conversations are packed into; 0 where each has its own.
        repacked: `Progress.repacked`: an epoch that was begun with rows of another packing goes on
            with what it has not seen yet, packed anew.
    """

    def __init__(
        self, config: Config, lengths: Sequence[int], repacked: Sequence[Sequence[int]] = ()
    ) -> None:
        self.seed, self.epochs, self.max_steps = config.seed, config.epochs, config.max_steps
        self.rows_per_step = config.batch_size * config.accumulation
        self.row_tokens = row_tokens_of(config, lengths)
        self.room = room_of(config, lengths)
        self.lengths, self.repacked = lengths, repacked
        self._known: dict[int, list[list[int]]] = {}  # epoch -> its rows, of at most two

    def of_epoch(self, epoch: int) -> list[list[int]]:
        """Rows of indices of conversations, in the order of training."""
        known = self._known  # another thread may ask for the next epoch meanwhile
        if epoch not in known:
            before = {number: rows for number, rows in known.items() if number == epoch - 1}
            known = self._known = before | {epoch: self._computed(epoch)}
        return known[epoch]

    def of_step(self, epoch: int, row: int) -> range:
        """Numbers of the rows of the step that begins there; an epoch's last step may have fewer
        than the others."""
        return range(row, min(row + self.rows_per_step, len(self.of_epoch(epoch))))

    def of_next_step(self, epoch: int, rows: range) -> tuple[int, range]:
        """Epoch and rows of the step after the one over `rows` of an epoch."""
        epoch, row = self.place(epoch, rows.stop)
        return epoch, self.of_step(epoch, row)

    def _computed(self, epoch: int) -> list[list[int]]:
        rows: list[list[int]] = []
        for of_epoch, seed, room, count in self.repacked:
            if of_epoch == epoch:
                rows = (rows + self._packed(epoch, seed, room, rows))[:count]
        return rows + self._packed(epoch, self.seed, self.room, rows)

    def _packed(self, epoch: int, seed: int, room: int, seen: list[list[int]]) -> list[list[int]]:
        """Rows of the conversations of an epoch that are not in the rows `seen`."""
        return plan(seed, epoch, self.lengths, room, {i for row in seen for i in row})

    def place(self, epoch: int, row: int) -> tuple[int, int]:
        """The place, with the end of an epoch as the beginning of the next: fewer rows than there
        were may be left of the data."""
        return (epoch, row) if row < len(self.of_epoch(epoch)) else (epoch + 1, 0)

    def total_steps(self, step: int, epoch: int, row: int) -> int:
        """Steps of the whole run: the `step` that were made, in whatever unit, and those that the
        rows from this place on take. An epoch ends with a step, however few rows are left."""
        if self.max_steps:
            return self.max_steps
        left = 0
        for number in range(epoch, self.epochs):
            rows = len(self.of_epoch(number)) - (row if number == epoch else 0)
            left += -(-rows // self.rows_per_step)
        return step + left


def row_tokens_of(config: Config, lengths: Sequence[int]) -> int:
    """Tokens of a row; without a setting, as many as the longest conversation has."""
    return config.row_tokens or max(lengths)


def room_of(config: Config, lengths: Sequence[int]) -> int:
    """Tokens of a row that conversations are packed into; 0 where each has a row of its own."""
    return row_tokens_of(config, lengths) if config.pack else 0


def note_packing(progress: Progress, saved: Config, config: Config, lengths: Sequence[int]) -> None:
    """Remember in `progress` up to which row its epoch was packed as `saved` says, where the run
    goes on with another packing of the same data."""
    before, now = ((c.seed, room_of(c, lengths)) for c in (saved, config))
    if progress.row and before != now:
        progress.repacked = [*progress.repacked, [progress.epoch, *before, progress.row]]
