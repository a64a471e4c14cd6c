"""Files that a browser has uploaded: where they lie, whose they are, and what they are.

    UPLOADS/<digest of the browser's key>/<id>/<name>        a whole upload
                                         /<id>.part          one that arrives
                                         /<id>.png           a picture as browsers can show it

Whoever does not know the browser's key finds none of its files. They go after a day, with the
server, and with `remove`.
"""

from __future__ import annotations

import contextlib
import hashlib
import mimetypes
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Annotated, Literal

from fastapi import Depends, Request

from data.images import read_image_bytes
from data.reading import as_png, check_image
from errors import PhiSightError
from system import disk
from web.errors import NotThere, RequestError
from web.temporary import MAX_UPLOAD

if TYPE_CHECKING:
    from web.site import Site

# What the system's table of names may lack, or takes for films: browsers record into them.
SOUNDS = (".webm", ".opus", ".weba", ".mp4", ".m4a", ".w64", ".rf64")
KEY = re.compile(r"[0-9a-f]{32}\Z")
ID = KEY
MOST_UPLOADS = 2000  # of one browser that lie here at once
NAME_BYTES = 120  # of a file's name; what is longer loses its middle
# What browsers show as it is, by how it begins; all else that can be decoded is shown as PNG.
SHOWN = {b"\x89PNG": "image/png", b"\xff\xd8\xff": "image/jpeg", b"GIF8": "image/gif"}

Kind = Literal["picture", "recording"]


@dataclass(frozen=True)
class Upload:
    """A whole upload; its path may be swept once nobody has touched it for a day."""

    id: str
    path: Path
    name: str
    kind: Kind
    bytes: int

    def told(self) -> dict[str, str | int]:
        """As the page is told of it."""
        return {"id": self.id, "name": self.name, "kind": self.kind, "bytes": self.bytes}


def browser_key(request: Request) -> str:
    """Whose conversations and uploads a request is about. Raises `RequestError` unless it has one
    header X-Browser-Key of the form."""
    keys = request.headers.getlist("x-browser-key")
    if len(keys) != 1 or not KEY.match(keys[0]):
        raise RequestError("key_damaged")
    return keys[0]


BrowserKey = Annotated[str, Depends(browser_key)]
"""for the parameter of a route"""


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


def taken(site: Site, key: str, id: str) -> Upload:
    """An upload of a browser's. Raises `NotThere` if it is not there, or not any more."""
    if not (isinstance(id, str) and ID.match(id)):
        raise NotThere("upload_gone")
    try:
        (path,) = (folder_of(site, key) / id).iterdir()
        size = path.stat().st_size
    except (OSError, ValueError):  # swept, removed, or never there
        raise NotThere("upload_gone") from None
    return Upload(id, path, path.name, "recording" if is_recording(path.name) else "picture", size)


def remove(site: Site, key: str, id: str) -> None:
    """Remove an upload, if it is there."""
    with contextlib.suppress(NotThere):
        upload = taken(site, key, id)
        shutil.rmtree(upload.path.parent, ignore_errors=True)
        png_of(upload).unlink(missing_ok=True)
        site.uploads.give_back(upload.bytes)


def folder_of(site: Site, key: str) -> Path:
    """Where the uploads of a browser lie."""
    return site.uploads.folder / hashlib.sha256(key.encode()).hexdigest()[:32]


def png_of(upload: Upload) -> Path:
    return upload.path.parent.with_suffix(".png")


def safe_name(name: str) -> str:
    """The name under which a file is kept and told: the last part of what the browser called it,
    without what a terminal or a disk could not take."""
    last = re.split(r"[/\\]", name)[-1]
    plain = "".join(c for c in last if c.isprintable()).strip(" .") or "file"
    stem, dot, suffix = plain.rpartition(".")
    if not dot:
        stem, suffix = plain, ""
    if len(plain.encode(errors="replace")) > NAME_BYTES:
        suffix = suffix[:10]
        stem = stem.encode(errors="replace")[: NAME_BYTES - 50].decode(errors="ignore").strip(" .")
    return (stem or "file") + dot + suffix


class Arriving:
    """An upload under way: bytes are put to it, and it is kept as a whole or leaves nothing."""

    def __init__(self, site: Site, key: str, name: str) -> None:
        """Raises PhiSightError where nothing can be taken in."""
        self.site, self.id, self.name = site, secrets.token_hex(16), safe_name(name)
        self.folder = folder_of(site, key)
        self.part = self.folder / f"{self.id}.part"
        self.size = 0
        self.whole: Upload | None = None
        self._file: IO[bytes]

    @contextlib.contextmanager
    def open(self) -> Iterator[None]:
        """Entered while the upload arrives. Raises PhiSightError where it cannot be taken in, and
        the same for a disk that fails."""
        self.site.uploads.begin()
        try:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            if sum(1 for _ in os.scandir(self.folder)) >= MOST_UPLOADS:
                raise RequestError("too_many_uploads", most=MOST_UPLOADS)
            with self.part.open("xb") as self._file:
                disk.make_private(self._file.fileno())
                yield
        except OSError as error:
            raise PhiSightError(
                f"{self.name}: cannot be kept ({error.strerror}); try again later"
            ) from None
        finally:
            self.part.unlink(missing_ok=True)
            if self.whole is None:
                shutil.rmtree(self.folder / self.id, ignore_errors=True)
                self.site.uploads.give_back(self.size)
            self.site.uploads.end()

    def put(self, data: bytes) -> None:
        """Take in what has come. Raises PhiSightError where it is too much."""
        if self.size + len(data) > MAX_UPLOAD:
            raise RequestError("upload_too_large", name=self.name, megabytes=MAX_UPLOAD >> 20)
        self.site.uploads.take(len(data))
        self.size += len(data)
        self._file.write(data)

    def keep(self) -> Upload:
        """Judge the upload and keep it; takes as long as decoding a picture does. Raises
        PhiSightError, naming the file, for what is neither a picture nor a recording."""
        self._file.flush()
        if not self.size:
            raise PhiSightError(f"{self.name}: is empty; send another file")
        if not is_recording(self.name):
            check_image(self.part.read_bytes(), self.name)
        path = self.folder / self.id / self.name
        path.parent.mkdir(mode=0o700)
        disk.replace(self.part, path)
        kind: Kind = "recording" if is_recording(self.name) else "picture"
        self.whole = Upload(self.id, path, self.name, kind, self.size)
        return self.whole


def shown(site: Site, upload: Upload) -> tuple[Path, str]:
    """The file and the media type by which browsers show a picture; made where it is needed.

    Raises `NotThere` for a recording, and PhiSightError for what cannot be decoded after all.
    """
    if upload.kind != "picture":
        raise NotThere("upload_gone")
    try:
        with upload.path.open("rb") as file:
            head = file.read(12)
        for start, media_type in SHOWN.items():
            if head.startswith(start):
                return upload.path, media_type
        if head[:4] == b"RIFF" and head[8:] == b"WEBP":
            return upload.path, "image/webp"
        png = png_of(upload)
        if not png.exists():
            data = as_png(read_picture(upload.path), upload.name)
            site.uploads.take(len(data))
            part = png.with_suffix(f".{secrets.token_hex(4)}.part")
            part.write_bytes(data)
            part.replace(png)
    except OSError:  # swept at this moment
        raise NotThere("upload_gone") from None
    return png, "image/png"
