"""serve.py as a person runs it, the load benchmark in small, and the web app behind the API."""

from __future__ import annotations

import base64
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import urllib.error
import urllib.request
import wave
from io import BytesIO
from pathlib import Path

import numpy
import openai
import pytest
import runs
from live_server import ask, assistant_of, get, live, post, wait_until

import serve
from api.api import AT_ONCE
from benchmarks.serve_load import Server, ask_alone, mixture, question_bodies, send_all, serving
from data.dataset import Message, Part
from errors import PhiSightError
from speech.spoken import loaded_once
from web.temporary import own_folder

ROOT = Path(__file__).resolve().parent.parent


def test_a_mixture_of_clients_each_get_what_they_would_get_alone():
    bodies = question_bodies(runs.world() / "held_out.jsonl", runs.world() / "images", 12)
    with serving(runs.finished_run(), "--no-cache", "--max-rows", "8") as server:
        expected, _, tokens = ask_alone(server, bodies)
        assert tokens >= len(bodies) == len(expected)
        outcome = send_all(server, mixture(bodies, 40, seed=0), 8, expected)
        assert outcome.wrong == []
        assert outcome.counts == {
            "good answered": 24,
            "slow answered": 6,
            "gone left": 6,
            "bad refused": 4,
        }

        def quiet() -> bool:
            """Nothing is under way, and no request has left its thread behind."""
            found = server.measures()
            names = ("requests_in_flight", "answers_running", "queue_depth")
            busy = sum(found[f"phisight_{name}"] for name in names)
            return not busy and found["process_threads"] < 8

        wait_until(quiet)
    # `serving` ends it with SIGTERM and raises where the exit code is not 0


def test_the_load_benchmark_finds_answers_that_are_wrong_or_missing():
    bodies = question_bodies(runs.world() / "held_out.jsonl", runs.world() / "images", 2)
    jobs = [job for job in mixture(bodies, 20, seed=0) if job.manner in ("good", "slow")]
    assert len(jobs) == 15
    assistant = assistant_of()
    with live(assistant) as server:
        there = Server(None, server.address)
        assert len(send_all(there, jobs, 4, ["never said", "nor this"]).wrong) == 15
    assistant.close()
    outcome = send_all(there, jobs, 4, ["", ""])  # nobody listens there any more
    assert len(outcome.wrong) == 15 and set(outcome.counts) == {"good failed", "slow failed"}


