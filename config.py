"""What a run is: one frozen dataclass and its validation.

The defaults are the full-size recipe (Phi-3.5-mini, CLIP ViT-L/14-336, one GPU). A preset, of
`presets.py`, overrides fields. All that is known of a field stands in its one declaration below:
`training/options.py` makes a flag of it (`batch_size` is `--batch-size`), `training/config_file.py`
a key of a `--config` file.
"""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import paths
from command_line import Parser as Parser  # where the commands look for it
from errors import PhiSightError
from fields import (
    AT_LEAST_1,
    DATA,
    FINITE,
    FOLDERS,
    NOT_NEGATIVE,
    PATH,
    PATH_OR_NAME,
    POSITIVE,
    QUERIES,
    ROWS,
    SAMPLES,
    SEEDS,
    THREADS,
    UNDER_1,
    Bounds,
    as_texts,
    declared,
    shown,
)
from presets import DEFAULT_PRESET, PRESETS

LORA_TARGETS = ("qkv_proj", "o_proj", "gate_up_proj", "down_proj")
QUANTIZATIONS = ("nf4", "nf4-nested", "none")
FEATURE_STORAGES = ("float16", "int8")
PICTURE_FITS = ("pad", "crop")
PROJECTORS = ("mlp", "linear", "pixel-shuffle", "resampler")  # see `model.projectors`
COMPUTE_TYPES = ("auto", "float32", "bfloat16", "float16", "int16")
COMPUTE_TYPE_HELP = "of the forward; int16: float32, but 4-bit weights times integers, on a CPU"
SUPERVISED = ("answers", "all")
SCHEDULES = ("linear", "cosine", "constant")
WARN, ROLLBACK = "warn", "rollback"  # what follows a jump of the gradient norm


