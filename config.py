"""What a run is: one frozen dataclass, its presets, its validation, and its command line.

The defaults are the full-size recipe (Phi-3.5-mini, CLIP ViT-L/14-336, one GPU). A preset overrides
fields and says why beside each. Every field is a flag: `batch_size` is `--batch-size`.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn

from errors import PhiSightError

DEFAULT_PRESET = "tiny"
LORA_TARGETS = ("qkv_proj", "o_proj", "gate_up_proj", "down_proj")


def _doc(default: object, text: str, choices: tuple[str, ...] | None = None) -> typing.Any:
    return field(default=default, metadata={"help": text, "choices": choices})


@dataclass(frozen=True)
class Config:
    """Everything a run depends on. Every checkpoint holds it; a resume compares it by field.

    Units: tokens, pictures, rows, optimiser steps; seconds and minutes where the name says so.
    """

    # -- what is trained ---------------------------------------------------------------------------
    base: str = _doc("microsoft/Phi-3.5-mini-instruct", "Phi-3 base: hub id or local folder")
    base_revision: str = _doc("", "hub revision of the base; empty for the newest")
    vision: str = _doc(
        "openai/clip-vit-large-patch14-336",
        "CLIP: hub id or local folder; the smaller"
        " openai/clip-vit-base-patch32 gives 49 tokens a picture, or one with"
        " --vision-features pooled",
    )
    vision_revision: str = _doc("", "hub revision of the CLIP; empty for the newest")
    base_cache: str = _doc(
        "cache/bases",
        "folder that keeps the quantised base, so that the next start reads it"
        " (about 2.5 GB for Phi-3.5-mini) and does not quantise again; empty for none",
    )
    quantization: str = _doc(
        "nf4", "how the base's linear weights are kept", ("nf4", "nf4-nested", "none")
    )
    vision_features: str = _doc(
        "patches", "picture tokens: every patch, or one pooled vector", ("patches", "pooled")
    )
    vision_layer: int = _doc(-2, "hidden layer of the CLIP that patch features are taken from")
    feature_pooling: int = _doc(
        1, "average N x N patches into one token; 2 leaves 144 of the 576 of CLIP L/14 at 336"
    )
    feature_storage: str = _doc(
        "float16",
        "how stored picture features are kept; int8 halves the disk",
        ("float16", "int8"),
    )
    train_lora: bool = _doc(
        True, "train the adapter too; without, the projector alone, as LLaVA's first stage does"
    )
    start_from: str = _doc(
        "", "run or checkpoint whose weights to begin with, such as those of a first stage"
    )
    lora_rank: int = _doc(16, "rank of A and B")
    lora_alpha: float = _doc(16.0, "B A is scaled by alpha / rank")
    lora_dropout: float = _doc(0.05, "dropout on the input of A")
    lora_targets: tuple[str, ...] = _doc(LORA_TARGETS, "names of the layers that get an adapter")

    # -- what listens ------------------------------------------------------------------------------
    speech: str = _doc("base", "Whisper that hears questions: one of its names, or a .pt file")

    # -- data --------------------------------------------------------------------------------------
    data: str = _doc("", "conversations: a JSON in the form of LLaVA-Instruct-150K, or JSONL")
    images: str = _doc("", "folder that the picture names in the data are relative to")
    held_out_questions: str = _doc("", "JSONL of questions about held-out pictures (POPE's form)")
    novel_pair_questions: str = _doc("", "JSONL of questions about combinations never trained on")
    data_fraction: float = _doc(1.0, "share of the training pictures to use")
    validation_fraction: float = _doc(0.05, "share of the pictures kept for validation")
    max_text_tokens: int = _doc(256, "longest conversation, picture tokens not counted")
    row_tokens: int = _doc(0, "length of a packed row; 0 for one longest conversation")
    strict: bool = _doc(False, "stop at the first bad record instead of quarantining it")

    # -- optimisation ------------------------------------------------------------------------------
    epochs: int = _doc(1, "passes over the training data")
    max_steps: int = _doc(0, "end after this many optimiser steps; 0 for whole epochs")
    batch_size: int = _doc(8, "packed rows a micro-batch")
    accumulation: int = _doc(4, "micro-batches an optimiser step")
    learning_rate: float = _doc(5e-4, "peak learning rate of the adapter")
    schedule: str = _doc("linear", "after the warm-up", ("linear", "cosine", "constant"))
    warmup_fraction: float = _doc(0.1, "share of the steps that warm up")
    weight_decay: float = _doc(0.0, "decoupled weight decay")
    adam_beta1: float = _doc(0.9, "AdamW: decay of the first moment")
    adam_beta2: float = _doc(0.999, "AdamW: decay of the second moment")
    adam_epsilon: float = _doc(1e-8, "AdamW: added to the root of the second moment")
    max_gradient_norm: float = _doc(1.0, "gradients are clipped to this global norm")
    gradient_checkpointing: bool = _doc(True, "recompute activations in the backward pass")
    seed: int = _doc(0, "of the split, the order, the initial weights and the dropout")

    # -- evaluation, saving, logging ---------------------------------------------------------------
    evaluate_steps: int = _doc(50, "evaluate every so many steps; 0 for never")
    evaluation_conversations: int = _doc(200, "validation conversations an evaluation looks at")
    early_stopping: int = _doc(0, "stop after so many evaluations without a better loss; 0 never")
    save_steps: int = _doc(25, "save every so many steps")
    save_every_minutes: float = _doc(0.0, "save as well every so many minutes; 0 for never")
    keep_checkpoints: int = _doc(1, "checkpoints kept; older ones go once the newest is verified")
    log_steps: int = _doc(25, "write metrics every so many steps")

    # -- where and on what -------------------------------------------------------------------------
    run: str = _doc("runs/phi35", "folder of the run: checkpoints, metrics, curves")
    features: str = _doc("cache/features", "folder of the picture feature store")
    device: str = _doc("auto", "where to compute", ("auto", "cpu", "cuda"))
    compute_type: str = _doc(
        "auto", "type of the forward pass", ("auto", "float32", "bfloat16", "float16")
    )
    threads: int = _doc(0, "CPU threads; 0 for all cores, shared among the processes")
    deterministic: bool = _doc(
        True, "algorithms that give the same bits every time; without them a resume is not exact"
    )


TINY: dict[str, object] = {
    # Two cores, about 1 M weights, one epoch of 20,000 short conversations: see the README.
    "base": "assets/tiny/phi3",
    "vision": "assets/tiny/clip",
    "base_cache": "",  # a base of a million weights is quantised sooner than it is looked up
    "speech": "assets/tiny/whisper/tiny.pt",  # hears the world's own questions, in English
    "data": "cache/world/train.json",
    "images": "cache/world/images",
    "held_out_questions": "cache/world/held_out.jsonl",
    "novel_pair_questions": "cache/world/novel_pairs.jsonl",
    "run": "runs/tiny",
    # The shortest length that the conversations (mostly 40 to 150 tokens) fill to 97 %.
    "row_tokens": 352,
    "batch_size": 6,  # about 2,000 tokens a step, so that one epoch makes 900 steps
    "accumulation": 1,  # a small model learns more from many small steps than from few large ones
    "learning_rate": 3e-3,  # a narrow model takes, and needs, a higher rate than a wide one
    "gradient_checkpointing": False,  # memory is not short; computing twice would cost a third
    "evaluate_steps": 200,  # an evaluation takes as long as ten steps
    "evaluation_conversations": 100,
    "save_steps": 100,  # a step takes a quarter of a second; saving every 25 would be felt
}

# A checkpoint of before these fields were there lacks them, and did what these values do.
ADDED_LATER: dict[str, object] = {"base_cache": "", "speech": Config.speech}

PRESETS: dict[str, dict[str, object]] = {"phi35": {}, "tiny": TINY}


def default_config(preset: str) -> Config:
    """The named preset as a `Config`."""
    if preset not in PRESETS:
        raise PhiSightError(f"preset {preset!r}: unknown; choose from {', '.join(sorted(PRESETS))}")
    return Config(**PRESETS[preset])


def replace(config: Config, **fields: object) -> Config:
    """`config` with some fields replaced, validated."""
    config = dataclasses.replace(config, **fields)
    validate(config)
    return config


# -- validation -----------------------------------------------------------------------------------


def validate(config: Config) -> None:
    """Collect every problem of the config and raise them as one `PhiSightError`."""
    problems = []

    def need(good: bool, name: str, wanted: str) -> None:
        if not good:
            problems.append(
                f"--{name.replace('_', '-')} must be {wanted}, not {getattr(config, name)!r}"
            )

    for spec in dataclasses.fields(config):
        choices = spec.metadata["choices"]
        if choices:
            need(getattr(config, spec.name) in choices, spec.name, "one of " + ", ".join(choices))
    for name in (
        "feature_pooling",
        "lora_rank",
        "max_text_tokens",
        "epochs",
        "batch_size",
        "accumulation",
        "save_steps",
        "log_steps",
        "keep_checkpoints",
        "evaluation_conversations",
    ):
        need(getattr(config, name) >= 1, name, "at least 1")
    for name in ("row_tokens", "max_steps", "evaluate_steps", "early_stopping"):
        need(getattr(config, name) >= 0, name, "0 or more")
    for name in ("weight_decay", "save_every_minutes"):
        need(0 <= getattr(config, name) < float("inf"), name, "0 or more, and finite")
    # Far more threads than any machine has would end the process when they are started.
    need(0 <= config.threads <= 1024, "threads", "from 0 to 1024")
    for name in ("learning_rate", "lora_alpha", "max_gradient_norm", "adam_epsilon"):
        need(0 < getattr(config, name) < float("inf"), name, "a positive number")
    for name in ("lora_dropout", "warmup_fraction", "adam_beta1", "adam_beta2"):
        need(0 <= getattr(config, name) < 1, name, "from 0 to under 1")
    need(0 <= config.seed < 2**32, "seed", "from 0 to 4294967295")  # what every generator takes
    need(0 < config.data_fraction <= 1, "data_fraction", "over 0 and at most 1")
    need(0 < config.validation_fraction < 1, "validation_fraction", "between 0 and 1")
    need(len(config.lora_targets) > 0, "lora_targets", "at least one layer name")
    need(bool(config.run), "run", "a folder")
    if problems:
        raise PhiSightError("config: " + "; ".join(problems))


# -- the command line -----------------------------------------------------------------------------


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are `PhiSightError`s and name the nearest flag."""

    def error(self, message: str) -> NoReturn:
        prefix = "unrecognized arguments: "
        if message.startswith(prefix):
            unknown = message.removeprefix(prefix).split()[0]
            commands = [
                p
                for action in self._actions
                if isinstance(action, argparse._SubParsersAction)
                for p in action.choices.values()
            ]
            flags = [
                flag
                for parser in (self, *commands)
                for action in parser._actions
                for flag in action.option_strings
            ]
            near = difflib.get_close_matches(unknown.split("=")[0], flags, n=1, cutoff=0.5)
            remedy = f"did you mean {near[0]}?" if near else f"see {self.prog} --help"
            raise PhiSightError(f"{unknown}: no such flag; {remedy}")
        raise PhiSightError(f"{self.prog}: {message}; see {self.prog} --help")

    def __init__(self, **settings: typing.Any) -> None:
        super().__init__(allow_abbrev=False, **settings)


