"""`/v1/audio/...`: recordings written down and texts spoken, as programs ask for them."""

from __future__ import annotations

import gc
import io
import json
import re
import threading
import weakref
from collections.abc import Callable, Iterator

import numpy
import openai
import pytest
import soundfile
from hypothesis import given, settings
from hypothesis import strategies as st
from live_server import Live, assistant_of, get, live, wait_until
from sounds import RATE, TINY, encoded, needs_espeak, tiny, tone

from api.errors import ApiError
from api.forms import Limits
from api.multipart import parse_multipart
from api.senses import listening, speaking, transcribing
from api.spoken import KINDS, PCM_RATE, SpeechBody, spoken
from api.spoken import encoded as packed
from api.transcriptions import Heard, parse_recording
from speech.spoken import loaded_once
from speech.subtitles import CUE_CHARACTERS, as_srt, as_vtt
from speech.whisper import NoSpeech, Segment, write_down
from workers.pool import Cancelled

QUESTION = "What colour is the star?"
FORM = b'multipart/form-data; boundary="the edge"'


def form(*fields: tuple[str, bytes], end: bytes = b"--the edge--\r\n") -> bytes:
    """A form of which the field "file" has a file's name."""
    parts = b""
    for name, data in fields:
        more = b'; filename="a.wav"' if name == "file" else b""
        head = b'Content-Disposition: form-data; name="' + name.encode() + b'"' + more
        parts += b"--the edge\r\n" + head + b"\r\n\r\n" + data + b"\r\n"
    return parts + end


def post(path: str, body: bytes, kind: bytes) -> bytes:
    head = f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n"
    head += f"Content-Length: {len(body)}\r\nContent-Type: "
    return head.encode() + kind + b"\r\n\r\n" + body


@pytest.fixture(scope="module")
def server() -> Iterator[Live]:
    assistant, load = assistant_of(), loaded_once(str(TINY))
    assert load is not None
    with live(
        assistant,
        listen=listening(load),
        transcribe=transcribing(load),
        speak=speaking("espeak-ng"),
    ) as running:
        yield running
    assistant.close()


@pytest.fixture(scope="module")
def client(server) -> openai.OpenAI:
    return server.client()


# -- both ways ------------------------------------------------------------------------------------


@needs_espeak
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_spoken_is_heard(client, kind):
    reply = client.audio.speech.create(
        model="tts-1", voice="alloy", input=QUESTION, response_format=kind
    )
    data = reply.read()
    assert reply.response.headers["content-type"] == KINDS[kind][2]
    if kind == "pcm":  # has no header: OpenAI's clients take it to be this
        samples = numpy.frombuffer(data, "<i2").astype(numpy.float32) / 32768
        data = encoded(samples, PCM_RATE, "WAV")
    heard = client.audio.transcriptions.create(model="whisper-1", file=(f"a.{kind}", data))
    assert heard.text == QUESTION


@needs_espeak
def test_every_form_of_a_transcription_tells_the_same(client):
    data = client.audio.speech.create(
        model="tts-1", voice="alloy", input=QUESTION, response_format="wav"
    ).read()

    def written(form: str, **more: object) -> object:
        return client.audio.transcriptions.create(
            model="whisper-1", file=("a.wav", data), response_format=form, **more
        )

    assert written("text") == f"{QUESTION}\n"
    whole = written("verbose_json", timestamp_granularities=["segment"], temperature=0)
    (segment,) = whole.segments
    assert (whole.text, segment.text, whole.language) == (QUESTION, QUESTION, "english")
    assert 0 <= segment.start < segment.end <= whole.duration
    assert whole.duration == pytest.approx(soundfile.info(io.BytesIO(data)).duration, abs=0.01)
    shown = re.fullmatch(r"1\n(\S+) --> (\S+)\nWhat colour is the star\?\n\n", written("srt"))
    assert shown and shown[1] == "00:00:00,000"
    assert written("vtt") == "WEBVTT\n\n" + written("srt")[2:].replace(",", ".")


def test_nothing_said_is_an_empty_text(client):
    silence = encoded(numpy.zeros(RATE, "float32"), RATE, "FLAC")
    heard = client.audio.transcriptions.create(model="whisper-1", file=("a.flac", silence))
    assert heard.text == "" and heard.usage.seconds == 1
    verbose = client.audio.transcriptions.create(
        model="tiny", file=("a.flac", silence), response_format="verbose_json", language="en"
    )
    assert (verbose.segments, verbose.language, verbose.duration) == ([], "english", 1)


