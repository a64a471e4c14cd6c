"""The server over a real assistant: asked by the openai client, and by clients that misbehave."""

from __future__ import annotations

import base64
import json
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator

import openai
import pytest
import runs
from live_server import (
    Live,
    ask,
    assistant_of,
    endless,
    get,
    live,
    parsed_response,
    post,
    wait_until,
    with_pictures,
)

from api.api import AT_ONCE
from api.forms import Limits
from api.guards import SMALL
from assistant.filter import WordFilter
from assistant.sampling import Sampling
from data.dataset import Message, Part
from errors import PhiSightError

KEY = "a key, with spaces"
DESCRIBE = "Describe the picture in detail."
LIMITS = Limits(body_bytes=200_000, picture_bytes=100_000, body_seconds=0.5, new_tokens=600)


def listen(data: bytes, cancelled: Callable[[], bool], fits: Callable[[str], bool]) -> str:
    """Stands for Whisper, which has tests of its own: a recording says what its bytes spell."""
    if not data:
        raise PhiSightError("recording: no speech heard; speak up")
    return data.decode()


@pytest.fixture(scope="module")
def server() -> Iterator[Live]:
    assistant = assistant_of(cache=True)
    with live(assistant, limits=LIMITS, listen=listen) as running:
        yield running
    assistant.close()


@pytest.fixture(scope="module")
def client(server) -> openai.OpenAI:
    return server.client()


@pytest.fixture(scope="module")
def pictures() -> list[bytes]:
    return [path.read_bytes() for path in sorted((runs.world() / "images").glob("*.png"))[:3]]


def answer(*messages: Message, **settings: object) -> str:
    """What the assistant says without a server."""
    return "".join(runs.assistant().reply(messages, **settings))


def user(text: str) -> Message:
    return Message("user", (Part("text", text),))


def say(client: openai.OpenAI, text: str = DESCRIBE, **settings: object) -> str:
    return (
        client.chat.completions.create(model="tiny", messages=ask(text)["messages"], **settings)
        .choices[0]
        .message.content
    )


def stops(assistant: object) -> bool:
    """Whether nothing is being decoded, waited for or read."""
    counts = assistant.statistics()
    threads = [thread.name for thread in threading.enumerate()]
    return counts["running"] == counts["waiting"] == 0 and "question" not in threads


# -- what the openai client gets ------------------------------------------------------------------


def test_a_question_is_answered_as_without_a_server(client):
    reply = runs.assistant().reply([user(DESCRIBE)])
    expected = "".join(reply)
    completion = client.chat.completions.create(model="tiny", messages=ask(DESCRIBE)["messages"])
    (choice,) = completion.choices
    assert (choice.message.role, choice.message.content) == ("assistant", expected)
    assert choice.finish_reason == "stop" and completion.model == "tiny"
    usage = completion.usage
    assert (usage.prompt_tokens, usage.completion_tokens, usage.total_tokens) == (
        reply.prompt_tokens,
        reply.completion_tokens,
        reply.prompt_tokens + reply.completion_tokens,
    )


def test_a_stream_is_the_same_in_pieces(client):
    chunks = list(
        client.chat.completions.create(
            model="tiny",
            messages=ask(DESCRIBE)["messages"],
            stream=True,
            max_tokens=100,
            stream_options={"include_usage": True},
        )
    )
    pieces = [chunk.choices[0].delta.content for chunk in chunks if chunk.choices]
    assert "".join(filter(None, pieces)) == answer(user(DESCRIBE)) and len(pieces) > 5
    assert len({chunk.id for chunk in chunks}) == 1
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-2].choices[0].finish_reason == "stop"
    assert chunks[-1].choices == [] and chunks[-1].usage.completion_tokens > 5
    assert all(chunk.usage is None for chunk in chunks[:-1])


def test_usage_is_streamed_only_when_asked_for(client):
    chunks = client.chat.completions.create(model="tiny", messages=ask()["messages"], stream=True)
    assert all(chunk.usage is None and chunk.choices for chunk in chunks)


