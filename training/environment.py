"""What a training was started with: the command, the code, the packages, the machine, the settings.

Of the environment only variables are kept whose names are listed here, and none whose name says
that it is secret. What a package or a device is called is taken from what a checkpoint says.
"""

from __future__ import annotations

import os
import platform
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

import paths
from errors import printable
from reports.starts import add_start, kept_arguments
from system import processes
from training.options import RunOptions
from training.run import Run

# What changes how fast a step is or how it rounds, or where files are found.
KEPT = (
    *("OMP_", "GOMP_", "KMP_", "MKL_", "OPENBLAS_", "CUDA_", "CUBLAS_", "NCCL_", "NVIDIA_"),
    *("TORCH", "PYTORCH_", "TRITON_", "BNB_", "HF_HUB_OFFLINE", "HF_HOME"),
    *("MALLOC_", "LD_PRELOAD", "RANK", "LOCAL_RANK", "WORLD_SIZE", "PYTHONHASHSEED"),
)
SECRET = ("TOKEN", "KEY", "SECRET", "PASSWORD", "CREDENTIAL", "AUTH")
VALUE = 200  # characters of a value that are kept
GIT_SECONDS = 5.0


def record_start(run: Run, options: RunOptions) -> None:
    """Add this start to RUN/starts.jsonl, by the first process; nothing where the run is finished.
    Raises as `add_start` does."""
    if not run.ranks.is_first or run.progress.finished:
        return
    step = run.progress.step
    start = {
        "time": time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime()),
        "step": step,
        "arguments": kept_arguments(options.arguments),
        "folder": paths.recorded(os.getcwd()),
        "git": git_state(paths.PROJECT),
        "platform": platform.platform(),
        "processor_name": processor_name(),
        "cores": processes.cores(),
        "gpus": [torch.cuda.get_device_name(n) for n in range(torch.cuda.device_count())],
        "cuda": torch.version.cuda,
        "environment": kept_variables(os.environ),
        **run.facts,
    }
    add_start(run.config.run, start, anew=run.last_save is None)


def kept_variables(environment: Mapping[str, str]) -> dict[str, str]:
    """The variables that may be written down, by name."""
    return {
        name: printable(value, VALUE)
        for name, value in sorted(environment.items())
        if name.startswith(KEPT) and not any(word in name for word in SECRET)
    }


def git_state(folder: Path) -> dict[str, Any] | None:
    """The commit of the code in a folder, and whether files that git knows are other than in it;
    None where the folder is not one that git keeps, or git is not there."""
    top, commit = _git(folder, "rev-parse", "--show-toplevel", "HEAD") or ("", "")
    if not top or Path(top).resolve() != folder.resolve():
        return None
    changes = _git(folder, "status", "--porcelain", "--untracked-files=no")
    return None if changes is None else {"commit": commit, "changed": bool(changes)}


def _git(folder: Path, *arguments: str) -> list[str] | None:
    """The lines that git prints; None where it cannot."""
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments],
            capture_output=True,
            text=True,
            timeout=GIT_SECONDS,
            env=os.environ | {"GIT_OPTIONAL_LOCKS": "0"},  # it only looks
        )
    except (OSError, subprocess.TimeoutExpired, UnicodeDecodeError):
        return None
    return done.stdout.splitlines() if done.returncode == 0 else None


def processor_name() -> str:
    """What the CPU calls itself."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
            for line in file:
                if line.startswith("model name"):
                    return printable(line.partition(":")[2].strip(), VALUE)
    except OSError:  # of Linux alone
        pass
    return platform.processor() or platform.machine()
