"""A server of files on this machine, which can be told to answer wrongly: to drop a connection, to
stall, to lie about lengths, and so on. Real HTTP over real sockets.
"""

from __future__ import annotations

import hashlib
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

STALL_SECONDS = 60.0  # longer than any client of the tests waits
PIECE = 1 << 16

Answer = Callable[["Handler", bytes], None]
"""How to answer a request for a file of these bytes"""


@dataclass(frozen=True)
class Asked:
    """A request."""

    path: str
    range: str
    if_range: str
    agent: str
    client: tuple[str, int]
    """one connection has one"""
    at: float


class PictureServer(ThreadingHTTPServer):
    """The server and what it holds."""

    daemon_threads = True
    request_queue_size = 64

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files: dict[str, bytes] = {}
        """path -> bytes"""
        self.answers: dict[str, list[Answer]] = {}
        """path -> how its next requests are answered; the last of them again and again"""
        self.asked: list[Asked] = []
        self.ended = threading.Event()
        self.seconds_a_piece = 0.0

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def asked_for(self, path: str) -> list[Asked]:
        return [one for one in self.asked if one.path == path]

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that goes away is what some tests are about."""


@contextmanager
def running() -> Iterator[PictureServer]:
    server = PictureServer()
    thread = threading.Thread(
        target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True
    )
    thread.start()
    try:
        yield server
    finally:
        server.ended.set()
        server.shutdown()
        server.server_close()
        thread.join()


def tag_of(data: bytes) -> str:
    return f'"{hashlib.sha256(data).hexdigest()[:16]}"'


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: PictureServer

    def log_message(self, format: str, *arguments: object) -> None:
        """Nothing."""

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        named = ("Range", "If-Range", "User-Agent")
        said = [self.headers.get(name) or "" for name in named]
        self.server.asked.append(Asked(path, *said, self.client_address, time.monotonic()))
        answers = self.server.answers.get(path, [])
        answer = (answers.pop(0) if len(answers) > 1 else answers[0]) if answers else serve
        answer(self, self.server.files.get(path, b""))

    def begin(self, status: int, **headers: str | int) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()

    def write(self, data: bytes) -> None:
        for start in range(0, len(data), PIECE):
            self.wfile.write(data[start : start + PIECE])
            self.wfile.flush()
            self.server.ended.wait(self.server.seconds_a_piece)

    def hang_up(self) -> None:
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)


# -- answers --------------------------------------------------------------------------------------


def serve(handler: Handler, data: bytes) -> None:
    """As a server should."""
    if not data:
        return handler.begin(404, Content_Length=0)
    tag, asked = tag_of(data), handler.headers
    match = re.fullmatch(r"bytes=(\d+)-", asked.get("Range") or "")
    if not match or asked.get("If-Range") not in (None, tag):
        return whole(handler, data)
    first, size = int(match[1]), len(data)
    if first >= size:
        return handler.begin(416, Content_Length=0, Content_Range=f"bytes */{size}")
    said = f"bytes {first}-{size - 1}/{size}"
    handler.begin(206, Content_Length=size - first, Content_Range=said, ETag=tag)
    handler.write(data[first:])


def whole(handler: Handler, data: bytes) -> None:
    """Without a look at what part of it is asked for."""
    handler.begin(200, Content_Length=len(data), ETag=tag_of(data), Content_Type="image/jpeg")
    handler.write(data)


def drop(after: int) -> Answer:
    """Hang up after so many bytes."""

    def answer(handler: Handler, data: bytes) -> None:
        handler.begin(200, Content_Length=len(data), ETag=tag_of(data))
        handler.write(data[:after])
        handler.hang_up()

    return answer


def stall(after: int) -> Answer:
    """Say nothing more after so many bytes."""

    def answer(handler: Handler, data: bytes) -> None:
        handler.begin(200, Content_Length=len(data), ETag=tag_of(data))
        handler.write(data[:after])
        handler.server.ended.wait(STALL_SECONDS)
        handler.hang_up()

    return answer


def drip(handler: Handler, data: bytes) -> None:
    """A byte now and then, for ever: never silent, and never done."""
    handler.begin(200, Content_Length=len(data), ETag=tag_of(data))
    for place in range(len(data)):
        handler.wfile.write(data[place : place + 1])
        if handler.server.ended.wait(0.02):
            return


def drip_head(handler: Handler, data: bytes) -> None:
    """The same before the body begins."""
    handler.wfile.write(b"HTTP/1.1 200 OK\r\n")
    while not handler.server.ended.wait(0.02):
        handler.wfile.write(b"X-More: 1\r\n")


def says(length: int) -> Answer:
    """Send all, and say that it has another length."""

    def answer(handler: Handler, data: bytes) -> None:
        handler.begin(200, Content_Length=length, ETag=tag_of(data), Connection="close")
        handler.write(data)
        handler.hang_up()

    return answer


def status(number: int, **headers: str | int) -> Answer:
    def answer(handler: Handler, data: bytes) -> None:
        handler.begin(number, Content_Length=0, **headers)

    return answer


def sends(data: bytes, **headers: str | int) -> Answer:
    """Other bytes in place of the file's."""

    def answer(handler: Handler, _: bytes) -> None:
        handler.begin(200, Content_Length=len(data), **headers)
        handler.write(data)

    return answer


def part_of(other: bytes, tagged: bool = True) -> Answer:
    """The rest of other bytes, whatever version was asked for: as if nobody heeded If-Range."""

    def answer(handler: Handler, data: bytes) -> None:
        first = int(handler.headers["Range"].removeprefix("bytes=").removesuffix("-"))
        said = f"bytes {first}-{len(other) - 1}/{len(other)}"
        tag = {"ETag": tag_of(other)} if tagged else {}
        handler.begin(206, Content_Length=len(other) - first, Content_Range=said, **tag)
        handler.write(other[first:])

    return answer


def unending(handler: Handler, data: bytes) -> None:
    """Chunks without a length, 65 MB of them: more than anyone should take."""
    handler.begin(200, Transfer_Encoding="chunked")
    chunk = b"10000\r\n" + bytes(0x10000) + b"\r\n"
    for _ in range(1000):
        handler.wfile.write(chunk)
    handler.hang_up()