def test_pictures_and_turns_arrive_in_order(client, pictures):
    messages = [
        *with_pictures("What colour is it?", pictures[0]),
        {"role": "assistant", "content": "red"},
        *with_pictures("Which has a star?", pictures[1], pictures[2]),
    ]
    said = client.chat.completions.create(model="tiny", messages=messages)
    expected = answer(
        Message("user", (Part("image", "a"), Part("text", "What colour is it?"))),
        Message("assistant", (Part("text", "red"),)),
        Message(
            "user", (Part("image", "b"), Part("image", "c"), Part("text", "Which has a star?"))
        ),
        pictures=dict(zip("abc", pictures)),
    )
    assert said.choices[0].message.content == expected


def test_a_system_message_is_rendered_as_phi_does(client):
    prompt = [{"role": "system", "content": "Be brief."}, *ask(DESCRIBE)["messages"]]
    said = client.chat.completions.create(model="tiny", messages=prompt)
    expected = answer(Message("system", (Part("text", "Be brief."),)), user(DESCRIBE))
    assert said.choices[0].message.content == expected
    assert said.usage.prompt_tokens > runs.assistant().reply([user(DESCRIBE)]).prompt_tokens + 2


def test_stop_strings_end_an_answer_before_them(client):
    whole = say(client)
    mark = whole[10:14]
    completion = client.chat.completions.create(
        model="tiny", messages=ask(DESCRIBE)["messages"], stop=[mark, "never said"]
    )
    assert completion.choices[0].message.content == whole[: whole.index(mark)]
    assert completion.choices[0].finish_reason == "stop"


@pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens"])
def test_an_answer_can_be_limited(client, name):
    completion = client.chat.completions.create(
        model="tiny", messages=ask(DESCRIBE)["messages"], **{name: 3}
    )
    assert completion.choices[0].finish_reason == "length"
    assert completion.usage.completion_tokens == 3


def test_sampling_is_what_was_asked_for(client):
    drawn = [say(client, temperature=2, seed=seed) for seed in (1, 1, 2, -5)]
    assert drawn[0] == drawn[1] and len(set(drawn)) == 3
    assert drawn[0] == answer(user(DESCRIBE), sampling=Sampling(2), seed=1)
    assert say(client, temperature=2, seed=3, top_p=0) == say(client)
    assert say(client, temperature=2, seed=3, extra_body={"top_k": 1}) == say(client)


def test_speech_is_written_down_where_it_stands(client):
    def spoken(data: bytes) -> list:
        sound = {"data": base64.b64encode(data).decode(), "format": "wav"}
        return [{"role": "user", "content": [{"type": "input_audio", "input_audio": sound}]}]

    said = client.chat.completions.create(model="tiny", messages=spoken(DESCRIBE.encode()))
    assert said.choices[0].message.content == answer(user(DESCRIBE))
    with pytest.raises(openai.BadRequestError, match="no speech heard") as raised:
        client.chat.completions.create(model="tiny", messages=spoken(b""))
    assert (raised.value.code, raised.value.param) == (
        "invalid_audio",
        "messages[0].content[0].input_audio",
    )


def test_the_models_are_listed(client):
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").object == "model"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt-4")


@pytest.mark.parametrize(("settings", "error", "code"), [
    ({"model": "gpt-4"}, openai.NotFoundError, "model_not_found"),
    ({"tools": [{"type": "function", "function": {"name": "f"}}]}, openai.BadRequestError,
     "unsupported_parameter"),
    ({"n": 2}, openai.BadRequestError, "unsupported_parameter"),
    ({"messages": [{"role": "user", "content": "word " * 3000}]}, openai.BadRequestError,
     "context_length_exceeded"),
    ({"messages": with_pictures("x", b"no picture")}, openai.BadRequestError, "invalid_value"),
    ({"messages": with_pictures("x", bytes(100_001))}, openai.APIStatusError, "too_large"),
])  # fmt: skip
def test_what_is_refused_is_the_clients_own_exception(client, settings, error, code):
    with pytest.raises(error) as raised:
        client.chat.completions.create(
            **{"model": "tiny", "messages": ask()["messages"]} | settings
        )
    assert raised.value.code == code and raised.value.type == "invalid_request_error"


def test_too_long_a_conversation_is_told_in_the_words_that_programs_look_for(client):
    with pytest.raises(openai.BadRequestError) as raised:
        say(client, "word " * 3000)
    assert (raised.value.code, raised.value.param) == ("context_length_exceeded", "messages")
    told = raised.value.message
    found = re.search(r"maximum context length is (\d+) tokens, .* has (\d+); shorten it$", told)
    assert found, told
    assert int(found[1]) == runs.assistant().context_tokens < 3000 < int(found[2])


