"""A run's log: JSON lines that grow by whole lines, and the chain that links them.

The log of a resumed run equals that of one that never stopped, to the byte, except for what the
clock and the machine decide; all of that sits under the one key "timing" of a record.

Records:
    {"kind": "train", "step", "loss", "lr", "gradient_norm", "gradient_norms": {owner: norm},
     "rates": {"lora" | "lora_B" | "projector": rate}    (where they are not all "lr"),
     "padding_share", "supervised_tokens", "tokens",
     "timing": {"seconds", "tokens_per_second", "memory_mb", ...}}
    {"kind": "evaluation", "step", "validation_loss",
     "alignment": {"right", "swapped", "blank"}}         (percentages, 0 to 100)
    {"kind": "samples", "step", "samples": [{"question", "picture", "answer", "right_answer"}]}
    {"kind": "alert", "step", "alert", ...}              (see `reports.alerts`)
    {"kind": "rollback", "step", "from_step", "to_step", "skipped": {"from", "to", "rows"},
     "reason"}                                           (steps after "to_step" are made again)

Every record bears a "chain": a digest of the record before it and of its own content, in which a
training record includes the digests of its steps' losses and of the weights after the last one.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from documents import COUNT, NUMBER_OR_NULL, OBJECT_OR_NULL, TEXT, parse_json, problems
from errors import PhiSightError
from files import open_regular

METRICS = "metrics.jsonl"  # its name in a run's folder
TIMING = "timing"
NON_FINITE = "non_finite"
CHAIN = "chain"
TOLD = ("alert", "rollback")  # kinds of records that hold no figures of a step
DRAWABLE = 1e30  # what is larger has no place on an axis, and no loss or rate is
LINE_LIMIT = 2**20  # bytes of a record; the longest have a few hundred
_RECORD = {
    "kind?": TEXT,
    "step?": COUNT,
    f"{CHAIN}?": TEXT,
    f"{TIMING}?": OBJECT_OR_NULL,
    f"{NON_FINITE}?": [TEXT],
    "weights_digest?": TEXT,
    "loss?": NUMBER_OR_NULL,
    "validation_loss?": NUMBER_OR_NULL,
    "gradient_norms?": OBJECT_OR_NULL,
    "rates?": OBJECT_OR_NULL,
    "alignment?": OBJECT_OR_NULL,
    "samples?": [{"*": TEXT}],
    "alert?": TEXT,
    "to_step?": COUNT,
    "total_steps?": COUNT,
}


class MetricsLog:
    """A JSON-lines file that grows by whole lines. A checkpoint stores `offset()` and `chain`; a
    resume gives them to `truncate_to`. Every method raises PhiSightError when the disk refuses.

    Attributes:
        chain: the digest that the last record bears; each record is linked to the one before it.
        followers: called with every record once it is in the file; none of them may raise.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.chain = ""
        self.followers: list[Callable[[dict[str, Any]], None]] = []
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            if self.path.exists():
                open_regular(self.path).close()
            self._file = self.path.open("ab", buffering=0)  # a line is one write: nothing to flush
        except OSError as error:
            raise self._refused(error) from error

    def write(self, record: Mapping[str, Any]) -> None:
        """Append one record. A NaN or infinity becomes null, and its dotted name joins the list
        under "non_finite"."""
        names: list[str] = []
        clean = _without_non_finite(record, "", names)
        if names:
            clean[NON_FINITE] = names
        clean[CHAIN] = link(self.chain, clean)
        try:
            line = json.dumps(clean, separators=(",", ":"), allow_nan=False).encode() + b"\n"
        except (TypeError, ValueError) as error:
            raise PhiSightError(
                f"metrics record: {error}; give it plain numbers and strings"
            ) from error
        start = self.offset()
        try:
            if self._file.write(line) != len(line):
                self._file.truncate(start)  # half a line would spoil the next one
                raise OSError("only a part of a line could be written")
        except OSError as error:
            raise self._refused(error) from error
        self.chain = clean[CHAIN]
        for follow in self.followers:
            follow(clean)

    def offset(self) -> int:
        """Bytes in the file so far."""
        return os.fstat(self._file.fileno()).st_size

    def truncate_to(self, offset: int, chain: str = "") -> int:
        """Cut what was logged after a checkpoint, exact to the byte; `chain` goes on from there.
        Returns how many bytes that were."""
        size = self.offset()
        if offset < 0 or offset > size:
            raise PhiSightError(
                f"{self.path}: has {size} bytes, the checkpoint was saved at "
                f"{offset}; put back the log that belongs to this run"
            )
        with self.path.open("rb") as file:
            file.seek(max(offset - 1, 0))
            if offset and file.read(1) != b"\n":
                raise PhiSightError(
                    f"{self.path}: byte {offset} is not the end of a line; put "
                    "back the log that belongs to this run"
                )
        try:
            self._file.truncate(offset)
        except OSError as error:
            raise self._refused(error) from error
        self.chain = chain
        self.sync()
        return size - offset

    def sync(self) -> None:
        """Return once all lines are on the disk."""
        try:
            os.fsync(self._file.fileno())
        except OSError as error:
            raise self._refused(error) from error

    def close(self) -> None:
        self._file.close()

    def _refused(self, error: OSError) -> PhiSightError:
        return PhiSightError(
            f"{self.path}: {error.strerror or error}; make room or make the "
            "folder writable, then resume"
        )


