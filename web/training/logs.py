"""The log of a run as it grows: what was read once is not read again."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from errors import PhiSightError
from files import open_regular
from reports.log import LINE_LIMIT, read_metrics, record_of, without_abandoned

LOG_BYTES = 64 * 2**20  # of a log that is shown: over 60,000 records
TAIL = 64  # bytes before the place that was read to, by which a log is known again
# Digests are for whoever compares runs; they are half of a record's bytes, and are not kept.
UNKEPT = ("chain", "steps_digest", "weights_digest", "update_norms")


def read_small_log(path: Path) -> list[dict[str, Any]]:
    """`read_metrics` of a log that can be shown. Raises PhiSightError, also for a link: what it
    leads to is no file of the run."""
    check_log(path)
    return read_metrics(path)


def check_log(path: Path) -> None:
    """Raise PhiSightError for a log that cannot be shown."""
    try:
        with open_regular(path, follow_links=False) as file:
            size = os.fstat(file.fileno()).st_size
    except OSError as error:
        raise PhiSightError(f"{path}: {error.strerror}; name the metrics file of a run") from error
    if size > LOG_BYTES:
        raise PhiSightError(
            f"{path}: over {LOG_BYTES:,} bytes; look at it with train.py --status RUN"
        )


class LogReader:
    """The records of one log. Only what was added since the last time is read; a log that was cut,
    as a resumed run does, or replaced is read anew.

    Attributes:
        records: all up to the first line that is none, without their digests.
        generation: how often the log was read from its beginning.
    """

    def __init__(self) -> None:
        self.records: list[dict[str, Any]] = []
        self.generation = 0
        self._inode, self._offset, self._tail = -1, 0, b""

    def read(self, path: Path) -> Sequence[dict[str, Any]]:
        """As `read_metrics` gives them. Raises PhiSightError as it does; `records` then has those
        before the fault."""
        check_log(path)
        try:
            with open_regular(path, follow_links=False) as file:
                inode = os.fstat(file.fileno()).st_ino
                file.seek(self._offset - len(self._tail))
                if inode != self._inode or file.read(len(self._tail)) != self._tail:
                    self.generation += 1
                    self.records, self._inode, self._offset, self._tail = [], inode, 0, b""
                    file.seek(0)
                self._read_on(path, file)
        except OSError as error:
            raise PhiSightError(f"{path}: {error.strerror}; look there") from error
        return self.records

    def forget(self) -> None:
        """Hold no records: the log is not there any more."""
        if self.records:
            self.records, self._inode, self._offset, self._tail = [], -1, 0, b""

    def _read_on(self, path: Path, file: BinaryIO) -> None:
        while (line := file.readline(LINE_LIMIT)).endswith(b"\n") or len(line) == LINE_LIMIT:
            try:
                if len(line) == LINE_LIMIT:
                    raise PhiSightError(f"longer than {LINE_LIMIT:,} bytes")
                record = record_of(line)
            except PhiSightError as error:
                place = f"{path}: line {len(self.records) + 1}"
                raise PhiSightError(f"{place} is {error}; mend it or remove it") from error
            self.records.append({k: v for k, v in record.items() if k not in UNKEPT})
            self._offset += len(line)
            self._tail = line[-TAIL:]

    def kept(self) -> list[Mapping[str, Any]]:
        """The records of the steps that were kept, see `without_abandoned`."""
        return without_abandoned(self.records)
