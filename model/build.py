"""Config -> the whole model: base in NF4, adapter, projector, and what they were built on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from config import Config
from data.chat import ChatFormat
from data.chat_forms import FORMS
from errors import PhiSightError
from lora.inject import inject
from lora.layer import LoRALinear
from lora.state import load_lora_state, lora_state
from model.base import BaseModel, load_base, settle_panels
from model.decoder import LanguageModel
from model.devices import choose_compute_dtype, choose_device
from model.families.fused import fused_parts
from model.projectors import name_of, picture_tokens, projector_of
from model.projectors.projector import Projector
from model.vision import VisionSpec, vision_of
from model.vlm import VisionLanguageModel
from ops import kernels
from ops.nf4 import PanelLinear
from tensors import check_fit, copy_into

DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "int16": torch.float32,  # but for the products of a training's forward with 4-bit weights
}


@dataclass(frozen=True)
class Assembled:
    """The model and what training and inference need beside it."""

    model: VisionLanguageModel
    base: BaseModel
    vision: VisionSpec
    chat_format: ChatFormat
    device: torch.device
    compute_reason: str


def assemble(config: Config) -> Assembled:
    """Build the model of `config` with a fresh adapter and projector, drawn from `config.seed`."""
    device, told = choose_device(config.device)
    dtype, reason = choose_compute_dtype(device)
    if config.compute_type != "auto":
        dtype, reason = DTYPES[config.compute_type], "asked for by --compute-type"
    reason = f"{told}; {reason}" if told else reason
    base = load_base(
        config.base,
        config.base_revision or None,
        dtype,
        device,
        config.quantization,
        config.base_cache,
    )
    if config.compute_type == "int16":
        multiply_by_integers(base.model)
    vision = vision_of(config)
    chat_format = ChatFormat.from_tokenizer(
        base.tokenizer,
        picture_tokens(config, vision.shape[0]),
        (*base.family.chat_forms, *FORMS),
    )

    projector = add_trained(base.model, config, vision.shape[1])
    model = VisionLanguageModel(base.model, projector, chat_format.image_id).to(device)
    for owner, is_trained in (("lora", config.train_lora), ("projector", config.train_projector)):
        for _, parameter in model.owners()[owner]:
            parameter.requires_grad_(is_trained)
    return Assembled(model, base, vision, chat_format, device, reason)


def add_trained(base: LanguageModel, config: Config, vision_dim: int) -> Projector:
    """Give the base a fresh adapter, and return a fresh projector, drawn from `config.seed`."""
    generator = torch.Generator().manual_seed(config.seed)
    inject(
        base,
        config.lora_targets,
        config.lora_rank,
        config.lora_alpha,
        config.lora_dropout,
        generator,
        rounds=config.merge_rounding != "none",
        rank_stabilized=config.rank_stabilized,
        fused=fused_parts(base.config),
    )
    projector = projector_of(config, vision_dim, base.config.hidden_size)
    projector.reset_parameters(generator)
    return projector


def multiply_by_integers(model: nn.Module) -> None:
    """Have the forward of a training multiply by 4-bit weights as answering does, about twice as
    fast as by dequantised ones and rounded as `ops.kernels.codebook` says. The backward is exact.

    Raises `PhiSightError` where there are no such weights, or no kernels for them.
    """
    layers = [layer for layer in model.modules() if isinstance(layer, PanelLinear)]
    if not layers:
        reason = kernels.available()[1] if kernels.available()[0] == "" else "no 4-bit layer"
        raise PhiSightError(
            f"--compute-type int16: needs 4-bit weights on a CPU with kernels ({reason});"
            " use float32"
        )
    for layer in layers:
        layer.by_integers = True


def settle_rounded(model: nn.Module) -> None:
    """Before a model answers that was trained with `--merge-rounding`: keep the rounded weights
    alone, as a plain 4-bit model does. Nothing is computed otherwise, in less memory; it is not to
    be trained or loaded into after that."""
    rounding = [m for m in model.modules() if isinstance(m, LoRALinear) and m.rounds]
    for layer in rounding:
        layer.settle()
    if rounding:
        settle_panels(model)


def model_state(model: VisionLanguageModel) -> dict[str, dict[str, Tensor]]:
    """What training changes, by checkpoint file."""
    return {
        "lora_weights": lora_state(model.language_model),
        "image_projector": dict(model.projector.state_dict()),
    }


def load_model_state(model: VisionLanguageModel, state: Mapping[str, Mapping[str, Tensor]]) -> None:
    """The inverse of `model_state`, strict both ways."""
    what, remedy = "image_projector", "use a checkpoint of this base and this picture encoder"
    found, own = name_of(state["image_projector"]), model.projector.name
    if found and found != own:
        raise PhiSightError(
            f"{what}: holds a projector {found}, and the model has {own}; use --projector {found},"
            f" or a checkpoint with --projector {own}"
        )
    if model.projector.has_queries:
        remedy += ", and its --projector-queries"
    projector = model.projector.state_dict()
    check_fit(projector, state["image_projector"], what, remedy)  # before the adapter is changed
    for name, tensor in (*state["lora_weights"].items(), *state["image_projector"].items()):
        if not tensor.isfinite().all():
            raise PhiSightError(f"{name}: holds values that are not finite; use another checkpoint")
    load_lora_state(model.language_model, state["lora_weights"])
    copy_into(projector, state["image_projector"], what, remedy)
