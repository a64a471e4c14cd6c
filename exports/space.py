"""A folder that a Gradio Space of the Hugging Face hub runs as it is: the web app with a run in it.

    README.md           the Space's settings, then what the model card says
    app.py, api/, ...   this project's code, as far as app.py imports it
    space.json          what app.py shows there: see `space.Space`
    requirements.txt    this project's pins; packages.txt is Debian's espeak-ng, for spoken answers
    run/                the run, as it is published; none for a run of the hub (--run hf:...)
    assets/             base, encoder and Whisper that come with this project, if they are the run's
    examples/           questions to begin with: the run's, or held-out ones

Nothing in it is of this machine. A base or encoder of the hub is named with its commit, and fetched
when the Space is built.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import checkpoints
import config as configs
import hub
import paths
import space
from assistant.assistant import Assistant
from assistant.flags import load_assistant
from config import Config
from data.dataset import load_questions
from data.examples import MOST, read_examples, write_examples
from data.pictures import PictureFolders
from errors import PhiSightError, printable
from evaluation.questions import REPORTED_ONLY
from exports.alignment import alignment_line, alignment_of_run, check_alignment
from exports.carried import carried_files, carry
from exports.folder import new_folder, write_json
from exports.form import Form, folder_to_write, typed
from exports.measured import DATA_FIELDS
from exports.published import (
    CARD,
    CERTIFICATE,
    CURVES,
    IN_HUB_CACHE,
    SHIPPED,
    without_paths,
    write_published,
)
from model import base, vision
from paths import EXAMPLES
from reports.card import license_of_base, model_card, provenance
from reports.card_sections import OWN
from reports.markdown import LONGEST, escaped

REQUIREMENTS, EXTRAS = "requirements.txt", "requirements-extras.txt"
SYSTEM_PACKAGES = "packages.txt"
READS_RECORDINGS = "av"  # the one of the extras that the app has use for
RUN = "run"
# A Space is a page for strangers, which has no training room: what that imports stays here too.
NOT_THERE = ("web/training", "web/trainings")
LARGE = 500_000_000  # weights; a base of more is slow on two cores, so that a GPU is suggested
SMALL_HARDWARE, LARGE_HARDWARE = "cpu-basic", "t4-small"
LONGEST_START = "1h"  # until the hub gives a Space up: the first start quantises the base
DESCRIPTION = "Asks a trained {family} about pictures"  # the hub takes 60 letters
# What the hub's git keeps outside of git itself; other ways of uploading need no such file.
LARGE_FILES = "".join(
    f"{pattern} filter=lfs diff=lfs merge=lfs -text\n"
    for pattern in ("*.safetensors", "*.pt", "*.png", "*.jpg")
)
ABOUT = """
# {title}

This Space answers questions about pictures. Its settings stand in `space.json`, and `python app.py`
in a copy of this folder shows the same page on your own machine. What visitors upload is removed
after a day at the latest. What follows is the card of the run that answers.
"""


@dataclass(frozen=True)
class Part:
    """A base or a picture encoder, as the Space finds it."""

    name: str
    """a folder in the Space, or the hub's name"""
    revision: str = ""
    """the commit on the hub; empty for a folder"""
    files: tuple[str, ...] = ()
    """what the Space needs of the hub's repository"""

    @property
    def preloaded(self) -> str:
        """The line of `preload_from_hub`, which has it fetched when the Space is built."""
        return f"{self.name} {','.join(self.files)} {self.revision}"


def export_space(
    assistant: Assistant,
    out: str | Path,
    alignment: Mapping[str, Any],
    copy_base: bool = False,
    hardware: str = "",
    title: str = "",
) -> str:
    """Write the folder of a Space that shows the run of an assistant. Returns lines about it.

    Args:
        alignment: of the run, as it is told in the README.
        copy_base: put base and encoder into the Space where they are folders of this machine alone.
        hardware: the hub's name for what it should run on, "" for what fits the base's size.
        title: of the Space; "" for one made of the run's name.

    Raises:
        PhiSightError: nobody else could find the base or the encoder, the hub knows no such
            hardware, or the folder cannot be written. Nothing is left then.
    """
    config, project = assistant.config, paths.PROJECT
    title = title or f"PhiSight {hub.model_name(assistant.source).rpartition('/')[2]}"
    title = printable(title, LONGEST)
    with new_folder(out) as folder:
        carry(project, carried_files(project, "app.py", without=NOT_THERE), folder)
        carry(project, [Path("LICENSE")], folder)
        pins = [*pins_of(REQUIREMENTS), *pins_of(EXTRAS, READS_RECORDINGS)]
        (folder / REQUIREMENTS).write_text("\n".join(pins) + "\n", encoding="utf-8", newline="\n")
        (folder / SYSTEM_PACKAGES).write_text("espeak-ng\n", encoding="utf-8", newline="\n")
        (folder / ".gitattributes").write_text(LARGE_FILES, encoding="utf-8", newline="\n")
        (folder / ".gitignore").write_text(
            f"{space.STORED}/\n__pycache__/\n", encoding="utf-8", newline="\n"
        )
        parts = {name: place(config, name, folder, copy_base) for name in ("base", "vision")}
        speech = place_speech(config.speech, folder)
        run, card = place_run(assistant, parts, alignment, folder)
        shown = write_shown(assistant, folder / EXAMPLES)
        space.Space(
            run=run,
            base=parts["base"].name,
            base_revision=parts["base"].revision,
            vision=parts["vision"].name,
            vision_revision=parts["vision"].revision,
            speech=speech,
            keeps_base=bool(config.base_cache),
            examples=EXAMPLES if shown else "",
        ).write(folder)
        head = front_matter(assistant, title, run, list(parts.values()), card, hardware)
        about, said = ABOUT.format(title=escaped(title)), card.text.strip()
        said = said.replace(f"]({CURVES})", f"]({where_it_lies(run)}/{CURVES})")
        text = f"---\n{head}\n---\n{about}\n{said}\n"
        (folder / CARD).write_text(text, encoding="utf-8", newline="\n")
    lines = [f"{out}: a Space with {assistant.source}; `python app.py` in that folder starts it"]
    if config.speech and not speech:
        lines.append("without Whisper: the run's lies outside of this project; nobody is heard")
    if not shown:
        lines.append("without examples: the run has none, and its held-out pictures are gone")
    return "\n".join([*lines, alignment_line(alignment)])


