"""A cache of limited size that forgets what was not asked for the longest."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

Value = TypeVar("Value")


class LeastRecentlyUsed(Generic[Value]):
    """Values by key, at most `limit` in all, counted by `size_of`; for many threads."""

    def __init__(self, limit: int, size_of: Callable[[Value], int] = lambda value: 1) -> None:
        self.limit, self.size_of = limit, size_of
        self.hits = self.misses = self.size = 0
        self._values: OrderedDict[Hashable, Value] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: Hashable) -> Value | None:
        with self._lock:
            if key not in self._values:
                self.misses += 1
                return None
            self.hits += 1
            self._values.move_to_end(key)
            return self._values[key]

    def put(self, key: Hashable, value: Value) -> None:
        """A value larger than the whole cache is not kept."""
        size = self.size_of(value)
        with self._lock:
            if key in self._values:
                self.size -= self.size_of(self._values.pop(key))
            if size > self.limit:
                return
            while self.size + size > self.limit:
                self.size -= self.size_of(self._values.popitem(last=False)[1])
            self._values[key] = value
            self.size += size
