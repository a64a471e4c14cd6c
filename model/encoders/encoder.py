"""What a picture encoder is: the sizes and ways of one kind, and a vision transformer made by them.

The encoders are vision transformers (arXiv:2010.11929): patches of a picture become tokens, and in
every layer each token sees every other. What they have in common stands here. A kind is a
subclass of `EncoderConfig`, which says what differs, and one of `PictureEncoder`, in a file of its
own. They are written out here because importing transformers takes longer than answering a
question; the tests compare with it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from errors import PhiSightError
from model.encoders.preparation import Preparation

ACTIVATIONS = ("quick_gelu", "gelu", "gelu_pytorch_tanh")
MOST_LAYERS, LARGEST = 1000, 2**16
"""what an encoder may ask for: it is made before its weights are looked for"""


@dataclass(frozen=True)
class EncoderConfig:
    """The sizes of an encoder, by their names in config.json. The defaults of a kind are those that
    transformers fills in. Methods and class variables say in what else a kind differs."""

    NAME: ClassVar[str]
    """in messages"""
    KINDS: ClassVar[Mapping[str, str]]
    """model_type of a config.json -> the key under which the sizes stand there; "" for none"""
    PREFIXES: ClassVar[tuple[str, ...]] = ("vision_model.",)
    """what a file puts before the names of these tensors if the model has another part too"""
    PROCESSOR: ClassVar[str]
    """of transformers, where preprocessor_config.json names none"""

    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    num_channels: int = 3
    image_size: int = 224
    patch_size: int = 16
    layer_norm_eps: float = 1e-6
    hidden_act: str = "gelu"

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> Self:
        """From a config.json whose model_type is of this kind. Raises `PhiSightError`."""
        key = cls.KINDS[content["model_type"]]
        found = content.get(key) if key else content
        if not isinstance(found, Mapping):
            raise PhiSightError(f"its {key} is no JSON object")
        given = {}
        for field in fields(cls):
            if field.name in found:
                given[field.name] = value = found[field.name]
                if not _good(field.name, field.default, value):
                    raise PhiSightError(f"its {field.name} is {value!r:.60}")
        config = cls(**given)
        config.check()
        return config

    def check(self) -> None:
        """Raise `PhiSightError` for sizes that do not go together."""
        if self.hidden_size % self.num_attention_heads:
            raise PhiSightError(
                f"its hidden_size {self.hidden_size} is not a multiple of its"
                f" num_attention_heads {self.num_attention_heads}"
            )
        if self.num_channels != 3:
            raise PhiSightError(f"its num_channels is {self.num_channels}, and pictures have 3")
        if self.image_size < self.patch_size:
            raise PhiSightError(
                f"its image_size {self.image_size} is less than its patch_size {self.patch_size}"
            )

    @property
    def least_numbers(self) -> int:
        """That its weights have: those of attention and of the patches."""
        layer = 4 * self.hidden_size**2
        return self.num_hidden_layers * layer + 3 * self.patch_size**2 * self.hidden_size

    @property
    def in_front(self) -> int:
        """How many tokens stand before the patches: the class token, registers."""
        return 0

    @property
    def pools(self) -> bool:
        """Whether it has a way to make one vector of a picture."""
        return True

    def build(self) -> PictureEncoder:
        """The encoder, its weights yet to be loaded."""
        raise NotImplementedError

    def mlp(self) -> nn.Module:
        """The second half of a layer, (pictures, tokens, dim) -> the same."""
        raise NotImplementedError

    def scale(self) -> nn.Module:
        """What a half of a layer goes through before it is added to the states."""
        return nn.Identity()

    def attention_bias(self) -> bool:
        """Whether queries, keys and values have one."""
        return True

    def own_name(self, name: str) -> str | None:
        """A name in a file, without its prefix -> the one in `PictureEncoder.state_dict`; None for
        a tensor that is not read."""
        return None if name.endswith(".position_ids") else name

    def preparation(self, content: Mapping[str, Any]) -> Preparation:
        """From preprocessor_config.json. Raises `PhiSightError` where it is of other pictures than
        this encoder reads."""
        found = Preparation.from_dict(content, self.PROCESSOR)
        if found.made != (self.image_size, self.image_size):
            raise PhiSightError(
                f"makes pictures of {found.made}, and config.json takes"
                f" {(self.image_size, self.image_size)}; fetch both again"
            )
        return found

    def side(self, preparation: Preparation) -> int:
        """How many patches stand side by side, and above one another, in a prepared picture. What
        is left over of a picture at the right and at the bottom is not read."""
        assert preparation.made is not None
        return preparation.made[0] // self.patch_size


def _good(name: str, default: object, value: object) -> bool:
    if isinstance(default, bool):
        return isinstance(value, bool)
    if isinstance(default, float):
        return isinstance(value, float) and 0 <= value < 1
    if name == "hidden_act":
        return value in ACTIVATIONS
    if not isinstance(value, int) or isinstance(value, bool):
        return False
    least = 0 if default == 0 else 1  # of some things there may be none
    return least <= value <= (MOST_LAYERS if name == "num_hidden_layers" else LARGEST)


class PictureEncoder(nn.Module):
    """A vision transformer; subclasses say how a picture becomes tokens, and what pooled means.

    Parameter names are those of the hub's files of CLIP, without their prefix `vision_model.`.
    """

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.encoder = Stack(config)

    def embedded(self, pixels: Tensor) -> Tensor:
        """(pictures, 3, side, side) -> (pictures, tokens, dim), as the first layer takes it."""
        raise NotImplementedError

    def hidden_state(self, pixels: Tensor, layer: int) -> Tensor:
        """(pictures, 3, side, side) -> (pictures, tokens, dim) before layer `layer`, or behind all
        of them; negative numbers count from behind, -1 being the last state, which is not normed.
        """
        layers = self.encoder.layers
        x = self.embedded(pixels)
        for number in range(layer if layer >= 0 else len(layers) + 1 + layer):
            x = layers[number](x)
        return x

    def pooled(self, pixels: Tensor) -> Tensor:
        """(pictures, 3, side, side) -> (pictures, dim)."""
        raise NotImplementedError


class Stack(nn.Module):
    """Gives the layers the names that the hub's files have."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))


