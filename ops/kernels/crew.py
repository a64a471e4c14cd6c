"""Threads that run one compiled function together, each its part of the work.

A compiled function of a crew is called as `function(thread, threads, board, *arguments)` on every
thread at once, without Python's lock. `board` is the address of numbers that they share: `barrier`
waits until all have come, `take_part` hands out what is left to be done. Whoever waits within a
call spins for some microseconds and then gives way to other programs; between calls, threads sleep.
"""

from __future__ import annotations

import functools
import os
import queue
import threading
from collections.abc import Callable
from typing import Any

import numpy

from ops.kernels.compiling import compiled
from ops.kernels.simd import arrive, give_way, observe, pause, publish, take

LINE = 64  # bytes of a cache line: two numbers in one would be fought over
COUNTERS = 1024  # of `take_part`, each used once in a call
ARRIVED, GENERATION, FIRST_COUNTER = 0, LINE, 2 * LINE
PATIENCE = 2000  # turns of a waiting loop before other programs are let in: about 20 microseconds


@compiled
def barrier(board, threads):
    """Wait until all `threads` of a crew have come here."""
    if threads == 1:
        return
    generation = observe(board + GENERATION)
    if arrive(board + ARRIVED, 1) == threads - 1:
        publish(board + ARRIVED, 0)
        publish(board + GENERATION, generation + 1)
        return
    turns = 0
    while observe(board + GENERATION) == generation:
        turns += 1
        if turns < PATIENCE:
            pause()
        else:
            give_way()


@compiled
def take_part(board, counter, parts):
    """The first of the next `parts` pieces of work that nobody has; `counter` (0 to `COUNTERS` - 1)
    names the work, and starts at 0 in every call of the crew."""
    return take(board + FIRST_COUNTER + counter * LINE, parts)


class Crew:
    """`threads` threads, of which the caller of `run` is one."""

    def __init__(self, threads: int) -> None:
        self.threads = threads
        self._board = numpy.zeros((2 + COUNTERS) * LINE // 8 + LINE // 8, numpy.int64)
        address = self._board.ctypes.data
        self._start = (-address % LINE) // 8  # of the first whole cache line
        self._address = address + self._start * 8
        self._lock = threading.Lock()  # one call at a time
        self._ended: queue.SimpleQueue[BaseException | None] = queue.SimpleQueue()
        self._calls: list[queue.SimpleQueue[tuple[Callable[..., None], tuple[Any, ...]]]] = []
        for number in range(1, threads):
            calls: queue.SimpleQueue[tuple[Callable[..., None], tuple[Any, ...]]]
            calls = queue.SimpleQueue()
            self._calls.append(calls)
            threading.Thread(
                target=self._serve, args=(number, calls), name=f"kernels-{number}", daemon=True
            ).start()

    def run(self, function: Callable[..., None], *arguments: Any) -> None:
        """Call `function` on every thread, and return when all have ended."""
        with self._lock:
            self._board[self._start + FIRST_COUNTER // 8 :] = 0
            for calls in self._calls:
                calls.put((function, arguments))
            try:
                function(0, self.threads, self._address, *arguments)
            finally:
                errors = [self._ended.get() for _ in self._calls]
            for error in errors:
                if error is not None:
                    raise error

    def _serve(
        self, number: int, calls: queue.SimpleQueue[tuple[Callable[..., None], tuple[Any, ...]]]
    ) -> None:
        while True:
            function, arguments = calls.get()
            try:
                function(number, self.threads, self._address, *arguments)
            except BaseException as error:  # handed to the caller, who must not wait for ever
                self._ended.put(error)
            else:
                self._ended.put(None)


def crew_of(threads: int) -> Crew:
    """The crew of so many threads of this process; a forked child has its own."""
    return _crew(threads, os.getpid())


@functools.cache
def _crew(threads: int, process: int) -> Crew:
    return Crew(threads)
