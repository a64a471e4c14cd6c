"""The command line of `train.py`: one flag per config field, and what this process is to do."""

from __future__ import annotations

import argparse
import os
import sys
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import hub
import paths
from config import (
    DEFAULT_PRESET,
    FIELDS,
    PRESETS,
    TYPES,
    Config,
    Parser,
    default_config,
    flag_of,
    replace,
)
from errors import PhiSightError, printable
from fields import as_texts
from training.config_file import read_config_file
from training.trackers import TRACKERS, check_installed

STATUS = "--status"


@dataclass(frozen=True)
class RunOptions:
    """Whether this process starts or resumes the run, and when it stops. None of it is in the
    config or in a checkpoint: two processes may be told differently and compute the same run."""

    resume: bool = False
    resume_if_any: bool = False
    overwrite: bool = False
    allow_changes: bool = False
    stop_at_step: int = 0
    max_minutes: float = 0.0
    print_config: bool = False
    status: str | None = None
    """the run whose status is asked for, empty for that of the config; None: train"""
    json: bool = False
    trackers: dict[str, str] = field(default_factory=dict)
    """names of `trackers.TRACKERS` that show the log too, with what was given with their flags"""
    arguments: tuple[str, ...] = ()
    """the command line"""
    given: dict[str, Any] = field(default_factory=dict)
    """the config fields that the person gave, as flags or in a file"""


def parse(arguments: list[str] | None) -> tuple[Config, RunOptions]:
    """The config and the options of a command line (None: this process's own).

    Raises:
        PhiSightError: a flag, a `--config` file or a value that cannot be used.
    """
    parser = Parser(
        prog="train.py",
        description="Train the adapter and the projector: the loop and nothing else.",
    )
    add_config_flags(parser)
    add_run_flags(parser)
    options = parser.parse_args(arguments)
    if options.stop_at_step < 0:
        raise PhiSightError(f"--stop-at-step {options.stop_at_step}: must be 0 (never) or more")
    if not 0 <= options.max_minutes < float("inf"):
        raise PhiSightError(f"--max-minutes {options.max_minutes}: must be 0 (never) or more")
    if options.json and options.status is None:
        raise PhiSightError(f"--json: goes with {STATUS}; leave it out, or ask for a status")
    config = config_from_options(options)
    check_paths(config)
    if hub.is_reference(config.run):
        raise PhiSightError(
            f"--run {config.run}: a run on the hub cannot be trained or resumed, as it has no state"
            " of an optimizer and is written nowhere here; begin one with its weights: --run"
            f" runs/NEW --start-from {config.run}"
        )
    return config, RunOptions(
        resume=options.resume,
        resume_if_any=options.resume_if_any,
        overwrite=options.overwrite,
        allow_changes=options.allow_changes,
        stop_at_step=options.stop_at_step,
        max_minutes=options.max_minutes,
        print_config=options.print_config,
        status=options.status,
        json=options.json,
        trackers=trackers_asked_for(options),
        arguments=tuple(sys.argv[1:] if arguments is None else arguments),
        given=given_fields(options),
    )


def check_paths(config: Config) -> None:
    """Raise `PhiSightError` for a path that cannot be one, before it fails the first save."""
    for name, spec in FIELDS.items():
        for text in as_texts(getattr(config, name)) if spec.metadata["place"] else ():
            if problem := paths.problem_of(text):
                raise PhiSightError(f"{flag_of(name)} {printable(text, 100)}: {problem}")


