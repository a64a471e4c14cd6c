"""What nobody may do to the web app, whatever a browser or another program sends to it."""

from __future__ import annotations

import json
import logging
import socket
import tempfile

import httpx
import pytest
import runs
from live_server import get, parsed_response
from pages import Site, chromium, served

from api import logs, page_guard
from errors import PhiSightError
from web.app import build_site, web_application
from web.errors import RequestError
from web.model import Model
from web.page import static_path
from web.settings import SettingsForm, parse_seed, settings_from
from web.texts import TEXTS

KEY = {"X-Browser-Key": "a" * 32}
SECRET = "a secret that no visitor may read"


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Site:
    """A page whose model never comes: nothing here asks for one."""
    folder = tmp_path_factory.mktemp("conversations")
    with served(Model(), folder, runs.finished_run().parent) as site:
        yield site


def exchange(site: Site, request: bytes) -> tuple[int, dict[str, str], bytes]:
    """Status, headers and body of the answer to raw bytes, which no client has made polite."""
    host, _, port = site.url.removeprefix("http://").partition(":")
    with socket.create_connection((host, int(port)), timeout=60) as connection:
        connection.sendall(request)
        answer = b""
        while part := connection.recv(65536):
            answer += part
    return parsed_response(answer)


def request(method: str, path: str, *headers: str, body: bytes = b"", length: bool = True) -> bytes:
    more = [f"Content-Length: {len(body)}"] if body and length else []
    return get(path, "Content-Type: application/json", *headers, *more, method=method) + body


def assert_refusal(body: bytes, site: Site | None = None) -> dict:
    """That a body is a refusal in the one form, in one line, and without details of the inside."""
    error = json.loads(body)["error"]
    assert error.keys() == {"key", "values", "text"}
    assert (error["key"] is None) != (error["text"] is None)
    assert error["key"] is None or error["key"] in TEXTS
    assert "\n" not in (error["text"] or "") and b"Traceback" not in body
    assert b"site-packages" not in body and str(runs.ROOT).encode() not in body
    return error


# -- files and addresses --------------------------------------------------------------------------


def test_no_file_of_the_server_can_be_read(site, tmp_path):
    file = tmp_path / "secret.txt"
    file.write_text(SECRET)
    for path in (file, runs.ROOT / "README.md", runs.ROOT / "web/page.py", "/etc/passwd"):
        for form in (
            f"/gradio_api/file={path}", f"/file={path}", f"/app/gradio_api/file={path}",
            f"/app/..{path}", f"/app/../gradio_api/file={path}", f"/static/..{path}",
            f"/static/..%2f..%2f..%2f..%2f..%2f..%2f..{path}", f"/static/{path}", f"/assets/{path}",
            f"/assets/../../../../../../../../..{path}", f"//{path}", f"/app/static{path}",
            f"/app/static/x/../../../../../../../..{path}", f"/app/examples{path}",
            f"/app/examples/..%2f..{path}", f"/app/uploads/..{path}", f"/app/texts/..{path}",
            f"/app/conversations/..{path}", f"/app/runs/..{path}", f"{path}",
        ):  # fmt: skip
            status, _, body = exchange(site, get(form, "X-Browser-Key: " + "a" * 32))
            assert status in (400, 403, 404, 405, 409, 422), form
            assert SECRET.encode() not in body and b"root:" not in body and b"import" not in body


def test_what_names_the_pages_files_gives_no_others(site):
    at = static_path()
    whole = httpx.get(f"{site.url}/{at}/main.js")
    assert whole.status_code == 200 and "immutable" in whole.headers["cache-control"]
    for path in ("../page.py", "..%2fpage.py", "%2e%2e/page.py", "/etc/passwd", "//etc/passwd", ""):
        status, headers, body = exchange(site, get(f"/{at}/{path}"))
        assert status == 404 and headers["cache-control"] == "no-store", path
        assert_refusal(body)


GRADIO = (
    "gradio_api/queue/join", "gradio_api/queue/data", "gradio_api/upload", "gradio_api/run/x",
    "gradio_api/call/x", "gradio_api/call/v2/x", "gradio_api/api/x", "gradio_api/reset",
    "gradio_api/cancel", "gradio_api/proxy=http://example.org/", "gradio_api/component_server",
    "gradio_api/file=http://example.org/x.png", "gradio_api/info", "gradio_api/startup-events",
    "gradio_api/heartbeat/x", "gradio_api/stream/x", "gradio_api/vibe-edit", "gradio_api/runs",
    "gradio_api/openapi.json", "gradio_api/process_recording", "gradio_api/app_id", "login",
    "logout", "monitoring", "pwa_icon", "svelte/x.js", "token", "custom_component/a/b/c/d.js",
    "config/", "docs", "openapi.json", "redoc", "mcp", "gradio_api/mcp/sse", "app",
)  # fmt: skip


