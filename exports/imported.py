"""An adapter from elsewhere becomes a run that infer.py, evaluate.py and export.py take."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

import checkpoints
import config as configs
from config import Config
from errors import PhiSightError
from exports.folder import new_folder
from exports.measure import versions
from model.build import Assembled, assemble, load_model_state
from tensors import shape_and_dtype


def write_run(
    out: str | Path,
    parts: Assembled,
    config: Config,
    lora: Mapping[str, Tensor],
    projector: Mapping[str, Tensor],
    source: str | Path,
) -> None:
    """Load the tensors strictly into the model of `config` and save it as checkpoint 0 of `out`.

    `lora` is named as `lora.state` names it, `projector` as `ImageProjector` does. The run counts
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
        "config": configs.to_dict(configs.replace(config, run=str(out))),
        "base_fingerprint": parts.base.fingerprint,
        "vision_fingerprint": parts.vision.key,
        "imported_from": str(source),
        "versions": versions(),
    }
    place = {"step": 0, "epoch": 0, "row": 0, "finished": f"imported from {source}"}
    with new_folder(out) as folder:
        checkpoints.save(
            folder, 0, state | {"optimizer": {}, "rng": {}}, facts, place, parts.base.tokenizer
        )


def model_for(config: Config, **fields: object) -> tuple[Assembled, Config]:
    """The model that an adapter goes into, and its config."""
    config = configs.replace(config, **fields)
    return assemble(config), config


def need_matrix(source: object, name: str, value: object, *shape: int | None) -> Tensor:
    """`value` as a float32 tensor on the CPU, if it is a dense float tensor of `shape` (None: any).

    Raises `PhiSightError` naming what it is and what it should be.
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
            " was it made for this base model?"
        )
    return value.detach().float().cpu().contiguous()
