"""Whole processes: to the first token of an answer, and from a saved step over the next one.

The turns are taken by the process of benchmarks/run.py: each starts what a person would type, and
the reference, benchmarks/suite/plain_start.py. Nothing here imports torch.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from benchmarks import cold_start
from benchmarks.processes import Turn, command, seconds_of
from benchmarks.suite.material import Material


def question_of(material: Material) -> tuple[str, str]:
    """A question about a held-out picture, and the picture's file."""
    first = json.loads(material.questions.read_text(encoding="utf-8").splitlines()[0])
    return first["text"], str(material.world / "images" / first["image"])


def plain(material: Material, what: str, **more: str) -> list[str]:
    asked = {"what": what, "threads": material.threads, **more}
    return ["-m", "benchmarks.suite.plain_start", json.dumps(asked)]


def answer(material: Material) -> Turn:
    text, image = question_of(material)
    words = ["infer.py", "--run", str(material.run), "--image", image, "--prompt", text]
    return first_byte(words, material)


def plain_answer(material: Material) -> Turn:
    text, image = question_of(material)
    return first_byte(
        plain(material, "answer", folder=str(material.llava), text=text, image=image), material
    )


def first_byte(words: list[str], material: Material) -> Turn:
    """Seconds from the start of a process to the first byte that it prints, its answer's."""
    return lambda: {"seconds": cold_start.start(words, material.threads)[0]}


def resume(material: Material) -> Turn:
    """`train.py --resume` on a run after its first step, over the second, which it saves."""

    def turn() -> dict[str, float]:
        with tempfile.TemporaryDirectory() as name:
            run = shutil.copytree(material.run, Path(name) / "run")
            words = ("train.py", "--resume", "--run", run, "--stop-at-step", 2)
            return process_seconds(lambda: command(*words, threads=material.threads))

    return turn


def plain_resume(material: Material) -> Turn:
    """The plain loop, from its own checkpoint over a step, which it saves; its first start writes
    the checkpoint, and is the turn that warms up."""
    state = material.folder / "plain.pt"
    words = plain(
        material,
        "resume",
        base=material.fields(material.run)["base"],
        data=str(material.world / "train.json"),
        state=str(state),
    )
    return lambda: process_seconds(lambda: command(*words, threads=material.threads))


def process_seconds(start: Callable[[], object]) -> dict[str, float]:
    return {"seconds": seconds_of(start)}
