"""How a picture of any size becomes one of the size that an encoder reads.

It needs no torch, so that it can be done in the child process that decodes the picture: what
crosses to the parent is then a few hundred kilobytes, whatever the picture had.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy
from PIL import Image

STRIP_PIXELS = 4_000_000  # of a padded picture that are in memory at once
LARGEST_SQUARE = 500_000_000  # pixels of a padded picture that are scaled as Pillow does


@dataclass(frozen=True, eq=False)
class Fitted:
    """A picture of the size that an encoder reads."""

    pixels: numpy.ndarray
    """(height, width, 3) bytes"""


@dataclass(frozen=True)
class Fit:
    """What is done to an RGB picture; the same bits as transformers' processors."""

    shortest_edge: int | None
    """the shorter side is scaled to this"""
    size: tuple[int, int] | None
    """or the whole picture to this (height, width); both None: it is not scaled"""
    resample: int
    crop: tuple[int, int] | None
    """(height, width) that is cut from the middle; black is added around where there is less"""
    padding: tuple[int, int, int] | None = None
    """colour that makes a picture square before it is scaled, as LLaVA-1.5 does; None: its sides
    are cut off"""

    @property
    def cuts(self) -> bool:
        """Whether the longer sides of a picture are cut off; else it is padded, or squeezed."""
        return self.padding is None and self.shortest_edge is not None and self.crop is not None

    def __call__(self, picture: Image.Image) -> Fitted:
        if self.padding is not None and picture.width != picture.height:
            picture = self._padded(picture, self.padding)
        else:
            picture = self._scaled(picture)
        if self.crop is not None:
            height, width = self.crop
            left, top = (picture.width - width) // 2, (picture.height - height) // 2
            picture = picture.crop((left, top, left + width, top + height))
        return Fitted(numpy.array(picture))

    def _new_size(self, width: int, height: int) -> tuple[int, int]:
        """(width, height) that a picture is scaled to."""
        if self.shortest_edge is not None:
            long = int(self.shortest_edge * max(width, height) / min(width, height))
            return (self.shortest_edge, long) if width <= height else (long, self.shortest_edge)
        return self.size[::-1] if self.size is not None else (width, height)

    def _scaled(self, picture: Image.Image) -> Image.Image:
        new = self._new_size(*picture.size)
        return picture.resize(new, self.resample) if new != picture.size else picture

    def _padded(self, picture: Image.Image, colour: tuple[int, int, int]) -> Image.Image:
        """The picture in the middle of a square of the colour, scaled.

        The square itself could have billions of pixels. Pillow scales every row on its own and
        then every column; so do we, and hold a strip of rows at a time. The rows of a high picture
        are mostly padding: beyond `LARGEST_SQUARE` its columns are scaled first, which takes a
        fiftieth of the time and rounds a little otherwise.
        """
        side = max(picture.size)
        if picture.height > picture.width and side * side > LARGEST_SQUARE:
            turned = self._padded(picture.transpose(Image.Transpose.TRANSPOSE), colour)
            return turned.transpose(Image.Transpose.TRANSPOSE)
        width, height = self._new_size(side, side)
        left, top = (side - picture.width) // 2, (side - picture.height) // 2
        narrow = Image.new("RGB", (width, side), colour)
        rows = max(1, STRIP_PIXELS // side)
        for begin in range(0, picture.height, rows):
            end = min(begin + rows, picture.height)
            strip = picture.crop((0, begin, picture.width, end))
            if picture.width < side:
                wide = Image.new("RGB", (side, end - begin), colour)
                wide.paste(strip, (left, 0))
                strip = wide
            narrow.paste(strip.resize((width, end - begin), self.resample), (0, top + begin))
        return narrow.resize((width, height), self.resample)


def to_json(fit: Fit) -> dict[str, Any]:
    """Plain values; the inverse of `from_json`."""
    return dataclasses.asdict(fit)


def from_json(values: Mapping[str, Any]) -> Fit:
    fields: dict[str, Any] = {n: tuple(v) if isinstance(v, list) else v for n, v in values.items()}
    return Fit(**fields)


def share_cut_off(width: int, height: int) -> float:
    """Of a picture's area, what cropping to a square loses."""
    return 1 - min(width, height) / max(width, height)
