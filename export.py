"""Take a trained model to other programs, and take adapters of other programs in.

    python export.py --merge --out DIR             # plain Phi3ForCausalLM: text only
    python export.py --llava DIR                   # LlavaForConditionalGeneration: with pictures
    python export.py --peft DIR [--split]          # the adapter alone, for PEFT
    python export.py --import-peft DIR --out RUN   # and back, over --base and --vision
    python export.py --import-seed DIR --out RUN   # a checkpoint of the seed project

A merged model is read back and compared with the run, with pictures, before its folder gets its
name; past a tolerance nothing is written. The figures are in merge_certificate.json.
"""

from __future__ import annotations

import argparse

from transformers.utils import logging

import config as configs
from config import Config
from doors import measure
from doors.llava import export_llava
from doors.measure import Tolerance
from doors.merge import export_merged
from doors.peft_adapter import export_peft, import_peft
from doors.seed import import_seed
from errors import PhiSightError, run_main
from infer import add_model_flags, load_assistant
from model.build import DTYPES


def parser() -> configs.Parser:
    made = configs.Parser(prog="export.py", description=__doc__.splitlines()[0])
    what = made.add_mutually_exclusive_group(required=True)
    what.add_argument("--merge", action="store_true",
                      help="fold the adapter into the base: a plain Phi3ForCausalLM folder")
    what.add_argument("--llava", metavar="DIR",
                      help="the whole model as LlavaForConditionalGeneration, with its processor")
    what.add_argument("--peft", metavar="DIR", help="the adapter as a PEFT folder")
    what.add_argument("--import-peft", metavar="DIR", help="a PEFT adapter into a new run")
    what.add_argument("--import-seed", metavar="DIR",
                      help="a folder with lora_weights.pt and image_projector.pth into a new run")
    made.add_argument("--out", help="folder to write, which must not be there yet")
    made.add_argument("--split", action="store_true",
                      help="with --peft: q, k, v, gate and up apart, as Llama names them")
    made.add_argument("--preset", default=configs.DEFAULT_PRESET,
                      help="what an imported run is but for its adapter (%(default)s)")
    made.add_argument("--dtype", choices=tuple(DTYPES), default="bfloat16",
                      help="of merged weights (%(default)s)")
    made.add_argument("--max-loss-difference", type=float, default=measure.LOSS_DIFFERENCE,
                      help="refuse past this, in nats an answer token (%(default)s)")
    made.add_argument("--min-greedy-equal", type=float, default=measure.GREEDY_EQUAL,
                      help="refuse below this percentage of equal greedy answers (%(default)s)")
    made.add_argument("--greedy-answers", type=int, default=100,
                      help="how many questions both models answer (%(default)s)")
    add_model_flags(made)
    return made


def need_out(options: argparse.Namespace, flag: str) -> str:
    if not options.out:
        raise PhiSightError(f"{flag}: needs --out, the folder to write")
    return options.out


def imported_config(options: argparse.Namespace) -> Config:
    """The preset, and where its base and CLIP lie."""
    given = {name: getattr(options, name) for name in ("base", "vision", "device")}
    config = configs.default_config(options.preset)
    return configs.replace(config, **{k: v for k, v in given.items() if v is not None})


def main(arguments: list[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    tolerance = Tolerance(options.max_loss_difference, options.min_greedy_equal)
    logging.disable_progress_bar()  # of transformers' own loading and saving
    if options.split and not options.peft:
        raise PhiSightError("--split: goes with --peft only")
    if options.import_peft:
        print(import_peft(options.import_peft, need_out(options, "--import-peft"),
                          imported_config(options)))
    elif options.import_seed:
        print(import_seed(options.import_seed, need_out(options, "--import-seed"),
                          imported_config(options)))
    elif options.peft:
        print(export_peft(load_assistant(options), options.peft, options.split))
    else:
        out = options.llava or need_out(options, "--merge")
        assistant = load_assistant(options)
        probe = measure.make_probe(assistant, options.greedy_answers)
        export = export_llava if options.llava else export_merged
        found = export(assistant, out, DTYPES[options.dtype], probe, tolerance)
        print(measure.summary(found, out))
    return 0


if __name__ == "__main__":
    run_main(main)
