"""What a stranger's JSON becomes: a sound request, or an error in OpenAI's form."""

from __future__ import annotations

import asyncio
import base64
import json
import threading
from io import BytesIO

import pytest
import runs
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image

from api import guards
from api.api import Api
from api.errors import ApiError
from api.forms import MIB, Limits
from api.pieces import Sound
from api.requests import ChatRequest, parse_request
from assistant.sampling import Sampling
from data.dataset import Message, Part

SMALL = Limits(
    picture_bytes=4000,
    audio_bytes=90,
    context_tokens=50,
    picture_tokens=20,
    pixels=5000,
    sounds=1,
    characters=100,
    messages=5,
    new_tokens=50,
    default_new_tokens=20,
)
ASK = [{"role": "user", "content": "What is it?"}]


def png(size: tuple[int, int] = (4, 4)) -> bytes:
    file = BytesIO()
    Image.new("RGB", size, "red").save(file, "PNG")
    return file.getvalue()


def picture(data: bytes, kind: str = "image/png") -> dict:
    url = f"data:{kind};base64,{base64.b64encode(data).decode()}"
    return {"type": "image_url", "image_url": {"url": url}}


def sound(data: bytes = b"RIFF", form: str = "wav") -> dict:
    return {
        "type": "input_audio",
        "input_audio": {"data": base64.b64encode(data).decode(), "format": form},
    }


def user(*parts: object) -> list:
    return [{"role": "user", "content": list(parts)}]


def parse(value: object = None, limits: Limits = SMALL, **fields: object) -> ChatRequest:
    given = {"messages": ASK, **fields} if value is None else value
    return parse_request(json.dumps(given).encode(), "tiny", limits)


def refusal(*arguments: object, **fields: object) -> ApiError:
    with pytest.raises(ApiError) as raised:
        parse(*arguments, **fields)
    return raised.value


# -- what is read ---------------------------------------------------------------------------------


def test_a_bare_question_is_greedy_and_whole():
    assert parse() == ChatRequest(
        turns=parse().turns,
        pictures={},
        sampling=Sampling(),
        max_new_tokens=20,
        seed=None,
        stop=(),
        stream=False,
        include_usage=False,
    )
    assert parse().conversation(lambda sound: "") == (
        Message("user", (Part("text", "What is it?"),)),
    )


def test_every_field_that_is_read():
    request = parse(
        model="tiny",
        temperature=0.5,
        top_p=0.25,
        top_k=3,
        repetition_penalty=1.5,
        no_repeat_ngram_size=4,
        seed=7,
        max_tokens=5,
        stop=["a", "b"],
        stream=True,
        stream_options={"include_usage": True},
        user="somebody",
        metadata={"a": "b"},
        n=1,
        logprobs=False,
        tools=[],
        presence_penalty=0.0,
        response_format={"type": "text"},
        tool_choice="none",
        unheard_of=[[]],
    )
    assert request.sampling == Sampling(0.5, 0.25, 3, 1.5, 4)
    assert (request.seed, request.max_new_tokens, request.stop) == (7, 5, ("a", "b"))
    assert request.stream and request.include_usage


def test_null_is_as_good_as_absent():
    names = (
        "model",
        "temperature",
        "top_p",
        "top_k",
        "repetition_penalty",
        "no_repeat_ngram_size",
        "seed",
        "max_tokens",
        "max_completion_tokens",
        "stop",
        "stream",
        "stream_options",
        "n",
        "tools",
        "logprobs",
    )
    assert parse(**dict.fromkeys(names)) == parse()


def test_the_newer_name_of_a_limit_wins_and_no_limit_passes_the_servers():
    assert parse(max_tokens=5, max_completion_tokens=6).max_new_tokens == 6
    assert parse(max_tokens=10**30).max_new_tokens == SMALL.new_tokens


def test_sampling_at_the_edges():
    assert 0 < parse(top_p=0).sampling.top_p < 1e-6
    assert parse(seed=-1).seed == 2**64 - 1
    assert parse(stop="end").stop == ("end",)


def test_pictures_and_speech_stand_where_they_were_put():
    first, second = png(), png((5, 5))
    request = parse(
        {
            "messages": user(
                picture(first),
                {"type": "text", "text": "and"},
                picture(second, "IMAGE/JPEG"),
                sound(),
            )
        }
    )
    names = ["messages[0].content[0].image_url.url", "messages[0].content[2].image_url.url"]
    assert request.pictures == dict(zip(names, (first, second)))
    (message,) = request.conversation(lambda sound: sound.data.decode().lower())
    assert message.parts == (
        Part("image", names[0]),
        Part("text", "and"),
        Part("image", names[1]),
        Part("text", "riff"),
    )