@pytest.mark.parametrize("path", GRADIO)
def test_gradio_is_there_for_the_page_alone(site, path):
    for form in (f"/{path}", f"//{path}", f"/app/{path}", f"/app//{path}", f"/{path}/x"):
        for method in ("GET", "POST", "HEAD", "OPTIONS", "PUT", "DELETE", "PATCH"):
            status, headers, body = exchange(site, request(method, form, body=b"{}"))
            assert status in (404, 405), (method, form)
            assert "location" not in headers
            if method != "HEAD":
                assert_refusal(body)
    assert site.reached == []


@pytest.mark.parametrize("query", ["page=x", "deep_link=../../etc/passwd", "view=api", "__theme=x"])
def test_the_page_is_the_same_whatever_is_asked_of_it(site, query):
    plain, asked = httpx.get(site.url), httpx.get(f"{site.url}/?{query}")
    assert asked.status_code == 200 and asked.text == plain.text
    assert httpx.get(f"{site.url}/config?{query}").json() == httpx.get(f"{site.url}/config").json()


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE", "BREW"])
def test_the_page_is_only_read(site, method):
    for path in ("/", "/config", "/theme.css", "/assets/x.js", "/static/x"):
        status, _, body = exchange(site, request(method, path, body=b"x"))
        assert status == 405 and assert_refusal(body)["text"]
    assert exchange(site, get("/", method="HEAD"))[0] == 200


def test_the_page_tells_nothing_of_the_machine(site):
    said = httpx.get(site.url).text + httpx.get(f"{site.url}/config").text
    for word in (str(runs.ROOT), tempfile.gettempdir(), "site-packages", socket.gethostname()):
        assert word not in said


# -- what the browser is told ---------------------------------------------------------------------


def test_every_answer_has_the_policy(site):
    for answer in (
        httpx.get(site.url),
        httpx.get(f"{site.url}/theme.css"),
        httpx.get(f"{site.url}/nothing"),
        httpx.post(site.url),
        httpx.get(f"{site.url}/app/start"),
        httpx.get(f"{site.url}/app/nothing"),
        httpx.get(f"{site.url}/app/uploads/x"),
        httpx.post(f"{site.url}/app/start", content=bytes(page_guard.MAX_JSON + 1)),
    ):
        policy = answer.headers.get_list("content-security-policy")
        assert len(policy) == 1 and "default-src 'self'" in policy[0] and "http:" not in policy[0]
        assert "frame-ancestors 'self'" in policy[0] and "object-src 'none'" in policy[0]
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["referrer-policy"] == "no-referrer"
        assert answer.headers["cache-control"] == "no-store"


def test_who_may_show_it_in_a_frame_is_named(tmp_path):
    from fastapi.testclient import TestClient

    app = build_site(Model(), conversations=tmp_path, runs=None)
    client = TestClient(web_application(app, ["https://huggingface.co"]))
    policy = client.get("/").headers["content-security-policy"].split("; ")
    assert "frame-ancestors 'self' https://huggingface.co" in policy


def test_the_page_may_reach_no_other_machine(site):
    with chromium() as start:
        page = start().new_page()
        page.goto(site.url)
        blocked = page.evaluate("""() => new Promise(done => {
            const found = [];
            document.addEventListener("securitypolicyviolation", event => {
                if (found.push(event.blockedURI) === 2) done(found);
            });
            new Image().src = "http://192.0.2.1/x.png";
            fetch("http://192.0.2.1/y").catch(() => 0);
        })""")
    assert sorted(blocked) == ["http://192.0.2.1/x.png", "http://192.0.2.1/y"]


# -- refusals -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "path",
    ["nothing", "start/", "start/x", "texts", "texts/", "texts/en/", "examples/1/2", "x" * 9000],
)  # fmt: skip
def test_what_is_not_there_is_a_404_in_the_one_form(site, path):
    for form in (path, f"/{path}", f"%2f{path}", f"./{path}", f"../app/{path}"):
        status, headers, body = exchange(site, get(f"/app/{form}"))
        assert status == 404 and assert_refusal(body)["key"] == "nothing_there"
        assert "location" not in headers


@pytest.mark.parametrize("path", ["start%00", "texts/%00", "texts/%ff%fe", "texts/..%2f..%2fen"])
def test_a_strange_path_is_not_there(site, path):
    status, _, body = exchange(site, get(f"/app/{path}"))
    assert status == 404 and assert_refusal(body)


def test_a_method_that_a_route_does_not_take_is_a_405(site):
    for method, path in (
        ("POST", "start"), ("PUT", "start"), ("OPTIONS", "uploads"), ("PATCH", "uploads/x"),
        ("DELETE", "texts/en"), ("GET", "uploads"), ("TRACE", "start"),
    ):  # fmt: skip
        status, _, body = exchange(site, request(method, f"/app/{path}", body=b"{}"))
        assert status == 405 and method in assert_refusal(body)["text"]


