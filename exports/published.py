"""A run as it is handed to strangers: what answers and goes on from its weights, and nothing else.

    FOLDER/README.md                 the model card, made of the files beside it alone
    FOLDER/metrics.jsonl             the log, up to the checkpoint, to the byte
    FOLDER/curves.png                the same as a picture
    FOLDER/checkpoint-000955/        config.json, trainer_state.json, the trained weights, the
                                     tokenizer, an empty optimizer and rng; a MANIFEST.json of all

The folder is a run, for every command that takes one. It cannot be resumed, because the state of
the optimizer stays with whoever trained it; another run can begin with its weights.

Paths of the machine that trained stay there too, as they name people and mean nothing elsewhere.
The base and the encoder are what others must find: a hub's name, or a folder that comes with this
project.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import checkpoints
import config as configs
import config_values
import hub
import paths
from checkpoint_state import TOKENIZER_FILES, Checkpoint, need_run
from config import Config
from errors import PhiSightError
from fields import PATH, PATH_OR_NAME, as_texts, split_weight
from files import open_regular
from manifest import WEIGHTS
from reports.card import CARD, model_card
from reports.card_sections import CURVES as CURVES  # others call it by this module
from reports.curves import draw_curves
from reports.log import METRICS

CERTIFICATE = "certificate.json"  # of whether it sees, written by whoever asked it
MODELS = ("base", "vision")  # what others must find
RUN = "runs/published"  # what a published run calls a folder that lay outside the project
SHIPPED = Path("assets")  # what every copy of this project has
# A model's folder in the hub's cache: the hub's name and the commit stand in its path.
IN_HUB_CACHE = re.compile(r".*/models--([^/]+?)--([^/]+)/snapshots/([0-9a-f]{40})/?")


class _CopiedTokenizer:
    """The tokenizer of a checkpoint, to be saved again: its own files, to the byte."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def save_pretrained(self, folder: str, /) -> None:
        Path(folder).mkdir()
        for name in TOKENIZER_FILES:
            if (self.folder / name).exists():
                with open_regular(self.folder / name, follow_links=False) as file:
                    with open(Path(folder) / name, "wb") as copy:
                        shutil.copyfileobj(file, copy)


def write_published(
    folder: Path,
    checkpoint: Checkpoint,
    certificates: Sequence[Mapping[str, Any]] = (),
    repository: str = "",
    config: Config | None = None,
    license: str = "",
    model_type: str = "",
) -> Checkpoint:
    """Write a run with this one checkpoint into `folder`, which is made or empty.

    Args:
        certificates: of what was measured, for the card.
        repository: the hub's name that the card is for, owner/name; "" for none.
        config: what to say of base and encoder, where that is not what the checkpoint says: one of
            another place, which the caller has compared by its fingerprint.
        license, model_type: for the card, see `reports.card.model_card`.

    Returns:
        The checkpoint as it was written and read back.

    Raises:
        PhiSightError: it is not of a run, its log is missing or contradicts it, or others could not
            find its base or its encoder. `OSError`: of the disk.
    """
    need_run(checkpoint)
    saved = config or config_values.from_dict(checkpoint.config["config"], str(checkpoint.path))
    facts, state = _public_documents(checkpoint, saved)
    folder.mkdir(exist_ok=True)
    _copy_log(checkpoint, folder / METRICS)
    weights = {stem: checkpoint.state[stem] for stem in WEIGHTS}
    path = checkpoints.save(
        folder,
        checkpoint.step,
        weights | {"optimizer": {}, "rng": {}},
        facts,
        state,
        _CopiedTokenizer(checkpoint.path / "tokenizer"),
    )
    published = checkpoints.load(path)
    if records := checkpoints.records_of(published):
        draw_curves(records, folder / CURVES)
    said = {"license": license, "model_type": model_type}
    card = model_card(published, records, certificates, repository, **said)
    (folder / CARD).write_text(card, encoding="utf-8", newline="\n")
    return published


def _copy_log(checkpoint: Checkpoint, copy: Path) -> None:
    """The log as far as the checkpoint knows it; a run that was imported has none."""
    log = checkpoint.path.parent / METRICS
    size = checkpoint.trainer_state.get("metrics_offset", 0)
    if not size:
        return
    if problems := checkpoints.log_problems(checkpoint, log):
        raise PhiSightError(
            f"{log}: {checkpoint.path.name}: {problems[0]}; put back the log that belongs to this"
            " run, or the checkpoint that does"
        )
    with open_regular(log) as file:
        copy.write_bytes(file.read(size))


# -- what is said of the run ----------------------------------------------------------------------


