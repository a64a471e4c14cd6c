"""The feature store: what the frozen vision tower sees, computed once and read many times.

A picture is known by the sha256 of its file, so one that appears under two names is stored once
and one that changed is computed again. Shards are safetensors files, each written to a temporary
name and put in its place whole: a kill loses at most the shard that each process has in the
making, and another process can read the finished ones meanwhile. The processes of a run fill a
store together. Every picture has a check sum, which is compared on reading.

Features are kept as half floats, or as int8 with a scale for each token; see data/feature_form.py.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import os
import runpy
import secrets
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from config import FEATURE_STORAGES
from data.feature_form import DTYPES, StorageError, check_sums, decode, encode
from data.images import load_image
from data.pictures import PictureFolders
from data.reading import fit_files
from data.storage import StoragePlan, bytes_per_picture
from data.team import ALONE, Team
from documents import COUNT, TEXT, problems
from errors import PhiSightError
from files import RememberedHashes, open_regular, sweep_stale, writer
from stored import NotStored, Place, opened, read_at
from system.disk import replace, sync
from workers.fitting import Fitted

SHARD_PICTURES = 1024
SHARD_BYTES = 256 * 2**20  # a shard is held in memory twice while it is written
SHARD_SECONDS = 300.0  # a kill loses no more than this: a large tower on a CPU is slow
BLANK = "blank"  # the key of a uniform grey picture, what "no picture" means to the alignment meter

Picture = Image.Image | Fitted
Extract = Callable[[Sequence[Picture]], Tensor]
"""Pictures -> (pictures, tokens, dim). It may have `fit: Fit`, to which pictures are then brought
where they are decoded, so that a large one takes no more memory here than a small one; without, it
is given them whole. It may have `tally() -> list[float]` and `notes(tallies) -> str`: what to tell
after a job, by the tallies of all processes."""


# -- the store ------------------------------------------------------------------------------------


def blank_picture() -> Image.Image:
    return Image.new("RGB", (336, 336), (127, 127, 127))


def file_hash(path: Path) -> str:
    """sha256 of the file's bytes, in hex. Raises `OSError`, also for what is not a regular file."""
    with open_regular(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@dataclass(frozen=True)
class _Shard:
    """A shard: its file, where its tensors stand, the check sums of its pictures in order."""

    path: Path
    places: dict[str, Place]
    checks: list[int]


class FeatureStore:
    """`folder/KEY-STORAGE/shard-00000.safetensors`; KEY stands for the tower and how it is read.

    Each shard holds `features` (pictures, tokens, dim), for int8 also `scales` (pictures, tokens),
    and in its header the hashes and check sums of its pictures in order and the error of storing
    them. `shape` is (tokens, dim). `error` is what storing cost in this process.
    """

    def __init__(
        self, folder: str | Path, key: str, shape: tuple[int, int], storage: str = "float16"
    ) -> None:
        if storage not in FEATURE_STORAGES:
            raise PhiSightError(
                f"--feature-storage {storage}: use one of {', '.join(FEATURE_STORAGES)}"
            )
        self.folder = Path(folder) / f"{key}-{storage}"
        self.shape, self.storage = shape, storage
        self.error = StorageError()
        self._where: dict[str, tuple[int, int]] = {}  # hash -> (shard, row)
        self._shards: list[_Shard] = []
        self._hash_of: dict[str, str] = {}  # picture name -> hash
        self._hashes = Path(folder) / "pictures"  # what was hashed, a file for each picture folder
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            sweep_stale(self._hashes, ".tmp-*")
        except OSError as error:
            raise PhiSightError(
                f"{self.folder}: cannot be made ({error.strerror}); give a folder that can be"
                " written with --features"
            ) from None
        self.refresh()

    def refresh(self) -> None:
        """Open the shards that have appeared since, such as those of a process that is writing, and
        sweep what writers that were killed left."""
        sweep_stale(self.folder, "shard-*.partial-*")
        known = {shard.path for shard in self._shards}
        for path in sorted(self.folder.glob("shard-*.safetensors")):
            if path not in known:
                self._open(path)

    def _open(self, path: Path) -> None:
        try:
            with opened(path) as file:
                places = file.places
            shard = safe_open(path, framework="pt")
            header = shard.metadata() or {}
            hashes, checks = json.loads(header["hashes"]), json.loads(header["checks"])
            held_by = {"hashes": hashes, "checks": checks}
            for problem in problems(held_by, {"hashes": [TEXT], "checks": [COUNT]}):
                raise ValueError(problem)
            slices = {name: shard.get_slice(name) for name in shard.keys()}
            held = {
                name: (tuple(part.get_shape()), part.get_dtype()) for name, part in slices.items()
            }
            count = len(hashes)
            if len(checks) != count:
                raise ValueError("its check sums do not fit its pictures")
        except (
            NotStored, SafetensorError, LookupError, ValueError, RecursionError, OSError
        ) as error:  # fmt: skip
            raise PhiSightError(
                f"{path}: not a readable feature shard ({error}); delete it, it is computed again"
            ) from None
        shapes = {"features": (count, *self.shape), "scales": (count, self.shape[0])}
        expected = {name: (shapes[name], dtype) for name, dtype in DTYPES[self.storage].items()}
        if held != expected:
            raise PhiSightError(f"{path}: holds {held}, expected {expected}; delete it")
        for row, picture in enumerate(hashes):
            self._where.setdefault(picture, (len(self._shards), row))
        self._shards.append(_Shard(path, places, checks))

    def __contains__(self, picture_hash: str) -> bool:
        return picture_hash in self._where

    def by_hash(self, picture_hash: str) -> Tensor:
        """(tokens, dim) float32. Raises PhiSightError if the stored bytes were damaged, cut off or
        removed, whenever that was."""
        number, row = self._where[picture_hash]
        shard = self._shards[number]
        try:
            read = read_at(shard.path, {n: p.row(row) for n, p in shard.places.items()})
        except (OSError, NotStored) as error:
            reason = getattr(error, "strerror", None) or error
            raise PhiSightError(
                f"{shard.path}: the features of picture {row} cannot be read ({reason}); delete the"
                " file if it is there, it is computed again"
            ) from None
        if check_sums(read) != [shard.checks[row]]:
            raise PhiSightError(
                f"{shard.path}: the features of picture {row} do not have their check sum, the file"
                " was damaged; delete it, it is computed again"
            )
        return decode(read)[0]

    def features_of(self, name: str) -> Tensor:
        """(tokens, dim) float32 of the picture that was registered under `name`."""
        return self.by_hash(self._hash_of[name])

    def hash_of(self, name: str) -> str:
        return self._hash_of[name]

    def check_of(self, name: str) -> int:
        """The check sum of a picture's stored features."""
        number, row = self._where[self.hash_of(name)]
        return self._shards[number].checks[row]

    def add(
        self,
        names: Sequence[str],
        folder: Path | PictureFolders,
        extract: Callable[[], Extract],
        batch_size: int = 64,
        team: Team = ALONE,
    ) -> dict[str, str]:
        """Register the pictures of a folder by name, computing what is not stored yet.

        The first process of `team` looks for the pictures and divides what is missing into shards;
        each process computes every so manieth of them. Which pictures are in a shard, and which are
        computed together, does not depend on how many processes there are. `extract()` is called
        only where something is to be computed: it loads the tower and returns the function from
        pictures to (pictures, tokens, dim). Returns name -> reason for every picture that cannot be
        used.
        """
        folders = folder if isinstance(folder, PictureFolders) else PictureFolders([folder])
        found = team.from_first(lambda: self._look_for(names, folders, batch_size))
        self._hash_of |= found["hashes"]
        bad: dict[str, str] = found["bad"]
        if found["shards"]:
            named: dict[str, list[str]] = {}  # hash -> names; the same bytes may have two
            for name in dict.fromkeys(names):
                if name not in bad:
                    named.setdefault(self._hash_of[name], []).append(name)
            paths = {picture: folders.path_of(its_names[0]) for picture, its_names in named.items()}
            for picture, reason in self._fill(
                found["shards"], paths, extract, batch_size, team
            ).items():
                bad |= dict.fromkeys(named[picture], reason)
        used = {BLANK, *(self._hash_of[name] for name in names if name not in bad)}
        if not used <= self._where.keys():
            self.refresh()  # what the other processes have written
        if absent := used - self._where.keys():
            raise PhiSightError(
                f"{self.folder}: {len(absent)} pictures that another process has stored are not"
                " there; give a --features folder that all processes see"
            )
        return bad

    def _look_for(
        self, names: Sequence[str], folders: PictureFolders, batch_size: int
    ) -> dict[str, Any]:
        """{"hashes": name -> hash, "bad": name -> reason, "shards": [[number, [hash, ...]], ...]}:
        which pictures there are, and the shards that are to be computed."""
        bad: dict[str, str] = {}
        hash_of: dict[str, str] = {}
        resolved = b"\0".join(os.fsencode(folder.resolve()) for folder in folders.folders)
        place = hashlib.sha256(resolved).hexdigest()[:16]
        hashes = RememberedHashes(self._hashes / f"{place}.json")
        for name in tqdm(
            dict.fromkeys(names), desc="looking for pictures", unit="picture", delay=5, disable=None
        ):
            path = folders.path_of(name)
            try:
                hash_of[name] = hashes.of(name, path, file_hash)
            except OSError as error:
                bad[name] = f"{path}: {error.strerror}"
        hashes.save()
        wanted = dict.fromkeys([BLANK, *hash_of.values()])
        if not wanted.keys() <= self._where.keys():
            self.refresh()  # another run may have computed them meanwhile
        missing = [picture for picture in wanted if picture not in self]
        if missing:
            plan = StoragePlan(self.folder, len(missing), self.shape, self.storage)
            plan.check()
            print(f"picture features to compute: {plan}", file=sys.stderr)
        return {"hashes": hash_of, "bad": bad, "shards": self._divided(missing, batch_size)}

    def _divided(self, missing: Sequence[str], batch_size: int) -> list[list]:
        """Hashes of pictures -> [number, hashes] of each shard to come: whole batches, and the
        first numbers that are free, so that a kill leaves no gap for good."""
        in_a_shard = max(
            1, min(SHARD_PICTURES, SHARD_BYTES // bytes_per_picture(self.shape, self.storage))
        )
        in_a_shard = -(-in_a_shard // batch_size) * batch_size
        taken = {shard.path.name for shard in self._shards}
        free = (number for number in itertools.count() if _shard_name(number) not in taken)
        return [
            [next(free), list(missing[start : start + in_a_shard])]
            for start in range(0, len(missing), in_a_shard)
        ]

    def _fill(
        self,
        shards: Sequence[Sequence],
        paths: Mapping[str, Path],
        extract: Callable[[], Extract],
        batch_size: int,
        team: Team,
    ) -> dict[str, str]:
        """Compute shards, this process its share. Returns hash -> reason, of all processes."""
        mine = team.share_of(shards)
        bad: dict[str, str] = {}
        tally: list[float] = []
        if mine:
            tower = extract()
            beyond = shards[-1][0] + 1
            bar = tqdm(
                total=sum(len(hashes) for _, hashes in mine),
                desc="picture features",
                unit="picture",
                disable=None if team.is_first else True,
            )
            with bar:
                for picture in self._compute(mine, beyond, paths, tower, batch_size, bad):
                    bar.update()
            tally = getattr(tower, "tally", list)()
        told = team.exchange({"bad": bad, "error": dataclasses.astuple(self.error), "tally": tally})
        if team.is_first:
            notes = getattr(tower, "notes", lambda _: "")([each["tally"] for each in told])
            error = StorageError()
            for each in told:
                error.merge(StorageError(*each["error"]))
            print(
                f"picture features stored as {self.storage}: {error}{notes and '; ' + notes}",
                file=sys.stderr,
            )
        return {picture: reason for each in told for picture, reason in each["bad"].items()}

    def _compute(
        self,
        shards: Sequence[Sequence],
        beyond: int,
        paths: Mapping[str, Path],
        extract: Extract,
        batch_size: int,
        bad: dict[str, str],
    ) -> Iterator[str]:
        """Compute and write shards; gives the hash of each picture that was read. `beyond`: above
        the numbers of all shards, for the rest of one that was written early as the tower is slow.
        """
        every = [picture for _, hashes in shards for picture in hashes if picture != BLANK]
        read = read_files([paths[picture] for picture in every], extract)
        for number, hashes in shards:
            draft = _Draft(self.storage)
            for picture in hashes:
                content = blank_picture() if picture == BLANK else next(read)
                yield picture
                if isinstance(content, PhiSightError):
                    bad[picture] = str(content)
                    continue
                draft.add(picture, content)
                if len(draft.waiting) < batch_size:
                    continue
                draft.compute(extract)
                if draft.is_late and picture != hashes[-1]:
                    self._write(draft, number)
                    number, draft = beyond, _Draft(self.storage)
            draft.compute(extract)
            self._write(draft, number)

    def _write(self, draft: _Draft, number: int) -> None:
        if not draft.hashes:  # none of its pictures could be read
            return
        stored = {
            name: torch.cat([part[name] for part in draft.computed]).contiguous()
            for name in DTYPES[self.storage]
        }
        partial = self.folder / f"shard-{number:05d}.partial-{writer()}{secrets.token_hex(4)}"
        try:
            save_file(
                stored,
                partial,
                {
                    "hashes": json.dumps(draft.hashes),
                    "checks": json.dumps(check_sums(stored)),
                    "error": str(draft.error),
                },
            )
            sync(partial)
            path = _put_in_place(partial, number)
            sync(self.folder)
        except (OSError, SafetensorError) as error:  # safetensors wraps a full disk in its own
            raise PhiSightError(
                f"{self.folder / _shard_name(number)}: cannot be written ({error}); free some"
                " space and run again, what is stored already is kept"
            ) from None
        finally:
            partial.unlink(missing_ok=True)
        self.error.merge(draft.error)
        self._open(path)


class _Draft:
    """A shard in the making."""

    def __init__(self, storage: str) -> None:
        self.storage = storage
        self.hashes: list[str] = []
        self.waiting: list[Picture] = []
        self.computed: list[dict[str, Tensor]] = []
        self.error = StorageError()
        self._begun = time.monotonic()

    @property
    def is_late(self) -> bool:
        return time.monotonic() - self._begun > SHARD_SECONDS

    def add(self, picture_hash: str, picture: Picture) -> None:
        self.hashes.append(picture_hash)
        self.waiting.append(picture)

    def compute(self, extract: Extract) -> None:
        """The features of those that wait."""
        if not self.waiting:
            return
        features = extract(self.waiting).float().cpu()  # (pictures, tokens, dim)
        stored = encode(features, self.storage)
        decoded = decode(stored)
        if not decoded.isfinite().all():
            raise PhiSightError(
                f"picture features: some are not finite as {self.storage} numbers; give another"
                " --vision-layer or --feature-storage"
            )
        self.error.add(features, decoded)
        self.computed.append(stored)
        self.waiting.clear()


def read_files(paths: Sequence[Path], extract: Extract) -> Iterator[Picture | PhiSightError]:
    """Each picture as `extract` wants it, or why it cannot be used, in order."""
    if (fit := getattr(extract, "fit", None)) is not None:
        yield from fit_files(paths, fit)
        return
    for path in paths:
        try:
            yield load_image(path)
        except PhiSightError as error:
            yield error


def _shard_name(number: int) -> str:
    return f"shard-{number:05d}.safetensors"


def _put_in_place(partial: Path, number: int) -> Path:
    """Give a whole shard the first free number from `number` on, and return its path.

    A link fails where the name is taken, so that two processes that write at once keep both.
    """
    while True:
        path = partial.with_name(_shard_name(number))
        try:
            os.link(partial, path)
            return path
        except FileExistsError:
            number += 1
        except OSError:  # a file system without links: the last of two writers wins
            if not path.exists():
                replace(partial, path)
                return path
            number += 1


if __name__ == "__main__":
    # This room knows nothing of models: who compares features is another program.
    runpy.run_module("evaluation.likeness", run_name="__main__")
