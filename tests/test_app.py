"""The web app in a real browser, and the command that serves it."""

from __future__ import annotations

import csv
import io
import json
import os
import shutil
import time
from pathlib import Path

import httpx
import numpy
import pytest
import runs
import soundfile
from pages import WAIT, Site, User, chromium, pictures, served, wait_for, wait_with
from PIL import Image

import app
from assistant.assistant import Assistant
from assistant.messages import user_message
from data.images import MAX_BYTES
from errors import PhiSightError
from speech.spoken import loaded_once, voices_loaded_once

LONG_ANSWER = "Describe the picture in detail."


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Site:
    """The app with the tests' own small run, or with a better one: see `test_its_picture`."""
    run = os.environ.get("PHISIGHT_APP_RUN")
    assistant = Assistant.load(run) if run else runs.assistant()
    logs = Path(run).parent if run else runs.finished_run().parent
    with served(assistant, tmp_path_factory.mktemp("conversations"), logs) as site:
        yield site


@pytest.fixture(scope="module")
def start_browser():
    with chromium() as start:
        yield start


@pytest.fixture(scope="module")
def browser(start_browser):
    return start_browser()


@pytest.fixture
def user(browser, site) -> User:
    user = User(browser, site)
    yield user
    user.close()


@pytest.fixture
def endless(site, monkeypatch):
    """A model that never says that it has finished, and takes its time: a token of the tiny one
    takes a fraction of a millisecond."""
    engine = site.assistant.engine
    step = engine._step

    def unhurried() -> None:
        time.sleep(0.01)
        step()

    monkeypatch.setattr(engine, "stop_ids", frozenset())
    monkeypatch.setattr(engine, "_step", unhurried)


def answer_to(site: Site, question: str, *images: Path) -> str:
    reply = site.assistant.reply([user_message(question, [str(image) for image in images])])
    return "".join(reply).strip()


def shown(answer: str) -> str:
    return " ".join(answer.split()) or "(no answer)"


def bubble(text: str) -> str:
    return " ".join(text.split())


# -- asking ---------------------------------------------------------------------------------------


def test_an_example_is_asked_on_a_click_and_answered_as_the_assistant_does(user, site):
    question = user.try_example(0)
    (_, asked), (_, answered) = user.answers(1)
    assert asked == question and user.pictures() == 1
    kept = next(site.conversations.rglob("*.png"))
    assert bubble(answered) == shown(answer_to(site, question, kept))
    assert user.conversations() == [question]


def test_several_pictures_in_any_turn_and_questions_without_any(user, site):
    one, two, three = pictures(3)
    user.ask("How many objects are there?")
    user.answers(1)
    user.ask("Which?", one, two)
    user.answers(2)
    user.ask("", three)
    conversation = user.answers(3)
    assert [who for who, _ in conversation] == ["user", "bot", "user", "bot", "bot"]
    assert user.pictures() == 3
    saved = json.loads(
        next(
            p for p in site.conversations.rglob("conversation.json") if "Which?" in p.read_text()
        ).read_text()
    )
    kinds = [[part["kind"] for part in m["parts"]] for m in saved["messages"][::2]]
    assert kinds == [["text"], ["image", "image", "text"], ["image"]]


def test_an_empty_question_is_not_asked(user):
    user.ask(" ")
    wait_with(user.page, lambda: user.told() == ["Ask something or add a picture first."])
    assert user.said() == [] and user.conversations() == []


def test_a_question_that_is_edited_is_asked_again_with_its_picture(user, site):
    user.ask("What is it?", pictures(1)[0])
    user.answers(1)
    user.ask("And now?")
    user.answers(2)
    user.click("Edit", 0)
    user.page.locator("#chat textarea").fill("How many objects are there?")
    user.click("Submit")
    wait_with(user.page, lambda: ("user", "How many objects are there?") in user.said())
    (_, asked), (_, answered) = user.answers(1)
    assert asked == "How many objects are there?" and user.pictures() == 1
    assert bubble(answered) == shown(answer_to(site, asked, pictures(1)[0]))


