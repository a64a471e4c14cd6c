"""How soon the page can be used, and how long a key takes in a long conversation.

    python -m benchmarks.page [--run runs/tiny] [--repeats 5] [--turns 200] [--json]

Each turn is a new process of app.py and a new profile of Chromium, as after an installation; the
browser itself runs already. The first turn of all is left out: it reads from the disk what is in
the system's memory later. Figures, each the median of the turns and the least:

    ready_seconds   from the start of app.py until its address is printed and answers
    page_seconds    from asking for the page until it can be used ([data-ready=true]), while the
                    model is being loaded
    model_seconds   from the start of app.py until the model is there
    key_ms          from a key in the composer to the end of the frame that shows it, with a
                    conversation of so many turns open; of a turn, the median of its keys
    late_key_ms     the slowest of them
"""

from __future__ import annotations

import json
import secrets
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.machine import describe_machine
from benchmarks.processes import ROOT
from config import Parser
from errors import PhiSightError, run_main
from web.chat.conversation import BEGINNING, SavedConversation, Speaker, with_node
from web.chat.store import ConversationStore

CHROMIUM = "/usr/bin/chromium"
ARGUMENTS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run"]
WAIT = 120.0  # seconds, after which something has failed
LOOK_SECONDS = 0.05  # how often the server is asked whether the model is there; more would slow it
BETWEEN_KEYS = 100  # milliseconds, of a fast typist: keys that wait for one another count twice
TYPED = "How many objects are there in it now?"
CONVERSATION = "ab" * 8
KEYS = """() => {
    window.keys = [];
    document.querySelector("#question textarea").addEventListener("keydown", () => {
        const began = performance.now();
        requestAnimationFrame(() => setTimeout(() => keys.push(performance.now() - began)));
    }, true);
}"""


def long_conversation(folder: Path, key: str, turns: int) -> None:
    """A conversation of so many turns in a folder of conversations, of the browser with a key."""

    def fill(conversation: SavedConversation) -> SavedConversation:
        parent = BEGINNING
        for number in range(turns):
            asked = number % 2 == 0
            text = f"Question {number}?" if asked else f"An *answer*, the {number}th.\n\n" * 3
            role: Speaker = "user" if asked else "assistant"
            conversation = with_node(conversation, parent, role, text)
            parent = conversation.next - 1
        return conversation

    ConversationStore(folder, key).change(CONVERSATION, 0, fill)


@contextmanager
def app(run: str, conversations: Path) -> Iterator[tuple[str, float]]:
    """app.py as a process: its address, and when it was started. Raises `PhiSightError` if it ends
    before it is there."""
    words = ["app.py", "--run", run, "--port", "0", "--conversations", str(conversations)]
    began = time.perf_counter()
    with subprocess.Popen(
        [sys.executable, *words], cwd=ROOT, stdout=subprocess.PIPE, text=True
    ) as process:
        try:
            assert process.stdout is not None
            announced = process.stdout.readline()
            address = next((word for word in announced.split() if word.startswith("http")), None)
            if address is None:
                raise PhiSightError(f"app.py --run {run}: did not start; see what it said above")
            yield address.rstrip(";/"), began
        finally:
            process.terminate()


def answered(address: str) -> bytes:
    with urllib.request.urlopen(address, timeout=WAIT) as response:
        return bytes(response.read())


def model_there(address: str, tell: Callable[[float], None]) -> None:
    """Tell when the server's model is ready, or not a number if it failed."""
    until = time.perf_counter() + WAIT
    while time.perf_counter() < until:
        state = json.loads(answered(f"{address}/app/start"))["model"]["state"]
        if state != "loading":
            tell(time.perf_counter() if state == "ready" else float("nan"))
            return
        time.sleep(LOOK_SECONDS)
    tell(float("nan"))


