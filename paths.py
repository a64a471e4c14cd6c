"""Where paths lie, whatever folder a command is started from.

What a person types is relative to the folder where he types it. The paths of a preset, the defaults
of flags, and the paths that a checkpoint holds are relative to the folder of this project. In
memory every path is as it is named from the current folder, so that files can simply be opened.
Where the current folder is the project's, both are the same, and no path is changed.
"""

from __future__ import annotations

import os
import shlex
import subprocess
from pathlib import Path, PurePath, PureWindowsPath

from errors import PhiSightError

PROJECT = Path(__file__).resolve().parent
LONGEST, LONGEST_NAME = 4095, 255  # bytes of a path and of a name in it that Linux takes
HUB_RUN = "hf:"  # begins what names a run on the hub, which is no path; see `hub`
EXAMPLES = "examples"  # folder of a run, and of a Space: pictures and questions to begin with


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
    if not path or path.startswith(HUB_RUN):
        return path
    if is_current_folder():
        return path if PurePath(path).is_absolute() else path.replace(os.sep, "/")
    absolute = Path(os.path.abspath(path))
    if not absolute.is_relative_to(PROJECT):
        return str(absolute)
    return absolute.relative_to(PROJECT).as_posix()  # which every system reads


def problem_of(path: str) -> str:
    """Why a text can be no path, which Python would raise errors of its own for; "" if it can."""
    if "\0" in path:
        return "has a null character; no path has"
    try:
        whole = os.path.abspath(path).encode()
    except UnicodeEncodeError:  # what stands for a byte; the libraries that save can write no such
        return "has bytes that are not UTF-8; rename it"
    names = whole.split(os.sep.encode())
    if len(whole) > LONGEST or any(len(part) > LONGEST_NAME for part in names):
        return "is longer than a path can be"
    return ""


def is_typed_as_path(text: str) -> bool:
    """Whether a text that may name a folder or a model of the hub can be the former alone, as it is
    typed on any system: `/a`, `./a`, `a/b/c`, `C:\\a`, `a\\b`."""
    windows = PureWindowsPath(text)
    begins = text.startswith((".", "~", "/")) or bool(windows.anchor)
    return begins or "\\" in text or text.count("/") > 1


def typed(*words: str) -> str:
    """Words as they are typed after a command, quoted where this system's shells need it."""
    return subprocess.list2cmdline(words) if os.name == "nt" else shlex.join(words)


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