def test_neighbours_of_one_role_are_one_turn_and_developers_are_the_system():
    request = parse(
        {
            "messages": [
                {"role": "system", "content": "Be brief."},
                {"role": "developer", "content": "Be kind."},
                {"role": "user", "content": "A"},
                {"role": "assistant", "content": "B"},
            ]
        }
        | {
            "messages": [
                {"role": "system", "content": "Be brief."},
                {"role": "developer", "content": "Be kind."},
                {"role": "user", "content": "A"},
                {"role": "user", "content": [{"type": "text", "text": "B"}]},
            ]
        }
    )
    assert [(turn.role, [part.value for part in turn.parts]) for turn in request.turns] == [
        ("system", ["Be brief.", "Be kind."]),
        ("user", ["A", "B"]),
    ]


NOTHING_ELSE = {
    "refusal": None,
    "annotations": [],
    "audio": None,
    "function_call": None,
    "tool_calls": None,
}


TEXT = {"type": "text", "text": "x"}


@pytest.mark.parametrize(
    ("turn", "said"),
    [
        ({"content": "red"} | NOTHING_ELSE, "red"),
        ({"content": None} | NOTHING_ELSE, ""),
        ({}, ""),
        ({"content": ""}, ""),
        ({"content": []}, ""),
        ({"content": None, "refusal": "I cannot."}, "I cannot."),
        ({"content": [{"type": "refusal", "refusal": "I cannot."}]}, "I cannot."),
        (
            {"content": [TEXT, {"type": "refusal", "refusal": "y"}]},
            "xy",
        ),
        ({"content": [TEXT | {"annotations": [], "cache_control": None}]}, "x"),
        ({"content": "red", "tool_calls": [], "name": "tiny", "annotations": [{"a": 1}]}, "red"),
        ({"content": "red", "reasoning_content": "I think", "thinking_blocks": []}, "red"),
        ({"content": "red", "name": None, "provider_specific_fields": {}}, "red"),
    ],
)
def test_a_turn_that_a_program_sends_back_is_taken(turn, said):
    request = parse({"messages": [*ASK, {"role": "assistant", **turn}, *ASK]})
    assert [one.role for one in request.turns] == ["user", "assistant", "user"]
    assert "".join(part.value for part in request.turns[1].parts) == said


@pytest.mark.parametrize(
    "form", ["wav", "MP3", "flac", "ogg", "webm", "m4a", "mp4", "opus", "aiff"]
)
def test_recordings_are_taken_under_any_name_that_programs_use(form):
    assert parse({"messages": user(sound(b"x", form))}).sounds[0].data == b"x"


@pytest.mark.parametrize(
    "kind", ["audio/wav", "AUDIO/webm;codecs=opus", "video/webm;codecs=vp8,opus"]
)
def test_a_recording_may_be_a_data_url(kind):
    part = sound(b"RIFF")
    part["input_audio"]["data"] = f"data:{kind};base64," + part["input_audio"]["data"]
    assert parse({"messages": user(part)}).sounds[0].data == b"RIFF"


# -- what is refused ------------------------------------------------------------------------------

