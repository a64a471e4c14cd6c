"""Keys and values of what was said before: a next turn is not read from its start again."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Sequence

import numpy

from model.cache import KeyValues

SHORTEST = 8  # tokens; copying less than this saves nothing
CONVERSATIONS = 64  # each is compared with every new prompt


def token_keys(
    input_ids: Sequence[int], placeholder_id: int, image_keys: Sequence[str], tokens_per_image: int
) -> numpy.ndarray:
    """(tokens,) int64 that name what stands at each place: ids, or for a picture's slots its
    content. Equal keys mean equal embeddings."""
    keys = numpy.array(input_ids, dtype=numpy.int64)
    slots = numpy.flatnonzero(keys == placeholder_id)
    for place, image_key in enumerate(image_keys):
        digest = hashlib.sha256(image_key.encode()).digest()
        own = slots[place * tokens_per_image : (place + 1) * tokens_per_image]
        keys[own] = -1 - int.from_bytes(digest[:7]) - numpy.arange(len(own))
    return keys


class PrefixCache:
    """The keys and values of the latest `CONVERSATIONS`, at most `max_bytes` of them."""

    def __init__(self, max_bytes: int, crossing: int | None, whole: int) -> None:
        """`crossing`: where LongRoPE changes its factors, or None; `whole`: tokens of a picture."""
        self.max_bytes, self.crossing, self.whole = max_bytes, crossing, whole
        self.bytes = 0
        self._entries: OrderedDict[bytes, tuple[numpy.ndarray, KeyValues]] = OrderedDict()

    def longest(self, keys: numpy.ndarray) -> KeyValues | None:
        """The keys and values of the longest known beginning of `keys`, over shared memory.

        At least the last token is left to be fed, and no picture is cut: its slots begin where a
        negative key follows one that is not of the same picture.
        """
        best, chosen = SHORTEST - 1, None
        for digest, (known, _) in self._entries.items():
            if self._is_long(len(known)) != self._is_long(len(keys)):
                continue  # other factors turned these keys
            count = min(len(known), len(keys) - 1)
            differs = numpy.flatnonzero(known[:count] != keys[:count])
            common = self._whole_pictures(keys, int(differs[0]) if len(differs) else count)
            if common > best:
                best, chosen = common, digest
        if chosen is None:
            return None
        self._entries.move_to_end(chosen)
        return self._entries[chosen][1].prefix(best)

    def put(self, keys: numpy.ndarray, past: KeyValues) -> None:
        """Keep a conversation, in the place of the shorter ones that it goes on from."""
        if past.bytes > self.max_bytes or len(keys) < SHORTEST:
            return
        for digest, (known, _) in list(self._entries.items()):
            if len(known) <= len(keys) and numpy.array_equal(known, keys[: len(known)]):
                self._drop(digest)
        while self._entries and (
            self.bytes + past.bytes > self.max_bytes or len(self._entries) == CONVERSATIONS
        ):
            self._drop(next(iter(self._entries)))
        self._entries[hashlib.sha256(keys.tobytes()).digest()] = (keys, past)
        self.bytes += past.bytes

    def _drop(self, digest: bytes) -> None:
        _, past = self._entries.pop(digest)
        self.bytes -= past.bytes

    def _is_long(self, length: int) -> bool:
        return self.crossing is not None and length > self.crossing

    def _whole_pictures(self, keys: numpy.ndarray, count: int) -> int:
        """`count`, or less where it would end within a picture."""
        slots = int((keys[:count] < 0).sum()) % self.whole
        return count - slots
