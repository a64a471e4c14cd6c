"""CLIP's vision transformer and the preparation of its pictures, in plain PyTorch.

Bit for bit what transformers' `CLIPVisionModel` and `CLIPImageProcessorPil` compute: the tests
compare them. It is written out here because importing those takes longer than answering a question.
Parameter names are those of the hub's files, without their prefix `vision_model.`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from errors import PhiSightError
from workers.fitting import Fit, Fitted

ACTIVATIONS = ("quick_gelu", "gelu")


@dataclass(frozen=True)
class ClipConfig:
    """The sizes of a vision transformer; the defaults are those that transformers fills in."""

    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    num_channels: int = 3
    image_size: int = 224
    patch_size: int = 32
    layer_norm_eps: float = 1e-5
    hidden_act: str = "quick_gelu"

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> ClipConfig:
        """From a config.json of a whole CLIP or of its vision half. Raises `PhiSightError`."""
        kind = content.get("model_type")
        if kind not in ("clip", "clip_vision_model"):
            raise PhiSightError(f"its model_type is {kind!r}, not 'clip'")
        fields = content.get("vision_config") if kind == "clip" else content
        if not isinstance(fields, Mapping):
            raise PhiSightError("its vision_config is no JSON object")
        given = {name: fields[name] for name in cls.__dataclass_fields__ if name in fields}
        for name, value in given.items():
            if name == "layer_norm_eps":
                good = isinstance(value, float) and 0 <= value < 1
            elif name == "hidden_act":
                good = value in ACTIVATIONS
            else:
                good = isinstance(value, int) and not isinstance(value, bool) and value > 0
            if not good:
                raise PhiSightError(f"its {name} is {value!r}")
        config = cls(**given)
        if config.hidden_size % config.num_attention_heads:
            raise PhiSightError(
                f"its hidden_size {config.hidden_size} is not a multiple of its"
                f" num_attention_heads {config.num_attention_heads}"
            )
        return config

    @property
    def tokens(self) -> int:
        """Of a picture, the class token among them."""
        return (self.image_size // self.patch_size) ** 2 + 1


class Embeddings(nn.Module):
    """Patches with a class token in front, and where each of them stands."""

    def __init__(self, config: ClipConfig) -> None:
        super().__init__()
        dim, patch = config.hidden_size, config.patch_size
        self.class_embedding = nn.Parameter(torch.zeros(dim))
        self.patch_embedding = nn.Conv2d(config.num_channels, dim, patch, patch, bias=False)
        # Not `nn.Embedding(...)`: to draw its weights on the meta device, torch loads its compiler.
        table = torch.empty(config.tokens, dim)
        self.position_embedding = nn.Embedding.from_pretrained(table, freeze=False)

    def forward(self, pixels: Tensor) -> Tensor:
        """(pictures, channels, side, side) -> (pictures, 1 + patches, dim)."""
        patches = self.patch_embedding(pixels).flatten(2).transpose(1, 2)
        first = self.class_embedding.expand(len(pixels), 1, -1)
        return torch.cat([first, patches], dim=1) + self.position_embedding.weight


class Attention(nn.Module):
    """Every token sees every other."""

    def __init__(self, config: ClipConfig) -> None:
        super().__init__()
        dim = config.hidden_size
        self.heads = config.num_attention_heads
        self.k_proj, self.v_proj = nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.q_proj, self.out_proj = nn.Linear(dim, dim), nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """(pictures, tokens, dim) -> the same."""
        queries, keys, values = (
            projection(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )  # (pictures, heads, tokens, head dim)
        mixed = F.scaled_dot_product_attention(queries, keys, values)
        return self.out_proj(mixed.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    def __init__(self, config: ClipConfig) -> None:
        super().__init__()
        self.quick = config.hidden_act == "quick_gelu"
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        x = self.fc1(x)
        if not self.quick:
            return self.fc2(F.gelu(x))
        return self.fc2(torch.mul(x, 1.702).sigmoid_().mul_(x))  # x * sigmoid(1.702 x)


class Layer(nn.Module):
    def __init__(self, config: ClipConfig) -> None:
        super().__init__()
        self.self_attn = Attention(config)
        self.layer_norm1 = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.mlp = MLP(config)
        self.layer_norm2 = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class Encoder(nn.Module):
    """Gives the layers the names that the hub's files have."""

    def __init__(self, config: ClipConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))


