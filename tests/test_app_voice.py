"""The page by voice, in a real browser: spoken to, speaking, and both without hands."""

from __future__ import annotations

import base64
import io
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy
import pytest
import runs
import soundfile
from axe import findings
from pages import Site, User, chromium, pictures, served, wait_for, wait_with
from PIL import Image
from sounds import TINY, encoded, needs_espeak

from assistant.answer import Answer
from speech.spoken import loaded_once, voices_loaded_once
from speech.voice import Voice
from web.page import static_path

pytestmark = needs_espeak
QUESTION = "How many objects are there?"
OTHER = "What colour is the cross?"
FIRST = "There are two red stars in the picture."
SECOND = "One of them is big and the other one is small."
MICROPHONE = Path(__file__).with_name("microphone.js").read_text()


@pytest.fixture(scope="module")
def start_browser():
    with chromium() as start:
        yield start


@pytest.fixture(scope="module")
def browser(start_browser):
    return start_browser()


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Iterator[Site]:
    """The app with the tiny preset's Whisper and espeak-ng's voice."""
    if not TINY.exists():
        pytest.skip(f"{TINY} is not there")
    folder = tmp_path_factory.mktemp("talked")
    speech, voice = loaded_once(str(TINY)), voices_loaded_once("espeak-ng")
    with served(runs.assistant(), folder, folder, speech=speech, voice=voice) as site:
        yield site


class Speaking(User):
    """Somebody whose microphone hears what a test says."""

    def __init__(self, browser: Any, site: Site, script: str = MICROPHONE, **settings: Any):
        self.script, self.is_ready = script, False
        super().__init__(browser, site, **settings)

    def open(self, link: str = "#/voice") -> None:
        if not self.is_ready:
            self.context.add_init_script(self.script)
            self.is_ready = True
        super().open(link)

    @property
    def panel(self) -> Any:
        return self.page.locator(".voice-panel")

    @property
    def player(self) -> Any:
        return self.page.locator("#spoken-answer")

    def becomes(self, state: str) -> None:
        self.page.locator(f".voice-panel[data-state={state}]").wait_for()

    def hears(self, text: str) -> None:
        """Say a text into the microphone; returns when it is said."""
        self.page.evaluate("recording => say(recording)", spoken(text))

    def is_recorded(self) -> bool:
        """Whether the browser still listens to the microphone."""
        return self.page.evaluate(
            "() => microphone.getTracks().some(track => track.readyState === 'live')"
        )

    def module(self, name: str, run: str, *arguments: object) -> Any:
        """What a function makes of a module of the voice, and of arguments."""
        path = f"/{static_path()}/voice/{name}"
        code = f"async ([path, given]) => ({run})(await import(path), ...given)"
        return self.page.evaluate(code, [path, list(arguments)])


def samples_of(text: str) -> tuple[numpy.ndarray, int]:
    return Voice.load("espeak-ng", "en").speak(text)


def spoken(text: str) -> str:
    """A WAV of a text, in base64."""
    samples, rate = samples_of(text)
    return base64.b64encode(encoded(samples, rate, "WAV")).decode()


@pytest.fixture
def user(browser, site) -> Iterator[Speaking]:
    user = Speaking(browser, site)
    yield user
    user.close()


@pytest.fixture
def answering(site, monkeypatch) -> Callable[..., list[Answer]]:
    """`answering(*pieces)` has the assistant say these from now on; an event among them is waited
    for. Gives the answers that were begun."""

    def say(*pieces: str | threading.Event) -> list[Answer]:
        begun: list[Answer] = []

        def run(answer: Answer) -> None:
            for piece in pieces:
                if isinstance(piece, str):
                    answer._tell(piece)
                while isinstance(piece, threading.Event) and not answer.cancelled:
                    if piece.wait(0.01):
                        break
            answer.end("cancelled" if answer.cancelled else "stop")

        def start(answer: Answer) -> Answer:
            begun.append(answer)
            threading.Thread(target=run, args=(answer,), daemon=True).start()
            return answer

        monkeypatch.setattr(site.assistant, "start", start)
        return begun

    return say


def sound_of(user: Speaking) -> tuple[numpy.ndarray, int]:
    """What is in the file that the spoken answer is downloaded as."""
    with user.page.expect_download() as download:
        user.player.get_by_role("button", name="Download the spoken answer").click()
    assert download.value.suggested_filename == "answer.wav"
    return soundfile.read(io.BytesIO(Path(download.value.path()).read_bytes()))


# -- one question at a time -----------------------------------------------------------------------


