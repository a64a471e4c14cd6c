"""Which names a server answers to, and pages of which origins may ask it.

A browser lets a page of any site send requests to this machine, with the password that it
remembers; and a site whose name is made to point to this machine (DNS rebinding) may read the
answers too. So every request but `OPEN` has to name a host that is meant, and one that a page sends
has to come from the page of that same host, or of an origin that is named with --allow-origin. The
page itself is shown in a frame of another site's page only where that is named with --allow-frame.
Programs send neither Origin nor Sec-Fetch-Site, and are not concerned.
"""

from __future__ import annotations

import ipaddress
import re
import socket
from collections.abc import Sequence
from dataclasses import dataclass

from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from api.errors import ApiError
from api.guards import OPEN
from api.measures import Measures
from api.responses import error_response
from errors import PhiSightError

ANY = "*"
HOST = re.compile(r"(\[[0-9a-f:.]+\]|[a-z0-9._-]+)(?::([0-9]{1,5}))?", re.ASCII)
STANDARD = {"http": 80, "https": 443}
REMEMBERED_SECONDS = 600  # by a browser, of what it may send


@dataclass(frozen=True)
class Netloc:
    """Where something is served: a host as `normal` writes it, and its port if one is named."""

    host: str
    port: int | None


def netloc_of(text: str) -> Netloc | None:
    """From the value of a Host header, or the part of an origin behind its scheme; None if it is
    not one."""
    found = HOST.fullmatch(text.lower())
    if found is None or int(found[2] or 0) > 65535:
        return None
    host = found[1].removesuffix(".")
    try:
        address = ipaddress.ip_address(host.strip("[]"))
    except ValueError:
        if host.startswith("[") or not host or ".." in host:
            return None
    else:
        host = str(getattr(address, "ipv4_mapped", None) or address)
    return Netloc(host, int(found[2]) if found[2] else None)


@dataclass(frozen=True)
class Origin:
    scheme: str
    netloc: Netloc

    def __str__(self) -> str:
        host, port = self.netloc.host, self.netloc.port
        host = f"[{host}]" if ":" in host else host
        return f"{self.scheme}://{host}{'' if port == STANDARD[self.scheme] else f':{port}'}"

    def is_at(self, host: Netloc) -> bool:
        """Whether a page of this origin was served under a Host header."""
        standard = STANDARD.get(self.scheme)
        return self.netloc.host == host.host and (self.netloc.port or standard) == (
            host.port or standard
        )


def origin_of(text: str) -> Origin | None:
    """From the value of an Origin header; None for `null` and what is no origin of a web page."""
    scheme, separator, rest = text.strip().lower().partition("://")
    netloc = netloc_of(rest) if separator and scheme in STANDARD else None
    if netloc is None:
        return None
    return Origin(scheme, Netloc(netloc.host, netloc.port or STANDARD[scheme]))


def is_loopback(host: str) -> bool:
    """Whether a name or an address is this machine's own, for itself alone."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")


def is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


@dataclass(frozen=True)
class Allowed:
    """Hosts that are served and origins whose pages may ask; what is served to this machine alone
    if nothing else is said."""

    hosts: frozenset[str] = frozenset()
    """as in `Netloc`, besides this machine's own; `ANY` for every one"""
    addresses: bool = False
    """whether every numeric address is served: no name can be made to point to it"""
    origins: frozenset[Origin | str] = frozenset()
    """`ANY` for every one, and "null" for pages without an origin"""
    frames: tuple[str, ...] = ()
    """origins whose pages may show the app in a frame; browsers hold them to it"""

    @classmethod
    def of(
        cls,
        bound: socket.socket,
        host: str,
        hosts: Sequence[str],
        origins: Sequence[str],
        frames: Sequence[str] = (),
    ) -> Allowed:
        """What --host, --allow-host, --allow-origin and --allow-frame say. Raises PhiSightError."""
        local = is_loopback(bound.getsockname()[0])
        names = {host} if local else {host, socket.gethostname()}
        known = {netloc.host for name in names if (netloc := netloc_of(name)) is not None}
        for name in hosts:
            netloc = netloc_of(name)
            if name != ANY and (netloc is None or netloc.port is not None):
                raise PhiSightError(
                    f"--allow-host {name}: is not the name of a host; send one such as"
                    " chat.example.org, without scheme and port"
                )
            known.add(ANY if netloc is None else netloc.host)
        pages: set[Origin | str] = set()
        for text in origins:
            origin = origin_of(text.removesuffix("/"))
            if origin is None and text not in (ANY, "null"):
                raise PhiSightError(
                    f"--allow-origin {text}: is not an origin; give scheme and host,"
                    " such as https://chat.example.org or http://localhost:3000"
                )
            pages.add(text if origin is None else origin)
        sites = []
        for text in frames:
            origin = origin_of(text.removesuffix("/"))
            if origin is None:
                raise PhiSightError(
                    f"--allow-frame {text}: is not an origin; give scheme and host, such as"
                    " https://example.org"
                )
            sites.append(str(origin))
        return cls(frozenset(known), not local, frozenset(pages), tuple(sites))

    def serves(self, host: str) -> bool:
        if ANY in self.hosts or host in self.hosts or is_loopback(host):
            return True
        return self.addresses and is_address(host)

    def shares(self, origin: str) -> bool:
        """Whether pages of an origin that is not the server's own may ask, by their Origin."""
        return ANY in self.origins or (origin_of(origin) or origin) in self.origins


