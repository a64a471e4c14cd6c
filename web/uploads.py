"""Files that a browser has uploaded, and pictures that are kept of them."""

from __future__ import annotations

import mimetypes
from pathlib import Path

from data.images import read_image_bytes
from errors import PhiSightError

# What the system's table of names may lack, or takes for films: browsers record into them.
SOUNDS = (".webm", ".opus", ".weba", ".mp4", ".m4a", ".w64", ".rf64")


def is_recording(name: str) -> bool:
    """Whether a file's name is one of audio; all else is taken for a picture, and judged as one."""
    kind = mimetypes.guess_type(name)[0] or ""
    return kind.startswith("audio/") or Path(name).suffix.lower() in SOUNDS


def read_picture(path: Path) -> bytes:
    """The bytes of a picture file, not decoded. Raises PhiSightError, naming the file without its
    folder, if it is not there any more or too large."""
    if not path.is_file():
        raise PhiSightError(
            f"{path.name}: cannot be read (No such file or directory); send it again"
        )
    return read_image_bytes(path, name=path.name)
