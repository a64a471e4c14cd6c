"""What a run is: one frozen dataclass, its presets and its validation.

The defaults are the full-size recipe (Phi-3.5-mini, CLIP ViT-L/14-336, one GPU). A preset overrides
fields and says why beside each. All that is known of a field stands in its one declaration below:
`training/options.py` makes a flag of it (`batch_size` is `--batch-size`), `training/config_file.py`
a key of a `--config` file.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from errors import PhiSightError

DEFAULT_PRESET = "tiny"
LORA_TARGETS = ("qkv_proj", "o_proj", "gate_up_proj", "down_proj")
QUANTIZATIONS = ("nf4", "nf4-nested", "none")
FEATURE_STORAGES = ("float16", "int8")
SCHEDULES = ("linear", "cosine", "constant")


@dataclass(frozen=True)
class Bounds:
    """Which values a field may have: in words, for the error, and as a predicate."""

    words: str
    hold: Callable[[Any], bool]


AT_LEAST_1 = Bounds("at least 1", lambda value: value >= 1)
NOT_NEGATIVE = Bounds("0 or more", lambda value: value >= 0)
FINITE = Bounds("0 or more, and finite", lambda value: 0 <= value < float("inf"))
POSITIVE = Bounds("a positive number", lambda value: 0 < value < float("inf"))
UNDER_1 = Bounds("from 0 to under 1", lambda value: 0 <= value < 1)
# Far more threads than any machine has would end the process when they are started.
THREADS = Bounds("from 0 to 1024", lambda value: 0 <= value <= 1024)
SEEDS = Bounds("from 0 to 4294967295", lambda value: 0 <= value < 2**32)  # what generators take


def _field(
    default: Any,
    text: str,
    *,
    choices: tuple[str, ...] | None = None,
    bounds: Bounds | None = None,
    changes_result: bool = True,
    old_checkpoints: Any = dataclasses.MISSING,
) -> Any:
    """Declare a field.

    Args:
        text: the help of its flag.
        changes_result: False where the field says where things lie, how often something is written
            or what listens later, and never what the next step computes: it may then differ
            between a checkpoint and the run that resumes it.
        old_checkpoints: the value that describes the checkpoints written before the field existed;
            without one, a checkpoint that lacks the field is refused.
    """
    if choices:
        bounds = Bounds("one of " + ", ".join(choices), lambda value: value in choices)
    metadata = {
        "help": text,
        "choices": choices,
        "bounds": bounds,
        "changes_result": changes_result,
        "old_checkpoints": old_checkpoints,
    }
    return dataclasses.field(default=default, metadata=metadata)


@dataclass(frozen=True)
class Config:
    """Everything a run depends on. Every checkpoint holds it; a resume compares it by field.

    Units: tokens, pictures, rows, optimiser steps; seconds and minutes where the name says so.
    """

    # -- what is trained ---------------------------------------------------------------------------
    base: str = _field("microsoft/Phi-3.5-mini-instruct", "Phi-3 base: hub id or local folder")
    base_revision: str = _field("", "hub revision of the base; empty for the newest")
    vision: str = _field(
        "openai/clip-vit-large-patch14-336",
        "CLIP: hub id or local folder; the smaller"
        " openai/clip-vit-base-patch32 gives 49 tokens a picture, or one with"
        " --vision-features pooled",
    )
    vision_revision: str = _field("", "hub revision of the CLIP; empty for the newest")
    base_cache: str = _field(
        "cache/bases",
        "folder that keeps the quantised base, so that the next start reads it"
        " (about 2.5 GB for Phi-3.5-mini) and does not quantise again; empty for none",
        changes_result=False,
        old_checkpoints="",
    )
    quantization: str = _field(
        "nf4", "how the base's linear weights are kept", choices=QUANTIZATIONS
    )
    vision_features: str = _field(
        "patches",
        "picture tokens: every patch, or one pooled vector",
        choices=("patches", "pooled"),
    )
    vision_layer: int = _field(-2, "hidden layer of the CLIP that patch features are taken from")
    feature_pooling: int = _field(
        1,
        "average N x N patches into one token; 2 leaves 144 of the 576 of CLIP L/14 at 336",
        bounds=AT_LEAST_1,
    )
    feature_storage: str = _field(
        "float16",
        "how stored picture features are kept; int8 halves the disk",
        choices=FEATURE_STORAGES,
    )
    train_lora: bool = _field(
        True, "train the adapter too; without, the projector alone, as LLaVA's first stage does"
    )
    start_from: str = _field(
        "", "run or checkpoint whose weights to begin with, such as those of a first stage"
    )
    lora_rank: int = _field(16, "rank of A and B", bounds=AT_LEAST_1)
    lora_alpha: float = _field(16.0, "B A is scaled by alpha / rank", bounds=POSITIVE)
    lora_dropout: float = _field(0.05, "dropout on the input of A", bounds=UNDER_1)
    lora_targets: tuple[str, ...] = _field(
        LORA_TARGETS,
        "names of the layers that get an adapter",
        bounds=Bounds("at least one layer name", bool),
    )

    # -- what listens ------------------------------------------------------------------------------
    speech: str = _field(
        "base",
        "Whisper that hears questions: one of its names, or a .pt file",
        changes_result=False,
        old_checkpoints="base",
    )

    # -- data --------------------------------------------------------------------------------------
    data: str = _field("", "conversations: a JSON in the form of LLaVA-Instruct-150K, or JSONL")
    images: str = _field("", "folder that the picture names in the data are relative to")
    held_out_questions: str = _field("", "JSONL of questions about held-out pictures (POPE's form)")
    novel_pair_questions: str = _field("", "JSONL of questions about combinations never trained on")
    data_fraction: float = _field(
        1.0,
        "share of the training pictures to use",
        bounds=Bounds("over 0 and at most 1", lambda value: 0 < value <= 1),
    )
    validation_fraction: float = _field(
        0.05, "share of the pictures kept for validation; 0 for none", bounds=UNDER_1
    )
    split_by: str = _field(
        "content",
        "what makes two pictures one, so that they are on one side of the split: the bytes of"
        " their files, or their names alone",
        choices=("content", "name"),
        old_checkpoints="name",
    )
    max_text_tokens: int = _field(
        256, "longest conversation, picture tokens not counted", bounds=AT_LEAST_1
    )
    row_tokens: int = _field(
        0, "length of a packed row; 0 for one longest conversation", bounds=NOT_NEGATIVE
    )
    strict: bool = _field(
        False, "stop at the first bad record instead of quarantining it", changes_result=False
    )

    # -- optimisation ------------------------------------------------------------------------------
    epochs: int = _field(1, "passes over the training data", bounds=AT_LEAST_1)
    max_steps: int = _field(
        0, "end after this many optimiser steps; 0 for whole epochs", bounds=NOT_NEGATIVE
    )
    batch_size: int = _field(8, "packed rows a micro-batch", bounds=AT_LEAST_1)
    accumulation: int = _field(4, "micro-batches an optimiser step", bounds=AT_LEAST_1)
    learning_rate: float = _field(5e-4, "peak learning rate of the adapter", bounds=POSITIVE)
    schedule: str = _field("linear", "after the warm-up", choices=SCHEDULES)
    warmup_fraction: float = _field(0.1, "share of the steps that warm up", bounds=UNDER_1)
    weight_decay: float = _field(0.0, "decoupled weight decay", bounds=FINITE)
    adam_beta1: float = _field(0.9, "AdamW: decay of the first moment", bounds=UNDER_1)
    adam_beta2: float = _field(0.999, "AdamW: decay of the second moment", bounds=UNDER_1)
    adam_epsilon: float = _field(
        1e-8, "AdamW: added to the root of the second moment", bounds=POSITIVE
    )
    max_gradient_norm: float = _field(
        1.0, "gradients are clipped to this global norm", bounds=POSITIVE
    )
    gradient_checkpointing: bool = _field(True, "recompute activations in the backward pass")
    seed: int = _field(
        0, "of the split, the order, the initial weights and the dropout", bounds=SEEDS
    )

    # -- evaluation, saving, logging ---------------------------------------------------------------
    evaluate_steps: int = _field(
        50, "evaluate every so many steps; 0 for never", bounds=NOT_NEGATIVE
    )
    evaluation_conversations: int = _field(
        200, "validation conversations an evaluation looks at", bounds=AT_LEAST_1
    )
    early_stopping: int = _field(
        0, "stop after so many evaluations without a better loss; 0 never", bounds=NOT_NEGATIVE
    )
    save_steps: int = _field(
        25, "save every so many steps", bounds=AT_LEAST_1, changes_result=False
    )
    save_every_minutes: float = _field(
        0.0, "save as well every so many minutes; 0 for never", bounds=FINITE, changes_result=False
    )
    keep_checkpoints: int = _field(
        1,
        "checkpoints kept; older ones go once the newest is verified",
        bounds=AT_LEAST_1,
        changes_result=False,
    )
    log_steps: int = _field(25, "write metrics every so many steps", bounds=AT_LEAST_1)

    # -- where and on what -------------------------------------------------------------------------
    run: str = _field(
        "runs/phi35",
        "folder of the run: checkpoints, metrics, curves",
        bounds=Bounds("a folder", bool),
        changes_result=False,
    )
    features: str = _field(
        "cache/features", "folder of the picture feature store", changes_result=False
    )
    device: str = _field("auto", "where to compute", choices=("auto", "cpu", "cuda"))
    compute_type: str = _field(
        "auto", "type of the forward pass", choices=("auto", "float32", "bfloat16", "float16")
    )
    threads: int = _field(
        0, "CPU threads; 0 for all cores, shared among the processes", bounds=THREADS
    )
    deterministic: bool = _field(
        True, "algorithms that give the same bits every time; without them a resume is not exact"
    )


TINY: dict[str, Any] = {
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

PRESETS: dict[str, dict[str, Any]] = {"phi35": {}, "tiny": TINY}
FIELDS = {spec.name: spec for spec in dataclasses.fields(Config)}
TYPES = typing.get_type_hints(Config)
TYPE_NAMES = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}


def default_config(preset: str) -> Config:
    """The named preset as a `Config`."""
    if preset not in PRESETS:
        raise PhiSightError(f"preset {preset!r}: unknown; choose from {', '.join(sorted(PRESETS))}")
    return Config(**PRESETS[preset])


def replace(config: Config, **fields: Any) -> Config:
    """`config` with some fields replaced, validated."""
    config = dataclasses.replace(config, **fields)
    validate(config)
    return config


def fields_without_effect() -> tuple[str, ...]:
    """Names of the fields that no result depends on; see `changes_result` in `_field`."""
    return tuple(name for name, spec in FIELDS.items() if not spec.metadata["changes_result"])


# -- validation -----------------------------------------------------------------------------------


def flag_of(name: str) -> str:
    """`batch_size` -> `--batch-size`."""
    return "--" + name.replace("_", "-")


def validate(config: Config) -> None:
    """Collect every problem of the config and raise them as one `PhiSightError`."""
    if problems := out_of_bounds(vars(config)):
        raise PhiSightError("config: " + "; ".join(problems))


def out_of_bounds(values: Mapping[str, Any]) -> list[str]:
    """A sentence for each of these fields whose value is of the right type and not allowed."""
    return [
        f"{flag_of(name)} must be {bounds.words}, not {shown(value)}"
        for name, value in values.items()
        if (bounds := FIELDS[name].metadata["bounds"]) and not bounds.hold(value)
    ]


def of_declared_type(values: Mapping[str, Any], where: str) -> dict[str, Any]:
    """These fields as a `Config` holds them, from JSON or TOML: lists become tuples and whole
    numbers floats where the field is one. Raises PhiSightError naming the field."""
    clean = {}
    for name, value in values.items():
        kind = TYPES[name]
        if kind is float and type(value) is int and abs(value) < 2**1023:  # else too large for one
            value = float(value)
        is_names = typing.get_origin(kind) is tuple
        if is_names and isinstance(value, list) and all(isinstance(item, str) for item in value):
            value = tuple(value)
        if type(value) is not (tuple if is_names else kind):
            wanted = "a list of texts" if is_names else TYPE_NAMES[kind]
            raise PhiSightError(
                f"{where}: config field {name} is {shown(value)}; expected {wanted}"
            )
        clean[name] = value
    return clean


def shown(value: Any) -> str:
    """The value as an error names it; what a file holds may be of any length."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # Python writes no number of more than 4,300 digits
        return "a value too long to be shown"
    return text if len(text) <= 100 else text[:97] + "..."