def test_push_to_talk_with_the_browsers_own_microphone(start_browser, site, tmp_path):
    """What was heard stands in the composer, to be corrected; nothing of it stays on the server."""
    recording = tmp_path / "question.wav"
    samples, rate = samples_of(QUESTION)
    soundfile.write(recording, numpy.pad(samples, rate), rate)
    browser = start_browser(f"--use-file-for-fake-audio-capture={recording}%noloop")
    user = User(browser, site)
    microphone = user.page.locator("#microphone")
    microphone.click()
    user.page.locator(".voice-panel[data-state=recording]").wait_for()
    level = "document.querySelector('.voice-panel').style.getPropertyValue('--level') > 0.5"
    user.page.wait_for_function(level)  # it is seen how loud it is
    user.page.locator(".strip .time", has_text="0:04").wait_for()
    with user.page.expect_response(lambda one: one.request.method == "DELETE") as removed:
        microphone.click()
    wait_with(user.page, lambda: user.field.input_value() == QUESTION)
    assert removed.value.ok and user.turns.count() == 0
    user.field.press("Enter")
    assert user.answers(1)[0] == ("user", QUESTION)
    user.close()


def test_the_voice_room_hears_a_question_about_a_picture_and_speaks_the_answer(user, answering):
    answering(FIRST)
    user.attach(pictures(1)[0])
    user.page.locator("#record").focus()
    user.page.keyboard.press("Space")
    user.becomes("recording")
    user.hears(QUESTION)
    user.page.keyboard.press("Space")
    user.page.locator("#spoken-answer.sounding").wait_for()
    user.page.locator("#spoken-answer:not(.sounding)").wait_for()
    assert user.page.locator("#heard p").inner_text() == QUESTION
    assert user.answers(1) == [("user", QUESTION), ("bot", FIRST)] and user.pictures() == 1
    assert not user.is_recorded()
    heard, rate = sound_of(user)
    said, its_rate = samples_of(FIRST)
    assert abs(heard).max() > 0.05
    assert len(heard) / rate == pytest.approx(len(said) / its_rate, rel=0.02)
    user.player.get_by_role("button", name="Play the answer again").click()
    user.page.locator("#spoken-answer.sounding").wait_for()
    user.player.get_by_role("button", name="Stop speaking").click()
    user.page.locator("#spoken-answer:not(.sounding)").wait_for()


def test_a_button_that_is_held_records_until_it_is_let_go(user, answering):
    answering(FIRST)
    user.page.mouse.move(*centre_of(user.page.locator("#record")))
    user.page.mouse.down()
    user.becomes("recording")
    user.hears(QUESTION)
    user.page.mouse.up()
    assert user.answers(1)[0] == ("user", QUESTION)


def centre_of(element: Any) -> tuple[float, float]:
    box = element.bounding_box()
    return box["x"] + box["width"] / 2, box["y"] + box["height"] / 2


def test_what_was_heard_is_corrected_first_where_that_is_chosen(user):
    user.page.get_by_label("Ask at once what was heard").uncheck()
    user.page.locator("#record").click()
    user.becomes("recording")
    user.hears(QUESTION)
    user.page.locator("#record").click()
    wait_with(user.page, lambda: user.field.input_value() == QUESTION)
    assert user.turns.count() == 0
    user.open("#/voice")  # the choice is remembered
    assert not user.page.get_by_label("Ask at once what was heard").is_checked()


def test_an_uploaded_recording_is_a_question_and_silence_is_none(user, answering, tmp_path):
    answering(FIRST)
    recording, silence = tmp_path / "question.wav", tmp_path / "silence.wav"
    soundfile.write(recording, *samples_of(QUESTION))
    soundfile.write(silence, numpy.zeros(16000), 16000)
    user.page.locator("#recording-file").set_input_files(str(recording))
    assert user.answers(1)[0] == ("user", QUESTION)
    user.page.locator("#recording-file").set_input_files(str(silence))
    user.page.locator(".voice-notice", has_text="No speech was heard in the recording").wait_for()
    assert user.turns.count() == 2


def test_a_recording_is_discarded_by_escape_and_by_leaving_the_room(user):
    for leave in (
        lambda: user.page.keyboard.press("Escape"),
        lambda: user.page.get_by_role("link", name="Batch").click(),
    ):
        user.page.locator("#record").click()
        user.becomes("recording")
        leave()
        wait_with(user.page, lambda: not user.is_recorded())
        assert user.panel.get_attribute("data-state") == "idle"
    assert user.turns.count() == 0


# -- what keeps it from being used ----------------------------------------------------------------

