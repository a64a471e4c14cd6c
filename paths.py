"""Where paths lie, whatever folder a command is started from.

What a person types is relative to the folder where he types it. The paths of a preset, the defaults
of flags, and the paths that a checkpoint holds are relative to the folder of this project. In
memory every path is as it is named from the current folder, so that files can simply be opened.
Where the current folder is the project's, both are the same, and no path is changed.
"""

from __future__ import annotations

import os
from pathlib import Path

from errors import PhiSightError

PROJECT = Path(__file__).resolve().parent
LONGEST, LONGEST_NAME = 4095, 255  # bytes of a path and of a name in it that Linux takes
HUB_RUN = "hf:"  # begins what names a run on the hub, which is no path; see `hub`


def is_current_folder() -> bool:
    """Whether the current folder is the project's."""
    try:
        return Path.cwd() == PROJECT
    except FileNotFoundError:  # the current folder was removed
        return False


def located(path: str) -> str:
    """A path that is relative to the project, as it is named from the current folder."""
    if not path or os.path.isabs(path) or path.startswith(HUB_RUN) or is_current_folder():
        return path
    return str(PROJECT / path)


def recorded(path: str) -> str:
    """The inverse of `located`: absolute, or relative to the project if it lies there, so that a
    checkpoint is still right when the project's folder is moved."""
    if not path or path.startswith(HUB_RUN) or is_current_folder():
        return path
    absolute = Path(os.path.abspath(path))
    return str(absolute.relative_to(PROJECT) if absolute.is_relative_to(PROJECT) else absolute)


def problem_of(path: str) -> str:
    """Why a text can be no path, which Python would raise errors of its own for; "" if it can."""
    if "\0" in path:
        return "has a null character; no path has"
    whole = os.path.abspath(path).encode("utf-8", "surrogatepass")
    if len(whole) > LONGEST or any(len(part) > LONGEST_NAME for part in whole.split(b"/")):
        return "is longer than a path can be"
    return ""


def command(name: str) -> str:
    """What to type for a command of this project from the current folder, such as
    "python train.py"; a module ("-m data.world") is found in the project's folder only."""
    if name.startswith("-m "):
        return f"python {name}" if is_current_folder() else f"cd {PROJECT} && python {name}"
    return f"python {located(name)}"


def need_file(path: str, flag: str, remedy: str) -> Path:
    """The path of an input file that has to be there."""
    if not path:
        raise PhiSightError(f"{flag}: not given; {remedy}")
    if not Path(path).is_file():
        raise PhiSightError(f"{path}: no such file; {remedy}")
    return Path(path)
