"""The hub as a Space meets it: a proxy that ends TLS, and the page that shows the Space in a frame.

A browser that is started with `Hub.arguments` finds https://huggingface.co/spaces/owner/name and
https://owner-name.hf.space here. Requests to the latter go on to the Space as the hub's proxy sends
them: with their own Host and Origin, over plain HTTP, and X-Forwarded-Proto says that it was not.
"""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import ssl
import subprocess
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

SPACE_HOST = "owner-name.hf.space"
GONE = (OSError, asyncio.IncompleteReadError, asyncio.CancelledError)
PAGE = "https://huggingface.co/spaces/owner/name"
FRAMED = (
    f'<!doctype html><title>Space</title><iframe src="https://{SPACE_HOST}" width=1200 height=800>'
)


@dataclass(frozen=True)
class Hub:
    port: int

    @property
    def arguments(self) -> list[str]:
        """Of a browser that takes this for the internet."""
        return [
            f"--host-resolver-rules=MAP * 127.0.0.1:{self.port}",
            "--ignore-certificate-errors",
        ]


def certificate(folder: Path) -> ssl.SSLContext:
    openssl = shutil.which("openssl")
    if openssl is None:
        pytest.skip("openssl is not there: apt-get install openssl")
    made = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2")
    files = ("-keyout", folder / "key.pem", "-out", folder / "certificate.pem")
    named = ("-subj", f"/CN={SPACE_HOST}")
    subprocess.run(
        [openssl, "req", "-x509", *made, *files, *named], check=True, capture_output=True
    )
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder / "certificate.pem", folder / "key.pem")
    return context


@contextlib.contextmanager
def hub_before(space_port: int, folder: Path) -> Iterator[Hub]:
    """A hub whose Space listens on a port of this machine."""
    context, loop = certificate(folder), asyncio.new_event_loop()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(*GONE):
            head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
            lines = head.rstrip().split("\r\n")
            if f"host: {SPACE_HOST}" not in (line.lower() for line in lines):
                writer.write(
                    b"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\nConnection: close\r\n"
                    b"Content-Length: %d\r\n\r\n%s" % (len(FRAMED), FRAMED.encode())
                )
            else:
                kept = [line for line in lines if not line.lower().startswith("connection:")]
                kept += ["Connection: close", "X-Forwarded-Proto: https", "X-Forwarded-Port: 443"]
                theirs, ours = await asyncio.open_connection("127.0.0.1", space_port)
                ours.write("\r\n".join([*kept, "", ""]).encode("latin-1"))
                sending = asyncio.ensure_future(pipe(reader, ours))
                await pipe(theirs, writer)
                sending.cancel()
                ours.close()
            await writer.drain()
        writer.close()

    server = loop.run_until_complete(asyncio.start_server(serve, "127.0.0.1", 0, ssl=context))
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    try:
        yield Hub(server.sockets[0].getsockname()[1])
    finally:
        for task in asyncio.all_tasks(loop):
            loop.call_soon_threadsafe(task.cancel)
        loop.call_soon_threadsafe(loop.call_later, 0.1, loop.stop)
        thread.join(timeout=10)


async def pipe(source: asyncio.StreamReader, target: asyncio.StreamWriter) -> None:
    with contextlib.suppress(OSError):
        while data := await source.read(1 << 16):
            target.write(data)
            await target.drain()
