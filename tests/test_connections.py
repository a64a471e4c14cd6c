"""Connections that are silent, slow, many, or say what two programs read differently."""

from __future__ import annotations

import contextlib
import json
import logging
import socket
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest
import runs
from hypothesis import given
from hypothesis import strategies as st
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
)

from api import logs
from api.connections import Patience, fault_of_head

SHORT = Patience(head_seconds=0.4, body_seconds=0.4, bytes_a_second=1e5, left_seconds=0.2)


@pytest.fixture(autouse=True)
def nothing_told():
    logs.forget()


@pytest.fixture(scope="module")
def impatient() -> Iterator[Live]:
    assistant = assistant_of()
    with live(assistant, patience=SHORT) as server:
        yield server
    assistant.close()


def all_of(connection: socket.socket) -> bytes:
    """What comes until the server closes."""
    answer = b""
    with contextlib.suppress(ConnectionResetError):
        while part := connection.recv(65536):
            answer += part
    return answer


# -- silence and slowness -------------------------------------------------------------------------


def test_who_says_nothing_is_closed(impatient):
    with impatient.send(b"") as connection:
        assert all_of(connection) == b""


@pytest.mark.parametrize("sent", [
    b"G", b"GET /health HTTP/1.1\r\n", b"GET /health HTTP/1.1\r\nHost: localhost\r\nA: b",
])  # fmt: skip
def test_half_a_head_is_a_408(impatient, sent):
    with impatient.send(sent) as connection:
        status, headers, body = parsed_response(all_of(connection))
    assert (status, headers["connection"]) == (408, "close")
    assert json.loads(body)["error"]["code"] == "request_timeout"


def trickled(server: Live, *parts: bytes, pause: float = 0.05) -> bytes:
    """What is answered to parts that come one by one, for as long as they are taken."""
    with server.send(b"") as connection:
        connection.settimeout(pause)
        answer = b""
        for part in parts:
            with contextlib.suppress(TimeoutError):
                try:
                    connection.sendall(part)
                    answer += connection.recv(65536)
                except OSError as error:
                    if isinstance(error, TimeoutError):
                        raise
                    return answer
        connection.settimeout(10)
        return answer + all_of(connection)


def test_a_head_that_comes_byte_by_byte_has_no_more_time(impatient):
    head = get("/health", "X: " + "x" * 200)
    answer = trickled(impatient, *(head[i : i + 1] for i in range(len(head))))
    assert parsed_response(answer)[0] == 408


@pytest.mark.parametrize(
    ("path", "status"), [(b"/v1/chat/completions", 408), (b"/health", 405), (b"/nowhere", 404)]
)
def test_a_body_that_comes_byte_by_byte_is_ended_wherever_it_goes(impatient, path, status):
    body = json.dumps(ask(user="x" * 400)).encode()
    request = (
        post(body).replace(b"/v1/chat/completions", path, 1).replace(b"Connection: close", b"A: b")
    )
    head, rest = request[: -len(body)], body
    began = time.monotonic()
    answer = trickled(impatient, head, *(rest[i : i + 1] for i in range(len(rest))))
    assert parsed_response(answer)[0] == status
    assert answer.count(b"HTTP/1.1 ") == 1 and time.monotonic() - began < 15
    wait_until(lambda: impatient.api.measures.in_flight == 0)


def test_a_body_that_is_slow_but_goes_on_is_read(impatient):
    body = json.dumps(ask(user="x" * 300_000)).encode()
    request = post(body)
    head = request[: -len(body)]
    pieces = [body[i : i + 20_000] for i in range(0, len(body), 20_000)]
    assert parsed_response(trickled(impatient, head, *pieces))[0] == 200


def test_what_comes_fast_buys_no_long_silence(impatient):
    body = json.dumps(ask(user="x" * 3_000_000)).encode()
    began = time.monotonic()
    with impatient.send(post(body)[:-10]) as connection:
        answer = all_of(connection)
    assert parsed_response(answer)[0] == 408 and time.monotonic() - began < 15


def test_a_second_request_of_a_connection_has_the_same_time(impatient):
    first = get("/health").replace(b"Connection: close\r\n", b"")
    with impatient.send(first) as connection:
        answer = b""
        while not answer.endswith(b'"ok"}'):
            answer += connection.recv(65536)
        connection.sendall(b"GET /hea")
        rest = all_of(connection)
    assert answer.startswith(b"HTTP/1.1 200") and parsed_response(rest)[0] == 408


def test_an_answer_may_take_longer_than_a_request(impatient):
    with impatient.send(post(ask("What is there?", stream=True, max_tokens=200))) as connection:
        assert all_of(connection).endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n")


# -- how many -------------------------------------------------------------------------------------


