"""Take a trained model to other programs, and take adapters of other programs in.

    python export.py --merge --out DIR             # plain model of its family: text only
    python export.py --llava DIR                   # LlavaForConditionalGeneration: with pictures
    python export.py --requantize --out DIR        # merged and in 4 bits again: text only
    python export.py --prune 0.1 --out DIR         # merged, a tenth of the MLP channels cut out
    python export.py --gguf DIR                    # for llama.cpp and Ollama: with pictures
    python export.py --peft DIR [--split]          # the adapter alone, for PEFT
    python export.py --push OWNER/NAME [--yes]     # the run onto the Hugging Face hub
    python export.py --space DIR                   # the web app and the run as a Gradio Space
    python export.py --import-peft DIR --out RUN   # and back, over --base and --vision
    python export.py --import-seed DIR --out RUN   # a checkpoint of the seed project

A merged model is read back and compared with the run, with pictures, before its folder gets its
name; past a tolerance nothing is written. The figures are in a certificate beside the weights.
"""

from __future__ import annotations

import argparse

import threads  # noqa: F401 (before torch is loaded)

from transformers.utils import logging

import config as configs
from assistant.flags import add_model_flags
from errors import PhiSightError, run_main
from exports import imported, measured
from exports.alignment import check_flags
from exports.form import Form, attribute
from exports.table import FORMS
from reports.card import license_id


def parser() -> configs.Parser:
    made = configs.Parser(prog="export.py", description=__doc__.splitlines()[0])
    what = made.add_mutually_exclusive_group(required=True)
    for flag, form in FORMS.items():
        what.add_argument(flag, **form.flag)
    made.add_argument("--out", help="folder to write, which must not be there yet")
    made.add_argument(
        "--license",
        metavar="ID",
        type=license_id,
        help="what the model card says, in the hub's words, such as mit (default: what the base's"
        " own card says, if it lies in its folder)",
    )
    for form in FORMS.values():
        for own, settings in form.own_flags.items():
            made.add_argument(own, **settings)
    measured.add_flags(made)
    imported.add_flags(made)
    add_model_flags(made)
    return made


def chosen_form(options: argparse.Namespace, made: configs.Parser) -> Form:
    """The form that was asked for. Raises `PhiSightError` if a flag of another one was typed."""
    # 0 counts as given, for its form to refuse it.
    given = {flag: getattr(options, attribute(flag)) for flag in FORMS}
    [chosen] = [flag for flag, value in given.items() if value is not None and value is not False]
    for flag, form in FORMS.items():
        for own in form.own_flags:
            name = attribute(own)
            if flag != chosen and getattr(options, name) != made.get_default(name):
                raise PhiSightError(f"{own}: goes with {flag} only")
    check_flags(options.require_alignment, FORMS[chosen].carries_pictures, chosen)
    return FORMS[chosen]


def main(arguments: list[str] | None = None) -> int:
    made = parser()
    options = made.parse_args(arguments)
    measured.tolerance_of(options)  # a bad number is told before anything is loaded
    logging.disable_progress_bar()  # of transformers' own loading and saving
    print(chosen_form(options, made).run(options))
    return 0


if __name__ == "__main__":
    run_main(main)