REFUSING = """
if (navigator.mediaDevices)
  navigator.mediaDevices.getUserMedia = async () => { throw new DOMException("no", "%s") };
"""
INSECURE = """
Object.defineProperty(navigator, "mediaDevices", { value: undefined });
Object.defineProperty(window, "isSecureContext", { value: false });
"""


@pytest.mark.parametrize(
    ("script", "told"),
    [
        (REFUSING % "NotAllowedError", "The browser does not let this page use the microphone"),
        (REFUSING % "NotFoundError", "No microphone was found"),
        (REFUSING % "NotReadableError", "The microphone is in use by another program"),
        (INSECURE, "Browsers give the microphone only to pages opened by https"),
    ],
)
def test_a_microphone_that_is_not_there_is_told(browser, site, script, told):
    user = Speaking(browser, site, script)
    notice = user.page.locator(".voice-notice", has_text=told)
    for room, button in (("voice", "#record"), ("voice", "#hands-free"), ("chat", "#microphone")):
        user.page.evaluate(f"location.hash = '#/{room}'")
        user.page.locator(button).click()
        notice.wait_for()
        assert user.panel.get_attribute("data-state") == "idle"
    user.close()


def test_without_a_speech_model_it_is_told_before_anything_is_said(browser, tmp_path):
    with served(runs.assistant(), tmp_path, tmp_path) as site:
        user = Speaking(browser, site)
        notice = user.page.locator(".voice-notice", has_text="No speech recognition is loaded")
        notice.wait_for()
        user.page.evaluate("location.hash = '#/chat'")
        notice.wait_for(state="hidden")
        user.page.locator("#microphone").click()
        notice.wait_for()
        assert user.page.evaluate("opened.length") == 0
        user.close()


# -- without hands --------------------------------------------------------------------------------


def test_hands_free_asks_at_silence_and_speaks_while_the_answer_is_written(user, answering):
    rest = threading.Event()
    answering(f"{FIRST} One of", rest, SECOND.removeprefix("One of"))
    user.page.locator("#hands-free").click()
    user.becomes("listening")
    assert user.page.evaluate("opened[0].audio.echoCancellation")
    user.hears(QUESTION)  # and nobody presses anything
    user.becomes("speaking")
    assert not user.is_idle() and FIRST in user.page.locator(".sentence").inner_text()
    rest.set()
    user.page.locator(".sentence", has_text=SECOND).wait_for()
    user.becomes("listening")
    assert user.answers(1) == [("user", QUESTION), ("bot", f"{FIRST} {SECOND}")]
    user.page.keyboard.press("Escape")
    user.becomes("idle")
    assert not user.is_recorded()


def test_hands_free_is_interrupted_by_speaking(user, answering):
    first = answering(f"{FIRST} One of", threading.Event())
    user.page.locator("#hands-free").click()
    user.becomes("listening")
    user.hears(QUESTION)
    user.becomes("speaking")
    user.page.locator("#spoken-answer.sounding").wait_for()
    second = answering(SECOND)
    user.page.evaluate("recording => { say(recording) }", spoken(OTHER))
    silent = user.page.wait_for_function(  # at once, and not when the other one has finished
        """() => document.querySelector(".voice-panel").dataset.state === "hearing"
            && [!document.querySelector("#spoken-answer").classList.contains("sounding")]"""
    )
    assert silent.json_value() == [True]
    wait_for(lambda: first[0].cancelled)
    user.page.locator(".sentence", has_text=SECOND).wait_for()
    assert user.answers(2)[::2] == [("user", QUESTION), ("user", OTHER)]
    assert len(first) == len(second) == 1


def test_a_noise_is_no_question(user):
    """A knock is not taken for speech; a noise that stays becomes part of the room."""
    told = user.module(
        "levels.js",
        """({ Activity }) => {
            const rate = 16000, activity = new Activity(rate), told = [];
            const play = (seconds, loud) => {
                for (let at = 0; at < seconds * rate; at += 320) {
                    const noise = () => (Math.random() - 0.5) * 2 * loud;
                    const event = activity.feed(Float32Array.from({ length: 320 }, noise));
                    if (event) told.push(event);
                    if (event === "end") activity.take();
                }
                told.push("|");
            };
            play(2, 0.001);
            play(0.05, 0.5);
            play(2, 0.001);
            play(1, 0.2);
            play(2, 0.001);
            play(12, 0.02);
            play(1, 0.4);
            play(2, 0.02);
            return told.join(" ");
        }""",
    )
    quiet, knock, still, speech, silence, *fan = told.split("|")[:6]
    assert (quiet.strip(), knock.strip(), still.strip()) == ("", "", "")
    assert (speech.strip(), silence.strip()) == ("begin", "end")
    assert "begin end" in told.split("|")[5] or told.split("|")[5].strip() == ""
    assert told.rstrip(" |").endswith("begin | end")  # over the fan, somebody is heard


