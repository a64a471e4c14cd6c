"""Comments in a stream of events while nothing is said, so that no proxy and no client gives up.

A long prompt may be read, or wait for its turn, for longer than many programs wait for a byte.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

KEEP_ALIVE = ": keep-alive\n\n"  # a comment of server-sent events, which clients skip


async def kept_alive(events: AsyncIterator[str], seconds: float) -> AsyncIterator[str]:
    """The events, with a comment after every `seconds` in which none comes."""

    async def following() -> str:
        return await anext(events)

    coming = asyncio.create_task(following())
    try:
        while True:
            await asyncio.wait((coming,), timeout=seconds)
            if not coming.done():
                yield KEEP_ALIVE
                continue
            try:
                event = coming.result()
            except StopAsyncIteration:
                return
            yield event
            coming = asyncio.create_task(following())
    finally:
        coming.cancel()
        with contextlib.suppress(asyncio.CancelledError, StopAsyncIteration):
            await coming
