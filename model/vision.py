"""The eyes: a frozen CLIP vision tower, pictures -> (pictures, tokens, dim)."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub.errors import StrictDataclassError
from PIL import Image
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import CLIPImageProcessorPil, CLIPVisionConfig, CLIPVisionModel

from errors import PhiSightError
from model.base import find_folder, find_weight_files, hash_files

LAYOUT = "it needs config.json, preprocessor_config.json and model.safetensors"


@dataclass(frozen=True)
class VisionSpec:
    """Which CLIP, and how it is read: all that is needed to name features without computing any."""

    folder: Path
    features: str
    """"patches": hidden layer `layer` without the class token (LLaVA takes -2, arXiv 2304.08485);
    "pooled": the pooled class token as one vector"""
    layer: int
    shape: tuple[int, int]
    """(tokens, dim) of one picture"""
    key: str
    """names the weights, the preprocessing and the way of reading: features of one key are equal"""


def read_vision_spec(
    id_or_folder: str, revision: str = "", features: str = "patches", layer: int = -2
) -> VisionSpec:
    """Find the CLIP, check its config and fingerprint its files, without loading the weights."""
    folder = find_folder(id_or_folder, revision or None)
    try:
        config = CLIPVisionConfig.from_pretrained(folder)
        patches = (config.image_size // config.patch_size) ** 2
    except (OSError, ValueError, TypeError, LookupError, ArithmeticError, AttributeError,
            StrictDataclassError) as error:  # a config.json of any content
        raise PhiSightError(f"{folder}: not a CLIP folder ({error}); {LAYOUT}") from None
    layers = config.num_hidden_layers
    if not -layers - 1 <= layer <= layers:
        raise PhiSightError(f"--vision-layer {layer}: this CLIP has {layers} layers; use -2")
    shape = (patches if features == "patches" else 1, config.hidden_size)
    files = [folder / "config.json", folder / "preprocessor_config.json"]
    for file in files:
        if not file.is_file():
            raise PhiSightError(f"{file}: no such file; {LAYOUT}")
    said = f"{hash_files([*files, *find_weight_files(folder)])}/{features}/{layer}"
    key = hashlib.sha256(said.encode()).hexdigest()[:16]
    return VisionSpec(folder, features, layer, shape, key)


class VisionTower:
    """CLIP's vision transformer and its image processor, frozen, in float32."""

    def __init__(self, spec: VisionSpec, device: torch.device | str = "cpu") -> None:
        try:
            self.processor = CLIPImageProcessorPil.from_pretrained(spec.folder)
        except (OSError, ValueError) as error:
            raise PhiSightError(f"{spec.folder}: {error}; {LAYOUT}") from None
        self.model = CLIPVisionModel(CLIPVisionConfig.from_pretrained(spec.folder))
        load_vision_weights(self.model, find_weight_files(spec.folder))
        self.model.requires_grad_(False).eval().to(device)
        self.spec, self.device = spec, torch.device(device)

    @torch.no_grad()
    def __call__(self, pictures: Sequence[Image.Image]) -> Tensor:
        """RGB pictures of any size -> (pictures, tokens, dim) float32."""
        pixels = self.processor(list(pictures), return_tensors="pt")["pixel_values"]
        output = self.model(pixel_values=pixels.to(self.device), output_hidden_states=True)
        if self.spec.features == "pooled":
            return output.pooler_output[:, None, :]
        return output.hidden_states[self.spec.layer][:, 1:]  # (pictures, patches, dim)


def load_vision_weights(model: CLIPVisionModel, files: Sequence[Path]) -> None:
    """The vision half of a CLIP checkpoint, strict: the text half is not read.

    A file calls these tensors `vision_model.…`; releases of transformers differ in whether the
    module does too, so names are compared without that prefix.
    """
    prefix = "vision_model."
    wanted = {name.removeprefix(prefix): name for name in model.state_dict()}
    state: dict[str, Tensor] = {}
    for file in files:
        try:
            with safe_open(file, framework="pt") as tensors:
                for name in tensors.keys():
                    if name.startswith(prefix) and not name.endswith(".position_ids"):
                        own = wanted.get(name.removeprefix(prefix), name)
                        state[own] = tensors.get_tensor(name).float()
        except (SafetensorError, OSError) as error:
            raise PhiSightError(f"{file}: not readable ({error}); fetch it again") from None
    try:
        model.load_state_dict(state, strict=True)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:300]
        raise PhiSightError(
            f"{files[0]}: not this CLIP's weights ({reason}); fetch the folder again"
        ) from None
