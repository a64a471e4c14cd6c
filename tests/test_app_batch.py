"""The batch room in a real browser."""

from __future__ import annotations

import csv
import json
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import runs
from pages import Site, User, pictures, served, wait_for, wait_with
from PIL import Image

from assistant.assistant import Assistant
from assistant.messages import user_message
from errors import PhiSightError
from web.temporary import UPLOADS, files_in, own_folder

QUESTION = "How many objects are there?"
OTHER = "Is there a red star?"


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Iterator[Site]:
    folder = tmp_path_factory.mktemp("conversations")
    with served(runs.assistant(), folder, folder) as site:
        yield site


class Batch:
    """The room as a person sees it, and what it asks the server for."""

    def __init__(self, browser: Any, site: Site, **settings: Any) -> None:
        self.user = User(browser, site, **settings)
        self.page = self.user.page
        self.asked: list[int] = []  # pictures of each request
        self.page.on("request", self._note)
        self.open()

    def _note(self, request: Any) -> None:
        if request.url.endswith("/app/batches"):
            self.asked.append(len(json.loads(request.post_data)["uploads"]))

    def open(self) -> None:
        self.page.goto(f"{self.user.site.url}/#/batch")
        self.room = self.page.locator(".batch-room")
        self.field = self.room.get_by_role("textbox", name="Question")
        self.field.wait_for()

    def add(self, *files: Path) -> None:
        before = self.rows.count()
        chooser = self.room.locator("input[type=file]").first
        chooser.set_input_files([str(file) for file in files])
        wait_with(self.page, lambda: self.rows.count() == before + len(files))

    def ask(self, question: str) -> None:
        self.field.fill(question)
        self.field.press("Enter")

    @property
    def rows(self) -> Any:
        return self.room.locator(".batch-row")

    def answers(self) -> list[str]:
        return [text.strip() for text in self.room.locator(".batch-answer").all_text_contents()]

    def states(self) -> list[str]:
        return self.rows.evaluate_all("rows => rows.map(row => row.dataset.state)")

    def told(self) -> str:
        return self.room.locator(".batch-told").inner_text()

    def press(self, name: str) -> None:
        self.page.get_by_role("button", name=name, exact=True).click()

    def toasts(self) -> list[str]:
        return self.page.locator(".toast p").all_inner_texts()

    def finished(self, told: str) -> None:
        wait_with(self.page, lambda: self.told() == told)

    def saved(self, form: str) -> Path:
        self.press("Download")
        with self.page.expect_download() as download:
            self.page.get_by_role("menuitem", name=form).click()
        assert download.value.suggested_filename == f"phisight-batch.{form.lower()}"
        return Path(download.value.path())


@pytest.fixture
def batch(browser, site) -> Iterator[Batch]:
    batch = Batch(browser, site)
    yield batch
    batch.user.close()


@pytest.fixture
def slow(site, monkeypatch) -> None:
    """A model that takes a quarter of a second for each answer, whatever it has answered before."""
    start = site.assistant.start

    def unhurried(answer: Any) -> None:
        time.sleep(0.25)
        start(answer)

    monkeypatch.setattr(site.assistant, "start", unhurried)


def copies(folder: Path, count: int, name: str = "picture") -> list[Path]:
    """So many picture files."""
    made = [folder / f"{name} {number}.png" for number in range(count)]
    for number, path in enumerate(made):
        Image.new("RGB", (40, 40), (number % 256, 90, 200)).save(path)
    return made


def answer_to(assistant: Assistant, question: str, image: Path) -> str:
    return "".join(assistant.reply([user_message(question, [str(image)])])).strip()


