"""How much disk picture features take, in the forms that the feature store knows. Needs no torch.

A token of `dim` numbers takes 2 dim bytes as half floats, and dim + 4 as int8 with its scale.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from errors import PhiSightError

OVERHEAD = 128  # bytes a picture in a shard's header: its hash and its check sum
RESERVE = 64 * 2**20  # bytes left free: checkpoints and logs want to be written too


def bytes_per_picture(shape: tuple[int, int], storage: str) -> int:
    """Bytes of one picture of `shape` (tokens, dim) in a shard."""
    tokens, dim = shape
    return tokens * (2 * dim if storage == "float16" else dim + 4)


def existing_parent(folder: Path) -> Path:
    """The folder itself, or the nearest one above it that is there already."""
    return next((p for p in (folder, *folder.absolute().parents) if p.is_dir()), Path("/"))


@dataclass(frozen=True)
class StoragePlan:
    """What is about to be stored: `pictures` of `shape` (tokens, dim), and the room there is."""

    folder: Path
    pictures: int
    shape: tuple[int, int]
    storage: str

    @property
    def bytes(self) -> int:
        return self.pictures * (bytes_per_picture(self.shape, self.storage) + OVERHEAD)

    @property
    def free(self) -> int:
        return shutil.disk_usage(existing_parent(self.folder)).free

    def __str__(self) -> str:
        tokens, dim = self.shape
        return (
            f"{self.pictures:,} pictures x {tokens:,} tokens x {dim:,} {self.storage}:"
            f" {size(self.bytes)}; {size(self.free)} free"
        )

    def smaller(self) -> str:
        """The ways to need less, each with what it would need."""
        tokens, dim = self.shape
        pooled = (-(-tokens // 4), dim)
        other = [("twice the --feature-pooling", pooled, self.storage)] * (tokens > 1)
        if self.storage != "int8":
            other += [("--feature-storage int8", self.shape, "int8")]
        return " or ".join(
            f"{flag} ({size(StoragePlan(self.folder, self.pictures, shape, storage).bytes)})"
            for flag, shape, storage in other
        )

    def check(self) -> None:
        """Raise PhiSightError if the disk is too small for it."""
        if self.bytes + RESERVE <= self.free:
            return
        less = self.smaller()
        raise PhiSightError(
            f"{self.folder}: too little room ({self}); free some or give another --features"
            f"{less and f', or store less with {less}'}"
        )


def size(count: int) -> str:
    """Bytes as people read them: "95.6 GB"."""
    amount = float(count)
    for unit in ("bytes", "KB", "MB", "GB", "TB"):
        if amount < 1000 or unit == "TB":
            break
        amount /= 1000
    return f"{count:,} bytes" if unit == "bytes" else f"{amount:.1f} {unit}"
