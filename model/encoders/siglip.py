"""SigLIP's vision transformer (arXiv:2303.15343): bit for bit transformers' `SiglipVisionModel`.

SigLIP2 of a fixed resolution (arXiv:2502.14786) is the same model, and its folders say so.
"""

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
class SiglipConfig(EncoderConfig):
    """A SigLIP: patches alone, GELU by its tanh formula, and a head that pools by attention."""

    NAME: ClassVar[str] = "SigLIP"
    KINDS: ClassVar[Mapping[str, str]] = {"siglip": "vision_config", "siglip_vision_model": ""}
    PROCESSOR: ClassVar[str] = "SiglipImageProcessor"

    intermediate_size: int = 3072
    hidden_act: str = "gelu_pytorch_tanh"
    vision_use_head: bool = True

    @property
    def pools(self) -> bool:
        return self.vision_use_head

    def build(self) -> SiglipVision:
        return SiglipVision(self, Embeddings(self))

    def mlp(self) -> nn.Module:
        return MLP(self.hidden_size, self.intermediate_size, self.hidden_act)


class Embeddings(nn.Module):
    """Patches, and where each of them stands."""

    def __init__(self, config: SiglipConfig) -> None:
        super().__init__()
        self.patch_embedding = patch_embedding(config, bias=True)
        places = (config.image_size // config.patch_size) ** 2
        self.position_embedding = position_table(places, config.hidden_size)

    def forward(self, pixels: Tensor) -> Tensor:
        """(pictures, channels, side, side) -> (pictures, patches, dim)."""
        return in_a_row(self.patch_embedding(pixels)) + self.position_embedding.weight


class PoolingHead(nn.Module):
    """One query that was learnt sees all states."""

    def __init__(self, config: SiglipConfig) -> None:
        super().__init__()
        dim = config.hidden_size
        self.probe = nn.Parameter(torch.zeros(1, 1, dim))
        self.attention = nn.MultiheadAttention(dim, config.num_attention_heads, batch_first=True)
        self.layernorm = nn.LayerNorm(dim, config.layer_norm_eps)
        self.mlp = config.mlp()

    def forward(self, states: Tensor) -> Tensor:
        """(pictures, patches, dim) -> (pictures, dim)."""
        x, _ = self.attention(self.probe.repeat(len(states), 1, 1), states, states)
        return (x + self.mlp(self.layernorm(x)))[:, 0]


class SiglipVision(PictureEncoder):
    """The vision half of a SigLIP, or of a SigLIP2 of either form."""

    def __init__(self, config: SiglipConfig, embeddings: nn.Module) -> None:
        super().__init__(config)
        self.embeddings = embeddings
        self.post_layernorm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        if config.pools:
            self.head = PoolingHead(config)

    def embedded(self, pixels: Tensor) -> Tensor:
        return self.embeddings(pixels)

    def pooled(self, pixels: Tensor) -> Tensor:
        """(pictures, channels, side, side) -> (pictures, dim): what the head makes of the normed
        last state."""
        return self.head(self.post_layernorm(self.hidden_state(pixels, -1)))