def test_silent_connections_make_room_for_those_that_ask(caplog):
    assistant = assistant_of()
    with live(assistant, patience=Patience(most=10)) as server:
        silent = [server.send(b"GET /" if n % 2 else b"") for n in range(40)]
        assert server.exchange(get("/health"))[0] == 200
        assert server.exchange(post(ask()))[0] == 200
        assert len(server.server.server_state.connections) <= 10
        for connection in silent:
            connection.close()
    assert len([r for r in caplog.records if "connections are open" in r.message]) == 1
    assistant.close()


def test_half_sent_questions_do_not_keep_out_whole_ones():
    assistant = assistant_of()
    with live(assistant) as server:
        half = [server.send(post(b'{"messages"', length=1000)) for _ in range(300)]
        wait_until(lambda: server.api.places.taken["arriving"] == 300)
        assert server.exchange(post(ask()))[0] == 200
        for connection in half:
            connection.close()
        wait_until(lambda: not server.api.measures.in_flight)
    assistant.close()


def test_another_protocol_is_answered_in_http_and_told_once(impatient, caplog):
    for protocol in ("websocket", "h2c", "websocket"):
        upgrade = ("Connection: upgrade, close", f"Upgrade: {protocol}")
        request = get("/health", *upgrade).replace(b"Connection: close\r\n", b"")
        assert impatient.exchange(request)[0] == 200
    told = [record.message for record in caplog.records]
    assert len(told) == 1 and "it is given HTTP" in told[0] and "install" not in told[0]


def test_when_all_are_busy_the_next_is_told_and_health_still_answers(caplog):
    assistant = endless()
    with live(assistant, grace=0, patience=Patience(most=4)) as server:
        held = [server.send(post(ask(f"{n}", stream=True, max_tokens=600))) for n in range(4)]
        wait_until(lambda: assistant.statistics()["running"] == 4)
        for _ in range(3):
            status, headers, body = server.exchange(get("/v1/models"))
            assert status == 503 and headers["retry-after"] == "1"
            assert json.loads(body)["error"]["code"] == "overloaded"
            assert server.exchange(get("/health"))[0] == 200
        for connection in held:
            connection.close()
        wait_until(lambda: not server.api.measures.in_flight)
        assert server.exchange(get("/v1/models"))[0] == 200
    assert len([r for r in caplog.records if "are refused" in r.message]) == 1
    assistant.close()


FEW_DESCRIPTORS = """
import resource, sys
resource.setrlimit(resource.RLIMIT_NOFILE, (int(sys.argv[1]),) * 2)
sys.argv = ["serve.py", "--port", "0", "--run", sys.argv[2]]
import serve
serve.main(sys.argv[1:])
"""