REFUSED = [
    (
        {"messages": [*ASK, {"role": "assistant", "audio": {"id": "audio_1"}}, *ASK]},
        400,
        "messages[1].audio",
        "unsupported_parameter",
    ),
    (
        {"messages": [*ASK, {"role": "assistant", "content": None, "tool_calls": [{}]}, *ASK]},
        400,
        "messages[1].tool_calls",
        "unsupported_parameter",
    ),
    (
        {"messages": [{"role": "user", "content": None}]},
        400,
        "messages[0].content",
        "invalid_value",
    ),
    (
        {
            "messages": user(
                {
                    "type": "input_audio",
                    "input_audio": {"format": "wav", "data": "data:image/png;base64,aGk="},
                }
            )
        },
        400,
        "messages[0].content[0].input_audio.data",
        "invalid_base64",
    ),
    ({"model": "gpt-4"}, 404, "model", "model_not_found"),
    ({"model": 1}, 400, "model", "invalid_value"),
    ({"messages": None}, 400, "messages", "missing_required_parameter"),
    ({"messages": []}, 400, "messages", "invalid_value"),
    ({"messages": {}}, 400, "messages", "invalid_value"),
    ({"messages": ["x"]}, 400, "messages[0]", "invalid_value"),
    ({"messages": [{"role": "tool", "content": "x"}]}, 400, "messages[0].role", "invalid_value"),
    ({"messages": [{"role": [], "content": "x"}]}, 400, "messages[0].role", "invalid_value"),
    ({"messages": [{"role": "user"}]}, 400, "messages[0].content", "invalid_value"),
    ({"messages": [{"role": "user", "content": " \n"}]}, 400, "messages", "invalid_value"),
    ({"messages": user()}, 400, "messages", "invalid_value"),
    ({"messages": user("x")}, 400, "messages[0].content[0]", "invalid_value"),
    ({"messages": user({"type": []})}, 400, "messages[0].content[0].type", "invalid_value"),
    (
        {"messages": user({"type": "file", "file": {"file_id": "/etc/passwd"}})},
        400,
        "messages[0].content[0].type",
        "invalid_value",
    ),
    (
        {"messages": user({"type": "text", "text": 1})},
        400,
        "messages[0].content[0].text",
        "invalid_value",
    ),
    (
        {"messages": user({"type": "text", "text": "\ud800"})},
        400,
        "messages[0].content[0].text",
        "invalid_value",
    ),
    (
        {"messages": [{"role": "user", "content": "x" * 101}]},
        413,
        "messages[0].content",
        "too_large",
    ),
    ({"messages": ASK * 6}, 413, "messages", "too_large"),
    ({"messages": user(*[TEXT] * 6)}, 413, "messages[0].content", "too_large"),
    ({"messages": [*ASK, {"role": "assistant", "content": "x"}]}, 400, "messages", "invalid_value"),
    (
        {"messages": [*ASK, {"role": "system", "content": "x"}]},
        400,
        "messages[1].role",
        "invalid_value",
    ),
    (
        {"messages": [{"role": "assistant", "content": "x", "tool_calls": [{}]}, *ASK]},
        400,
        "messages[0].tool_calls",
        "unsupported_parameter",
    ),
    (
        {"messages": [{"role": "system", "content": [picture(b"x")]}, *ASK]},
        400,
        "messages[0].content[0]",
        "invalid_value",
    ),
    (
        {"messages": user(picture(bytes(4001)))},
        413,
        "messages[0].content[0].image_url.url",
        "too_large",
    ),
    (
        {"messages": user(picture(png((71, 71))))},
        413,
        "messages[0].content[0].image_url",
        "too_large",
    ),
    (
        {"messages": user(*[picture(png((50, 51)))] * 2)},
        413,
        "messages[0].content[1].image_url",
        "too_large",
    ),
    (
        {"messages": user(*[picture(png())] * 3)},
        400,
        "messages",
        "context_length_exceeded",
    ),
    (
        {"messages": user({"type": "image_url", "image_url": "x"})},
        400,
        "messages[0].content[0].image_url",
        "invalid_value",
    ),
    (
        {"messages": user({"type": "image_url"})},
        400,
        "messages[0].content[0].image_url",
        "invalid_value",
    ),
    (
        {"messages": user({"type": "input_audio", "input_audio": None})},
        400,
        "messages[0].content[0].input_audio",
        "invalid_value",
    ),
    (
        {"messages": user({"type": "image_url", "image_url": {"url": None}})},
        400,
        "messages[0].content[0].image_url.url",
        "invalid_value",
    ),
    (
        {"messages": user(sound(bytes(100)))},
        413,
        "messages[0].content[0].input_audio.data",
        "too_large",
    ),
    ({"messages": user(sound(), sound())}, 413, "messages[0].content[1].input_audio", "too_large"),
    (
        {"messages": user(sound(form="exe"))},
        400,
        "messages[0].content[0].input_audio.format",
        "invalid_value",
    ),
    (
        {"messages": user({"type": "input_audio", "input_audio": {"format": "wav", "data": "%"}})},
        400,
        "messages[0].content[0].input_audio.data",
        "invalid_base64",
    ),
    ({"temperature": 2.1}, 400, "temperature", "invalid_value"),
    ({"temperature": True}, 400, "temperature", "invalid_value"),
    ({"temperature": 10**400}, 400, "temperature", "invalid_value"),
    ({"top_p": -0.1}, 400, "top_p", "invalid_value"),
    ({"top_k": 1.5}, 400, "top_k", "invalid_value"),
    ({"no_repeat_ngram_size": -1}, 400, "no_repeat_ngram_size", "invalid_value"),
    ({"no_repeat_ngram_size": 65}, 400, "no_repeat_ngram_size", "invalid_value"),
    ({"no_repeat_ngram_size": 2.0}, 400, "no_repeat_ngram_size", "invalid_value"),
    ({"max_tokens": 0}, 400, "max_tokens", "invalid_value"),
    ({"max_tokens": True}, 400, "max_tokens", "invalid_value"),
    ({"max_completion_tokens": "5"}, 400, "max_completion_tokens", "invalid_value"),
    ({"seed": 2**64}, 400, "seed", "invalid_value"),
    ({"stop": ["a"] * 5}, 400, "stop", "invalid_value"),
    ({"stop": ""}, 400, "stop", "invalid_value"),
    ({"stop": {"a": "b"}}, 400, "stop", "invalid_value"),
    ({"stop": "\udfff"}, 400, "stop", "invalid_value"),
    ({"stream": 1}, 400, "stream", "invalid_value"),
    ({"stream_options": {}}, 400, "stream_options", "invalid_value"),
    ({"stream": True, "stream_options": []}, 400, "stream_options", "invalid_value"),
    ({"n": 2}, 400, "n", "unsupported_parameter"),
    ({"n": True}, 400, "n", "unsupported_parameter"),
    ({"logprobs": True}, 400, "logprobs", "unsupported_parameter"),
    ({"tools": [{}]}, 400, "tools", "unsupported_parameter"),
    ({"tool_choice": "required"}, 400, "tool_choice", "unsupported_parameter"),
    ({"response_format": {"type": "grammar"}}, 400, "response_format.type", "invalid_value"),
    ({"response_format": "json"}, 400, "response_format", "invalid_value"),
    ({"response_format": {}}, 400, "response_format.type", "invalid_value"),
    (
        {"response_format": {"type": "json_schema"}},
        400,
        "response_format.json_schema",
        "invalid_value",
    ),
    (
        {"response_format": {"type": "json_schema", "json_schema": {"schema": []}}},
        400,
        "response_format.json_schema.schema",
        "invalid_value",
    ),
    ({"frequency_penalty": 0.5}, 400, "frequency_penalty", "unsupported_parameter"),
    ({"modalities": ["text", "audio"]}, 400, "modalities", "unsupported_parameter"),
]