def test_retry_and_undo(user, site, monkeypatch):
    user.ask("What is it?", pictures(1)[0])
    first = user.answers(1)
    reply, asked = site.assistant.reply, []

    def seeded(messages, longest, sampling, seed, *rest, **more):
        """As it was asked, but for chance: an answer may be empty at this temperature."""
        asked.append((messages, longest, sampling, seed))
        return reply(messages, longest, sampling, 1, *rest, **more)

    monkeypatch.setattr(site.assistant, "reply", seeded)
    user.set("temperature", 1.5)
    user.set("max-new-tokens", 7)
    user.click("Retry")
    wait_with(user.page, lambda: len(asked) == 1)
    messages, longest, sampling, seed = asked[0]
    assert (longest, sampling.temperature, seed) == (7, 1.5, None)
    assert [part.kind for part in messages[-1].parts] == ["image", "text"]
    assert user.answers(1)[0] == first[0] and user.pictures() == 1
    user.click("Undo")
    wait_with(user.page, lambda: user.said() == [])
    assert user.page.locator("#question textarea").input_value() == "What is it?"
    assert user.page.locator("#question img").count() == 1  # the picture is back in the box too
    user.set("temperature", 0)
    user.set("max-new-tokens", 256)
    user.page.locator("#question textarea").press("Enter")
    assert user.answers(1) == first


def test_stop_ends_the_generation_and_keeps_what_was_said(user, site, endless):
    user.set("max-new-tokens", 2048)
    user.ask(LONG_ANSWER, pictures(1)[0])
    wait_with(user.page, lambda: len(user.said()) == 2)
    assert site.assistant.statistics()["running"] == 1
    user.page.locator("#question .stop-button").click()
    wait_for(lambda: site.assistant.statistics()["running"] == 0)
    user.answers(1)
    assert "stopped after" in user.page.locator("#note").inner_text()
    assert user.said()[1][1]
    user.set("max-new-tokens", 4)
    user.ask("And now?")
    user.answers(2)
    assert "cut at 4 tokens" in user.page.locator("#note").inner_text()


def test_a_page_that_is_closed_stops_its_answer_and_finds_it_again(user, site, endless):
    user.set("max-new-tokens", 2048)
    user.ask(LONG_ANSWER, pictures(1)[0])
    wait_with(user.page, lambda: len(user.said()) == 2)
    user.page.goto("about:blank")
    user.faults.clear()  # Gradio's page complains that its stream was cut: it was
    wait_for(lambda: site.assistant.statistics()["running"] == 0)
    user.open()
    wait_with(user.page, lambda: len(user.said()) == 2)
    assert user.said()[0] == ("user", LONG_ANSWER)


# -- by voice -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def talking_site(site, tmp_path_factory) -> Site:
    """The app with the tiny preset's Whisper and espeak-ng's voice."""
    whisper = runs.ROOT / "assets/tiny/whisper/tiny.pt"
    if not whisper.exists():
        pytest.skip(f"{whisper} is not there")
    if shutil.which("espeak-ng") is None:
        pytest.skip("espeak-ng is not there: apt-get install espeak-ng")
    folder = tmp_path_factory.mktemp("talked")
    with served(
        site.assistant,
        folder,
        folder,
        speech=loaded_once(str(whisper)),
        voice=voices_loaded_once("espeak-ng"),
    ) as talking:
        yield talking


def spoken(question: str, path: Path) -> Path:
    """A recording of a question, with a second of silence before and after."""
    from speech.voice import Voice, write_wav

    samples, rate = Voice.load("espeak-ng", "en").speak(question)
    write_wav(path, numpy.pad(samples, rate), rate)
    return path


def test_a_question_is_spoken_heard_answered_and_the_answer_spoken(
    start_browser, talking_site, tmp_path
):
    recording = spoken("How many objects are there?", tmp_path / "question.wav")
    browser = start_browser(f"--use-file-for-fake-audio-capture={recording}%noloop")
    user = User(browser, talking_site)
    page = user.page
    page.get_by_role("tab", name="Voice").click()
    page.locator("#ask-by-voice").click()
    wait_with(page, lambda: user.told() == ["Record or upload a question first."])
    page.locator("#voice-pictures input[type=file]").set_input_files(str(pictures(1)[0]))
    page.locator("#voice-pictures img").first.wait_for()
    page.locator("#recording .record-button").click()
    page.wait_for_timeout(5000)  # the question is being said
    with page.expect_response(lambda response: "/upload" in response.url):
        page.locator("#recording .stop-button").click()
    page.locator("#recording [data-testid^=audio-player]").first.wait_for(state="attached")
    page.locator("#settings button").first.click()
    page.locator("#aloud input").check()
    page.locator("#ask-by-voice").click()
    (_, asked), (_, answered) = user.answers(1)
    assert asked == page.locator("#heard textarea").input_value() == "How many objects are there?"
    assert user.pictures() == 1
    assert bubble(answered) == shown(answer_to(talking_site, asked, pictures(1)[0]))
    link = page.locator("#spoken-answer a.download-link")
    link.wait_for()
    samples, rate = soundfile.read(io.BytesIO(page.request.get(link.get_attribute("href")).body()))
    assert len(samples) > rate / 5 and abs(samples).max() > 0.05
    user.close()


