"""What the bar above the chat says of the model, and the settings of the Whisper that hears."""

from __future__ import annotations

import os
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from errors import PhiSightError
from paths import HUB_RUN
from reports.log import DRAWABLE, METRICS, read_metrics, without_abandoned
from reports.status import SHARES
from web.model import READY, Model

if TYPE_CHECKING:
    from assistant.assistant import Assistant

TINY, GENERAL = "tiny", "general"  # what a model knows, as keys of web/texts: knows_tiny, ...
WORLD_TOKENS = 8192  # a base with fewer kinds of tokens has read the picture world alone
LOGS_KEPT = 8  # of several runs, by the files' stamps


def model_json(model: Model) -> dict[str, Any]:
    """State and facts of the model, as far as they are known yet."""
    about: dict[str, Any] = {
        "state": model.state,
        "source": model.source,
        "name": name_of(model.source),
        "error": model.error,
    }
    assistant = model.loaded
    if assistant is not None and about["state"] == READY:
        about |= facts_of(assistant)
    return about


def facts_of(assistant: Assistant) -> dict[str, Any]:
    """Name, step, alignment and context of a loaded model. Its alignment is that of the evaluation
    of its run at its step, or the last one before; None where the run's log is not at hand."""
    step = assistant.provenance.get("step")
    is_tiny = assistant.parts.base.model.config.vocab_size < WORLD_TOKENS
    return {
        "source": assistant.source,
        "name": name_of(assistant.source),
        "step": step,
        "alignment": alignment_of(Path(assistant.source).parent, step),
        "knows": TINY if is_tiny else GENERAL,
        "context": assistant.context_tokens,
    }


def name_of(source: str) -> str:
    """What to call the model of a run, of a checkpoint in it, or of the hub."""
    run = run_of(source)
    return source.removeprefix(HUB_RUN).split("@")[0] if run is None else run.name or source


def run_of(source: str) -> Path | None:
    """The folder of a run, or of the run that a checkpoint lies in; None for one of the hub."""
    if source.startswith(HUB_RUN):
        return None
    path = Path(source)
    is_checkpoint = path.name.startswith("checkpoint-") or path.name == "best"
    return path.absolute().parent if is_checkpoint else path


def alignment_of(run: Path, step: int | None) -> dict[str, float] | None:
    """The three shares of the alignment meter, in percent, of the last evaluation of a run that is
    not later than `step`, and the step of that evaluation. The log is read again only when it has
    changed: the page asks often."""
    log = run / METRICS
    try:
        found = os.stat(log)
    except OSError:  # a checkpoint that lies alone, or came from the hub
        return None
    meters = _meters(log, found.st_mtime_ns, found.st_size)
    known = [meter for meter in meters if step is None or meter["step"] <= step]
    return dict(known[-1]) if known else None


@lru_cache(maxsize=LOGS_KEPT)
def _meters(log: Path, stamp: int, size: int) -> tuple[Mapping[str, float], ...]:
    """The alignment of every evaluation of a log that can be shown; none of a damaged log."""
    try:
        records = without_abandoned(read_metrics(log))
    except PhiSightError:  # the training room tells what is wrong with it
        return ()
    meters = []
    for record in records:
        if record.get("kind") != "evaluation" or "step" not in record:
            continue
        shares = {name: (record.get("alignment") or {}).get(name) for name in SHARES}
        if all(can_be_shown(share) for share in shares.values()):
            meters.append({"step": record["step"], **shares})
    return tuple(meters)


def can_be_shown(share: Any) -> bool:
    """Whether a log's value is a number of a size that an axis has."""
    return isinstance(share, (int, float)) and abs(share) < DRAWABLE  # NaN is not below it