def test_pictures_become_rows_a_csv_and_a_jsonl(batch, site, tmp_path):
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"not a picture")
    files = [*pictures(3), broken]
    batch.add(*files)
    assert batch.told() == "Pictures: 4" and batch.states() == ["waiting"] * 4
    batch.ask(QUESTION)
    batch.finished(f"{len(files) - 1} of {len(files)} answered · errors: 1")
    expected = [answer_to(site.assistant, QUESTION, file) for file in files[:-1]]
    assert batch.answers()[:-1] == [answer or "(no answer)" for answer in expected]
    assert batch.answers()[-1].startswith("broken.png: ")
    small = batch.page.locator(".batch-thumb img")
    wait_with(batch.page, lambda: small.last.get_attribute("src") is None)  # nor a broken picture
    assert small.first.get_attribute("src")
    head, *rows = csv.reader(batch.saved("CSV").read_text("utf-8-sig").splitlines())
    assert head == ["Picture", "Question", "Answer", "Error", "Seconds"]
    assert [row[:3] for row in rows[:-1]] == [
        [file.name, QUESTION, answer] for file, answer in zip(files[:-1], expected, strict=True)
    ]
    lines = [json.loads(line) for line in batch.saved("JSONL").read_text().splitlines()]
    assert [line["answer"] for line in lines] == [*expected, None]
    assert lines[-1]["error"] == batch.answers()[-1]


def test_asking_with_nothing_chosen_is_one_line_and_the_head_stays(batch):
    head = batch.room.locator(".batch-head > div")
    for question in ("", QUESTION):
        batch.ask(question)
        wait_with(batch.page, lambda: "Add pictures and a question first." in batch.toasts())
        assert head.all_text_contents() == ["Picture", "Answer"]
    assert batch.asked == []
    batch.field.press("Shift+Enter")  # begins a line
    assert batch.field.input_value() == f"{QUESTION}\n"


def test_stop_and_go_on_asks_only_what_is_left(batch, slow, tmp_path):
    batch.add(*copies(tmp_path, 24))
    batch.ask(QUESTION)
    wait_with(batch.page, lambda: "answered" in batch.states())
    batch.press("Stop")
    wait_with(batch.page, lambda: set(batch.states()) == {"answered", "waiting"})
    done = batch.states().count("answered")
    wait_with(batch.page, lambda: batch.told() == f"{done} of 24 answered · stopped")
    batch.asked.clear()
    batch.press("Go on")
    batch.finished("24 of 24 answered")
    assert sum(batch.asked) == 24 - done and done > 0
    assert batch.room.get_by_role("progressbar").get_attribute("aria-valuenow") == "24"


def test_while_it_runs_it_tells_how_long_and_takes_in_more(batch, slow, tmp_path):
    one, *others = copies(tmp_path, 30)
    batch.add(*others)
    batch.ask(QUESTION)
    wait_with(batch.page, lambda: " left" in batch.told())
    batch.add(one)
    batch.field.press("Enter")
    wait_with(batch.page, lambda: any("under way" in toast for toast in batch.toasts()))
    batch.finished("30 of 30 answered")
    assert sum(batch.asked) == 30


def test_those_with_errors_are_asked_again_alone(batch, site, tmp_path, monkeypatch):
    ask, failing = site.assistant.ask, {"picture 1.png", "picture 2.png"}

    def asked(messages: Any, *rest: Any, **more: Any) -> Any:
        if messages[-1].parts[0].value in failing:
            raise PhiSightError("conversation: too long; shorten it")
        return ask(messages, *rest, **more)

    monkeypatch.setattr(site.assistant, "ask", asked)
    batch.add(*copies(tmp_path, 4))
    batch.ask(QUESTION)
    batch.finished("2 of 4 answered · errors: 2")
    assert batch.states() == ["answered", "failed", "failed", "answered"]
    assert batch.answers()[1] == "conversation: too long; shorten it"
    failing.remove("picture 2.png")
    batch.asked.clear()
    batch.press("Ask those with errors again (2)")
    batch.finished("3 of 4 answered · errors: 1")
    failing.clear()
    batch.press("Ask about this picture again")
    batch.finished("4 of 4 answered")
    assert batch.asked == [2, 1]


def test_another_question_begins_a_column_and_the_former_one_stays(batch, tmp_path):
    batch.add(*pictures(3))
    batch.ask(QUESTION)
    batch.finished("3 of 3 answered")
    first = batch.answers()
    batch.field.press("Enter")  # it is all asked: nothing is thrown away by a key
    wait_with(batch.page, lambda: len(batch.toasts()) == 1)
    batch.ask(OTHER)
    batch.finished("3 of 3 answered")
    second = batch.answers()
    assert sum(batch.asked) == 6
    batch.press(QUESTION)
    assert batch.answers() == first and batch.field.input_value() == QUESTION
    assert len(batch.saved("CSV").read_text("utf-8-sig").splitlines()) == 4
    batch.press(OTHER)
    assert batch.answers() == second
    batch.press("Ask all again")
    wait_with(batch.page, lambda: sum(batch.asked) == 9)
    batch.finished("3 of 3 answered")
    assert batch.answers() == second


