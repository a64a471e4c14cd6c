"""The web app as a person meets it: a server in this process, and a real browser without a head."""

from __future__ import annotations

import os
import re
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
from web.app import build_site, web_application

# The first that is there. The shell has the same engine without windows, and loads a page in half
# the time.
BROWSERS = ("/usr/bin/chromium-headless-shell", "/usr/bin/chromium")
CHROMIUM = next(filter(os.path.exists, BROWSERS), BROWSERS[-1])
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
REFUSED = re.compile(r"Failed to load resource: .* status of (400|404|409|413) ")
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
    page = build_site(assistant, conversations=conversations, runs=runs, **more)
    bound = listening_socket("127.0.0.1", 0)
    bound.listen(64)
    server = Server(guarded(web_application(page), "", Allowed()), grace=0.0)
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
        self.page.on("console", self._hear)
        self.page.on("pageerror", lambda error: self.faults.append(str(error)))
        self.page.on("request", self._is_inside)
        self.open()

    def _hear(self, message: Any) -> None:
        """Browsers call every refused request an error; what it was refused with is told by the
        page, and looked at where it is meant to be refused."""
        is_refusal = REFUSED.match(message.text) is not None
        if message.type in ("error", "warning") and not is_refusal:
            self.faults.append(message.text)

    def _is_inside(self, request: Any) -> None:
        if not request.url.startswith((self.site.url, "data:", "blob:")):
            self.faults.append(f"asked for {request.url}")

    def open(self, link: str = "") -> None:
        """Load the page, at a link as "#/chat/ID", until its rooms are there."""
        self.page.goto("about:blank")  # or a change of the link alone would load nothing
        self.page.goto(f"{self.site.url}/{link}")
        self.page.locator("[data-ready=true]").wait_for()

    def close(self) -> None:
        self.context.close()
        assert self.faults == [], self.faults
        assert self.site.reached == [], self.site.reached

    # -- what it does ----------------------------------------------------------------------------

    @property
    def field(self) -> Any:
        """Where questions are typed."""
        return self.page.locator("#question textarea")

    @property
    def turns(self) -> Any:
        """Every turn of the conversation that is shown."""
        return self.page.locator(".transcript .turn")

    def try_example(self, index: int = 0) -> str:
        """Click an example; returns its question."""
        example = self.page.locator(".welcome .example").nth(index)
        question = example.inner_text().strip()
        example.click()
        return question

    def ask(self, question: str, *files: str | Path) -> None:
        if files:
            self.attach(*files)
        self.field.fill(question)
        self.field.press("Enter")

    def attach(self, *files: str | Path) -> None:
        """Add uploads to the question and wait until the server has them."""
        there = self.page.locator("#question .attachment[data-state=ready]")
        before = there.count()
        self.page.locator("#question input[type=file]").set_input_files([str(f) for f in files])
        there.nth(before + len(files) - 1).wait_for()

    def attach_recording(self, file: Path) -> None:
        self.attach(file)

    def click(self, name: str, which: int = -1) -> None:
        """Press one of the small buttons in the conversation."""
        self.page.locator(".transcript").get_by_role("button", name=name).nth(which).click()

    def set(self, name: str, value: object) -> None:
        """Choose a setting of the answers by its name in core/settings.js."""
        self.page.evaluate(
            """async ([name, value]) => {
                const { href } = document.querySelector("link[href$='core/settings.js']");
                (await import(href)).changeSetting(name, value);
            }""",
            [name, value],
        )

    def start_over(self) -> None:
        """Begin a new conversation."""
        self.page.evaluate("location.hash = '#/chat'")
        self.page.locator(".welcome .example").first.wait_for()

    # -- what it sees ----------------------------------------------------------------------------

    def said(self) -> list[tuple[str, str]]:
        """(who, text) of every turn with words."""
        found = self.turns.evaluate_all(
            """all => all.map(turn => [
                turn.dataset.role, turn.querySelector(".words").innerText.trim()
            ])"""
        )
        return [("user" if who == "user" else "bot", text) for who, text in found if text]

    def pictures(self) -> int:
        return self.page.locator(".transcript .turn.user .thumbnail img").count()

    def is_idle(self) -> bool:
        return self.page.locator(".chat-room[data-busy=true]").count() == 0

    def answers(self, count: int) -> list[tuple[str, str]]:
        """Wait until so many answers are finished; returns the whole conversation."""
        finished = self.page.locator(".transcript .turn.assistant:not(.pending)")
        wait_with(self.page, lambda: self.is_idle() and finished.count() == count)
        return self.said()

    def note(self, which: int = -1) -> str:
        """What stands under an answer, as "1.2 s · 14 tokens/s"."""
        return self.page.locator(".transcript .turn.assistant .note").nth(which).inner_text()

    def conversations(self) -> list[str]:
        """The titles in the sidebar."""
        return [text.strip() for text in self.page.locator(".history-title").all_inner_texts()]

    def told(self) -> list[str]:
        """The lines of the messages that are shown."""
        return self.page.locator(".toasts .toast p").all_inner_texts()


def wait_with(page: Any, happened: Any, seconds: float = WAIT / 1000) -> None:
    """Like `wait_for`, while the browser's events are being handled."""
    deadline = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < deadline, f"did not come to it: {page.inner_text('body')}"
        page.wait_for_timeout(30)
