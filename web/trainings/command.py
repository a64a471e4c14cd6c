"""What a form asks for as the command line of train.py, and all that is wrong with it."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictFloat, StrictInt

import config as configs
import config_values
import hub
import paths
from config import FIELDS, flag_of
from errors import PhiSightError
from fields import as_texts, split_weight
from presets import PRESETS
from web.errors import NotThere
from web.trainings.fields import SET_ELSEWHERE

STARTED = ".started"  # in a run's folder: how the page has started it, and what it said
RUN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")

Text = Annotated[str, Field(max_length=4096)]
Names = Annotated[list[Text], Field(max_length=32)]
Value = StrictBool | StrictInt | StrictFloat | Text | Names
Values = Annotated[dict[Annotated[str, Field(max_length=64)], Value], Field(max_length=100)]


class TrainingForm(BaseModel):
    """A training as a page asks for it."""

    model_config = ConfigDict(extra="forbid")

    name: Annotated[str, Field(max_length=200)]
    preset: Annotated[str, Field(max_length=64)]
    values: Values = {}
    start_from: Text = ""


@dataclass
class Command:
    """The arguments of train.py, and what is wrong: each problem names the `field` of the form that
    it lies in (None for none), and has a `text`, or the `key` of one."""

    arguments: list[str] = field(default_factory=list)
    problems: list[dict[str, Any]] = field(default_factory=list)

    @property
    def line(self) -> str:
        """To be typed in a terminal."""
        return f"{paths.command('train.py')} {paths.typed(*self.arguments)}"

    def refuse(self, name: str | None, text: str = "", key: str | None = None) -> None:
        self.problems.append({"field": name, "text": text, "key": key})


def is_run_name(name: str) -> bool:
    """Whether a text can name a run's folder, and nothing outside the folder of runs."""
    return RUN_NAME.fullmatch(name) is not None


def run_folder(runs: Path, name: str) -> Path:
    """The folder of a run that is there. Raises `NotThere`."""
    folder = runs / name
    if not is_run_name(name) or folder.is_symlink() or not folder.is_dir():
        raise NotThere("training_no_such_run", name=name[:100])
    return folder


def command_of(form: TrainingForm, runs: Path) -> Command:
    """What a form asks for. Nothing is started or written; problems are told, not raised."""
    made = Command()
    if form.preset not in PRESETS:
        made.refuse("preset", f"{form.preset[:64]}: unknown; choose from {', '.join(PRESETS)}")
        return made
    made.arguments += ["--preset", form.preset]
    if is_run_name(form.name):
        made.arguments += flag("run", str(runs / form.name))
        if is_taken(runs / form.name):
            made.refuse("name", key="training_exists")
    else:
        made.refuse("name", key="training_name" if form.name else "training_name_missing")
    if form.start_from:
        is_name = is_run_name(form.start_from) and (runs / form.start_from).is_dir()
        source = str(runs / form.start_from) if is_name else expanded(form.start_from)
        made.arguments += flag("start_from", source)
        if not hub.is_reference(source) and not os.path.isdir(source):
            made.refuse("start_from", f"{source}: no such run or checkpoint; name another one")
    usual = config_values.plain(configs.default_config(form.preset))
    changed = clean(form.values, made, SET_ELSEWHERE)
    for name, value in changed.items():
        if as_plain(value) != usual[name]:
            made.arguments += flag(name, value)
    check_places(usual | changed, made)
    if not made.problems:
        check_parsed(made)
    return made


def resume_command(folder: Path, values: Mapping[str, Value]) -> Command:
    """The command that goes on with a run, with some values changed."""
    made = Command(["--resume", *flag("run", str(folder))])
    changed = clean(values, made, [name for name in FIELDS if name not in resumable()])
    for name, value in changed.items():
        made.arguments += flag(name, value)
    if lengthening() & changed.keys():  # the learning rate falls otherwise than it was planned
        made.arguments.append("--allow-changes")
    if not made.problems:
        check_parsed(made)
    return made


