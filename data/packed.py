"""Rendered conversations in little memory: 158,000 of them are not lists of Python's numbers."""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from typing import overload

from data.chat import ChatFormat, RenderedSample


class PackedSamples(Sequence[RenderedSample]):
    """A list of `RenderedSample` that is appended to and read, made again as each is asked for.

    Kept are 4 bytes for each token of text, of which the sign says whether it is supervised, and 4
    for each picture, whatever its tokens: the ids of a picture are `tokens_per_image` times the one
    image id, never supervised, and no text can spell that id.
    """

    def __init__(self, chat_format: ChatFormat) -> None:
        self._image_id, self._tokens = chat_format.image_id, chat_format.tokens_per_image
        self._codes = array("i")  # an id, or ~id where it is supervised
        self._ends = array("q")  # of each sample in the codes
        self._lengths = array("q")
        self._images: list[tuple[str, ...]] = []
        self._known: dict[tuple[str, ...], tuple[str, ...]] = {}  # conversations share pictures

    def append(self, sample: RenderedSample) -> None:
        ids, supervised = sample.input_ids, sample.supervised
        start = 0
        for _ in sample.images:
            here = ids.index(self._image_id, start)
            self._add(ids[start:here], supervised[start:here])
            self._codes.append(self._image_id)
            start = here + self._tokens
        self._add(ids[start:], supervised[start:])
        self._ends.append(len(self._codes))
        self._lengths.append(len(ids))
        self._images.append(self._known.setdefault(sample.images, sample.images))

    def _add(self, ids: list[int], supervised: list[bool]) -> None:
        self._codes.extend([~i if learnt else i for i, learnt in zip(ids, supervised)])

    @property
    def lengths(self) -> list[int]:
        """Tokens of every sample, picture tokens included."""
        return self._lengths.tolist()

    @property
    def images(self) -> Sequence[tuple[str, ...]]:
        """The pictures of every sample."""
        return self._images

    def __len__(self) -> int:
        return len(self._ends)

    @overload
    def __getitem__(self, place: int) -> RenderedSample: ...
    @overload
    def __getitem__(self, place: slice) -> list[RenderedSample]: ...

    def __getitem__(self, place):
        if isinstance(place, slice):
            return [self[index] for index in range(*place.indices(len(self)))]
        index = range(len(self))[place]  # negative ones and IndexError as a list has them
        ids: list[int] = []
        supervised: list[bool] = []
        for code in self._codes[self._ends[index - 1] if index else 0 : self._ends[index]]:
            times = self._tokens if code == self._image_id else 1
            ids += [code if code >= 0 else ~code] * times
            supervised += [code < 0] * times
        return RenderedSample(ids, supervised, self._images[index])

    def __iter__(self) -> Iterator[RenderedSample]:
        return (self[index] for index in range(len(self)))

    def __add__(self, other: Sequence[RenderedSample]) -> list[RenderedSample]:
        return [*self, *other]
