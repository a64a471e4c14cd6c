"""What each projector is worth on the tiny preset: accuracy, tokens a picture, seconds.

    python -m benchmarks.projectors [--seeds 3] [--steps 1000] [--threads 1]
    python -m benchmarks.projectors --finished      # the table of the runs that are there

Every projector sees the same conversations of the picture world once, in about the same number of
steps: where a picture has fewer tokens, a step has fewer rows. Of each run are asked the questions
about held-out pictures, about the same with another picture in their place, and about pairs of
attributes that were never trained on. Seeds are those of the split, the order and the weights.

The runs are a sweep in `--out`/runs, so that a program that was stopped goes on where it was.
Prints a table, which is written to `--out`/projectors.md.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import threads  # noqa: F401 (before torch is loaded)

import checkpoints
import config as configs
from benchmarks.design_choices import (
    DEFAULT,
    Figures,
    Setup,
    Variant,
    mean_and_range,
    measured,
    set_up,
    sweep_tables,
)
from config import Parser
from data.world import write_world
from errors import PhiSightError, run_main
from evaluation.run_figures import RunFigures, last, read_run, training_seconds
from files import write_whole
from reports.markdown import table
from sweeps.plan import planned

QUERIES = 9  # of the resampler: as many tokens as 2 x 2 patches together leave of 36
VARIANTS = (
    Variant(DEFAULT, "mlp"),
    Variant("linear", "linear", {"projector": "linear"}),
    Variant("pixel-shuffle", "pixel-shuffle", {"projector": "pixel-shuffle"}),
    Variant(
        "resampler",
        f"resampler, {QUERIES} queries",
        {"projector": "resampler", "projector_queries": QUERIES},
    ),
)
ASKED = {
    "held_out": "held out, exact %",
    "swapped": "the same, another picture",
    "novel_pairs": "novel pairs, exact %",
}


def sizes_of(run: RunFigures) -> tuple[int, int]:
    """Tokens of a picture in the text, and parameters of the projector, as its checkpoint says."""
    saved = checkpoints.resolve(run.path)
    shapes = (row["shape"] for row in saved.manifest["tensors"] if row["owner"] == "projector")
    return saved.config["picture_tokens"], sum(map(math.prod, shapes))


def markdown(runs: Figures, setups: Mapping[str, Setup]) -> str:
    """A row for each projector; of its figures the mean and the range over the seeds."""
    rows: list[Sequence[str]] = []
    for variant in (v for v in VARIANTS if runs.get(v.name)):
        of, setup = [*runs[variant.name].values()], setups[variant.name]
        tokens, parameters = sizes_of(of[0])
        figures: list[tuple[list[Any], str]] = [
            *(([run.evaluation.get(name) for run in of], ".1f") for name in ASKED),
            ([last(run, "evaluation", "validation_loss") for run in of], ".4f"),
            ([training_seconds(run) for run in of], ",.0f"),
        ]
        cells = [
            mean_and_range([v for v in values if v is not None], pattern)
            for values, pattern in figures
        ]
        work = f"{setup.steps} x {setup.batch_size} rows, {setup.tokens / 1e6:.2f} M tokens"
        rows.append([variant.about, str(tokens), f"{parameters:,}", *cells, work, str(len(of))])
    heads = ["projector", "tokens a picture", "parameters", *ASKED.values()]
    return table([*heads, "validation loss", "training, s", "training", "seeds"], rows) + "\n"


def finished(out: Path, tables: Mapping[str, Any]) -> Figures:
    """The runs of the sweep that are finished and were asked."""
    figures: Figures = {}
    for run in planned(tables, "the projectors"):
        folder = out / "runs" / run.name
        found = read_run(folder) if folder.is_dir() else None
        if found and found.finished and found.evaluation:
            seeds = figures.setdefault(run.choices["variant"], {})
            seeds[int(run.choices["seed"])] = found
    return figures


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    out = Path(options.out)
    write_world(out / "world", options.pictures, options.held_out)
    shared, setups = set_up(
        {
            "data": str(out / "world/train.json"),
            "images": str(out / "world/images"),
            "held_out_questions": str(out / "world/held_out.jsonl"),
            "novel_pair_questions": str(out / "world/novel_pairs.jsonl"),
            "features": str(out / "features"),
            "threads": options.threads,
        },
        options.steps,
        VARIANTS,
    )
    tables = sweep_tables(shared, setups, options.seeds, VARIANTS)
    runs = finished(out, tables) if options.finished else measured(out, tables, options.jobs)
    text = markdown(runs, setups)
    write_whole(out / "projectors.md", text.encode())
    print(f"\n{text}")
    return 0


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = Parser(prog="benchmarks.projectors", description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3, help="runs of every projector (3)")
    parser.add_argument("--steps", type=int, default=1000, help="of the MLP, about, at most (1000)")
    parser.add_argument("--pictures", type=int, default=8000, help="of the picture world (8000)")
    parser.add_argument("--held-out", type=int, default=100, help="pictures asked about (100)")
    parser.add_argument("--jobs", type=int, default=1, help="runs at once (1)")
    parser.add_argument("--threads", type=int, default=1, help="of a run (1)")
    parser.add_argument("--out", default="runs/projectors", help="folder (%(default)s)")
    parser.add_argument(
        "--finished", action="store_true", help="train nothing: the table of what is finished"
    )
    options = parser.parse_args(arguments)
    for name in ("seeds", "steps", "pictures", "held_out", "jobs", "threads"):
        if getattr(options, name) < 1:
            raise PhiSightError(f"{configs.flag_of(name)}: must be at least 1")
    return options


if __name__ == "__main__":
    run_main(main)
