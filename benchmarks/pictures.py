"""What large and hostile pictures cost: memory of features, of questions, and the time of others.

    python -m benchmarks.pictures              # the trained tiny run; needs `make demo` once

Each row is measured in a process of its own, whose children that decode are counted apart.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from PIL import Image

import config as configs
from errors import PhiSightError, run_main

LARGE, MANY = (6000, 4000), 24  # a camera's pictures, one shard's part of them
SQUARE, AT_ONCE, ROUNDS = (8000, 8000), 4, 3
SCANS = 600
EVERY = 0.02  # seconds between two looks at the memory


def noise(size: tuple[int, int], seed: int) -> Image.Image:
    """A picture that is large as a file, too: noise in blocks of 4 x 4 pixels."""
    rng = np.random.default_rng(seed)
    blocks = rng.integers(0, 256, (size[1] // 4, size[0] // 4, 3), np.uint8)
    return Image.fromarray(blocks).resize(size, Image.Resampling.NEAREST)


def encoded(picture: Image.Image, kind: str, **settings: Any) -> bytes:
    buffer = BytesIO()
    picture.save(buffer, kind, **settings)
    return buffer.getvalue()


def many_scans(side: int, scans: int) -> bytes:
    """A progressive JPEG whose last scan stands there again and again: each costs as much as all
    of the pixels, and a few bytes."""
    data = encoded(Image.new("L", (side, side), 128), "JPEG", progressive=True)
    start, end = data.rindex(b"\xff\xda"), len(data) - 2
    return data[:end] + data[start:end] * scans + data[end:]


class Peaks:
    """The most memory in MB that this process, and the largest of its children, have held."""

    def __init__(self) -> None:
        self.own = self.child = 0.0
        self._ended = threading.Event()

    def __enter__(self) -> Peaks:
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def _watch(self) -> None:
        process = psutil.Process()
        while not self._ended.wait(EVERY):
            self.own = max(self.own, resident(process))
            for child in process.children():
                try:
                    self.child = max(self.child, resident(child))
                except psutil.NoSuchProcess:
                    continue


def resident(process: psutil.Process) -> float:
    return float(process.memory_info().rss) / 1e6


def features(run: str) -> dict[str, float]:
    """Features of `MANY` large JPEGs into an empty store."""
    from data.features import FeatureStore
    from model.vision import VisionTower, read_vision_spec

    config = configs.default_config("tiny")
    with tempfile.TemporaryDirectory() as folder:
        names = [f"{index}.jpg" for index in range(MANY)]
        for index, name in enumerate(names):
            (Path(folder) / name).write_bytes(encoded(noise(LARGE, index), "JPEG"))
        spec = read_vision_spec(config.vision, picture_fit=config.picture_fit)
        store = FeatureStore(Path(folder) / "store", spec.key, spec.shape, config.feature_storage)
        before, started = resident(psutil.Process()), time.perf_counter()
        with Peaks() as peaks:
            if bad := store.add(names, Path(folder), lambda: VisionTower(spec, "cpu")):
                raise PhiSightError(f"pictures were not read: {bad}")
        seconds = time.perf_counter() - started
    return {"before": before, "peak": peaks.own, "child": peaks.child, "seconds": seconds}


def questions(run: str) -> dict[str, float]:
    """`ROUNDS` of `AT_ONCE` questions about a huge PNG each, all at once."""
    from assistant.assistant import Assistant

    assistant = Assistant.load(run, cache=False)
    ask(assistant, encoded(noise((400, 400), 0), "PNG"))
    pictures = [encoded(noise(SQUARE, index), "PNG") for index in range(AT_ONCE)]
    before = resident(psutil.Process())
    with Peaks() as peaks:
        for _ in range(ROUNDS):
            threads = [threading.Thread(target=ask, args=(assistant, p)) for p in pictures]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
    after = resident(psutil.Process())
    assistant.close()
    return {"before": before, "peak": peaks.own, "child": peaks.child, "after": after}


def hostile(run: str) -> dict[str, float]:
    """A picture of `SCANS` scans is asked about; a moment later an ordinary one."""
    from assistant.assistant import Assistant

    assistant = Assistant.load(run, cache=False)
    ask(assistant, encoded(noise((400, 400), 0), "PNG"))
    seconds: dict[str, float] = {}
    scans = many_scans(SQUARE[0], SCANS)

    def refused() -> None:
        started = time.perf_counter()
        try:
            ask(assistant, scans)
        except PhiSightError:
            seconds["refused after"] = time.perf_counter() - started

    data = encoded(noise((400, 400), 1), "PNG")
    thread = threading.Thread(target=refused)
    thread.start()
    started = time.perf_counter()
    ask(assistant, data)
    seconds["ordinary answered after"] = time.perf_counter() - started
    thread.join()
    assistant.close()
    return seconds


def ask(assistant: Any, picture: bytes) -> None:
    from assistant.messages import user_message

    answer = assistant.ask([user_message("Where?", ["a"])], 2, pictures={"a": picture})
    assistant.start(answer)
    answer.wait()


ROWS: dict[str, Callable[[str], dict[str, float]]] = {
    f"features of {MANY} JPEGs of {LARGE[0]} x {LARGE[1]}": features,
    f"{ROUNDS} rounds of {AT_ONCE} PNGs of {SQUARE[0]} x {SQUARE[1]} at once": questions,
    f"a JPEG of {SCANS} scans beside an ordinary picture": hostile,
}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.pictures", description=__doc__.split("\n")[0])
    parser.add_argument("--run", default="runs/tiny", help="a trained run")
    parser.add_argument("--row", choices=list(ROWS), help="this row, here, as JSON")
    options = parser.parse_args(arguments)
    if options.row:
        print(json.dumps(ROWS[options.row](options.run)))
        return 0
    for row in ROWS:
        command = [sys.executable, "-m", "benchmarks.pictures", "--run", options.run, "--row", row]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        values = json.loads(done.stdout.splitlines()[-1])
        print(row + ": " + ", ".join(f"{name} {value:,.2f}" for name, value in values.items()))
    print("memory in MB; `child`: the largest process that decoded")
    return 0


if __name__ == "__main__":
    run_main(main)
