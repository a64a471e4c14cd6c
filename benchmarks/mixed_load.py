"""The server under a mixture of all that it takes: who waits, and is all given back afterwards?

    python -m benchmarks.mixed_load [--run runs/tiny] [--seconds 30]

Starts `serve.py --no-cache` and lets clients of each kind ask without a pause for a while: short
questions in text, streamed answers, prompts of 1,600 words, questions with one and with many
pictures, spoken questions, long recordings, and clients of every kind that leave in the middle.
Prints the longest wait of a short text question for its first token, the largest gap between two
pieces of a stream, what is in flight 2 s after all clients left, and the memory before and after.
Exit code 1 when one of them misses its target.
"""

from __future__ import annotations

import base64
import contextlib
import http.client
import io
import json
import random
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy
import soundfile

from benchmarks.serve_load import Server, serving
from config import Parser, default_config
from data.dataset import load_questions
from errors import PhiSightError, run_main
from speech.voice import Voice

PATH = "/v1/chat/completions"
FIRST_TOKEN, GROWTH = 0.5, 0.15  # targets: seconds, and a share of the memory
PAUSE_AFTER = 2.0  # seconds after the last client, in which all has to have ended
WORDS = 1600  # of a long prompt
RATE = 16_000  # of made-up sounds
Content = list[dict[str, object]]


@dataclass
class Seen:
    """What the clients saw, of all threads."""

    counts: Counter[str] = field(default_factory=Counter)
    waits: dict[str, list[float]] = field(default_factory=dict)
    """seconds to the first text, by kind of client"""
    gap: float = 0.0
    """the largest between two pieces of a stream"""
    strange: list[str] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)


# -- what is asked ---------------------------------------------------------------------------------


class Questions:
    """The content of a question of each kind, from the picture world's own."""

    def __init__(self, questions: Path, images: Path) -> None:
        asked = load_questions(questions)
        self.texts = [question.text for question in asked]
        self.images = [images / name for name in dict.fromkeys(q.image for q in asked)]
        self.spoken = [recording(text) for text in dict.fromkeys(self.texts[:200])][:8]
        self.long_sound = as_wav(
            numpy.concatenate([soundfile.read(io.BytesIO(wav))[0] for wav in self.spoken] * 4)
        )

    def text(self, chance: random.Random) -> Content:
        return [{"type": "text", "text": chance.choice(self.texts)}]

    def long(self, chance: random.Random) -> Content:
        words = [word for text in chance.choices(self.texts, k=WORDS) for word in text.split()]
        plain = [word for word in words if word.isalpha()]  # each of them is about one token
        return [{"type": "text", "text": " ".join(plain[:WORDS])}]

    def pictures(self, chance: random.Random, count: int) -> Content:
        shown = chance.sample(self.images, count)
        return [*map(picture, shown), *self.text(chance)]

    def speech(self, chance: random.Random) -> Content:
        return [sound(chance.choice(self.spoken))]

    def recording(self, chance: random.Random) -> Content:
        return [sound(self.long_sound)]


def recording(text: str) -> bytes:
    """A spoken question; where there is no voice, noise of its length."""
    try:
        return as_wav(*Voice.load().speak(text))
    except PhiSightError:
        noise = numpy.random.default_rng(len(text)).standard_normal(RATE * len(text) // 15)
        return as_wav(noise.astype(numpy.float32) / 10)


def as_wav(samples: numpy.ndarray, rate: int = RATE) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, samples, rate, format="WAV", subtype="PCM_16")
    return file.getvalue()


def picture(path: Path) -> dict[str, object]:
    data = base64.b64encode(path.read_bytes()).decode()
    return {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}"}}


def sound(wav: bytes) -> dict[str, object]:
    data = base64.b64encode(wav).decode()
    return {"type": "input_audio", "input_audio": {"data": data, "format": "wav"}}


# -- clients --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Kind:
    """Clients that ask one kind of question, one after the other."""

    name: str
    clients: int
    ask: Callable[[random.Random], Content]
    max_tokens: int = 100
    leaves: bool = False


def kinds(questions: Questions) -> list[Kind]:
    def any_kind(chance: random.Random) -> Content:
        asks = (questions.text, questions.long, questions.speech, questions.recording)
        return chance.choice([*asks, lambda c: questions.pictures(c, 8)])(chance)

    return [
        Kind("short", 2, questions.text, 20),
        Kind("stream", 1, questions.text),
        Kind("long", 6, questions.long, 40),
        Kind("picture", 2, lambda chance: questions.pictures(chance, 1)),
        Kind("pictures", 1, lambda chance: questions.pictures(chance, 12)),
        Kind("spoken", 1, questions.speech),
        Kind("recording", 1, questions.recording),
        Kind("leaving", 4, any_kind, leaves=True),
    ]


def read_stream(response: http.client.HTTPResponse, began: float) -> tuple[float | None, float]:
    """Seconds to the first text of a streamed answer, and the largest gap between two pieces."""
    first, last, gap = None, began, 0.0
    while line := response.readline():
        if not line.startswith(b"data: {"):
            continue
        event = json.loads(line[6:])
        if "error" in event:
            raise ValueError(f"an answer failed: {event['error']['message']}")
        if event["choices"][0]["delta"].get("content"):
            now = time.perf_counter()
            if first is None:
                first = now - began
            else:
                gap = max(gap, now - last)
            last = now
    return first, gap