def test_a_recording_alone_is_a_question_and_silence_is_none(browser, talking_site, tmp_path):
    user = User(browser, talking_site)
    user.attach_recording(spoken("Is there a red star?", tmp_path / "question.wav"))
    user.ask("")
    assert user.answers(1)[0] == ("user", "Is there a red star?")
    silence = tmp_path / "silence.wav"
    soundfile.write(silence, numpy.zeros(16000), 16000)
    user.attach_recording(silence)
    user.ask("")
    wait_with(user.page, lambda: len(user.told()) == 1)
    assert "no speech heard" in user.told()[0]
    user.close()


def test_without_a_speech_model_a_recording_is_refused(user, tmp_path):
    recording = tmp_path / "question.wav"
    soundfile.write(recording, numpy.zeros(16000), 16000)
    user.attach_recording(recording)
    user.ask("")
    wait_with(user.page, lambda: len(user.told()) == 1)
    assert user.told()[0].startswith("No speech model is loaded")


# -- conversations --------------------------------------------------------------------------------


def test_a_conversation_survives_a_reload(user):
    user.ask("What is it?", pictures(1)[0])
    first = user.answers(1)
    user.start_over()
    user.ask("Is there a red star?")
    second = user.answers(1)
    user.open()  # what was open is open again
    assert user.said() == second
    assert user.conversations() == ["Is there a red star?", "What is it?"]
    user.page.locator("#conversations label").nth(1).click()
    wait_with(user.page, lambda: user.said() == first)
    wait_with(user.page, lambda: user.pictures() == 1)  # it comes after the words
    source = user.page.locator("#chat .user-row img").get_attribute("src")
    assert user.page.request.get(source).body() == pictures(1)[0].read_bytes()
    user.page.locator("#delete-conversation").click()
    wait_with(user.page, lambda: user.conversations() == ["Is there a red star?"])
    assert user.said() == []


def test_two_users_at_once_keep_apart(user, browser, site, endless):
    other = User(browser, site)
    user.set("max-new-tokens", 600)
    user.ask("What is it?", pictures(1)[0])
    wait_with(user.page, lambda: len(user.said()) == 2)
    other.set("max-new-tokens", 5)
    other.ask("Is there a red star?", pictures(2)[1])
    other.answers(1)  # while the first one's answer goes on
    assert not user.is_idle()
    assert other.said()[0][1] == "Is there a red star?"
    assert user.said()[0][1] == "What is it?"
    assert other.conversations() == ["Is there a red star?"]
    assert user.conversations() == ["What is it?"]
    user.page.locator("#question .stop-button").click()
    user.answers(1)
    other.close()


# -- uploads that are refused ---------------------------------------------------------------------


def test_an_upload_that_is_not_a_picture_is_one_line_and_the_chat_goes_on(user, tmp_path):
    fake = tmp_path / "fake.png"
    fake.write_text("not a picture")
    user.attach(fake, pictures(1)[0])
    user.ask("What is it?")
    wait_with(user.page, lambda: len(user.told()) == 1)
    assert user.told()[0].startswith("fake.png: not a picture in a known format")
    user.page.locator("#question img").nth(1).wait_for(state="detached")  # only the bad one goes
    assert user.page.locator("#question textarea").input_value() == "What is it?"
    user.page.locator("#question textarea").press("Enter")
    assert user.answers(1)[0] == ("user", "What is it?")
    assert user.pictures() == 1


