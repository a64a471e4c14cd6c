"""What nobody may do to the web app, whatever a browser or another program sends to it."""

from __future__ import annotations

import csv
import json
import secrets
import shutil
from pathlib import Path

import httpx
import pytest
import runs
from hypothesis import given
from pages import Site, chromium, pictures, served
from test_conversations import json_values

from api.page_guard import MAX_JSON, names_an_address, reaches_out
from errors import PhiSightError
from web.batch_page import write_csv
from web.conversation import ID
from web.conversation_store import KEY
from web.errors import RequestError
from web.session import Browser
from web.settings import parse_seed, settings_from
from web.texts import LANGUAGES


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Site:
    folder = tmp_path_factory.mktemp("conversations")
    with served(runs.assistant(), folder, runs.finished_run().parent) as site:
        yield site


@pytest.fixture(scope="module")
def browser():
    with chromium() as start:
        yield start()


class Program:
    """Talks to the app as a page does, with whatever data it likes."""

    def __init__(self, site: Site) -> None:
        self.site, self.session = site, secrets.token_hex(6)
        config = httpx.get(f"{site.url}/config").json()
        self.numbers = {d["api_name"]: d["id"] for d in config["dependencies"]}
        assert self.send("on_load", [{}])[0] == "done"

    def send(self, function: str, data: list) -> tuple[str, str]:
        """("done", "failed" or the status of a refusal, all that was heard)."""
        sent = httpx.post(
            f"{self.site.url}/gradio_api/queue/join",
            json={"data": data, "fn_index": self.numbers[function], "session_hash": self.session},
        )
        if sent.status_code != 200:
            return str(sent.status_code), sent.text
        heard = ""
        with httpx.stream(
            "GET",
            f"{self.site.url}/gradio_api/queue/data",
            timeout=60,
            params={"session_hash": self.session},
        ) as stream:
            for line in stream.iter_lines():
                heard += line + "\n"
                if "process_completed" in line:
                    break
        return ("done" if '"success":true' in heard.replace(" ", "") else "failed"), heard

    def ask(self, path: str) -> tuple[str, str]:
        """Send a question about a file of the server."""
        return self.send(
            "on_text", [None, {"text": "What?", "files": [file_data(path)]}, *SETTINGS]
        )

    def upload(self, file: Path) -> str:
        with file.open("rb") as stream:
            sent = httpx.post(f"{self.site.url}/gradio_api/upload", files={"files": stream})
        return sent.json()[0]


def file_data(path: str) -> dict:
    return {
        "path": path,
        "orig_name": "x.png",
        "mime_type": "image/png",
        "meta": {"_type": "gradio.FileData"},
    }


SETTINGS = [0, 1, 0, 1, 8, "", "", False, False, False]


def test_no_file_of_the_server_can_be_read(site, tmp_path):
    secret = tmp_path / "secret.png"
    shutil.copy(pictures(1)[0], secret)
    program = Program(site)
    uploaded = program.upload(secret)
    assert program.ask(uploaded)[0] == "done"
    kept = next(site.conversations.rglob("*.png"))
    for path in (
        "/etc/passwd",
        secret,
        kept,
        kept.with_name("conversation.json"),
        runs.ROOT / "config.py",
        runs.ROOT / "app.py",
        "../../etc/passwd",
    ):
        got = httpx.get(f"{site.url}/gradio_api/file={path}")
        assert got.status_code in (403, 404), path
    assert httpx.get(f"{site.url}/gradio_api/file={uploaded}").content == secret.read_bytes()
    before = sorted(site.conversations.rglob("*"))
    for path in ("/etc/passwd", secret, kept, runs.ROOT / "config.py"):
        outcome, heard = program.ask(str(path))
        assert outcome == "failed" and "root:" not in heard, path
    assert sorted(site.conversations.rglob("*")) == before


def test_no_address_is_fetched_for_anybody(site):
    address = "http://example.org/x.png"
    for path in (f"file={address}", "file=HTTPS://example.org/x.png", f"proxy={address}"):
        assert httpx.get(f"{site.url}/gradio_api/{path}").status_code == 403, path
    assert Program(site).ask(address)[0] == "403"
    assert site.reached == []


def test_an_error_of_the_program_shows_no_traceback(site, monkeypatch):
    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("secret detail")

    program = Program(site)
    uploaded = program.upload(pictures(1)[0])
    monkeypatch.setattr(site.assistant, "reply", broken)
    outcome, heard = program.ask(uploaded)
    assert outcome == "failed" and "secret detail" not in heard and "Traceback" not in heard


