"""The fields of the config as a form: all that is said of one comes from its declaration."""

from __future__ import annotations

import typing
from typing import Any

import config as configs
import config_values
from config import FIELDS, TYPES, flag_of
from presets import DEFAULT_PRESET, PRESETS

# Where a group begins, in the order in which `Config` declares the fields.
GROUPS = {
    "base": "model",
    "speech": "listening",
    "data": "data",
    "epochs": "optimisation",
    "evaluate_steps": "records",
    "run": "machine",
}
# What people change first; the rest is folded.
COMMON = (
    "epochs",
    "max_steps",
    "learning_rate",
    "batch_size",
    "accumulation",
    "lora_rank",
    "evaluate_steps",
    "save_steps",
    "data_fraction",
    "validation_fraction",
)
SET_ELSEWHERE = ("run", "start_from")  # by the run's name, and by the choice of what to begin with
KINDS: dict[Any, str] = {bool: "boolean", int: "whole", float: "number", str: "text"}


def form_json() -> dict[str, Any]:
    """Presets with their values, and every field that a person may set."""
    presets = {name: config_values.plain(configs.default_config(name)) for name in PRESETS}
    fields, group = [], ""
    for name in FIELDS:
        group = GROUPS.get(name, group)
        if name not in SET_ELSEWHERE:
            fields.append(field_json(name, group))
    return {
        "preset": DEFAULT_PRESET,
        "presets": [{"name": name, "values": values} for name, values in presets.items()],
        "groups": list(GROUPS.values()),
        "fields": fields,
    }


def field_json(name: str, group: str) -> dict[str, Any]:
    """How a field is asked for."""
    declared = FIELDS[name].metadata
    bounds = declared["bounds"]
    return {
        "name": name,
        "flag": flag_of(name),
        "group": group,
        "common": COMMON.index(name) if name in COMMON else None,
        "help": declared["help"],
        "kind": "names" if typing.get_origin(TYPES[name]) is tuple else KINDS[TYPES[name]],
        "choices": declared["choices"],
        "allowed": bounds.words if bounds else "",
        "path": bool(declared["place"]),
    }
