"""How two runs differ: their configs, their checkpoints to the bit, and where their logs part."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from errors import printable
from reports.log import CHAIN, deterministic_part
from tensors import as_float64, dtype_name, finite, raw_bytes

# Fields of trainer_state, at any depth, that tell when or how fast a run went: two runs that are
# equal bit for bit differ in them. The metrics offset counts the bytes of the timings in the log.
VOLATILE_FIELDS = (
    "saved_at",
    "seconds",
    "timing",
    "metrics_offset",
    "save_stall_seconds",
    "wait_seconds",
)
# Dotted paths in config.json that say where a run lies, not what it is.
RUN_FIELDS = ("name", "run", "config.name", "config.run")
SHOWN = 20  # differences that are printed


class Saved(Protocol):
    """A checkpoint that was read, as `checkpoints.Checkpoint` is one."""

    @property
    def path(self) -> Path: ...
    @property
    def step(self) -> int: ...
    @property
    def config(self) -> dict[str, Any]: ...
    @property
    def trainer_state(self) -> dict[str, Any]: ...
    @property
    def state(self) -> dict[str, dict[str, Tensor]]: ...
    @property
    def manifest(self) -> dict[str, Any]: ...


def projector_in(saved: Saved, shown: Callable[[str], str] = printable) -> str:
    """Which projector a checkpoint has, and how many tokens a picture is with it where that is
    known: not in those that an older version wrote, whose projector is the MLP."""
    tokens = saved.config.get("picture_tokens")
    said = f", {tokens:,} tokens a picture" if isinstance(tokens, int) else ""
    return member_in(saved, "projector", "mlp", shown) + said


def adapter_in(saved: Saved, shown: Callable[[str], str] = printable) -> str:
    """The rank and scale of a checkpoint's adapter, and which layers have it."""
    rank, alpha = (member_in(saved, f"lora_{name}", shown=shown) for name in ("rank", "alpha"))
    config = saved.config.get("config")
    targets = config.get("lora_targets") if isinstance(config, Mapping) else None
    named = shown(", ".join(map(str, targets))) if isinstance(targets, list) else "unknown layers"
    stabilized = isinstance(config, Mapping) and config.get("rank_stabilized") is True
    return f"rank {rank}, alpha {alpha}{', rank-stabilized' * stabilized}, on {named}"


def member_in(
    saved: Saved,
    field: str,
    former: str = "unknown",
    shown: Callable[[str], str] = printable,
) -> str:
    """What the config of a checkpoint names as "base", "vision" or "projector"; `former` where it
    lacks the field."""
    config = saved.config.get("config")
    return shown(str(config.get(field, former) if isinstance(config, Mapping) else "unknown"))


# -- fields ---------------------------------------------------------------------------------------


def field_differences(
    saved: Any, current: Any, skip: Callable[[str], bool], path: str = ""
) -> Iterator[tuple[str, str, str]]:
    """(dotted path, text of saved, text of current) of each leaf that differs; lists are leaves."""
    if isinstance(saved, Mapping) and isinstance(current, Mapping):
        for key in list(saved) + [key for key in current if key not in saved]:
            inner = f"{path}.{key}" if path else str(key)
            if skip(inner):
                continue
            if key in saved and key in current:
                yield from field_differences(saved[key], current[key], skip, inner)
            else:
                yield inner, _text(saved, key), _text(current, key)
        return
    old, new = json.dumps(saved, default=str), json.dumps(current, default=str)
    if old != new and saved != current:  # texts: NaN is NaN, and a tuple is a list
        yield path, old, new


def _text(fields: Mapping[str, Any], key: str) -> str:
    return json.dumps(fields[key], default=str) if key in fields else "absent"


def compare_configs(
    saved: Mapping[str, Any], current: Mapping[str, Any], ignore: tuple[str, ...] = ()
) -> list[str]:
    """Readable differences of two configs; `ignore` names dotted paths, with all beneath them."""

    def skip(path: str) -> bool:
        return any(path == entry or path.startswith(f"{entry}.") for entry in ignore)

    return [
        f"{path}: {old} in the checkpoint, {new} now"
        for path, old, new in field_differences(saved, current, skip)
    ]


# -- logs -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Parting:
    """Where two logs part: the last step at which they agree, the first at which they differ, and
    the names of the fields that differ there. None: a log ends."""

    agree_to: int | None
    part_by: int | None
    fields: list[str]
    loss_gap: float
    """the largest difference of two training losses of the same step, in nats"""

    def __str__(self) -> str:
        since = "" if self.agree_to is None else f"agree to step {self.agree_to}, "
        if self.part_by is None:
            return f"the logs {since or 'do not both begin, '}then one of them ends"
        return (
            f"the logs {since}part by step {self.part_by} ({', '.join(self.fields)}); losses of"
            f" the same step differ by at most {self.loss_gap:.2g}"
        )


