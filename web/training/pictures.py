"""The pictures of a run's sample questions, if they can be found, and found to be pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import config as configs
import config_values
from config import Config
from data.pictures import PictureFolders
from errors import PhiSightError
from web.errors import NotThere

MOST_BYTES = 20 * 2**20
# What browsers show, by how it begins: nothing else of a disk is given to anybody.
KINDS = (
    (b"\x89PNG\r\n\x1a\n", "image/png"),
    (b"\xff\xd8\xff", "image/jpeg"),
    (b"GIF8", "image/gif"),
    (b"RIFF", "image/webp"),
)


def names_in(records: Sequence[Mapping[str, Any]]) -> set[str]:
    """The pictures that a log names in its samples."""
    return {
        sample["picture"]
        for record in records
        if record.get("kind") == "samples"
        for sample in record.get("samples") or ()
        if "picture" in sample
    }


def is_there(facts: Mapping[str, Any], name: str) -> bool:
    """Whether a file of that name lies in the run's own folder of pictures."""
    try:
        return path_of(facts, name).is_file()
    except NotThere:
        return False


def path_of(facts: Mapping[str, Any], name: str) -> Path:
    """Where a picture lies in the folders that `facts`, a run's config.json, names.

    Raises `NotThere` where it is not to be found, or would lead out of its folder.
    """
    try:
        config = {name: facts["config"][name] for name in ("images", "unpacked")}
    except KeyError:  # an older version's run, which had one folder
        config = {"images": facts["config"].get("images"), "unpacked": Config.unpacked}
    try:
        fields = configs.located(config_values.of_declared_type(config, "the run"))
        folders = PictureFolders(fields["images"], fields["unpacked"])
        folder, inner = folders.place_of(name)
        root, path = folder.resolve(strict=True), (folder / inner).resolve(strict=True)
    # RuntimeError: links in a circle; ValueError: a null character.
    except (OSError, RuntimeError, ValueError, PhiSightError) as error:
        raise NotThere("nothing_there") from error
    if not path.is_relative_to(root):
        raise NotThere("nothing_there")
    return path


def picture(facts: Mapping[str, Any], name: str) -> tuple[bytes, str]:
    """The bytes and the media type of a picture, see `path_of`. Raises `NotThere` also for what is
    no picture that browsers show, or is too large."""
    from data.images import read_image_bytes  # with Pillow: not at the start of the app

    path = path_of(facts, name)
    try:
        data = read_image_bytes(path, MOST_BYTES, name)
    except PhiSightError as error:
        raise NotThere("nothing_there") from error
    for beginning, kind in KINDS:
        if data.startswith(beginning) and (kind != "image/webp" or data[8:12] == b"WEBP"):
            return data, kind
    raise NotThere("nothing_there")
