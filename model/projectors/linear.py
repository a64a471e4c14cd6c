"""One linear layer, for each feature alone."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from errors import PhiSightError
from model.projectors.projector import Projector


class LinearProjector(Projector):
    """One linear layer with a bias: the first LLaVA's projector (arXiv:2304.08485).

    Parameters are float32 ("linear.weight", "linear.bias"). Raises `PhiSightError` for dropout.
    """

    name = "linear"
    reads = "linear.weight"

    def __init__(
        self, vision_dim: int, text_dim: int, dropout: float = 0.0, queries: int = 0
    ) -> None:
        super().__init__(vision_dim, text_dim)
        if dropout:
            raise PhiSightError(
                f"--projector-dropout {dropout:g}: acts between a projector's layers, and"
                " --projector linear has one layer; use --projector-dropout 0, or --projector mlp"
            )
        self.linear = nn.Linear(vision_dim, text_dim, dtype=torch.float32)

    def forward(
        self,
        image_features: Tensor,
        row_keys: Sequence[int] | None = None,
        row_tokens: Sequence[int] | None = None,
    ) -> Tensor:
        """As `Projector.forward`; there are as many tokens as features."""
        return self.linear(image_features.to(self.linear.weight.dtype))
