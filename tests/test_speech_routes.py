"""The routes by which the page is spoken to and speaks, without a browser."""

from __future__ import annotations

import io
import json
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy
import pytest
import runs
import soundfile
from pages import pictures, served, wait_for
from sounds import encoded, needs_espeak, said

from speech.recordings import SAMPLE_RATE
from speech.spoken import loaded_once, voices_loaded_once
from speech.voice import LONGEST_TEXT, Voice
from speech.whisper import Segment
from web import temporary
from web.errors import RequestError
from web.speech.ears import OF_ONE, Ears
from web.speech.turns import Turns

KEY = "0123456789abcdef" * 2
QUESTION = "How many objects are there?"


class Whisper:
    """Hears what it is told to, a piece at a time, when `go` is set."""

    def __init__(self, *pieces: str) -> None:
        self.pieces = pieces
        self.begin()

    def begin(self) -> None:
        self.asked: list[tuple] = []
        self.left, self.go = threading.Event(), threading.Event()
        self.go.set()

    def transcribe(self, audio, language, translate, denoise, cancelled) -> Iterator[Segment]:
        self.asked.append((len(audio), language, translate, denoise))
        for place, piece in enumerate(self.pieces):
            while not self.go.wait(0.01):
                if cancelled():
                    self.left.set()
                    return
            yield Segment(place, place + 1.0, piece, "en")


@pytest.fixture(scope="module")
def whisper() -> Whisper:
    return Whisper("How many objects", " are there?")


@pytest.fixture(scope="module")
def module_site(whisper, tmp_path_factory):
    speech, voice = (lambda: whisper), voices_loaded_once("espeak-ng")
    folder = tmp_path_factory.mktemp("conversations")
    with served(runs.assistant(), folder, folder, speech=speech, voice=voice) as site:
        yield site


@pytest.fixture
def site(module_site, whisper):
    whisper.begin()
    return module_site


def client(site, key: str = KEY) -> httpx.Client:
    return httpx.Client(base_url=f"{site.url}/app/", headers={"x-browser-key": key}, timeout=60)


def sent(site, data: bytes, name: str = "question.wav") -> str:
    with client(site) as browser:
        return browser.post("uploads", params={"name": name}, content=data).json()["id"]


def events(site, body: dict) -> list[tuple[str, dict]]:
    with client(site) as browser, browser.stream("POST", "listen", json=body) as answer:
        assert answer.status_code == 200, answer.read()
        return list(read_events(answer))


def read_events(answer: httpx.Response) -> Iterator[tuple[str, dict]]:
    name = ""
    for line in answer.iter_lines():
        if line.startswith("event: "):
            name = line[7:]
        elif line.startswith("data: "):
            yield name, json.loads(line[6:])


def second(seconds: float = 1.0) -> bytes:
    return encoded(numpy.zeros(int(seconds * SAMPLE_RATE), numpy.float32), SAMPLE_RATE, "WAV")


# -- listening ------------------------------------------------------------------------------------


@needs_espeak
def test_a_recording_is_heard_by_the_real_whisper(tmp_path):
    speech = loaded_once(str(runs.ROOT / "assets/tiny/whisper/tiny.pt"))
    with served(runs.assistant(), tmp_path, tmp_path, speech=speech) as site:
        recording = encoded(numpy.pad(said(QUESTION), SAMPLE_RATE), SAMPLE_RATE, "WAV")
        told = events(site, {"upload": sent(site, recording)})
        assert told[-1] == ("done", {"text": QUESTION}) and told[0][0] == "heard"
        nothing = events(site, {"upload": sent(site, second())})
        assert [(name, data["error"]["key"]) for name, data in nothing] == [
            ("error", "nothing_heard")
        ]


def test_the_text_grows_and_the_settings_say_how_it_is_heard(site, whisper):
    settings = {"spoken": "de", "translate": True, "denoise": False}
    told = events(site, {"upload": sent(site, second()), "settings": settings})
    assert told == [
        ("heard", {"text": "How many objects"}),
        ("heard", {"text": QUESTION}),
        ("done", {"text": QUESTION}),
    ]
    assert whisper.asked == [(SAMPLE_RATE, "de", True, False)]


