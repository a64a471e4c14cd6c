"""Pictures with noise over them, for the alignment meter: something is shown, little can be read.

Gaussian noise of `SIGMA` is added to the pixels that the encoder reads. It is drawn by the pixels
themselves, so that a picture has the same noise in every run, on every machine, under every name.
What the encoder makes of it is kept in a store of its own, whose key says so.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy
from PIL import Image
from torch import Tensor

from data.features import FeatureStore
from model.vision import VisionSpec, VisionTower
from workers.fitting import Fit, Fitted

SIGMA = 0.5
"""standard deviation of the noise, of the range of a pixel's values; what leaves it is cut off"""


def noised(picture: Fitted, sigma: float = SIGMA) -> Fitted:
    """The same picture with noise added to every pixel's three bytes.

    Equal pictures get equal noise: its seed is the sha256 of size and pixels.
    """
    pixels = picture.pixels
    content = hashlib.sha256(repr(pixels.shape).encode() + pixels.tobytes()).digest()
    # numpy promises the numbers of this generator for all its versions, and of no newer one.
    generator = numpy.random.RandomState(numpy.frombuffer(content, "<u4"))
    noise = generator.standard_normal(pixels.shape) * (255 * sigma)
    return Fitted((pixels + noise).round().clip(0, 255).astype(numpy.uint8))


class NoisedTower:
    """A vision tower that is shown every picture with noise over it; see `data.features.Extract`
    for what it gives a store."""

    def __init__(self, tower: VisionTower, sigma: float = SIGMA) -> None:
        self.tower, self.sigma = tower, sigma

    @property
    def fit(self) -> Fit:
        """How a picture is brought to the size that gets the noise."""
        return self.tower.fit

    def __call__(self, pictures: Sequence[Image.Image | Fitted]) -> Tensor:
        """RGB pictures of any size, or fitted ones -> (pictures, tokens, dim) float32."""
        fitted = [one if isinstance(one, Fitted) else self.fit(one) for one in pictures]
        return self.tower([noised(one, self.sigma) for one in fitted])


def noised_store(
    folder: str | Path, vision: VisionSpec, storage: str, sigma: float = SIGMA
) -> FeatureStore:
    """The store of noised pictures' features, beside that of the true ones in `folder`. It is to be
    filled by a `NoisedTower` of the same `sigma`."""
    said = f"{vision.key}/noised/{sigma}"
    key = hashlib.sha256(said.encode()).hexdigest()[:16]
    return FeatureStore(folder, key, vision.shape, storage)
