"""What the Whisper of a page can do with a recording, told before it is loaded."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from speech.whisper import Speech

ENGLISH_ONLY = ".en"  # how the names of OpenAI's models end that hear nothing else
SMALL_BYTES = 32 * 2**20  # OpenAI's smallest takes 72 MB


def hearing(load: Callable[[], Speech] | None) -> dict[str, bool]:
    """Whether what is heard may be put into English.

    `load` gives the Whisper, as `speech.spoken.loaded_once` makes it. A loaded model says it
    itself; another one is known by its name, or by the size of its file: small ones know one
    language.
    """
    if load is None:
        return {"translate": False}
    loaded: list[Speech] = getattr(load, "loaded", [])
    if loaded:
        return {"translate": loaded[0].multilingual}
    name: str = getattr(load, "name", "")
    english_only = is_small(Path(name)) or name.removesuffix(".pt").endswith(ENGLISH_ONLY)
    return {"translate": not english_only}


def is_small(path: Path) -> bool:
    """Whether a path is that of a file, and of one too small for a model of OpenAI's."""
    try:
        return path.is_file() and path.stat().st_size < SMALL_BYTES
    except OSError:  # the name is none that a file can have; loading the model tells what is wrong
        return False
