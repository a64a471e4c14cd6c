"""One cell of the table of members: a base, an encoder and a projector, taken the whole way.

Each step is a process of its own, forked from one that has loaded all modules already and has done
nothing else. So a kill ends a real process, and a process begins at once.
"""

from __future__ import annotations

import contextlib
import io
import json
import multiprocessing
import os
import random
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

import threads  # noqa: F401 (before torch is loaded)

from tqdm import tqdm
from transformers.utils import logging

import checkpoints
import export
import infer
import train
from assistant.assistant import Assistant
from assistant.messages import user_message
from config import PROJECTORS
from data.world import world_fields, write_world
from errors import PhiSightError, run_main
from exports.measure import CERTIFICATE, with_language_model
from files import write_whole
from model.base import load_base
from ops.kernels.target import SWITCH
from tools.small.bases import BASES, write_base
from tools.small.encoders import KINDS, write_encoder
from tools.torture.deal import Recipe, draw_aim
from tools.torture.findings import differences, look_at
from tools.torture.kills import Aim, train_with_trap

ROOT = Path(__file__).resolve().parent.parent
RECIPE = Recipe(steps=20, pictures=24)
LONGEST = 3600.0  # seconds of one process, which takes a few on an idle machine
QUESTION, ANSWER_TOKENS = "Describe the picture in detail.", 8
TOLERANCE = {"loss": 1e-4, "equal": 100.0}
"""of a merge in float32: nats an answer token, percent of greedy answers"""
ENCODERS = tuple(kind for kind in KINDS if kind != "dinov2_with_registers")


@dataclass(frozen=True)
class Cell:
    """Which members are put together."""

    base: str
    encoder: str
    projector: str

    def __str__(self) -> str:
        return f"{self.base} x {self.encoder} x {self.projector}"


@dataclass
class Outcome:
    """What was seen of a cell. It is right where `problems` is empty."""

    cell: Cell
    problems: list[str] = field(default_factory=list)
    killed: str = ""
    """the aim of the kill, in the words of tools/torture/kills.py"""
    resumed_from: int = 0
    """step"""
    picture_tokens: int = 0
    loss: list[float] = field(default_factory=list)
    """nats an answer token: of the run, and of what was merged"""
    answer: str = ""
    seconds: float = 0.0


def all_cells() -> list[Cell]:
    return [Cell(b, e, p) for b in BASES for e in ENCODERS for p in PROJECTORS]


class Processes:
    """Starts a function in a process that is forked from one that has imported this module."""

    def __init__(self) -> None:
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload([__name__])
        own = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
        before = {name: os.environ.get(name) for name in own}
        os.environ.update(own)
        try:
            forkserver.ensure_running()  # it keeps the environment that it starts in
        finally:
            for name, value in before.items():
                if value is None:
                    del os.environ[name]
                else:
                    os.environ[name] = value

    def run(self, folder: Path, function: Callable[..., int | None], *arguments: Any) -> int:
        """`function(*arguments)` in `folder`, where process.log takes what it prints; its exit
        code. Raises `PhiSightError` if it does not end within `LONGEST`."""
        process = self._context.Process(target=begin, args=(folder, function, arguments))
        process.start()
        process.join(LONGEST)
        if process.exitcode is None:
            process.kill()
            process.join()
            raise PhiSightError(f"{folder}: no end within {LONGEST:g} s; see process.log there")
        return process.exitcode


def begin(folder: Path, function: Callable[..., int | None], arguments: Iterable[Any]) -> None:
    """What such a process does: all that it prints goes into the folder's log."""
    os.chdir(folder)
    tqdm.set_lock(threading.RLock())  # its own is one of the system's, which a kill leaves behind
    with open("process.log", "ab", buffering=0) as log:
        for stream in (1, 2):
            os.dup2(log.fileno(), stream)
    run_main(lambda: function(*arguments))


