"""The server under load: is every good request answered, and rightly, and does memory stay flat?

    python -m benchmarks.serve_load [--run runs/tiny] [--requests 200] [--clients 16] [--more 1000]

Starts `serve.py --no-cache` as a person does, asks every question alone, one after the other, and
keeps the answers. Then as many clients at once send the same questions, mixed with slow readers,
clients that go away in the middle, and bodies that are not requests: every good request has to get
the answer that it got alone. Then the good ones at once without the others, for the throughput
ratio, and more of the mixture, with the server's memory read as it goes. Exit code 1 if an answer
is missing or wrong.
"""

from __future__ import annotations

import base64
import contextlib
import http.client
import json
import os
import random
import signal
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from config import Parser, default_config
from data.dataset import load_questions
from errors import PhiSightError, run_main

ROOT = Path(__file__).resolve().parent.parent

# Of every twenty requests so many: read slowly, leave in the middle, send what is no request.
SLOW, GONE, BAD, TWENTY = 3, 3, 2, 20
BAD_BODIES = (
    b"",
    b"{",
    b"[" * 10_000,
    b"\xff\xfe",
    b'{"messages": 1}',
    b'{"messages": NaN}',
    b'{"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url":'
    b' "file:///etc/passwd"}}]}]}',
    b'{"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url":'
    b' "data:image/png;base64,aGVsbG8="}}]}]}',
    b'{"messages": [{"role": "user", "content": "x"}], "n": 3}',
)
PROMPTS = ("Describe the picture in detail.",)  # asked of every picture beside its questions