def _boolean(text: str) -> bool:
    if text.lower() in ("true", "yes", "1", "on"):
        return True
    if text.lower() in ("false", "no", "0", "off"):
        return False
    raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false")


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip())


def add_config_flags(parser: argparse.ArgumentParser) -> None:
    """One flag per config field, plus `--preset`. A flag not given keeps the preset's value."""
    parser.add_argument("--preset", default=None, help=f"one of {', '.join(sorted(PRESETS))}")
    hints = typing.get_type_hints(Config)
    for spec in dataclasses.fields(Config):
        flag = "--" + spec.name.replace("_", "-")
        kind, text = hints[spec.name], spec.metadata["help"] + f" (default: {spec.default!r})"
        if kind is bool:
            parser.add_argument(
                flag,
                dest=spec.name,
                type=_boolean,
                nargs="?",
                const=True,
                default=argparse.SUPPRESS,
                metavar="BOOL",
                help=text.replace("%", "%%"),
            )
            parser.add_argument(
                "--no-" + flag.removeprefix("--"),
                dest=spec.name,
                action="store_const",
                const=False,
                default=argparse.SUPPRESS,
                help=f"the same as {flag} false",
            )
            continue
        parse = _names if typing.get_origin(kind) is tuple else kind
        parser.add_argument(
            flag,
            dest=spec.name,
            type=parse,
            default=argparse.SUPPRESS,
            metavar=spec.name.upper(),
            help=text.replace("%", "%%"),
        )


