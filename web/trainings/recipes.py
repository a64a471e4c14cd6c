"""What a run was trained with, as the form of a training that begins with it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import config as configs
import config_values
from documents import read_json, require
from errors import PhiSightError
from presets import DEFAULT_PRESET, PRESETS
from reports.status import newest_save
from web.errors import RequestError
from web.trainings.fields import SET_ELSEWHERE


def newest_checkpoint(run: Path) -> Path:
    """The folder of a run's newest checkpoint, by its name alone. Raises `RequestError` where it
    has none, PhiSightError where the run cannot be read."""
    save = newest_save(run)
    if save is None:
        raise RequestError("training_nothing_saved", name=run.name)
    return run / f"checkpoint-{save.step:06d}"


def named_checkpoint(run: Path, name: str) -> Path:
    """A checkpoint of a run by the name of its folder; empty for the newest one."""
    if not name:
        return newest_checkpoint(run)
    folder = run / name
    is_name = name == "best" or (
        name.startswith("checkpoint-") and name[11:].isdigit() and name.isascii()
    )
    if not is_name or not folder.is_dir():
        raise RequestError("training_no_checkpoint", name=run.name, checkpoint=name[:40])
    return folder


def recipe_of(run: Path) -> dict[str, Any]:
    """The preset that is nearest to a run's config, and the values that differ from it.

    Raises `RequestError` where nothing of the run is saved, PhiSightError where it cannot be read.
    """
    path = newest_checkpoint(run) / "config.json"
    try:
        written = read_json(path)
        require(written, {"config": {}})
        config = config_values.plain(config_values.from_dict(written["config"], str(path)))
    except OSError as error:
        raise PhiSightError(f"{path}: {error.strerror}; name another run") from error
    by_preset = {name: config_values.plain(configs.default_config(name)) for name in PRESETS}

    def differing(preset: str) -> dict[str, Any]:
        usual = by_preset[preset]
        return {n: v for n, v in config.items() if n not in SET_ELSEWHERE and v != usual[n]}

    nearest = min(PRESETS, key=lambda name: (len(differing(name)), name != DEFAULT_PRESET))
    return {"preset": nearest, "values": differing(nearest)}
