"""Write small models with random weights: a base of every family, an encoder of every kind.

    python -m tools.small cache/small                # cache/small/qwen3, cache/small/siglip2, ...

`--base` and `--vision` of the commands take each folder as they take a real model's.
"""

from __future__ import annotations

from pathlib import Path

from transformers.utils import logging

from config import Parser
from errors import run_main
from files import new_folder
from tools.small.bases import BASES, write_base
from tools.small.encoders import KINDS, write_encoder


def main() -> None:
    parser = Parser(prog="python -m tools.small", description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, help="folder to make, with a folder for each model")
    out = parser.parse_args().out
    logging.set_verbosity_error()  # of transformers: it advises on the configs written here
    logging.disable_progress_bar()
    with new_folder(out) as folder:
        for name in BASES:
            write_base(name, folder / name)
        for kind in KINDS:
            write_encoder(kind, folder / kind)
    print(f"{out}: bases {', '.join(BASES)}; picture encoders {', '.join(KINDS)}")


if __name__ == "__main__":
    run_main(main)
