"""A config as a TOML file: what `--print-config` writes and `--config` reads."""

from __future__ import annotations

import difflib
import json
import tomllib
from collections.abc import Iterable, Mapping
from typing import Any

from config import (
    DEFAULT_PRESET,
    FIELDS,
    PRESETS,
    Config,
    flag_of,
    located,
    out_of_bounds,
    shown,
)
from config_values import of_declared_type, plain
from errors import PhiSightError

FILE_LIMIT = 2**20  # bytes; no --config file comes near this


def to_toml(config: Config) -> str:
    """A `--config` file with every field; `read_config_file` gives exactly these values back.

    Written here because Python reads TOML and does not write it, and none of our packages is worth
    importing at the start of a training for strings, numbers and one list.

    Raises:
        PhiSightError: a text holds what no TOML file can, such as a file name that is not UTF-8.
    """
    head = "# A run of PhiSight: python train.py --config FILE; --help explains each field.\n"
    return head + toml_lines(plain(config))


def toml_lines(fields: Mapping[str, Any]) -> str:
    """Fields as lines of TOML; raises what `to_toml` does."""
    lines = []
    for name, value in fields.items():
        # JSON's numbers, booleans, texts and lists are TOML's, but for one character in a text that
        # TOML wants escaped too. Floats are written so that they read back as the same float.
        text = json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
        if any("\ud800" <= character <= "\udfff" for character in text):
            raise PhiSightError(
                f"{flag_of(name)} {value!r}: TOML holds Unicode text only; rename"
                " that file or folder"
            )
        lines.append(f"{name} = {text}\n")
    return "".join(lines)


def read_config_file(path: str) -> dict[str, Any]:
    """The fields that a `--config` file gives, by name, and its "preset" if it names one.

    Raises:
        PhiSightError: it cannot be read, is not TOML, or has a key or value that no config has.
    """
    where = f"--config {path}"
    values = toml_of(path, where)
    preset = preset_of(values, where)
    return fields_of(values, where) | {"preset": preset}


def toml_of(path: str, where: str) -> dict[str, Any]:
    """What a TOML file holds, of whatever keys. Raises `PhiSightError`; `where` names the file."""
    try:
        with open(path, "rb") as file:  # once, and without asking what it is: it may be a pipe
            data = file.read(FILE_LIMIT + 1)
    except OSError as error:
        raise PhiSightError(f"{where}: {error.strerror}; name a TOML file") from error
    if len(data) > FILE_LIMIT:
        raise PhiSightError(f"{where}: larger than {FILE_LIMIT} bytes; name a TOML file")
    try:
        return tomllib.loads(data.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:  # not UTF-8, not TOML, nested too deeply
        raise PhiSightError(
            f"{where}: not valid TOML: {error}; write lines such as batch_size = 8"
        ) from error


def preset_of(values: dict[str, Any], where: str) -> str:
    """Take the preset's name out of what a file holds; the default one where it names none."""
    preset = values.pop("preset", DEFAULT_PRESET)
    if not isinstance(preset, str) or preset not in PRESETS:
        known = " or ".join(f'"{name}"' for name in sorted(PRESETS))
        raise PhiSightError(f"{where}: preset is {shown(preset)}; give {known}")
    return preset


def check_names(names: Iterable[str], where: str) -> None:
    """Raise `PhiSightError` for a name that no config field has, with the nearest one."""
    for key in names:
        if key not in FIELDS:
            near = difflib.get_close_matches(key, FIELDS, n=1, cutoff=0.5)
            remedy = f"did you mean {near[0]}?" if near else "train.py --print-config lists all"
            raise PhiSightError(f"{where}: {shown(key)} is not a config field; {remedy}")


def fields_of(values: Mapping[str, Any], where: str) -> dict[str, Any]:
    """These config fields as a `Config` holds them. Raises `PhiSightError` for a key or a value
    that no config has."""
    check_names(values, where)
    fields = of_declared_type(values, where)
    # A preset's own path, as --print-config writes it (without the preset's name), is the project's
    # here too.
    presets = [vars(Config(**values)) for values in PRESETS.values()]
    fields |= located({n: v for n, v in fields.items() if any(v == own[n] for own in presets)})
    if problems := out_of_bounds(fields):
        raise PhiSightError(f"{where}: " + "; ".join(problems))
    return fields