class Grid:
    """A folder with everything: the members, the picture world, and a folder for each cell."""

    def __init__(self, out: Path, seed: int = 0) -> None:
        self.out, self.seed = out.resolve(), seed
        self._processes = Processes()

    def prepare(self, cells: Iterable[Cell]) -> None:
        """Write the picture world, and the members of these cells that are not there."""
        logging.disable_progress_bar()  # of transformers' saving
        self.out.mkdir(parents=True, exist_ok=True)
        with contextlib.redirect_stdout(io.StringIO()):
            write_world(self.out / "world", pictures=RECIPE.pictures, held_out=1, turns=3)
        writers: tuple[tuple[str, Callable[..., Path], set[str]], ...] = (
            ("bases", write_base, {cell.base for cell in cells}),
            ("encoders", write_encoder, {cell.encoder for cell in cells}),
        )
        for room, write, names in writers:
            for name in sorted(names):
                folder, started = self.out / room / name, self.out / room / f"{name}.part"
                if not folder.exists():  # a name is given to what is whole
                    shutil.rmtree(started, ignore_errors=True)
                    write(name, started, self.seed)
                    started.rename(folder)

    def outcome(self, cell: Cell) -> Outcome:
        """What is known of a cell, after it is done if it was not. One that failed is done again;
        the folder of one that is right keeps its outcome alone."""
        folder = self.out / "cells" / f"{cell.base}.{cell.encoder}.{cell.projector}"
        kept = folder / "outcome.json"
        if kept.exists():
            known = json.loads(kept.read_text(encoding="utf-8"))
            return Outcome(**known | {"cell": Cell(**known["cell"])})
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        started, outcome = time.monotonic(), Outcome(cell)
        try:
            self._train(folder, outcome)
            self._export(folder, outcome)
        except PhiSightError as error:
            outcome.problems.append(str(error))
        outcome.seconds = round(time.monotonic() - started, 1)
        if not outcome.problems:
            shutil.rmtree(folder)
            folder.mkdir()
            write_whole(kept, (json.dumps(asdict(outcome), indent=1) + "\n").encode())
        return outcome

    def _train(self, folder: Path, outcome: Outcome) -> None:
        """One run that is left alone, and one that is killed and resumed: all equal to the bit."""
        flags = self.flags(outcome.cell)
        whole, killed = folder / "whole", folder / "killed"
        self._need(self._in(whole, train.main, flags), 0, whole)
        steps, save_steps = RECIPE.steps, RECIPE.save_steps
        # The second save waits for the first: after two there is a checkpoint to resume from.
        generator = random.Random(f"{self.seed}/{outcome.cell}")
        drawn = draw_aim("step", steps - 2 * save_steps, generator)
        aim = Aim(drawn.kind, drawn.place, drawn.number + 2 * save_steps)
        outcome.killed = str(aim)
        self._need(self._in(killed, train_with_trap, aim, flags), -signal.SIGKILL, killed)
        outcome.resumed_from = (
            look_at(killed / "run", None, outcome.problems, save_steps=save_steps) or 0
        )
        if not outcome.resumed_from:
            outcome.problems.append(f"{aim}: no checkpoint was there to resume from")
        self._need(self._in(killed, train.main, ["--resume", "--run=run"]), 0, killed)
        outcome.problems += differences(whole / "run", killed / "run")
        if (step := checkpoints.resolve(whole / "run").step) != steps:
            outcome.problems.append(f"the run ended at step {step}, not {steps}")

    def _export(self, folder: Path, outcome: Outcome) -> None:
        """Ask the resumed run, merge it within its certificate, and ask both the same."""
        killed = folder / "killed"
        picture = next(iter(sorted((self.out / "world/images").glob("held_out_*"))))
        self._need(self._in(killed, ask, picture), 0, killed)
        self._need(self._in(killed, merge_and_ask, picture), 0, killed)
        certificate = json.loads((killed / "merged" / CERTIFICATE).read_text(encoding="utf-8"))
        outcome.loss = [certificate["loss_before"], certificate["loss_after"]]
        if not certificate["within_tolerance"]:
            outcome.problems.append("the merge is past its certificate's tolerance")
        told = json.loads((killed / "answer.json").read_text(encoding="utf-8"))
        outcome.answer = told["answer"]
        if not told["tokens"]["answer"]:
            outcome.problems.append("the run answered nothing")
        told = json.loads((killed / "answers.json").read_text(encoding="utf-8"))
        outcome.picture_tokens = told["picture_tokens"]
        if told["run"] != told["merged"]:
            outcome.problems.append(f"merged it answers {told['merged']}, not {told['run']}")

    def _in(self, folder: Path, function: Callable[..., int | None], *arguments: Any) -> int:
        folder.mkdir(exist_ok=True)
        return self._processes.run(folder, function, *arguments)

    @staticmethod
    def _need(code: int, expected: int, folder: Path) -> None:
        if code != expected:
            lines = (folder / "process.log").read_text(errors="replace", encoding="utf-8")
            last = (lines.splitlines() or ["it printed nothing"])[-1]
            raise PhiSightError(f"{folder.name}: ended with {code}, not {expected}: {last}")

    def flags(self, cell: Cell) -> list[str]:
        """What is typed after `train.py`. Each run works in a folder of its own, so that all of a
        cell are given the same and end with the same config."""
        fields: Mapping[str, object] = {
            "run": "run",
            "base": self.out / "bases" / cell.base,
            "vision": self.out / "encoders" / cell.encoder,
            "projector": cell.projector,
            "projector_queries": 4,
            "base_cache": self.out / "cache",
            "features": self.out / "features",
            **world_fields(self.out / "world"),
            "quantization": "nf4",
            "lora_dropout": 0.1,
            "learning_rate": 3e-4,
            "max_steps": RECIPE.steps,
            "max_text_tokens": 512,
            "row_tokens": 0,
            "batch_size": 1,
            "validation_fraction": 0.2,
            "save_steps": RECIPE.save_steps,
            "log_steps": RECIPE.log_steps,
            "evaluate_steps": RECIPE.evaluate_steps,
            "evaluation_conversations": 4,
            "evaluation_samples": 0,
            "keep_best": "true",
            "threads": 1,
            "device": "cpu",
        }
        return [f"--{name.replace('_', '-')}={value}" for name, value in fields.items()]


