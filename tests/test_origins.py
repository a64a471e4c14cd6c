"""Requests of other sites' pages, and to names that are not this server's."""

from __future__ import annotations

import asyncio
import json
import re
import socket
from collections.abc import Iterator

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from live_server import Live, ask, assistant_of, get, live, post

import app
import serve
from api.door import guarded
from api.origins import Allowed, OriginGuard, is_loopback, netloc_of, origin_of
from api.server import listening_socket
from errors import PhiSightError

KEY = "secret"
FRIEND = "https://friend.example"


async def page(scope, receive, send) -> None:
    """Stands for the web app: it takes everything, and invites everybody."""
    headers = [
        (b"Access-Control-Allow-Origin", b"*"),
        (b"access-control-allow-credentials", b"true"),
    ]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": b"the app"})


@pytest.fixture(scope="module")
def server() -> Iterator[Live]:
    assistant = assistant_of()
    with live(assistant, rest=page) as running:
        yield running
    assistant.close()


def allowed(*flags: str, host: str = "127.0.0.1") -> Allowed:
    options = app.parse(["--host", host, *flags])
    with listening_socket(host, 0) as bound:
        return Allowed.of(
            bound, options.host, options.allow_host, options.allow_origin, options.allow_frame
        )


@pytest.fixture(scope="module")
def open_to_a_friend() -> Iterator[Live]:
    assistant = assistant_of()
    door = allowed("--allow-origin", FRIEND + "/", "--allow-host", "Chat.Example.")
    with live(assistant, key=KEY, rest=page, allowed=door) as running:
        yield running
    assistant.close()


def with_host(request: bytes, *hosts: str) -> bytes:
    lines = "".join(f"Host: {host}\r\n" for host in hosts).encode()
    return request.replace(b"Host: localhost\r\n", lines, 1)


def code_of(answer: tuple[int, dict[str, str], bytes]) -> tuple[int, str]:
    return answer[0], json.loads(answer[2])["error"]["code"]


# -- hosts ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("host", [
    "localhost", "LOCALHOST", "localhost.", "localhost:9", "127.0.0.1:65535", "127.9.9.9",
    "[::1]", "[::1]:80", "[0:0:0:0:0:0:0:1]", "[::ffff:127.0.0.1]", "phisight.localhost",
])  # fmt: skip
def test_every_way_to_write_this_machine_is_served(server, host):
    assert server.exchange(with_host(get("/v1/models"), host))[0] == 200


@pytest.mark.parametrize("host", [
    "evil.example", "evil.example:80", "localhost.evil.example", "127.0.0.1.evil.example",
    "notlocalhost", "192.0.2.1", "[2001:db8::1]", "0.0.0.0", "127.0.0.1.", "127.1",
])  # fmt: skip
@pytest.mark.parametrize("request_", [get("/v1/models"), get("/config"), get("/"), post(ask())])
def test_another_name_is_not_served_though_it_points_here(server, host, request_):
    if host == "127.0.0.1.":  # as browsers do, it is taken for the address
        assert server.exchange(with_host(request_, host))[0] == 200
    else:
        assert code_of(server.exchange(with_host(request_, host))) == (403, "host_not_allowed")


@pytest.mark.parametrize("hosts", [
    (), ("",), ("localhost", "evil.example"), ("localhost, evil.example",), ("a b",),
    ("user@localhost",), ("localhost:",), ("localhost:99999",), ("localhost:x",), ("[::1",),
    ("[evil.example]",),
    ("http://localhost",), ("localhost/x",), (".",), ("a..b",),
])  # fmt: skip
def test_what_names_no_host_is_a_400(server, hosts):
    status, _, body = server.exchange(with_host(get("/v1/models"), *hosts))
    assert status == 400 and json.loads(body)["error"]["code"] in ("invalid_host", "invalid_http")
    old = with_host(get("/v1/models"), *hosts).replace(b"HTTP/1.1", b"HTTP/1.0")
    assert server.exchange(old)[0] == 400


def test_a_whole_address_in_the_request_line_is_not_another_host(server):
    request = get("http://evil.example/v1/models")
    assert server.exchange(request)[0] == 400


def test_health_is_for_everybody(server):
    assert server.exchange(with_host(get("/health"), "evil.example"))[0] == 200
    assert server.exchange(get("/health", "Origin: https://evil.example"))[0] == 200


def test_other_machines_use_an_address_or_a_name_that_was_given():
    everywhere = allowed(host="0.0.0.0")
    assert everywhere.serves("192.0.2.1") and everywhere.serves("2001:db8::1")
    assert everywhere.serves(netloc_of(socket.gethostname()).host) and everywhere.serves(
        "localhost"
    )
    assert not everywhere.serves("evil.example")
    assert allowed("--allow-host", "*").serves("evil.example")


