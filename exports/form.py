"""What a form of export or import is to export.py, and what the forms share on the command line."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from config import Config
from errors import PhiSightError


@dataclass(frozen=True)
class Form:
    """A format that another program reads or wrote. `exports.table` has a line for each."""

    run: Callable[[argparse.Namespace], str]
    """Export or import what the options ask for, and return what to print."""
    flag: Mapping[str, Any]
    """How argparse declares the flag that chooses this form, its help included."""
    own_flags: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Flags that go with this form only, such as {"--split": {"action": "store_true"}}."""
    carries_pictures: bool = False
    """Whether the export sees, so that --require-alignment can be asked of it."""


def attribute(flag: str) -> str:
    """The name of a flag among parsed options: "--import-peft" -> "import_peft"."""
    return flag.removeprefix("--").replace("-", "_")


def folder_to_write(options: argparse.Namespace, flag: str = "--out") -> str:
    """The folder given by `flag`. Raises `PhiSightError` if none is, or two are."""
    folder = getattr(options, attribute(flag))
    if not folder:
        raise PhiSightError(f"{flag}: not given; name the folder to write")
    if flag != "--out" and options.out:
        raise PhiSightError(f"--out: {flag} {folder} names the folder already; leave --out out")
    return folder


def add_config_flags(parser: argparse._ActionsContainer, fields: Sequence[str]) -> None:
    """A flag for each of these fields of `Config`; None where it is not typed."""
    for name in fields:
        spec = Config.__dataclass_fields__[name]
        parser.add_argument(
            "--" + name.replace("_", "-"),
            type=str if spec.metadata["repeated"] else type(spec.default),
            action="append" if spec.metadata["repeated"] else "store",
            choices=spec.metadata["choices"],
            help=spec.metadata["help"].replace("%", "%%"),
        )


def typed(options: argparse.Namespace, fields: Sequence[str]) -> dict[str, Any]:
    """Those of the fields that were typed, with their values."""
    values = {name: getattr(options, name) for name in fields}
    return {name: value for name, value in values.items() if value is not None}