def test_as_many_pictures_are_taken_as_the_context_has_room_for(client, pictures):
    shared = runs.assistant()
    each, context = shared.parts.chat_format.tokens_per_image, shared.context_tokens
    many = with_pictures("Which is the largest?", *[pictures[0]] * 17)
    said = client.chat.completions.create(model="tiny", messages=many, max_tokens=1)
    assert said.usage.prompt_tokens > 17 * each
    small = b"not looked at: they are counted first"
    too_many = with_pictures("x", *[small] * (context // each + 1))
    with pytest.raises(openai.BadRequestError, match=f"maximum context length is {context} ") as no:
        client.chat.completions.create(model="tiny", messages=too_many)
    assert (no.value.code, no.value.param) == ("context_length_exceeded", "messages")


def test_what_the_client_got_can_be_sent_back(client):
    first = client.chat.completions.create(model="tiny", messages=ask(DESCRIBE)["messages"])
    got = first.choices[0].message
    expected = answer(user(DESCRIBE), Message("assistant", (Part("text", got.content),)),
                      user("What is it?"))  # fmt: skip
    for turn in (got, got.model_dump(), got.to_dict() | {"name": "tiny", "annotations": []}):
        messages = [*ask(DESCRIBE)["messages"], turn, *ask("What is it?")["messages"]]
        again = client.chat.completions.create(model="tiny", messages=messages)
        assert again.choices[0].message.content == expected


def test_a_broken_picture_is_named(client):
    with pytest.raises(openai.BadRequestError, match="not a picture") as raised:
        client.chat.completions.create(model="tiny", messages=with_pictures("x", b"no picture"))
    assert raised.value.param == "messages[0].content[0].image_url.url"


@pytest.mark.parametrize("url", ["file:///etc/passwd", "/etc/passwd", "http://127.0.0.1:9/x.png"])
def test_no_file_and_no_address_is_opened(client, url, monkeypatch):
    def forbidden(*arguments: object, **settings: object) -> None:
        raise AssertionError("a path was opened")

    monkeypatch.setattr("assistant.assistant.read_image_bytes", forbidden)
    content = [{"type": "image_url", "image_url": {"url": url}}]
    with pytest.raises(openai.BadRequestError, match="only data:image"):
        client.chat.completions.create(
            model="tiny", messages=[{"role": "user", "content": content}]
        )


def test_a_file_that_a_text_names_is_not_read(client, monkeypatch):
    monkeypatch.setattr(
        "assistant.assistant.read_image_bytes", lambda *_: pytest.fail("a path was opened")
    )
    assert say(client, "<image> /etc/passwd file:///etc/passwd")


# -- the key --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def locked() -> Iterator[Live]:
    async def page(scope, receive, send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"the app"})

    assistant = assistant_of()
    with live(assistant, key=KEY, rest=page) as running:
        yield running
    assistant.close()


def authorization(key: str, scheme: str = "Bearer") -> str:
    return f"Authorization: {scheme} {key}"


def basic(name: str, key: str) -> str:
    return authorization(base64.b64encode(f"{name}:{key}".encode()).decode(), "Basic")


def test_the_key_opens_everything(locked):
    assert say(locked.client(KEY)) and locked.client(KEY).models.list()
    for header in (authorization(KEY), basic("anybody", KEY), authorization(KEY, "bearer")):
        assert locked.exchange(get("/metrics", header))[0] == 200
        assert locked.exchange(get("/", header))[2].count(b"the app") == 1


def test_without_it_nothing_but_health_answers(locked):
    with pytest.raises(openai.AuthenticationError) as raised:
        say(locked.client("wrong"))
    assert (raised.value.code, raised.value.type) == ("invalid_api_key", "authentication_error")
    assert locked.exchange(get("/health"))[0] == 200
    wrong = [
        (),
        (authorization(""),),
        (authorization(KEY[:-1]),),
        (authorization(KEY + "x"),),
        (basic("x", "y"),),
        ("Authorization: Basic %",),
        (f"Authorization: {KEY}",),
        (authorization(KEY), authorization("wrong")),
    ]
    for headers in wrong:
        for request in (
            get("/v1/models", *headers),
            get("/metrics", *headers),
            get("/", *headers),
            get("/docs", *headers),
            post(ask(), *headers),
            get("/gradio_api/file=/etc/passwd", *headers),
            get("/health/", *headers),
            get("//health", *headers),
        ):
            status, found, body = locked.exchange(request)
            assert status == 401 and found["www-authenticate"], request
            assert json.loads(body)["error"]["code"] == "invalid_api_key"


def test_browsers_are_told_to_ask_for_it_where_people_go(locked):
    assert locked.exchange(get("/"))[1]["www-authenticate"].startswith("Basic")
    assert locked.exchange(get("/v1/models"))[1]["www-authenticate"] == "Bearer"


# -- requests that are not right ------------------------------------------------------------------


@pytest.mark.parametrize(("request_", "status", "code"), [
    (get("/"), 404, "not_found"), (get("/v1/nothing"), 404, "not_found"),
    (get("/docs"), 404, "not_found"), (get("/gradio_api/file=/etc/passwd"), 404, "not_found"),
    (get("/v1/chat/completions"), 405, "method_not_allowed"),
    (get("/metrics", "Content-Length: 0", method="POST"), 405, "method_not_allowed"),
    (post(b"{"), 400, "invalid_json"), (post(b"[" * 50_000), 400, "invalid_json"),
    (post(ask(), "Content-Type: text/plain"), 415, "unsupported_media_type"),
    (post(ask(), "Content-Encoding: gzip"), 415, "unsupported_media_type"),
    (post(bytes(200_001)), 413, "too_large"),
    (post(b"", length=10**15), 413, "too_large"),
    (post(b"%x\r\n" % 200_001 + bytes(200_001) + b"\r\n0\r\n\r\n", "Transfer-Encoding: chunked"),
     413, "too_large"),
    (post(b"{", length=5), 408, "request_timeout"),
])  # fmt: skip
def test_every_error_has_openais_form(server, request_, status, code):
    found, headers, body = server.exchange(request_)
    assert (found, headers["content-type"]) == (status, "application/json")
    error = json.loads(body)["error"]
    assert error["code"] == code and set(error) == {"message", "type", "param", "code"}
    if status == 405:
        assert headers["allow"] in ("GET", "POST")


def test_a_body_in_chunks_is_read(server):
    body = json.dumps(ask()).encode()
    chunked = b"".join(b"1\r\n%c\r\n" % byte for byte in body) + b"0\r\n\r\n"
    assert server.exchange(post(chunked, "Transfer-Encoding: chunked"))[0] == 200


def test_a_body_that_ends_early_does_no_harm(server):
    gone = server.api.measures.errors["client_gone"]
    server.send(post(b"{", length=500)).close()
    wait_until(lambda: server.api.measures.errors["client_gone"] == gone + 1)
    assert server.api.budget.held == server.api.measures.in_flight == 0
    assert server.exchange(get("/health"))[0] == 200


def test_bodies_under_way_have_a_common_limit(server, monkeypatch):
    budget = server.api.budget
    monkeypatch.setattr(budget, "held", budget.limit - 10)
    status, headers, _ = server.exchange(post(ask(user="x" * SMALL)))
    assert status == 503 and headers["retry-after"]
    wait_until(lambda: server.api.measures.in_flight == 0)
    assert budget.held == budget.limit - 10
    assert server.exchange(post(ask()))[0] == 200  # large ones do not keep out small ones


def test_what_fails_inside_is_a_500_that_tells_nothing(server, monkeypatch, caplog):
    def fail(*arguments: object) -> None:
        raise RuntimeError("the secret reason")

    monkeypatch.setattr(server.api.assistant, "start", fail)
    status, _, body = server.exchange(post(ask()))
    assert status == 500 and b"secret" not in body
    assert json.loads(body)["error"]["type"] == "server_error"
    assert "the secret reason" in caplog.text
    with pytest.raises(openai.InternalServerError):
        say(server.client())


def test_what_fails_in_a_stream_is_told_in_the_stream(server, client, monkeypatch):
    assistant = server.api.assistant
    ask_assistant = assistant.ask

    def breaks(*arguments: object):
        answer = ask_assistant(*arguments)
        pieces = broken(answer.text.push)
        next(pieces)
        monkeypatch.setattr(answer.text, "push", lambda token: pieces.send(token))
        return answer

    def broken(push: Callable[[int], str]) -> Iterator[str]:
        piece = ""
        while not piece:
            piece = push((yield piece))
        yield piece
        raise RuntimeError("the secret reason")

    monkeypatch.setattr(assistant, "ask", breaks)
    stream = client.chat.completions.create(
        model="tiny", messages=ask(DESCRIBE)["messages"], stream=True, max_tokens=99
    )
    with pytest.raises(openai.APIError, match="failed") as raised:
        list(stream)
    assert raised.value.code == "internal_error"
    assert server.exchange(get("/health"))[0] == 200


# -- the filter -----------------------------------------------------------------------------------


def test_what_is_blocked_is_neither_asked_nor_said(client):
    whole = say(client)
    word = whole.split()[3]
    assistant = assistant_of(content_filter=WordFilter([word]))
    with live(assistant) as server:
        with pytest.raises(openai.BadRequestError) as raised:
            say(server.client(), f"What is a {word.upper()}?")
        assert raised.value.code == "content_filter"
        messages = ask(DESCRIBE)["messages"]
        completion = server.client().chat.completions.create(model="tiny", messages=messages)
        (choice,) = completion.choices
        assert choice.finish_reason == "content_filter"
        assert choice.message.content == whole[: whole.index(word)]
        *chunks, last = server.client().chat.completions.create(
            model="tiny", messages=messages, stream=True
        )
        assert last.choices[0].finish_reason == "content_filter"
        streamed = "".join(chunk.choices[0].delta.content for chunk in chunks)
        assert streamed == choice.message.content
    assistant.close()


# -- clients that go away, and too many of them ---------------------------------------------------


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_away_stops_its_answer(stream):
    assistant = endless()
    with live(assistant, limits=LIMITS) as server:
        connection = server.send(post(ask(stream=stream, max_tokens=600, temperature=2, seed=1)))
        wait_until(lambda: assistant.statistics()["tokens_generated"] > 0)
        if stream:
            assert connection.recv(65536).startswith(b"HTTP/1.1 200")
        connection.close()
        wait_until(lambda: stops(assistant) and not server.api.measures.in_flight)
        assert 0 < assistant.statistics()["tokens_generated"] < 300
        _, _, page = server.exchange(get("/metrics"))
    assert b'phisight_errors_total{kind="client_gone"} 1\n' in page
    assistant.close()


def spoken(text: str) -> dict:
    """A question that is said."""
    sound = {"data": base64.b64encode(text.encode()).decode(), "format": "wav"}
    return {
        "messages": [{"role": "user", "content": [{"type": "input_audio", "input_audio": sound}]}]
    }


class LongListener:
    """Hears for as long as nobody says that it may end; what it heard to the end is in `heard`."""

    def __init__(self) -> None:
        self.begun, self.heard, self.go_on = 0, [], threading.Event()

    def __call__(
        self, data: bytes, cancelled: Callable[[], bool], fits: Callable[[str], bool]
    ) -> str:
        self.begun += 1
        while not self.go_on.wait(0.005):
            if cancelled():
                raise PhiSightError("recording: nobody waits for it any more")
        self.heard.append(data)
        return data.decode()


def test_who_has_gone_is_not_listened_to_whether_it_waits_or_is_heard():
    listener, assistant = LongListener(), assistant_of()
    with live(assistant, limits=LIMITS, listen=listener) as server:
        heard = [server.send(post(spoken("x"))) for _ in range(AT_ONCE["ears"])]
        wait_until(lambda: listener.begun == AT_ONCE["ears"])
        waiting = [server.send(post(spoken("x"))) for _ in range(2)]
        wait_until(lambda: server.api.places.taken["ears"] == AT_ONCE["ears"] + 2)
        for connection in waiting:
            connection.close()
        wait_until(lambda: server.api.measures.in_flight == AT_ONCE["ears"])
        for connection in heard:
            connection.close()
        wait_until(lambda: server.api.measures.in_flight == 0)
        wait_until(lambda: stops(assistant))  # no thread goes on with it either
        assert server.api.budget.held == 0 and listener.heard == []
        listener.go_on.set()
        assert server.exchange(post(spoken("What colour is the star?")))[0] == 200
        assert listener.heard == [b"What colour is the star?"]
        assert listener.begun == AT_ONCE["ears"] + 1
    assistant.close()


def test_those_who_wait_to_be_heard_or_seen_take_no_place_of_a_text_question(pictures, monkeypatch):
    listener, assistant = LongListener(), assistant_of()
    seen, start = threading.Event(), assistant.start

    def slowly(answer) -> None:
        assert not answer.pictures or seen.wait(60)
        start(answer)

    monkeypatch.setattr(assistant, "start", slowly)
    with live(assistant, limits=LIMITS, listen=listener, max_requests=3) as server:
        held = [server.send(post(spoken("x"))) for _ in range(3)]
        looked_at = {"messages": with_pictures("x", pictures[0])}
        held += [server.send(post(looked_at)) for _ in range(3)]
        taken = server.api.places.taken
        wait_until(lambda: taken["ears"] == taken["eyes"] == 3)
        assert say(server.client(), "What colour is the star?")
        for body, told in ((spoken("x"), "recordings wait"), (looked_at, "pictures wait")):
            status, headers, answered = server.exchange(post(body))
            assert status == 503 and headers["retry-after"] and told in answered.decode()
        page = server.exchange(get("/metrics"))[2]
        assert b'\nphisight_places_taken{kind="ears"} 3\n' in page
        assert b'\nphisight_places_taken{kind="text"} 0\n' in page
        for connection in held:
            connection.close()
        wait_until(lambda: server.api.measures.in_flight == 0)
        seen.set()
        wait_until(lambda: stops(assistant))
    assistant.close()


def test_a_reply_that_is_cancelled_says_not_one_token_more():
    """The server's part of "within a token" is that it cancels; this is the engine's."""
    assistant = endless()
    reply = assistant.reply([user("x")], 600)
    wait_until(lambda: reply.completion_tokens > 3)
    reply.cancel()
    said = reply.completion_tokens
    "".join(reply)
    assert reply.completion_tokens <= said + 1 and reply.finish_reason == "cancelled"
    assistant.close()


def test_no_thread_is_left_by_clients_that_came_and_went():
    assistant = endless(max_rows=2, queue_limit=30)
    with live(assistant, limits=LIMITS) as server:
        server.exchange(get("/metrics"))
        before = threading.active_count()
        connections = [
            server.send(post(ask(f"{n}", stream=n % 2 == 0, max_tokens=600))) for n in range(12)
        ]
        wait_until(lambda: server.api.measures.in_flight == 12)
        for connection in connections:
            connection.close()
        wait_until(lambda: stops(assistant) and not server.api.measures.in_flight)
        assert threading.active_count() <= before + 1  # the engine's own, started by the first
        assert server.api.running == set() and server.api.budget.held == 0
    assistant.close()


def test_a_full_queue_is_a_503_that_says_when_to_come_again():
    assistant = endless(max_rows=1, queue_limit=1)
    with live(assistant, limits=LIMITS) as server:
        held = [server.send(post(ask(max_tokens=600)))]
        wait_until(lambda: assistant.statistics()["running"] == 1)
        held.append(server.send(post(ask(max_tokens=600))))
        wait_until(lambda: assistant.statistics()["waiting"] == 1)
        with pytest.raises(openai.InternalServerError) as raised:
            say(server.client())
        assert raised.value.status_code == 503 and raised.value.code == "overloaded"
        assert raised.value.response.headers["retry-after"] == "1"
        _, _, page = server.exchange(get("/metrics"))
        assert b"\nphisight_queue_depth 1\n" in page
        for connection in held:
            connection.close()
        wait_until(lambda: stops(assistant))
    assistant.close()


def test_requests_beyond_the_limit_are_not_even_read():
    assistant = endless()
    with live(assistant, limits=LIMITS, max_requests=1) as server:
        with server.send(post(ask(max_tokens=600))):
            wait_until(lambda: assistant.statistics()["running"] == 1)
            status, headers, _ = server.exchange(post(b"not read"))
        assert status == 503 and headers["retry-after"] == "1"
    assistant.close()


def test_a_slow_reader_gets_everything(server):
    request = post(ask(DESCRIBE, stream=True))
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        connection.connect(server.address)
        connection.sendall(request)
        answered = b""
        while part := connection.recv(200):
            answered += part
            time.sleep(0.002)
    status, _, body = parsed_response(answered)
    assert status == 200 and body.count(b"data: [DONE]") == 1
    said = re.findall(rb'"delta": \{"content": ("(?:[^"\\]|\\.)*")\}', body)
    assert "".join(map(json.loads, said)) == answer(user(DESCRIBE))


def test_many_at_once_are_answered_as_alone(server):
    texts = [DESCRIBE, "What colour is the star?", "How many?", "x", "Is there a cross?"] * 4
    alone = {text: answer(user(text)) for text in set(texts)}
    found: list[str] = [""] * len(texts)

    def one(place: int) -> None:
        found[place] = say(server.client(), texts[place])

    threads = [threading.Thread(target=one, args=(n,)) for n in range(len(texts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [alone[text] for text in texts]


# -- the measures ---------------------------------------------------------------------------------

LINE = re.compile(r'[a-z_]+(\{[a-z]+="[^"\\\n]*"(,[a-z]+="[^"\\\n]*")*\})? [-+0-9.e]+\Z')


def measured(server: Live) -> dict[str, float]:
    status, headers, body = server.exchange(get("/metrics"))
    assert status == 200 and headers["content-type"].startswith("text/plain; version=0.0.4")
    found: dict[str, float] = {}
    described: set[str] = set()
    for line in body.decode().splitlines():
        if line.startswith("# TYPE "):
            described.add(line.split()[2])
        elif not line.startswith("#"):
            assert LINE.match(line), line
            name, value = line.rsplit(" ", 1)
            base = re.sub(r"(_bucket|_sum|_count)$", "", name.partition("{")[0])
            assert base in described or name.partition("{")[0] in described, line
            assert name not in found
            found[name] = float(value)
    return found


def test_the_measures_count_what_happens(server, client, pictures):
    server.exchange(get("/metrics"))
    before = measured(server)
    messages = with_pictures("Which is it?", pictures[0])
    for _ in range(2):  # the second is known: its picture and its answer
        first = client.chat.completions.create(model="tiny", messages=messages)
    with pytest.raises(openai.BadRequestError):
        say(client, n=3)
    server.exchange(get('/nothing/"at\nall'))
    after = measured(server)

    def grown(name: str) -> float:
        return after[f"phisight_{name}"] - before.get(f"phisight_{name}", 0)

    chat = 'route="/v1/chat/completions"'
    assert grown(f'requests_total{{{chat},status="200"}}') == 2
    assert grown(f'requests_total{{{chat},status="400"}}') == 1
    assert grown('requests_total{route="other",status="404"}') <= 1
    assert grown('errors_total{kind="unsupported_parameter"}') == 1
    assert grown('cache_hits_total{cache="feature"}') >= 1
    assert grown('cache_hits_total{cache="answer"}') == 1
    assert grown("tokens_generated_total") == first.usage.completion_tokens
    assert grown("time_to_first_token_seconds_count") == 2
    assert grown('time_to_first_token_seconds_bucket{le="+Inf"}') == 2
    assert grown("time_to_first_token_seconds_sum") > 0
    assert after["phisight_tokens_per_second"] > 0
    assert after["process_resident_memory_bytes"] > 50e6
    assert after["phisight_requests_in_flight"] == after["phisight_queue_depth"] == 0


# -- the end --------------------------------------------------------------------------------------


def test_a_shutdown_ends_answers_with_an_error_that_is_told():
    assistant = endless()
    with live(assistant, limits=LIMITS, grace=0.2) as server:
        stream = server.client().chat.completions.create(
            model="tiny", messages=ask()["messages"], stream=True, max_tokens=600
        )
        whole = server.send(post(ask(max_tokens=600)))
        wait_until(lambda: assistant.statistics()["running"] == 2)
        server.server.should_exit = True
        with pytest.raises(openai.APIError, match="shutting down"):
            list(stream)
        answered = b""
        while part := whole.recv(65536):
            answered += part
        status, headers, body = parsed_response(answered)
        assert status == 503 and headers["retry-after"]
        assert json.loads(body)["error"]["code"] == "shutting_down"
    assert stops(assistant)
    assistant.close()


def test_an_answer_may_end_before_the_server_does(server):
    assistant = assistant_of()
    with live(assistant, grace=60) as ending:
        connection = ending.send(post(ask(DESCRIBE)))
        wait_until(lambda: ending.api.measures.in_flight == 1)
        ending.server.should_exit = True
        answered = b""
        while part := connection.recv(65536):
            answered += part
    assert json.loads(parsed_response(answered)[2])["choices"][0]["finish_reason"] == "stop"
    assistant.close()
