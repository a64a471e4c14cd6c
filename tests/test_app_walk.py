"""The whole way in one visit: a question by voice, a run that is trained from the page, watched,
stopped, gone on with, talked to, and taken along."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import runs
from pages import Site, pictures, served, wait_with
from sounds import TINY, needs_espeak
from test_app_voice import Speaking
from test_trainings import end

from assistant.assistant import Assistant
from assistant.messages import user_message
from speech.spoken import loaded_once, voices_loaded_once
from web.model import Model
from web.trainings import launch

pytestmark = needs_espeak
QUESTION = "How many objects are there?"
STEPS = 30
TRAINING = 300.0  # seconds in which a busy machine trains them


@pytest.fixture
def site(tmp_path, monkeypatch) -> Iterator[Site]:
    if not TINY.exists():
        pytest.skip(f"{TINY} is not there")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    folder = tmp_path / "runs"
    folder.mkdir()
    model = Model(runs.own_assistant(), load=Assistant.load)
    speech, voice = loaded_once(str(TINY)), voices_loaded_once("espeak-ng")
    with served(
        model, tmp_path / "talk", folder, may_train=True, speech=speech, voice=voice
    ) as site:
        yield site
    for name in launch.names(folder):
        end(folder / name)
    model.close()


@pytest.fixture
def user(browser, site) -> Iterator[Speaking]:
    user = Speaking(browser, site)
    yield user
    user.close()


def press(user: Speaking, name: str) -> None:
    user.page.get_by_role("button", name=name, exact=True).last.click()


def chats_with_one(user: Speaking) -> bool:
    """Whether the chat is open; else press for it. A click is lost where the list of checkpoints is
    drawn anew between the button's going down and coming up."""
    if "#/chat" not in user.page.url:
        press(user, "Chat with this one")
        user.page.wait_for_timeout(3000)
    return "#/chat" in user.page.url


def curve(user: Speaking) -> str:
    """The path of the loss as it is drawn now; empty where it is not drawn yet."""
    lines = user.page.locator("path.line")
    return (lines.first.get_attribute("d") or "") if lines.count() else ""


def ask_by_voice(user: Speaking) -> None:
    user.attach(pictures(1)[0])
    user.page.locator("#record").click()
    user.becomes("recording")
    user.hears(QUESTION)
    user.page.locator("#record").click()
    (_, asked), (_, answered) = user.answers(1)
    assert asked == QUESTION and user.pictures() == 1 and answered
    user.page.locator("#spoken-answer").wait_for()


def begin_training(user: Speaking, folder: Path) -> None:
    page = user.page
    page.goto(f"{user.site.url}/#/training")
    press(user, "Train a new run")
    window = page.locator(".begin-window")
    window.wait_for()
    press(user, "Continue")
    window.get_by_label("Conversations", exact=True).fill(str(runs.world() / "train.json"))
    window.get_by_label("Pictures", exact=True).fill(str(runs.world() / "images"))
    press(user, "Check the data")
    window.locator(".begin-tile").first.wait_for()
    press(user, "Continue")
    settings = {"Max steps": STEPS, "Save steps": 2, "Evaluate steps": 10, "Batch size": 8}
    settings |= {"Threads": 1, "Log steps": 1, "Features": folder / "features"}
    for label, value in settings.items():
        window.get_by_label("Search settings").fill(label)
        window.get_by_label(label, exact=True).fill(str(value))
    press(user, "Continue")
    window.get_by_label("Name of the run").fill("walk")
    command = window.locator(".begin-code code")
    wait_with(page, lambda: "/walk" in command.inner_text())
    press(user, "Start training")
    page.wait_for_url("**/#/training/walk")


def test_ask_by_voice_train_watch_stop_resume_chat_and_export(user, site, tmp_path):
    page, folder = user.page, tmp_path / "runs"
    ask_by_voice(user)

    begin_training(user, tmp_path)
    wait_with(page, lambda: curve(user) != "", TRAINING)
    before = curve(user)
    # It moves as the run goes on.
    wait_with(page, lambda: curve(user) not in ("", before), TRAINING)
    press(user, "Stop")
    page.get_by_role("button", name="Resume", exact=True).wait_for()
    stopped = runs.newest_step(folder / "walk")
    assert 0 < stopped < STEPS

    press(user, "Resume")
    press(user, "Resume")  # in the window that it has opened
    ended = page.get_by_role("button", name="Train longer")
    wait_with(page, lambda: ended.count() == 1, TRAINING)
    assert runs.newest_step(folder / "walk") == STEPS

    wait_with(page, lambda: chats_with_one(user))
    page.locator(".chat-bar", has_text="walk").wait_for()
    user.start_over()
    user.ask(QUESTION, pictures(1)[0])
    (_, _), (_, answered) = user.answers(1)
    trained = Assistant.load(folder / "walk")
    try:
        said = "".join(trained.reply([user_message(QUESTION, [str(pictures(1)[0])])]))
    finally:
        trained.close()
    assert " ".join(answered.split()) == (" ".join(said.split()) or "(no answer)")

    page.goto(f"{site.url}/#/training/walk")
    press(user, "Export")
    page.get_by_text("PEFT", exact=False).first.click()
    press(user, "Export")
    with page.expect_download() as started:
        page.get_by_role("link", name="Download").click()
    with zipfile.ZipFile(io.BytesIO(Path(started.value.path()).read_bytes())) as archive:
        assert archive.testzip() is None
        names = archive.namelist()
    assert any(name.endswith("adapter_model.safetensors") for name in names), names
