"""What a checkpoint holds, in memory: copied to be saved, or read back and checked.

What its JSON files and tensors must say stands here too. A folder whose sums are right may still
have been made by a person or a program that knows how to seal it: nothing behind this file has to
ask again whether a step is a number.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from documents import (
    COUNT,
    COUNT_OR_NULL,
    FINITE,
    FLAG,
    NUMBER,
    NUMBER_OR_NULL,
    OBJECT,
    POSITIVE,
    TEXT,
    Kind,
    json_bytes,
    problems,
)
from errors import PhiSightError
from manifest import MANIFEST
from reports.log import METRICS

OWNERS = {
    "lora_weights": "lora",
    "image_projector": "projector",
    "optimizer": "optimizer",
    "rng": "rng",
}  # file stem -> owner
CONFIG, TRAINER_STATE = "config.json", "trainer_state.json"
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
)  # what of `tokenizer/` is published, and fetched


CHECKPOINT = r"checkpoint-(?:[0-9]{6}|[1-9][0-9]{6,17})"  # the name of a folder, one for each step
_PUBLISHED = re.compile(rf"({CHECKPOINT})/(.+)")


def published_files(names: Sequence[str]) -> list[str]:
    """Of all names in a repository those of a run, its newest checkpoint and its log: nothing else
    is fetched, whatever it is. Empty if there is no checkpoint."""
    known = {
        *(MANIFEST, CONFIG, TRAINER_STATE),
        *(f"{stem}.safetensors" for stem in OWNERS),
        *(f"tokenizer/{name}" for name in TOKENIZER_FILES),
    }
    found = {
        name: match[1]
        for name in names
        if (match := _PUBLISHED.fullmatch(name)) and match[2] in known
    }
    folders = {folder for name, folder in found.items() if name == f"{folder}/{MANIFEST}"}
    if not folders:
        return []
    newest = max(folders, key=lambda folder: int(folder.removeprefix("checkpoint-")))
    return [name for name in names if name == METRICS or found.get(name) == newest]


class Tokenizer(Protocol):
    """What a checkpoint needs of a tokenizer."""

    def save_pretrained(self, folder: str, /) -> Any: ...


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint. `state`: file stem -> tensor name -> CPU tensor."""

    path: Path
    step: int
    config: dict
    trainer_state: dict
    state: dict[str, dict[str, Tensor]]
    manifest: dict
    published_as: str = ""
    """hf:owner/name@commit, of a run that was fetched from the hub"""

    @property
    def name(self) -> str:
        """What people know it by: where it lies, here or on the hub."""
        return self.published_as or str(self.path)


@dataclass(frozen=True)
class Snapshot:
    """All that a checkpoint will hold, copied: training may go on while it is written."""

    step: int
    state: dict[str, dict[str, Tensor]]
    documents: dict[str, bytes]  # config.json and trainer_state.json as they will be written
    tokenizer: Tokenizer | None = None
    change: dict | None = None  # as `training.weight_change` has it


# -- copied to be saved ---------------------------------------------------------------------------


def take_snapshot(
    step: int,
    state: Mapping[str, Mapping[str, Tensor]],
    config: dict,
    trainer_state: dict,
    tokenizer: Tokenizer | None = None,
) -> Snapshot:
    """Copy everything to the CPU. `state` holds every stem of OWNERS; tensors may share memory.

    Raises PhiSightError for a missing or unknown stem, a bad step, a value that JSON cannot hold.
    """
    if set(state) != set(OWNERS):
        raise PhiSightError(
            f"checkpoint: state has {sorted(state)}, not {sorted(OWNERS)}; "
            "give an empty dictionary for what the run does not have"
        )
    if type(step) is not int or step < 0 or trainer_state.get("step", step) != step:
        raise PhiSightError(
            f"checkpoint: step {step!r} is not a count or not the step in "
            "trainer_state; save between two steps"
        )
    copies = {
        stem: {
            name: torch.empty(tensor.shape, dtype=tensor.dtype).copy_(tensor.detach())
            for name, tensor in state[stem].items()
        }
        for stem in OWNERS
    }
    documents = {
        CONFIG: json_bytes(CONFIG, config),
        TRAINER_STATE: json_bytes(TRAINER_STATE, trainer_state),
    }
    return Snapshot(step, copies, documents, tokenizer)


# -- what its files must say ----------------------------------------------------------------------

