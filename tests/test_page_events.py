"""What programs send to the web app and leave: uploads cut off, windows that go, events that are
not right."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy
import pytest
import runs
import soundfile
from live_server import wait_until
from pages import Site, pictures, served
from test_app_guards import SETTINGS, Program, file_data

from api import logs
from speech.whisper import Segment
from web.presence import Presence
from web.temporary import MADE, UPLOADS, own_folder
from workers.pool import Cancelled


class Ears:
    """Stands for Whisper: hears one word after the other, for as long as it is let."""

    def __init__(self) -> None:
        self.heard = self.begun = self.ended = 0

    def transcribe(self, *settings: object) -> Iterator[Segment]:
        self.begun += 1
        *_, cancelled = settings
        try:
            for second in range(100_000):
                if cancelled():
                    raise Cancelled
                self.heard += 1
                time.sleep(0.005)
                yield Segment(second, second + 1, "word", "en")
        finally:
            self.ended += 1


EARS = Ears()


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Site:
    folder = tmp_path_factory.mktemp("conversations")
    with served(runs.assistant(), folder, runs.finished_run().parent, speech=lambda: EARS) as site:
        yield site


@pytest.fixture
def recording(tmp_path) -> Path:
    path = tmp_path / "q.wav"
    soundfile.write(path, numpy.zeros(1600, "float32"), 16000)
    return path


def files_of(folder: str) -> list[Path]:
    return [path for path in (own_folder() / folder).rglob("*") if path.is_file()]


def parts() -> list[Path]:
    return [path for path in (own_folder() / UPLOADS).iterdir() if path.is_file()]


# -- uploads --------------------------------------------------------------------------------------


def half_an_upload(site: Site, length: int = 1_000_000) -> socket.socket:
    host, _, port = site.url.removeprefix("http://").partition(":")
    part = b'--x\r\nContent-Disposition: form-data; name="files"; filename="a.png"\r\n\r\n'
    head = (
        f"POST /gradio_api/upload HTTP/1.1\r\nHost: {host}\r\nContent-Length: {length}\r\n"
        "Content-Type: multipart/form-data; boundary=x\r\n\r\n"
    ).encode()
    connection = socket.create_connection((host, int(port)), timeout=60)
    connection.sendall(head + part + bytes(200_000))
    return connection


def test_an_upload_that_is_cut_off_leaves_nothing(site):
    connections = [half_an_upload(site) for _ in range(3)]
    wait_until(lambda: len(parts()) == 3)
    whole = Program(site).upload(pictures(1)[0])
    for connection in connections:
        connection.close()
    wait_until(lambda: not parts())
    assert Path(whole).exists()


def test_uploads_beyond_the_limit_are_refused_in_one_line(site, tmp_path, monkeypatch):
    from web.temporary import Uploads

    monkeypatch.setattr(Uploads, "take", take_of(300_000))
    large = tmp_path / "large.png"
    large.write_bytes(bytes(500_000))
    with large.open("rb") as stream:
        sent = httpx.post(f"{site.url}/gradio_api/upload", files={"files": stream}, timeout=60)
    assert sent.status_code == 413 and "uploads take" in sent.json()["detail"]
    wait_until(lambda: not parts())
    monkeypatch.undo()
    assert Path(Program(site).upload(large)).exists()


def take_of(most: int):
    """`Uploads.take` with less room."""
    from web.temporary import Uploads

    take = Uploads.take
    taken = 0

    def counted(self, count: int) -> None:
        nonlocal taken
        taken += count
        take(self, self.most if taken > most else count)

    return counted


def test_no_table_and_no_spoken_answer_is_left(site):
    program, before = Program(site), files_of(MADE)
    uploaded = file_data(program.upload(pictures(1)[0]))
    outcome, heard = program.send("on_run", [None, [uploaded], "What is it?", *SETTINGS])
    assert outcome == "done" and ".csv" in heard
    wait_until(lambda: files_of(MADE) == before)  # the server goes on after its last event


# -- windows that go ------------------------------------------------------------------------------


def begin(program: Program, function: str, data: list) -> httpx.Response:
    event = {
        "data": data,
        "fn_index": program.numbers[function],
        "session_hash": program.session,
    }
    return httpx.post(f"{program.site.url}/gradio_api/queue/join", json=event)


def test_a_recording_is_not_heard_to_its_end_when_its_window_goes(site, recording):
    program, ended = Program(site), EARS.ended
    question = {"text": "", "files": [file_data(program.upload(recording))]}
    assert begin(program, "on_text", [None, question, *SETTINGS]).status_code == 200
    query = {"session_hash": program.session}
    with httpx.stream("GET", f"{site.url}/gradio_api/queue/data", params=query, timeout=60):
        heard = EARS.heard
        wait_until(lambda: EARS.heard > heard)
    wait_until(lambda: EARS.ended == ended + 1)


def test_a_window_that_breaks_one_stream_and_opens_another_is_heard(site, recording):
    program, ended = Program(site), EARS.ended
    question = {"text": "", "files": [file_data(program.upload(recording))]}
    heartbeat = f"{site.url}/gradio_api/heartbeat/{program.session}"
    with httpx.stream("GET", heartbeat, timeout=60):
        begin(program, "on_text", [None, question, *SETTINGS])
        query = {"session_hash": program.session}
        with httpx.stream("GET", f"{site.url}/gradio_api/queue/data", params=query, timeout=60):
            heard = EARS.heard
            wait_until(lambda: EARS.heard > heard)
        time.sleep(1.2)
        assert EARS.ended == ended
    wait_until(lambda: EARS.ended == ended + 1)


def test_an_event_that_nobody_waits_for_is_given_up(monkeypatch):
    import asyncio

    monkeypatch.setattr("web.presence.LISTEN_SECONDS", 0.01)
    left: list[str] = []

    async def inner(scope, receive, send) -> None:
        await receive()

    async def joined() -> None:
        body = json.dumps({"session_hash": "w"}).encode()

        async def receive():
            return {"type": "http.request", "body": body, "more_body": False}

        scope = {"type": "http", "method": "POST", "path": "/gradio_api/queue/join"}
        await Presence(inner, left.append)(scope, receive, None)
        await asyncio.sleep(0.05)

    asyncio.run(joined())
    assert left == ["w"]


def test_only_so_many_recordings_wait_and_text_goes_on(site, recording, monkeypatch):
    monkeypatch.setattr("web.talk.WAITING_TO_BE_HEARD", 2)
    programs = [Program(site) for _ in range(6)]
    streams, ended = [], EARS.ended
    for program in programs:
        question = {"text": "", "files": [file_data(program.upload(recording))]}
        begin(program, "on_text", [None, question, *SETTINGS])
        url = f"{site.url}/gradio_api/queue/data"
        query = {"session_hash": program.session}
        stream = httpx.stream("GET", url, params=query, timeout=60)
        stream.__enter__()
        streams.append(stream)
    wait_until(lambda: EARS.begun == EARS.ended + 4)
    one_more = Program(site)
    question = {"text": "", "files": [file_data(one_more.upload(recording))]}
    outcome, heard = one_more.send("on_text", [None, question, *SETTINGS])
    assert "Many recordings wait" in heard
    outcome, heard = Program(site).send("on_text", [None, {"text": "x", "files": []}, *SETTINGS])
    assert outcome == "done"
    for stream in streams:
        stream.__exit__(None, None, None)
    wait_until(lambda: EARS.ended >= ended + 4 and EARS.begun == EARS.ended)


# -- events that are not right --------------------------------------------------------------------

NOT_RIGHT = [
    b"{", b"[]", b"null", b'"x"', b"[" * 1000, b"\xff\xfe", b"{}", b'{"data": null}',
    b'{"data": [], "fn_index": -1, "session_hash": "s"}',
    b'{"data": [], "fn_index": 10000, "session_hash": "s"}',
    b'{"data": [], "fn_index": "x", "session_hash": "s"}',
    b'{"data": {}, "fn_index": 0, "session_hash": "s"}',
    b'{"data": [], "fn_index": 0, "session_hash": {}}',
    b'{"data": [], "fn_index": 0, "session_hash": "s", "event_data": 5, "trigger_id": "x"}',
    b'{"data": [1, 2, 3], "fn_index": 0, "session_hash": "\\ud800"}',
]  # fmt: skip
VALUES = [None, 5, "x", [], {"path": 5}, {"files": 1, "text": []}, "\ud800"]
PATHS = ("queue/join", "run/predict", "api/on_text", "call/on_text", "reset", "cancel", "upload")


def test_events_that_are_not_right_neither_end_the_app_nor_fill_the_log(site, capfd, caplog):
    logs.forget()
    program = Program(site)
    headers = {"content-type": "application/json"}
    with httpx.Client(base_url=f"{site.url}/gradio_api/", headers=headers, timeout=60) as client:
        for path in PATHS:
            for body in NOT_RIGHT:
                client.post(path, content=body)
        for name in ("on_text", "on_open", "on_run", "on_look", "on_voice", "on_retry"):
            for value in VALUES:
                for count in (0, 1, len(SETTINGS) + 2):
                    event = {"data": [value] * count, "fn_index": program.numbers[name]}
                    event["session_hash"] = program.session
                    client.post("queue/join", content=json.dumps(event))
        with client.stream("GET", f"queue/data?session_hash={program.session}") as stream:
            completed = 0
            for line in stream.iter_lines():
                completed += "process_completed" in line
                if completed == 50:
                    break
    assert Program(site).send("on_text", [None, {"text": "x", "files": []}, *SETTINGS])[0] == "done"
    said = capfd.readouterr().err
    assert "Traceback" not in said + caplog.text and len(said) < 20_000, said[-3000:]
    told = [record.message for record in caplog.records if record.name == "phisight.serving"]
    assert len(told) < 40 and all("\n" not in line and len(line) < 400 for line in told)
