"""Every view of the page, light and dark, wide and on a telephone: judged by axe, and pictured.

Those in docs/app are taken by
PHISIGHT_APP_RUN=runs/tiny PHISIGHT_APP_PICTURES=docs/app python -m pytest tests/test_app_views.py
"""

from __future__ import annotations

import io
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import runs
from axe import findings
from pages import Site, User, pictures, served
from PIL import Image

from assistant.assistant import Assistant

SIZES = {390: 800, 1280: 860, 1440: 900}
PICTURES = os.environ.get("PHISIGHT_APP_PICTURES")
# All of them for the pictures; both schemes and both layouts are in two of them.
ALL = [(width, scheme) for width in SIZES for scheme in ("light", "dark")]
SEEN = ALL if PICTURES else [(1280, "light"), (390, "dark")]
COLOURS = 200  # of a picture in docs/app, which is then a third as large
PHONE = 390
# A command line names the folder of runs, which is a temporary one here.
WITHOUT_FOLDER = """() => document.querySelectorAll(".begin-code code").forEach(code => {
    code.textContent = code.textContent.replace(/\\S*\\/(?=runs)/g, "").replace(/runs\\d+/, "runs");
})"""


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Iterator[Site]:
    """The app with the tests' own small run, or with that of PHISIGHT_APP_RUN."""
    run = os.environ.get("PHISIGHT_APP_RUN")
    assistant = Assistant.load(run) if run else runs.own_assistant()
    folder = tmp_path_factory.mktemp("runs")
    shutil.copytree(run or runs.finished_run(), folder / "tiny")
    shutil.copytree(runs.finished_run(), folder / "short")
    conversations = tmp_path_factory.mktemp("conversations")
    hears = {"speech": lambda: None, "voice": lambda language: None}
    with served(assistant, conversations, folder, may_train=True, **hears) as site:
        yield site
    assistant.close()


class Judged(User):
    """Looks at what it passes, and remembers what is wrong with it."""

    def __init__(self, browser: Any, site: Site, width: int, scheme: str) -> None:
        self.width, self.scheme = width, scheme
        self.found: dict[str, list[str]] = {}
        self.is_phone = width == PHONE
        super().__init__(
            browser,
            site,
            viewport={"width": width, "height": SIZES[width]},
            color_scheme=scheme,
            reduced_motion="reduce",
            has_touch=self.is_phone,
        )

    def look(self, view: str, picture: bool = False) -> None:
        """Have axe judge a view, see that it is as wide as the window, and take its picture where
        pictures are wanted."""
        found = findings(self.page)
        across = self.page.evaluate("document.documentElement.scrollWidth")
        if across > self.width:
            found.append(f"it is {across} pixels wide")
        if found:
            self.found[view] = found
        if picture and PICTURES:
            self.page.evaluate(WITHOUT_FOLDER)
            self.page.wait_for_timeout(400)
            shot = Image.open(io.BytesIO(self.page.screenshot())).convert("RGB")
            path = Path(PICTURES, f"{view}-{self.width}-{self.scheme}.png")
            path.parent.mkdir(parents=True, exist_ok=True)
            shot.quantize(COLOURS, dither=Image.Dither.NONE).save(path, optimize=True)

    def side(self) -> None:
        """Open the sidebar, where the window is too narrow to show it."""
        if self.is_phone and not self.page.locator("#phisight.open").count():
            self.page.locator(".sidebar-opener").click()

    def press(self, name: str) -> None:
        self.page.get_by_role("button", name=name, exact=True).last.click()

    def leave(self) -> None:
        """Close a dialog or a menu."""
        self.page.keyboard.press("Escape")


@pytest.fixture(params=SEEN, ids=lambda seen: f"{seen[0]}-{seen[1]}")
def user(request, browser, site) -> Iterator[Judged]:
    user = Judged(browser, site, *request.param)
    yield user
    user.close()


def told(user: Judged) -> str:
    return "\n".join(f"== {view}\n" + "\n".join(found) for view, found in user.found.items())


