"""What people read of a run on the terminal: a line per log record, and what a checkpoint holds."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from reports.card import provenance
from reports.compare import Saved, adapter_in, member_in, projector_in
from reports.log import TIMING, number_text
from tensors import finite

MEMBERS = ("base", "vision", "projector", "lora")  # a line for each
RATES = ("learning_rate", "lora_plus_ratio", "projector_learning_rate")  # of a run's config

# -- a record of the log --------------------------------------------------------------------------


def console_line(record: Mapping[str, Any]) -> str:
    """One line for people; fields that the record lacks are left out."""
    parts = [f"step {record.get('step', '?'):>6}"]

    def add(source: Mapping[str, Any], key: str, label: str, pattern: str, unit: str = "") -> None:
        if key in source:
            parts.append(f"{label} {number_text(source[key], pattern)}{unit}".lstrip())

    if record.get("kind") == "evaluation":
        add(record, "validation_loss", "validation loss", ".4f")
        alignment = record.get("alignment") or {}
        for key, label in (("right", "right picture"), ("swapped", "swapped"), ("blank", "blank")):
            add(alignment, key, label, ".1f", "%")
        return "  ".join(parts)
    add(record, "loss", "loss", ".4f")
    add(record, "lr", "lr", ".3g")
    if own := record.get("rates"):
        parts.append(f"({rates_text(own)})")
    add(record, "gradient_norm", "gradient", ".3g")
    if norms := record.get("gradient_norms"):
        text = ", ".join(f"{owner} {number_text(norm, '.3g')}" for owner, norm in norms.items())
        parts.append(("" if "gradient_norm" in record else "gradient ") + f"({text})")
    add(record, "supervised_tokens", "answer tokens", ",")
    add(record, "padding_share", "padding", ".1%")
    timing = record.get(TIMING) or {}
    add(timing, "seconds", "", ".2f", " s")
    add(timing, "tokens_per_second", "", ",.0f", " tokens/s")
    add(timing, "memory_mb", "", ",.0f", " MB")
    add(timing, "cuda_memory_mb", "GPU", ",.0f", " MB")
    return "  ".join(parts)


def rates_text(rates: Mapping[str, Any]) -> str:
    """Group of parameters -> its rate, in a line."""
    return ", ".join(f"{group} {number_text(rate, '.3g')}" for group, rate in rates.items())


# -- a checkpoint ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Summary:
    """Where a run stands, and totals by owner."""

    fields: dict[str, Any]

    def as_json(self) -> dict[str, Any]:
        return self.fields

    def __str__(self) -> str:
        return summary_text(self.fields)


def summarise(saved: Saved, owners: Mapping[str, str]) -> Summary:
    """What a checkpoint holds. `owners`: file stem -> owner of its tensors."""
    change = saved.manifest.get("change") or {}
    totals: dict[str, dict[str, Any]] = {}
    for stem, owner in owners.items():
        rows = [row for row in saved.manifest["tensors"] if row["owner"] == owner]
        mean, std = _mean_and_std(rows)
        totals[owner] = {
            "tensors": len(rows),
            "parameters": sum(math.prod(row["shape"]) for row in rows),
            "bytes": sum(tensor.nbytes for tensor in saved.state[stem].values()),
            "mean": mean,
            "std": std,
            **_moved(change.get(owner)),
        }
    fields = {
        "path": str(saved.path),
        "step": saved.step,
        "owners": totals,
        "base": member_in(saved, "base"),
        "vision": member_in(saved, "vision"),
        "projector": projector_in(saved),
        "lora": adapter_in(saved),
        "change_since_step": change.get("since_step"),
        "versions": saved.config.get("versions"),
        "rates": _own_rates(saved.config.get("config")),
        "provenance": provenance(saved),
        "trainer_state": saved.trainer_state,
    }
    return Summary(fields)


def _own_rates(config: Any) -> dict[str, Any]:
    """What a run's config says of rates by owner; empty where all have the learning rate."""
    said = {n: config[n] for n in RATES if n in config} if isinstance(config, Mapping) else {}
    everywhere = (0, said.get("learning_rate"))
    plain = said.get("projector_learning_rate", 0) in everywhere
    return {} if plain and said.get("lora_plus_ratio", 1) == 1 else said


def _moved(told: Any) -> dict[str, float | None]:
    """What a manifest says of an owner's change; a former version wrote one norm alone."""
    if not isinstance(told, Mapping):
        return {"change": told}
    return {
        "change": told.get("moved"),
        "norm": told.get("norm"),
        "mean_change": told.get("mean_change"),
        "change_since_start": told.get("moved_since_start"),
    }


def _mean_and_std(rows: Sequence[Mapping[str, Any]]) -> tuple[float | None, float | None]:
    """Over all elements of the tensors of these manifest rows; None where that means nothing (no
    elements, or values that are not finite)."""
    some = [
        (size, row["mean"], row["std"]) for row in rows if (size := math.prod(row["shape"])) > 0
    ]
    if not some or any(None in entry for entry in some):
        return None, None
    try:
        count = sum(size for size, _, _ in some)
        mean = sum(size * each for size, each, _ in some) / count
        square = sum(size * (each**2 + spread**2) for size, each, spread in some)
        return finite(mean), finite(math.sqrt(max(square / count - mean**2, 0.0)))
    except OverflowError:  # a square beyond the largest number
        return None, None


def summary_text(summary: Mapping[str, Any]) -> str:
    """The fields of a `Summary`, as a table and a line per field."""
    lines = [
        f"{summary['path']}: step {summary['step']}, verified",
        f"{'owner':<12}{'tensors':>9}{'parameters':>14}{'bytes':>15}{'mean':>13}{'std':>13}"
        f"{'change':>13}",
    ]
    for owner, row in summary["owners"].items():
        statistics = "".join(
            f"{'-' if row[key] is None else format(row[key], '.4g'):>13}"
            for key in ("mean", "std", "change")
        )
        lines.append(
            f"{owner:<12}{row['tensors']:>9,}{row['parameters']:>14,}{row['bytes']:>15,}"
            f"{statistics}"
        )
    if summary["change_since_step"] is not None:
        lines.append(f"change: L2 norm since the save of step {summary['change_since_step']}")
    since_start = {
        owner: row["change_since_start"]
        for owner, row in summary["owners"].items()
        if row.get("change_since_start") is not None
    }
    if since_start:
        norms = ", ".join(f"{owner} {value:.4g}" for owner, value in since_start.items())
        lines.append(f"change since the start of the run: {norms}")
    digest = summary["provenance"]["weights_digest"]
    lines += [f"{member}: {summary[member]}" for member in MEMBERS]
    fields = {"versions": summary["versions"], "weights_digest": digest} | summary["trainer_state"]
    if summary["rates"]:
        fields = {"rates": summary["rates"]} | fields
    for key, value in fields.items():
        if key == "recent_losses" and isinstance(value, list):
            key, value = "last losses", value[-5:]
        text = json.dumps(value)
        lines.append(f"{key}: {text if len(text) <= 200 else text[:197] + '...'}")
    return "\n".join(lines)


def verified_text(problems: Mapping[str, Sequence[str]]) -> str:
    """A line per log and checkpoint, and one per problem. `problems`: path -> its problems."""
    return "\n".join(
        "\n  ".join([f"{path}: {'damaged' if lines else 'intact'}", *lines])
        for path, lines in problems.items()
    )
