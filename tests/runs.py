"""Small runs for the tests of the commands: one picture world and one finished run, made once.

Everything is computed from the assets as they are, so no test may know a size or an accuracy.
"""

from __future__ import annotations

import atexit
import functools
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import checkpoints
import config as configs
import train
from assistant.assistant import Assistant
from data.world import write_world

ROOT = Path(__file__).resolve().parent.parent
BASE, VISION = ROOT / "assets/tiny/phi3", ROOT / "assets/tiny/clip"

# Two epochs of a few steps each; the logging, evaluating and saving steps do not fall together.
RECIPE: dict[str, object] = {
    "base": BASE,
    "vision": VISION,
    "quantization": "nf4",
    "data_fraction": 0.4,
    "validation_fraction": 0.15,
    "row_tokens": configs.default_config("tiny").row_tokens,
    "batch_size": 1,
    "accumulation": 2,
    "epochs": 2,
    "learning_rate": 1e-3,
    "lora_dropout": 0.05,
    "gradient_checkpointing": "products",
    "evaluate_steps": 5,
    "evaluation_conversations": 4,
    "save_steps": 3,
    "keep_checkpoints": 2,
    "log_steps": 4,
    "threads": 1,
    "device": "cpu",
}
SHORT: dict[str, object] = {  # for what needs steps, but not many
    "data_fraction": 0.3,
    "accumulation": 1,
    "evaluate_steps": 0,
    "max_steps": 2,
    "gradient_checkpointing": "none",
}


@functools.cache
def shared() -> Path:
    """A folder of this process's tests, removed at the end."""
    folder = Path(tempfile.mkdtemp(prefix="phisight-tests-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


@functools.cache
def world() -> Path:
    """A small picture world: `train.json`, `held_out.jsonl`, `novel_pairs.jsonl`, `images/`."""
    folder = shared() / "world"
    write_world(folder, pictures=40, held_out=3, turns=3)
    return folder


def flags(run: Path, **fields: object) -> list[str]:
    """What to type after `train.py` for the recipe with some fields replaced."""
    values = (
        RECIPE
        | {
            "data": world() / "train.json",
            "images": world() / "images",
            "held_out_questions": world() / "held_out.jsonl",
            "novel_pair_questions": world() / "novel_pairs.jsonl",
            "features": shared() / "features",
            "run": run,
        }
        | fields
    )
    return [f"--{name.replace('_', '-')}={value}" for name, value in values.items()]


def start(run: Path, *more: str, **fields: object) -> int:
    """Train in this process."""
    return train.main([*flags(run, **fields), *more])


def resume(run: Path, *more: str) -> int:
    return train.main(["--resume", "--run", str(run), *more])


@functools.cache
def finished_run() -> Path:
    """The recipe, never interrupted. Tests only read it."""
    run = shared() / "finished"
    start(run)
    return run


@functools.cache
def stopped_run() -> Path:
    """A short run that stopped after its first step. Tests only read it, or copy it."""
    run = shared() / "stopped"
    start(run, "--stop-at-step=1", **SHORT)
    return run


def copy_of(run: Path, folder: Path) -> Path:
    return Path(shutil.copytree(run, folder / "run"))


def own_assistant() -> Assistant:
    """The finished run's, with nothing asked yet. Who makes it closes it, or who it is given to."""
    return Assistant.load(finished_run())


class Shared(Assistant):
    """One that the tests of a process share: who closes it would fail all that come after."""

    def close(self) -> None:
        raise AssertionError("a test closes the assistant of all tests; take `own_assistant`")


@functools.cache
def assistant() -> Assistant:
    """The finished run's, for all tests of this process. It remembers what others asked."""
    return Shared.load(finished_run())


def newest_step(run: Path) -> int:
    return checkpoints.resolve(run).step


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder and what is in it."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


# -- the commands as a person runs them -----------------------------------------------------------


def environment() -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}


def command(*arguments: object) -> subprocess.CompletedProcess:
    """`python ARGUMENTS` in the project's folder, until it ends."""
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def started(*arguments: object) -> subprocess.Popen:
    """`python ARGUMENTS` in the project's folder, left running; end it with `communicate`."""
    return subprocess.Popen(
        [sys.executable, *map(str, arguments)],
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_until(happened: Callable[[], bool], process: subprocess.Popen) -> None:
    """Poll while the process runs."""
    deadline = time.monotonic() + 120
    while not happened():
        if process.poll() is not None or time.monotonic() > deadline:
            process.kill()
            raise AssertionError(f"did not come to it: {process.communicate()}")
        time.sleep(0.01)


def assert_one_line_error(done: subprocess.CompletedProcess) -> str:
    """Exit code 2 and one line on stderr, which is returned."""
    assert done.returncode == 2, done
    lines = done.stderr.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), done.stderr
    return lines[0]
