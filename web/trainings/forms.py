"""The forms of export.py that a page can ask for, and what each is asked with."""

from __future__ import annotations

import argparse
from typing import Any

from errors import PhiSightError
from web.trainings.command import Command, Value

# Not those that go to another place (--push, --space), nor those that bring something in.
ON_PAGE = ("--merge", "--llava", "--requantize", "--prune", "--gguf", "--peft")
NOT_ON_PAGE = ("--llama-python",)  # names a program that would be run
SHARED = (
    "--dtype",
    "--greedy-answers",
    "--evaluation-conversations",
    "--calibration",
    "--max-loss-difference",
    "--min-greedy-equal",
    "--require-alignment",
)
WITHOUT = {  # what a form does not read
    "--peft": ("--dtype", "--evaluation-conversations", "--max-loss-difference")
    + ("--min-greedy-equal", "--calibration"),
    "--merge": ("--calibration", "--require-alignment"),
    "--llava": ("--calibration",),
    "--gguf": ("--calibration", "--dtype"),
    "--requantize": ("--require-alignment",),
    "--prune": ("--require-alignment",),
}
KINDS: dict[Any, str] = {int: "whole", float: "number"}


def forms_json() -> list[dict[str, Any]]:
    """Every form with its options; loads what exports, which takes seconds the first time."""
    from exports.table import FORMS

    return [
        {
            "form": flag.removeprefix("--"),
            "help": FORMS[flag].flag["help"],
            "sees": FORMS[flag].carries_pictures,
            "options": list(options_of(flag).values()),
        }
        for flag in ON_PAGE
    ]


def options_of(form: str) -> dict[str, dict[str, Any]]:
    """The options of a form, by their flags: its own first, then what it shares with others."""
    from exports import measured
    from exports.table import FORMS

    parser = argparse.ArgumentParser(add_help=False)
    if FORMS[form].flag.get("type") is not None:  # the flag itself takes a value
        parser.add_argument(form, **FORMS[form].flag, required=True)
    for flag, settings in FORMS[form].own_flags.items():
        parser.add_argument(flag, **settings)
    own = {action.option_strings[0] for action in parser._actions}
    measured.add_flags(parser)
    shared = [flag for flag in SHARED if flag not in WITHOUT[form]]
    options = {}
    for action in parser._actions:
        flag = action.option_strings[0]
        if flag in NOT_ON_PAGE or not (flag in own or flag in shared):
            continue
        kind = "boolean" if action.nargs == 0 else KINDS.get(action.type, "text")
        options[flag] = {
            "name": flag.removeprefix("--"),
            "flag": flag,
            "own": flag in own,
            "help": (action.help or "") % (vars(action) | {"prog": "export.py"}),
            "kind": kind,
            "choices": list(action.choices) if action.choices else None,
            "default": action.default,
            "required": action.required,
        }
    return options


def export_arguments(form: str, checkpoint: str, out: str, options: dict[str, Value]) -> list[str]:
    """What export.py is given. Raises PhiSightError for an option that the form does not have, and
    for a value that is none of its kind."""
    flag = f"--{form}"
    if flag not in ON_PAGE:
        raise PhiSightError(f"{form}: no such form; choose one from the page")
    known = options_of(flag)
    takes_value = flag in known
    made = Command()
    if takes_value:
        made.arguments.append(f"--out={out}")
    else:
        from exports.table import FORMS

        is_switch = FORMS[flag].flag.get("action") == "store_true"
        made.arguments += [flag, f"--out={out}"] if is_switch else [f"{flag}={out}"]
    for name, value in options.items():
        option = known.get(f"--{name}")
        if option is None:
            raise PhiSightError(f"--{name}: goes not with {flag}; leave it out")
        made.arguments += _typed(option, value)
    if takes_value and form not in options:
        raise PhiSightError(f"{flag}: not given; say how much")
    return [*made.arguments, f"--run={checkpoint}"]


def _typed(option: dict[str, Any], value: Value) -> list[str]:
    """What to type for an option; nothing for one that is not given."""
    flag, kind = option["flag"], option["kind"]
    if kind == "boolean":
        if not isinstance(value, bool):
            raise PhiSightError(f"{flag}: is true or false")
        return [flag] if value else []
    is_right = {
        "whole": type(value) is int,
        "number": type(value) in (int, float),
        "text": isinstance(value, str),
    }[kind]
    if not is_right or (option["choices"] and value not in option["choices"]):
        one_of = ", ".join(option["choices"] or [])
        expected = {"whole": "a whole number", "number": "a number"}.get(kind, f"one of {one_of}")
        raise PhiSightError(f"{flag}: must be {expected}")
    return [f"{flag}={value}"]
