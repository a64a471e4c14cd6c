"""An adapter from elsewhere becomes a run that infer.py, evaluate.py and export.py take."""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

import checkpoints
import config as configs
import config_values
from config import Config
from errors import PhiSightError
from exports.folder import new_folder
from exports.form import add_config_flags, typed
from exports.measure import versions
from model.build import Assembled, assemble, load_model_state
from tensors import shape_and_dtype

# What the adapter was trained over, and how its pictures were read: an adapter file does not say.
MODEL_FIELDS = (
    "base_revision",
    "vision_revision",
    "quantization",
    "vision_features",
    "vision_layer",
    "feature_pooling",
    "picture_fit",
    "projector",
    "projector_queries",
    "feature_storage",
)
# A tensor of a layer, also where the language model is a part of a larger one, which its programs
# nest under different names: language_model.model., model.language_model., and so on.
_IN_LAYER = re.compile(
    r"(?:(?:base_model|model|module|language_model|text_model|llm|thinker|backbone)\.)*"
    r"layers\.(\d{1,4})\.(self_attn|mlp)\.(\w+)\.(.+)"
)
MERGE = "merge the adapter into its base (PEFT's merge_and_unload) and give the result with --base"
AGAIN = "train the adapter again on the layers of the language model alone"
_OTHER_PARTS = (  # what stands in a name, what it is then, and what can be done
    (
        r"base_layer\.(weight|bias)$",
        "is a weight of the base itself",
        "save the adapter alone, by PEFT's save_pretrained",
    ),
    (r"cross_attn", "is of a layer that looks at the picture encoder, which no base has", AGAIN),
    (r"magnitude", "is of DoRA, which is more than LoRA", MERGE),
    (
        r"embed_tokens|lm_head|lora_embedding",
        "is of the embedding or the head, which stay frozen here",
        MERGE,
    ),
    (
        r"vision|visual|image_(encoder|model)|clip",
        "is of the picture encoder, which stays frozen here",
        AGAIN,
    ),
    (r"projector|connector", "is of a projector", "put it into image_projector.safetensors"),
    (r"norm|bias", "is trained beside LoRA", MERGE),
)


@dataclass(frozen=True)
class InLayer:
    """Where a tensor of an adapter belongs: `model.layers.<layer>.<place>.<kind>.<rest>`."""

    layer: int
    place: str
    kind: str
    rest: str


def in_layer(
    source: object, key: str, layers: int, places: Mapping[str, str], rest: str
) -> InLayer:
    """What the name of a tensor says, whatever its program put before the layer.

    Args:
        layers: how many the base has.
        places: kind of a projection -> the part of a layer that it lies in.
        rest: a pattern of what may follow.

    Raises:
        PhiSightError: it is of no layer of the base; with the reason, which is not always the base.
    """
    match = _IN_LAYER.fullmatch(key)
    if match and places.get(match[3]) == match[2] and re.fullmatch(rest, match[4]):
        if int(match[1]) < layers:
            return InLayer(int(match[1]), match[2], match[3], match[4])
        reason, remedy = f"the base has {layers}", "name the right base with --base"
    else:
        found = [(why, what) for part, why, what in _OTHER_PARTS if re.search(part, key)]
        kinds = ", ".join(places)
        otherwise = (f"its layers have {kinds}", "give an adapter of a model with these layers")
        reason, remedy = found[0] if found else otherwise
    shown = key[:120] if key.isprintable() else repr(key[:120])
    raise PhiSightError(f"{source}: {shown} belongs to no layer of the base ({reason}); {remedy}")


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The flags that say what an imported run is, beside those of every model."""
    group = parser.add_argument_group("what an adapter that is imported was trained over")
    group.add_argument(
        "--preset",
        default=configs.DEFAULT_PRESET,
        help="what an imported run is but for its adapter (%(default)s)",
    )
    add_config_flags(group, MODEL_FIELDS)


def imported_config(options: argparse.Namespace) -> Config:
    """The preset, with what was typed about its base, its CLIP and where to compute."""
    config = configs.default_config(options.preset)
    model_flags = ("base", "vision", "base_cache", "device")  # of `assistant.flags`
    return configs.replace(config, **typed(options, (*model_flags, *MODEL_FIELDS)))


def write_run(
    out: str | Path,
    parts: Assembled,
    config: Config,
    lora: Mapping[str, Tensor],
    projector: Mapping[str, Tensor],
    source: str | Path,
) -> None:
    """Load the tensors strictly into the model of `config` and save it as checkpoint 0 of `out`.

    `lora` is named as `lora.state` names it, `projector` as the run's own does. The run counts
    as finished: the optimizer's state is in no such format, so there is nothing to resume.

    Raises:
        PhiSightError: a tensor is missing, unexpected, misshapen or not finite, or `out` is there.
    """
    for name, tensor in (*lora.items(), *projector.items()):
        if not tensor.isfinite().all():
            raise PhiSightError(f"{source}: {name} has values that are not finite; export it again")
    state = {"lora_weights": lora, "image_projector": projector}
    load_model_state(parts.model, state)
    facts = {
        "config": config_values.to_dict(configs.replace(config, run=str(out))),
        "base_fingerprint": parts.base.fingerprint,
        "tokenizer_fingerprint": parts.base.tokenizer.fingerprint,
        "vision_fingerprint": parts.vision.key,
        "picture_tokens": parts.chat_format.tokens_per_image,
        "imported_from": str(source),
        "versions": versions(),
    }
    place = {"step": 0, "epoch": 0, "row": 0, "finished": f"imported from {source}"}
    with new_folder(out) as folder:
        checkpoints.save(
            folder, 0, state | {"optimizer": {}, "rng": {}}, facts, place, parts.base.tokenizer
        )


def model_for(config: Config, **fields: Any) -> tuple[Assembled, Config]:
    """The model that an adapter goes into, and its config."""
    config = configs.replace(config, **fields)
    return assemble(config), config


def finite_number(value: object) -> float | None:
    """`value` from an untrusted file as a float, or None if it is not a finite number."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    try:
        number = float(value)
    except OverflowError:  # an integer of hundreds of digits
        return None
    return number if math.isfinite(number) else None


def need_matrix(
    source: object,
    name: str,
    value: object,
    *shape: int | None,
    remedy: str = "was it made for this base model?",
) -> Tensor:
    """`value` as a float32 tensor on the CPU, if it is a dense float tensor of `shape` (None: any).

    Raises `PhiSightError` naming what it is, what it should be, and the `remedy`.
    """
    if not isinstance(value, Tensor):
        raise PhiSightError(
            f"{source}: {name} is {type(value).__name__}, not a tensor; export it again"
        )
    fits = value.dim() == len(shape) and all(
        want is None or want == size for want, size in zip(shape, value.shape)
    )
    if not fits or not value.is_floating_point() or value.is_quantized or value.is_sparse:
        wanted = "x".join("any" if want is None else str(want) for want in shape)
        raise PhiSightError(
            f"{source}: {name} is {shape_and_dtype(value)}, not a float tensor of {wanted};"
            f" {remedy}"
        )
    return value.detach().float().cpu().contiguous()