def turn(browser: Any, run: str, turns: int) -> dict[str, float]:
    """One start of all, as figures."""
    key = secrets.token_hex(16)
    with tempfile.TemporaryDirectory() as name:
        long_conversation(Path(name), key, turns)
        with app(run, Path(name)) as (address, began):
            answered(address)
            ready = time.perf_counter()
            seen: list[float] = []
            looking = threading.Thread(target=model_there, args=(address, seen.append))
            looking.start()
            context = browser.new_context(viewport={"width": 1280, "height": 860})
            context.set_default_timeout(WAIT * 1000)
            context.add_init_script(f"localStorage.setItem('phisight.key', '\"{key}\"')")
            try:
                page = context.new_page()
                asked = time.perf_counter()
                page.goto(address)
                page.locator("[data-ready=true]").wait_for()
                usable = time.perf_counter()
                looking.join()
                keys = typed(page, f"{address}/#/chat/{CONVERSATION}", turns)
            finally:
                context.close()
                looking.join()
    if not seen or seen[0] != seen[0]:
        raise PhiSightError(f"app.py --run {run}: its model was not loaded; see what it said above")
    return {
        "ready_seconds": ready - began,
        "page_seconds": usable - asked,
        "model_seconds": seen[0] - began,
        "key_ms": statistics.median(keys),
        "late_key_ms": max(keys),
    }


def typed(page: Any, address: str, turns: int) -> list[float]:
    """Milliseconds of each key of a question that is typed below so many turns."""
    page.goto(address)
    page.locator(".transcript .turn").nth(turns - 1).wait_for(state="attached")
    page.wait_for_timeout(500)  # a person does not type before there is something to see
    page.evaluate(KEYS)
    page.locator("#question textarea").press_sequentially(TYPED, delay=BETWEEN_KEYS)
    page.wait_for_function(f"keys.length >= {len(TYPED)}")
    return [float(milliseconds) for milliseconds in page.evaluate("keys")]


def measure(
    run: str, repeats: int, turns: int, chromium: str = CHROMIUM, warm_up: bool = True
) -> dict[str, Any]:
    """The figures of so many turns. Raises `PhiSightError` where there is no browser, and for an
    app that does not start."""
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        raise PhiSightError(
            "playwright: is not installed; install it with `pip install -r requirements-test.txt`"
        ) from None
    if not Path(chromium).exists():
        raise PhiSightError(f"--chromium {chromium}: is not there; apt-get install chromium")
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=chromium, args=ARGUMENTS)
        try:
            if warm_up:
                turn(browser, run, turns)
            found = [turn(browser, run, turns) for _ in range(repeats)]
        finally:
            browser.close()
    return {"run": run, "repeats": repeats, "turns": turns} | {
        name: {
            "median": round(statistics.median(one[name] for one in found), 3),
            "least": round(min(one[name] for one in found), 3),
        }
        for name in found[0]
    }


def table(found: Mapping[str, Any]) -> str:
    """A line for each figure."""
    lines = [f"{found['repeats']} turns, {found['turns']} turns of a conversation, {found['run']}"]
    lines += [
        f"{name:15}{of['median']:>9.2f}   least {of['least']:.2f}"
        for name, of in found.items()
        if isinstance(of, dict) and "median" in of
    ]
    return "\n".join(lines)


def main() -> None:
    parser = Parser(prog="page.py", description=__doc__.splitlines()[0])
    parser.add_argument("--run", default="runs/tiny", help="run or checkpoint folder (%(default)s)")
    parser.add_argument("--repeats", type=int, default=5, help="turns of each figure (%(default)s)")
    parser.add_argument("--turns", type=int, default=200, help="of the conversation (%(default)s)")
    parser.add_argument("--chromium", default=CHROMIUM, help="browser (%(default)s)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args()
    for name in ("repeats", "turns"):
        if getattr(options, name) < 1:
            raise PhiSightError(f"--{name}: must be at least 1")
    machine = describe_machine()
    found = measure(options.run, options.repeats, options.turns, options.chromium)
    print(json.dumps(found | {"machine": machine}) if options.json else table(found))


if __name__ == "__main__":
    run_main(main)
