"""SigLIP2 in its NaFlex form (arXiv:2502.14786): transformers' `Siglip2VisionModel`, on squares.

NaFlex takes any number of patches a side. Here every picture is made square first, so that all
have as many tokens: the most patches of a square that its processor allows.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from PIL import Image
from torch import Tensor, nn

from errors import PhiSightError
from model.encoders.encoder import position_table, resized_positions
from model.encoders.preparation import HALVES, UNREADABLE, Preparation, processor_of, undescribed
from model.encoders.siglip import SiglipConfig, SiglipVision
from workers.fitting import Fit

_FILLED_IN: dict[str, Any] = {
    "patch_size": 16,
    "max_num_patches": 256,
    "resample": Image.Resampling.BILINEAR,
    "do_resize": True,
    "do_rescale": True,
    "do_normalize": True,
    "rescale_factor": 1 / 255,
    "image_mean": HALVES,
    "image_std": HALVES,
}


@dataclass(frozen=True)
class NaflexConfig(SiglipConfig):
    """A SigLIP2 of NaFlex: its patches come cut, and its positions are interpolated."""

    NAME: ClassVar[str] = "SigLIP2 NaFlex"
    KINDS: ClassVar[Mapping[str, str]] = {"siglip2": "vision_config", "siglip2_vision_model": ""}
    PROCESSOR: ClassVar[str] = "Siglip2ImageProcessor"

    num_patches: int = 256
    """of the grid whose positions were learnt"""

    def build(self) -> SiglipVision:
        return SiglipVision(self, Embeddings(self))

    def check(self) -> None:
        super().check()
        if math.isqrt(self.num_patches) ** 2 != self.num_patches:
            raise PhiSightError(f"its num_patches {self.num_patches} is no square")

    def preparation(self, content: Mapping[str, Any]) -> Preparation:
        """Pictures that are not padded lose their sides: the processor of transformers would give
        each another number of patches."""
        name = processor_of(content, self.PROCESSOR)
        if name != self.PROCESSOR:
            raise PhiSightError(
                f"its processor is {name!r:.60}, not {self.PROCESSOR!r}; use the file that came"
                " with the encoder"
            )
        full = _FILLED_IN | {key: value for key, value in content.items() if value is not None}
        if full["patch_size"] != self.patch_size:
            raise PhiSightError(
                f"cuts patches of {full['patch_size']!r:.60} pixels, and"
                f" config.json takes {self.patch_size}; fetch both again"
            )
        try:
            if not full["do_resize"]:
                raise ValueError("do_resize")
            if full["max_num_patches"] < 1:
                raise ValueError("max_num_patches")
            pixels = math.isqrt(full["max_num_patches"]) * self.patch_size
            resample = Image.Resampling(full["resample"])
            fit = Fit(pixels, None, resample, (pixels, pixels))
            return Preparation.normalised(fit, full)
        except UNREADABLE as error:
            raise undescribed(error) from None


class Embeddings(nn.Module):
    """Patches, and where each of them stands in a grid of any size."""

    def __init__(self, config: NaflexConfig) -> None:
        super().__init__()
        self.patch = config.patch_size
        self.patch_embedding = nn.Linear(3 * self.patch**2, config.hidden_size)
        self.position_embedding = position_table(config.num_patches, config.hidden_size)

    def forward(self, pixels: Tensor) -> Tensor:
        """(pictures, 3, side, side) -> (pictures, patches, dim)."""
        side = pixels.shape[-1] // self.patch
        blocks = pixels.reshape(-1, 3, side, self.patch, side, self.patch)
        # Row by row of patches, and in a patch row by row of pixels, with their channels last.
        cut = blocks.permute(0, 2, 4, 3, 5, 1).reshape(len(pixels), side * side, -1)
        places = resized_positions(self.position_embedding.weight, side, "bilinear", True)
        return self.patch_embedding(cut) + places