def parting(
    first: Sequence[Mapping[str, Any]], second: Sequence[Mapping[str, Any]]
) -> Parting | None:
    """Where two runs' records part, or None where they are equal to the end of the shorter log and
    of one length."""
    losses, others = _losses(first), _losses(second)
    gaps = [abs(loss - others[step]) for step, loss in losses.items() if step in others]
    agree_to, loss_gap = None, max(gaps, default=0.0)
    for one, other in zip(first, second):
        if one.get(CHAIN) != other.get(CHAIN):
            a, b = deterministic_part(one), deterministic_part(other)
            fields = [
                key for key in dict.fromkeys([*a, *b]) if key != CHAIN and a.get(key) != b.get(key)
            ]
            return Parting(agree_to, one.get("step"), fields, loss_gap)
        agree_to = one.get("step")
    return None if len(first) == len(second) else Parting(agree_to, None, [], loss_gap)


def _losses(records: Sequence[Mapping[str, Any]]) -> dict[Any, float]:
    """step -> training loss, where it is a finite number."""
    return {
        record.get("step"): record["loss"]
        for record in records
        if record.get("kind") == "train" and isinstance(record.get("loss"), float)
    }


# -- checkpoints ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Diff:
    """What differs between two checkpoints; each difference has owner, name and message."""

    step: int
    owners: dict[str, int]  # owner -> tensors in either
    differences: list[dict[str, Any]]
    parted: Parting | None = None  # of the two runs' logs, where both are runs

    @property
    def identical(self) -> bool:
        return not self.differences

    def as_json(self) -> dict[str, Any]:
        return {
            "identical": self.identical,
            "tensors": sum(self.owners.values()),
            "owners": self.owners,
            "step": self.step,
            "differences": self.differences,
            "parted": dataclasses.asdict(self.parted) if self.parted else None,
        }

    def __str__(self) -> str:
        owners = ", ".join(f"{owner} {count}" for owner, count in self.owners.items())
        tensors = f"{sum(self.owners.values())} tensors ({owners})"
        logs = [str(self.parted)] if self.parted else []
        if self.identical:
            return "\n  ".join([f"identical: {tensors}, RNG, position, step {self.step}", *logs])
        lines = [f"{row['owner']} {row['name']}: {row['message']}" for row in self.differences]
        left_out = len(lines) - SHOWN
        more = [f"... and {left_out} more, which --json lists"] if left_out > 0 else []
        return "\n  ".join(
            [
                f"different: {len(lines)} differences over {tensors} and the fields; "
                f"the first: {lines[0]}",
                *logs,
                *lines[1:SHOWN],
                *more,
            ]
        )


def compare(
    first: Saved,
    second: Saved,
    owners: Mapping[str, str],
    logs: tuple[Sequence[Mapping[str, Any]], Sequence[Mapping[str, Any]]] | None = None,
) -> Diff:
    """Compare two checkpoints to the bit.

    Not compared: VOLATILE_FIELDS of trainer_state and RUN_FIELDS of config.

    Args:
        owners: file stem -> owner of the tensors in it.
        logs: the records of both runs' logs, which tell when they parted.
    """
    counts: dict[str, int] = {}
    differences: list[dict[str, Any]] = []
    for stem, owner in owners.items():
        names = dict.fromkeys([*first.state[stem], *second.state[stem]])
        counts[owner] = len(names)
        for name in names:
            row = _tensor_difference(first.state[stem].get(name), second.state[stem].get(name))
            if row is not None:
                differences.append({"owner": owner, "name": name} | row)

    def nothing(path: str) -> bool:
        return False

    def volatile(path: str) -> bool:
        return path.rpartition(".")[2] in VOLATILE_FIELDS

    for owner, one, other, skip in (
        ("step", {"step": first.step}, {"step": second.step}, nothing),
        ("trainer_state", first.trainer_state, second.trainer_state, volatile),
        ("config", first.config, second.config, RUN_FIELDS.__contains__),
        ("tokenizer", _tokenizer_files(first), _tokenizer_files(second), nothing),
    ):
        differences += [
            {"owner": owner, "name": path, "message": f"{old} against {new}"}
            for path, old, new in field_differences(one, other, skip)
        ]
    return Diff(first.step, counts, differences, parting(*logs) if logs else None)


def _tokenizer_files(saved: Saved) -> dict[str, str]:
    """The sha256 of each, by name."""
    return {
        row["file"]: row["sha256"]
        for row in saved.manifest["files"]
        if row["file"].startswith("tokenizer/")
    }


def _tensor_difference(first: Tensor | None, second: Tensor | None) -> dict[str, Any] | None:
    """None if equal to the bit, dtype and shape; else a message and, where it can be, numbers."""
    kinds = [
        "absent" if t is None else f"{dtype_name(t)} {tuple(t.shape)}" for t in (first, second)
    ]
    if first is None or second is None or kinds[0] != kinds[1]:
        return {"message": f"{kinds[0]} against {kinds[1]}"}
    size = first.element_size()
    changed = (raw_bytes(first) != raw_bytes(second)).reshape(-1, size).any(axis=1)
    if not changed.any():
        return None
    gap = finite((as_float64(first) - as_float64(second)).abs().max().item())
    shown = "not finite" if gap is None else f"{gap:.3g}"
    return {
        "message": f"{changed.sum()} of {first.numel()} elements differ, at most by {shown}",
        "elements": int(changed.sum()),
        "of": first.numel(),
        "max_abs_difference": gap,
    }
