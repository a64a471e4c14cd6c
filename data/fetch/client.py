"""One file over HTTP: gone on with where it broke off, bounded in time and bytes, and asked for as
the server wishes.

What a server says is not believed: lengths are counted, parts must fit to what has come, pages in
the place of a file are found by the caller's check. All connections of a client share one pace, so
that a server that asks for a pause gets it from all of them.
"""

from __future__ import annotations

import asyncio
import random
import re
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from pathlib import Path
from types import TracebackType

import httpx

from data.fetch.parts import Part
from errors import PhiSightError, printable
from hub import first_line

USER_AGENT = "PhiSight/0.1 (python -m data.fetch)"
REDIRECTS = 5
OK, PARTIAL, RANGE_NOT_SATISFIABLE = 200, 206, 416
BUSY = (429, 503)  # all connections wait, not only the one that was told
PASSING = (408, 425, *BUSY, 500, 502, 504)  # another try may be answered otherwise
SPOILED_TRIES = 2  # of a file that comes whole and is wrong: it will hardly change
VALIDATOR_LENGTH = 200  # characters
_STRONG_TAG = re.compile(r'"[\x21\x23-\x7e]*"')  # a weak one, W/"...", does not tell bytes apart
_RANGE = re.compile(r"bytes ([0-9]{1,19})-([0-9]{1,19})/([0-9]{1,19})")
_COUNT = re.compile(r"[0-9]{1,19}")


class NotFetched(Exception):
    """A file could not be had; the text says why."""


class _Failed(Exception):
    """A try that failed where another may not."""

    def __init__(self, reason: str, busy: bool = False, wait: float = 0.0) -> None:
        super().__init__(reason)
        self.busy, self.wait = busy, wait


@dataclass(frozen=True)
class Patience:
    """How long a server is waited for, in seconds, and how often a file is asked for."""

    tries: int = 5
    connect: float = 20.0
    stall: float = 30.0
    """between two pieces of an answer"""
    answer: float = 90.0
    """for an answer to begin, redirects included; also what each file may take beyond its size"""
    slowest: float = 20_000.0
    """bytes a second, from the beginning of an answer to its end"""
    back_off: float = 1.0
    """before the second try; twice as long before each further one, give or take a half"""
    longest_back_off: float = 60.0
    longest_wait: float = 600.0
    """that a server can ask for"""


class Pace:
    """What all connections keep to: the pauses that the server asks for, and the rate."""

    def __init__(self, bytes_per_second: float = 0.0) -> None:
        self._rate = bytes_per_second
        self._resume = self._next = 0.0

    def pause(self, seconds: float) -> None:
        """Nobody asks for anything for so long."""
        self._resume = max(self._resume, time.monotonic() + seconds)

    async def turn(self) -> None:
        """Wait until asking is allowed."""
        while (left := self._resume - time.monotonic()) > 0:
            await asyncio.sleep(left)

    async def passed(self, count: int) -> None:
        """So many bytes have come: wait as long as they take at the rate."""
        if self._rate:
            now = time.monotonic()
            self._next = max(self._next, now) + count / self._rate
            await asyncio.sleep(self._next - now)


class Client:
    """Asks for files, over at most so many connections at once. To be used in `async with`."""

    def __init__(
        self,
        connections: int = 1,
        bytes_per_second: float = 0.0,
        patience: Patience = Patience(),
    ) -> None:
        """`bytes_per_second`: of all connections together; 0 for no bound."""
        self._patience, self._pace = patience, Pace(bytes_per_second)
        share = bytes_per_second / connections / 2 if bytes_per_second else patience.slowest
        self._slowest = min(patience.slowest, share)
        self._http = httpx.AsyncClient(
            headers={"User-Agent": USER_AGENT, "Accept-Encoding": "identity"},
            timeout=httpx.Timeout(patience.stall, connect=patience.connect, pool=None),
            limits=httpx.Limits(max_connections=connections, max_keepalive_connections=connections),
        )

    async def __aenter__(self) -> Client:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self._http.aclose()

    async def fetch(
        self,
        url: str,
        part: Part,
        limit: int,
        problem_of: Callable[[Path], str],
        told: Callable[[int], object] = lambda length: None,
    ) -> None:
        """Get a file into `part`, whole and without a problem.

        Args:
            limit: bytes that it may have.
            problem_of: what is wrong with a file that came whole, or ""; called in a thread.
            told: is told how many bytes have come.

        Raises:
            NotFetched: if it cannot be had; `part` keeps what can be gone on with.
            PhiSightError: if the server asks to be left alone for long.
            OSError: of the disk.
        """
        spoiled = 0
        try:
            for number in range(1, self._patience.tries + 1):
                await self._pace.turn()
                try:
                    await self._receive(url, part, limit, told)
                    if not (problem := await asyncio.to_thread(problem_of, part.path)):
                        return
                    part.clear()
                    spoiled += 1
                    failed = _Failed(problem)
                except _Failed as error:
                    failed = error
                except (TimeoutError, httpx.TransportError) as error:
                    failed = _Failed(self._in_words(error))
                if spoiled == SPOILED_TRIES:
                    break
                await self._wait(url, failed, number)
            raise NotFetched(f"{failed} (try {number} of {self._patience.tries})")
        finally:
            part.keep()

    async def _wait(self, url: str, failed: _Failed, number: int) -> None:
        """Between two tries, and behind the last for the sake of others if the server is busy."""
        patience = self._patience
        if failed.wait > patience.longest_wait:
            raise PhiSightError(
                f"{httpx.URL(url).host}: asks for a pause of {failed.wait:,.0f} seconds; run again"
                " then: what is whole is kept"
            )
        pause = min(patience.longest_back_off, patience.back_off * 2.0 ** (number - 1))
        pause = max(failed.wait, pause * random.uniform(0.5, 1.5))
        if failed.busy:
            self._pace.pause(pause)
        elif number < patience.tries:
            await asyncio.sleep(pause)

    async def _receive(
        self, url: str, part: Part, limit: int, told: Callable[[int], object]
    ) -> None:
        """One try: what comes goes into the part. Returns if all came, as far as is known."""
        headers = {}
        if part.can_go_on:
            headers = {"Range": f"bytes={part.length}-", "If-Range": part.validator}
        async with asyncio.timeout(self._patience.answer) as clock:
            async with self._answer(url, headers) as response:
                _begin(response, part, limit, is_part=bool(headers))
                most = limit if part.size is None else part.size
                seconds = self._patience.answer + (most - part.length) / self._slowest
                clock.reschedule(asyncio.get_running_loop().time() + seconds)
                async for piece in response.aiter_raw():
                    if part.length + len(piece) > most:
                        part.clear()
                        raise NotFetched(f"has more than {most:,} bytes")
                    part.append(piece)
                    told(part.length)
                    await self._pace.passed(len(piece))
        part.close()
        if part.size is not None and part.length < part.size:
            raise _Failed(f"ended after {part.length:,} of {part.size:,} bytes")
        if part.length == 0:
            raise _Failed("the server gives an empty file")

    @asynccontextmanager
    async def _answer(self, url: str, headers: dict[str, str]) -> AsyncIterator[httpx.Response]:
        """The answer to a GET, behind the redirects, its body not read."""
        request = self._http.build_request("GET", url, headers=headers)
        for _ in range(REDIRECTS + 1):
            response = await self._http.send(request, stream=True)
            try:
                if response.next_request is None:
                    yield response
                    return
                _check_redirect(request.url, response.next_request.url)
                request = response.next_request
            finally:
                await response.aclose()
        raise NotFetched(f"is redirected more than {REDIRECTS} times")

    def _in_words(self, error: Exception) -> str:
        if isinstance(error, httpx.ConnectTimeout):
            return f"no connection for {self._patience.connect:g} seconds"
        if isinstance(error, httpx.TimeoutException):
            return f"nothing came for {self._patience.stall:g} seconds"
        if isinstance(error, TimeoutError):
            return "came too slowly"
        return f"the connection broke: {first_line(error)}"


