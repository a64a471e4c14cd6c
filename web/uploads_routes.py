"""The routes by which the page sends files, and sees them."""

from __future__ import annotations

from typing import Annotated

import anyio
from fastapi import APIRouter, Query, Request
from fastapi.responses import FileResponse, Response

from api.guards import DRAIN_BODIES, DRAIN_SECONDS, drain, parts_of_body
from api.responses import AsciiJSON
from errors import PhiSightError
from web.errors import RequestError
from web.site import Site
from web.temporary import MAX_UPLOAD
from web.uploads import Arriving, BrowserKey, remove, shown, taken

JUDGED_AT_ONCE = 4  # pictures; there are as many children that decode, and one waits
WRITTEN_AT_ONCE = 2**20  # bytes
KEPT = {"cache-control": "private, max-age=86400, immutable"}


def router(site: Site) -> APIRouter:
    routes = APIRouter()
    judges = anyio.CapacityLimiter(JUDGED_AT_ONCE)

    @routes.post("/uploads")
    async def upload(
        request: Request, key: BrowserKey, name: Annotated[str, Query(max_length=1000)]
    ) -> Response:
        body = parts_of_body(request.receive)
        arriving = Arriving(site, key, name)
        try:
            claimed = request.headers.get("content-length", "0")
            if claimed.isdecimal() and int(claimed[:18]) > MAX_UPLOAD:
                raise RequestError(
                    "upload_too_large", name=arriving.name, megabytes=MAX_UPLOAD >> 20
                )
            with arriving.open():
                waiting = bytearray()
                async for part in body:
                    waiting += part
                    if len(waiting) >= WRITTEN_AT_ONCE:
                        await anyio.to_thread.run_sync(arriving.put, bytes(waiting))
                        waiting.clear()
                await anyio.to_thread.run_sync(arriving.put, bytes(waiting))
                await anyio.to_thread.run_sync(arriving.keep, limiter=judges)
        except PhiSightError:
            # A browser that is still sending and finds the connection closed never reads why.
            await drain(body, MAX_UPLOAD * DRAIN_BODIES, DRAIN_SECONDS)
            raise
        assert arriving.whole is not None
        if await request.is_disconnected():  # while it was judged
            remove(site, key, arriving.id)
        return AsciiJSON(arriving.whole.told())

    @routes.get("/uploads/{id}")
    async def picture(id: str, key: BrowserKey) -> Response:
        found = taken(site, key, id)
        path, media_type = await anyio.to_thread.run_sync(shown, site, found, limiter=judges)
        return FileResponse(path, media_type=media_type, headers=KEPT)

    @routes.delete("/uploads/{id}")
    def forget(id: str, key: BrowserKey) -> Response:
        remove(site, key, id)
        return AsciiJSON({})

    return routes