def started(*flags: str, **environment: str) -> tuple[subprocess.Popen, str]:
    process = subprocess.Popen(
        [sys.executable, "serve.py", "--port", "0", "--run", str(runs.finished_run()), *flags],
        cwd=ROOT,
        env=runs.environment() | environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    line = process.stdout.readline()
    if "http://" not in line:
        process.kill()
        raise AssertionError(process.communicate())
    return process, line


def test_ctrl_c_ends_it_in_order_whatever_clients_hold_up():
    process, line = started("--grace", "0", "--model-name", "mine", PHISIGHT_API_KEY="secret")
    try:
        assert line.startswith("mine (") and "requests need PHISIGHT_API_KEY" in line
        assert "secret" not in line
        address = line.partition("http://")[2].partition("/")[0]
        with pytest.raises(urllib.error.HTTPError, match="401"):
            urllib.request.urlopen(f"http://{address}/v1/models", timeout=60)
        request = urllib.request.Request(
            f"http://{address}/v1/models", headers={"Authorization": "Bearer secret"}
        )
        with urllib.request.urlopen(request, timeout=60) as response:
            assert json.load(response)["data"][0]["id"] == "mine"
        host, _, port = address.partition(":")
        with socket.create_connection((host, int(port))) as half_asked:
            half_asked.sendall(post(ask(), "Authorization: Bearer secret", length=500))
            process.send_signal(signal.SIGINT)
            output, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    assert (process.returncode, output) == (0, "")
    assert "Traceback" not in errors and "secret" not in errors


def test_a_second_signal_of_any_kind_ends_it_at_once_and_quietly():
    process, line = started("--grace", "600")
    try:
        address = line.partition("http://")[2].partition("/")[0]
        urllib.request.urlopen(f"http://{address}/health", timeout=60).close()
        host, _, port = address.partition(":")
        with socket.create_connection((host, int(port))) as half_asked:
            half_asked.sendall(post(ask(), length=500))
            process.send_signal(signal.SIGTERM)
            with pytest.raises(subprocess.TimeoutExpired):
                process.wait(timeout=0.5)
            process.send_signal(signal.SIGTERM)
            output, errors = process.communicate(timeout=30)
    finally:
        process.kill()
    assert (process.returncode, output) == (0, "")
    assert "Traceback" not in errors


@pytest.mark.parametrize(
    ("flags", "environment", "said"),
    [
        (["--host", "0.0.0.0"], {}, "set PHISIGHT_API_KEY"),
        (["--port", "70000"], {}, "choose another --port"),
        (["--host", "no.such.host.invalid"], {}, "--host no.such.host.invalid"),
        (["--max-body", "0"], {}, "--max-body"),
        ([], {"PHISIGHT_API_KEY": " "}, "PHISIGHT_API_KEY: is empty"),
        (["--run", "nowhere"], {}, "nowhere"),
    ],
)
def test_what_serve_refuses(flags, environment, said, monkeypatch):
    monkeypatch.delenv("PHISIGHT_API_KEY", raising=False)
    monkeypatch.setattr(serve, "run", lambda *_, **__: pytest.fail("it serves"))
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(PhiSightError, match=said):
        serve.main(["--port", "0", *flags])


def test_a_port_in_use_is_told_before_the_model_is_loaded(monkeypatch):
    monkeypatch.setattr(serve, "load_assistant", lambda _: pytest.fail("loaded"))
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(PhiSightError, match="choose another --port"):
            serve.main(["--port", str(taken.getsockname()[1])])


# -- speech ---------------------------------------------------------------------------------------

WHISPER = ROOT / "assets/tiny/whisper/tiny.pt"


def wav(samples: bytes, rate: int = 16000) -> bytes:
    """A WAV file of 16-bit samples."""
    file = BytesIO()
    with wave.open(file, "wb") as writer:
        writer.setparams((1, 2, rate, 0, "NONE", ""))
        writer.writeframes(samples)
    return file.getvalue()


def spoken(data: bytes) -> list[dict]:
    sound = {"data": base64.b64encode(data).decode(), "format": "wav"}
    return [{"role": "user", "content": [{"type": "input_audio", "input_audio": sound}]}]


@pytest.mark.skipif(not WHISPER.exists(), reason="there is no small Whisper here")
def test_a_recording_is_heard_by_whisper():
    assistant = assistant_of()
    with live(assistant, listen=serve.listening(loaded_once(str(WHISPER)))) as server:

        def refusal(data: bytes) -> openai.BadRequestError:
            with pytest.raises(openai.BadRequestError) as raised:
                server.client().chat.completions.create(model="tiny", messages=spoken(data))
            return raised.value

        assert "no speech heard" in refusal(wav(bytes(32000))).message
        assert refusal(b"no recording").code == "invalid_audio"
        if shutil.which("espeak-ng") is None:
            pytest.skip("espeak-ng is not there to speak")
        said = subprocess.run(
            ["espeak-ng", "--stdout", "What colour is the star?"], capture_output=True, check=True
        ).stdout
        from speech.recordings import read_audio

        heard = loaded_once(str(WHISPER))().text(read_audio(said))
        answer = server.client().chat.completions.create(model="tiny", messages=spoken(said))
        expected = assistant.reply([Message("user", (Part("text", heard),))])
        assert answer.choices[0].message.content == "".join(expected)
    assistant.close()


@pytest.mark.skipif(not WHISPER.exists(), reason="there is no small Whisper here")
def test_who_has_gone_is_not_heard_to_the_end_of_his_recording(monkeypatch):
    """Ten minutes of a voice: the child that decodes it is ended, and Whisper's next window not
    begun, when the client goes."""
    from sounds import RATE, encoded, vowels

    speech = loaded_once(str(WHISPER))()
    windows, decode = [], speech._decode

    def counted(*given: object):
        windows.append(given)
        return decode(*given)

    monkeypatch.setattr(speech, "_decode", counted)
    utterance = numpy.concatenate([vowels(), numpy.zeros(RATE, "float32")])
    long = encoded(numpy.tile(utterance, 240), RATE, "MP3")
    assistant = assistant_of()
    with live(assistant, listen=serve.listening(lambda: speech)) as server:
        connection = server.send(post({"messages": spoken(long)}))
        wait_until(lambda: len(windows) > 1)
        second = server.send(post({"messages": spoken(long)}))
        wait_until(lambda: server.api.places.taken["ears"] == 2)
        connection.close()
        second.close()
        wait_until(lambda: not server.api.measures.in_flight)
        wait_until(lambda: "question" not in [thread.name for thread in threading.enumerate()])
        assert len(windows) < 100
        wait_until(
            lambda: server.api.turns["ears"]._value == AT_ONCE["ears"]
        )  # given back by the loop
    assistant.close()


def test_a_speech_model_that_is_not_there_is_the_servers_fault(capsys):
    def load() -> None:
        raise PhiSightError("/secret/place.pt: no such file")

    assistant = assistant_of()
    with live(assistant, listen=serve.listening(load)) as server:
        with pytest.raises(openai.InternalServerError) as raised:
            server.client().chat.completions.create(model="tiny", messages=spoken(b"x"))
    assert raised.value.code == "speech_unavailable" and "secret" not in raised.value.message
    assert "/secret/place.pt" in capsys.readouterr().err
    assistant.close()


def test_the_page_is_told_of_the_start_and_the_end():
    told = []

    async def page(scope, receive, send) -> None:
        told.append(scope["type"])
        for name in ("startup", "shutdown"):
            assert (await receive())["type"] == f"lifespan.{name}"
            await send({"type": f"lifespan.{name}.complete"})
            told.append(name)

    assistant = assistant_of()
    with live(assistant, key="secret", rest=page):
        assert told == ["lifespan", "startup"]
    assert told == ["lifespan", "startup", "shutdown"]
    assistant.close()


# -- the web app on the same port -----------------------------------------------------------------

SECRET = "a secret that no client may read"


@pytest.fixture(scope="module")
def with_app(tmp_path_factory):
    if not (ROOT / "app.py").exists():
        pytest.skip("there is no web app here")
    os.environ.setdefault("GRADIO_TEMP_DIR", str(tmp_path_factory.mktemp("uploads")))
    assistant = assistant_of()
    with live(assistant, rest=serve.web_app(assistant), grace=0.2) as running:
        yield running
    assistant.close()


def test_the_page_and_the_api_share_a_port(with_app):
    assert b"<html" in with_app.exchange(get("/"))[2].lower()
    assert [model.id for model in with_app.client().models.list()] == ["tiny"]
    assert with_app.exchange(get("/v1/nothing"))[0] == 404


def test_no_file_of_the_server_can_be_read(with_app, tmp_path):
    file = tmp_path / "secret.txt"
    file.write_text(SECRET)
    inside = ROOT / "README.md"
    for path in (file, inside, "/etc/passwd", "/proc/self/environ"):
        for form in (
            f"/gradio_api/file={path}",
            f"/file={path}",
            f"/gradio_api/file=/{path}",
            f"/gradio_api/file=../../../../../../..{path}",
            f"/gradio_api/file=file://{path}",
            f"/static/..%2f..%2f..{path}",
            f"/v1/../..{path}",
            f"/{path}",
        ):
            status, _, body = with_app.exchange(get(form))
            assert status in (400, 403, 404), form
            assert SECRET.encode() not in body and b"root:" not in body and b"PATH=" not in body


def test_no_route_of_the_app_reads_a_file_of_the_server(with_app, tmp_path):
    """Every route of the page that takes names or files, asked as a stranger would."""
    file = tmp_path / "secret.txt"
    file.write_text(SECRET)
    key = "X-Browser-Key: " + "a" * 32
    for path in (str(file), f"../../../..{file}", "/etc/passwd"):
        for route, body in (
            ("conversations/0123456789abcdef/ask", {"version": 0, "text": "x", "uploads": [path]}),
            ("conversations/0123456789abcdef/ask", {"version": 0, "text": path, "example": path}),
            ("batches", {"question": "x", "uploads": [path]}),
            ("listen", {"upload": path}),
            ("model", {"run": path, "checkpoint": path}),
        ):
            asked = post({"settings": {}, **body}, key)
            asked = asked.replace(b"/v1/chat/completions", f"/app/{route}".encode(), 1)
            status, _, answer = with_app.exchange(asked)
            assert status in (400, 403, 404, 409, 422), (route, body, answer)
            assert SECRET.encode() not in answer and b"root:" not in answer
    copies = [path for path in own_folder().rglob("*") if path.is_file()]
    assert not any(SECRET.encode() in path.read_bytes() for path in copies)


def test_the_page_and_the_api_answer_side_by_side(with_app):
    """The routes of the one do not shadow the other's, and each has its own form of refusal."""
    status, _, body = with_app.exchange(get("/app/start"))
    assert status == 200 and json.loads(body)["model"]["state"] == "ready"
    status, _, body = with_app.exchange(get("/app/nothing"))
    assert status == 404 and json.loads(body)["error"]["key"] == "nothing_there"
    status, _, body = with_app.exchange(get("/v1/nothing"))
    assert status == 404 and json.loads(body)["error"]["type"] == "invalid_request_error"


def test_serve_with_the_app_as_a_process():
    process, line = started("--app", "--grace", "0")
    try:
        assert "the app at http://" in line
        address = line.partition("http://")[2].partition("/")[0]
        with urllib.request.urlopen(f"http://{address}/", timeout=60) as page:
            assert b"phisight" in page.read()
        with urllib.request.urlopen(f"http://{address}/app/start", timeout=60) as start:
            assert json.load(start)["model"]["state"] == "ready"
        process.send_signal(signal.SIGTERM)
        output, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    assert (process.returncode, output) == (0, "") and "Traceback" not in errors


def test_the_app_needs_the_key_too():
    if not (ROOT / "app.py").exists():
        pytest.skip("there is no web app here")
    assistant = assistant_of()
    with live(assistant, key="secret", rest=serve.web_app(assistant), grace=0.2) as server:
        assert server.exchange(get("/"))[0] == 401
        assert server.exchange(get("/config"))[0] == 401
        assert server.exchange(get("/app/start"))[0] == 401
        assert server.exchange(get("/app/uploads/" + "0" * 32))[0] == 401
        password = base64.b64encode(b"me:secret").decode()
        assert server.exchange(get("/", f"Authorization: Basic {password}"))[0] == 200
    assistant.close()
