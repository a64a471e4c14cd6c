"""What programs send to the web app and leave: uploads cut off, streams that nobody reads, bodies
that are not right."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest
import runs
from fastapi import APIRouter
from live_server import wait_until
from pages import Site, pictures, served
from test_app_guards import KEY, assert_refusal

from api import logs
from errors import PhiSightError
from web.errors import NotThere, RequestError
from web.model import Model
from web.replies import event_stream, from_thread
from web.start import routes as start
from web.temporary import UPLOADS, Uploads, own_folder


class Source:
    """Stands for a model: gives one thing after the other in a thread, for as long as it is let."""

    def __init__(self) -> None:
        self.given = self.begun = self.ended = 0
        self.blocked = threading.Event()
        """holds it up when it is set, as a long prompt would"""
        self.fault: BaseException | None = None
        self.padding = ""

    def items(self, left: Callable[[], bool]) -> Iterator[int]:
        self.begun += 1
        try:
            for number in range(100_000):
                while self.blocked.is_set() and not left():
                    time.sleep(0.005)
                if left():
                    return
                if self.fault is not None and number == 3:
                    raise self.fault
                self.given += 1
                time.sleep(0.001)
                yield number
        finally:
            self.ended += 1


SOURCE = Source()
BEFORE: list[Path] = []  # uploads that lay there when a test began


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Iterator[Site]:
    """The app with one more route, whose answer is a stream."""

    def router(site) -> APIRouter:
        routes = usual(site)

        @routes.post("/endless")
        async def endless():
            async def events():
                async for number in from_thread(SOURCE.items):
                    yield (
                        "number",
                        (
                            {"number": number, "x": SOURCE.padding}
                            if SOURCE.padding
                            else {"number": number}
                        ),
                    )

            return event_stream(events(), "endless")

        return routes

    usual = start.router
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(start, "router", router)
        folder = tmp_path_factory.mktemp("conversations")
        with served(Model(), folder, runs.finished_run().parent) as site:
            yield site


@pytest.fixture(autouse=True)
def fresh_source() -> Iterator[None]:
    SOURCE.__init__()
    BEFORE[:] = files()
    logs.forget()
    yield
    SOURCE.blocked.clear()
    wait_until(lambda: SOURCE.begun == SOURCE.ended)


def files() -> list[Path]:
    return [path for path in (own_folder() / UPLOADS).rglob("*") if path.is_file()]


def uploaded() -> list[Path]:
    """What was uploaded since the test began: other tests of this process leave theirs."""
    return [path for path in files() if path not in BEFORE]


def parts() -> list[Path]:
    return [path for path in uploaded() if path.suffix == ".part"]


# -- uploads --------------------------------------------------------------------------------------


def half_an_upload(site: Site, length: int = 10_000_000) -> socket.socket:
    host, _, port = site.url.removeprefix("http://").partition(":")
    head = (
        f"POST /app/uploads?name=a.png HTTP/1.1\r\nHost: {host}\r\nContent-Length: {length}\r\n"
        f"X-Browser-Key: {KEY['X-Browser-Key']}\r\n\r\n"
    ).encode()
    connection = socket.create_connection((host, int(port)), timeout=60)
    connection.sendall(head + bytes(2_000_000))
    return connection


def upload(site: Site, data: bytes, name: str = "a.png") -> httpx.Response:
    return httpx.post(
        f"{site.url}/app/uploads", params={"name": name}, content=data, headers=KEY, timeout=60
    )


def test_an_upload_that_is_cut_off_leaves_nothing(site):
    connections = [half_an_upload(site) for _ in range(3)]
    wait_until(lambda: len(parts()) == 3)
    whole = upload(site, pictures(1)[0].read_bytes())
    assert whole.status_code == 200 and len(parts()) == 3
    for connection in connections:
        connection.close()
    wait_until(lambda: not parts())
    assert [path.name for path in uploaded()] == ["a.png"]
    httpx.delete(f"{site.url}/app/uploads/{whole.json()['id']}", headers=KEY)
    wait_until(lambda: not uploaded())


def test_uploads_beyond_the_limit_are_refused_in_one_line(site, monkeypatch):
    def full(self: Uploads, count: int) -> None:
        raise PhiSightError("uploads take 2048 of 2048 MB; try again later")

    monkeypatch.setattr(Uploads, "take", full)
    sent = upload(site, bytes(5_000_000))
    assert sent.status_code == 400 and "uploads take" in assert_refusal(sent.content)["text"]
    assert uploaded() == []


def test_many_uploads_at_once_are_each_whole(site):
    data = [path.read_bytes() for path in pictures(12)]
    with contextlib.ExitStack() as stack:
        import concurrent.futures

        threads = stack.enter_context(concurrent.futures.ThreadPoolExecutor(12))
        sent = list(threads.map(lambda one: upload(site, one), data))
    for answer, one in zip(sent, data, strict=True):
        path = f"{site.url}/app/uploads/{answer.json()['id']}"
        assert httpx.get(path, headers=KEY).content == one
        httpx.delete(path, headers=KEY)
    assert uploaded() == []


# -- streams --------------------------------------------------------------------------------------


@contextlib.contextmanager
def reading(site: Site) -> Iterator[Iterator[str]]:
    with httpx.stream("POST", f"{site.url}/app/endless", json={}, timeout=60) as stream:
        assert stream.headers["content-type"].startswith("text/event-stream")
        assert "content-security-policy" in stream.headers
        yield stream.iter_lines()


def test_a_reader_who_leaves_ends_the_work(site):
    with reading(site) as lines:
        assert next(lines) == "event: number" and next(lines) == 'data: {"number": 0}'
    wait_until(lambda: SOURCE.ended == 1)


def test_a_reader_who_leaves_while_the_work_is_silent_ends_it_too(site):
    SOURCE.blocked.set()
    with reading(site):
        wait_until(lambda: SOURCE.begun == 1)
    wait_until(lambda: SOURCE.ended == 1)
    assert SOURCE.given == 0 and SOURCE.blocked.is_set()


def test_a_reader_who_is_slow_holds_the_work_up(site):
    SOURCE.padding = "x" * 1_000_000
    with reading(site) as lines:
        next(lines)
        given = -1
        while given != SOURCE.given:  # the sockets between them take a while to be full
            given = SOURCE.given
            time.sleep(0.3)
        assert SOURCE.ended == 0
    wait_until(lambda: SOURCE.ended == 1)


@pytest.mark.parametrize(
    ("fault", "told"),
    [
        (RequestError("bad_seed"), {"key": "bad_seed", "values": {}, "text": None}),
        (NotThere("upload_gone"), {"key": "upload_gone", "values": {}, "text": None}),
        (PhiSightError("a: b\nc"), {"key": None, "values": {}, "text": "a: b c"}),
        (RuntimeError("secret"), {"key": "server_failed", "values": {}, "text": None}),
        (SystemExit("secret"), {"key": "server_failed", "values": {}, "text": None}),
    ],
)
def test_what_fails_on_the_way_is_the_last_event(site, fault, told, caplog):
    SOURCE.fault = fault
    with reading(site) as lines:
        said = list(lines)
    assert said[-3:-1] == ["event: error", f"data: {json.dumps({'error': told})}"]
    assert said.count("event: number") == 3
    own = [one.getMessage() for one in caplog.records if "secret" in one.getMessage()]
    assert len(own) == (told["key"] == "server_failed")
    assert "Traceback" not in caplog.text


def test_readers_who_come_and_go_leave_no_thread(site):
    def threads() -> int:
        return sum(thread.name == "page" for thread in threading.enumerate())

    wait_until(lambda: threads() == 0)
    for _ in range(20):
        with reading(site) as lines:
            next(lines)
    SOURCE.blocked.set()
    for _ in range(5):
        with reading(site):
            pass
    wait_until(lambda: threads() == 0)


def test_a_stream_that_is_dropped_is_closed_without_the_collector():
    """As a response that is cancelled between two events is."""
    source = Source()

    async def one() -> None:
        async def events():
            async for number in from_thread(source.items):
                yield "number", number

        async def receive():
            await asyncio.sleep(0.05)
            return {"type": "http.disconnect"}

        async def send(message) -> None:
            if message.get("body"):
                await asyncio.sleep(3600)  # the reader takes nothing more

        scope = {"type": "http", "asgi": {"spec_version": "2.3"}}
        kept = events()  # as a traceback keeps what it goes through
        await event_stream(kept, "x")(scope, receive, send)
        await asyncio.sleep(0.2)
        assert source.begun == source.ended == 1 and kept is not None

    gc.disable()
    try:
        asyncio.run(one())
    finally:
        gc.enable()


def test_an_iterator_that_fails_to_begin_is_told():
    def make(left: Callable[[], bool]) -> Iterator[int]:
        raise PhiSightError("no model: gone; begin again")

    async def read() -> list[int]:
        return [item async for item in from_thread(make)]

    with pytest.raises(PhiSightError, match="no model"):
        asyncio.run(read())
    assert asyncio.run(all_of(lambda left: iter([1, 2, 3]))) == [1, 2, 3]


async def all_of(make) -> list[int]:
    return [item async for item in from_thread(make)]


# -- bodies that are not right --------------------------------------------------------------------

NOT_RIGHT = [
    b"", b"{", b"[]", b"null", b'"x"', b"[" * 100_000, b"\xff\xfe", b"\0", b"NaN", b"1e999",
    b"9" * 100_000, b'{"a": ' * 50_000, b'{"text": "\\ud800"}', b'{"version": 1e400}',
    b'{"__proto__": {}, "constructor": 1}', b'{"settings": null, "version": true}',
    b"\xef\xbb\xbf{}", b'{"a": 1}' * 2,
]  # fmt: skip
TYPES = ("application/json", "text/plain", "multipart/form-data; boundary=x", "x", "")


def test_bodies_that_are_not_right_neither_end_the_app_nor_fill_the_log(site, capfd, caplog):
    """To every route that takes one."""
    ways = [
        (method, path.replace("{", "").replace("}", ""))
        for path, methods in paths(site).items()
        for method in methods
        if method != "get" and "endless" not in path and path != "/app/uploads"
    ]
    assert ways
    with httpx.Client(base_url=site.url, headers=KEY, timeout=60) as client:
        for method, path in ways:
            for number, body in enumerate(NOT_RIGHT):
                kind = {"content-type": TYPES[number % len(TYPES) if number % 3 else 0]}
                sent = client.request(method, path, content=body, headers=kind)
                assert sent.status_code < 500, (method, path, body[:50], sent.text)
                if sent.status_code != 200:
                    assert_refusal(sent.content)
    said = capfd.readouterr().err
    assert "Traceback" not in said + caplog.text and len(said) < 20_000, said[-3000:]


def paths(site: Site) -> dict[str, dict]:
    """The routes of an app, by their path, as FastAPI describes them."""
    from web.app import build_site, web_application

    made = build_site(Model(), conversations=site.conversations, runs=runs.finished_run().parent)
    return web_application(made).openapi()["paths"]