@pytest.mark.parametrize(("flag", "value"), [
    ("--allow-host", "http://a.example"), ("--allow-host", "a.example:80"), ("--allow-host", ""),
    ("--allow-origin", "a.example"), ("--allow-origin", "ftp://a.example"),
    ("--allow-origin", "https://a.example/path"), ("--allow-origin", ""),
    ("--allow-frame", "a.example"), ("--allow-frame", "*"), ("--allow-frame", "null"),
    ("--allow-frame", "https://a.example; script-src *"), ("--allow-frame", ""),
])  # fmt: skip
def test_flags_that_name_nothing_are_one_line(flag, value):
    with pytest.raises(PhiSightError, match=re.escape(f"{flag} {value}: is not")):
        allowed(flag, value)


# -- origins --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("host", "origin"), [
    ("localhost:8000", "http://localhost:8000"), ("LocalHost:8000", "HTTP://LOCALHOST:8000"),
    ("localhost.:8000", "http://localhost:8000"), ("localhost", "http://localhost"),
    ("localhost", "https://localhost"), ("localhost:80", "http://localhost"),
    ("localhost:443", "https://localhost"), ("[::1]:8000", "http://[::1]:8000"),
    ("[0::1]:8000", "http://[::1]:8000"),
])  # fmt: skip
def test_the_servers_own_page_may_ask(server, host, origin):
    request = with_host(post(ask(), f"Origin: {origin}"), host)
    assert server.exchange(request)[0] == 200


FOREIGN = [
    "https://evil.example", "null", "", "http://localhost", "http://localhost:8001",
    "localhost:8000",
    "http://127.0.0.1:8000", "http://localhost.evil.example:8000", "https://localhost:8000/",
    "file://", "chrome-extension://abc", "http://localhost:8000, https://evil.example",
    "http://evil.example@localhost:8000", "http://[::1]:8000",
]  # fmt: skip


@pytest.mark.parametrize("origin", FOREIGN)
@pytest.mark.parametrize("request_", [
    get("/config"), get("/v1/models"), get("/metrics"), get("/"), post(ask()),
    post(ask()).replace(b"/v1/chat/completions", b"/gradio_api/upload", 1),
    get("/gradio_api/queue/join", method="OPTIONS"),
])  # fmt: skip
def test_a_page_of_another_origin_may_not(server, origin, request_):
    lines = f"Host: localhost:8000\r\nOrigin: {origin}\r\n".encode()
    answer = server.exchange(request_.replace(b"Host: localhost\r\n", lines, 1))
    assert code_of(answer) == (403, "origin_not_allowed")
    assert not any(name.startswith("access-control-") for name in answer[1])


def test_two_origins_are_none(server):
    headers = ("Origin: http://localhost", "Origin: https://evil.example")
    assert code_of(server.exchange(get("/config", *headers))) == (403, "origin_not_allowed")


@pytest.mark.parametrize("site", ["cross-site", "same-site", "Cross-Site"])
def test_what_a_page_asks_for_without_naming_itself_is_refused_but_links_are_followed(server, site):
    """A picture, a script or a form that reads has no Origin."""
    sent = f"Sec-Fetch-Site: {site}"
    for mode, dest in (("no-cors", "image"), ("no-cors", "script"), ("navigate", "iframe")):
        headers = (sent, f"Sec-Fetch-Mode: {mode}", f"Sec-Fetch-Dest: {dest}")
        assert code_of(server.exchange(get("/x", *headers))) == (403, "origin_not_allowed")
    follows = (sent, "Sec-Fetch-Mode: navigate", "Sec-Fetch-Dest: document")
    assert b"the app" in server.exchange(get("/", *follows))[2]
    assert server.exchange(post(ask(), *follows))[0] == 403
    for own in ("same-origin", "none"):
        assert server.exchange(get("/", f"Sec-Fetch-Site: {own}"))[0] == 200


@pytest.mark.parametrize(("given", "written"), [
    ("https://a.example/", "https://a.example"), ("HTTPS://A.example:443", "https://a.example"),
    ("http://[::1]:8000", "http://[::1]:8000"), ("http://a.example:8080", "http://a.example:8080"),
])  # fmt: skip
def test_a_site_that_may_show_the_app_is_written_as_browsers_read_it(given, written):
    assert allowed("--allow-frame", given).frames == (written,)


def test_what_the_application_says_of_other_origins_is_left_out(server):
    answer = server.exchange(get("/config", "Origin: http://localhost"))
    assert answer[0] == 200 and not any(name.startswith("access-control-") for name in answer[1])


def test_refusals_are_counted(server):
    before = server.api.measures.errors["origin_not_allowed"]
    server.exchange(get("/config", "Origin: null"))
    assert server.api.measures.errors["origin_not_allowed"] == before + 1


# -- an origin that is allowed --------------------------------------------------------------------


