"""The web app as a person meets it: a server in this process, and a real browser without a head."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import runs as test_runs

from api.door import guarded
from api.origins import Allowed
from api.server import Server, listening_socket
from assistant.assistant import Assistant
from web.app import build_app, web_application

CHROMIUM = "/usr/bin/chromium"
ARGUMENTS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
    "--use-fake-device-for-media-stream",
    "--use-fake-ui-for-media-stream",
]
WAIT = 60_000  # milliseconds; nothing takes so long, but a test must not fail by load


@dataclass
class Site:
    """A served app and what it was made of."""

    url: str
    assistant: Assistant
    conversations: Path
    reached: list[str] = field(default_factory=list)
    """what this process has looked up or connected to, apart from itself"""


@contextmanager
def served(assistant: Assistant, conversations: Path, runs: Path, **more: Any) -> Iterator[Site]:
    """The app on a free port, until the block is left."""
    blocks = build_app(assistant, conversations=conversations, runs=runs, **more)
    bound = listening_socket("127.0.0.1", 0)
    bound.listen(64)
    server = Server(guarded(web_application(blocks), "", Allowed()), grace=0.0)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [bound]}, daemon=True)
    site = Site(f"http://127.0.0.1:{bound.getsockname()[1]}", assistant, conversations)
    _watch(site.reached)
    thread.start()
    wait_for(lambda: server.started)
    try:
        yield site
    finally:
        server.should_exit = True
        thread.join(timeout=30)
        bound.close()


def _watch(reached: list[str]) -> None:
    """Note every address outside this machine that this process asks for or connects to."""

    def hook(event: str, arguments: tuple) -> None:
        host = None
        if event == "socket.getaddrinfo":
            host = arguments[0]
        elif event == "socket.connect" and isinstance(arguments[1], tuple):
            host = arguments[1][0]
        host = host.decode() if isinstance(host, bytes) else host
        if host not in (None, "", "127.0.0.1", "::1", "localhost"):
            reached.append(str(host))

    sys.addaudithook(hook)


def pictures(count: int) -> list[Path]:
    """The first held-out pictures of the tests' world."""
    return sorted((test_runs.world() / "images").glob("held_out_*.png"))[:count]


def wait_for(happened: Any, seconds: float = WAIT / 1000) -> None:
    deadline = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < deadline, "did not come to it"
        time.sleep(0.02)


@contextmanager
def chromium() -> Iterator[Callable[..., Any]]:
    """What starts browsers, with more arguments where needed; skips where there is none."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if not Path(CHROMIUM).exists():
        pytest.skip(f"{CHROMIUM} is not there: apt-get install chromium")
    with playwright.sync_playwright() as driver, ExitStack() as started:

        def start(*more: str) -> Any:
            browser = driver.chromium.launch(executable_path=CHROMIUM, args=[*ARGUMENTS, *more])
            started.callback(browser.close)
            return browser

        yield start


class User:
    """One browser profile on the app, and everything that must not happen in it."""

    def __init__(self, browser: Any, site: Site, **settings: Any) -> None:
        self.site, self.faults = site, []
        self.context = browser.new_context(
            permissions=["microphone"],
            locale="en-GB",
            **({"viewport": {"width": 1280, "height": 860}} | settings),
        )
        self.context.set_default_timeout(WAIT)
        self.page = self.context.new_page()
        self.page.on("console", lambda m: m.type == "error" and self.faults.append(m.text))
        self.page.on("pageerror", lambda error: self.faults.append(str(error)))
        self.page.on("request", self._is_inside)
        self.open()

    def _is_inside(self, request: Any) -> None:
        if not request.url.startswith((self.site.url, "data:", "blob:")):
            self.faults.append(f"asked for {request.url}")

    def open(self) -> None:
        """Load the page, until it knows its conversations."""
        self.page.goto(self.site.url)
        self.page.locator("#tagline", has_text="Ask about pictures").wait_for(state="attached")
        self.page.locator("#question textarea").wait_for()
        self.page.wait_for_timeout(300)  # the first updates come in several messages

    def close(self) -> None:
        self.context.close()
        assert self.faults == [], self.faults
        assert self.site.reached == [], self.site.reached

    # -- what it does ----------------------------------------------------------------------------

    def try_example(self, index: int = 0) -> str:
        """Click an example; returns its question."""
        example = self.page.locator("#chat .example").nth(index)
        question = example.inner_text().strip()
        example.click()
        return question

    def ask(self, question: str, *files: str | Path) -> None:
        if files:
            self.attach(*files)
        self.page.locator("#question textarea").fill(question)
        self.page.locator("#question textarea").press("Enter")

    def attach(self, *files: str | Path) -> None:
        """Add uploads to the question and wait until they are there."""
        before = self.page.locator("#question img").count()
        self.page.locator("#question input[type=file]").set_input_files([str(f) for f in files])
        self.page.locator("#question img").nth(before + len(files) - 1).wait_for()

    def attach_recording(self, file: Path) -> None:
        self.page.locator("#question input[type=file]").set_input_files(str(file))
        self.page.locator("#question .thumbnail-item").first.wait_for()

    def click(self, name: str, which: int = -1) -> None:
        """Press one of the small buttons in the conversation."""
        self.page.locator("#chat").get_by_role("button", name=name).nth(which).click()

    def set(self, element: str, value: object) -> None:
        """Give a slider of the settings a value, and see that the page has taken it: just after the
        settings have opened, a field may be there before what listens to it."""
        if not self.page.locator(f"#{element}").is_visible():
            self.page.locator("#settings button").first.click()
        number = self.page.locator(f"#{element} input[type=number]")
        slider = self.page.locator(f"#{element} input[type=range]")

        def is_taken() -> bool:
            number.fill(str(value))
            number.blur()
            return float(slider.input_value()) == float(value) == float(number.input_value())

        wait_with(self.page, is_taken)

    def start_over(self) -> None:
        self.page.locator("#new-conversation").click()
        self.page.locator("#chat .example").first.wait_for()

    # -- what it sees ----------------------------------------------------------------------------

    def said(self) -> list[tuple[str, str]]:
        """(who, text) of every bubble with words."""
        found = self.page.locator("#chat [data-testid=user], #chat [data-testid=bot]").evaluate_all(
            "all => all.map(one => [one.dataset.testid, one.innerText.trim()])"
        )
        return [(who, text) for who, text in found if text]

    def pictures(self) -> int:
        return self.page.locator("#chat .user-row img").count()

    def is_idle(self) -> bool:
        return self.page.locator("#question .stop-button").count() == 0

    def answers(self, count: int) -> list[tuple[str, str]]:
        """Wait until so many answers are finished; returns the whole conversation."""
        wait_with(
            self.page,
            lambda: (
                self.is_idle()
                and self.page.locator("#chat [data-testid=bot]").count() == count
                and self.page.locator("#note").inner_text().strip() != ""
            ),
        )
        return self.said()

    def conversations(self) -> list[str]:
        return [
            text.strip() for text in self.page.locator("#conversations label").all_inner_texts()
        ]

    def told(self) -> list[str]:
        """The lines of the messages that are shown, without their headings."""
        return self.page.locator(".toast-message-text").all_inner_texts()


def wait_with(page: Any, happened: Any) -> None:
    """Like `wait_for`, while the browser's events are being handled."""
    deadline = time.monotonic() + WAIT / 1000
    while not happened():
        assert time.monotonic() < deadline, f"did not come to it: {page.inner_text('body')}"
        page.wait_for_timeout(30)
