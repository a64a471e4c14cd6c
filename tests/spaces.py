"""Spaces for the tests: one exported, and started as a process that sees no other code of ours."""

from __future__ import annotations

import contextlib
import functools
import os
import subprocess
import sysconfig
import venv
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import runs

import export

# Notes what a process opens to write, makes or moves, and what of our checkout it reads.
WATCH = """
import os, sys
noted = os.open(os.environ["NOTED"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
CHECKOUT = os.environ["CHECKOUT"] + os.sep
PACKAGES = os.environ["PACKAGES"] + os.sep
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT
def note(kind, path):
    if isinstance(path, (str, bytes, os.PathLike)):
        os.write(noted, f"{kind} {os.path.abspath(os.fsdecode(path))}\\n".encode())
def hook(event, arguments):
    if event == "open":
        path, _, flags = arguments
        if isinstance(flags, int) and flags & WRITES:
            note("writes", path)
        elif isinstance(path, str) and path.startswith(CHECKOUT):
            if not path.startswith(PACKAGES):
                note("reads", path)
    elif event == "os.mkdir":
        note("writes", arguments[0])
    elif event in ("os.rename", "os.link", "os.symlink"):
        note("writes", arguments[1])
sys.addaudithook(hook)
"""


@functools.cache
def exported() -> Path:
    """What `--space DIR` writes of the finished run. Tests only read it, or copy it."""
    out = runs.shared() / "space"
    run = f"--run={runs.finished_run()}"
    assert export.main([f"--space={out}", run, "--greedy-answers=8"]) == 0
    return out


@functools.cache
def lonely_python() -> Path:
    """A Python that has the packages that are installed here, and not the path to our checkout that
    `make` puts beside them. What its processes write is noted in $NOTED."""
    folder = runs.shared() / "lonely"
    venv.create(folder, with_pip=False)
    packages = next(folder.glob("lib/python*/site-packages"))
    # Its own .pth files are not looked at: those are read in the folders of a Python alone.
    (packages / "packages.pth").write_text(sysconfig.get_path("purelib") + "\n")
    (packages / "sitecustomize.py").write_text(WATCH)
    return folder / "bin/python"


@dataclass
class Started:
    process: subprocess.Popen
    folder: Path
    noted: Path
    port: int

    def notes(self, kind: str) -> list[Path]:
        lines = self.noted.read_text().splitlines() if self.noted.exists() else []
        return [Path(line.partition(" ")[2]) for line in lines if line.startswith(f"{kind} ")]


def environment(noted: Path, **more: str) -> dict[str, str]:
    """Of a process in a Space: a home that nothing can be written to, whoever asks."""
    return {
        "PATH": os.environ["PATH"],
        "HOME": "/dev/null/home",
        "NOTED": str(noted),
        "CHECKOUT": str(runs.ROOT),
        "PACKAGES": sysconfig.get_path("purelib"),
        "HF_HUB_OFFLINE": "1",
        # What compiles here for half a minute is tested elsewhere.
        "PHISIGHT_KERNELS": "off",
        **more,
    }


@contextlib.contextmanager
def started(folder: Path, noted: Path, **more: str) -> Iterator[Started]:
    """`python app.py` in a Space's folder, until the block is left."""
    process = subprocess.Popen(
        [lonely_python(), "app.py"],
        cwd=folder,
        env=environment(noted, GRADIO_SERVER_PORT="0", **more),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        line = process.stdout.readline()
        assert line.startswith("PhiSight with "), line + process.communicate(timeout=60)[0]
        port = int(line.split("http://", 1)[1].split()[0].rpartition(":")[2])
        yield Started(process, folder, noted, port)
    finally:
        process.terminate()
        said, _ = process.communicate(timeout=60)
        more = [line for line in said.splitlines() if not line.startswith("loaded ")]
        assert process.returncode == 0 and not more, said
