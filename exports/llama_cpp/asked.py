"""What llama.cpp is asked about an exported model, in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy

from errors import PhiSightError, printable
from exports.llama_cpp.language import context_for
from paths import PROJECT

PYTHON = "PHISIGHT_LLAMA_PYTHON"  # in the environment: the interpreter that has llama-cpp-python
INSTALL = (
    "python -m tools.llama_cpp ../llama builds it in 5 to 40 minutes; then give --llama-python"
    " ../llama/bin/python"
)
AN_INTERPRETER = "give the file of an interpreter that has llama-cpp-python"
LONGEST_IMPORT = 120  # seconds; of a cold disk it takes a few


@dataclass(frozen=True)
class Conversation:
    """Token ids, with a run of the picture's id for every picture."""

    ids: Sequence[int]
    learnt: Sequence[bool]
    """whose log-probabilities are asked for"""
    pictures: Sequence[str] = ()
    """names, in the order of their runs"""


@dataclass(frozen=True)
class Asked:
    """All that one process is asked. Pictures are (height, width, 3) bytes by name."""

    model: Path
    mmproj: Path | None
    image_id: int
    pictures: Mapping[str, numpy.ndarray] = field(default_factory=dict)
    texts: Sequence[tuple[str, Sequence[int]]] = ()
    """texts with their marks, and the ids that they should have"""
    conversations: Sequence[Conversation] = ()
    questions: Sequence[Conversation] = ()
    """answered greedily"""
    longest: int = 96
    """tokens of an answer"""
    threads: int = 1

    @property
    def tokens(self) -> int:
        """Of the longest conversation, its answer among them."""
        every = [*self.conversations, *self.questions]
        return max((len(one.ids) for one in every), default=1) + self.longest


@dataclass(frozen=True)
class Told:
    """What llama.cpp said."""

    wrong_texts: list[int]
    """places of the texts that have other ids there"""
    log_probabilities: list[numpy.ndarray]
    """of every learnt token of each conversation, in nats"""
    answers: list[list[int]]
    """token ids, without the one that ended each"""
    embeddings: dict[str, numpy.ndarray]
    """(tokens, width) float32 of every picture"""
    version: str
    """of llama-cpp-python"""
    system: str
    """what llama.cpp says of the processor"""


def find_llama(python: str | None = None, modules: str = "llama_cpp") -> str | None:
    """The interpreter that has llama.cpp's bindings: `python`, or that of the environment, or this
    one if it has them; None if not. Raises `PhiSightError` when one was named and lacks them."""
    named = python or os.environ.get(PYTHON)
    what = f"--llama-python {python}" if python else f"{PYTHON}={named}"
    if named and (os.path.dirname(named) or os.path.isfile(named)):  # else it is a command's name
        named = os.path.abspath(named)  # it is started in another folder than this one
    try:
        found = subprocess.run(
            [named or sys.executable, "-c", f"import {modules}; print({modules}.__name__)"],
            text=True,
            errors="replace",
            capture_output=True,
            check=False,
            timeout=LONGEST_IMPORT,
        )
    except OSError as error:
        raise PhiSightError(f"{what}: {error.strerror}; {AN_INTERPRETER}") from error
    except subprocess.TimeoutExpired:
        raise PhiSightError(
            f"{what}: did not import {modules} within {LONGEST_IMPORT} s; {AN_INTERPRETER}"
        ) from None
    if found.returncode == 0 and found.stdout.split()[-1:] == [modules]:
        return named or sys.executable
    if named is None:
        return None
    if found.returncode == 0:
        raise PhiSightError(f"{what}: is not a Python interpreter; {AN_INTERPRETER}")
    raise PhiSightError(
        f"{what}: {reason_of(found)}; install {modules.replace('_cpp', '-cpp-python')} there"
    )


def reason_of(done: subprocess.CompletedProcess[str]) -> str:
    """What a program that failed said first, which is what was wrong, and last, which is what came
    of it; without where in our own code that was."""
    said = [line for line in done.stderr.splitlines() if line.strip()]
    said = [line for line in said if not line.startswith(("Traceback", " "))]
    lines = dict.fromkeys([*said[:1], *said[-1:]])
    return printable("; ".join(lines), 300) if said else f"exit code {done.returncode}"


def ask(python: str, asked: Asked) -> Told:
    """Start llama.cpp, ask everything, and read what it said. Raises `PhiSightError` where it does
    not load a file, or ends."""
    names = {name: str(number) for number, name in enumerate(asked.pictures)}
    with tempfile.TemporaryDirectory(prefix="phisight-") as folder:
        pixels, questions, answers = (
            Path(folder, name) for name in ("pixels.npz", "questions.json", "answers.npz")
        )
        shown: dict[str, Any] = {names[name]: data for name, data in asked.pictures.items()}
        content = {
            "model": str(asked.model),
            "mmproj": None if asked.mmproj is None else str(asked.mmproj),
            "pixels": str(pixels),
            "image_id": asked.image_id,
            "context": context_for(asked.tokens),
            "threads": asked.threads,
            "longest": asked.longest,
            "texts": [[text, [*ids]] for text, ids in asked.texts],
            "conversations": [
                [[*one.ids], [*one.learnt], [names[name] for name in one.pictures]]
                for one in asked.conversations
            ],
            "questions": [
                [[*one.ids], [names[name] for name in one.pictures]] for one in asked.questions
            ],
        }
        try:
            numpy.savez(pixels, allow_pickle=False, **shown)
            questions.write_text(json.dumps(content), encoding="utf-8", newline="\n")
        except OSError as error:
            raise PhiSightError(
                f"{folder}: not written ({error.strerror or error}); make room there, or name"
                " another folder with TMPDIR"
            ) from error
        run_llama(python, str(questions), str(answers))
        try:
            with numpy.load(answers, allow_pickle=False) as file:
                made = dict(file)
            return Told(
                made["wrong_texts"].tolist(),
                [made[f"conversation/{n}"] for n in range(len(asked.conversations))],
                [made[f"answer/{n}"].tolist() for n in range(len(asked.questions))],
                {name: made[f"embeddings/{key}"] for name, key in names.items() if asked.mmproj},
                str(made["version"]),
                str(made["system"]),
            )
        except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
            raise PhiSightError(
                f"llama.cpp: what it said cannot be read ({printable(error, 200)}); see that"
                f" {python} is the interpreter with llama-cpp-python"
            ) from None


def round_by_llama(python: str, source: Path, target: Path, kind: str) -> None:
    """A GGUF of float16 in one of llama.cpp's own forms, such as "Q4_K_M"."""
    run_llama(python, json.dumps({"quantise": str(source), "to": str(target), "as": kind}))


def run_llama(python: str, *arguments: str) -> None:
    """Run `reference.py` under `python`. Raises `PhiSightError` with what it said last."""
    done = subprocess.run(
        [python, "-m", "exports.llama_cpp.reference", *arguments],
        cwd=PROJECT,
        # Where llama.cpp ends itself it says why, and then lets a debugger write pages after it.
        env=os.environ | {"GGML_NO_BACKTRACE": "1"},
        text=True,
        errors="replace",
        capture_output=True,
        check=False,
    )
    if done.returncode:
        raise PhiSightError(
            f"llama.cpp: {reason_of(done)}; if its version is older than 0.3.36,"
            " install a newer llama-cpp-python"
        )
