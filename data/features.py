"""The feature store: what the frozen vision tower sees, computed once and read many times.

A picture is known by the sha256 of its file, so one that appears under two names is stored once
and one that changed is computed again. Shards are safetensors files of half floats, each
written to a temporary name and renamed, so that a kill loses at most the shard in the making.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from data.images import load_image
from errors import PhiSightError

SHARD_PICTURES = 1024
BLANK = "blank"  # the key of a uniform grey picture, what "no picture" means to the alignment meter
STORED_DTYPE = torch.float16

Extract = Callable[[Sequence[Image.Image]], Tensor]


def blank_picture() -> Image.Image:
    return Image.new("RGB", (336, 336), (127, 127, 127))


def file_hash(path: Path) -> str:
    """sha256 of the file's bytes, in hex. Raises `OSError`, also for what is no regular file."""
    if path.exists() and not path.is_file():  # reading a pipe may never end
        raise OSError(errno.EINVAL, "is not a regular file")
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class FeatureStore:
    """`folder/KEY/shard-00000.safetensors`; KEY stands for the tower and how it is read.

    Each shard holds `features` (pictures, tokens, dim) float16, and in its header the hashes of its
    pictures in order. `shape` is (tokens, dim).
    """

    def __init__(self, folder: str | Path, key: str, shape: tuple[int, int]) -> None:
        self.folder = Path(folder) / key
        self.shape = shape
        self._where: dict[str, tuple[int, int]] = {}  # hash -> (shard, row)
        self._shards: list[safe_open] = []
        self._hash_of: dict[str, str] = {}  # picture name -> hash
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise PhiSightError(
                f"{self.folder}: cannot be made ({error.strerror}); give a folder that can be"
                " written with --features"
            ) from None
        for path in sorted(self.folder.glob("shard-*.safetensors")):
            self._open(path)

    def _open(self, path: Path) -> None:
        try:
            shard = safe_open(path, framework="pt")
            hashes = json.loads((shard.metadata() or {})["hashes"])
            shape = tuple(shard.get_slice("features").get_shape())
            count = len(hashes)
        except (SafetensorError, KeyError, TypeError, ValueError, OSError) as error:
            raise PhiSightError(
                f"{path}: not a readable feature shard ({error}); delete it, it is computed again"
            ) from None
        if shape != (count, *self.shape):
            raise PhiSightError(
                f"{path}: holds {shape}, expected {(count, *self.shape)}; delete it"
            )
        for row, picture in enumerate(hashes):
            self._where.setdefault(picture, (len(self._shards), row))
        self._shards.append(shard)

    def __contains__(self, picture_hash: str) -> bool:
        return picture_hash in self._where

    def by_hash(self, picture_hash: str) -> Tensor:
        """(tokens, dim) float32."""
        shard, row = self._where[picture_hash]
        return self._shards[shard].get_slice("features")[row].float()

    def features_of(self, name: str) -> Tensor:
        """(tokens, dim) float32 of the picture that was registered under `name`."""
        return self.by_hash(self._hash_of[name])

    def hash_of(self, name: str) -> str:
        return self._hash_of[name]

    def add(
        self, names: Sequence[str], folder: Path, extract: Callable[[], Extract],
        batch_size: int = 64,
    ) -> dict[str, str]:
        """Register pictures by name, computing what is not stored yet.

        `extract()` is called only where something is missing: it loads the tower and returns the
        function from pictures to (pictures, tokens, dim). Returns name -> reason for every picture
        that cannot be used.
        """
        bad: dict[str, str] = {}
        missing: dict[str, Path] = {}
        for name in dict.fromkeys(names):
            path = folder / name
            try:
                self._hash_of[name] = file_hash(path)
            except OSError as error:
                bad[name] = f"{path}: {error.strerror}"
                continue
            if self._hash_of[name] not in self:
                missing[name] = path
        if BLANK not in self or missing:
            self._compute(missing, extract(), batch_size, bad)
        return bad

    def _compute(
        self, missing: dict[str, Path], extract: Extract, batch_size: int, bad: dict[str, str]
    ) -> None:
        def pictures() -> Iterator[tuple[str, Image.Image]]:
            if BLANK not in self:
                yield BLANK, blank_picture()
            failed: dict[str, str | None] = {}  # hash -> why; the same bytes may have two names
            for name, path in tqdm(
                missing.items(), desc="picture features", unit="picture", disable=None
            ):
                picture_hash = self._hash_of[name]
                if picture_hash not in failed:
                    failed[picture_hash] = None
                    try:
                        yield picture_hash, load_image(path)
                    except PhiSightError as error:
                        failed[picture_hash] = str(error)
                if reason := failed[picture_hash]:
                    bad[name] = reason

        hashes: list[str] = []
        waiting: list[Image.Image] = []
        computed: list[Tensor] = []
        for picture_hash, picture in pictures():
            hashes.append(picture_hash)
            waiting.append(picture)
            if len(waiting) == batch_size:
                computed.append(extract(waiting).to(STORED_DTYPE).cpu())
                waiting = []
            if len(hashes) >= SHARD_PICTURES and not waiting:
                self._write(hashes, torch.cat(computed))
                hashes, computed = [], []
        if waiting:
            computed.append(extract(waiting).to(STORED_DTYPE).cpu())
        if hashes:
            self._write(hashes, torch.cat(computed))

    def _write(self, hashes: list[str], features: Tensor) -> None:
        number = len(self._shards)
        while (path := self.folder / f"shard-{number:05d}.safetensors").exists():
            number += 1  # an earlier shard was deleted: the later ones keep their names
        partial = path.with_suffix(f".partial-{os.getpid()}")
        try:
            save_file({"features": features.contiguous()}, partial,
                      {"hashes": json.dumps(hashes)})
            with open(partial, "rb") as file:
                os.fsync(file.fileno())
            os.replace(partial, path)
        except (OSError, SafetensorError) as error:  # safetensors wraps a full disk in its own
            raise PhiSightError(
                f"{path}: cannot be written ({error}); free some space and run again, what"
                " is stored already is kept"
            ) from None
        finally:
            partial.unlink(missing_ok=True)
        self._open(path)