def lengthening() -> set[str]:
    """The fields by which a run is made longer."""
    return {"epochs", "max_steps"}


def resumable() -> set[str]:
    """The fields that may be changed when a run is gone on with."""
    return lengthening() | set(configs.fields_without_effect()) - set(SET_ELSEWHERE)


def clean(values: Mapping[str, Value], made: Command, refused: list[str] | tuple) -> dict[str, Any]:
    """The values that a config takes; what is wrong with the others is told."""
    taken = {}
    for name, value in values.items():
        if name not in FIELDS or name in refused:
            made.refuse(None, f"{name}: cannot be set here; leave it out")
            continue
        try:
            held = config_values.of_declared_type({name: value}, "the form")[name]
        except PhiSightError as error:
            made.refuse(name, str(error).partition("expected ")[2])
            continue
        place = FIELDS[name].metadata["place"]
        texts = as_texts(held) if isinstance(held, str | tuple) else ()
        if problem := next(filter(None, map(paths.problem_of, texts)), ""):
            made.refuse(name, problem)
            continue
        if place:
            at_home = [expanded(text) if text.startswith("~") else text for text in texts]
            held = tuple(at_home) if isinstance(held, tuple) else at_home[0] if at_home else held
        if configs.out_of_bounds({name: held}):
            made.refuse(name, f"must be {FIELDS[name].metadata['bounds'].words}")
            continue
        taken[name] = held
    return taken


def as_plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def expanded(path: str) -> str:
    """With the home folder in place of ~."""
    return os.path.expanduser(path)


def flag(name: str, value: Any) -> list[str]:
    """What to type for a field's value."""
    if value is True:
        return [flag_of(name)]
    if value is False:
        return ["--no-" + flag_of(name).removeprefix("--")]
    if FIELDS[name].metadata["repeated"]:
        return [f"{flag_of(name)}={text}" for text in value or [""]]  # else the preset's are taken
    text = ",".join(value) if isinstance(value, tuple) else str(value)
    if not text or text.startswith("-"):  # which would be taken for a flag
        return [f"{flag_of(name)}={text}"]
    return [flag_of(name), text]


def check_places(values: Mapping[str, Any], made: Command) -> None:
    """Tell which data are not there; a base or an encoder may be a name of the hub."""
    data, images = values["data"], values["images"]
    told = {problem["field"] for problem in made.problems}
    if not data:
        made.refuse("data", key="training_data_missing")
    for text in () if "data" in told else data:
        place, _ = split_weight(text)
        # False also for what cannot be looked at, and for devices and pipes.
        is_there = os.path.isfile(place) or os.path.isdir(place)
        if not hub.is_reference(place) and not is_there:
            made.refuse("data", f"{place}: no such file; name the file of the conversations")
    for folder in () if "images" in told else images:
        if not os.path.isdir(folder):
            made.refuse("images", f"{folder}: no such folder; name the folder of the pictures")


def check_parsed(made: Command) -> None:
    """Have train.py's own parser read the arguments, and its own checks find what is wrong."""
    from training.options import parse

    try:
        config, options = parse(made.arguments)
        if not options.resume:
            from training.start import check_demands

            check_demands(config, None, options)
    except PhiSightError as error:
        made.refuse(None, str(error).removeprefix("config: "))


def is_taken(folder: Path) -> bool:
    """Whether a run lies in a folder, or anything else that a new one could spoil. What a training
    left that failed before its first step is not in the way."""
    from reports.watching import LOCK

    left = {LOCK, STARTED, "quarantine.jsonl", paths.EXAMPLES}
    try:
        return folder.is_symlink() or any(path.name not in left for path in folder.iterdir())
    except FileNotFoundError:
        return False
    except OSError:  # a file, or a folder that cannot be looked into
        return True