# -- the parts -------------------------------------------------------------------------------------


def place(config: Config, name: str, folder: Path, copy: bool) -> Part:
    """Where the Space finds the base (`name` "base") or the encoder ("vision"); one that comes with
    this project is copied, with `copy` any folder. Raises `PhiSightError`."""
    value, revision = getattr(config, name), getattr(config, f"{name}_revision")
    find = {"base": base.find_folder, "vision": vision.find_encoder}[name]
    found = find(value, revision or None)
    names = [path.name for path in sorted(found.iterdir()) if is_needed(path)]
    if cached := IN_HUB_CACHE.fullmatch(os.path.abspath(found)):
        return Part(f"{cached[1]}/{cached[2]}", cached[3], tuple(names))
    inside = in_project(value)
    if inside is None and not copy:
        what = "base" if name == "base" else "picture encoder"
        raise PhiSightError(
            f"--space: the run's {what} is {value}, a folder that nobody else has; put it into the"
            f" Space with --copy-base, or name it as the hub does with --{name} owner/name"
        )
    own = inside or Path(OWN) / name
    carry(found, [Path(name) for name in names], folder / own)
    return Part(own.as_posix())


def is_needed(path: Path) -> bool:
    """Whether a file of a base's or an encoder's folder is read."""
    if path.name == vision.PICKLED:
        return not any(path.parent.glob("*.safetensors"))
    return path.is_file() and any(fnmatch(path.name, wanted) for wanted in base.DOWNLOADED)


def in_project(path: str) -> Path | None:
    """A file or folder of the assets of this project, as it is named there; None for another."""
    absolute, shipped = Path(os.path.abspath(path)), paths.PROJECT / SHIPPED
    if not absolute.is_relative_to(shipped) or not absolute.exists():
        return None
    return absolute.relative_to(paths.PROJECT)


def place_speech(name: str, folder: Path) -> str:
    """The Whisper that listens in the Space: a file of this project, copied, or OpenAI's name; ""
    for another file, which stays here."""
    inside = in_project(name) if name else None
    if inside is None:
        return "" if os.path.sep in name or Path(name).exists() else name
    carry(paths.PROJECT, [inside], folder)
    return inside.as_posix()


def place_run(
    assistant: Assistant, parts: Mapping[str, Part], alignment: Mapping[str, Any], folder: Path
) -> tuple[str, Any]:
    """The name of the run in the Space, and its model card (a `ModelCard`). One of the hub stays
    there, named by its commit."""
    from huggingface_hub import ModelCard

    checkpoint = checkpoints.resolve(assistant.source)
    said = {  # found here: in the Space the base may have another name
        "license": assistant.license or license_of_base(assistant.config),
        "model_type": assistant.parts.base.family.model_type,
    }
    certificates = [
        {
            "what": RUN,
            "provenance": provenance(checkpoint),
            "alignment": without_paths(alignment, assistant.config),
        }
    ]
    if hub.is_reference(assistant.source):
        records, name = checkpoints.records_of(checkpoint), hub.model_name(assistant.source)
        card = model_card(checkpoint, records, certificates, name, **said)
        return assistant.source, ModelCard(card)
    where = {
        **{name: part.name for name, part in parts.items()},
        **{f"{name}_revision": part.revision for name, part in parts.items()},
    }
    config = configs.replace(assistant.config, **where)
    write_published(folder / RUN, checkpoint, certificates, config=config, **said)
    write_json(folder / RUN / CERTIFICATE, certificates[0])
    return RUN, ModelCard.load(folder / RUN / CARD)