@dataclass(frozen=True)
class Config:
    """Everything a run depends on. Every checkpoint holds it; a resume compares it by field.

    Units: tokens, pictures, rows, optimiser steps; seconds and minutes where the name says so.
    """

    # -- what is trained ---------------------------------------------------------------------------
    base: str = declared(
        "microsoft/Phi-3.5-mini-instruct",
        "base (Phi-3, Phi-4-mini, Llama, SmolLM2, Qwen2.5, Qwen3): hub id or local folder",
        known_by="base_fingerprint",
        place=PATH_OR_NAME,
    )
    base_revision: str = declared(
        "", "hub revision of the base; empty for the newest", known_by="base_fingerprint"
    )
    vision: str = declared(
        "openai/clip-vit-large-patch14-336",
        "picture encoder (CLIP, SigLIP, SigLIP2, DINOv2): hub id or local folder; the smaller"
        " openai/clip-vit-base-patch32 gives 49 tokens a picture, or one if pooled",
        known_by="vision_fingerprint",
        place=PATH_OR_NAME,
    )
    vision_revision: str = declared(
        "", "hub revision of the encoder; empty for the newest", known_by="vision_fingerprint"
    )
    base_cache: str = declared(
        "cache/bases",
        "folder that keeps the quantised base, so that the next start reads it"
        " (about 2.5 GB for Phi-3.5-mini) and does not quantise again; empty for none",
        changes_result=False,
        place=PATH,
        old_checkpoints="",
    )
    quantization: str = declared(
        "nf4", "how the base's linear weights are kept", choices=QUANTIZATIONS
    )
    vision_features: str = declared(
        "patches",
        "picture tokens: every patch, or one pooled vector",
        choices=("patches", "pooled"),
    )
    vision_layer: int = declared(
        -2, "hidden layer of the picture encoder that patch features are taken from"
    )
    feature_pooling: int = declared(
        1,
        "average N x N patches into one token; 2 leaves 144 of the 576 of CLIP L/14 at 336",
        bounds=AT_LEAST_1,
    )
    picture_fit: str = declared(
        # As LLaVA-1.5: what stands at the sides of a wide picture is seen. A square picture is the
        # same either way.
        "pad",
        "how a picture that is not square fits the encoder: padded to a square with the mean"
        " colour, or its sides cut off (by a SigLIP's own processor: squeezed)",
        choices=PICTURE_FITS,
        old_checkpoints="crop",
    )
    feature_storage: str = declared(
        "float16",
        "how stored picture features are kept; int8 halves the disk",
        choices=FEATURE_STORAGES,
    )
    train_lora: bool = declared(
        True, "train the adapter too; without, the projector alone, as LLaVA's first stage does"
    )
    train_projector: bool = declared(
        True,
        "train the projector too; without, it stays as it was drawn, or as --start-from gives it",
        old_checkpoints=True,
    )
    start_from: str = declared(
        "",
        "run or checkpoint, or hf:owner/name[@revision], whose weights to begin with",
        place=PATH,
    )
    lora_rank: int = declared(16, "rank of A and B", bounds=AT_LEAST_1)
    lora_alpha: float = declared(16.0, "B A is scaled by alpha / rank", bounds=POSITIVE)
    rank_stabilized: bool = declared(
        False, "scale B A by alpha / sqrt(rank) instead (rsLoRA)", old_checkpoints=False
    )
    lora_dropout: float = declared(0.05, "dropout on the input of A", bounds=UNDER_1)
    projector: str = declared(
        "mlp",
        "what makes picture tokens of picture features: an MLP; one linear layer; an MLP over each"
        " 2 x 2 patches together; attention of learned queries",
        choices=PROJECTORS,
        old_checkpoints="mlp",
    )
    projector_queries: int = declared(
        16, "picture tokens of --projector resampler", bounds=QUERIES, old_checkpoints=16
    )
    projector_dropout: float = declared(
        0.0, "dropout between the projector's layers", bounds=UNDER_1, old_checkpoints=0.0
    )
    merge_rounding: str = declared(
        "none",
        "nf4: the forward sees the merged weight rounded to NF4 again, so that export.py"
        " --requantize loses nothing; with --quantization nf4 and --lora-dropout 0",
        choices=("none", "nf4"),
        old_checkpoints="none",
    )
    lora_targets: tuple[str, ...] = declared(
        LORA_TARGETS,
        "names of the layers that get an adapter; parts of a fused one get one each, as q_proj of"
        " qkv_proj",
        bounds=Bounds("at least one layer name", bool),
    )

    # -- what listens ------------------------------------------------------------------------------
    speech: str = declared(
        "base",
        "Whisper that hears questions: one of its names, or a .pt file",
        changes_result=False,
        place=PATH_OR_NAME,
        old_checkpoints="base",
    )

    # -- data --------------------------------------------------------------------------------------
    data: tuple[str, ...] = declared(
        (),
        "conversations: a file or folder of any form in docs/data.md, or hf:owner/name[@revision];"
        " behind it :N takes each of them N times. May be given several times",
        bounds=DATA,
        known_by="data_fingerprint",
        place=PATH,
        repeated=True,
    )
    images: tuple[str, ...] = declared(
        (),
        "folder that the picture names in the data are relative to; one for each --data where they"
        " differ",
        bounds=FOLDERS,
        known_by="data_fingerprint",
        place=PATH,
        repeated=True,
    )
    unpacked: str = declared(
        "cache/pictures",
        "folder for the pictures that lie inside data files, such as Parquet",
        changes_result=False,
        place=PATH,
        old_checkpoints="cache/pictures",
    )
    held_out_questions: str = declared(
        "",
        "JSONL of questions about held-out pictures (POPE's form)",
        changes_result=False,  # evaluate.py asks them, training does not
        place=PATH,
    )
    novel_pair_questions: str = declared(
        "",
        "JSONL of questions about combinations never trained on",
        changes_result=False,
        place=PATH,
    )
    data_fraction: float = declared(
        1.0,
        "share of the training pictures to use",
        bounds=Bounds("over 0 and at most 1", lambda value: 0 < value <= 1),
    )
    validation_fraction: float = declared(
        0.05, "share of the pictures kept for validation; 0 for none", bounds=UNDER_1
    )
    split_by: str = declared(
        "content",
        "what makes two pictures one, so that they are on one side of the split: the bytes of"
        " their files, or their names alone",
        choices=("content", "name"),
        old_checkpoints="name",
    )
    max_text_tokens: int = declared(
        256, "longest conversation, picture tokens not counted", bounds=AT_LEAST_1
    )
    row_tokens: int = declared(0, "length of a packed row; 0: the longest sample", bounds=ROWS)
    pack: bool = declared(
        True,
        "lay conversations end to end in a row; without, one a row and padding behind it",
        old_checkpoints=True,
    )
    supervise: str = declared(
        "answers",
        "what is learnt to be predicted: the answers, or all text behind the first token. The"
        " validation loss is over answers either way",
        choices=SUPERVISED,
        old_checkpoints="answers",
    )
    strict: bool = declared(
        False, "stop at the first bad record instead of quarantining it", changes_result=False
    )

    # -- optimisation ------------------------------------------------------------------------------
    epochs: int = declared(1, "passes over the training data", bounds=AT_LEAST_1)
    max_steps: int = declared(
        0,
        "end after this many optimiser steps, whatever --epochs says: the data are gone through"
        " again as often as that takes; 0 for whole epochs",
        bounds=NOT_NEGATIVE,
    )
    batch_size: int = declared(8, "packed rows a micro-batch", bounds=AT_LEAST_1)
    accumulation: int = declared(4, "micro-batches an optimiser step", bounds=AT_LEAST_1)
    learning_rate: float = declared(5e-4, "peak learning rate of the adapter", bounds=POSITIVE)
    lora_plus_ratio: float = declared(
        1.0,
        "B learns at this many times the rate of A (LoRA+)",
        bounds=POSITIVE,
        old_checkpoints=1.0,
    )
    projector_learning_rate: float = declared(
        0.0,
        "peak learning rate of the projector; 0 for that of the adapter",
        bounds=FINITE,
        old_checkpoints=0.0,
    )
    schedule: str = declared("linear", "after the warm-up", choices=SCHEDULES)
    warmup_fraction: float = declared(0.1, "share of the steps that warm up", bounds=UNDER_1)
    weight_decay: float = declared(0.0, "decoupled weight decay", bounds=FINITE)
    adam_beta1: float = declared(0.9, "AdamW: decay of the first moment", bounds=UNDER_1)
    adam_beta2: float = declared(0.999, "AdamW: decay of the second moment", bounds=UNDER_1)
    adam_epsilon: float = declared(
        1e-8, "AdamW: added to the root of the second moment", bounds=POSITIVE
    )
    max_gradient_norm: float = declared(
        1.0, "gradients are clipped to this global norm", bounds=POSITIVE
    )
    on_spike: str = declared(
        WARN,
        "when the gradient norm jumps: nothing; a warning; or back to the last checkpoint of"
        " --save-steps, to go on behind the rows that were trained on since",
        choices=("none", WARN, ROLLBACK),
        old_checkpoints="none",
    )
    gradient_checkpointing: str = declared(
        "auto",
        "computed again in the backward: none; products: all but the products with frozen weights;"
        " layers: all; auto: products where there is memory for them, else layers",
        choices=("auto", "none", "products", "layers"),
        changes_result=False,  # gradients are equal to the bit
        formerly={True: "layers", False: "none"},
    )
    seed: int = declared(
        0, "of the split, the order, the initial weights and the dropout", bounds=SEEDS
    )

    # -- evaluation, saving, logging ---------------------------------------------------------------
    evaluate_steps: int = declared(
        50, "evaluate every so many steps; 0 for never", bounds=NOT_NEGATIVE
    )
    evaluation_conversations: int = declared(
        200, "validation conversations an evaluation looks at", bounds=AT_LEAST_1
    )
    evaluation_samples: int = declared(
        4,
        "questions with a picture, always the same, whose answers every evaluation writes into the"
        " log; 0 for none",
        bounds=SAMPLES,
        old_checkpoints=0,
    )
    early_stopping: int = declared(
        0,
        "stop after so many evaluations without a better loss, and keep the best; 0 never",
        bounds=NOT_NEGATIVE,
    )
    keep_best: bool = declared(
        False,
        "keep the checkpoint of the lowest validation loss too, as RUN/best; always on with"
        " --early-stopping",
        changes_result=False,
        old_checkpoints=False,
    )
    save_steps: int = declared(
        25, "save every so many steps", bounds=AT_LEAST_1, changes_result=False
    )
    save_every_minutes: float = declared(
        0.0, "save as well every so many minutes; 0 for never", bounds=FINITE, changes_result=False
    )
    keep_checkpoints: int = declared(
        1,
        "checkpoints kept; older ones go once the newest is verified",
        bounds=AT_LEAST_1,
        changes_result=False,
    )
    log_steps: int = declared(25, "write metrics every so many steps", bounds=AT_LEAST_1)

    # -- where and on what -------------------------------------------------------------------------
    run: str = declared(
        "runs/phi35",
        "folder of the run: checkpoints, metrics, curves",
        bounds=Bounds("a folder", bool),
        changes_result=False,
        place=PATH,
    )
    features: str = declared(
        "cache/features", "folder of the picture feature store", changes_result=False, place=PATH
    )
    device: str = declared("auto", "where to compute", choices=("auto", "cpu", "cuda", "mps"))
    compute_type: str = declared("auto", COMPUTE_TYPE_HELP, choices=COMPUTE_TYPES)
    threads: int = declared(
        0, "CPU threads; 0 for all cores, shared among the processes", bounds=THREADS
    )
    deterministic: bool = declared(
        True, "algorithms that give the same bits every time; without them a resume is not exact"
    )

    def __post_init__(self) -> None:
        for name in REPEATED:  # a text alone is a list of one
            object.__setattr__(self, name, as_texts(getattr(self, name)))

    @property
    def keeps_best(self) -> bool:
        """Whether the checkpoint of the lowest validation loss is kept beside the newest."""
        return self.keep_best or self.early_stopping > 0


