"""The training room's windows in a browser: a run is begun, watched, stopped and exported."""

from __future__ import annotations

import json
import re
import shutil
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import runs
from axe import findings
from pages import Site, User, served, wait_with
from test_trainings import end

from web.model import Model
from web.trainings import launch


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("HF_HUB_OFFLINE", "1")
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Iterator[Path]:
    """A folder of runs with one that is finished."""
    folder = tmp_path_factory.mktemp("runs")
    shutil.copytree(runs.finished_run(), folder / "done")
    yield folder
    for name in launch.names(folder):
        end(folder / name)


@pytest.fixture(scope="module")
def site(folder, tmp_path_factory) -> Iterator[Site]:
    with served(Model(), tmp_path_factory.mktemp("talk"), folder, may_train=True) as site:
        yield site


@pytest.fixture
def user(browser, site) -> Iterator[User]:
    user = User(browser, site)
    user.page.goto(f"{site.url}/#/training")
    yield user
    user.close()


def press(user: User, name: str) -> None:
    user.page.get_by_role("button", name=name, exact=True).last.click()


def begin(user: User) -> None:
    press(user, "Train a new run")
    user.page.locator(".begin-window").wait_for()


def field(user: User, label: str) -> Any:
    """A field of the window that is open."""
    words = re.compile(rf"^{re.escape(label)}(?:$| and their| \(empty)")
    return user.page.get_by_role("dialog").get_by_label(words)


def problem(user: User) -> str:
    return user.page.locator(".begin-foot .begin-wrong").inner_text()


def test_a_run_is_begun_watched_stopped_and_gone_on_with(user, folder):
    page = user.page
    begin(user)
    press(user, "Continue")
    field(user, "Conversations").fill(str(runs.world()))
    field(user, "Pictures").fill("")
    press(user, "Continue")  # has the data checked first
    page.locator(".begin-good").wait_for()
    assert field(user, "Conversations").input_value() == str(runs.world() / "train.json")
    tiles = page.locator(".begin-tile").all_inner_texts()
    assert "40" in tiles[1] and "pictures" in tiles[1] and tiles[3].startswith("0")
    assert not (folder / "walk").exists(), "nothing is written before the start"

    press(user, "Continue")
    for label, value in (
        ("Max steps", 100_000),
        ("Save steps", 1),
        ("Batch size", 1),
        ("Evaluate steps", 0),
    ):
        field(user, label).fill(str(value))
    for label, value in (("Threads", 1), ("Log steps", 1), ("Features", folder / "features")):
        field(user, "Search settings").fill(label)
        field(user, label).fill(str(value))
    press(user, "Continue")
    field(user, "Name of the run").fill("walk")
    command = page.locator(".begin-code code")
    wait_with(page, lambda: "/walk" in command.inner_text())
    assert "--max-steps 100000" in command.inner_text()
    press(user, "Start training")

    page.wait_for_url("**/#/training/walk")
    page.get_by_role("button", name="Stop", exact=True).wait_for()
    wait_with(page, lambda: list((folder / "walk").glob("checkpoint-*")))
    record = launch.record_of(folder / "walk")
    assert record is not None and "--max-steps 100000" in record["command"]
    press(user, "Stop")
    page.get_by_role("button", name="Resume", exact=True).wait_for()
    stopped = runs.newest_step(folder / "walk")

    press(user, "Resume")
    field(user, "End at step").fill(str(stopped))
    press(user, "Resume")
    assert "after" in page.locator(".begin-resume [role=alert]").inner_text()
    field(user, "End at step").fill(str(stopped + 2))
    press(user, "Resume")
    wait_with(page, lambda: page.get_by_role("button", name="Train longer").count() == 1)
    assert runs.newest_step(folder / "walk") == stopped + 2