def ask_once(server: Server, kind: Kind, chance: random.Random, seen: Seen) -> None:
    message = {"role": "user", "content": kind.ask(chance)}
    asked = {"messages": [message], "max_tokens": kind.max_tokens, "stream": True}
    body = json.dumps(asked).encode()
    if kind.leaves:
        leave(server, body, chance.random())
        with seen.lock:
            seen.counts["leaving left"] += 1
        return
    connection = server.connect()
    try:
        began = time.perf_counter()
        connection.request("POST", PATH, body, {"Content-Type": "application/json"})
        response = connection.getresponse()
        if response.status == 200:
            first, gap = read_stream(response, began)
            outcome = "answered"
        else:
            told = response.read()
            first, gap, outcome = (
                None,
                0.0,
                f"{response.status} {json.loads(told)['error']['code']}",
            )
            time.sleep(0.1)
    except (OSError, http.client.HTTPException, ValueError) as error:
        first, gap, outcome = None, 0.0, "failed"
        with seen.lock:
            seen.strange.append(f"{kind.name}: {error!r}")
    finally:
        connection.close()
    with seen.lock:
        seen.counts[f"{kind.name} {outcome}"] += 1
        seen.gap = max(seen.gap, gap)
        if first is not None:
            seen.waits.setdefault(kind.name, []).append(first)


def leave(server: Server, body: bytes, seconds: float) -> None:
    """Send a whole request, and close the connection a while later."""
    with contextlib.suppress(OSError), socket.create_connection(server.address) as connection:
        head = b"POST %b HTTP/1.1\r\nHost: %b:%d\r\nContent-Type: application/json\r\n" % (
            PATH.encode(),
            server.address[0].encode(),
            server.address[1],
        )
        connection.sendall(head + b"Content-Length: %d\r\n\r\n" % len(body) + body)
        time.sleep(seconds)


def load(server: Server, all_kinds: Sequence[Kind], seconds: float) -> Seen:
    """Have all clients ask for so long; what they saw."""
    seen, until = Seen(), time.perf_counter() + seconds

    def client(kind: Kind, number: int) -> None:
        chance = random.Random(f"{kind.name} {number}")
        while time.perf_counter() < until:
            ask_once(server, kind, chance, seen)

    clients = [
        threading.Thread(target=client, args=(kind, number))
        for kind in all_kinds
        for number in range(kind.clients)
    ]
    for thread in clients:
        thread.start()
    for thread in clients:
        thread.join()
    return seen


def report(seen: Seen, in_flight: float, before: float, after: float) -> list[str]:
    """Print the figures; the targets that were missed."""
    for outcome, count in sorted(seen.counts.items()):
        print(f"  {count:6} {outcome}")
    for name, waits in sorted(seen.waits.items()):
        waits.sort()
        half = waits[len(waits) // 2]
        print(f"first token, {name:9} median {half:.3f} s, longest {waits[-1]:.3f} s")
    print(f"largest gap of a stream {seen.gap:.3f} s")
    print(f"in flight {PAUSE_AFTER:g} s after all clients left: {in_flight:.0f}")
    print(f"resident MB before {before:.0f}, after {after:.0f} ({after / before - 1:+.0%})")
    longest = max(seen.waits.get("short", [float("inf")]))
    missed = []
    if longest > FIRST_TOKEN:
        missed.append(f"a short text question waited {longest:.3f} s, over {FIRST_TOKEN}")
    if in_flight:
        missed.append(f"{in_flight:.0f} requests are in flight although nobody waits")
    if after > before * (1 + GROWTH):
        missed.append(f"memory has grown by over {GROWTH:.0%}")
    return missed + seen.strange[:10]


def main(arguments: list[str] | None = None) -> int:
    preset = default_config("tiny")
    parser = Parser(prog="mixed_load.py", description=__doc__.splitlines()[0])
    parser.add_argument("--run", type=Path, default=Path(preset.run))
    parser.add_argument("--questions", type=Path, default=Path(preset.held_out_questions))
    parser.add_argument("--images", type=Path, default=Path(preset.images[0]))
    parser.add_argument("--seconds", type=float, default=30.0)
    parser.add_argument("--only", help="kinds of clients, by commas (all)")
    options = parser.parse_args(arguments)
    all_kinds = kinds(Questions(options.questions, options.images))
    if options.only:
        all_kinds = [kind for kind in all_kinds if kind.name in options.only.split(",")]
    with serving(options.run, "--no-cache") as server:
        load(server, all_kinds, 2.0)  # Whisper, the CLIP and the thread pools are loaded
        time.sleep(PAUSE_AFTER)
        before = server.resident_mb()
        seen = load(server, all_kinds, options.seconds)
        time.sleep(PAUSE_AFTER)
        measures = server.measures()
        after = measures["process_resident_memory_bytes"] / 2**20
        print(f"{options.seconds:g} s, {sum(kind.clients for kind in all_kinds)} clients")
        missed = report(seen, measures["phisight_requests_in_flight"], before, after)
    for reason in missed:
        print(f"missed: {reason}")
    return 1 if missed else 0


if __name__ == "__main__":
    run_main(main)