def add_run_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of `RunOptions`."""

    def switch(flag: str, text: str) -> None:
        parser.add_argument(flag, action="store_true", help=text)

    switch("--resume", "go on from the run's newest valid checkpoint")
    switch("--resume-if-any", "--resume where the run has a checkpoint, else start")
    switch("--overwrite", "start anew in a run folder that has checkpoints, and remove them")
    switch("--allow-changes", "resume although the result will not be exact")
    parser.add_argument(
        STATUS,
        nargs="?",
        const="",
        metavar="RUN",
        help="tell where a run stands, while it trains or after, and train nothing",
    )
    switch("--json", f"with {STATUS}: print a JSON object")
    switch("--print-config", "print the whole config as a file for --config, and train nothing")
    parser.add_argument(
        "--stop-at-step",
        type=int,
        default=0,
        help="save and stop after this step; --resume goes on",
    )
    parser.add_argument(
        "--max-minutes",
        type=float,
        default=0.0,
        help="save and stop after so many minutes; 0 for never",
    )
    for name, kind in TRACKERS.items():
        parser.add_argument(
            f"--{name}",
            nargs="?" if kind.optional else None,
            const="" if kind.optional else None,
            metavar=kind.given,
            help=kind.help,
        )


def trackers_asked_for(options: argparse.Namespace) -> dict[str, str]:
    """The trackers of a command line. Raises `PhiSightError` where the package of one is not
    there, before anything is loaded."""
    asked = {n: given for n in TRACKERS if (given := getattr(options, n)) is not None}
    for name, given in asked.items():
        if not (given or TRACKERS[name].optional):
            raise PhiSightError(f"--{name}: is empty; give a {TRACKERS[name].given}")
        check_installed(name)
    return asked


# -- the config's own flags -----------------------------------------------------------------------


SWITCHES = dict.fromkeys(("true", "yes", "1", "on"), True) | dict.fromkeys(
    ("false", "no", "0", "off"), False
)


def _boolean(text: str) -> bool:
    if text.lower() not in SWITCHES:
        raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false")
    return SWITCHES[text.lower()]


def _word_or_boolean(formerly: Mapping[bool, str]) -> Callable[[str], str]:
    """What reads the flag of a field that was a boolean once, and is one of some words now."""

    def read(text: str) -> str:
        return formerly[_boolean(text)] if text.lower() in SWITCHES else text

    return read


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip())


def add_config_flags(parser: argparse.ArgumentParser) -> None:
    """One flag per config field, plus `--preset` and `--config`; what is not given keeps the
    preset's value."""
    parser.add_argument(
        "--preset",
        help=f"one of {', '.join(sorted(PRESETS))} (default: {DEFAULT_PRESET!r}); the defaults"
        " below are phi35's, and --print-config shows those of any",
    )
    parser.add_argument(
        "--config",
        type=read_config_file,
        default={},
        metavar="FILE",
        help="TOML file of config fields, as --print-config writes it; flags win over it",
    )
    for name, spec in FIELDS.items():
        flag, kind = flag_of(name), TYPES[name]
        choices = spec.metadata["choices"]
        one_of = f"; one of {', '.join(choices)}" if choices else ""
        text = f"{spec.metadata['help']}{one_of} (default: {spec.default!r})".replace("%", "%%")
        formerly = spec.metadata["formerly"]
        if kind is bool or formerly:
            const = {True: True, False: False} | formerly
            parser.add_argument(
                flag,
                dest=name,
                type=_word_or_boolean(formerly) if formerly else _boolean,
                nargs="?",
                const=const[True],
                default=argparse.SUPPRESS,
                metavar=name.upper() if formerly else "BOOL",
                help=text,
            )
            parser.add_argument(
                "--no-" + flag.removeprefix("--"),
                dest=name,
                action="store_const",
                const=const[False],
                default=argparse.SUPPRESS,
                help=f"the same as {flag} {str(const[False]).lower()}",
            )
            continue
        if spec.metadata["repeated"]:
            parser.add_argument(
                flag, dest=name, action="append", default=argparse.SUPPRESS, help=text,
                metavar=name.upper(),
            )  # fmt: skip
            continue
        parser.add_argument(
            flag,
            dest=name,
            type=_names if typing.get_origin(kind) is tuple else kind,
            default=argparse.SUPPRESS,
            metavar=name.upper(),
            help=text,
        )


def given_fields(options: argparse.Namespace) -> dict[str, Any]:
    """The config fields that the person gave: in a `--config` file and, over it, as flags."""
    given = options.config | vars(options)
    return {name: value for name, value in given.items() if name in FIELDS}


def config_from_options(options: argparse.Namespace) -> Config:
    """Preset, then `--config` file, then flags, then validation. A preset's questions are about its
    pictures: where other pictures are given, only questions that are given too are asked."""
    preset = default_config(options.preset or options.config.get("preset", DEFAULT_PRESET))
    given = given_fields(options)
    images = given.get("images", preset.images)
    images = [images] if isinstance(images, str) else images
    if [*map(os.path.abspath, images)] != [*map(os.path.abspath, preset.images)]:
        given = {"held_out_questions": "", "novel_pair_questions": ""} | given
    return replace(preset, **given)
