"""`/v1/responses`, asked by the openai client's own methods, and by requests that are not right."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Iterator
from typing import Literal

import openai
import pytest
import runs
from hypothesis import given, settings
from hypothesis import strategies as st
from live_server import Live, assistant_of, data_url, endless, get, live, post
from pydantic import BaseModel, ConfigDict

from api.errors import ApiError
from api.forms import Limits
from api.responses_form import parse_responses
from api.silence import KEEP_ALIVE, kept_alive
from assistant.filter import WordFilter
from data.dataset import Message, Part

DESCRIBE = "Describe the picture in detail."


@pytest.fixture(scope="module")
def server() -> Iterator[Live]:
    assistant = assistant_of(cache=True)
    with live(assistant) as running:
        yield running
    assistant.close()


@pytest.fixture(scope="module")
def client(server) -> openai.OpenAI:
    return server.client()


@pytest.fixture(scope="module")
def picture() -> bytes:
    return next(iter(sorted((runs.world() / "images").glob("*.png")))).read_bytes()


def answer(*messages: Message, **settings: object) -> str:
    return "".join(runs.assistant().reply(messages, **settings))


def user(text: str) -> Message:
    return Message("user", (Part("text", text),))


def test_a_text_is_answered_as_without_a_server(client):
    reply = runs.assistant().reply([user(DESCRIBE)])
    expected = "".join(reply)
    response = client.responses.create(model="tiny", input=DESCRIBE)
    assert (response.output_text, response.status, response.error) == (expected, "completed", None)
    usage = response.usage
    assert (usage.input_tokens, usage.output_tokens) == (
        reply.prompt_tokens,
        reply.completion_tokens,
    )
    assert usage.total_tokens == usage.input_tokens + usage.output_tokens
    (item,) = response.output
    assert (item.role, item.status, item.content[0].annotations) == ("assistant", "completed", [])
    assert response.object == "response" and response.store is False


def test_instructions_pictures_and_turns_arrive_in_order(client, picture):
    first = client.responses.create(model="tiny", input=DESCRIBE, instructions="Be brief.")
    again = client.responses.create(
        model="tiny",
        instructions="Be brief.",
        input=[
            {"role": "user", "content": DESCRIBE},
            *[item.model_dump() for item in first.output],
            {
                "type": "message",
                "role": "user",
                "content": [
                    {"type": "input_image", "image_url": data_url(picture), "detail": "auto"},
                    {"type": "input_text", "text": "And here?"},
                ],
            },
        ],
    )
    assert again.output_text == answer(
        Message("system", (Part("text", "Be brief."),)),
        user(DESCRIBE),
        Message("assistant", (Part("text", first.output_text),)),
        Message("user", (Part("image", "a"), Part("text", "And here?"))),
        pictures={"a": picture},
    )
    assert again.instructions == "Be brief."


def test_a_stream_tells_its_events_in_order(client):
    asked = "Tell what the picture shows, in detail."  # not remembered: it comes in pieces
    expected = answer(user(asked))
    with client.responses.stream(model="tiny", input=asked) as stream:
        events = list(stream)
        final = stream.get_final_response()
    kinds = [event.type for event in events]
    assert kinds[:4] == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
    ]
    assert set(kinds[4:-4]) == {"response.output_text.delta"} and len(kinds) > 10
    assert kinds[-4:] == [
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.completed",
    ]
    raw = list(client.responses.create(model="tiny", input=asked, stream=True))
    assert [event.sequence_number for event in raw] == list(range(len(raw)))
    assert "".join(event.delta for event in raw if hasattr(event, "delta")) == expected
    assert final.output_text == expected and final.usage.output_tokens > 5


def test_one_that_is_cut_is_incomplete_whole_and_streamed(client):
    cut = client.responses.create(model="tiny", input=DESCRIBE, max_output_tokens=3)
    assert (cut.status, cut.incomplete_details.reason) == ("incomplete", "max_output_tokens")
    assert cut.usage.output_tokens == 3 and cut.output[0].status == "incomplete"
    *_, last = client.responses.create(
        model="tiny", input=DESCRIBE, max_output_tokens=3, stream=True
    )
    assert last.type == "response.incomplete" and last.response.output_text == cut.output_text


def test_one_that_is_filtered_is_incomplete():
    assistant = assistant_of(content_filter=WordFilter(["picture"]))
    with live(assistant) as server:
        response = server.client().responses.create(model="tiny", input="Describe it in detail.")
    assert response.incomplete_details.reason == "content_filter"
    assert "picture" not in response.output_text
    assistant.close()


class Sure(BaseModel):
    model_config = ConfigDict(extra="forbid")
    colour: Literal["red", "blue"]
    sure: bool


def test_the_clients_parse_gives_its_own_model(client):
    pytest.importorskip("llguidance", reason="the optional package llguidance is not installed")
    parsed = client.responses.parse(model="tiny", input=DESCRIBE, text_format=Sure)
    assert isinstance(parsed.output_parsed, Sure) and parsed.status == "completed"
    whole = client.responses.create(
        model="tiny", input=DESCRIBE, text={"format": {"type": "json_object"}}, max_output_tokens=20
    )
    assert whole.output_text.startswith("{")


def test_what_fails_in_a_stream_is_an_event_that_the_client_raises():
    assistant = endless()
    with live(assistant) as server:
        stream = server.client().responses.create(model="tiny", input=DESCRIBE, stream=True)
        with pytest.raises(openai.APIError, match="shutting down"):
            for event in stream:
                if event.type == "response.output_text.delta":
                    server.api.close()
    assistant.close()


PART = {"type": "input_image", "image_url": "https://example.com/x.png"}


@pytest.mark.parametrize(
    ("fields", "param", "code"),
    [
        ({"previous_response_id": "resp_1"}, "previous_response_id", "unsupported_parameter"),
        ({"conversation": "conv_1"}, "conversation", "unsupported_parameter"),
        ({"background": True}, "background", "unsupported_parameter"),
        ({"truncation": "auto"}, "truncation", "unsupported_parameter"),
        ({"tools": [{"type": "web_search"}]}, "tools", "unsupported_parameter"),
        ({"include": ["message.output_text.logprobs"]}, "include", "unsupported_parameter"),
        ({"input": None}, "input", "missing_required_parameter"),
        ({"input": []}, "input", "invalid_value"),
        ({"input": " "}, "input", "invalid_value"),
        ({"input": 1}, "input", "invalid_value"),
        ({"input": ["x"]}, "input[0]", "invalid_value"),
        ({"input": "\ud800"}, "input", "invalid_value"),
        ({"input": [{"type": "function_call_output"}]}, "input[0].type", "invalid_value"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input[0].type", "invalid_value"),
        ({"input": [{"role": "user"}]}, "input[0].content", "invalid_value"),
        (
            {"input": [{"role": "user", "content": [{"type": "input_file", "file_id": "x"}]}]},
            "input[0].content[0].type",
            "invalid_value",
        ),
        (
            {"input": [{"role": "user", "content": [PART]}]},
            "input[0].content[0].image_url",
            "invalid_image_url",
        ),
        (
            {"input": [{"role": "user", "content": [{"type": "input_image", "file_id": "x"}]}]},
            "input[0].content[0].file_id",
            "unsupported_parameter",
        ),
        ({"input": [{"role": "assistant", "content": "x"}]}, "input", "invalid_value"),
        ({"instructions": ["x"]}, "instructions", "invalid_value"),
        ({"max_output_tokens": 0}, "max_output_tokens", "invalid_value"),
        ({"temperature": 3}, "temperature", "invalid_value"),
        ({"text": {"format": {"type": "xml"}}}, "text.format.type", "invalid_value"),
        ({"text": {"format": {"type": "json_schema"}}}, "text.format.schema", "invalid_value"),
        ({"model": "gpt-4"}, "model", "model_not_found"),
    ],
)
def test_what_is_refused_names_the_field(fields, param, code):
    with pytest.raises(ApiError) as raised:
        parse_responses(json.dumps({"input": "x"} | fields).encode(), "tiny")
    assert (raised.value.param, raised.value.code) == (param, code)
    assert raised.value.message.startswith(param)


def test_each_field_has_its_own_remedy():
    for item, told in (
        ({"type": "x"}, "must be message"),
        ({"role": "user", "content": [{"type": "x"}]}, "must be input_text"),
    ):
        with pytest.raises(ApiError, match=told):
            parse_responses(json.dumps({"input": [item]}).encode(), "tiny")


def test_too_long_an_input_has_its_own_name(client):
    with pytest.raises(openai.BadRequestError, match="maximum context length") as raised:
        client.responses.create(model="tiny", input="word " * 3000)
    assert (raised.value.code, raised.value.param) == ("context_length_exceeded", "input")


def test_the_route_takes_posts_of_json_only(server):
    assert server.exchange(get("/v1/responses"))[0] == 405
    request = post(b"{}", "Content-Type: text/plain").replace(b"/chat/completions", b"/responses")
    assert server.exchange(request)[0] == 415


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5) | st.sampled_from(["user"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["type", "role", "content", "text", "image_url", "format", "x"]),
            inner | st.sampled_from(["user", "message", "input_text", "input_image"]),
            max_size=4,
        )
    ),
    max_leaves=10,
)


@settings(max_examples=300)
@given(JSON, JSON, JSON)
def test_anything_is_sound_or_refused(value, text, instructions):
    body = json.dumps({"input": value, "text": text, "instructions": instructions}).encode()
    try:
        request = parse_responses(body, "tiny", Limits(characters=100))
    except ApiError as error:
        assert error.status in (400, 404, 413) and error.param and error.code
        return
    assert request.turns[-1].role == "user"


# -- streams in which nothing is said -------------------------------------------------------------


def collected(events: AsyncIterator[str], seconds: float) -> list[str]:
    async def collect() -> list[str]:
        return [event async for event in kept_alive(events, seconds)]

    return asyncio.run(collect())


def test_silence_is_filled_with_comments_and_events_come_as_they_are():
    async def events() -> AsyncIterator[str]:
        yield "a"
        await asyncio.sleep(0.1)
        yield "b"
        yield "c"

    told = collected(events(), 0.02)
    assert [event for event in told if event != KEEP_ALIVE] == ["a", "b", "c"]
    between = told[1 : told.index("b")]
    assert between and set(between) == {KEEP_ALIVE}
    assert collected(events(), 60) == ["a", "b", "c"]


def test_who_leaves_a_silent_stream_ends_it_and_what_fails_is_raised():
    ended = []

    async def endless_silence() -> AsyncIterator[str]:
        try:
            await asyncio.sleep(3600)
            yield "never"
        finally:
            ended.append(True)

    async def leave() -> None:
        stream = kept_alive(endless_silence(), 0.001)
        assert await anext(stream) == KEEP_ALIVE
        await stream.aclose()

    asyncio.run(leave())
    assert ended == [True]

    async def failing() -> AsyncIterator[str]:
        yield "a"
        raise ValueError("the end")

    with pytest.raises(ValueError, match="the end"):
        collected(failing(), 60)


def test_a_stream_of_the_server_is_kept_alive_while_its_answer_waits(monkeypatch):
    """The only place is taken by an endless answer; the client that waits gets comments."""
    assistant = endless(max_rows=1)
    limits = Limits(silent_seconds=0.02, new_tokens=500)
    with live(assistant, limits=limits) as server:
        first = server.client().chat.completions.create(
            model="tiny", messages=[{"role": "user", "content": DESCRIBE}], stream=True
        )
        next(iter(first))
        question = {"messages": [{"role": "user", "content": "x"}], "stream": True}
        with server.send(post(question)) as connection:
            read = b""
            while read.count(KEEP_ALIVE.encode()) < 2:
                read += connection.recv(4096)
        first.close()
    assert b'"role": "assistant"' in read
    assistant.close()