class Layer(nn.Module):
    """Attention and MLP, each over normed states and added to them."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.self_attn = Attention(config)
        self.layer_norm1 = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.layer_scale1 = config.scale()
        self.mlp = config.mlp()
        self.layer_norm2 = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.layer_scale2 = config.scale()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.layer_scale1(self.self_attn(self.layer_norm1(x)))
        return x + self.layer_scale2(self.mlp(self.layer_norm2(x)))


class Attention(nn.Module):
    """Every token sees every other."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        dim, bias = config.hidden_size, config.attention_bias()
        self.heads = config.num_attention_heads
        self.k_proj, self.v_proj = nn.Linear(dim, dim, bias), nn.Linear(dim, dim, bias)
        self.q_proj, self.out_proj = nn.Linear(dim, dim, bias), nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """(pictures, tokens, dim) -> the same."""
        queries, keys, values = (
            projection(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )  # (pictures, heads, tokens, head dim)
        mixed = F.scaled_dot_product_attention(queries, keys, values)
        return self.out_proj(mixed.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    """Linear, one of `ACTIVATIONS`, Linear."""

    def __init__(self, dim: int, inner: int, activation: str) -> None:
        super().__init__()
        self.quick = activation == "quick_gelu"
        self.approximate = "tanh" if activation == "gelu_pytorch_tanh" else "none"
        self.fc1, self.fc2 = nn.Linear(dim, inner), nn.Linear(inner, dim)

    def forward(self, x: Tensor) -> Tensor:
        x = self.fc1(x)
        if not self.quick:
            return self.fc2(F.gelu(x, approximate=self.approximate))
        return self.fc2(torch.mul(x, 1.702).sigmoid_().mul_(x))  # x * sigmoid(1.702 x)


def patch_embedding(config: EncoderConfig, bias: bool) -> nn.Conv2d:
    """(pictures, 3, side, side) -> (pictures, dim, rows, columns); see `in_a_row`."""
    patch = config.patch_size
    return nn.Conv2d(config.num_channels, config.hidden_size, patch, patch, bias=bias)


def in_a_row(patches: Tensor) -> Tensor:
    """(pictures, dim, rows, columns) -> (pictures, patches, dim), row by row."""
    return patches.flatten(2).transpose(1, 2)


def position_table(count: int, dim: int) -> nn.Embedding:
    """One vector for each of `count` places."""
    # Not `nn.Embedding(...)`: to draw its weights on the meta device, torch loads its compiler.
    return nn.Embedding.from_pretrained(torch.empty(count, dim), freeze=False)


def resized_positions(grid: Tensor, side: int, mode: str, antialias: bool) -> Tensor:
    """Positions of a square grid of patches, (patches, dim), of any count -> those of one of
    `side` by `side`, (side * side, dim), between which is interpolated."""
    across = int(len(grid) ** 0.5)
    planes = grid.reshape(1, across, across, -1).permute(0, 3, 1, 2)
    size = (side, side)
    resized = F.interpolate(planes, size, mode=mode, align_corners=False, antialias=antialias)
    return in_a_row(resized)[0]
