"""What each choice of the default recipe is worth: trained with it and without it, seed by seed.

    python -m benchmarks.design_choices [--seeds 3] [--steps 300] [--pictures 2500] [--jobs 2]
    python -m benchmarks.design_choices --picture docs/design_choices.png

Every variant changes one thing of the tiny preset, and sees the same conversations of the picture
world once, in about the same number of steps: a step has as many rows as that takes. Of each run
are measured the validation loss of answer tokens (whatever it was trained on), exact answers to
held-out questions, and how far those fall with a swapped picture. Differences are taken between the
variant and the default run of the same seed, which has the same split, order and initial weights.

The runs are a sweep in `--out`/runs, so that a program that was stopped goes on where it was.
Prints a table; writes design_choices.md, .json and .png to `--out`.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import threads  # noqa: F401 (before torch is loaded)

import config as configs
from benchmarks.machine import describe_machine
from config import Config, Parser
from data.chat import ChatFormat, load_tokenizer
from data.features import FeatureStore
from data.prepare import TrainingData, prepare
from data.sampler import plan
from data.storage import bytes_per_picture
from data.world import write_world
from errors import PhiSightError, run_main
from evaluation.run_figures import FIGURES, RunFigures, read_run
from files import write_whole
from model.devices import choose_device
from model.projectors import picture_tokens
from model.vision import VisionTower, vision_of
from reports.dots import DotPanel, draw_dots
from reports.markdown import table
from sweeps.children import FINISHED, Sweep
from sweeps.plan import planned
from training.rows import room_of

DEFAULT = "default"
ROW_TOKENS = configs.default_config("tiny").row_tokens
PICTURE = "design_choices.png"


@dataclass(frozen=True)
class Variant:
    """One thing that is done otherwise."""

    name: str
    about: str
    """the default against this"""
    fields: dict[str, Any] = field(default_factory=dict)
    shows_bytes: bool = False
    """whether the point is what features take on the disk"""


VARIANTS = (
    Variant(DEFAULT, "the recipe of the tiny preset"),
    Variant("pooled", "patch tokens against one pooled token", {"vision_features": "pooled"}, True),
    Variant("pooling-2", "each patch against 2 x 2 averaged", {"feature_pooling": 2}, True),
    Variant("int8", "float16 features against int8", {"feature_storage": "int8"}, True),
    Variant(
        "two-projections",
        "four projections against o_proj and down_proj",
        {"lora_targets": ["o_proj", "down_proj"]},
    ),
    Variant("all-text", "answer labels against labels on all text", {"supervise": "all"}),
    Variant("frozen", "trained projector against a frozen one", {"train_projector": False}),
    Variant("16-bit", "NF4 base against an unquantised one", {"quantization": "none"}),
    # Padded to the longest conversation, as nothing else is needed there.
    Variant("padded", "packed rows against one a row, padded", {"pack": False, "row_tokens": 0}),
)


@dataclass(frozen=True)
class Measure:
    """A column of the table: a figure of a run, and how a difference of it is shown."""

    figure: str
    title: str
    unit: str
    pattern: str
    lower_is_better: bool
    is_ratio: bool = False
    """compared as a factor, and not as a difference"""


MEASURES = (
    Measure("validation_loss", "validation loss", "nats", "+.4f", True),
    Measure("held_out", "held out, exact", "points", "+.1f", False),
    Measure("held_out_alignment", "right minus swapped", "points", "+.1f", False),
    Measure("seconds", "training time", "x", ".2f", True, is_ratio=True),
    Measure("tokens_per_second", "tokens a second", "x", ".2f", False, is_ratio=True),
)


# -- the same conversations in about the same steps -----------------------------------------------


@dataclass(frozen=True)
class Setup:
    """What the runs of one variant are given beside its own fields, and what its data take."""

    batch_size: int
    steps: int
    conversations: int
    tokens: int
    features: int
    """bytes of the features of a picture on the disk"""


def prepared(config: Config) -> tuple[TrainingData, FeatureStore]:
    """The data of a run; features that are not there are computed, before two runs do so."""
    vision = vision_of(config)
    store = FeatureStore(config.features, vision.key, vision.shape, config.feature_storage)
    tokens = picture_tokens(config, vision.shape[0])
    chat_format = ChatFormat.from_tokenizer(load_tokenizer(config.base), tokens)
    device, _ = choose_device(config.device)
    data = prepare(config, chat_format, store, lambda: VisionTower(vision, device), positions=0)
    return data, store


def rows_of_epoch(config: Config, data: TrainingData) -> int:
    """How many rows the conversations take."""
    lengths = data.train.lengths
    return len(plan(config.seed, 0, lengths, room_of(config, lengths)))


def set_up(
    shared: Mapping[str, Any], steps: int, variants: Sequence[Variant] = VARIANTS
) -> tuple[dict[str, Any], dict[str, Setup]]:
    """The fields of all runs, with the share of the pictures that makes about so many steps of the
    default recipe; and for each variant, of which the default is the first, as many rows a step as
    give it as many steps."""
    config = configs.replace(configs.default_config("tiny"), **shared)
    whole = -(-rows_of_epoch(config, prepared(config)[0]) // config.batch_size)
    shared = {**shared, "data_fraction": min(1.0, steps / whole)}
    setups: dict[str, Setup] = {}
    for variant in variants:
        fields = {n: tuple(v) if isinstance(v, list) else v for n, v in variant.fields.items()}
        config = configs.replace(configs.default_config("tiny"), **shared | fields)
        data, store = prepared(config)
        rows = rows_of_epoch(config, data)
        batch_size = config.batch_size
        if setups:
            batch_size = max(1, round(rows / setups[DEFAULT].steps))
        setups[variant.name] = Setup(
            batch_size,
            -(-rows // batch_size),
            len(data.train),
            sum(data.train.lengths),
            bytes_per_picture(store.shape, config.feature_storage),
        )
        print(f"{variant.name}: {batch_size} rows a step, {setups[variant.name].steps} steps")
    return shared, setups


def sweep_tables(
    shared: Mapping[str, Any],
    setups: Mapping[str, Setup],
    seeds: int,
    variants: Sequence[Variant] = VARIANTS,
) -> dict[str, Any]:
    """The runs as the tables of a sweep: every seed of every variant."""
    choices = [
        {"name": v.name, "batch_size": setups[v.name].batch_size, "row_tokens": ROW_TOKENS}
        | v.fields
        for v in variants
        if v.name in setups
    ]
    return {"run": dict(shared), "sweep": {"seed": [*range(seeds)], "variant": choices}}


def others(setups: Mapping[str, Setup]) -> list[Variant]:
    """All variants that were tried but the default."""
    return [variant for variant in VARIANTS[1:] if variant.name in setups]


# -- differences, seed by seed --------------------------------------------------------------------

Figures = dict[str, dict[int, RunFigures]]
"""variant -> seed -> its run"""


def differences(runs: Figures, variant: str, measure: Measure) -> list[float]:
    """Of the variant and the default, for every seed that has both."""
    pairs = [
        (run.figures[measure.figure], runs[DEFAULT][seed].figures[measure.figure])
        for seed, run in runs[variant].items()
        if seed in runs[DEFAULT]
    ]
    return [
        here / there if measure.is_ratio else here - there
        for here, there in pairs
        if here is not None and there is not None and (there or not measure.is_ratio)
    ]


def seen(runs: Figures, variant: str) -> str:
    """In which figures of quality all seeds agree that it is better, or worse, than the default."""
    found: dict[str, list[str]] = {"worse": [], "better": []}
    for measure in MEASURES:
        values = [] if measure.is_ratio else differences(runs, variant, measure)
        signs = {(value > 0) - (value < 0) for value in values}
        if len(values) > 1 and len(signs) == 1 and signs != {0}:
            is_better = (signs == {-1}) == measure.lower_is_better
            found["better" if is_better else "worse"].append(measure.title)
    told = [f"{how} in every seed: {', '.join(titles)}" for how, titles in found.items() if titles]
    return "; ".join(told) or "no figure on which all seeds agree"


def mean_and_range(values: Sequence[float], pattern: str) -> str:
    if not values:
        return "-"
    mean, low, high = (format(v, pattern) for v in (statistics.fmean(values), *ends(values)))
    return mean if len(values) == 1 else f"{mean} ({low} to {high})"


def ends(values: Sequence[float]) -> tuple[float, float]:
    return min(values), max(values)


def markdown(runs: Figures, setups: Mapping[str, Setup]) -> str:
    """The default's own figures, then every variant's differences from it."""
    titles = [
        f"{m.title}, {'factor' if m.is_ratio else m.unit}" for m in MEASURES
    ]  # fmt: skip
    default = [
        mean_and_range(
            [v for r in runs[DEFAULT].values() if (v := r.figures[m.figure]) is not None],
            FIGURES[m.figure].pattern,
        )
        for m in MEASURES
    ]
    steps, seen_once = str(setups[DEFAULT].steps), f"{setups[DEFAULT].conversations:,}"
    own = table(
        ["the default", *(m.title for m in MEASURES), "steps", "conversations"],
        [["mean (range)", *default, steps, seen_once]],
    )
    rows = []
    for variant in others(setups):
        setup = setups[variant.name]
        cells = [
            mean_and_range(differences(runs, variant.name, measure), measure.pattern)
            for measure in MEASURES
        ]
        features = f"{setup.features:,}" if variant.shows_bytes else "as the default"
        work = f"{setup.steps} x {setup.batch_size} rows, {setup.tokens / 1e6:.2f} M tokens"
        rows.append([variant.about, *cells, features, work, seen(runs, variant.name)])
    heads = ["the default against", *titles, "bytes a picture", "training", "seen"]
    return (
        f"{own}\n\nFeatures of the default take {setups[DEFAULT].features:,} bytes a picture on the"
        f" disk, its training {setups[DEFAULT].tokens / 1e6:.2f} M tokens. Differences from the"
        " default of the same seed, the second choice minus the first, mean (range):"
        f"\n\n{table(heads, rows)}\n"
    )


def picture(runs: Figures, setups: Mapping[str, Setup], out: Path) -> None:
    """The differences of quality, a dot a seed."""
    panels = [
        DotPanel(
            f"{m.title}, {m.unit}",
            m.lower_is_better,
            [differences(runs, variant.name, m) for variant in others(setups)],
        )
        for m in MEASURES
        if not m.is_ratio
    ]
    draw_dots([variant.about for variant in others(setups)], panels, out)


def as_json(runs: Figures, setups: Mapping[str, Setup]) -> dict[str, Any]:
    """All figures of all runs, and the differences."""
    return {
        "machine": describe_machine(),
        "setups": {name: vars(setup) for name, setup in setups.items()},
        "runs": {
            name: {str(seed): run.figures for seed, run in of.items()} for name, of in runs.items()
        },
        "differences": {
            variant.name: {m.figure: differences(runs, variant.name, m) for m in MEASURES}
            for variant in others(setups)
        },
    }


# -- the command ----------------------------------------------------------------------------------


def measured(
    out: Path, tables: Mapping[str, Any], jobs: int, say: Callable[[str], None] = print
) -> Figures:
    """Train and ask what is not finished, and read all of it. Raises `PhiSightError` where a run
    failed or was stopped: a table over a part would mislead."""
    runs = planned(tables, "the design choices")
    outcomes, stopped = Sweep(out / "runs", jobs, evaluate=True, say=say).run(runs)
    if stopped:
        raise PhiSightError("stopped: the same command goes on from there")
    if bad := [o for o in outcomes if o.state != FINISHED]:
        raise PhiSightError(
            f"{len(bad)} runs are not finished, the first: {bad[0].run.name}:"
            f" {bad[0].error or bad[0].state}; the same command tries them again"
        )
    figures: Figures = {run.choices["variant"]: {} for run in runs}
    for run in runs:
        found = read_run(out / "runs" / run.name)
        figures[run.choices["variant"]][int(run.choices["seed"])] = found
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
            "novel_pair_questions": "",
            "features": str(out / "features"),
            "validation_fraction": 0.1,
            "evaluation_conversations": 400,
            "evaluate_steps": 10**6,  # at the end alone
            "save_steps": 100,
        },
        options.steps,
        variants_of(options.only),
    )
    runs = measured(out, sweep_tables(shared, setups, options.seeds), options.jobs)
    text = markdown(runs, setups)
    written = json.dumps(as_json(runs, setups), indent=1)
    write_whole(out / "design_choices.md", text.encode())
    write_whole(out / "design_choices.json", (written + "\n").encode())
    picture(runs, setups, Path(options.picture or out / PICTURE))
    print(f"\n{text}")
    return 0


def variants_of(only: str) -> list[Variant]:
    """The default and the variants that are named, or all."""
    names = [name.strip() for name in only.split(",") if name.strip()]
    known = [variant.name for variant in VARIANTS]
    if unknown := [name for name in names if name not in known]:
        raise PhiSightError(f"--only {unknown[0]}: choose from {', '.join(known)}")
    return [v for v in VARIANTS if not names or v.name in names or v.name == DEFAULT]


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = Parser(prog="benchmarks.design_choices", description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3, help="runs of every variant (3)")
    parser.add_argument("--steps", type=int, default=300, help="of the default recipe, about (300)")
    parser.add_argument("--pictures", type=int, default=2500, help="of the picture world (2500)")
    parser.add_argument("--held-out", type=int, default=100, help="pictures asked about (100)")
    parser.add_argument("--jobs", type=int, default=2, help="runs at once (2)")
    parser.add_argument("--out", default="runs/design_choices", help="folder (%(default)s)")
    parser.add_argument("--only", default="", help="variants beside the default, by comma (all)")
    parser.add_argument("--picture", help="where the plot goes (design_choices.png of --out)")
    options = parser.parse_args(arguments)
    for name in ("seeds", "steps", "pictures", "held_out", "jobs"):
        if getattr(options, name) < 1:
            raise PhiSightError(f"{configs.flag_of(name)}: must be at least 1")
    return options


if __name__ == "__main__":
    run_main(main)