@needs_espeak
def test_a_voice_and_a_speed_are_those_that_are_asked_for(client):
    def seconds(**more: object) -> float:
        sound = client.audio.speech.create(
            **{"model": "tiny", "voice": "nova", "input": QUESTION, "response_format": "wav"} | more
        )
        return soundfile.info(io.BytesIO(sound.read())).duration

    usual = seconds()
    assert seconds(speed=2.0) < 0.7 * usual and seconds(speed=0.5) > 1.5 * usual
    assert seconds(voice="de") != usual
    for voice in ("xx-none", "../../etc/passwd", "-w/tmp/x"):
        with pytest.raises(openai.BadRequestError) as raised:
            seconds(voice=voice)
        assert raised.value.param == "voice"
    with pytest.raises(openai.BadRequestError, match="nothing to say") as raised:
        seconds(input="...")
    assert raised.value.param == "input"


# -- what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "param", "code"),
    [
        ({"file": b""}, "file", "invalid_audio"),
        ({"file": b"no recording"}, "file", "invalid_audio"),
        ({"language": "xx"}, "language", "invalid_audio"),
        ({"language": "de"}, "language", "invalid_audio"),
        ({"temperature": 0.5}, "temperature", "invalid_value"),
        ({"timestamp_granularities": ["word"]}, "timestamp_granularities", "invalid_value"),
        ({"prompt": "A name"}, "prompt", "unsupported_parameter"),
        ({"stream": True}, "stream", "unsupported_parameter"),
        ({"include": ["logprobs"]}, "include", "unsupported_parameter"),
        ({"model": "gpt-4"}, "model", "model_not_found"),
    ],
)
def test_a_transcription_that_is_refused_names_its_field(client, fields, param, code):
    fields = {"model": "whisper-1", "file": encoded(tone(), RATE, "WAV")} | fields
    fields["file"] = ("a.wav", fields["file"])
    with pytest.raises(openai.APIStatusError) as raised:
        client.audio.transcriptions.create(**fields)
    assert (raised.value.param, raised.value.code) == (param, code)
    assert str(TINY.parent) not in raised.value.message


def test_an_english_whisper_translates_nothing(server):
    body = form(("model", b"whisper-1"), ("file", encoded(tone(), RATE, "WAV")))
    status, _, told = server.exchange(post("/v1/audio/translations", body, FORM))
    assert status == 400 and b"translates nothing" in told and str(TINY.parent).encode() not in told


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"speed": 3}, "speed"),
        ({"response_format": "aac"}, "response_format"),
        ({"input": ""}, "input"),
        ({"input": "x" * 4097}, "input"),
        ({"instructions": "Shout."}, "instructions"),
        ({"stream_format": "sse"}, "stream_format"),
        ({"model": "gpt-4"}, "model"),
    ],
)
def test_speech_that_is_refused_names_its_field(client, fields, param):
    with pytest.raises(openai.APIStatusError) as raised:
        client.audio.speech.create(
            **{"model": "tts-1", "voice": "alloy", "input": "x"} | {"extra_body": fields}
        )
    assert raised.value.param == param


def test_a_server_without_ears_and_voice_says_so():
    assistant = assistant_of()
    with live(assistant) as server:
        client = server.client()
        with pytest.raises(openai.BadRequestError, match="does not listen"):
            client.audio.transcriptions.create(model="whisper-1", file=("a.wav", b"x"))
        with pytest.raises(openai.BadRequestError, match="does not speak"):
            client.audio.speech.create(model="tts-1", voice="alloy", input="x")
    assert speaking("") is None
    assistant.close()


def test_a_voice_that_is_not_there_is_the_servers_fault(capsys, tmp_path):
    assistant, missing = assistant_of(), str(tmp_path / "a" / "b")
    with live(assistant, speak=speaking(missing)) as server:
        with pytest.raises(openai.InternalServerError) as raised:
            server.client().audio.speech.create(model="tts-1", voice="alloy", input="x")
    assert raised.value.code == "speech_unavailable" and missing not in raised.value.message
    assert missing in capsys.readouterr().err
    assistant.close()


def test_the_routes_take_their_own_media_types(server):
    for path, kind in (
        ("/v1/audio/transcriptions", b"application/json"),
        ("/v1/audio/translations", b"application/json"),
        ("/v1/audio/speech", FORM),
    ):
        assert server.exchange(post(path, b"{}", kind))[0] == 415
        assert server.exchange(get(path))[0] == 405