@pytest.mark.parametrize(("fields", "status", "param", "code"), REFUSED)
def test_what_is_refused_names_the_field(fields, status, param, code):
    error = refusal(**fields)
    assert (error.status, error.param, error.code) == (status, param, code)
    told = error.json()["error"]
    assert set(told) == {"message", "type", "param", "code"}
    assert told["message"].startswith(f"{param}: ") and "\n" not in told["message"]


@pytest.mark.parametrize(
    "url",
    [
        "http://127.0.0.1:1/x.png",
        "https://example.com/x.png",
        "file:///etc/passwd",
        "/etc/passwd",
        "assets/tiny/clip/config.json",
        "data:text/plain;base64,aGk=",
        "data:image/png",
        "data:image/png;base64",
        "",
        "//example.com/x.png",
        "data:;base64,aGk=",
        "data:audio/wav;base64,aGk=",
        "DATA:" + " " * 5000 + "image/png;base64,aGk=",
        "x data:image/png;base64,aGk=",
    ],
)
def test_only_pictures_themselves_are_taken(url):
    error = refusal({"messages": user({"type": "image_url", "image_url": {"url": url}})})
    assert (error.status, error.code) == (400, "invalid_image_url")


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"\xff{}",
        b"[]",
        b"1",
        b'"x"',
        b"null",
        b'{"messages": NaN}',
        b'{"top_p": -Infinity}',
        b"[" * 100_000,
        b'{"a":' * 100_000,
        b'{"seed": ' + b"9" * 5000 + b"}",
        "{}".encode("utf-16"),
        b"\xef\xbb\xbf{}",
        b"{} {}",
    ],
)
def test_what_is_no_json_object_is_refused(body):
    with pytest.raises(ApiError) as raised:
        parse_request(body, "tiny")
    assert (raised.value.status, raised.value.code) == (400, "invalid_json")


def test_a_number_that_overflows_is_no_temperature():
    with pytest.raises(ApiError) as raised:
        parse_request(
            b'{"messages": [{"role": "user", "content": "x"}], "temperature": 1e999}', "tiny"
        )
    assert raised.value.param == "temperature"


@pytest.mark.parametrize("value", [b"[],", b"{},", b"1,"])
def test_a_body_of_very_many_values_is_not_even_read(value, monkeypatch):
    monkeypatch.setattr(json, "loads", lambda *_, **__: pytest.fail("it was read"))
    with pytest.raises(ApiError) as raised:
        parse_request(b'{"user": [' + value * 1_000_000 + b"1]}", "tiny")
    assert (raised.value.status, raised.value.code) == (413, "too_large")


# -- properties -----------------------------------------------------------------------------------

JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text()
    | st.sampled_from([2**70, -1, 0, 1, 1e300, "\ud800", "user", "text", "data:image/png;base64,"]),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=8,
)
PARTS = st.fixed_dictionaries(
    {},
    optional={
        "type": st.sampled_from(["text", "image_url", "input_audio"]) | JSON,
        "text": st.text() | JSON,
        "image_url": JSON
        | st.fixed_dictionaries(
            {
                "url": st.just(picture(png())["image_url"]["url"])
                | st.text().map("data:image/png;base64,".__add__)
                | JSON
            }
        ),
        "input_audio": JSON
        | st.fixed_dictionaries(
            {
                "data": st.text() | st.just("UklGRg=="),
                "format": st.sampled_from(["wav", "mp3", "x"]),
            }
        ),
    },
)
MESSAGES = st.lists(
    JSON
    | st.fixed_dictionaries(
        {
            "role": st.sampled_from(["user", "assistant", "system", "developer", "tool"]),
            "content": st.text() | st.lists(PARTS, max_size=3) | JSON,
        }
    ),
    max_size=4,
)
FIELDS = (
    "model",
    "temperature",
    "top_p",
    "top_k",
    "repetition_penalty",
    "no_repeat_ngram_size",
    "seed",
    "max_tokens",
    "max_completion_tokens",
    "stop",
    "stream",
    "stream_options",
    "n",
    "tools",
    "logprobs",
    "logit_bias",
    "response_format",
    "modalities",
    "user",
    "metadata",
)
REQUESTS = st.fixed_dictionaries(
    {"messages": MESSAGES | st.just(ASK)},
    optional={name: JSON | st.sampled_from([None, True, 0, 1]) for name in FIELDS},
)


def assert_sound_or_refused(body: bytes) -> None:
    try:
        request = parse_request(body, "tiny", SMALL)
    except ApiError as error:
        assert error.status in (400, 404, 413)
        told = json.loads(json.dumps(error.json()))["error"]
        assert set(told) == {"message", "type", "param", "code"}
        assert told["type"] == "invalid_request_error" and told["message"] and told["code"]
        told["message"].encode()
        return
    assert 1 <= request.max_new_tokens <= SMALL.new_tokens
    assert request.seed is None or 0 <= request.seed < 2**64
    messages = request.conversation(lambda sound: "spoken")
    assert messages[-1].role == "user"
    roles = [message.role for message in messages]
    assert all(a != b for a, b in zip(roles, roles[1:])) and "system" not in roles[1:]
    named = [p.value for m in messages for p in m.parts if p.kind == "image"]
    assert named == list(request.pictures)
    "".join(p.value for m in messages for p in m.parts).encode()


@settings(max_examples=200)
@given(JSON)
def test_any_json_is_sound_or_refused(value):
    assert_sound_or_refused(json.dumps(value).encode())


@settings(max_examples=500)
@given(REQUESTS)
@example({"messages": user(sound())})
@example({"messages": user(picture(png()), TEXT)})
def test_anything_that_resembles_a_request_is_sound_or_refused(value):
    assert_sound_or_refused(json.dumps(value).encode())


@settings(max_examples=200)
@given(st.binary(max_size=50))
def test_any_bytes_are_refused(body):
    assert_sound_or_refused(body)


def test_the_limits_fit_in_a_body():
    """A picture of the largest size can be sent: base64 makes 4 bytes of 3."""
    assert Limits().picture_bytes * 4 / 3 < Limits().body_bytes == 32 * MIB
    assert Sound("x", b"secret") and "secret" not in repr(Sound("x", b"secret"))


def test_a_short_question_is_read_before_long_ones_that_came_earlier():
    """Long bodies have turns of their own: reading one takes a while."""
    begun, go_on = threading.Event(), threading.Event()

    async def order() -> list[str]:
        read: list[str] = []

        def reading(body: bytes) -> None:
            if len(body) > guards.SMALL:
                begun.set()
                go_on.wait(60)
            read.append(chr(body[0]))

        api = Api(runs.assistant())
        long = [
            asyncio.create_task(api.reading(b"l" * (guards.SMALL + 1), reading)) for _ in "1234"
        ]
        await asyncio.to_thread(begun.wait, 60)
        await api.reading(b"s", reading)
        go_on.set()
        await asyncio.gather(*long)
        return read

    assert asyncio.run(order()) == ["s", "l", "l", "l", "l"]


def test_a_number_of_very_many_digits_is_refused_in_words_for_the_client():
    with pytest.raises(ApiError, match="a number of 4,000 digits") as refused:
        parse_request(b'{"seed": ' + b"9" * 4000 + b"}", "tiny")
    assert "sys." not in str(refused.value)
