"""A config as JSON and TOML hold it: plain values, and back again with every type checked."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import paths
from config import FIELDS, TYPES, Config, located, recorded, validate
from errors import PhiSightError
from fields import as_texts, of_kind, shown


def of_declared_type(values: Mapping[str, Any], where: str) -> dict[str, Any]:
    """These fields as a `Config` holds them, from JSON or TOML: lists become tuples and whole
    numbers floats where the field is one. Raises PhiSightError naming the field."""
    clean = {}
    for name, value in values.items():
        try:
            if FIELDS[name].metadata["repeated"] and isinstance(value, str):
                value = list(as_texts(value))
            clean[name] = of_kind(value, TYPES[name], FIELDS[name].metadata["formerly"])
        except TypeError as error:
            raise PhiSightError(
                f"{where}: config field {name} is {shown(value)}; expected {error}"
            ) from error
    return clean


def plain(config: Config) -> dict[str, Any]:
    """Every field as JSON and TOML hold it."""
    return {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in vars(config).items()
    }


def to_dict(config: Config) -> dict[str, Any]:
    """Plain JSON values, paths as `paths.recorded` has them; the inverse of `from_dict`."""
    return recorded(plain(config))


def from_dict(values: Mapping[str, Any], where: str) -> Config:
    """A `Config` from the JSON of a checkpoint; unknown, missing or ill-typed fields are errors."""
    old = {name: spec.metadata["old_checkpoints"] for name, spec in FIELDS.items()}
    values = {n: v for n, v in old.items() if v is not dataclasses.MISSING} | dict(values)
    missing, unknown = sorted(FIELDS.keys() - values.keys()), sorted(values.keys() - FIELDS.keys())
    if missing or unknown:
        raise PhiSightError(
            f"{where}: its config lacks {missing or 'nothing'} and has unknown"
            f" {unknown or 'nothing'}; it was written by another version of PhiSight"
        )
    fields = of_declared_type(values, where)
    for name, value in fields.items():
        for text in as_texts(value) if FIELDS[name].metadata["place"] else ():
            if problem := paths.problem_of(text):
                raise PhiSightError(f"{where}: config field {name} {problem}")
    config = Config(**located(fields))
    validate(config)
    return config
