"""Where the pictures lie that records name, and by which names they are known.

A picture is known by its path relative to the folder that `--images` names, so that a data file
and its pictures can be moved. Where several sources have folders of their own, those of the second
folder are known as `#2/NAME`; a picture that lies inside a data file, such as Parquet, is written
to a folder of its own once and known by its content, `#unpacked/ab/abcd....jpg`. What a data set of
the hub has as files is known as `#hub/DATA-SET/COMMIT/NAME`.

No name leads out of these folders: `..` is refused, links are the business of who made the folder,
and an absolute path is one of the folder's own or is refused.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import os
import re
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from config import Config
from data.record_keys import BadRecord
from errors import PhiSightError
from files import sweep_stale, writer

UNPACKED, HUB = "#unpacked", "#hub"
OF_ANOTHER = re.compile(r"#[0-9]+/")
PICTURE_BYTES = 100 * 2**20  # of one that lies inside a data file; `data.images` refuses more too
MAGIC = (  # of the kinds that `data.images` reads: where, what, and how such a file is called
    (0, b"\x89PNG\r\n\x1a\n", ".png"),
    (0, b"\xff\xd8\xff", ".jpg"),
    (0, b"GIF8", ".gif"),
    (0, b"BM", ".bmp"),
    (0, b"II*\0", ".tif"),
    (0, b"MM\0*", ".tif"),
    (8, b"WEBP", ".webp"),
)


class PictureFolders:
    """The folders that `--images` names, and the one of unpacked pictures.

    Raises `PhiSightError` if one of `folders` that is given is no folder.
    """

    def __init__(
        self, folders: Sequence[str | Path] = (), unpacked: str | Path = Config.unpacked
    ) -> None:
        self.folders = tuple(Path(folder) for folder in folders)
        self.unpacked = Path(unpacked)
        self._mark_of: dict[Path, str] = {}  # the same folder twice has one mark
        for number, folder in enumerate(self.folders, start=1):
            self._mark_of.setdefault(folder, f"#{number}" if number > 1 else "")
        self._marks = {mark: folder for folder, mark in self._mark_of.items() if mark}

    @classmethod
    def of(cls, config: Config) -> PictureFolders:
        """Where the pictures of a run's data lie, and those of its questions: in the first."""
        return cls(config.images, config.unpacked)

    def check(self) -> None:
        """Raise `PhiSightError` where one of the folders is not there."""
        for folder in self.folders:
            if not folder.is_dir():
                raise PhiSightError(f"{folder}: no such folder; give --images FOLDER")

    def of_source(self, number: int) -> Pictures:
        """The names of the pictures of the source that has the `number`-th folder, from 0."""
        if number < len(self.folders):
            folder = self.folders[number]
            return Pictures(folder, self.unpacked, self._mark_of[folder], several=bool(self._marks))
        return Pictures(None, self.unpacked)

    def path_of(self, name: str) -> Path:
        """Where the picture of a name lies, whether it is there or not.

        Raises `PhiSightError` for one that must lie in an image folder where none is given.
        """
        folder, rest = self.place_of(name)
        return folder / rest

    def place_of(self, name: str) -> tuple[Path, str]:
        """The folder that the picture of a name lies in, and its path there. Raises as `path_of`
        does."""
        mark, slash, rest = name.partition("/")
        if slash and mark == UNPACKED:
            return self.unpacked, rest
        if slash and mark == HUB:
            return hub_folder(), rest
        if slash and mark in self._marks:
            return self._marks[mark], rest
        if not self.folders:
            raise PhiSightError("--images: not given; give --images FOLDER")
        return self.folders[0], name


def hub_folder() -> Path:
    """Where data sets of the hub are kept."""
    from huggingface_hub import constants  # 0.1 s, and no use where no data are of the hub

    return Path(constants.HF_HOME) / "phisight" / "datasets"


