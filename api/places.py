"""How many requests of each kind may be under way, so that one kind never takes another's room.

A request is first "arriving": nothing is known of it until its body is there. It then holds a place
of the kind of work that it waits for or that is done for it, one at a time:

- "ears": speech in it is written down;
- "eyes": its pictures are looked at;
- "text": its answer waits for the model or is written;
- "voice": a text is spoken.

Whoever leaves, at whatever point, is out of every count at once.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Literal

from api.errors import busy

Kind = Literal["arriving", "ears", "eyes", "text", "voice"]
KINDS: tuple[Kind, ...] = ("arriving", "ears", "eyes", "text", "voice")
WAITING: dict[Kind, str] = {
    "arriving": "requests are being sent",
    "ears": "recordings wait to be heard",
    "eyes": "questions about pictures wait",
    "text": "requests are under way",
    "voice": "texts wait to be spoken",
}


class Places:
    """The places of one server, changed in the event loop's thread only."""

    def __init__(self, limits: Mapping[Kind, int]) -> None:
        """`limits`: how many requests may hold a place of each kind."""
        self.limits = limits
        self.taken: Counter[Kind] = Counter()

    @property
    def in_flight(self) -> int:
        """Requests that hold a place of any kind."""
        return self.taken.total()

    def check(self, kind: Kind) -> None:
        """Raises `ApiError` of status 503 where no place of a kind is free."""
        if self.taken[kind] >= self.limits[kind]:
            raise busy(f"{self.taken[kind]} {WAITING[kind]} already")

    @contextmanager
    def place(self) -> Iterator[Place]:
        """A place for a request that arrives, held until the block is left."""
        self.check("arriving")
        place = Place(self)
        self.taken["arriving"] += 1
        try:
            yield place
        finally:
            self.taken[place.kind] -= 1


class Place:
    """What one request holds."""

    def __init__(self, places: Places) -> None:
        self.places = places
        self.kind: Kind = "arriving"

    def move(self, kind: Kind) -> None:
        """Hold a place of another kind instead. Raises as `Places.check` does, and then keeps the
        former one."""
        if kind == self.kind:
            return
        self.places.check(kind)
        self.places.taken[self.kind] -= 1
        self.places.taken[kind] += 1
        self.kind = kind