# -- answers aloud --------------------------------------------------------------------------------


def test_answers_are_spoken_in_the_chat_where_that_is_set(user, answering):
    answering(f"{FIRST} {SECOND}")
    user.open("#/chat")
    user.ask("What is it?")
    user.answers(1)
    assert not user.player.is_visible()
    user.set("aloud", True)
    user.ask("And now?")
    user.page.locator("#spoken-answer.sounding").wait_for()
    user.page.keyboard.press("Escape")
    user.page.locator("#spoken-answer:not(.sounding)").wait_for()
    user.player.get_by_role("button", name="Close").click()
    assert not user.player.is_visible()


SENTENCES = [
    ("en", "There are 3.5 stars, e.g. red ones. Dr. Li saw them! Did he?", [35, 16, 7]),
    ("es", "Hay dos estrellas. ¿Ves la Sra. López? ¡Sí! Mide 3.5 m.", [18, 19, 4, 11]),
    ("de", "Am 3. Mai gab es z. B. drei Sterne. Das ist gut. Ja!", [35, 12, 3]),
    ("zh", "图中有三颗星。左边的是红色的！“真的吗？”对。", [7, 8, 6, 2]),
    ("en", "# A list\n\n1. A **star**\n2. A `box`\n\n```\nx = 1. y\n```\nDone.", [6, 9, 8, 5]),
]


def test_a_growing_answer_is_cut_into_its_sentences(user):
    found = user.module(
        "sentences.js",
        """({ Sentences, languageOf }, texts) => texts.map(([language, text]) => {
            const sentences = new Sentences(), found = [];
            for (let end = 1; end <= text.length; end++)
                found.push(...sentences.take(text.slice(0, end), language));
            found.push(...sentences.rest(text, language));
            return [languageOf(text, "en"), found.map(one => one.length)];
        })""",
        [[language, text] for language, text, _ in SENTENCES],
    )
    assert found == [[language, lengths] for language, _, lengths in SENTENCES]


# -- what was broken ------------------------------------------------------------------------------


def test_the_chat_is_as_high_after_the_voice_room_as_before(user):
    places = "() => ['.dock', '.composer', '.column'].map(name => JSON.stringify("
    places += "document.querySelector(name).getBoundingClientRect()))"
    user.open("#/chat")
    before = user.page.evaluate(places)
    user.page.get_by_role("link", name="Voice").click()
    user.page.locator("#record").wait_for()
    user.page.get_by_role("link", name="Chat").click()
    user.page.locator("#record").wait_for(state="hidden")
    wait_with(user.page, lambda: user.page.evaluate(places) == before)


def test_the_voice_room_crops_no_picture_and_shares_nothing(user, answering, tmp_path):
    answering(FIRST)
    wide = tmp_path / "wide.png"
    Image.new("RGB", (900, 300), "white").save(wide)
    user.ask("What is it?", wide)
    user.answers(1)
    image = user.page.locator(".transcript .turn.user img")
    wait_with(user.page, lambda: image.evaluate("image => image.naturalWidth") == 900)
    box = image.bounding_box()
    assert box["width"] / box["height"] == pytest.approx(3, rel=0.02)
    assert user.page.get_by_role("button", name="Share").count() == 0


def test_nobody_is_kept_out_of_the_voice_room(browser, site, answering):
    answering(FIRST)
    user = Speaking(browser, site, color_scheme="dark")
    assert findings(user.page) == []
    user.page.locator("#record").click()
    user.becomes("recording")
    assert findings(user.page) == []
    user.hears(QUESTION)
    user.page.locator("#record").click()
    user.page.locator("#spoken-answer:not(.sounding)").wait_for()
    user.page.locator("#hands-free").click()
    user.becomes("listening")
    assert findings(user.page) == []
    user.close()


@pytest.mark.parametrize("width", [390, 1280])
def test_everything_of_the_voice_room_is_in_the_window(browser, site, width):
    user = Speaking(browser, site, viewport={"width": width, "height": 800})
    for name in ("#record", "#hands-free", "#question textarea"):
        box = user.page.locator(name).bounding_box()
        assert box["x"] >= 0 and box["x"] + box["width"] <= width
        assert box["y"] + box["height"] <= 800 and box["height"] >= 24
    assert user.page.evaluate("document.documentElement.scrollWidth") <= width
    user.close()
