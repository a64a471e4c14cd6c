"""From the threads that work to the event loop: what blocks, and an answer's pieces of text."""

from __future__ import annotations

import asyncio
import concurrent.futures
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager
from typing import ParamSpec, TypeVar

import anyio

from assistant.assistant import Reply

Result = TypeVar("Result")
Given = ParamSpec("Given")


async def in_thread(
    turn: AbstractAsyncContextManager[object],
    function: Callable[Given, Result],
    *arguments: Given.args,
    **settings: Given.kwargs,
) -> Result:
    """What `function` returns or raises, called in a thread once it is its `turn`.

    A client that leaves while it waits for its turn is gone at once; a call that has begun is
    waited for, so that never more of them run than there are turns. The thread is a daemon, as
    those of asyncio and anyio are not: a long recording must not hold up the end of the process.
    """
    async with turn:
        called: concurrent.futures.Future[Result] = concurrent.futures.Future()
        called.set_running_or_notify_cancel()

        def call() -> None:
            try:
                called.set_result(function(*arguments, **settings))
            except BaseException as error:  # raised again where it is awaited
                called.set_exception(error)

        threading.Thread(target=call, name="question", daemon=True).start()
        with anyio.CancelScope(shield=True):
            return await asyncio.wrap_future(called)


async def pieces_of(reply: Reply) -> AsyncIterator[str]:
    """The reply's text as it comes. Raises what made the reply fail."""
    loop = asyncio.get_running_loop()
    arrived: asyncio.Queue[str | Exception | None] = asyncio.Queue()

    def tell(item: str | Exception | None) -> None:
        try:
            loop.call_soon_threadsafe(arrived.put_nowait, item)
        except RuntimeError:  # the loop is closed: the server has ended, and nobody listens
            reply.cancel()

    def read() -> None:
        try:
            for piece in reply:
                tell(piece)
            tell(None)
        except Exception as error:
            tell(error)

    threading.Thread(target=read, name="question", daemon=True).start()
    while (item := await arrived.get()) is not None:
        if isinstance(item, Exception):
            raise item
        yield item
