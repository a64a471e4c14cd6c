"""Between the event loop and the threads: calls that block, and the pieces of an answer."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import Future
from threading import Event, Thread
from typing import TYPE_CHECKING, ParamSpec, TypeVar

if TYPE_CHECKING:  # the web app is there before torch is
    from assistant.answer import Answer

Result = TypeVar("Result")
Given = ParamSpec("Given")


@contextlib.contextmanager
def until_left() -> Iterator[Callable[[], bool]]:
    """Whether the block has been left, however: what a thread asks that works for a client."""
    left = Event()
    try:
        yield left.is_set
    finally:
        left.set()


async def in_thread(
    turns: asyncio.Semaphore,
    function: Callable[Given, Result],
    *arguments: Given.args,
    **settings: Given.kwargs,
) -> Result:
    """What `function` returns or raises, called in a thread once one of `turns` is free.

    Whoever is cancelled leaves at once; the turn is free again when the call has ended, which a
    long one does early if it asks what `until_left` gives. The thread
    is a daemon, as those of asyncio and anyio are not: a long recording must not hold up the end of
    the process.
    """
    called: Future[Result] = Future()

    def call() -> None:
        try:
            called.set_result(function(*arguments, **settings))
        except BaseException as error:  # raised again where it is awaited
            called.set_exception(error)

    await turns.acquire()
    called.set_running_or_notify_cancel()
    ended = asyncio.wrap_future(called)

    def free(done: asyncio.Future[Result]) -> None:
        turns.release()
        if not done.cancelled():
            done.exception()  # looked at, also where nobody waits for it any more

    ended.add_done_callback(free)
    Thread(target=call, name="question", daemon=True).start()
    return await asyncio.shield(ended)


async def pieces_of(answer: Answer) -> AsyncIterator[str]:
    """The answer's text as it comes, told by the engine's thread. Raises what made it fail."""
    loop = asyncio.get_running_loop()
    told: asyncio.Queue[str | None] = asyncio.Queue()

    def tell(piece: str | None) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: the server has ended
            loop.call_soon_threadsafe(told.put_nowait, piece)

    answer.subscribe(tell)
    while (piece := await told.get()) is not None:
        yield piece
    if answer.error is not None:
        raise answer.error