# -- JSON -----------------------------------------------------------------------------------------


def to_dict(config: Config) -> dict[str, Any]:
    """Plain JSON values; the inverse of `from_dict`."""
    return {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in vars(config).items()
    }


def from_dict(values: Mapping[str, Any], where: str) -> Config:
    """A `Config` from the JSON of a checkpoint; unknown, missing or ill-typed fields are errors."""
    old = {name: spec.metadata["old_checkpoints"] for name, spec in FIELDS.items()}
    values = {n: v for n, v in old.items() if v is not dataclasses.MISSING} | dict(values)
    missing, unknown = sorted(FIELDS.keys() - values.keys()), sorted(values.keys() - FIELDS.keys())
    if missing or unknown:
        raise PhiSightError(
            f"{where}: its config lacks {missing or 'nothing'} and has unknown"
            f" {unknown or 'nothing'}; it was written by another version of PhiSight"
        )
    config = Config(**of_declared_type(values, where))
    validate(config)
    return config


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


def need_file(path: str, flag: str, remedy: str) -> Path:
    """The path of an input file that has to be there."""
    if not path:
        raise PhiSightError(f"{flag}: not given; {remedy}")
    if not Path(path).is_file():
        raise PhiSightError(f"{path}: no such file; {remedy}")
    return Path(path)