def test_who_leaves_is_not_listened_to_any_more(site, whisper):
    whisper.go.clear()
    upload = sent(site, second())
    with client(site) as browser, browser.stream("POST", "listen", json={"upload": upload}):
        wait_for(lambda: whisper.asked)
    wait_for(whisper.left.is_set)


@pytest.mark.parametrize(
    ("body", "status", "key"),
    [
        ({"upload": "0" * 32}, 404, "upload_gone"),
        ({"upload": "../../etc/passwd"}, 422, None),
        ({"upload": 7}, 422, None),
        ({}, 422, None),
        ({"upload": "0" * 32, "path": "/etc/passwd"}, 422, None),
        ({"upload": "0" * 32, "settings": {"shell": "x"}}, 422, None),
    ],
)
def test_what_is_no_upload_is_not_listened_to(site, body, status, key):
    with client(site) as browser:
        answer = browser.post("listen", json=body)
    assert answer.status_code == status and answer.json()["error"]["key"] == key


def test_anothers_recording_and_a_picture_are_not_listened_to(site):
    upload = sent(site, second())
    with client(site, "f" * 32) as other:
        assert other.post("listen", json={"upload": upload}).status_code == 404
    picture = sent(site, pictures(1)[0].read_bytes(), "star.png")
    with client(site) as browser:
        answer = browser.post("listen", json={"upload": picture})
    assert answer.status_code == 409
    assert answer.json()["error"] == {
        "key": "not_a_recording",
        "values": {"name": "star.png"},
        "text": None,
    }


def test_what_only_bears_a_recordings_name_is_one_line_without_a_path(site):
    ((name, data),) = events(site, {"upload": sent(site, b"not sound at all", "mine.wav")})
    line = data["error"]["text"]
    assert name == "error" and line.startswith("mine.wav: ") and "/" not in line


def test_without_models_nothing_is_heard_or_spoken(tmp_path):
    with served(runs.assistant(), tmp_path, tmp_path) as site, client(site) as browser:
        heard = browser.post("listen", json={"upload": "0" * 32})
        spoken = browser.post("speak", json={"text": "hello", "language": "en"})
    assert (heard.status_code, heard.json()["error"]["key"]) == (409, "no_speech_model")
    assert (spoken.status_code, spoken.json()["error"]["key"]) == (409, "no_voice")


def test_one_visitor_does_not_fill_the_queue(whisper, tmp_path):
    ears, path = Ears(), tmp_path / "a.wav"
    path.write_bytes(second())
    how = type("How", (), {"spoken": None, "translate": False, "denoise": False})()
    waiting = [
        ears.segments(lambda: Whisper("one"), path, how, visitor="mine") for _ in range(OF_ONE)
    ]
    assert [next(one).text for one in waiting] == ["one"] * OF_ONE
    with pytest.raises(RequestError, match="too_many_recordings"):
        next(ears.segments(lambda: Whisper("one"), path, how, visitor="mine"))
    for one in waiting[:1]:
        one.close()
    assert next(ears.segments(lambda: Whisper("two"), path, how, visitor="mine")).text == "two"


def test_turns_come_in_the_order_of_asking_and_who_leaves_is_told():
    turns = Turns(at_once=1, waiting=2, of_one=9, full="too_many_recordings", left="not_heard")
    served_in_order: list[int] = []
    started = [threading.Event() for _ in range(2)]

    def wait(number: int) -> None:
        started[number].set()
        with turns.take("", lambda: False):
            served_in_order.append(number)

    threads = [threading.Thread(target=wait, args=(number,)) for number in range(2)]
    with turns.take("", lambda: False):
        for number, thread in enumerate(threads):
            thread.start()
            wait_for(lambda: len(turns._asking) == number + 2)
        with pytest.raises(RequestError, match="too_many_recordings"):
            turns.take("", lambda: False).__enter__()
        assert served_in_order == []
    for thread in threads:
        thread.join()
    assert served_in_order == [0, 1]
    with turns.take("", lambda: False), pytest.raises(RequestError, match="not_heard"):
        turns.take("", lambda: True).__enter__()
    assert turns._asking == []