def test_what_is_wrong_is_told_at_its_field_and_what_was_entered_is_kept(user, folder):
    page = user.page
    begin(user)
    press(user, "Continue")
    field(user, "Conversations").fill("/nowhere/at/all")
    press(user, "Check the data")
    page.locator(".begin-data > .begin-wrong").wait_for()
    assert "no such file or folder" in page.locator(".begin-data > .begin-wrong").inner_text()

    page.get_by_role("button", name="3 Settings").click()
    field(user, "Epochs").fill("0")
    wrong = page.locator(".begin-field", has_text="--epochs").locator(".begin-wrong").first
    wait_with(page, lambda: wrong.is_visible())
    assert "at least 1" in wrong.inner_text()
    page.get_by_role("button", name="4 Name and start").click()
    wait_with(page, lambda: "epochs" in problem(user))
    assert page.get_by_role("button", name="Start training").is_disabled()
    field(user, "Name of the run").fill("done")
    wait_with(page, lambda: "there already" in page.locator(".begin-last").inner_text())

    page.keyboard.press("Escape")
    begin(user)
    page.get_by_role("button", name="3 Settings").click()
    assert field(user, "Epochs").input_value() == "0"
    page.get_by_role("button", name="Back to 1").click()
    assert field(user, "Epochs").input_value() == "1"
    field(user, "Changed only").check()
    assert page.locator(".begin-fields .begin-field:visible").count() == 0


def test_a_run_begins_with_the_recipe_and_the_weights_of_another(user, folder):
    page = user.page
    user.open("#/training/done")
    press(user, "Begin a new run with its weights")
    page.locator(".begin-window").wait_for()
    assert field(user, "Begin with the weights of").input_value() == "done"
    command = page.locator(".begin-code code")
    wait_with(page, lambda: f"--start-from {folder}/done" in command.inner_text())
    assert "--run" in command.inner_text() and "done-2" in command.inner_text()
    assert "--learning-rate 0.001" in command.inner_text()


def test_an_export_is_downloaded_with_its_certificate(user, tmp_path):
    page = user.page
    user.open("#/training/done")
    press(user, "Export")
    page.get_by_text("LLaVA, with pictures").click()
    page.get_by_text("Options", exact=True).click()
    field(user, "--greedy-answers").fill("x")
    press(user, "Export")
    wait_with(
        page, lambda: "whole number" in page.locator(".exports-form [role=alert]").inner_text()
    )
    field(user, "--greedy-answers").fill("3")
    field(user, "--evaluation-conversations").fill("2")
    press(user, "Export")
    page.locator(".exports-state.running").wait_for()
    with page.expect_download() as started:
        page.get_by_role("link", name="Download").click()
    assert "Equal answers" in page.locator(".exports-figures").inner_text()
    path = tmp_path / "sent.zip"
    started.value.save_as(path)
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
        [name] = [one for one in archive.namelist() if one.endswith("merge_certificate.json")]
        assert json.loads(archive.read(name))["within_tolerance"]
    press(user, "Remove")
    wait_with(page, lambda: page.locator(".exports-list li").count() == 0)


@pytest.mark.parametrize(("width", "scheme"), [(390, "dark"), (1280, "light")])
def test_axe_finds_nothing_grave_in_the_window_of_exports(browser, site, width, scheme):
    user = User(browser, site, viewport={"width": width, "height": 844}, color_scheme=scheme)
    user.open("#/training/done")
    press(user, "Export")
    user.page.locator(".exports-form").wait_for()
    assert findings(user.page) == []
    user.close()


def test_where_training_is_not_allowed_one_line_says_how_it_would_be(browser, folder, tmp_path):
    with served(Model(), tmp_path, folder) as site:
        user = User(browser, site)
        user.page.goto(f"{site.url}/#/training/done")
        user.page.get_by_role("heading", name="done").wait_for()
        assert user.page.get_by_role("button", name="Export", exact=True).count() == 0
        user.page.goto(f"{site.url}/#/training")
        user.page.get_by_text("--allow-training").wait_for()
        assert user.page.get_by_role("button", name="Train a new run").count() == 0
        user.close()
