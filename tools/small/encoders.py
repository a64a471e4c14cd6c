"""Picture encoders of every kind, small and with random weights, in the hub's own folder layout.

They are for tests, and for trying each encoder with each base: all see 4 x 4 patches of 8 pixels.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import CLIPImageProcessorPil, SiglipImageProcessorPil
from transformers.models.bit.image_processing_pil_bit import BitImageProcessorPil
from transformers.models.siglip2.image_processing_pil_siglip2 import Siglip2ImageProcessorPil

SIDE, PATCH = 4, 8  # patches a side, pixels a patch
PIXELS = SIDE * PATCH
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
KINDS = ("clip", "siglip", "siglip2", "dinov2", "dinov2_with_registers")
_CLASSES = {
    "clip": "CLIP",
    "siglip": "Siglip",
    "siglip2": "Siglip2",
    "dinov2": "Dinov2",
    "dinov2_with_registers": "Dinov2WithRegisters",
}
_TEXT = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "vocab_size": 64}
_DINO = _CLASSES.keys() - {"clip", "siglip", "siglip2"}  # these see pictures and nothing else


def write_encoder(
    kind: str, folder: str | Path, seed: int = 0, whole: bool = False, **sizes: Any
) -> Path:
    """Write config.json, preprocessor_config.json and model.safetensors, by transformers' own
    `save_pretrained`, and return the folder.

    Args:
        kind: of `KINDS`; "siglip2" is NaFlex, and SigLIP2 of a fixed resolution is a "siglip".
        seed: what every weight is drawn from.
        whole: the vision half in a model with a text half or, of DINOv2, with a classifier.
        sizes: fields of transformers' config of the vision half, in place of the small ones.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = _model(kind, whole, _sizes(kind) | sizes)
        with torch.no_grad():
            for parameter in model.parameters():  # biases and tokens that begin as zeros too
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    model.save_pretrained(folder)
    _processor(kind, model).save_pretrained(folder)
    return Path(folder)


def _sizes(kind: str) -> dict[str, Any]:
    sizes = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "patch_size": PATCH,
    }
    if kind in _DINO:  # it has positions for more patches than it is shown
        return sizes | {"mlp_ratio": 2, "image_size": 6 * PATCH}
    extent = {"num_patches": 5 * 5} if kind == "siglip2" else {"image_size": PIXELS}
    return sizes | {"intermediate_size": 64} | extent


def _model(kind: str, whole: bool, sizes: dict[str, Any]) -> Any:
    name = _CLASSES[kind]
    if kind in _DINO:
        config = getattr(transformers, f"{name}Config")(**sizes)
        ending = "ForImageClassification" if whole else "Model"
        return getattr(transformers, name + ending)(config)
    if not whole:
        config = getattr(transformers, f"{name}VisionConfig")(**sizes)
        return getattr(transformers, f"{name}VisionModel")(config)
    text = _TEXT | {"num_attention_heads": 4, "bos_token_id": 0, "eos_token_id": 1}
    config = getattr(transformers, f"{name}Config")(text_config=text, vision_config=sizes)
    return getattr(transformers, f"{name}Model")(config)


def _processor(kind: str, model: Any) -> Any:
    config = getattr(model.config, "vision_config", model.config)
    if kind == "siglip2":
        return Siglip2ImageProcessorPil(patch_size=config.patch_size, max_num_patches=SIDE**2)
    if kind in _DINO:
        return BitImageProcessorPil(
            size={"shortest_edge": PIXELS + 5},
            crop_size={"height": PIXELS, "width": PIXELS},
            image_mean=IMAGENET_MEAN,
            image_std=IMAGENET_STD,
        )
    side = config.image_size
    if kind == "siglip":
        return SiglipImageProcessorPil(size={"height": side, "width": side})
    crop = {"height": side, "width": side}
    return CLIPImageProcessorPil(size={"shortest_edge": side}, crop_size=crop)