def test_a_row_and_the_list_are_removed_and_come_back(batch, tmp_path):
    files = copies(tmp_path, 3)
    batch.add(*files)
    batch.ask(QUESTION)
    batch.finished("3 of 3 answered")
    answers = batch.answers()
    remove = batch.room.get_by_role("button", name="Remove this picture from the list")
    remove.nth(1).focus()
    batch.page.keyboard.press("Enter")
    assert batch.answers() == [answers[0], answers[2]] and batch.told() == "2 of 2 answered"
    assert batch.page.evaluate("document.activeElement.className").endswith("batch-remove")
    batch.press("Undo")
    assert batch.answers() == answers
    batch.press("Clear the list")
    assert batch.rows.count() == 0
    batch.room.get_by_text("Drop pictures or a folder here").wait_for()
    batch.press("Undo")
    assert batch.answers() == answers and batch.told() == "3 of 3 answered"
    chooser = batch.room.locator("input[type=file]").first
    chooser.set_input_files([str(file) for file in files])
    wait_with(batch.page, lambda: any(toast.endswith(": 3") for toast in batch.toasts()))
    assert batch.rows.count() == 3


def test_it_goes_on_in_another_room_and_a_reload_keeps_the_question(batch, slow, tmp_path):
    batch.add(*copies(tmp_path, 10))
    batch.ask(QUESTION)
    batch.page.get_by_role("link", name="Chat").click()
    batch.room.wait_for(state="hidden")
    wait_with(batch.page, lambda: batch.states() == ["answered"] * 10)
    batch.page.get_by_role("link", name="Batch").click()
    batch.finished("10 of 10 answered")
    asked_first: list[str] = []
    batch.page.on("dialog", lambda dialog: asked_first.append(dialog.type) or dialog.accept())
    batch.page.reload()  # answers that are in no file would be lost
    batch.field.wait_for()
    assert batch.field.input_value() == QUESTION and batch.rows.count() == 0
    assert asked_first == ["beforeunload"]


def test_a_folder_is_chosen_and_pictures_are_dropped_anywhere(batch, tmp_path):
    folder = tmp_path / "album"
    (folder / "inside").mkdir(parents=True)
    for number, path in enumerate(copies(folder, 12)):
        if number % 2:
            shutil.move(path, folder / "inside" / path.name)
    (folder / "notes.txt").write_text("of last summer")
    (folder / ".hidden").write_text("")
    batch.room.locator("input[webkitdirectory]").set_input_files(str(folder))
    wait_with(batch.page, lambda: batch.rows.count() == 12)
    names = batch.room.locator(".batch-name > span").all_text_contents()
    assert names[:3] == ["picture 1.png", "picture 3.png", "picture 5.png"]  # by folder and number
    assert batch.room.locator(".batch-name small").nth(0).inner_text() == "album/inside"
    assert batch.toasts() == ["Not pictures, and passed over: 1"]
    transfer = batch.page.evaluate_handle(
        """() => {
            const given = new DataTransfer();
            given.items.add(new File(["x"], "dropped.png", { type: "image/png" }));
            return given;
        }"""
    )
    batch.page.dispatch_event("h1", "dragover", {"dataTransfer": transfer})
    batch.room.get_by_text("Drop to add to the list").wait_for()
    batch.page.dispatch_event("h1", "drop", {"dataTransfer": transfer})
    wait_with(batch.page, lambda: batch.rows.count() == 13)
    batch.page.get_by_role("link", name="Chat").click()
    batch.room.wait_for(state="hidden")
    batch.page.dispatch_event("main", "drop", {"dataTransfer": transfer})  # not this room's
    assert batch.rows.count() == 13


