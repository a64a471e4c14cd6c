"""A folder that a Gradio Space of the Hugging Face hub runs as it is: the web app with a run in it.

    README.md           the Space's settings, and what the model card says
    app.py, api/, ...   this project's code, as far as app.py imports it
    space.json          what app.py shows there: see `space.Space`
    requirements.txt    this project's pins; packages.txt: Debian's espeak-ng, for spoken answers
    run/                the run, as it is published; none for a run of the hub (--run hf:...)
    assets/             base, CLIP and Whisper that come with this project, if they are the run's
    examples/           held-out pictures and questions to begin with, where they are there
"""

from __future__ import annotations

import argparse
import io
import os
import re
import shutil
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from PIL import Image

import checkpoints
import config as configs
import paths
import space
from assistant.assistant import Assistant
from assistant.flags import load_assistant
from checkpoint_state import Checkpoint
from config import Config
from data.dataset import load_questions
from data.images import load_image
from errors import PhiSightError
from exports.carried import carried_files, carry
from exports.folder import new_folder
from exports.form import Form, folder_to_write
from exports.published import CARD, write_published
from files import hash_files
from model.base import find_folder
from model.vision import find_clip
from reports.card import model_card
from reports.log import METRICS, read_metrics

REQUIREMENTS, SYSTEM_PACKAGES = "requirements.txt", "packages.txt"
HUB_RUN = "hf:"
OWN = Path("assets/own")  # where --copy-base puts a base and a CLIP that nobody else has
EXAMPLES = 3
EXAMPLE_SIDE, EXAMPLE_BYTES = 1024, 2**20  # of a picture to begin with; pixels, and bytes of a file
LARGE = 500_000_000  # weights; a base of more is slow on two cores, so that a GPU is suggested
SMALL_HARDWARE, LARGE_HARDWARE = "cpu-basic", "t4-small"
SHORT_DESCRIPTION = "Questions about pictures, answered by a trained Phi-3"  # 60 letters at most
# What the hub's git keeps outside of git; uploads by other ways do it by themselves.
LARGE_FILES = "".join(
    f"{pattern} filter=lfs diff=lfs merge=lfs -text\n"
    for pattern in ("*.safetensors", "*.pt", "*.png", "*.jpg")
)
_SNAPSHOT = re.compile(r".*/models--([^/]+?)--([^/]+)/snapshots/([0-9a-f]{40})/?")


@dataclass(frozen=True)
class Part:
    """The base, the CLIP or the run, as a Space finds it."""

    name: str
    """a folder in the Space, or the hub's name"""
    revision: str = ""
    """the commit on the hub; empty for a folder"""
    files: tuple[str, ...] = ()
    """what the Space needs of the hub's repository, to be had when it is built"""

    @property
    def preloaded(self) -> str:
        """The line of `preload_from_hub`."""
        return f"{self.name} {','.join(self.files)} {self.revision}"


def export_space(
    assistant: Assistant,
    run: str,
    out: str | Path,
    copy_base: bool = False,
    hardware: str = "",
    title: str = "",
) -> str:
    """Write the folder of a Space that shows the run of an assistant. Returns lines about it.

    Args:
        run: where the run is from, as it was typed: a folder, or `hf:owner/name@revision`.
        copy_base: put base and CLIP into the Space where they are folders of this machine alone.
        hardware: the hub's name for what it should run on, "" for what fits the base's size.
        title: of the Space; "" for one made of the run's name.

    Raises:
        PhiSightError: nobody else could find the base or the CLIP, the hub knows no such hardware,
            or the folder cannot be written. Nothing is left then.
    """
    checkpoint = checkpoints.resolve(assistant.source)
    with new_folder(out) as folder:
        project = paths.PROJECT
        carry(project, carried_files(project, "app.py"), folder)
        carry(project, [Path(REQUIREMENTS), Path("LICENSE")], folder)
        (folder / SYSTEM_PACKAGES).write_text("espeak-ng\n")
        (folder / ".gitattributes").write_text(LARGE_FILES)
        config = assistant.config
        base = _part(config, "base", folder, copy_base)
        vision = _part(config, "vision", folder, copy_base)
        speech = _speech(config, folder)
        card, hub_run = _run(checkpoint, run, replace_parts(config, base, vision), folder)
        shown = _examples(config, folder / "examples")
        space.Space(
            run=run if hub_run else "run",
            base=base.name,
            base_revision=base.revision,
            vision=vision.name,
            vision_revision=vision.revision,
            speech=speech,
            keeps_base=bool(config.base_cache),
        ).write(folder)
        from_hub = [part for part in (base, vision, hub_run) if part and part.files]
        head = front_matter(
            title or f"PhiSight {Path(run.removeprefix(HUB_RUN)).name}",
            [part.name for part in from_hub],
            [part.preloaded for part in from_hub],
            hardware or suggested_hardware(assistant),
        )
        (folder / CARD).write_text(head + body_of(card), encoding="utf-8")
    lines = [f"{out}: a Space with {run}; try it with {paths.command('app.py')} in that folder"]
    if speech == "" and config.speech:
        lines.append(f"without {config.speech}: it lies outside this project, so nobody is heard")
    if not shown:
        lines.append("without examples: the run's held-out questions and pictures are not there")
    return "\n".join(lines)