def test_who_leaves_is_not_heard_to_the_end():
    asked = []

    def transcribe(data: bytes, language: str | None, translate: bool, cancelled) -> Heard:
        asked.append(cancelled)
        while not cancelled():
            pass
        raise Cancelled

    from live_server import wait_until

    assistant = assistant_of()
    with live(assistant, transcribe=transcribe) as server:
        connection = server.send(post("/v1/audio/transcriptions", form(("file", b"x")), FORM))
        wait_until(lambda: asked)
        connection.close()
        wait_until(lambda: not server.api.measures.in_flight)
        assert asked[0]()
    assistant.close()


def test_a_long_recording_asked_about_is_heard_until_the_context_is_full():
    begun = []

    def endless_speech() -> Iterator[Segment]:
        for minute in range(1000):
            begun.append(minute)
            yield Segment(60 * minute, 60 * minute + 60, "word " * 100, "en")

    def listen(data: bytes, cancelled: object, fits: Callable[[str], bool]) -> str:
        return write_down(endless_speech(), fits)

    assistant = assistant_of()
    parts = [{"type": "input_audio", "input_audio": {"format": "mp3", "data": "AAAA"}}]
    question = {"role": "user", "content": parts}
    with live(assistant, listen=listen) as server:
        with pytest.raises(openai.BadRequestError, match="minutes of messages.0") as raised:
            server.client().chat.completions.create(model="tiny", messages=[question])
    assert (raised.value.code, raised.value.param) == ("context_length_exceeded", "messages")
    told = raised.value.message
    assert f"{assistant.context_tokens} tokens" in told and "picture" not in told
    assert 1 < len(begun) < 20 and f"first {len(begun)}.0 minutes" in told
    assistant.close()


# -- forms ----------------------------------------------------------------------------------------


def test_a_recording_that_is_refused_is_not_held_by_its_error(monkeypatch):
    """Where it was, an hour of silence left 230 MB until Python looked for cycles."""
    left: list[weakref.ref] = []

    def read(data: bytes, cancelled: Callable[[], bool]) -> numpy.ndarray:
        audio = numpy.zeros(RATE, numpy.float32)
        left.append(weakref.ref(audio))
        return audio

    monkeypatch.setattr("api.senses.read_audio", read)
    listen = listening(tiny)
    gc.disable()
    try:
        with pytest.raises(NoSpeech) as error:
            listen(b"", lambda: False, lambda text: True)
        assert error.value.__traceback__ is not None and left[0]() is None
    finally:
        gc.enable()


def test_a_form_is_read_as_it_was_written():
    file = bytes(range(256)) * 9 + b"\r\n--the edg\r\n--the edGe"
    parts = parse_multipart(form(("file", file), ("a[]", b"1"), ("a[]", b"")), FORM)
    assert [(part.name, bytes(part.data)) for part in parts] == [
        ("file", file),
        ("a[]", b"1"),
        ("a[]", b""),
    ]


@pytest.mark.parametrize(
    ("body", "kind"),
    [
        (form(("file", b"x")), b"multipart/form-data"),
        (form(("file", b"x")), b"multipart/form-data; boundary=other"),
        (form(("file", b"x")), b"text/plain; boundary=x"),
        (form(("file", b"x"), end=b""), FORM),
        (form(("file", b"x" * 100))[:-60], FORM),
        (b"", FORM),
        (b"--the edge\r\nContent-Disposition\r\n\r\nx\r\n--the edge--", FORM),
        (form(*[("a", b"")] * 101), FORM),
        (b"--the edge\r\nA: " + b"b" * 10_000 + b"\r\n\r\n\r\n--the edge--", FORM),
    ],
)
def test_what_is_not_a_whole_form_is_refused(body, kind):
    with pytest.raises(ApiError) as raised:
        parse_multipart(body, kind)
    assert raised.value.status in (400, 413)


@pytest.mark.parametrize(
    ("fields", "status", "param"),
    [
        ([("model", b"whisper-1")], 400, "file"),
        ([("file", b"x"), ("file", b"y")], 400, "file"),
        ([("file", b"x" * 11)], 413, "file"),
        ([("file", b"x"), ("temperature", b"warm")], 400, "temperature"),
        ([("file", b"x"), ("response_format", b"xml")], 400, "response_format"),
    ],
)
def test_a_form_that_does_not_fit_is_refused(fields, status, param):
    with pytest.raises(ApiError) as raised:
        parse_recording(form(*fields), FORM, "tiny", Limits(audio_bytes=10))
    assert (raised.value.status, raised.value.param) == (status, param)