_LOSS_SCALER = {
    "enabled": FLAG,
    "scale": POSITIVE,
    "growth_factor": POSITIVE,
    "backoff_factor": POSITIVE,
    "growth_interval": POSITIVE,
    "growth_tracker": COUNT,
}
_WINDOW = {
    "loss_sum?": NUMBER,
    "supervised_tokens?": COUNT,
    "tokens?": COUNT,
    "places?": COUNT,
    "skipped_steps?": COUNT,
    "*": NUMBER,
}
_PLACE = {"step": COUNT, "epoch": COUNT, "row": COUNT, "finished": TEXT}
_PROGRESS = {
    "best_loss": NUMBER_OR_NULL,
    "evaluations_without_better": COUNT,
    "recent_losses": [NUMBER],
    "window": _WINDOW,
    "steps_digest": TEXT,
    "loss_scaler": _LOSS_SCALER,
    "metrics_offset": COUNT,
    "chain": TEXT,
    "total_steps": COUNT,
    # of newer versions alone
    "best_step?": COUNT_OR_NULL,
    "repacked?": [Kind("four whole numbers from 0 on", lambda v: _is_packing(v))],
    "schedule?": Kind("{} or step, position and total", lambda v: _is_schedule(v)),
    "recent_norms?": [FINITE],
    "standing_alerts?": [TEXT],
    "rollback_step?": COUNT_OR_NULL,
    "rollback_best?": COUNT_OR_NULL,
    "rollbacks?": COUNT,
}
"""what trainer_state.json says beside the place, of every run that was trained here"""
_STARTED_FROM = {"step": COUNT, "finished": TEXT}
_FACTS = {"config": OBJECT, "base_fingerprint": TEXT, "vision_fingerprint": TEXT}
_MORE_FACTS = {
    "tokenizer_fingerprint": TEXT,
    "data_fingerprint": TEXT,
    "data_counts": {"*": COUNT},
    "compute_dtype": TEXT,
    "device": TEXT,
    "threads": COUNT,
    "total_steps": COUNT,
    "world_size": COUNT,
    "versions": {"*": TEXT},
    "processor": TEXT,
    "started_from": Kind(
        "null or the step of another run and why it was finished",
        lambda value: value is None or not [*problems(value, _STARTED_FROM)],
    ),
    "imported_from": TEXT,
}


def _is_packing(value: Any) -> bool:
    return not [*problems(value, [COUNT])] and len(value) == 4


def _is_schedule(value: Any) -> bool:
    wanted = {"step": COUNT, "position": FINITE, "total": FINITE}
    return value == {} or not [*problems(value, wanted)]


def _if_there(fields: Mapping[str, Any]) -> dict[str, Any]:
    return {f"{name.removesuffix('?')}?": kind for name, kind in fields.items()}


def document_problems(documents: Mapping[str, dict[str, Any]], step: int) -> Iterator[str]:
    """What config.json and trainer_state.json of a checkpoint of `step` should not say, each with
    the file's name. Fields that are missing are told of where `config.json` is that of a run."""
    config, state = documents[CONFIG], documents[TRAINER_STATE]
    whole = "config" in config
    facts, place = (_FACTS, _PLACE) if whole else (_if_there(_FACTS), _if_there(_PLACE))
    for problem in problems(config, facts | _if_there(_MORE_FACTS)):
        yield f"{CONFIG}: {problem}"
    for problem in problems(state, place | _if_there(_PROGRESS)):
        yield f"{TRAINER_STATE}: {problem}"
    if state.get("step", step) != step:
        yield f"{TRAINER_STATE}: step is {state['step']}, the manifest says {step}"
    schedule = state.get("schedule")
    if _is_schedule(schedule) and schedule and schedule["step"] > step:
        yield f"{TRAINER_STATE}: schedule begins at step {schedule['step']}, which is not made yet"


def tensor_problem(stem: str, name: str, tensor: Tensor) -> str:
    """What is wrong with the values of a tensor that is as it was written, or "". A moment that is
    not finite, or a negative one of squares, spoils its parameter at the next step."""
    if stem != "optimizer":
        return ""
    if name.endswith((".exp_avg", ".exp_avg_sq")) and not tensor.isfinite().all():
        return "holds values that are not finite"
    if name.endswith(".exp_avg_sq") and (tensor < 0).any():
        return "holds negative values, and is a mean of squares"
    if name == "step" and tensor.numel() == 1 and tensor.item() < 0:
        return f"is {tensor.item()}, not a count"
    return ""


def need_run(checkpoint: Checkpoint) -> None:
    """Raise `PhiSightError` unless `config.json` is that of a run: one that can be asked."""
    for problem in problems(checkpoint.config, _FACTS):
        raise PhiSightError(f"{checkpoint.path}: {CONFIG}: {problem}; use the checkpoint of a run")


def need_resumable(checkpoint: Checkpoint) -> None:
    """Raise `PhiSightError` unless `trainer_state.json` has all that a run goes on from."""
    state = checkpoint.trainer_state
    wanted: dict[str, Any] = _PLACE | _PROGRESS
    for problem in problems(state, wanted):
        raise PhiSightError(
            f"{checkpoint.path}: {TRAINER_STATE}: {problem}, so it cannot be resumed; train on from"
            " its weights in another run with --start-from"
        )
    for problem in problems(checkpoint.config, {"world_size": COUNT}):
        raise PhiSightError(f"{checkpoint.path}: {CONFIG}: {problem}; use another checkpoint")
    steps = checkpoint.state["optimizer"].get("step")
    if steps is not None and steps.numel() == 1 and steps.item() > checkpoint.step:
        raise PhiSightError(
            f"{checkpoint.path}: optimizer.safetensors: tensor step is {steps.item()}, of a run of"
            f" {checkpoint.step} steps; use another checkpoint"
        )