class OriginGuard:
    """Refuses requests to hosts that are not served here, and those of other sites' pages.

    Pages of the origins that are allowed get what browsers want to see for it (CORS), and an answer
    to the question that a browser asks before the request (preflight), for which it has no key.
    """

    def __init__(self, app: ASGIApp, allowed: Allowed, measures: Measures) -> None:
        self.app, self.allowed, self.measures = app, allowed, measures

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self.app(scope, receive, send)
            return
        headers: dict[bytes, list[str]] = {}
        for name, value in scope["headers"]:
            headers.setdefault(name, []).append(value.decode("latin-1"))
        try:
            origin = None if scope["path"] == OPEN else self._checked(scope, headers)
        except ApiError as error:
            await self._refuse(error, scope, receive, send)
            return
        if origin is None:
            await self.app(scope, receive, without_cors(send))
        elif scope["type"] == "http" and scope["method"] == "OPTIONS":
            await preflight(headers, origin)(scope, receive, send)
        else:
            await self.app(scope, receive, without_cors(send, origin))

    def _checked(self, scope: Scope, headers: dict[bytes, list[str]]) -> str | None:
        """The origin of another site's page that may ask; None for the server's own pages, and for
        programs. Raises `ApiError` of status 400 or 403."""
        hosts = headers.get(b"host", [])
        host = netloc_of(hosts[0]) if len(hosts) == 1 else None
        if host is None or not scope["path"].startswith("/"):
            raise ApiError(400, "Host: must name one host; send HTTP/1.1", "invalid_host")
        if not self.allowed.serves(host.host):
            reason = "is not served here; start the server with --allow-host"
            raise ApiError(403, f"Host: {host.host} {reason} {host.host}", "host_not_allowed")
        origins = headers.get(b"origin", [])
        if not origins:
            framed = bool(self.allowed.frames)
            if comes_from_another_page(scope, headers, framed) and ANY not in self.allowed.origins:
                raise refused_origin("another site")
            return None
        page = origin_of(origins[0])
        if len(origins) == 1 and page is not None and page.is_at(host):
            return None
        if len(origins) == 1 and self.allowed.shares(origins[0]):
            return origins[0]
        raise refused_origin(origins[0][:200])

    async def _refuse(self, error: ApiError, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":  # before it is accepted
            await send({"type": "websocket.close", "code": 1008})
            return
        self.measures.errors[error.code] += 1
        self.measures.requests["other", error.status] += 1
        await error_response(error)(scope, receive, send)


def refused_origin(page: str) -> ApiError:
    reason = "may not ask this server; start it with --allow-origin and its origin if it should"
    return ApiError(403, f"Origin: a page of {page} {reason}", "origin_not_allowed")


def comes_from_another_page(
    scope: Scope, headers: dict[bytes, list[str]], framed: bool = False
) -> bool:
    """Whether a browser says that another site's page sends this, without naming it: a picture or a
    script that it asks for. A link that a person follows is none; and where the page may be shown
    in a frame of another's (`framed`), neither is that, which the page's own policy is left to."""

    def said(name: bytes) -> str:
        return ", ".join(headers.get(b"sec-fetch-" + name, ())).strip().lower()

    shown = ("document", "iframe") if framed else ("document",)
    follows = said(b"mode") == "navigate" and said(b"dest") in shown
    reads = scope["type"] == "http" and scope["method"] in ("GET", "HEAD")
    return said(b"site") in ("cross-site", "same-site") and not (follows and reads)


def preflight(headers: dict[bytes, list[str]], origin: str) -> Response:
    answer = {
        "Access-Control-Allow-Origin": origin,
        "Access-Control-Allow-Methods": "GET, HEAD, POST, OPTIONS",
        "Access-Control-Max-Age": str(REMEMBERED_SECONDS),
        "Vary": "Origin, Access-Control-Request-Headers",
    }
    asked = ", ".join(headers.get(b"access-control-request-headers", ()))
    if asked:
        answer["Access-Control-Allow-Headers"] = asked
    if b"access-control-request-private-network" in headers:
        answer["Access-Control-Allow-Private-Network"] = "true"
    return Response(status_code=204, headers=answer)


def without_cors(send: Send, origin: str | None = None) -> Send:
    """Leaves out what an application says by itself about other origins, and says what holds."""

    async def sending(message: Message) -> None:
        if message["type"] == "http.response.start":
            kept = [
                (name, value)
                for name, value in message.get("headers", ())
                if not name.lower().startswith(b"access-control-")
            ]
            if origin is not None:
                kept += [
                    (b"access-control-allow-origin", origin.encode("latin-1")),
                    (b"access-control-expose-headers", b"*"),
                    (b"vary", b"Origin"),
                ]
            message["headers"] = kept
        await send(message)

    return sending