def test_a_friends_page_asks_first_without_the_key_and_then_with_it(open_to_a_friend):
    asks_first = get(
        "/v1/chat/completions",
        f"Origin: {FRIEND}",
        "Access-Control-Request-Method: POST",
        "Access-Control-Request-Headers: authorization, content-type",
        "Access-Control-Request-Private-Network: true",
        method="OPTIONS",
    )
    status, headers, body = open_to_a_friend.exchange(asks_first)
    assert (status, body) == (204, b"")
    assert headers["access-control-allow-origin"] == FRIEND
    assert headers["access-control-allow-headers"] == "authorization, content-type"
    assert "POST" in headers["access-control-allow-methods"]
    assert headers["access-control-allow-private-network"] == "true"
    own = (f"Origin: {FRIEND.upper()}:443", f"Authorization: Bearer {KEY}")
    status, headers, _ = open_to_a_friend.exchange(post(ask(), *own))
    assert status == 200 and headers["access-control-allow-origin"] == own[0][8:]
    assert headers["vary"] == "Origin" and "access-control-allow-credentials" not in headers
    status, headers, _ = open_to_a_friend.exchange(post(ask(), f"Origin: {FRIEND}"))
    assert status == 401 and headers["access-control-allow-origin"] == FRIEND  # it can read why


@pytest.mark.parametrize(
    "origin", ["http://friend.example", FRIEND + ":444", "https://a.friend.example"]
)
def test_who_is_like_a_friend_is_none(open_to_a_friend, origin):
    own = (f"Origin: {origin}", f"Authorization: Bearer {KEY}")
    assert code_of(open_to_a_friend.exchange(post(ask(), *own))) == (403, "origin_not_allowed")


def test_a_name_that_was_given_is_served(open_to_a_friend):
    request = get("/v1/models", f"Authorization: Bearer {KEY}")
    assert open_to_a_friend.exchange(with_host(request, "chat.example:8443"))[0] == 200


def test_any_origin_may_be_allowed():
    everybody = allowed("--allow-origin", "*")
    assert everybody.shares("https://evil.example") and everybody.shares("null")
    assert allowed("--allow-origin", "null").shares("null") and not allowed().shares("null")


def test_a_web_socket_is_held_to_the_same(server):
    """uvicorn is told to take none here; the guard does not rely on it."""
    told: list[str] = []

    async def send(message) -> None:
        told.append(message["type"])

    async def connect(*headers: tuple[bytes, bytes]) -> list[str]:
        told.clear()
        scope = {"type": "websocket", "path": "/x", "headers": [(b"host", b"localhost"), *headers]}

        async def inner(scope, receive, send) -> None:
            await send({"type": "websocket.accept"})

        await OriginGuard(inner, Allowed(), server.api.measures)(scope, None, send)
        return list(told)

    assert asyncio.run(connect()) == ["websocket.accept"]
    assert asyncio.run(connect((b"origin", b"http://localhost"))) == ["websocket.accept"]
    assert asyncio.run(connect((b"origin", b"https://evil.example"))) == ["websocket.close"]


# -- parsing --------------------------------------------------------------------------------------


@given(st.text(st.characters(max_codepoint=255), max_size=30))
def test_whatever_a_header_holds_is_parsed_or_refused(text):
    netloc, origin = netloc_of(text), origin_of(text)
    if netloc is not None:
        again = netloc_of(f"[{netloc.host}]" if ":" in netloc.host else netloc.host)
        assert again is not None and again.host == netloc.host
    assert origin is None or origin.netloc.port is not None


@given(st.ip_addresses())
def test_an_address_is_loopback_exactly_when_it_is(address):
    host = netloc_of(f"[{address}]" if address.version == 6 else str(address)).host
    mapped = getattr(address, "ipv4_mapped", None)
    assert is_loopback(host) == (mapped or address).is_loopback


# -- the commands ---------------------------------------------------------------------------------


@pytest.mark.parametrize("command", [app, serve])
@pytest.mark.parametrize("host", ["0.0.0.0", "::"])
def test_no_command_serves_other_machines_without_a_key(command, host, monkeypatch):
    monkeypatch.delenv("PHISIGHT_API_KEY", raising=False)
    monkeypatch.setattr(command, "load_assistant", lambda _: pytest.fail("loaded"))
    with pytest.raises(PhiSightError, match="set PHISIGHT_API_KEY, or add --without-key"):
        command.main(["--host", host, "--port", "0"])


def test_the_app_asks_for_the_key_as_a_password():
    transport = httpx.ASGITransport(guarded(page, KEY, Allowed()))

    async def status(**settings) -> httpx.Response:
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            return await client.get("/config", **settings)

    refused = asyncio.run(status())
    assert refused.status_code == 401
    assert refused.headers["www-authenticate"] == 'Basic realm="PhiSight"'
    assert asyncio.run(status(auth=("anybody", KEY))).text == "the app"
    foreign = asyncio.run(status(auth=("anybody", KEY), headers={"Origin": "https://evil.example"}))
    assert foreign.status_code == 403