def test_a_picture_of_50_megabytes_is_one_line_and_the_chat_goes_on(user, site, tmp_path):
    huge = tmp_path / "huge.bmp"
    Image.fromarray(numpy.zeros((4096, 4096, 3), numpy.uint8)).save(huge)
    assert 50e6 < huge.stat().st_size <= MAX_BYTES
    user.page.locator("#question input[type=file]").set_input_files(str(huge))
    wait_with(user.page, lambda: len(user.told()) == 1)
    assert 'exceed the maximum allowed size of 20.0 Mb: "huge.bmp"' in user.told()[0]
    user.ask("What is it?", pictures(1)[0])
    user.answers(1)
    with huge.open("rb") as file:  # a program that does not ask the page is refused too
        sent = httpx.post(f"{site.url}/gradio_api/upload", files={"files": file})
    assert sent.status_code == 413 and len(sent.text.splitlines()) == 1


# -- the other tabs -------------------------------------------------------------------------------


def test_a_batch_becomes_a_table_and_a_csv(user, site, tmp_path):
    broken = tmp_path / "broken.png"
    broken.write_bytes(pictures(1)[0].read_bytes()[:60])
    files = [*pictures(3), broken]
    page = user.page
    page.get_by_role("tab", name="Batch").click()
    page.locator("#batch-run").click()
    wait_with(page, lambda: user.told() == ["Add pictures and a question first."])
    page.locator("#batch-files input[type=file]").set_input_files([str(f) for f in files])
    page.locator("#batch-files", has_text="broken").wait_for()
    page.locator("#batch-question textarea").fill("How many objects are there?")
    page.locator("#batch-run").click()
    page.locator("#batch-note", has_text="4 of 4 answered").wait_for()
    with page.expect_download() as download:
        page.locator("#batch-download").click()
    rows = list(csv.reader(Path(download.value.path()).read_text("utf-8-sig").splitlines()))
    expected = [[f.name, answer_to(site, "How many objects are there?", f)] for f in files[:3]]
    assert rows[:4] == [["Picture", "Answer"], *expected]
    assert rows[4][0] == "broken.png" and rows[4][1].startswith("(broken.png: ")
    for name, answer in expected:
        assert name in page.locator("#batch-table").inner_text()