def _public_documents(
    checkpoint: Checkpoint, config: Config
) -> tuple[dict[str, Any], dict[str, Any]]:
    """config.json and trainer_state.json without what belongs to the machine that trained."""
    fields, withheld = public_fields(config, str(checkpoint.path))
    facts = checkpoint.config | {"config": fields, "published": {"withheld": withheld}}
    state = dict(checkpoint.trainer_state)
    if source := facts.get("imported_from"):
        facts["imported_from"] = Path(source).name
        state["finished"] = state["finished"].replace(source, Path(source).name)
    if started := facts.get("started_from"):
        finished = re.sub(r"^(imported) from .*", r"\1", started["finished"], flags=re.DOTALL)
        facts["started_from"] = started | {"finished": finished}
    if state.get("best_step") != checkpoint.step:
        state["best_step"] = None  # it is not there to be named as RUN/best
    return facts, state


def public_fields(config: Config, where: str) -> tuple[dict[str, Any], list[str]]:
    """The fields of a config as others read them, as JSON, and the names of those that said where
    something lies on this machine and now have a value that does not.

    Raises:
        PhiSightError: the base or the encoder is in a folder that others do not have.
    """
    fields, withheld = config_values.plain(config), []
    for name in MODELS:
        fields |= _findable(name, fields[name], fields[f"{name}_revision"], where)
    for name, inside in _places(config):
        if inside is None:
            withheld.append(name)
        fields[name] = inside or (RUN if name == "run" else configs.FIELDS[name].default)
    return fields, withheld


def without_paths(said: Mapping[str, Any], config: Config) -> dict[str, Any]:
    """What was measured of a run, without the places that its texts name: a field's name stands for
    a path of the config that is outside the project, and the project's folder is left out."""
    private = [name for name, inside in _places(config) if inside is None]
    private += [name for name in MODELS if os.path.isabs(getattr(config, name))]
    hidden = {
        path: f"({field})"
        for field in private
        for given in as_texts(getattr(config, field))
        for path in (given, os.path.abspath(given), split_weight(given)[0])
    }
    project = str(paths.PROJECT)

    def public(text: str) -> str:
        text = text.replace(f"{project}{os.sep}", "").replace(project, "(the project)")
        for path in sorted(hidden, key=len, reverse=True):
            text = text.replace(path, hidden[path])
        return text

    return {name: public(text) if isinstance(text, str) else text for name, text in said.items()}


def _places(config: Config) -> Iterator[tuple[str, str | list[str | None] | None]]:
    """The fields that say a place on this machine, base and encoder left out, with the path as it
    is named from the project's folder; None where it lies outside."""
    for name, spec in configs.FIELDS.items():
        kind = spec.metadata["place"]
        if not kind or name in MODELS:
            continue
        value = getattr(config, name)
        texts = [t for t in as_texts(value) if not hub.is_reference(t) and _is_path(kind, t)]
        if texts and isinstance(value, str):
            yield name, _in_project(value)
        elif texts:
            inside = [t if hub.is_reference(t) else _in_project(t) for t in value]
            yield name, None if None in inside else inside


def _is_path(kind: str, value: str) -> bool:
    """Whether a field that is PATH or PATH_OR_NAME says a place on this machine."""
    if kind == PATH or not value:
        return bool(value)
    return paths.is_typed_as_path(value) or Path(value).exists()


def _in_project(path: str) -> str | None:
    """The path as it is named from the project's folder; None where it lies outside."""
    absolute = Path(os.path.abspath(path))
    if not absolute.is_relative_to(paths.PROJECT):
        return None
    return absolute.relative_to(paths.PROJECT).as_posix()


def _findable(name: str, value: str, revision: str, where: str) -> dict[str, str]:
    """The fields that say what the base or the encoder is, as others find it."""
    if not _is_path(PATH_OR_NAME, value):
        return {name: value, f"{name}_revision": revision}
    if cached := IN_HUB_CACHE.fullmatch(Path(os.path.abspath(value)).as_posix()):
        return {name: f"{cached[1]}/{cached[2]}", f"{name}_revision": cached[3]}
    shipped = (paths.PROJECT / SHIPPED).resolve()  # it may be a link, or the run's path one
    if (folder := Path(value).resolve()).is_relative_to(shipped):
        inside = SHIPPED / folder.relative_to(shipped)
        return {name: inside.as_posix(), f"{name}_revision": revision}
    what = "base" if name == "base" else "picture encoder"
    raise PhiSightError(
        f"{where}: its {what} is {value}, a folder that nobody else has; name it as the hub does"
        f" with --{name} owner/name (it is compared by its fingerprint)"
    )