def test_the_page_may_reach_no_other_machine(site, browser):
    policy = httpx.get(site.url).headers["content-security-policy"]
    assert "default-src 'self'" in policy and "http:" not in policy
    page = browser.new_page()
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
    page.close()


@pytest.mark.parametrize("index", [-1, 10**9])
def test_an_event_that_the_page_does_not_have_is_a_400(site, index):
    event = {"data": [], "fn_index": index, "session_hash": "x"}
    sent = httpx.post(f"{site.url}/gradio_api/queue/join", json=event)
    assert sent.status_code == 400 and "load the page again" in sent.json()["detail"]


@pytest.mark.parametrize("path", ["call/nothing", "call/v2/nothing", "run/nothing", "api/nothing"])
def test_a_name_that_the_page_does_not_have_is_a_400(site, path):
    sent = httpx.post(f"{site.url}/gradio_api/{path}", json={"data": []})
    assert sent.status_code == 400 and "load the page again" in sent.json()["detail"]


A_FILE = 'Content-Disposition: form-data; name="files"'


@pytest.mark.parametrize(("boundary", "body"), [
    ("x", f"--x\r\n{A_FILE}\r\n\r\nno file\r\n--x--\r\n"),
    ("x", f"--x\r\n{A_FILE}; filename*=UTF-8''a.png\r\n\r\nx\r\n--x--\r\n"),
    ("x" * 300, "anything"),
])  # fmt: skip
def test_a_form_that_gradio_cannot_read_is_a_400(site, boundary, body):
    kind = {"content-type": f"multipart/form-data; boundary={boundary}"}
    sent = httpx.post(f"{site.url}/gradio_api/upload", content=body, headers=kind)
    assert sent.status_code == 400 and "load the page again" in sent.json()["detail"]


def test_an_event_that_is_too_large_is_refused(site):
    sent = httpx.post(
        f"{site.url}/gradio_api/queue/join",
        content=b"[" + b" " * MAX_JSON + b"]",
        headers={"content-type": "application/json"},
    )
    assert sent.status_code == 413


@pytest.mark.parametrize(
    "body",
    [
        {"data": [{"files": [{"path": "https://x.org/a.png"}]}]},
        [[{"path": " HTTP://x.org"}]],
        {"a": {"b": [{"path": "//x.org/a"}]}},
    ],
)
def test_an_address_is_found_wherever_it_stands(body):
    assert names_an_address(json.dumps(body).encode())


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[" * 100_000,
        b'{"path": "/tmp/a.png", "url": "http://127.0.0.1/file=/tmp/a"}',
        b'{"data": ["http://x.org is a place"]}',
        b'{"path": 3}',
    ],
)
def test_what_is_not_an_address_passes(body):
    assert not names_an_address(body)


def test_paths_that_reach_out():
    assert reaches_out("/gradio_api/file=https://x.org/a") and reaches_out("/gradio_api/proxy=a")
    assert reaches_out("/app/gradio_api/file=//x.org/a")
    assert not reaches_out("/gradio_api/file=/tmp/a.png") and not reaches_out("/http://")


@given(json_values)
def test_whatever_a_browser_has_stored_is_valid_or_forgotten(stored):
    browser = Browser.from_storage(stored)
    for value, good in ((browser.key, KEY.match), (browser.open, ID.match)):
        assert value is None or good(value)
    assert browser.language in (None, *LANGUAGES)
    assert Browser.from_storage(browser.to_storage()) == browser


# -- what is parsed and written --------------------------------------------------------------------


def test_no_cell_of_a_csv_is_a_formula():
    path = write_csv([["=1+1", "-2"], ["a,b", 'say "yes"'], ["ü", "@x\ny"]], "en")
    rows = list(csv.reader(open(path, encoding="utf-8-sig", newline="")))
    assert rows == [["Picture", "Answer"], ["'=1+1", "'-2"], ["a,b", 'say "yes"'], ["ü", "'@x\ny"]]


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
        [float("nan"), 1, 0, 1, 8],
        [0, 0, 0, 1, 8],
        [None, 1, 0, 1, 8],
        [0, 1, float("inf"), 1, 8],
        [0, 1, 0, "x", 8],
        [0, 1, -1, 1, 8],
        [0, 1, 0, 0, 8],
    ],
)
def test_settings_that_no_slider_gives_are_one_line(values):
    with pytest.raises(PhiSightError):
        settings_from([*values, "", "", False, False, False])