def given_fields(options: argparse.Namespace) -> dict[str, object]:
    """The config fields that the person typed."""
    names = {spec.name for spec in dataclasses.fields(Config)}
    return {name: value for name, value in vars(options).items() if name in names}


def config_from_options(options: argparse.Namespace) -> Config:
    """Preset, then flags, then validation."""
    return replace(default_config(options.preset or DEFAULT_PRESET), **given_fields(options))


def to_dict(config: Config) -> dict[str, object]:
    """Plain JSON values; the inverse of `from_dict`."""
    return {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in dataclasses.asdict(config).items()
    }


def from_dict(values: dict[str, object], where: str) -> Config:
    """A `Config` from the JSON of a checkpoint; unknown, missing or ill-typed fields are errors."""
    hints = typing.get_type_hints(Config)
    values = ADDED_LATER | values
    missing, unknown = sorted(hints.keys() - values.keys()), sorted(values.keys() - hints.keys())
    if missing or unknown:
        raise PhiSightError(
            f"{where}: its config lacks {missing or 'nothing'} and has unknown"
            f" {unknown or 'nothing'}; it was written by another version of PhiSight"
        )
    clean = {}
    for name, value in values.items():
        kind = hints[name]
        if typing.get_origin(kind) is tuple:
            good = isinstance(value, list) and all(isinstance(item, str) for item in value)
            value = tuple(value) if good else value
        elif kind is float:
            good = isinstance(value, (int, float)) and not isinstance(value, bool)
            value = float(value) if good else value
        else:
            good = type(value) is kind
        if not good:
            raise PhiSightError(f"{where}: config field {name} is {value!r}; expected {kind}")
        clean[name] = value
    config = Config(**clean)
    validate(config)
    return config


def need_file(path: str, flag: str, remedy: str) -> Path:
    """The path of an input file that has to be there."""
    if not path:
        raise PhiSightError(f"{flag}: not given; {remedy}")
    if not Path(path).is_file():
        raise PhiSightError(f"{path}: no such file; {remedy}")
    return Path(path)