@settings(max_examples=300)
@given(
    st.binary(max_size=80)
    | st.lists(st.tuples(st.sampled_from(["file", "model", "x[]"]), st.binary(max_size=9))).map(
        lambda fields: form(*fields)
    ),
    st.integers(0, 200),
)
def test_any_bytes_are_a_form_or_refused(body, cut):
    for data in (body, body[:cut]):
        try:
            parse_recording(data, FORM, "tiny", Limits())
        except ApiError as error:
            assert error.status in (400, 404, 413)
            json.dumps(error.json())


# -- subtitles and sound --------------------------------------------------------------------------


def test_long_speech_is_cut_into_readable_subtitles():
    words = "Here is a sentence, and it goes on for a while. " * 6
    shown = as_srt([Segment(3661.5, 3671.5, words.strip(), "en"), Segment(3672, 3673, "x", "en")])
    cues = [cue.split("\n") for cue in shown.strip().split("\n\n")]
    assert [cue[0] for cue in cues] == [str(n) for n in range(1, len(cues) + 1)] and len(cues) > 3
    assert all(len(cue[2]) <= CUE_CHARACTERS for cue in cues)
    assert " ".join(cue[2] for cue in cues[:-1]) == words.strip()
    assert cues[0][1].startswith("01:01:01,500 --> 01:01:0")
    assert cues[-2][1].endswith("--> 01:01:11,500")
    times = [time for cue in cues for time in cue[1].split(" --> ")]
    assert times == sorted(times)


def test_what_has_a_meaning_in_webvtt_is_escaped():
    shown = as_vtt([Segment(0, 1, "a < b --> c & d", "en")])
    assert shown == "WEBVTT\n\n00:00:00.000 --> 00:00:01.000\na &lt; b --&gt; c &amp; d\n\n"
    assert as_vtt([]) == "WEBVTT\n\n" and as_srt([]) == ""


@pytest.mark.parametrize("kind", KINDS)
def test_sound_has_its_length_at_any_rate_of_a_voice(kind):
    def speak(text, voice, speed, cancelled) -> tuple[numpy.ndarray, int]:
        assert (text, voice, speed) == ("x", "", 1.0)
        return 2 * tone(440, 1.0, 16_000), 16_000  # louder than a file can hold

    data = spoken(SpeechBody(input="x", voice="nova", response_format=kind), speak)
    if kind == "pcm":
        assert len(data) == pytest.approx(2 * PCM_RATE, abs=100)
    else:
        assert soundfile.info(io.BytesIO(data)).duration == pytest.approx(1, abs=0.1)


def test_who_waits_for_the_voice_does_not_wait_for_one_who_has_gone():
    """Neither for the rest of what would be said to him, nor for its packing."""
    told = threading.Event()
    ended: list[str] = []

    def speak(text, voice, speed, cancelled) -> tuple[numpy.ndarray, int]:
        if text == "long":
            told.set()
            wait_until(cancelled)
            ended.append(text)
            raise Cancelled
        return tone(440, 0.1, 16_000), 16_000

    assistant = assistant_of()
    with live(assistant, speak=speak) as server:
        gone = server.send(post("/v1/audio/speech", b'{"input": "long"}', b"application/json"))
        assert told.wait(60)
        gone.close()
        said = server.client().audio.speech.create(model="tts-1", voice="alloy", input="short")
        assert ended == ["long"] and said.content
        wait_until(lambda: not server.api.measures.in_flight)
    assistant.close()


def test_packing_ends_when_nobody_waits_for_it():
    asked: list[bool] = []

    def cancelled() -> bool:
        asked.append(True)
        return len(asked) > 2

    with pytest.raises(Cancelled):
        packed(tone(440, 100.0, 16_000), 16_000, "opus", cancelled)
    assert len(asked) == 3  # of ten parts two were packed


@needs_espeak
def test_a_voice_of_any_length_is_a_400_without_a_path(client):
    for length in (101, 10**6):
        with pytest.raises(openai.BadRequestError) as refused:
            client.audio.speech.create(model="tts-1", voice="a" * length, input="x")
        assert "/" not in refused.value.message and len(refused.value.message) < 300