def test_few_descriptors_neither_end_health_nor_flood_the_log():
    process = subprocess.Popen(
        [sys.executable, "-c", FEW_DESCRIPTORS, "120", str(runs.finished_run())],
        cwd=runs.ROOT,
        env=runs.environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        line = process.stdout.readline()
        host, _, port = line.partition("http://")[2].partition("/")[0].partition(":")
        silent = [socket.create_connection((host, int(port)), timeout=30) for _ in range(200)]
        for _ in range(3):
            with socket.create_connection((host, int(port)), timeout=30) as connection:
                connection.sendall(get("/health"))
                assert parsed_response(all_of(connection))[0] == 200
        for connection in silent:
            connection.close()
    finally:
        process.terminate()
        errors = process.communicate(timeout=60)[1]
    assert process.returncode == 0 and "Traceback" not in errors
    assert len(errors.splitlines()) <= 3, errors


# -- what two programs read differently -----------------------------------------------------------

CHUNKED = "Transfer-Encoding: chunked"
HIDDEN = b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\n\r\n"


def raw(*lines: str, body: bytes = b"0\r\n\r\n", version: str = "1.1") -> bytes:
    head = [
        f"POST /v1/chat/completions HTTP/{version}",
        "Host: localhost",
        "Content-Type: application/json",
    ]
    return "\r\n".join([*head, *lines]).encode("latin-1") + b"\r\n\r\n" + body


SMUGGLED = {
    "both": raw("Content-Length: 5", CHUNKED),
    "both, the other way": raw(CHUNKED, "Content-Length: 5"),
    "both, in capitals": raw("CONTENT-LENGTH: 5", "TRANSFER-ENCODING: CHUNKED"),
    "two lengths": raw("Content-Length: 5", "Content-Length: 6"),
    "two equal lengths": raw("Content-Length: 5", "Content-Length: 5"),
    "lengths in a list": raw("Content-Length: 5, 6"),
    "equal lengths in a list": raw("Content-Length: 5, 5"),
    "a signed length": raw("Content-Length: +5"),
    "a negative length": raw("Content-Length: -5"),
    "a length in hexadecimal": raw("Content-Length: 0x5"),
    "chunked twice": raw(CHUNKED, CHUNKED),
    "chunked twice in one line": raw("Transfer-Encoding: chunked, chunked"),
    "another coding": raw("Transfer-Encoding: gzip, chunked"),
    "a coding that looks like it": raw("Transfer-Encoding: \x0bchunked"),
    "a space before the colon": raw("Transfer-Encoding : chunked", "Content-Length: 5"),
    "chunked in HTTP/1.0": raw(CHUNKED, version="1.0"),
    "a folded line": raw("X: a\r\n b", "Content-Length: 5"),
    "a folded coding": raw("Transfer-Encoding:\r\n chunked"),
    "a bare line feed": raw("X: a\nContent-Length: 5", CHUNKED),
    "a bare carriage return": raw("X: a\rContent-Length: 5", CHUNKED),
    "a NUL": raw("X: a\0b", "Content-Length: 5"),
    "two hosts": raw("Host: y", "Content-Length: 5"),
    "no size": raw(CHUNKED, body=b"\r\n0\r\n\r\n"),
    "a size that is none": raw(CHUNKED, body=b"zz\r\n0\r\n\r\n"),
    "a signed size": raw(CHUNKED, body=b"+5\r\nabcde\r\n0\r\n\r\n"),
    "a negative size": raw(CHUNKED, body=b"-1\r\n0\r\n\r\n"),
    "a size with a prefix": raw(CHUNKED, body=b"0x5\r\nabcde\r\n0\r\n\r\n"),
    "a size of thirty digits": raw(CHUNKED, body=b"f" * 30 + b"\r\n"),
    "a chunk longer than its size": raw(CHUNKED, body=b"2\r\nabcdef\r\n0\r\n\r\n"),
}  # fmt: skip


@pytest.mark.parametrize("name", SMUGGLED)
def test_what_could_hide_a_second_request_is_refused_and_closed(impatient, name):
    with impatient.send(SMUGGLED[name] + HIDDEN) as connection:
        answer = all_of(connection)
    status, headers, body = parsed_response(answer)
    assert (status, headers["connection"]) == (400, "close")
    assert json.loads(body)["error"]["type"] == "invalid_request_error"
    assert answer.count(b"HTTP/1.1 ") == 1 and b'"list"' not in answer
    wait_until(lambda: impatient.api.measures.in_flight == 0)


def test_two_requests_in_a_row_are_two_answers(impatient):
    first = get("/v1/models").replace(b"Connection: close\r\n", b"")
    with impatient.send(first + get("/health")) as connection:
        answer = all_of(connection)
    assert answer.count(b"HTTP/1.1 200") == 2
    with impatient.send(first + SMUGGLED["both"] + HIDDEN) as connection:
        answer = all_of(connection)
    assert answer.count(b"HTTP/1.1 200") == 1 and answer.count(b"HTTP/1.1 400") == 1


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["Content-Length", "content-length", "Transfer-Encoding", "X-A"]),
            st.sampled_from(["5", "chunked", "", "a b", "5,5"]),
            st.sampled_from(["\r\n", "\n", "\r\n ", "\r\n\t", "\r"]),
        ),
        max_size=4,
    )
)
def test_a_head_is_sound_exactly_when_its_length_is_given_once_in_whole_lines(lines):
    head = "POST / HTTP/1.1\r\nHost: localhost\r\n" + "".join(
        f"{n}: {v}{end}" for n, v, end in lines
    )
    framing = [name for name, _, _ in lines if name != "X-A"]
    listed = any(n.lower() == "content-length" and "," in value for n, value, _ in lines)
    sound = all(end == "\r\n" for _, _, end in lines) and len(framing) <= 1 and not listed
    assert (fault_of_head(f"{head}\r\n".encode()) is None) == sound


def test_refusals_are_told_once(impatient, caplog):
    for _ in range(20):
        impatient.exchange(SMUGGLED["a size that is none"])
    assert len(caplog.records) <= 1


def test_what_libraries_say_of_requests_is_told_once(impatient, capsys):
    """Those that have no handler: Python prints them, as python_multipart's of every bad form."""
    library = logging.getLogger("a.library")
    for _ in range(20):
        record = library.makeRecord(library.name, 30, "", 0, "Expected a dash", (), None)
        logging.lastResort.handle(record)
    assert len(capsys.readouterr().err.splitlines()) <= 1
    own = logging.getLogger("phisight.serving").makeRecord("phisight.x", 30, "", 0, "a", (), None)
    for _ in range(2):
        logging.lastResort.handle(own)
    assert capsys.readouterr().err == "a\na\n"
