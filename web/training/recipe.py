"""What a run was asked to do, and the data that it learns from, by the files beside its log."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import config as configs
import config_values
from documents import BYTE_LIMIT, parse_json
from errors import PhiSightError, printable
from files import open_regular, read_regular
from presets import DEFAULT_PRESET, PRESETS

QUARANTINE = "quarantine.jsonl"
QUARANTINE_BYTES = 8 * 2**20  # that are read of it; what lies behind is counted as more
REASONS, EXAMPLES = 20, 3  # kinds of reasons that are told, and records of each
SHOWN = 300  # characters of a text of unknown origin
LINE = 2**16
# The groups of the table, each with the field that it begins with, as config.py has them.
GROUPS = {
    "base": "recipe_model",
    "speech": "recipe_speech",
    "data": "recipe_data",
    "epochs": "recipe_optimisation",
    "evaluate_steps": "recipe_watching",
    "run": "recipe_place",
}
# What a reason names of one record: two records with the same fault have one reason without it.
_PARTICULAR = re.compile(r"'[^']*'|\"[^\"]*\"|`[^`]*`|\d[\d,.]*|\S*[/\\]\S+|\S+\.\w{2,5}(?=:)")


def read_config(checkpoint: Path) -> dict[str, Any]:
    """The config.json of a checkpoint. Raises PhiSightError."""
    path = checkpoint / "config.json"
    try:
        found = parse_json(read_regular(path, BYTE_LIMIT, follow_links=False))
    except OSError as error:
        raise PhiSightError(f"{path}: {error.strerror}; verify the checkpoint") from error
    except PhiSightError as error:
        raise PhiSightError(f"{path}: {error}; verify the checkpoint") from error
    if not isinstance(found.get("config"), dict):
        raise PhiSightError(f"{path}: has no config; verify the checkpoint")
    return found


def recipe_of(values: Mapping[str, Any]) -> dict[str, Any]:
    """Every field of a config with its value, its help, and whether it is the preset's. Of the
    presets it is the one whose base it has."""
    is_tiny = values.get("base") == PRESETS["tiny"]["base"]
    preset = "tiny" if is_tiny else next(name for name in PRESETS if name != DEFAULT_PRESET)
    defaults, group, fields = preset_values(preset), "", []
    for name, spec in configs.FIELDS.items():
        group = GROUPS.get(name, group)
        value = values.get(name, spec.metadata["old_checkpoints"])
        if not isinstance(value, str | int | float | bool | list):
            continue  # an older version's run, which had no such field
        fields.append(
            {
                "name": name,
                "group": group,
                "value": _shown(value),
                "default": _shown(defaults[name]),
                "differs": name != "run" and value != defaults[name],
                "help": spec.metadata["help"],
            }
        )
    return {"preset": preset, "fields": fields}


@cache
def preset_values(preset: str) -> dict[str, Any]:
    """A preset as a checkpoint of it would record it."""
    return config_values.plain(configs.Config(**PRESETS[preset]))


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    text = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
    return printable(text, SHOWN)


def data_of(run: Path, facts: Mapping[str, Any] | None) -> dict[str, Any]:
    """How much data there is, and what was set aside. `facts`: the config.json of a checkpoint;
    before the first one only what was set aside is known."""
    counts = (facts or {}).get("data_counts")
    known = counts if isinstance(counts, dict) else {}
    return {
        "counts": {
            printable(name, SHOWN): value for name, value in known.items() if type(value) is int
        },
        "quarantine": quarantine_of(run / QUARANTINE),
    }


def quarantine_of(path: Path) -> dict[str, Any] | None:
    """The records that were set aside, by the kind of their reason, the most frequent first; None
    where nothing was written down yet. Lines that are none of ours are passed over."""
    counts: Counter[str] = Counter()
    examples: dict[str, list[dict[str, str]]] = {}
    try:
        with open_regular(path, follow_links=False) as file:
            left = QUARANTINE_BYTES
            while left > 0 and (line := file.readline(LINE)):
                left -= len(line)
                if (entry := _entry(line)) is not None:
                    kind = _PARTICULAR.sub("…", entry["reason"])
                    counts[kind] += 1
                    if len(some := examples.setdefault(kind, [])) < EXAMPLES:
                        some.append(entry)
            whole = left > 0
    except OSError:
        return None  # not written yet, or gone
    return {
        "count": sum(counts.values()),
        "whole": whole,
        "reasons": [
            {"reason": kind, "count": count, "examples": examples[kind]}
            for kind, count in counts.most_common(REASONS)
        ],
    }


def _entry(line: bytes) -> dict[str, str] | None:
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(found, dict) or not isinstance(found.get("reason"), str):
        return None
    return {name: printable(found.get(name, ""), SHOWN) for name in ("where", "id", "reason")}
