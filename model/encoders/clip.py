"""CLIP's vision transformer (arXiv:2103.00020): bit for bit transformers' `CLIPVisionModel`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from model.encoders.encoder import (
    MLP,
    EncoderConfig,
    PictureEncoder,
    in_a_row,
    patch_embedding,
    position_table,
)


@dataclass(frozen=True)
class ClipConfig(EncoderConfig):
    """A CLIP: a class token in front of the patches, and quick GELU."""

    NAME: ClassVar[str] = "CLIP"
    KINDS: ClassVar[Mapping[str, str]] = {"clip": "vision_config", "clip_vision_model": ""}
    PROCESSOR: ClassVar[str] = "CLIPImageProcessor"

    intermediate_size: int = 3072
    patch_size: int = 32
    layer_norm_eps: float = 1e-5
    hidden_act: str = "quick_gelu"

    @property
    def in_front(self) -> int:
        return 1

    @property
    def tokens(self) -> int:
        """Of a picture, the class token among them."""
        return (self.image_size // self.patch_size) ** 2 + self.in_front

    def build(self) -> ClipVision:
        return ClipVision(self)

    def mlp(self) -> nn.Module:
        return MLP(self.hidden_size, self.intermediate_size, self.hidden_act)


class Embeddings(nn.Module):
    """Patches with a class token in front, and where each of them stands."""

    def __init__(self, config: ClipConfig) -> None:
        super().__init__()
        self.class_embedding = nn.Parameter(torch.zeros(config.hidden_size))
        self.patch_embedding = patch_embedding(config, bias=False)
        self.position_embedding = position_table(config.tokens, config.hidden_size)

    def forward(self, pixels: Tensor) -> Tensor:
        """(pictures, channels, side, side) -> (pictures, 1 + patches, dim)."""
        patches = in_a_row(self.patch_embedding(pixels))
        first = self.class_embedding.expand(len(pixels), 1, -1)
        return torch.cat([first, patches], dim=1) + self.position_embedding.weight


class ClipVision(PictureEncoder):
    """The vision half of a CLIP."""

    def __init__(self, config: ClipConfig) -> None:
        super().__init__(config)
        self.embeddings = Embeddings(config)
        # The hub's files spell it so.
        self.pre_layrnorm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.post_layernorm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)

    def embedded(self, pixels: Tensor) -> Tensor:
        return self.pre_layrnorm(self.embeddings(pixels))

    def pooled(self, pixels: Tensor) -> Tensor:
        """(pictures, channels, side, side) -> (pictures, dim): the normed class token."""
        return self.post_layernorm(self.hidden_state(pixels, -1)[:, 0])
