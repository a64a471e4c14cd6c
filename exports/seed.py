"""Checkpoints of the project that this one grew from: `lora_weights.pt` and `image_projector.pth`.

Both are torch archives, read with `weights_only=True`, which loads tensors, numbers and containers
and runs nothing.

lora_weights.pt: for each adapted layer `model.layers.<i>.<place>.lora_A.weight` (rank, inputs),
    `.lora_B.weight` (outputs, rank) and `.scaling`, a number or PEFT's {"default": number}. Its
    targets were Llama's names, so of Phi-3's four projections it has `o_proj` and `down_proj` only.
image_projector.pth: `layer1` (hidden, 512), `layer2` (text dim, hidden), with biases, hidden 1024,
    and `initial_weights1` and `initial_weights2`, a copy of what training started from.

Its projector reads CLIP's *projected* class vector; ours, set to pooled, the vector before that
projection. The projection is linear, so it is multiplied into `layer1`. And a hidden layer that is
narrower than ours is filled up with zeros. Both leave the function as it was.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from config import Config
from errors import PhiSightError
from exports.form import Form, folder_to_write
from exports.imported import (
    finite_number,
    imported_config,
    in_layer,
    model_for,
    need_matrix,
    write_run,
)
from exports.peft_import import PLACES, input_sizes
from model.base import find_folder, find_weight_files, read_family
from model.decoder import DecoderConfig
from model.families import PHI3
from model.vision import PICKLED, VisionSpec, opened, read_vision_spec
from torch_files import NotRead, load_torch_file

LORA, PROJECTOR = "lora_weights.pt", "image_projector.pth"
REMEDY = "give a checkpoint folder of the seed project as its training saved it"
BYTE_LIMIT = 8 * 2**30  # its largest file has about 60 MB
_PLACES = {"o_proj": "self_attn", "down_proj": "mlp"}
_REST = r"lora_A\.weight|lora_B\.weight|scaling"
_PROJECTOR_NAMES = {"layer1.weight", "layer1.bias", "layer2.weight", "layer2.bias"}
_COPIES = {"initial_weights1", "initial_weights2"}


def import_seed(source: str | Path, out: str | Path, config: Config) -> str:
    """Read a checkpoint of the seed project over the base and CLIP of `config` into a new run.

    Its answers are not those that it gave there: it put a picture's one token before the whole
    chat, and here it stands at its `<image>` place. Returns a line about what was read.

    Raises:
        PhiSightError: a file is missing, holds anything but tensors and numbers (code, above all),
            or does not fit this base and this CLIP.
    """
    source = Path(source)
    family, base = read_family(find_folder(config.base, config.base_revision or None))
    if family is not PHI3:
        raise PhiSightError(
            f"--import-seed: {config.base} is a {family.name}, and the seed project trained Phi-3"
            " alone; name the base that it was trained with by --base"
        )
    vision = read_vision_spec(
        config.vision,
        config.vision_revision,
        "pooled",
        config.vision_layer,
        config.feature_pooling,
        "crop",  # as the seed's CLIP processor did
        config.base_cache,
    )
    lora, targets, rank, scaling = seed_lora(source / LORA, base)
    projector = seed_projector(source / PROJECTOR, vision, base.hidden_size)
    parts, config = model_for(
        config,
        vision_features="pooled",
        picture_fit="crop",
        lora_targets=targets,
        lora_rank=rank,
        lora_alpha=scaling * rank,
    )
    write_run(out, parts, config, lora, projector, source)
    return (
        f"{out}: rank {rank} on {', '.join(targets)} of {base.num_hidden_layers} layers, and"
        " the projector; a picture is one token"
    )


def load_archive(path: Path) -> dict[str, object]:
    """A torch file's dictionary with names for keys, loaded without running anything."""
    if not path.is_file():
        raise PhiSightError(f"{path}: no such file; {REMEDY}")
    if path.stat().st_size > BYTE_LIMIT:
        raise PhiSightError(f"{path}: is absurdly large; {REMEDY}")
    try:
        content = load_torch_file(path, BYTE_LIMIT)
    except (NotRead, OSError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise PhiSightError(
            f"{path}: is not read, it is damaged or holds more than tensors and numbers, such as"
            f" code ({reason}); {REMEDY}"
        ) from None
    if not isinstance(content, Mapping) or not all(isinstance(name, str) for name in content):
        raise PhiSightError(f"{path}: holds no dictionary of names; {REMEDY}")
    return dict(content)


def seed_lora(
    path: Path, base: DecoderConfig
) -> tuple[dict[str, Tensor], tuple[str, ...], int, float]:
    """`lora.state`'s tensors, the adapted layers' names, the rank and the scaling."""
    sizes = input_sizes(base)
    scales: set[float] = set()
    ranks: set[int] = set()
    state: dict[str, Tensor] = {}
    for key, value in load_archive(path).items():
        if key.endswith((".lora_embedding_A", ".lora_embedding_B")) and value == {}:
            continue  # it saved these for every layer, and no layer has any
        where = in_layer(path, key, base.num_hidden_layers, _PLACES, _REST)
        module = f"model.layers.{where.layer}.{where.place}.{where.kind}"
        name = f"{module}.{where.rest.removesuffix('.weight')}"
        if where.rest == "scaling":
            scales.add(scale := the_number(path, key, value))
            state[name] = torch.tensor(scale)
            continue
        outputs, inputs = sizes[where.kind]
        if where.rest == "lora_A.weight":
            state[name] = need_matrix(path, key, value, None, inputs)
            ranks.add(len(state[name]))
        else:
            state[name] = need_matrix(path, key, value, outputs, None)
            ranks.add(state[name].shape[1])
    if len(ranks) != 1 or len(scales) != 1 or 0 in ranks:
        raise PhiSightError(
            f"{path}: has ranks {sorted(ranks)} and scales {sorted(scales)}, not"
            f" one of each; {REMEDY}"
        )
    kinds = {name.split(".")[-2] for name in state}
    targets = tuple(kind for kind in PLACES if kind in kinds)
    return state, targets, ranks.pop(), scales.pop()


def the_number(path: Path, key: str, value: object) -> float:
    """A scaling: a number, a tensor of one, or PEFT's dictionary of one by adapter name."""
    if isinstance(value, Mapping) and len(value) == 1:
        value = next(iter(value.values()))
    if isinstance(value, Tensor) and value.numel() == 1:
        value = value.item()
    number = finite_number(value)
    if number is None or number <= 0:
        shown = f"{str(value)[:60]!r}, not a positive number"
        raise PhiSightError(f"{path}: {key} is {shown}; {REMEDY}")
    return number


def seed_projector(path: Path, vision: VisionSpec, text_dim: int) -> dict[str, Tensor]:
    """The seed's projector as one of ours: {"linear_1.weight": (text dim, CLIP dim), ...}."""
    given = load_archive(path)
    if not _PROJECTOR_NAMES <= set(given) <= _PROJECTOR_NAMES | _COPIES:
        raise PhiSightError(
            f"{path}: holds {', '.join(sorted(given))[:200]}, not"
            f" {', '.join(sorted(_PROJECTOR_NAMES))}; {REMEDY}"
        )
    first = need_matrix(path, "layer1.weight", given["layer1.weight"], None, None)
    hidden = len(first)
    bias = need_matrix(path, "layer1.bias", given["layer1.bias"], hidden)
    second = need_matrix(path, "layer2.weight", given["layer2.weight"], text_dim, hidden)
    if hidden > text_dim:
        raise PhiSightError(
            f"{path}: its hidden layer has {hidden} units, ours has {text_dim};"
            " use the base that it was trained with"
        )
    if first.shape[1] != vision.shape[1]:
        first = first @ visual_projection(path, vision, first.shape[1])
    linear_1, linear_2 = torch.zeros(text_dim, vision.shape[1]), torch.zeros(text_dim, text_dim)
    linear_1[:hidden], linear_2[:, :hidden] = first, second
    bias_1 = torch.zeros(text_dim)  # gelu(0) is 0, and it meets zeros in linear_2 besides
    bias_1[:hidden] = bias
    return {
        "linear_1.weight": linear_1,
        "linear_1.bias": bias_1,
        "linear_2.weight": linear_2,
        "linear_2.bias": need_matrix(path, "layer2.bias", given["layer2.bias"], text_dim),
    }


def visual_projection(path: Path, vision: VisionSpec, outputs: int) -> Tensor:
    """CLIP's own projection of the pooled vector, (outputs, CLIP dim) float32."""
    name = "visual_projection.weight"
    for file in find_weight_files(vision.folder, PICKLED):
        with opened(file) as tensors:
            if name in tensors.places:
                projection = tensors.read(name)
                if tuple(projection.shape) == (outputs, vision.shape[1]):
                    return projection.float()
    raise PhiSightError(
        f"{path}: reads vectors of {outputs} numbers, and {vision.folder} gives {vision.shape[1]}"
        " and no projection to that; name the CLIP that it was trained with (ViT-B/32) by --vision"
    )


def run(options: argparse.Namespace) -> str:
    """`export.py --import-seed DIR`."""
    out = folder_to_write(options)
    return import_seed(options.import_seed, out, imported_config(options))


FORM = Form(
    run,
    {
        "metavar": "DIR",
        "help": "a folder with lora_weights.pt and image_projector.pth into a new run",
    },
)