def _check_redirect(origin: httpx.URL, target: httpx.URL) -> None:
    """Refuse one to anything but the web, or from a connection that is proven to an open one."""
    if target.scheme not in ("http", "https") or not target.host:
        raise NotFetched(f"is redirected to {printable(target, 100)}, which is no web address")
    if origin.scheme == "https" and target.scheme == "http":
        raise NotFetched("is redirected from https to http")


def _begin(response: httpx.Response, part: Part, limit: int, is_part: bool) -> None:
    """Judge the head of an answer, and make the part ready for its body.

    `is_part`: whether the rest alone was asked for.
    """
    status, headers = response.status_code, response.headers
    if status in PASSING:
        wait = seconds_to_wait(headers.get("retry-after", ""), datetime.now(UTC))
        raise _Failed(f"the server answers with status {status}", status in BUSY, wait or 0.0)
    if status == RANGE_NOT_SATISFIABLE and is_part:
        part.clear()
        raise _Failed("the server has no more of it than came before")
    if status not in (OK, PARTIAL):
        raise NotFetched(f"the server answers with status {status}")
    if (coding := headers.get("content-encoding", "identity").strip().lower()) != "identity":
        raise NotFetched(f"comes packed as {printable(coding, 30)}, which was not asked for")
    validator = validator_of(headers)
    if status == PARTIAL:
        same = not validator or validator == part.validator
        rest = (part.length, part.size)
        if not is_part or not same or range_of(headers.get("content-range", "")) != rest:
            part.clear()
            raise _Failed("it changed on the server between two tries")
        return
    given = headers.get("content-length", "")
    length = int(given) if _COUNT.fullmatch(given) else None
    if length is not None and length > limit:
        raise NotFetched(f"has {length:,} bytes, over the limit of {limit:,}")
    part.begin(length, validator)


def validator_of(headers: httpx.Headers) -> str:
    """What names this version of a file in If-Range: a strong ETag, else Last-Modified, else ""."""
    tag, date = headers.get("etag", ""), headers.get("last-modified", "")
    if _STRONG_TAG.fullmatch(tag) and len(tag) <= VALIDATOR_LENGTH:
        return tag
    return date if _date(date) and len(date) <= VALIDATOR_LENGTH else ""


def range_of(text: str) -> tuple[int, int] | None:
    """(first byte, bytes of the whole) by a Content-Range that goes to the end; else None."""
    match = _RANGE.fullmatch(text)
    if not match:
        return None
    first, last, whole = map(int, match.groups())
    return (first, whole) if first <= last == whole - 1 else None


def seconds_to_wait(retry_after: str, now: datetime) -> float | None:
    """What Retry-After asks for, in seconds or as a date; None for neither."""
    if _COUNT.fullmatch(retry_after):
        return float(retry_after)
    date = _date(retry_after)
    return None if date is None else max(0.0, (date - now).total_seconds())


def _date(text: str) -> datetime | None:
    """An HTTP date, with its time zone; None for anything else."""
    if not text.isascii() or not text.isprintable():
        return None
    try:
        date = parsedate_to_datetime(text)
        return date if date.tzinfo else date.replace(tzinfo=UTC)
    except (ValueError, TypeError, IndexError, OverflowError):
        return None