# -- speaking -------------------------------------------------------------------------------------


def everything(folder: Path) -> set[Path]:
    return {path for path in folder.rglob("*") if path.is_file()}


@needs_espeak
@pytest.mark.parametrize(
    ("language", "text"),
    [("en", "Three."), ("es", "Hay tres."), ("de", "Drei Sterne."), ("zh", "有三颗星。")],
)
def test_a_text_is_spoken_in_each_language_and_leaves_no_file(site, language, text):
    before = everything(temporary.own_folder())
    with client(site) as browser:
        answer = browser.post("speak", json={"text": text, "language": language})
    assert answer.status_code == 200 and answer.headers["content-type"] == "audio/wav"
    samples, rate = soundfile.read(io.BytesIO(answer.content))
    assert samples.ndim == 1 and len(samples) > rate / 5 and abs(samples).max() > 0.05
    assert everything(temporary.own_folder()) == before


@pytest.mark.parametrize(
    ("body", "status"),
    [
        ({"text": "", "language": "en"}, 422),
        ({"text": "a" * 2001, "language": "en"}, 422),
        ({"text": "a" * (LONGEST_TEXT + 1), "language": "en"}, 422),
        ({"text": "hello", "language": "en --stdout"}, 422),
        ({"text": "hello", "language": "xx"}, 422),
        ({"text": "hello"}, 422),
        ({"text": ["hello"], "language": "en"}, 422),
        ({"text": "hello", "language": "en", "voice": "mine"}, 422),
        ({"text": "... --- !!", "language": "en"}, 400),
    ],
)
@needs_espeak
def test_what_cannot_be_spoken_is_refused_in_one_line(site, body, status):
    with client(site) as browser:
        answer = browser.post("speak", json=body)
    assert answer.status_code == status
    assert len(answer.json()["error"]["text"].splitlines()) == 1


def test_a_visitor_without_a_key_is_not_spoken_to(site):
    answer = httpx.post(f"{site.url}/app/speak", json={"text": "hello", "language": "en"})
    assert answer.status_code == 409 and answer.json()["error"]["key"] == "key_damaged"


def test_who_leaves_is_not_spoken_to_any_more(tmp_path):
    begun, left = threading.Event(), threading.Event()

    class Slow:
        def speak(self, text, speed=1.0, cancelled=lambda: False):
            begun.set()
            wait_for(cancelled)
            left.set()
            return numpy.zeros(100, numpy.float32), 16000

    voice = lambda language: Slow()  # noqa: E731
    with served(runs.assistant(), tmp_path, tmp_path, voice=voice) as site:
        body = b'{"text": "a", "language": "en"}'
        host, port = site.url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port))) as connection:
            lines = [
                "POST /app/speak HTTP/1.1",
                f"Host: {host}:{port}",
                f"X-Browser-Key: {KEY}",
                "Content-Type: application/json",
                f"Content-Length: {len(body)}",
            ]
            connection.sendall("\r\n".join(lines).encode() + b"\r\n\r\n" + body)
            wait_for(begun.is_set)
        wait_for(left.is_set)


@pytest.mark.parametrize(("name", "count"), [("espeak-ng", 2), ("facebook/mms-tts-eng", 1)])
def test_a_voice_that_has_one_language_is_loaded_once(monkeypatch, name, count):
    loaded: list[str] = []
    monkeypatch.setattr(Voice, "load", lambda name, language: loaded.append(language))
    voice = voices_loaded_once(name)
    for language in ("en", "de", "en"):
        voice(language)
    assert len(loaded) == count