def test_of_many_pictures_few_are_shown_and_few_are_kept(batch, site, tmp_path):
    batch.add(*copies(tmp_path, 100, "of many"))
    with_pictures = batch.room.locator(".batch-thumb img[src]")
    wait_with(batch.page, lambda: with_pictures.count() > 0)
    assert with_pictures.count() < 60
    batch.rows.nth(99).scroll_into_view_if_needed()
    batch.room.locator(".batch-row:last-child img[src]").wait_for()
    wait_with(
        batch.page, lambda: batch.room.locator(".batch-row:first-child img[src]").count() == 0
    )
    batch.ask(QUESTION)
    batch.finished("100 of 100 answered")
    assert sum(batch.asked) == 100 and max(batch.asked) <= 64
    batch.press("Clear the list")
    uploads = own_folder() / UPLOADS
    wait_for(lambda: not [path for path, _ in files_in(uploads) if "of many" in path.name])


def test_a_server_that_is_lost_ends_the_batch_and_leaves_the_rest_to_be_asked(batch, tmp_path):
    batch.add(*copies(tmp_path, 3))
    batch.page.route("**/app/batches", lambda route: route.abort())
    batch.ask(QUESTION)
    wait_with(batch.page, lambda: any("does not answer" in toast for toast in batch.toasts()))
    wait_with(batch.page, lambda: batch.states() == ["waiting"] * 3)
    batch.page.unroute("**/app/batches")
    batch.press("Ask about all")
    batch.finished("3 of 3 answered")
    batch.user.faults[:] = [one for one in batch.user.faults if "net::ERR_FAILED" not in one]


def test_a_picture_is_shown_in_full_and_too_large_ones_are_not_sent(batch, tmp_path):
    large = tmp_path / "large.png"
    with large.open("wb") as file:
        file.truncate(20 * 2**20 + 1)
    batch.add(pictures(1)[0], large)
    batch.press(f"Show {pictures(1)[0].name} in full size")
    shown = batch.page.locator(".lightbox img")
    wait_with(batch.page, lambda: shown.evaluate("image => image.naturalWidth") > 0)
    batch.page.keyboard.press("Escape")
    shown.wait_for(state="detached")
    batch.ask(QUESTION)
    batch.finished("1 of 2 answered · errors: 1")
    assert batch.answers()[1].startswith("large.png") and "20 MB" in batch.answers()[1]


def test_the_table_is_copied_and_the_settings_are_sent(browser, site):
    batch = Batch(browser, site)
    batch.user.context.grant_permissions(["clipboard-read", "clipboard-write"])
    batch.page.evaluate("localStorage.setItem('phisight.settings', '{\"max_new_tokens\": 1}')")
    batch.user.open()
    batch.open()
    batch.add(pictures(1)[0])
    with batch.page.expect_request("**/app/batches") as sent:
        batch.ask("Describe it.")
    assert sent.value.post_data_json["settings"]["max_new_tokens"] == 1
    batch.finished("1 of 1 answered")
    batch.press("Download")
    batch.page.get_by_role("menuitem", name="Copy as a table").click()
    wait_with(batch.page, lambda: batch.toasts() == ["The table is on the clipboard."])
    text = batch.page.evaluate("navigator.clipboard.readText()")
    head, row = text.strip().splitlines()
    assert head.split("\t")[:2] == ["Picture", "Question"]
    assert row.split("\t")[:2] == [pictures(1)[0].name, "Describe it."]
    batch.user.close()


def test_on_a_telephone_in_another_language(browser, site):
    size = {"width": 390, "height": 800}
    user = User(browser, site, viewport=size)
    user.page.evaluate("localStorage.setItem('phisight.language', '\"es\"')")
    user.open()
    user.page.goto(f"{site.url}/#/batch")
    user.page.locator(".batch-room input[type=file]").first.set_input_files(
        [str(path) for path in pictures(3)]
    )
    user.page.locator(".batch-room textarea").fill(QUESTION)
    user.page.get_by_role("button", name="Preguntar por todas").click()
    user.page.get_by_text("3 de 3 respondidas").first.wait_for()
    assert user.page.evaluate("document.documentElement.scrollWidth") <= 390
    for control in user.page.locator(".batch-room button:visible").all():
        box = control.bounding_box()
        assert box["width"] >= 24 and box["height"] >= 24
    user.close()
