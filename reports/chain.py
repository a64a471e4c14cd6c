"""One chain from the data over the steps to the weights, and whether a log belongs to it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from errors import PhiSightError
from manifest import digest_in
from reports.compare import Saved
from reports.log import CHAIN, METRICS, chain_problems, contradictions, read_metrics


def provenance(saved: Saved, records: Sequence[Mapping[str, Any]] = ()) -> dict[str, Any]:
    """One chain from the data to the weights, as JSON holds it: sha256 digests, and the step.

    Args:
        saved: a checkpoint of a run.
        records: its log, which may go on after the checkpoint; without it the checkpoint alone is
            asked, which was verified when it was read.

    Returns:
        "data_fingerprint", "base_fingerprint", "vision_fingerprint", "step", "steps_digest" (over
        every step's loss, gradient norm and place), "chain" (of the last record of the log up to
        the checkpoint), "weights_digest", and "started_from", the weights digest of the run whose
        weights this one began with. None for what the checkpoint does not say, as an imported one.

    Raises:
        PhiSightError: the log and the checkpoint contradict each other.
    """
    records_to(saved, records)
    config, state = saved.config, saved.trainer_state
    return {
        "data_fingerprint": config.get("data_fingerprint"),
        "base_fingerprint": config.get("base_fingerprint"),
        "vision_fingerprint": config.get("vision_fingerprint"),
        "step": saved.step,
        "steps_digest": state.get("steps_digest") or None,
        CHAIN: state.get(CHAIN) or None,
        "weights_digest": digest_in(saved.manifest),
        "started_from": (config.get("started_from") or {}).get("weights_digest"),
    }


def records_to(saved: Saved, records: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The records of the log up to the checkpoint. Raises `PhiSightError` where it is the log of
    another run, or was edited."""
    chain = saved.trainer_state.get(CHAIN, "")
    links = [record.get(CHAIN) for record in records]
    known = list(records[: links.index(chain) + 1]) if chain in links else []
    wrong = chain_problems(known)
    if not wrong and records and chain:
        wrong = contradictions(known, saved.step, chain, digest_in(saved.manifest))
    if wrong:
        raise PhiSightError(
            f"{saved.path}: {wrong[0]}; put back the log that belongs to this run, or move it away"
        )
    return known


def records_of(saved: Saved) -> list[dict]:
    """What the log beside a checkpoint had when it was saved; nothing where no log is there. Raises
    PhiSightError for one that cannot be read."""
    log = saved.path.parent / METRICS
    until = saved.trainer_state.get("metrics_offset", 0)
    return read_metrics(log, until) if log.exists() else []


def log_problems(saved: Saved, log: Path) -> list[str]:
    """Where a checkpoint and the log of its run contradict each other, or the log itself: was any
    record edited that had been written when the checkpoint was saved? Of what comes after, only the
    step of the next record is looked at, if it is one of the log's chain. Raises PhiSightError for
    a log that cannot be read."""
    records = read_metrics(log, saved.trainer_state.get("metrics_offset", 0))
    if problems := chain_problems(records):
        return problems
    following = read_metrics(log, to_first_fault=True)[len(records) : len(records) + 1]
    if following and not chain_problems([*records, *following]):
        step = following[0].get("step", 0)
        if step <= saved.step:
            return [
                f"trainer_state.json: knows nothing of line {len(records) + 1} of the log, which is"
                f" of step {step}; one of them belongs to another run, or was edited"
            ]
    own = digest_in(saved.manifest)
    return contradictions(records, saved.step, saved.trainer_state.get(CHAIN, ""), own)
