"""Rendered conversations in little memory: 158,000 of them are not lists of Python's numbers."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator, Sequence
from typing import overload

from data.chat import ChatFormat, RenderedSample, all_learnt


class PackedSamples(Sequence[RenderedSample]):
    """A list of `RenderedSample` that is appended to and read, made again as each is asked for.

    Kept are 4 bytes for each token of text, of which the sign says whether it is supervised, and 4
    for each picture, whatever its tokens: the ids of a picture are `tokens_per_image` times the one
    image id, never supervised, and no text can spell that id.
    """

    def __init__(self, chat_format: ChatFormat) -> None:
        self.chat_format = chat_format
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

    def codes(self, place: int) -> array:
        """What is kept of a sample: an id, or ~id where it is supervised; of a picture one id."""
        return self._codes[self._ends[place - 1] if place else 0 : self._ends[place]]

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
        for code in self.codes(index):
            times = self._tokens if code == self._image_id else 1
            ids += [code if code >= 0 else ~code] * times
            supervised += [code < 0] * times
        return RenderedSample(ids, supervised, self._images[index])

    def __iter__(self) -> Iterator[RenderedSample]:
        return (self[index] for index in range(len(self)))


class ChosenSamples(Sequence[RenderedSample]):
    """Some of the packed samples, each as often as its place is given, in that order.

    With `learns_all` they have all of their text learnt, and not the answers alone.
    """

    def __init__(
        self, samples: PackedSamples, places: Iterable[int], learns_all: bool = False
    ) -> None:
        self.samples, self.learns_all = samples, learns_all
        self._places = array("q", places)

    @property
    def lengths(self) -> list[int]:
        """Tokens of every sample, picture tokens included."""
        every = self.samples.lengths
        return [every[place] for place in self._places]

    @property
    def images(self) -> Sequence[tuple[str, ...]]:
        """The pictures of every sample."""
        return [self.samples.images[place] for place in self._places]

    def __len__(self) -> int:
        return len(self._places)

    @overload
    def __getitem__(self, place: int) -> RenderedSample: ...
    @overload
    def __getitem__(self, place: slice) -> list[RenderedSample]: ...

    def __getitem__(self, place):
        if isinstance(place, slice):
            return [self[index] for index in range(*place.indices(len(self)))]
        sample = self.samples[self._places[place]]
        return all_learnt(sample, self.samples.chat_format) if self.learns_all else sample

    def __iter__(self) -> Iterator[RenderedSample]:
        return (self[index] for index in range(len(self)))

    def __add__(self, other: Sequence[RenderedSample]) -> list[RenderedSample]:
        return [*self, *other]

    def written(self) -> Iterator[tuple[str, str, tuple[str, ...]]]:
        """Of each sample its ids and what is supervised, as `json.dumps` writes these lists, and
        its pictures; ten times as fast, as a picture's many tokens are one text."""
        image, tokens = self.samples.chat_format.image_id, self.samples.chat_format.tokens_per_image
        ids_of = _Texts(image, ", ".join([str(image)] * tokens))
        of_a_picture = ", ".join(["false"] * tokens)
        for place in self._places:
            codes = self.samples.codes(place)
            if self.learns_all:
                learnt = ["true" if code != image else of_a_picture for code in codes]
                learnt[0] = of_a_picture if codes[0] == image else "false"
            else:
                learnt = [
                    "true" if code < 0 else of_a_picture if code == image else "false"
                    for code in codes
                ]
            ids = ", ".join(map(ids_of.__getitem__, codes))
            yield f"[{ids}]", f"[{', '.join(learnt)}]", self.samples.images[place]


class _Texts(dict[int, str]):
    """code -> the id in it as text; of a picture, all of its ids."""

    def __init__(self, image: int, of_a_picture: str) -> None:
        super().__init__({image: of_a_picture})

    def __missing__(self, code: int) -> str:
        text = str(code if code >= 0 else ~code)
        self[code] = text
        return text
