"""What people read of a run on the terminal: a line per log record, and what a checkpoint holds."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from reports.card import provenance
from reports.compare import Saved
from reports.log import TIMING, number_text
from tensors import finite

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


# -- a checkpoint ---------------------------------------------------------------------------------


def summarise(saved: Saved, owners: Mapping[str, str]) -> dict[str, Any]:
    """Where a run stands, and totals by owner. `owners`: file stem -> owner of its tensors."""
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
            "change": change.get(owner),
        }
    return {
        "path": str(saved.path),
        "step": saved.step,
        "owners": totals,
        "change_since_step": change.get("since_step"),
        "versions": saved.config.get("versions"),
        "provenance": provenance(saved),
        "trainer_state": saved.trainer_state,
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


def print_summary(summary: Mapping[str, Any]) -> None:
    """What `summarise` gives, as a table and a line per field."""
    print(f"{summary['path']}: step {summary['step']}, verified")
    print(
        f"{'owner':<12}{'tensors':>9}{'parameters':>14}{'bytes':>15}{'mean':>13}{'std':>13}"
        f"{'change':>13}"
    )
    for owner, row in summary["owners"].items():
        statistics = "".join(
            f"{'-' if row[key] is None else format(row[key], '.4g'):>13}"
            for key in ("mean", "std", "change")
        )
        print(
            f"{owner:<12}{row['tensors']:>9,}{row['parameters']:>14,}{row['bytes']:>15,}"
            f"{statistics}"
        )
    if summary["change_since_step"] is not None:
        print(f"change: L2 norm since the save of step {summary['change_since_step']}")
    digest = summary["provenance"]["weights_digest"]
    fields = {"versions": summary["versions"], "weights_digest": digest} | summary["trainer_state"]
    for key, value in fields.items():
        if key == "recent_losses" and isinstance(value, list):
            key, value = "last losses", value[-5:]
        text = json.dumps(value)
        print(f"{key}: {text if len(text) <= 200 else text[:197] + '...'}")


def print_verified(problems: Mapping[str, Sequence[str]]) -> None:
    """A line per log and checkpoint, and one per problem. `problems`: path -> its problems."""
    for path, lines in problems.items():
        print("\n  ".join([f"{path}: {'damaged' if lines else 'intact'}", *lines]))
