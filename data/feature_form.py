"""How picture features are kept: as half floats, or as int8 with a scale for each token."""

from __future__ import annotations

import zlib
from dataclasses import dataclass

import torch
from torch import Tensor

STORED_DTYPE = torch.float16
DTYPES = {"float16": {"features": "F16"}, "int8": {"features": "I8", "scales": "F32"}}


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

    def merge(self, other: StorageError) -> None:
        """Count what the other one has counted."""
        self.squared += other.squared
        self.total += other.total
        self.worst = max(self.worst, other.worst)

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