def _without_non_finite(value: Any, path: str, names: list[str]) -> Any:
    """A copy with null for NaN and infinities; their dotted paths are added to `names`."""
    if isinstance(value, Mapping):
        return {
            key: _without_non_finite(inner, f"{path}.{key}".lstrip("."), names)
            for key, inner in value.items()
        }
    if isinstance(value, (list, tuple)):
        return [
            _without_non_finite(inner, f"{path}.{index}", names)
            for index, inner in enumerate(value)
        ]
    if isinstance(value, float) and not math.isfinite(value):
        names.append(path)
        return None
    return value


def read_metrics(
    path: str | Path, until: int | None = None, to_first_fault: bool = False
) -> list[dict]:
    """The records of a log, or of its first `until` bytes. A last line without its end, from a
    killed run, is left out; any other that is not a record raises PhiSightError with its number.

    `to_first_fault`: records end there instead, as what was never synced may be anything after a
    lost power supply. Beside the records no more than a line is held.
    """
    records: list[dict] = []
    try:
        with open_regular(Path(path)) as file:
            left = os.fstat(file.fileno()).st_size if until is None else until
            while line := file.readline(min(LINE_LIMIT, left)):
                left -= len(line)
                if len(line) == LINE_LIMIT:
                    raise PhiSightError(f"longer than {LINE_LIMIT:,} bytes")
                if line.endswith(b"\n"):
                    records.append(record_of(line))
    except OSError as error:
        raise PhiSightError(f"{path}: {error.strerror}; name the metrics file of a run") from error
    except PhiSightError as error:
        if not to_first_fault:
            place = f"{path}: line {len(records) + 1}"
            raise PhiSightError(f"{place} is {error}; mend it or remove it") from error
    return records


def record_of(line: bytes) -> dict:
    """The record of one line. Raises PhiSightError with the reason alone."""
    record = parse_json(line, what="a record")
    for problem in problems(record, _RECORD):
        raise PhiSightError(f"not a record ({problem})")
    return record


def deterministic_part(record: Mapping[str, Any]) -> dict:
    """The record without what the clock and the machine decide: equal in a resumed run."""
    kept = {key: value for key, value in record.items() if key not in (TIMING, NON_FINITE)}
    names = [name for name in record.get(NON_FINITE, ()) if not name.startswith(f"{TIMING}.")]
    return kept | ({NON_FINITE: names} if names else {})


def without_abandoned(records: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The records of the steps that led to the weights: where the run went back, what it had logged
    after the step that it went back to is left out, but for the alerts and rollbacks themselves."""
    kept: list[Mapping[str, Any]] = []
    for record in records:
        if record.get("kind") == "rollback":
            to_step = record.get("to_step", 0)
            kept = [r for r in kept if r.get("kind") in TOLD or r.get("step", 0) <= to_step]
        kept.append(record)
    return kept


def number_text(value: Any, pattern: str) -> str:
    """A number of a record for people; null stands for NaN or an infinity."""
    return format(value, pattern) if isinstance(value, (int, float)) else "not finite"


# ---- the chain -----------------------------------------------------------------------------------


def link(previous: str, record: Mapping[str, Any]) -> str:
    """sha256 over the digest before and all of a record that the computation decides. Two runs
    whose digests are equal at a step have logged the same, to the bit, up to that step."""
    kept = {key: value for key, value in deterministic_part(record).items() if key != CHAIN}
    text = json.dumps(kept, sort_keys=True, separators=(",", ":"), default=str)
    return hashlib.sha256(f"{previous}\n{text}".encode()).hexdigest()


def broken_link(records: Sequence[Mapping[str, Any]]) -> int | None:
    """The index of the first record that does not follow from those before it, or None."""
    previous = ""
    for index, record in enumerate(records):
        if record.get(CHAIN) != link(previous, record):
            return index
        previous = record[CHAIN]
    return None


def chain_problems(records: Sequence[Mapping[str, Any]]) -> list[str]:
    """Where a log's chain is broken, for people; empty if it is whole."""
    broken = broken_link(records)
    if broken is None:
        return []
    return [
        f"line {broken + 1} (step {records[broken].get('step')}): does not follow from the"
        " lines before it; the log was edited, or lines are missing"
    ]


def contradictions(
    records: Sequence[Mapping[str, Any]], step: int, chain: str, weights_digest: str
) -> list[str]:
    """Where a checkpoint of `step` and the log up to it contradict each other.

    Args:
        records: what had been logged when it was saved.
        chain: the digest of the last record that the checkpoint knows of, "" for none.
        weights_digest: of the weights that the checkpoint holds.
    """
    if (records[-1].get(CHAIN) if records else "") != chain:
        return [
            f"trainer_state.json: its chain is not that of the log at step {step}; one"
            " of them belongs to another run, or was edited"
        ]
    logged = [r for r in records if r.get("step") == step and "weights_digest" in r]
    if logged and logged[-1]["weights_digest"] != weights_digest:
        return [f"its weights are not those that the log has for step {step}"]
    return []
