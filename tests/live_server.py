"""A real server in a thread of the tests' process, and what tests send to it."""

from __future__ import annotations

import base64
import contextlib
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import openai
import runs

from api.api import Api
from api.connections import Patience
from api.server import Server, address_of, listening_socket
from assistant.assistant import Assistant


@dataclass
class Live:
    """A server that runs, and the assistant behind it."""

    api: Api
    url: str
    server: Server = field(repr=False)

    @property
    def address(self) -> tuple[str, int]:
        host, _, port = self.url.removeprefix("http://").partition(":")
        return host, int(port)

    def client(self, key: str = "unused") -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0, timeout=60)

    def send(self, request: bytes) -> socket.socket:
        """A connection over which `request` has gone out."""
        connection = socket.create_connection(self.address, timeout=60)
        connection.sendall(request)
        return connection

    def exchange(self, request: bytes) -> tuple[int, dict[str, str], bytes]:
        """Status, headers in lower case and body of the response to raw bytes."""
        with self.send(request) as connection:
            answer = b""
            while part := connection.recv(65536):
                answer += part
        return parsed_response(answer)


@contextlib.contextmanager
def live(
    assistant: Assistant,
    grace: float = 5.0,
    patience: Patience | None = None,
    **settings: object,
) -> Iterator[Live]:
    """A server over `assistant` on a free port, ended at the end of the block."""
    api = Api(assistant, name="tiny", **settings)
    with listening_socket("127.0.0.1", 0) as bound:
        bound.listen(64)
        server = Server(api, grace, api.busy, api.close, patience)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [bound]})
        thread.start()
        try:
            wait_until(lambda: server.started)
            yield Live(api, address_of(bound), server)
        finally:
            server.should_exit = True
            thread.join()


def assistant_of(**settings: object) -> Assistant:
    """Another assistant over the finished run's model, without a cache if not asked for one."""
    shared = runs.assistant()
    return Assistant(shared.parts, shared.config, shared.source, **{"cache": False} | settings)


def endless(**settings: object) -> Assistant:
    """One whose answers never stop by themselves, and take their time: a token of the tiny model
    takes a fraction of a millisecond."""
    assistant = assistant_of(**settings)
    engine = assistant.engine
    step = engine._step

    def unhurried() -> None:
        time.sleep(0.003)
        step()

    engine.stop_ids, engine._step = frozenset(), unhurried  # type: ignore[method-assign]
    return assistant


def wait_until(happened: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not happened():
        assert time.monotonic() < deadline, "did not come to it"
        time.sleep(0.005)


def post(body: bytes | object, *headers: str, length: int | None = None) -> bytes:
    """The bytes of a chat request that asks for the connection to be closed after it."""
    body = body if isinstance(body, bytes) else json.dumps(body).encode()
    lines = ["POST /v1/chat/completions HTTP/1.1", "Host: localhost", "Connection: close", *headers]
    if not any(line.lower().startswith("content-type") for line in headers):
        lines.append("Content-Type: application/json")
    if not any(line.lower().startswith("transfer-encoding") for line in headers):
        lines.append(f"Content-Length: {len(body) if length is None else length}")
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


def get(path: str, *headers: str, method: str = "GET") -> bytes:
    lines = [f"{method} {path} HTTP/1.1", "Host: localhost", "Connection: close", *headers]
    return "\r\n".join(lines).encode() + b"\r\n\r\n"


def parsed_response(answer: bytes) -> tuple[int, dict[str, str], bytes]:
    head, _, body = answer.partition(b"\r\n\r\n")
    status, *lines = head.decode("latin-1").split("\r\n")
    headers = {
        name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)
    }
    return int(status.split()[1]), headers, body


def ask(text: str = "What colour is the star?", **fields: object) -> dict[str, object]:
    return {"messages": [{"role": "user", "content": text}], **fields}


def data_url(picture: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(picture).decode()}"


def with_pictures(text: str, *pictures: bytes) -> list[dict[str, object]]:
    """The messages of one question about pictures."""
    parts = [{"type": "image_url", "image_url": {"url": data_url(data)}} for data in pictures]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}]