def test_what_does_not_fit_is_one_line(site):
    status, _, body = exchange(site, request("POST", "/app/uploads", *key_line(), body=b"x"))
    assert status == 422 and assert_refusal(body)["text"].startswith("name: ")


def key_line() -> list[str]:
    return [f"{name}: {value}" for name, value in KEY.items()]


@pytest.mark.parametrize("lines", [
    [], ["X-Browser-Key:"], ["X-Browser-Key: " + "A" * 32], ["X-Browser-Key: " + "a" * 33],
    ["X-Browser-Key: ../../" + "a" * 26], ["X-Browser-Key: " + "\u0661" * 32],
    ["X-Browser-Key: " + "a" * 32, "X-Browser-Key: " + "b" * 32], ["X-Browser-Key: " + "a" * 9000],
])  # fmt: skip
def test_whoever_has_no_key_has_nothing(site, lines):
    raw = get("/app/uploads/" + "0" * 32, *lines[:0], method="GET")
    head, _, _ = raw.partition(b"\r\n\r\n")
    raw = head + "".join(f"\r\n{line}" for line in lines).encode() + b"\r\n\r\n"
    status, _, body = exchange(site, raw)
    assert status == 409 and assert_refusal(body)["key"] == "key_damaged"


def test_a_mistake_of_the_program_is_told_without_details_and_logged_once(
    site, monkeypatch, caplog, capfd
):
    def broken(*_: object) -> None:
        raise RuntimeError("secret detail\nsecond line")

    logs.forget()
    monkeypatch.setattr("web.start.routes.told", broken)
    with caplog.at_level(logging.WARNING):
        answers = [httpx.get(f"{site.url}/app/start") for _ in range(3)]
    for answer in answers:
        assert answer.status_code == 500 and b"secret" not in answer.content
        assert assert_refusal(answer.content)["key"] == "server_failed"
        assert "content-security-policy" in answer.headers
    told = [record.getMessage() for record in caplog.records if "secret" in record.getMessage()]
    assert len(told) == 1 and "\n" not in told[0] and "test_app_guards.py" in told[0]
    assert "Traceback" not in caplog.text + capfd.readouterr().err


# -- how much is read -----------------------------------------------------------------------------


@pytest.mark.parametrize("length", [True, False])
def test_json_that_is_too_large_is_refused(site, length):
    def parts():
        for _ in range(page_guard.MAX_JSON // 2**16 + 1):
            yield b" " * 2**16

    body = b"".join(parts()) if length else parts()
    sent = httpx.post(f"{site.url}/app/texts/en", content=body, timeout=60)
    assert (
        sent.status_code == 413 and "over 4,194,304 bytes" in assert_refusal(sent.content)["text"]
    )


def test_json_of_all_requests_together_is_bounded(tmp_path, monkeypatch):
    from fastapi.testclient import TestClient

    monkeypatch.setattr(page_guard, "MAX_HELD", 1000)
    app = web_application(build_site(Model(), conversations=tmp_path, runs=None))
    client = TestClient(app, raise_server_exceptions=False)
    for _ in range(3):
        refused = client.post("/app/start", content=bytes(200_000))
        assert refused.status_code == 503
        assert "large requests are under way" in assert_refusal(refused.content)["text"]
        assert client.post("/app/start", content=bytes(100_000)).status_code == 405


def test_a_body_that_is_cut_off_or_claims_too_little_reaches_nothing(site):
    cut = request("POST", "/app/uploads/x", "Content-Length: 100", body=b"half", length=False)
    host, _, port = site.url.removeprefix("http://").partition(":")
    with socket.create_connection((host, int(port)), timeout=60) as connection:
        connection.sendall(cut)
    more = request("POST", "/app/start", "Content-Length: 2", body=b"{}GET /", length=False)
    assert exchange(site, more)[0] == 405
    assert httpx.get(f"{site.url}/app/start").status_code == 200


# -- what is parsed -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("typed", "seed"), [("", None), (" 7 ", 7), ("0", 0), (str(2**64 - 1), 2**64 - 1)]
)
def test_a_seed(typed, seed):
    assert parse_seed(typed) == seed


@pytest.mark.parametrize("typed", ["-1", "1.5", "x", "²", "٣", str(2**64), "9" * 5000])
def test_what_is_not_a_seed(typed):
    with pytest.raises(RequestError, match="bad_seed"):
        parse_seed(typed)


@pytest.mark.parametrize(
    "values",
    [
        {"temperature": float("nan")},
        {"temperature": -1},
        {"top_p": 0},
        {"top_p": float("inf")},
        {"top_k": -1},
        {"repetition_penalty": 0},
        {"no_repeat_ngram_size": -1},
        {"no_repeat_ngram_size": 65},
        {"no_repeat_ngram_size": 1.5},
        {"repetition_penalty": float("nan")},
    ],
)
def test_settings_that_no_slider_gives_are_one_line(values):
    with pytest.raises((PhiSightError, ValueError)):
        settings_from(SettingsForm(**values))
