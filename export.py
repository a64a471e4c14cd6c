"""Take a trained model to other programs, and take adapters of other programs in.

    python export.py --merge --out DIR             # plain Phi3ForCausalLM: text only
    python export.py --llava DIR                   # LlavaForConditionalGeneration: with pictures
    python export.py --requantize --out DIR        # merged and in 4 bits again: text only
    python export.py --prune 0.1 --out DIR         # merged, a tenth of the MLP channels cut out
    python export.py --peft DIR [--split]          # the adapter alone, for PEFT
    python export.py --import-peft DIR --out RUN   # and back, over --base and --vision
    python export.py --import-seed DIR --out RUN   # a checkpoint of the seed project

A merged model is read back and compared with the run, with pictures, before its folder gets its
name; past a tolerance nothing is written. The figures are in a certificate beside the weights.
"""

from __future__ import annotations

import argparse

from transformers.utils import logging

import config as configs
from assistant.flags import add_model_flags, load_assistant
from config import Config
from errors import PhiSightError, run_main
from exports import measure
from exports.llava import export_llava
from exports.measure import Tolerance
from exports.merge import export_merged
from exports.peft_adapter import export_peft, import_peft
from exports.prune import export_pruned
from exports.requantize import export_requantized
from exports.seed import import_seed
from model.build import DTYPES

GREEDY_EQUAL_IN_4_BITS = 90.0  # percent: NF4 rounds far coarser than 16 bits


def parser() -> configs.Parser:
    made = configs.Parser(prog="export.py", description=__doc__.splitlines()[0])
    what = made.add_mutually_exclusive_group(required=True)
    what.add_argument(
        "--merge",
        action="store_true",
        help="fold the adapter into the base: a plain Phi3ForCausalLM folder",
    )
    what.add_argument(
        "--llava",
        metavar="DIR",
        help="the whole model as LlavaForConditionalGeneration, with its processor",
    )
    what.add_argument(
        "--requantize",
        action="store_true",
        help="merged and in NF4 again, rounded with compensation (GPTQ)",
    )
    what.add_argument(
        "--prune",
        type=float,
        metavar="SHARE",
        help="merged, with this share of the MLP channels cut out",
    )
    what.add_argument("--peft", metavar="DIR", help="the adapter as a PEFT folder")
    what.add_argument("--import-peft", metavar="DIR", help="a PEFT adapter into a new run")
    what.add_argument(
        "--import-seed",
        metavar="DIR",
        help="a folder with lora_weights.pt and image_projector.pth into a new run",
    )
    made.add_argument("--out", help="folder to write, which must not be there yet")
    made.add_argument(
        "--split",
        action="store_true",
        help="with --peft: q, k, v, gate and up apart, as Llama names them",
    )
    made.add_argument(
        "--preset",
        default=configs.DEFAULT_PRESET,
        help="what an imported run is but for its adapter (%(default)s)",
    )
    made.add_argument(
        "--dtype", choices=tuple(DTYPES), default="bfloat16", help="of merged weights (%(default)s)"
    )
    made.add_argument(
        "--max-loss-difference",
        type=float,
        help="refuse past this, in nats an answer token (default:"
        f" {measure.LOSS_DIFFERENCE}; none for --prune)",
    )
    made.add_argument(
        "--min-greedy-equal",
        type=float,
        help="refuse below this percentage of equal greedy answers (default:"
        f" {measure.GREEDY_EQUAL}; {GREEDY_EQUAL_IN_4_BITS} for --requantize;"
        " none for --prune)",
    )
    made.add_argument(
        "--calibration",
        type=int,
        default=400,
        metavar="CONVERSATIONS",
        help="training conversations that --requantize and --prune look at (%(default)s)",
    )
    made.add_argument(
        "--evaluation-conversations",
        type=int,
        metavar="CONVERSATIONS",
        help="validation conversations that losses are measured on (default: as many"
        " as the training looked at)",
    )
    made.add_argument(
        "--greedy-answers",
        type=int,
        default=100,
        help="how many questions both models answer (%(default)s)",
    )
    add_model_flags(made)
    return made


def imported_config(options: argparse.Namespace) -> Config:
    """The preset, and where its base and CLIP lie."""
    given = {name: getattr(options, name) for name in ("base", "vision", "device")}
    config = configs.default_config(options.preset)
    return configs.replace(config, **{k: v for k, v in given.items() if v is not None})


def tolerance_of(options: argparse.Namespace) -> Tolerance | None:
    """What was typed, over what is usual for the kind of export; None where nothing is refused."""
    loss, equal = options.max_loss_difference, options.min_greedy_equal
    if options.prune is not None:
        if loss is None and equal is None:
            return None
        usual = (1e9, 0.0)  # the one that was not typed refuses nothing
    else:
        usual = (
            measure.LOSS_DIFFERENCE,
            GREEDY_EQUAL_IN_4_BITS if options.requantize else measure.GREEDY_EQUAL,
        )
    return Tolerance(usual[0] if loss is None else loss, usual[1] if equal is None else equal)


def export_model(options: argparse.Namespace) -> dict[str, object]:
    """Write a whole model in the form that was asked for. Returns its certificate."""
    out, dtype = options.llava or options.out, DTYPES[options.dtype]
    tolerance = tolerance_of(options)
    assistant = load_assistant(options)
    if options.evaluation_conversations is not None:
        assistant.config = configs.replace(
            assistant.config, evaluation_conversations=options.evaluation_conversations
        )
    probe = measure.make_probe(assistant, options.greedy_answers)
    if options.requantize:
        return export_requantized(assistant, out, dtype, probe, tolerance, options.calibration)
    if options.prune is not None:
        return export_pruned(
            assistant, out, dtype, probe, tolerance, options.prune, options.calibration
        )
    write = export_llava if options.llava else export_merged
    return write(assistant, out, dtype, probe, tolerance)


def main(arguments: list[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    tolerance_of(options)  # a bad number is told before anything is loaded
    logging.disable_progress_bar()  # of transformers' own loading and saving
    if options.split and not options.peft:
        raise PhiSightError("--split: goes with --peft only")
    if not (options.out or options.llava or options.peft):
        raise PhiSightError("--out: not given; name the folder to write")
    if options.import_peft:
        print(import_peft(options.import_peft, options.out, imported_config(options)))
    elif options.import_seed:
        print(import_seed(options.import_seed, options.out, imported_config(options)))
    elif options.peft:
        print(export_peft(load_assistant(options), options.peft, options.split))
    else:
        print(measure.summary(export_model(options), options.llava or options.out))
    return 0


if __name__ == "__main__":
    run_main(main)
