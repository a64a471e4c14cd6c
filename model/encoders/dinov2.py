"""DINOv2 (arXiv:2304.07193), and with registers (arXiv:2309.16588): transformers' `Dinov2Model`.

It was trained on pictures alone, without texts. Its positions are of a larger grid than it is
shown, and interpolated.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from errors import PhiSightError
from model.encoders.encoder import (
    MLP,
    EncoderConfig,
    PictureEncoder,
    in_a_row,
    patch_embedding,
    resized_positions,
)
from model.encoders.preparation import Preparation

# What the hub's files call the parts that CLIP has too.
_RENAMED = (
    ("encoder.layer.", "encoder.layers."),
    (".norm1.", ".layer_norm1."),
    (".norm2.", ".layer_norm2."),
    (".attention.attention.query.", ".self_attn.q_proj."),
    (".attention.attention.key.", ".self_attn.k_proj."),
    (".attention.attention.value.", ".self_attn.v_proj."),
    (".attention.output.dense.", ".self_attn.out_proj."),
)
_UNREAD = "embeddings.mask_token"  # it stands for what is hidden from it in its own training


@dataclass(frozen=True)
class Dinov2Config(EncoderConfig):
    """A DINOv2: a class token in front of the patches, and learnt scales of both halves of a
    layer."""

    NAME: ClassVar[str] = "DINOv2"
    KINDS: ClassVar[Mapping[str, str]] = {"dinov2": ""}
    PREFIXES: ClassVar[tuple[str, ...]] = ("dinov2.", "dinov2_with_registers.")
    PROCESSOR: ClassVar[str] = "BitImageProcessor"
    ANTIALIAS: ClassVar[bool] = False
    """whether positions are smoothed before they are interpolated to a smaller grid"""

    patch_size: int = 14
    mlp_ratio: int = 4
    qkv_bias: bool = True
    use_swiglu_ffn: bool = False
    num_register_tokens: int = 0
    """tokens of no place in the picture, between the class token and the patches"""

    @property
    def in_front(self) -> int:
        return 1 + self.num_register_tokens

    def build(self) -> Dinov2Vision:
        return Dinov2Vision(self)

    def mlp(self) -> nn.Module:
        inner = self.hidden_size * self.mlp_ratio
        if self.use_swiglu_ffn:
            return SwiGLU(self.hidden_size, inner)
        return MLP(self.hidden_size, inner, self.hidden_act)

    def scale(self) -> nn.Module:
        return LayerScale(self.hidden_size)

    def attention_bias(self) -> bool:
        return self.qkv_bias

    def own_name(self, name: str) -> str | None:
        if name == _UNREAD:
            return None
        for theirs, ours in _RENAMED:
            name = name.replace(theirs, ours)
        return name

    def preparation(self, content: Mapping[str, Any]) -> Preparation:
        """Pictures of any size are read if all are squares of one: `image_size` is of the grid
        whose positions were learnt."""
        found = Preparation.from_dict(content, self.PROCESSOR)
        height, width = found.made or (0, 0)
        if height != width or height < self.patch_size:
            raise PhiSightError(
                f"makes pictures of {found.made}, and squares of at least one patch of"
                f" {self.patch_size} are read; fetch it again"
            )
        return found


@dataclass(frozen=True)
class Dinov2WithRegistersConfig(Dinov2Config):
    """A DINOv2 with registers."""

    NAME: ClassVar[str] = "DINOv2 with registers"
    KINDS: ClassVar[Mapping[str, str]] = {"dinov2_with_registers": ""}
    ANTIALIAS: ClassVar[bool] = True

    patch_size: int = 16
    num_register_tokens: int = 4


class LayerScale(nn.Module):
    """A factor for each dimension, in the place of a plain sum (arXiv:2103.17239)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.lambda1 = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.lambda1


class SwiGLU(nn.Module):
    """The MLP of the largest DINOv2, with a gate (arXiv:2002.05202). It has two thirds of the
    width of a plain one, made up to a multiple of 8."""

    def __init__(self, dim: int, inner: int) -> None:
        super().__init__()
        inner = (int(inner * 2 / 3) + 7) // 8 * 8
        self.weights_in, self.weights_out = nn.Linear(dim, 2 * inner), nn.Linear(inner, dim)

    def forward(self, x: Tensor) -> Tensor:
        # As two products, which round as those of two layers do.
        weights, biases = self.weights_in.weight.chunk(2), self.weights_in.bias.chunk(2)
        gate, up = (F.linear(x, weights[half], biases[half]) for half in (0, 1))
        return self.weights_out(F.silu(gate) * up)


class Embeddings(nn.Module):
    """Patches, with a class token and registers in front, and where each patch stands."""

    def __init__(self, config: Dinov2Config) -> None:
        super().__init__()
        dim, places = config.hidden_size, (config.image_size // config.patch_size) ** 2
        self.antialias = config.ANTIALIAS
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.position_embeddings = nn.Parameter(torch.zeros(1, 1 + places, dim))
        if registers := config.num_register_tokens:
            self.register_tokens = nn.Parameter(torch.zeros(1, registers, dim))
        # With the names of the hub's files.
        self.patch_embeddings = nn.ModuleDict({"projection": patch_embedding(config, bias=True)})

    def forward(self, pixels: Tensor) -> Tensor:
        """(pictures, channels, side, side) -> (pictures, 1 + registers + patches, dim)."""
        planes = self.patch_embeddings["projection"](pixels)
        first, places = self.position_embeddings[:, :1], self.position_embeddings[:, 1:]
        if planes[0, 0].numel() != places.shape[1]:
            side = planes.shape[-1]
            places = resized_positions(places[0], side, "bicubic", self.antialias)[None]
        front = [(self.cls_token + first).expand(len(pixels), -1, -1)]
        front += [tokens.expand(len(pixels), -1, -1) for tokens in self._registers()]
        return torch.cat([*front, in_a_row(planes) + places], dim=1)

    def _registers(self) -> list[Tensor]:
        return [self.register_tokens] if hasattr(self, "register_tokens") else []


class Dinov2Vision(PictureEncoder):
    """A DINOv2, with registers or without."""

    def __init__(self, config: Dinov2Config) -> None:
        super().__init__(config)
        self.embeddings = Embeddings(config)
        self.layernorm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)

    def embedded(self, pixels: Tensor) -> Tensor:
        return self.embeddings(pixels)

    def pooled(self, pixels: Tensor) -> Tensor:
        """(pictures, channels, side, side) -> (pictures, dim): the normed class token."""
        return self.layernorm(self.hidden_state(pixels, -1))[:, 0]