class ClipVision(nn.Module):
    """The vision transformer of a CLIP (arXiv:2103.00020)."""

    def __init__(self, config: ClipConfig) -> None:
        super().__init__()
        self.embeddings = Embeddings(config)
        # The hub's files spell it so.
        self.pre_layrnorm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.encoder = Encoder(config)
        self.post_layernorm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)

    def hidden_state(self, pixels: Tensor, layer: int) -> Tensor:
        """(pictures, channels, side, side) -> (pictures, 1 + patches, dim) before layer `layer`, or
        behind all of them; negative numbers count from behind, -1 being the last state."""
        layers = self.encoder.layers
        x = self.pre_layrnorm(self.embeddings(pixels))
        for number in range(layer if layer >= 0 else len(layers) + 1 + layer):
            x = layers[number](x)
        return x

    def pooled(self, pixels: Tensor) -> Tensor:
        """(pictures, channels, side, side) -> (pictures, dim): the normed class token."""
        return self.post_layernorm(self.hidden_state(pixels, -1)[:, 0])


# -- pictures -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Preparation:
    """What a preprocessor_config.json says is done to a picture before the CLIP sees it."""

    fit: Fit
    scale: float | None
    """what bytes are multiplied with"""
    mean: tuple[float, ...] | None
    std: tuple[float, ...] | None
    mean_colour: tuple[int, ...]
    """in bytes, also where nothing is normalised by it"""

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> Preparation:
        """Missing fields are what transformers fills in. Raises `PhiSightError`."""
        try:
            return cls._read(content)
        except (TypeError, ValueError, KeyError, AttributeError) as error:
            raise PhiSightError(f"it describes no preparation of pictures ({error!r})") from None

    @classmethod
    def _read(cls, content: Mapping[str, Any]) -> Preparation:
        size, crop = content.get("size", 224), content.get("crop_size", 224)
        if isinstance(size, int):
            size = {"shortest_edge": size}
        if isinstance(crop, int):
            crop = {"height": crop, "width": crop}
        resized = content.get("do_resize", True)
        by_edge = resized and "shortest_edge" in size
        cropped = content.get("do_center_crop", True)
        rescaled = content.get("do_rescale", True)
        normed = content.get("do_normalize", True)
        if content.get("do_pad"):
            raise ValueError("do_pad")
        mean = content.get("image_mean", (0.48145466, 0.4578275, 0.40821073))
        std = content.get("image_std", (0.26862954, 0.26130258, 0.27577711))
        fit = Fit(
            int(size["shortest_edge"]) if by_edge else None,
            (int(size["height"]), int(size["width"])) if resized and not by_edge else None,
            Image.Resampling(content.get("resample", Image.Resampling.BICUBIC)),
            (int(crop["height"]), int(crop["width"])) if cropped else None,
        )
        return cls(
            fit,
            float(content.get("rescale_factor", 1 / 255)) if rescaled else None,
            tuple(map(float, mean)) if normed else None,
            tuple(map(float, std)) if normed else None,
            tuple(int(float(value) * 255) for value in mean),
        )

    def padded(self) -> Preparation:
        """The same, of pictures that are first made square with the mean colour, as LLaVA-1.5 does
        (arXiv:2310.03744, in the integers of transformers' `LlavaImageProcessor`)."""
        red, green, blue = self.mean_colour
        fit = dataclasses.replace(self.fit, padding=(red, green, blue))
        return dataclasses.replace(self, fit=fit)

    def __call__(self, pictures: Sequence[Image.Image | Fitted]) -> Tensor:
        """RGB pictures of any size, or fitted ones -> (pictures, 3, height, width) float32."""
        return torch.from_numpy(numpy.stack([self._pixels(picture) for picture in pictures]))

    def _pixels(self, picture: Image.Image | Fitted) -> numpy.ndarray:
        fitted = picture if isinstance(picture, Fitted) else self.fit(picture)
        pixels = fitted.pixels  # (height, width, 3) bytes
        if self.scale is not None:
            pixels = pixels.astype(numpy.float64) * self.scale
        pixels = pixels.astype(numpy.float32)
        if self.mean is not None:
            mean, std = numpy.array((self.mean, self.std), dtype=numpy.float32)
            pixels = (pixels - mean) / std
        return pixels.transpose(2, 0, 1)