@dataclass(frozen=True)
class Pictures:
    """What the pictures of one source are called."""

    folder: Path | None = None
    """that their names are relative to; None where none was given"""
    unpacked: Path = Path(Config.unpacked)
    mark: str = ""
    """of the folder, where it is not the first"""
    several: bool = False
    """whether there are other folders, whose pictures have marks"""
    beside: tuple[Path, str] | None = None
    """the folder and mark of a data set of the hub that has pictures of its own"""

    def named(self, path: str) -> str:
        """The name of a picture by a clean path of a record, see `data.record_content`: relative to
        the folder, or absolute and below it; or of the picture that a `data:` address holds.

        Raises `BadRecord` for an absolute path that is not, and for an address without a picture.
        """
        if path[:5].lower() == "data:":
            return self.keep(_content_of(path))
        first = path.partition("/")[0]
        if first == UNPACKED and first != path:
            return path
        shown = f"{path!r:.100}"
        if first == HUB:
            raise BadRecord(f"the picture {shown} is called as those of the hub are")
        if not os.path.isabs(path):
            return self._marked(self.mark, path)
        given = (self.folder, self.mark) if self.folder else None
        for folder, mark in filter(None, (given, self.beside)):
            root = os.path.abspath(folder).rstrip("/") + "/"
            if path.startswith(root):
                return self._marked(mark, path[len(root) :])
        raise BadRecord(
            f"the picture {shown} lies outside the image folder"
            + ("" if self.folder else ", and none is given: --images FOLDER")
        )

    def _marked(self, mark: str, path: str) -> str:
        if self.several and not mark and OF_ANOTHER.match(path):
            raise BadRecord(
                f"the picture {path!r:.100} is called as those of another --images folder are;"
                " rename its folder"
            )
        return f"{mark}/{path}" if mark else path

    def keep(self, content: bytes) -> str:
        """Write a picture that lies inside a data file to the folder of unpacked ones, unless it is
        there, and return its name, which is that of its content.

        Raises `BadRecord` for what is absurdly large or of no kind that is read, `PhiSightError`
        where the folder cannot be written.
        """
        if len(content) > PICTURE_BYTES:
            raise BadRecord(f"a picture in it has more than {PICTURE_BYTES:,} bytes")
        ending = _ending_of(content)
        digest = hashlib.sha256(content).hexdigest()
        place = self.unpacked / digest[:2] / f"{digest}{ending}"
        try:
            if not place.is_file() or place.stat().st_size != len(content):
                _write(place, content)
        except OSError as error:
            raise PhiSightError(
                f"{place.parent}: a picture cannot be written ({error.strerror}); make room, or"
                " give another --unpacked folder"
            ) from error
        return f"{UNPACKED}/{digest[:2]}/{digest}{ending}"


def _content_of(address: str) -> bytes:
    """The bytes in a `data:` address (RFC 2397). Raises `BadRecord` where it is not of base64."""
    head, comma, text = address.partition(",")
    if not comma or not head.lower().endswith(";base64"):
        raise BadRecord("a `data:` address in it is not of base64")
    try:
        return base64.b64decode(text, validate=True)
    except ValueError:
        raise BadRecord("a `data:` address in it is not valid base64") from None


def _ending_of(content: bytes) -> str:
    """How a file of this content is called. Raises `BadRecord` for no picture that is read."""
    for at, magic, ending in MAGIC:
        if content.startswith(magic, at):
            return ending
    brands = content[8:64] if content.startswith(b"ftyp", 4) else b""
    if b"avif" in brands or b"avis" in brands:
        return ".avif"
    if b"hei" in brands or b"hev" in brands:
        raise BadRecord("a picture in it is HEIC, which is not read; save it as JPEG")
    raise BadRecord("what stands for a picture in it is of no kind that is read")


def _write(place: Path, content: bytes) -> None:
    """Write an unpacked picture, whole or not at all where the machine stays up.

    It is not synced, which would take a disk some 10 ms for each of a million pictures. Where the
    power is lost it may be shorter than it should be, and is written again when it is next read.
    """
    place.parent.mkdir(parents=True, exist_ok=True)
    _sweep_once(place.parent)
    temporary = place.with_name(f".tmp-{place.name}-{writer()}{secrets.token_hex(4)}")
    try:
        temporary.write_bytes(content)
        os.replace(temporary, place)
    finally:
        temporary.unlink(missing_ok=True)


@functools.cache
def _sweep_once(folder: Path) -> None:
    """Clear what killed writers left in a folder of unpacked pictures."""
    sweep_stale(folder, ".tmp-*")