def where_it_lies(run: str) -> str:
    """What a link in the Space's README names the run by."""
    if not hub.is_reference(run):
        return run
    named = hub.parse(run)
    return f"{space.HUB}/{named.repository}/resolve/{named.revision}"


def write_shown(assistant: Assistant, folder: Path) -> int:
    """Write the questions to begin with into a new folder, those that the run carries, else a few
    held-out ones; returns how many. No folder is left where there are none."""
    folder.mkdir()
    own = None if hub.is_reference(assistant.source) else Path(assistant.source).parent / EXAMPLES
    if own is not None and own.is_dir():
        carried = [(one.question, Path(one.picture)) for one in read_examples(own)]
        count = write_examples(folder, carried, MOST)
    else:
        count = write_examples(folder, held_out(assistant.config))
    if not count:
        folder.rmdir()
    return count


def held_out(config: Config) -> Iterator[tuple[str, Path]]:
    """Held-out questions of different kinds and pictures, with their pictures; none where the run's
    questions are not there."""
    if not config.images or not Path(config.held_out_questions or "/").is_file():
        return
    folders = PictureFolders.of(config)
    told: set[str] = set()
    for question in load_questions(config.held_out_questions):
        kind = question.kind or question.id
        if question.kind not in REPORTED_ONLY and not told & {kind, question.image}:
            told |= {kind, question.image}
            yield question.text, folders.path_of(question.image)


# -- the settings of the Space ---------------------------------------------------------------------


def front_matter(
    assistant: Assistant,
    title: str,
    run: str,
    parts: list[Part],
    card: Any,
    hardware: str = "",
) -> str:
    """The YAML at the head of README.md that the hub runs the Space by, without its marks.

    Raises `PhiSightError` for hardware that the hub does not have or that this project cannot use.
    """
    from huggingface_hub import SpaceCardData, SpaceHardware

    weights = sum(p.numel() for p in assistant.parts.base.model.parameters())
    large = weights > LARGE
    hardware = hardware or (LARGE_HARDWARE if large else SMALL_HARDWARE)
    known = [kind.value for kind in SpaceHardware if not kind.value.startswith("zero-")]
    if hardware not in known:
        raise PhiSightError(f"--space-hardware {hardware}: choose one of {', '.join(known)}")
    from_hub = [part for part in parts if part.revision]
    models = [part.name for part in from_hub]
    if hub.is_reference(run):
        models.append(hub.model_name(run))
    more: dict[str, Any] = {}
    if from_hub:
        more["preload_from_hub"] = [part.preloaded for part in from_hub]
    if large:
        more["startup_duration_timeout"] = LONGEST_START
    license = card.data.license
    data = SpaceCardData(
        title=title,
        emoji="\N{LEFT-POINTING MAGNIFYING GLASS}",
        colorFrom="indigo",
        colorTo="gray",
        sdk="gradio",
        sdk_version=pinned("gradio"),
        python_version=f"{sys.version_info.major}.{sys.version_info.minor}",
        app_file="app.py",
        pinned=False,
        short_description=DESCRIPTION.format(family=assistant.parts.base.family.name),
        suggested_hardware=hardware,
        license=license if license != "unknown" else None,
        models=models or None,
        **more,
    )
    return data.to_yaml().strip()


def pins_of(file: str, package: str = "") -> list[str]:
    """The lines of a file of this project's requirements, or the one of a package."""
    lines = (paths.PROJECT / file).read_text(encoding="utf-8").split()
    return [line for line in lines if line.startswith(f"{package}==") or not package]


def pinned(package: str) -> str:
    """The version of a package in requirements.txt."""
    [line] = pins_of(REQUIREMENTS, package)
    return line.partition("==")[2]


# -- the command -----------------------------------------------------------------------------------


def run(options: argparse.Namespace) -> str:
    """`export.py --space DIR`."""
    out = folder_to_write(options, "--space")
    if Path(out).exists():  # before minutes are spent on questions
        raise PhiSightError(f"{out}: is there already; remove it or give another folder")
    assistant = load_assistant(options)
    try:
        assistant.config = configs.replace(assistant.config, **typed(options, DATA_FIELDS))
        alignment = alignment_of_run(assistant, options.greedy_answers)
        check_alignment(alignment, options.require_alignment, "space")
        return export_space(
            assistant,
            out,
            alignment,
            options.copy_base,
            options.space_hardware or "",
            options.space_title or "",
        )
    finally:
        assistant.close()


FORM = Form(
    run,
    {
        "metavar": "DIR",
        "help": "a folder that a Gradio Space of the Hugging Face hub runs as it is",
    },
    {
        "--copy-base": {
            "action": "store_true",
            "help": "put a base and an encoder into the Space that are folders of this machine",
        },
        "--space-hardware": {
            "metavar": "NAME",
            "help": "the hub's name for what the Space should run on (default: cpu-basic, for large"
            " bases t4-small)",
        },
        "--space-title": {"metavar": "TITLE", "help": "of the Space (default: the run's name)"},
    },
    carries_pictures=True,
)