def test_the_training_tab_shows_a_run_as_it_grows_and_survives_a_damaged_log(
    browser, site, tmp_path_factory, monkeypatch
):
    monkeypatch.setattr("web.training_page.REFRESH_SECONDS", 0.3)
    logs = tmp_path_factory.mktemp("logs")
    (logs / "mine").mkdir()
    whole = (runs.finished_run() / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    log = logs / "mine" / "metrics.jsonl"
    log.write_bytes(b"".join(whole[:1]))
    with served(site.assistant, site.conversations, logs) as other:
        user = User(browser, other)
        user.page.get_by_role("tab", name="Training").click()
        figures = user.page.locator("#meter .figures")
        step = json.loads(whole[0])["step"]
        figures.get_by_text(str(step), exact=True).wait_for()
        assert user.page.locator("#meter .bar").count() == 0
        user.page.locator("#plot-loss svg.marks").wait_for()
        log.write_bytes(b"".join(whole))
        assert user.page.locator("#meter .bar").nth(2).wait_for() is None
        right = json.loads(next(line for line in reversed(whole) if b"alignment" in line))
        bar = user.page.locator("#meter .bar").first.inner_text()
        assert f"{right['alignment']['right']:.1f} %" in bar
        log.write_bytes(b"".join(whole) + b"<script>alert(1)</script>\n")
        user.page.locator("#meter .message", has_text="is not JSON").wait_for()
        shutil.rmtree(logs / "mine")
        user.page.locator("#meter .message", has_text="No run has been trained here").wait_for()
        user.close()


def test_the_texts_change_with_the_language_and_the_choice_is_remembered(user):
    page = user.page
    user.try_example(1)
    said = user.answers(1)
    page.locator("#settings button").first.click()
    page.locator("#language input").click()
    page.get_by_role("option", name="Deutsch").click()
    page.get_by_role("button", name="Neues Gespräch").wait_for()
    page.get_by_role("tab", name="Stapel").wait_for()
    page.get_by_text("Längste Antwort (Token)").wait_for()
    assert user.said() == said  # what was asked and answered is nobody's to translate
    page.reload()
    page.get_by_role("button", name="Neues Gespräch").wait_for()


def test_a_browser_that_speaks_chinese_is_met_in_chinese(browser, site):
    context = browser.new_context(locale="zh-CN")
    page = context.new_page()
    page.goto(site.url)
    page.get_by_role("button", name="新对话").wait_for(timeout=WAIT)
    context.close()


def test_on_a_telephone_the_conversation_comes_first(browser, site):
    user = User(browser, site, viewport={"width": 390, "height": 800})
    box = user.page.locator("#question textarea").bounding_box()
    assert 0 <= box["x"] and box["x"] + box["width"] <= 390 and box["y"] < 800
    assert user.page.evaluate("document.documentElement.scrollWidth") <= 390
    user.try_example(0)
    user.answers(1)
    user.close()


def test_its_picture(user, site, tmp_path):
    """The picture in the README is taken by
    PHISIGHT_APP_RUN=runs/tiny PHISIGHT_APP_PICTURE=docs/app.png pytest tests/test_app.py -k picture
    """
    path = Path(os.environ.get("PHISIGHT_APP_PICTURE", tmp_path / "app.png"))
    user.try_example(3)
    user.answers(1)
    user.start_over()
    user.try_example(0)
    user.answers(1)
    user.ask("How many objects are there?")
    user.answers(2)
    user.page.mouse.move(640, 600)
    user.page.wait_for_timeout(500)
    user.page.screenshot(path=str(path))
    assert path.stat().st_size < 300_000
    assert Image.open(path).size == (1280, 860)


def test_the_picture_of_its_training_tab(browser, site, tmp_path):
    """The picture in docs/training.md is taken of the runs below PHISIGHT_APP_RUNS by
    PHISIGHT_APP_RUNS=runs PHISIGHT_TRAINING_PICTURE=docs/training.png
    """
    path = Path(os.environ.get("PHISIGHT_TRAINING_PICTURE", tmp_path / "training.png"))
    shutil.copytree(runs.finished_run(), tmp_path / "runs" / "finished")  # beside no newer one
    folder = Path(os.environ.get("PHISIGHT_APP_RUNS", tmp_path / "runs"))
    with served(site.assistant, site.conversations, folder) as other:
        user = User(browser, other)
        user.page.get_by_role("tab", name="Training").click()
        user.page.locator("#status .figures").wait_for()
        user.page.locator("#meter .samples tbody tr").first.wait_for()
        user.page.locator("#plot-loss svg.marks").wait_for()
        user.page.mouse.move(640, 800)
        user.page.wait_for_timeout(500)
        user.page.screenshot(path=str(path))
        user.close()
    assert path.stat().st_size < 300_000


@pytest.mark.parametrize("width", [390, 1280])
def test_sample_answers_of_many_words_leave_room_for_the_others(browser, site, tmp_path, width):
    log = (runs.finished_run() / "metrics.jsonl").read_bytes()
    sample = {"picture": "train_000002.png", "question": "What does the picture show?"}
    sample |= dict.fromkeys(("answer", "right_answer"), "a big purple circle and " * 9)
    (tmp_path / "mine").mkdir()
    record = json.dumps({"kind": "samples", "step": 9, "samples": [sample]}).encode()
    (tmp_path / "mine" / "metrics.jsonl").write_bytes(log + record + b"\n")
    with served(site.assistant, site.conversations, tmp_path) as other:
        user = User(browser, other, viewport={"width": width, "height": 860})
        user.page.get_by_role("tab", name="Training").click()
        cells = user.page.locator("#meter .samples td")
        cells.first.wait_for()
        boxes = cells.evaluate_all(
            "cells => cells.map(cell => cell.getBoundingClientRect().toJSON())"
        )
        user.close()
    assert min(box["width"] for box in boxes) > 150 and boxes[0]["height"] < 200


# -- the command ---------------------------------------------------------------------------------


def test_the_command_serves_until_it_is_ended(tmp_path):
    process = runs.started(
        "app.py",
        "--run",
        runs.finished_run(),
        "--port",
        0,
        "--conversations",
        tmp_path,
        "--runs",
        tmp_path,
    )
    try:
        line = process.stdout.readline()
        assert line.startswith("PhiSight with ") and "http://127.0.0.1:" in line, (
            line or process.communicate()
        )
        address = line.split(": ", 1)[1].split()[0]
        assert "PhiSight" in httpx.get(address).text
    finally:
        process.terminate()
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 0 and errors == "", errors


def test_a_run_that_is_not_there_is_one_line():
    with pytest.raises(PhiSightError, match="runs/none"):
        app.main(["--run", "runs/none", "--port", "0"])