@dataclass
class Server:
    """A running serve.py."""

    process: subprocess.Popen
    address: tuple[str, int]

    def connect(self) -> http.client.HTTPConnection:
        return http.client.HTTPConnection(*self.address, timeout=300)

    def measures(self) -> dict[str, float]:
        connection = self.connect()
        connection.request("GET", "/metrics")
        lines = connection.getresponse().read().decode().splitlines()
        connection.close()
        return {
            name: float(value)
            for name, value in (line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
        }

    def resident_mb(self) -> float:
        return self.measures()["process_resident_memory_bytes"] / 2**20


@contextlib.contextmanager
def serving(run: Path, *flags: str) -> Iterator[Server]:
    """serve.py on a free port, ended by SIGTERM."""
    process = subprocess.Popen(
        [sys.executable, "serve.py", "--port", "0", "--run", str(run), *flags],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONUNBUFFERED": "1"},
    )
    assert process.stdout is not None  # it is a pipe
    try:
        line = process.stdout.readline()
        if "http://" not in line:
            raise PhiSightError(f"serve.py: did not start ({line.strip()}); see above")
        host, _, port = line.partition("http://")[2].partition("/")[0].rpartition(":")
        yield Server(process, (host, int(port)))
        process.send_signal(signal.SIGTERM)
        if code := process.wait(timeout=60):
            raise PhiSightError(f"serve.py: ended with exit code {code}; see above")
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


@dataclass(frozen=True)
class Job:
    """One request: what is sent, and how its client behaves."""

    body: bytes = field(repr=False)
    question: int
    """its number, -1 for a bad body"""
    manner: str = "good"
    stream: bool = False


def question_bodies(questions: Path, images: Path, count: int) -> list[dict[str, object]]:
    """Requests about pictures: the file's own questions, and a description of every picture."""
    asked = load_questions(questions)
    pairs = [(q.image, q.text) for q in asked]
    pairs += [
        (image, prompt) for image in dict.fromkeys(q.image for q in asked) for prompt in PROMPTS
    ]
    random.Random(0).shuffle(pairs)
    bodies = []
    for image, text in pairs[:count]:
        data = base64.b64encode((images / image).read_bytes()).decode()
        bodies.append(
            {
                "messages": [
                    {
                        "role": "user",
                        "content": [
                            {
                                "type": "image_url",
                                "image_url": {"url": f"data:image/png;base64,{data}"},
                            },
                            {"type": "text", "text": text},
                        ],
                    }
                ],
                "max_tokens": 100,
            }
        )
    return bodies


def mixture(bodies: Sequence[dict[str, object]], count: int, seed: int) -> list[Job]:
    """`count` requests: mostly good ones, in turn of `bodies`, half of them streamed."""
    chance = random.Random(seed)
    jobs = []
    for place in range(count):
        kind = place % TWENTY
        number = place % len(bodies)
        if kind < BAD:
            jobs.append(Job(chance.choice(BAD_BODIES), -1, "bad"))
            continue
        manner = "gone" if kind < BAD + GONE else "slow" if kind < BAD + GONE + SLOW else "good"
        stream = manner == "slow" or chance.random() < 0.5
        jobs.append(
            Job(json.dumps(bodies[number] | {"stream": stream}).encode(), number, manner, stream)
        )
    chance.shuffle(jobs)
    return jobs


# -- clients --------------------------------------------------------------------------------------


def ask(server: Server, job: Job) -> tuple[str, str | None]:
    """("answered", the text), ("refused", None), ("left", None) or ("failed", why)."""
    if job.manner == "gone":
        return leave(server, job)
    connection = server.connect()
    try:
        connection.connect()
        if job.manner == "slow":
            connection.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        while True:
            connection.request(
                "POST", "/v1/chat/completions", job.body, {"Content-Type": "application/json"}
            )
            response = connection.getresponse()
            if response.status != 503:
                break
            response.read()  # full: come again when it says
            time.sleep(float(response.headers["Retry-After"]))
        body = read(response, slowly=job.manner == "slow")
        if job.manner == "bad":
            good = response.status == 400 and set(json.loads(body)) == {"error"}
            return ("refused", None) if good else ("failed", f"bad body: {response.status}")
        if response.status != 200:
            return "failed", f"{response.status} {body[:200]!r}"
        return "answered", text_of(body, job.stream)
    except (OSError, http.client.HTTPException, ValueError) as error:
        return "failed", repr(error)
    finally:
        connection.close()


def read(response: http.client.HTTPResponse, slowly: bool) -> bytes:
    if not slowly:
        return response.read()
    body = b""
    while part := response.read(200):
        body += part
        time.sleep(0.005)
    return body


def text_of(body: bytes, stream: bool) -> str:
    if not stream:
        return json.loads(body)["choices"][0]["message"]["content"]
    events = [line.removeprefix(b"data: ") for line in body.split(b"\n\n") if line]
    if events[-1] != b"[DONE]":
        raise ValueError(f"a stream that did not end: {events[-1]!r}")
    chunks = [json.loads(event) for event in events[:-1]]
    return "".join(c["choices"][0]["delta"].get("content", "") for c in chunks)


def leave(server: Server, job: Job) -> tuple[str, str | None]:
    """Send a request, all or a part of it, and close the connection before the answer is there."""
    cut = len(job.body) if job.question % 3 else len(job.body) // 2
    with socket.create_connection(server.address, timeout=300) as connection:
        connection.sendall(
            b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\n"
            b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n"
            % len(job.body)
            + job.body[:cut]
        )
        time.sleep(0.01 * (job.question % 5))
    return "left", None


@dataclass
class Outcome:
    """What came of many requests."""

    counts: Counter[str]
    wrong: list[str]
    seconds: float

    def line(self) -> str:
        what = ", ".join(f"{count} {name}" for name, count in sorted(self.counts.items()))
        return f"{what} in {self.seconds:.1f} s"


def send_all(server: Server, jobs: Sequence[Job], clients: int, expected: Sequence[str]) -> Outcome:
    """Send every job by `clients` clients at once, and compare what is answered."""
    counts: Counter[str] = Counter()
    wrong: list[str] = []
    lock = threading.Lock()

    def one(job: Job) -> None:
        result, text = ask(server, job)
        with lock:
            if result == "answered" and text != expected[job.question]:
                result = "wrong"
                wrong.append(f"{text!r}, alone {expected[job.question]!r}")
            elif result == "failed":
                wrong.append(str(text))
            counts[f"{job.manner} {result}"] += 1

    began = time.perf_counter()
    with ThreadPoolExecutor(clients) as pool:
        list(pool.map(one, jobs))
    return Outcome(counts, wrong, time.perf_counter() - began)


def ask_alone(server: Server, bodies: Sequence[dict[str, object]]) -> tuple[list[str], float, int]:
    """The answers one after the other, the seconds they took, and their tokens."""
    began, before = time.perf_counter(), server.measures()["phisight_tokens_generated_total"]
    answers = []
    for number, body in enumerate(bodies):
        result, text = ask(server, Job(json.dumps(body).encode(), number))
        if result != "answered":
            raise PhiSightError(f"question {number}: {result} ({text}); see the server's log")
        answers.append(text or "")
    seconds = time.perf_counter() - began
    return answers, seconds, int(server.measures()["phisight_tokens_generated_total"] - before)


def measure_memory(
    server: Server,
    bodies: Sequence[dict[str, object]],
    count: int,
    clients: int,
    expected: Sequence[str],
) -> tuple[list[float], Outcome]:
    """Resident MB before and after every 50 requests of `count` more, and what came of them."""
    series, total = [server.resident_mb()], Outcome(Counter(), [], 0.0)
    jobs = mixture(bodies, count, seed=1)
    for start in range(0, count, 50):
        part = send_all(server, jobs[start : start + 50], clients, expected)
        total.counts += part.counts
        total.wrong += part.wrong
        total.seconds += part.seconds
        series.append(server.resident_mb())
    return series, total


@contextlib.contextmanager
def watched(server: Server) -> Iterator[list[float]]:
    """How many answers were decoded together, every 50 ms of the block."""
    seen: list[float] = []
    ended = threading.Event()

    def look() -> None:
        while not ended.wait(0.05):
            seen.append(server.measures()["phisight_answers_running"])

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield seen
    finally:
        ended.set()
        thread.join()


def main(arguments: list[str] | None = None) -> int:
    preset = default_config("tiny")
    parser = Parser(prog="serve_load.py", description=__doc__.splitlines()[0])
    parser.add_argument("--run", type=Path, default=Path(preset.run))
    parser.add_argument("--questions", type=Path, default=Path(preset.held_out_questions))
    parser.add_argument("--images", type=Path, default=Path(preset.images[0]))
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--more", type=int, default=1000, help="requests to watch memory over")
    parser.add_argument("--cache", action="store_true", help="serve with caches; no ratio then")
    options = parser.parse_args(arguments)
    bodies = question_bodies(options.questions, options.images, options.requests)
    flags = () if options.cache else ("--no-cache",)
    with serving(options.run, *flags, "--max-rows", str(options.clients)) as server:
        print(f"{options.requests} requests, {options.clients} clients, serve.py {' '.join(flags)}")
        expected, alone, tokens = ask_alone(server, bodies)
        print(
            f"one at a time: {len(bodies)} answered in {alone:.1f} s, "
            f"{len(bodies) / alone:.1f} requests/s, {tokens / alone:.0f} tokens/s"
        )
        mixed = send_all(
            server, mixture(bodies, options.requests, seed=0), options.clients, expected
        )
        print(f"mixed: {mixed.line()}")
        jobs = [Job(json.dumps(body).encode(), number) for number, body in enumerate(bodies)]
        with watched(server) as running:
            together = send_all(server, jobs, options.clients, expected)
        print(f"at once: {together.line()}, {len(jobs) / together.seconds:.1f} requests/s")
        if not options.cache:
            print(
                f"together: {alone / together.seconds:.2f} times the throughput of one at a time,"
                f" {tokens / together.seconds:.0f} tokens/s; {statistics.mean(running):.1f}"
                f" answers decoded at once, at most {max(running):.0f}"
            )
        series, more = measure_memory(server, bodies, options.more, options.clients, expected)
        print(f"more: {more.line()}")
        print(
            f"resident MB every 50 requests: {' '.join(f'{mb:.0f}' for mb in series)}; "
            f"start {series[0]:.1f}, end {series[-1]:.1f}"
        )
        measures = server.measures()
        print(
            f"threads {measures['process_threads']:.0f}, requests in flight "
            f"{measures['phisight_requests_in_flight']:.0f}"
        )
    wrong = mixed.wrong + together.wrong + more.wrong
    for text in wrong[:10]:
        print(f"wrong: {text}")
    print(f"{len(wrong)} good requests unanswered or wrongly answered")
    return 1 if wrong else 0


if __name__ == "__main__":
    run_main(main)
