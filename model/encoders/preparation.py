"""How a preprocessor_config.json says that pictures become pixels: scaled, cut, normalised.

Bit for bit what the processors of transformers that work with Pillow compute (their names end in
`ImageProcessorPil`): the tests compare them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy
import torch
from PIL import Image
from torch import Tensor

from errors import PhiSightError
from workers.fitting import Fit, Fitted

HALVES = (0.5, 0.5, 0.5)
LARGEST_SIDE = 4096  # pixels of a prepared picture
LEAST, LARGEST_VALUE = 1e-6, 255.0  # of what pixels are scaled and normalised by
_SHARED: dict[str, Any] = {
    "size": 224,
    "crop_size": 224,
    "resample": Image.Resampling.BICUBIC,
    "do_resize": True,
    "do_rescale": True,
    "do_normalize": True,
    "rescale_factor": 1 / 255,
}
_OF_CLIP = _SHARED | {
    "do_center_crop": True,
    "image_mean": (0.48145466, 0.4578275, 0.40821073),
    "image_std": (0.26862954, 0.26130258, 0.27577711),
}
# What transformers fills in where preprocessor_config.json is silent, by the processor's class.
PROCESSORS: Mapping[str, dict[str, Any]] = {
    "CLIPImageProcessor": _OF_CLIP,
    "BitImageProcessor": _OF_CLIP,
    "SiglipImageProcessor": _SHARED
    | {"size": {"height": 224, "width": 224}, "image_mean": HALVES, "image_std": HALVES},
}


def processor_of(content: Mapping[str, Any], usual: str) -> str:
    """The class of transformers that a preprocessor_config.json names, without what says on which
    library it works; `usual` where it names none, as some of the first published ones."""
    older = str(content.get("feature_extractor_type") or usual)
    named = content.get("image_processor_type") or older.replace(
        "FeatureExtractor", "ImageProcessor"
    )
    return str(named).removesuffix("Fast").removesuffix("Pil")


def undescribed(error: Exception) -> PhiSightError:
    """What is raised where a field is not what it must be; the reader puts the file in front."""
    return PhiSightError(f"describes no preparation of pictures ({error!r:.200}); fetch it again")


UNREADABLE = (TypeError, ValueError, KeyError, AttributeError, OverflowError)
"""what reading a field of another type, or a number of no use, raises"""


@dataclass(frozen=True)
class Preparation:
    """What is done to a picture before an encoder sees it."""

    fit: Fit
    scale: float | None
    """what bytes are multiplied with"""
    mean: tuple[float, ...] | None
    std: tuple[float, ...] | None
    mean_colour: tuple[int, ...]
    """in bytes, also where nothing is normalised by it"""

    @classmethod
    def from_dict(
        cls, content: Mapping[str, Any], usual: str = "CLIPImageProcessor"
    ) -> Preparation:
        """From a preprocessor_config.json. Missing fields and nulls are what transformers fills in.

        usual: the processor where the file names none. Raises `PhiSightError`.
        """
        name = processor_of(content, usual)
        if name not in PROCESSORS:
            raise PhiSightError(
                f"its processor is {name!r:.60}, none of {', '.join(PROCESSORS)}; use the file that"
                " came with the encoder"
            )
        given = {key: value for key, value in content.items() if value is not None}
        try:
            return cls.normalised(_fit(PROCESSORS[name] | given), PROCESSORS[name] | given)
        except UNREADABLE as error:
            raise undescribed(error) from None

    @classmethod
    def normalised(cls, fit: Fit, content: Mapping[str, Any]) -> Preparation:
        """`fit`, and then what `content`, which has every field, says of the pixels' values.
        Raises what reading a field of another type raises."""
        mean, std = (_colour(content, name) for name in ("image_mean", "image_std"))
        scale = float(content["rescale_factor"]) if content["do_rescale"] else None
        if min(std) < LEAST or not (scale is None or LEAST <= scale <= LARGEST_VALUE):
            raise ValueError("image_std or rescale_factor")
        for side in (fit.shortest_edge, *(fit.size or ()), *(fit.crop or ())):
            if side is not None and not 1 <= side <= LARGEST_SIDE:
                raise ValueError(f"{side} pixels, not 1 to {LARGEST_SIDE}")
        return cls(
            fit,
            scale,
            mean if content["do_normalize"] else None,
            std if content["do_normalize"] else None,
            tuple(int(value * 255) for value in mean),
        )

    @property
    def made(self) -> tuple[int, int] | None:
        """(height, width) of every picture; None where pictures keep sizes of their own."""
        return self.fit.crop or self.fit.size

    def padded(self) -> Preparation:
        """The same, of pictures that are first made square with the mean colour, as LLaVA-1.5 does
        (arXiv:2310.03744, in the integers of transformers' `LlavaImageProcessor`)."""
        red, green, blue = self.mean_colour
        fit = dataclasses.replace(self.fit, padding=(red, green, blue))
        return dataclasses.replace(self, fit=fit)

    def __call__(self, pictures: Sequence[Image.Image | Fitted]) -> Tensor:
        """RGB pictures of any size, or fitted ones -> (pictures, 3, height, width) float32."""
        pixels = numpy.stack([self._pixels(picture) for picture in pictures])
        # Channel by channel also in memory: some processors convolve other layouts to other bits.
        return torch.from_numpy(numpy.ascontiguousarray(pixels))

    def _pixels(self, picture: Image.Image | Fitted) -> numpy.ndarray:
        fitted = picture if isinstance(picture, Fitted) else self.fit(picture)
        pixels = fitted.pixels  # (height, width, 3) bytes
        if self.scale is not None:
            pixels = pixels.astype(numpy.float64) * self.scale
        pixels = pixels.astype(numpy.float32)
        if self.mean is not None:
            mean, std = numpy.array((self.mean, self.std), dtype=numpy.float32)
            pixels = (pixels - mean) / std
        return pixels.transpose(2, 0, 1)


def _colour(content: Mapping[str, Any], name: str) -> tuple[float, float, float]:
    red, green, blue = map(float, content[name])
    if not all(abs(value) <= LARGEST_VALUE for value in (red, green, blue)):  # nor NaN
        raise ValueError(name)
    return red, green, blue


def _fit(content: Mapping[str, Any]) -> Fit:
    size, crop = content["size"], content["crop_size"]  # a number or an object
    if isinstance(size, int):
        size = {"shortest_edge": size}
    if isinstance(crop, int):
        crop = {"height": crop, "width": crop}
    resized = content["do_resize"]
    if content.get("do_pad") or (resized and "longest_edge" in size):
        raise ValueError("do_pad or longest_edge")
    by_edge = resized and "shortest_edge" in size
    return Fit(
        int(size["shortest_edge"]) if by_edge else None,
        (int(size["height"]), int(size["width"])) if resized and not by_edge else None,
        Image.Resampling(content["resample"]),
        (int(crop["height"]), int(crop["width"])) if content.get("do_center_crop") else None,
    )
