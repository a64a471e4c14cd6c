"""Take a trained model to other programs, and adapters of other programs in.

    python export.py --merge --out DIR          # plain Phi3ForCausalLM, with a certificate

What is written is read back and compared with the run before the folder gets its name.
"""

from __future__ import annotations

from transformers.utils import logging

import config as configs
from doors import measure
from doors.measure import Tolerance
from doors.merge import export_merged
from errors import PhiSightError, run_main
from infer import add_model_flags, load_assistant
from model.build import DTYPES


def parser() -> configs.Parser:
    made = configs.Parser(prog="export.py", description=__doc__.splitlines()[0])
    what = made.add_mutually_exclusive_group(required=True)
    what.add_argument("--merge", action="store_true",
                      help="fold the adapter into the base: a plain Phi3ForCausalLM folder")
    made.add_argument("--out", help="folder to write, which must not be there yet")
    made.add_argument("--dtype", choices=tuple(DTYPES), default="bfloat16",
                      help="of the written weights (%(default)s)")
    made.add_argument("--max-loss-difference", type=float, default=measure.LOSS_DIFFERENCE,
                      help="refuse past this, in nats an answer token (%(default)s)")
    made.add_argument("--min-greedy-equal", type=float, default=measure.GREEDY_EQUAL,
                      help="refuse below this percentage of equal greedy answers (%(default)s)")
    made.add_argument("--greedy-answers", type=int, default=100,
                      help="how many questions both models answer (%(default)s)")
    add_model_flags(made)
    return made


def main(arguments: list[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    tolerance = Tolerance(options.max_loss_difference, options.min_greedy_equal)
    logging.disable_progress_bar()  # of transformers' own loading and saving
    if options.merge:
        if not options.out:
            raise PhiSightError("--merge: needs --out, the folder to write")
        assistant = load_assistant(options)
        probe = measure.make_probe(assistant, options.greedy_answers)
        found = export_merged(assistant, options.out, DTYPES[options.dtype], probe, tolerance)
        print(measure.summary(found, options.out))
    return 0


if __name__ == "__main__":
    run_main(main)
