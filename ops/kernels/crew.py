"""Threads that run one compiled function together, each its part of the work.

A compiled function of a crew is called as `function(thread, threads, board, *arguments)` on every
thread at once, without Python's lock. `board` is the address of numbers that they share: `barrier`
waits until all have come, `take_part` hands out what is left to be done. Whoever waits within a
call spins for some microseconds and then gives way to other programs; between calls, threads sleep.

A call that a thread does not take to its end, by an error or by Ctrl-C, is abandoned: nobody waits
at a barrier any more, so that all come to an end, and the results are of no use. Until they have,
`run` does not return: they write to memory that is the caller's.
"""

from __future__ import annotations

import contextlib
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
ARRIVED, GENERATION, ABANDONED, FIRST_COUNTER = 0, LINE, LINE + 8, 2 * LINE
PATIENCE = 2000  # turns of a waiting loop before other programs are let in: about 20 microseconds


@compiled
def barrier(board, threads):
    """Wait until all `threads` of a crew have come here, or the call was abandoned."""
    if threads == 1:
        return
    generation = observe(board + GENERATION)
    if arrive(board + ARRIVED, 1) == threads - 1:
        publish(board + ARRIVED, 0)
        publish(board + GENERATION, generation + 1)
        return
    turns = 0
    while observe(board + GENERATION) == generation and observe(board + ABANDONED) == 0:
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


Call = tuple[int, Callable[..., None], tuple[Any, ...]]
"""its number, the function, and what it takes"""


def nothing(thread: int, threads: int, board: int) -> None:
    pass


class Crew:
    """`threads` threads, of which the caller of `run` is one."""

    def __init__(self, threads: int) -> None:
        self.threads = threads
        self._board = numpy.zeros((2 + COUNTERS) * LINE // 8 + LINE // 8, numpy.int64)
        address = self._board.ctypes.data
        self._start = (-address % LINE) // 8  # of the first whole cache line
        self._address = address + self._start * 8
        self._lock = threading.Lock()  # one call at a time
        self._number = 0  # of the latest call
        self._in_step = True  # whether all have ended it
        self._ended: queue.SimpleQueue[tuple[int, BaseException | None]] = queue.SimpleQueue()
        self._calls: list[queue.SimpleQueue[Call]] = []
        for number in range(1, threads):
            calls: queue.SimpleQueue[Call] = queue.SimpleQueue()
            self._calls.append(calls)
            threading.Thread(
                target=self._serve, args=(number, calls), name=f"kernels-{number}", daemon=True
            ).start()

    def run(self, function: Callable[..., None], *arguments: Any) -> None:
        """Call `function` on every thread, and return when all have ended."""
        with self._lock:
            self._come_into_step()
            self._board[:] = 0
            self._in_step = False
            try:
                self._begin(function, arguments)
                function(0, self.threads, self._address, *arguments)
                errors = self._wait()
            except BaseException:  # also Ctrl-C, wherever it comes
                self._come_into_step()
                raise
            self._in_step = True
        for error in errors:
            if error is not None:
                raise error

    def _begin(self, function: Callable[..., None], arguments: tuple[Any, ...]) -> None:
        self._number += 1
        for calls in self._calls:
            calls.put((self._number, function, arguments))

    def _wait(self) -> list[BaseException | None]:
        """Until the others have ended the latest call; their errors."""
        errors: list[BaseException | None] = []
        while len(errors) < len(self._calls):
            number, error = self._ended.get()
            if number == self._number:  # not of a call that was abandoned
                errors.append(error)
        return errors

    def _come_into_step(self) -> None:
        """Wait until all have ended a call that is abandoned; no second Ctrl-C shortens it. A
        thread has ended all calls before one that it ends."""
        while not self._in_step:
            with contextlib.suppress(KeyboardInterrupt):
                self._abandon()
                self._begin(nothing, ())
                self._wait()
                self._in_step = True

    def _abandon(self) -> None:
        self._board[self._start + ABANDONED // 8] = 1

    def _serve(self, number: int, calls: queue.SimpleQueue[Call]) -> None:
        while True:
            call, function, arguments = calls.get()
            try:
                function(number, self.threads, self._address, *arguments)
            except BaseException as error:  # handed to the caller, who must not wait for ever
                self._abandon()
                self._ended.put((call, error))
            else:
                self._ended.put((call, None))


def crew_of(threads: int) -> Crew:
    """The crew of so many threads of this process; a forked child has its own."""
    return _crew(threads, os.getpid())


@functools.cache
def _crew(threads: int, process: int) -> Crew:
    return Crew(threads)