FIELDS = {spec.name: spec for spec in dataclasses.fields(Config)}
TYPES = typing.get_type_hints(Config)
REPEATED = tuple(name for name, spec in FIELDS.items() if spec.metadata["repeated"])


def default_config(preset: str = DEFAULT_PRESET) -> Config:
    """The named preset as a `Config`; its paths are the project's, named from here."""
    if preset not in PRESETS:
        raise PhiSightError(f"preset {preset!r}: unknown; choose from {', '.join(sorted(PRESETS))}")
    return Config(**located(vars(Config(**PRESETS[preset]))))


def replace(config: Config, **fields: Any) -> Config:
    """`config` with some fields replaced, validated."""
    config = dataclasses.replace(config, **fields)
    validate(config)
    return config


def fields_without_effect() -> tuple[str, ...]:
    """Names of the fields that no result depends on; see `changes_result` in `fields.declared`."""
    return tuple(name for name, spec in FIELDS.items() if not spec.metadata["changes_result"])


def fields_known_by_facts() -> dict[str, str]:
    """The fields that say where something lies of which a checkpoint holds the fingerprint, each
    with the name of that fact; see `known_by` in `fields.declared`."""
    known = {name: spec.metadata["known_by"] for name, spec in FIELDS.items()}
    return {name: fact for name, fact in known.items() if fact}


# -- paths ----------------------------------------------------------------------------------------


def located(values: Mapping[str, Any]) -> dict[str, Any]:
    """These fields with the project's paths as they are named from the current folder. A text that
    may be a name as well is a path where something lies there."""

    return _moved(values, paths.located, lambda value: (paths.PROJECT / value).exists())


def recorded(values: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of `located`."""
    return _moved(values, paths.recorded, lambda value: Path(value).exists())


def _moved(
    values: Mapping[str, Any], move: Callable[[str], str], is_there: Callable[[str], bool]
) -> dict[str, Any]:
    def moved(place: str, value: Any) -> Any:
        if not isinstance(value, str):
            return type(value)(moved(place, each) for each in value)
        is_path = place == PATH or (place == PATH_OR_NAME and is_there(value))
        return move(value) if is_path else value

    places = {name: FIELDS[name].metadata["place"] for name in values}
    return {n: moved(places[n], v) if places[n] else v for n, v in values.items()}


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