def ask(picture: Path) -> int:
    """Ask `run` about a picture by infer.py, which prints into answer.json."""
    asked = ["--run=run", f"--image={picture}", f"--prompt={QUESTION}", "--json", "--device=cpu"]
    with open("answer.json", "w", encoding="utf-8") as said, contextlib.redirect_stdout(said):
        return infer.main([*asked, f"--max-new-tokens={ANSWER_TOKENS}"])


def merge_and_ask(picture: Path) -> int:
    """Merge `run` into `merged` by export.py, and ask both the same, by our own loader; the tokens
    of their answers go into answers.json.

    Without our kernels, which answer with rounded activations: between the flat scores of random
    weights that would decide which token comes next.
    """
    os.environ[SWITCH] = "off"
    merge = ["--merge", "--run=run", "--out=merged", "--dtype=float32", "--device=cpu"]
    merge += ["--greedy-answers=4", f"--max-loss-difference={TOLERANCE['loss']}"]
    export.main([*merge, f"--min-greedy-equal={TOLERANCE['equal']}"])
    of_run = Assistant.load("run", device="cpu")
    parts = of_run.parts
    language = load_base("merged", None, parts.base.compute_dtype, parts.device, "none")
    told: dict[str, Any] = {"picture_tokens": parts.chat_format.tokens_per_image}
    for name, one in (("run", of_run), ("merged", with_language_model(of_run, language))):
        answer = one.reply([user_message(QUESTION, [str(picture)])], ANSWER_TOKENS)
        answer.wait()
        told[name] = answer.tokens
        one.close()
    write_whole("answers.json", json.dumps(told).encode())
    return 0
