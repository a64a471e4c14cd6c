"""What the server counts, and its page in Prometheus' text form (version 0.0.4)."""

from __future__ import annotations

import threading
import time
from bisect import bisect_left
from collections import Counter, deque
from collections.abc import Iterator, Mapping

from api.places import KINDS, Places
from system import memory

MEDIA_TYPE = "text/plain; version=0.0.4; charset=utf-8"
SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
WINDOW = 60.0  # seconds that the rate of tokens looks back on


class Histogram:
    """How many observations were at most each bound, all of them, and their sum."""

    def __init__(self, bounds: tuple[float, ...] = SECONDS) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.sum = 0.0

    def observe(self, value: float) -> None:
        self.counts[bisect_left(self.bounds, value)] += 1
        self.sum += value

    def samples(self) -> Iterator[tuple[str, float]]:
        """(what follows the name, value), bounds first."""
        total = 0
        for bound, count in zip((*self.bounds, "+Inf"), self.counts, strict=True):
            total += count
            yield f'_bucket{{le="{bound}"}}', total
        yield "_sum", self.sum
        yield "_count", total


class Measures:
    """Counters of one server. They are changed in the event loop's thread only."""

    def __init__(self, places: Places) -> None:
        self.places = places
        self.requests: Counter[tuple[str, int]] = Counter()
        """by route and status; a client that went away before its status counts as 499"""
        self.errors: Counter[str] = Counter()
        """by the code that the client is told; "client_gone" for one that left"""
        self.first_token = Histogram()
        self.whole_request = Histogram()
        self._tokens: deque[tuple[float, int]] = deque()
        self._started = time.time()

    @property
    def in_flight(self) -> int:
        return self.places.in_flight

    def generated(self, tokens: int) -> None:
        """An answer of so many tokens has ended."""
        self._tokens.append((time.monotonic(), tokens))
        self._forget()

    def tokens_per_second(self) -> float:
        """Of the answers that ended in the last minute, over that minute."""
        self._forget()
        return sum(tokens for _, tokens in self._tokens) / WINDOW

    def _forget(self) -> None:
        while self._tokens and self._tokens[0][0] < time.monotonic() - WINDOW:
            self._tokens.popleft()

    def page(self, statistics: Mapping[str, float]) -> str:
        """The page, with the assistant's own `statistics`."""
        return "".join((*self._of_requests(statistics), *of_assistant(statistics), *of_process()))

    def _of_requests(self, statistics: Mapping[str, float]) -> Iterator[str]:
        requests = {
            f'{{route="{route}",status="{status}"}}': count
            for (route, status), count in sorted(self.requests.items())
        }
        errors = {f'{{kind="{kind}"}}': count for kind, count in sorted(self.errors.items())}
        yield family("requests_total", "counter", "Requests by route and status.", requests)
        yield family("errors_total", "counter", "Requests that were not answered, by kind.", errors)
        text = "Requests taken in and not yet ended."
        yield gauge("requests_in_flight", text, self.in_flight)
        taken = {f'{{kind="{kind}"}}': self.places.taken[kind] for kind in KINDS}
        yield family("places_taken", "gauge", f"{text[:-1]}, by what they wait for.", taken)
        yield gauge("queue_depth", "Answers that wait for a place.", statistics["waiting"])
        yield gauge("answers_running", "Answers being decoded together.", statistics["running"])
        for name, histogram, text in (
            (
                "time_to_first_token",
                self.first_token,
                "From a request's arrival to its first text.",
            ),
            ("request", self.whole_request, "From a request's arrival to its answer's end."),
        ):
            yield family(f"{name}_seconds", "histogram", text, dict(histogram.samples()))
        text = "Tokens of the answers that ended in the last 60 s, a second."
        yield gauge("tokens_per_second", text, self.tokens_per_second())
        text = "When the server began, since 1970."
        yield gauge("process_start_time_seconds", text, self._started)


def of_assistant(statistics: Mapping[str, float]) -> Iterator[str]:
    for name, text in (("tokens_generated", "answers"), ("prompt_tokens", "questions")):
        yield family(f"{name}_total", "counter", f"Tokens of {text}.", {"": statistics[name]})
    for event in ("hits", "misses"):
        counts = {
            f'{{cache="{cache}"}}': statistics[f"{cache}_cache_{event}"]
            for cache in ("feature", "answer")
        }
        text = f"Look-ups in a cache that were {event}."
        yield family(f"cache_{event}_total", "counter", text, counts)
    text = "Tokens of questions whose keys and values were known from before."
    reused = {"": statistics["prefix_cache_hits"]}
    yield family("prefix_tokens_reused_total", "counter", text, reused)
    held = {
        f'{{cache="{cache}"}}': statistics[f"{cache}_cache_bytes"]
        for cache in ("feature", "prefix")
    }
    yield family("cache_bytes", "gauge", "Memory that a cache holds.", held)
    sizes = {
        '{what="held"}': statistics["kv_bytes"],
        '{what="reserved"}': statistics["kv_bytes_reserved"],
    }
    text = "Keys and values of the answers being read and decoded, now and at most."
    yield family("kv_bytes", "gauge", text, sizes)


def of_process() -> Iterator[str]:
    yield gauge("process_resident_memory_bytes", "Memory of the process.", memory.resident())
    import torch  # where a model answers it is loaded already

    if torch.cuda.is_available():
        text = "Memory of tensors on the GPU."
        yield gauge("device_memory_bytes", text, torch.cuda.memory_allocated())
    yield gauge("process_threads", "Threads of the process.", threading.active_count())


def family(name: str, kind: str, text: str, samples: Mapping[str, float]) -> str:
    """The lines of one measure; `samples` by what follows its name."""
    full = name if name.startswith("process_") else f"phisight_{name}"
    lines = [f"# HELP {full} {text}\n# TYPE {full} {kind}\n"]
    return "".join(lines + [f"{full}{after} {value:.10g}\n" for after, value in samples.items()])


def gauge(name: str, text: str, value: float) -> str:
    return family(name, "gauge", text, {"": value})
