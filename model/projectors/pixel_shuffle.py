"""Four neighbouring patches laid side by side into one token, and an MLP over it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from errors import PhiSightError
from model.grid import blocks_of, side_of
from model.projectors.mlp import MlpProjector

SIDE = 2


class PixelShuffleProjector(MlpProjector):
    """The features of each 2 x 2 patches one behind the other, a layer norm, Linear, GELU, Linear:
    InternVL 1.5's projector (arXiv:2404.16821), which has no more weights than these, under the
    names that transformers gives them.

    Parameters are float32: those of `MlpProjector`, "layer_norm.weight" and "layer_norm.bias".
    """

    name = "pixel-shuffle"
    patches = SIDE * SIDE

    def __init__(
        self, vision_dim: int, text_dim: int, dropout: float = 0.0, queries: int = 0
    ) -> None:
        super().__init__(self.patches * vision_dim, text_dim, dropout)
        self.layer_norm = nn.LayerNorm(self.patches * vision_dim, dtype=torch.float32)

    @classmethod
    def tokens_of(cls, given: int, queries: int) -> int:
        """A quarter. Raises `PhiSightError` for a grid that 2 x 2 does not divide."""
        side = side_of(given)
        if side is None or side % SIDE:
            found = f"{side} x {side} patches" if side else f"{given} tokens, which make no square"
            found = "one vector" if given == 1 else found
            raise PhiSightError(
                f"--projector {cls.name}: lays {SIDE} x {SIDE} patches into one token, and the"
                f" features of a picture are {found}; use --projector mlp, or an encoder,"
                " --vision-features and --feature-pooling that give an even number of patches a"
                " side"
            )
        return given // cls.patches

    def forward(
        self,
        image_features: Tensor,
        row_keys: Sequence[int] | None = None,
        row_tokens: Sequence[int] | None = None,
    ) -> Tensor:
        """As `Projector.forward`; the features are a square grid, row by row, and so are the
        tokens. Within a token the patches of its upper row come first, from left to right."""
        tokens = blocks_of(image_features, SIDE).flatten(2)  # (images, tokens, 4 vision dim)
        normed = self.layer_norm(tokens.to(self.layer_norm.weight.dtype))
        return super().forward(normed, row_keys, row_tokens)
