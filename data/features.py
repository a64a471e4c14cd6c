"""The feature store: what the frozen vision tower sees, computed once and read many times.

A picture is known by the sha256 of its file, so one that appears under two names is stored once
and one that changed is computed again. Shards are safetensors files, each written to a temporary
name and put in its place whole: a kill loses at most the shard in the making, and another process
can read the finished ones meanwhile. Every picture has a check sum, which is compared on reading.

Features are kept as half floats, or as int8 with a scale for each token; see `encode`.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from config import FEATURE_STORAGES
from data.images import load_image
from data.reading import fit_files
from data.storage import StoragePlan, bytes_per_picture
from documents import COUNT, TEXT, problems
from errors import PhiSightError
from files import RememberedHashes, open_regular, sweep_stale, sync, writer
from workers.fitting import Fitted

SHARD_PICTURES = 1024
SHARD_BYTES = 256 * 2**20  # a shard is held in memory twice while it is written
SHARD_SECONDS = 300.0  # a kill loses no more than this: a large tower on a CPU is slow
BLANK = "blank"  # the key of a uniform grey picture, what "no picture" means to the alignment meter
STORED_DTYPE = torch.float16
DTYPES = {"float16": {"features": "F16"}, "int8": {"features": "I8", "scales": "F32"}}

Picture = Image.Image | Fitted
Extract = Callable[[Sequence[Picture]], Tensor]
"""Pictures -> (pictures, tokens, dim). It may have `fit: Fit`, to which pictures are then brought
where they are decoded, so that a large one takes no more memory here than a small one; without, it
is given them whole. It may have `notes() -> str`: what to tell after a job."""


# -- how a feature is kept ------------------------------------------------------------------------


def encode(features: Tensor, storage: str) -> dict[str, Tensor]:
    """(..., tokens, dim) float -> the tensors that are stored, on the CPU.

    "float16": `features`, rounded. "int8": `features` int8 and `scales` (..., tokens) float32, a
    number being about feature x scale; a token's largest number is 127 or -127.
    """
    features = features.float()
    if storage == "float16":
        return {"features": features.to(STORED_DTYPE).cpu()}
    scales = features.abs().amax(-1) / 127  # (..., tokens)
    steps = features / scales.where(scales > 0, 1)[..., None]
    return {"features": steps.round().clamp(-127, 127).to(torch.int8).cpu(), "scales": scales.cpu()}


def decode(stored: dict[str, Tensor]) -> Tensor:
    """The inverse of `encode`, up to its rounding: (..., tokens, dim) float32."""
    features = stored["features"].float()
    return features * stored["scales"][..., None] if "scales" in stored else features


def as_stored(features: Tensor, storage: str) -> Tensor:
    """Features as reading them from a store gives them, on their own device: what inference uses,
    so that it sees pictures as training did."""
    return decode(encode(features, storage)).to(features.device)


@dataclass
class StorageError:
    """How far what is stored lies from what was computed, relative to the size of a token."""

    squared: float = 0.0
    total: float = 0.0
    worst: float = 0.0
    """the largest error of one token, relative to that token"""

    def add(self, exact: Tensor, stored: Tensor) -> None:
        """(pictures, tokens, dim) both."""
        errors = (stored - exact).square().sum(-1).double()  # (pictures, tokens)
        sizes = exact.square().sum(-1).double()
        self.squared += errors.sum().item()
        self.total += sizes.sum().item()
        self.worst = max(self.worst, (errors / sizes.clamp_min(1e-30)).max().sqrt().item())

    @property
    def relative_rms(self) -> float:
        return (self.squared / self.total) ** 0.5 if self.total else 0.0

    def __str__(self) -> str:
        return (
            f"relative RMS error {100 * self.relative_rms:.3g} %, worst token"
            f" {100 * self.worst:.3g} %"
        )


def check_sums(stored: dict[str, Tensor]) -> list[int]:
    """CRC-32 of each picture's tensors: it finds what a disk or a copy damaged, at a gigabyte a
    second."""
    sums = [0] * len(stored["features"])
    for name in sorted(stored):
        for row, tensor in enumerate(stored[name]):
            sums[row] = zlib.crc32(tensor.contiguous().numpy(), sums[row])
    return sums


# -- the store ------------------------------------------------------------------------------------


def blank_picture() -> Image.Image:
    return Image.new("RGB", (336, 336), (127, 127, 127))


def file_hash(path: Path) -> str:
    """sha256 of the file's bytes, in hex. Raises `OSError`, also for what is not a regular file."""
    with open_regular(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@dataclass(frozen=True)
class _Shard:
    """An open shard: its file, its tensors and the check sums of its pictures in order."""

    path: Path
    tensors: safe_open
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
            open_regular(path).close()
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
        except (SafetensorError, LookupError, ValueError, RecursionError, OSError) as error:
            raise PhiSightError(
                f"{path}: not a readable feature shard ({error}); delete it, it is computed again"
            ) from None
        shapes = {"features": (count, *self.shape), "scales": (count, self.shape[0])}
        expected = {name: (shapes[name], dtype) for name, dtype in DTYPES[self.storage].items()}
        if held != expected:
            raise PhiSightError(f"{path}: holds {held}, expected {expected}; delete it")
        for row, picture in enumerate(hashes):
            self._where.setdefault(picture, (len(self._shards), row))
        self._shards.append(_Shard(path, shard, checks))

    def __contains__(self, picture_hash: str) -> bool:
        return picture_hash in self._where

    def by_hash(self, picture_hash: str) -> Tensor:
        """(tokens, dim) float32. Raises PhiSightError if the stored bytes were damaged."""
        number, row = self._where[picture_hash]
        shard = self._shards[number]
        stored = {
            name: shard.tensors.get_slice(name)[row : row + 1] for name in DTYPES[self.storage]
        }
        if check_sums(stored) != [shard.checks[row]]:
            raise PhiSightError(
                f"{shard.path}: the features of picture {row} do not have their check sum, the file"
                " was damaged; delete it, it is computed again"
            )
        return decode(stored)[0]

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
        folder: Path,
        extract: Callable[[], Extract],
        batch_size: int = 64,
    ) -> dict[str, str]:
        """Register pictures by name, computing what is not stored yet.

        `extract()` is called only where something is missing: it loads the tower and returns the
        function from pictures to (pictures, tokens, dim). Returns name -> reason for every picture
        that cannot be used.
        """
        bad: dict[str, str] = {}
        missing: dict[str, Path] = {}
        place = hashlib.sha256(os.fsencode(folder.resolve())).hexdigest()[:16]
        hashes = RememberedHashes(self._hashes / f"{place}.json")
        for name in tqdm(
            dict.fromkeys(names), desc="looking for pictures", unit="picture", delay=5, disable=None
        ):
            path = folder / name
            try:
                self._hash_of[name] = hashes.of(name, path, file_hash)
            except OSError as error:
                bad[name] = f"{path}: {error.strerror}"
                continue
            if self._hash_of[name] not in self:
                missing[name] = path
        hashes.save()
        if BLANK not in self or missing:
            self.refresh()  # another process may have computed them meanwhile
            missing = {
                name: path for name, path in missing.items() if self._hash_of[name] not in self
            }
        if BLANK not in self or missing:
            count = len({self._hash_of[name] for name in missing}) + (BLANK not in self)
            plan = StoragePlan(self.folder, count, self.shape, self.storage)
            plan.check()
            print(f"picture features to compute: {plan}", file=sys.stderr)
            tower = extract()
            self._compute(missing, tower, batch_size, bad)
            notes = getattr(tower, "notes", str)()
            print(
                f"picture features stored as {self.storage}: {self.error}{notes and '; ' + notes}",
                file=sys.stderr,
            )
        return bad

    def _compute(
        self, missing: dict[str, Path], extract: Extract, batch_size: int, bad: dict[str, str]
    ) -> None:
        def pictures() -> Iterator[tuple[str, Picture]]:
            if BLANK not in self:
                yield BLANK, blank_picture()
            names: dict[str, list[str]] = {}  # hash -> names; the same bytes may have two
            for name in missing:
                names.setdefault(self._hash_of[name], []).append(name)
            read = read_files([missing[known[0]] for known in names.values()], extract)
            for (picture_hash, known), picture in zip(
                tqdm(names.items(), desc="picture features", unit="picture", disable=None), read
            ):
                if isinstance(picture, PhiSightError):
                    bad.update(dict.fromkeys(known, str(picture)))
                else:
                    yield picture_hash, picture

        in_a_shard = max(
            1, min(SHARD_PICTURES, SHARD_BYTES // bytes_per_picture(self.shape, self.storage))
        )
        hashes: list[str] = []
        waiting: list[Picture] = []
        computed: list[dict[str, Tensor]] = []
        begun = time.monotonic()

        def compute() -> None:
            features = extract(waiting).float().cpu()  # (pictures, tokens, dim)
            stored = encode(features, self.storage)
            decoded = decode(stored)
            if not decoded.isfinite().all():
                raise PhiSightError(
                    f"picture features: some are not finite as {self.storage} numbers; give another"
                    " --vision-layer or --feature-storage"
                )
            self.error.add(features, decoded)
            computed.append(stored)
            waiting.clear()

        for picture_hash, picture in pictures():
            hashes.append(picture_hash)
            waiting.append(picture)
            if len(waiting) == batch_size:
                compute()
            late = time.monotonic() - begun > SHARD_SECONDS
            if not waiting and (len(hashes) >= in_a_shard or late):
                self._write(hashes, computed)
                hashes, computed, begun = [], [], time.monotonic()
        if waiting:
            compute()
        if hashes:
            self._write(hashes, computed)

    def _write(self, hashes: list[str], computed: list[dict[str, Tensor]]) -> None:
        stored = {
            name: torch.cat([part[name] for part in computed]).contiguous()
            for name in DTYPES[self.storage]
        }
        number = len(self._shards)
        partial = self.folder / f"shard-{number:05d}.partial-{writer()}"
        try:
            save_file(
                stored,
                partial,
                {
                    "hashes": json.dumps(hashes),
                    "checks": json.dumps(check_sums(stored)),
                    "error": str(self.error),
                },
            )
            sync(partial)
            path = _put_in_place(partial, number)
            sync(self.folder)
        except (OSError, SafetensorError) as error:  # safetensors wraps a full disk in its own
            raise PhiSightError(
                f"{partial.with_suffix('.safetensors')}: cannot be written ({error}); free some"
                " space and run again, what is stored already is kept"
            ) from None
        finally:
            partial.unlink(missing_ok=True)
        self._open(path)


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


def _put_in_place(partial: Path, number: int) -> Path:
    """Give a whole shard the first free number from `number` on, and return its path.

    A link fails where the name is taken, so that two processes that write at once keep both.
    """
    while True:
        path = partial.with_name(f"shard-{number:05d}.safetensors")
        try:
            os.link(partial, path)
            return path
        except FileExistsError:
            number += 1
        except OSError:  # a file system without links: the last of two writers wins
            if not path.exists():
                os.replace(partial, path)
                return path
            number += 1