def test_the_chat_and_what_stands_beside_it(user):
    page = user.page
    page.locator(".welcome .example img").last.wait_for()
    user.look("chat-empty", picture=True)
    user.try_example(0)
    user.answers(1)
    user.ask("Which of these has the most objects?", *pictures(2))
    user.answers(2)
    page.locator(".transcript .turn.user .thumbnail img").nth(2).wait_for()
    user.look("chat", picture=True)
    page.locator(".transcript .turn.assistant").last.hover()
    user.look("chat, actions shown")
    page.locator(".transcript .turn.user .thumbnail").first.click()
    page.locator("dialog.lightbox img").wait_for()
    user.look("lightbox", picture=True)
    user.leave()
    user.side()
    page.locator(".history-title").first.wait_for()
    user.look("history", picture=True)
    page.locator(".history-more").first.click()
    page.get_by_role("menuitem").first.wait_for()
    user.look("menu of a conversation")
    user.leave()
    user.side()
    page.locator(".settings-button").click()
    page.locator("dialog.settings-dialog").wait_for()
    user.look("settings", picture=True)
    user.leave()
    user.leave()  # the sidebar too
    page.locator(".bar-system").click()
    page.locator("dialog.system-dialog").wait_for()
    user.look("system-prompt", picture=True)
    user.leave()
    page.locator(".bar-chip[title]").nth(0).click()
    user.look("bar, opened")
    assert not user.found, told(user)


def test_the_voice(user):
    user.open("#/voice")
    user.page.locator(".voice-panel, .voice").first.wait_for()
    user.look("voice", picture=True)
    assert not user.found, told(user)


def test_the_batch(user):
    user.open("#/batch")
    room = user.page.locator(".batch-room")
    room.get_by_role("textbox", name="Question").wait_for()
    user.look("batch-empty", picture=True)
    room.locator("input[type=file]").first.set_input_files([str(one) for one in pictures(3)])
    room.locator(".batch-row").nth(2).wait_for()
    user.look("batch, rows")
    room.get_by_role("textbox", name="Question").fill("How many objects are there?")
    room.get_by_role("textbox", name="Question").press("Enter")
    room.locator(".batch-answer:not(:empty)").nth(2).wait_for()
    user.look("batch", picture=True)
    assert not user.found, told(user)


def test_the_training_that_is_looked_at(user):
    page = user.page
    user.open("#/training")
    page.locator(".run-link").nth(1).wait_for()
    user.look("training", picture=True)
    for box in page.locator(".training-room input[type=checkbox]").all()[:2]:
        box.check()
    page.locator(".training-room path.line").first.wait_for()
    user.look("training-compared", picture=True)
    user.open("#/training/tiny")
    page.locator(".training-room path.line").first.wait_for()
    page.locator(".meter-bar").nth(2).wait_for()
    page.wait_for_timeout(500)
    user.look("training-run", picture=True)
    assert not user.found, told(user)


def test_the_training_that_is_begun(user):
    page = user.page
    user.open("#/training")
    user.press("Train a new run")
    page.locator(".begin-window").wait_for()
    user.look("training-begun", picture=True)
    user.press("Continue")
    page.locator(".begin-window").get_by_label("Conversations", exact=True).wait_for()
    user.look("training-data", picture=True)
    page.locator(".begin-window").get_by_role("button", name="3 Settings").click()
    page.locator(".begin-field:visible").first.wait_for()
    user.look("training-settings", picture=True)
    page.locator(".begin-window").get_by_role("button", name="4 Name and start").click()
    page.locator(".begin-last:visible").first.wait_for()
    user.look("training-start", picture=True)
    user.leave()
    assert not user.found, told(user)


def test_a_fault_is_found(browser, site):
    """What axe is there for: that it judges at all."""
    user = Judged(browser, site, PHONE, "light")
    user.page.evaluate(
        """() => document.querySelector("main").insertAdjacentHTML("beforeend",
            `<button style="all: revert; width: 9px; height: 9px"></button><button
             style="all: revert; width: 9px; height: 9px">x</button>
             <img src="data:,"><p style="color: #999; background: #aaa">pale</p>`)"""
    )
    kinds = {line.split()[1].strip(":") for line in findings(user.page)}
    assert {"button-name", "image-alt", "color-contrast", "target-size"} <= kinds
    user.context.close()
