"""Two linear layers with a GELU between them, for each feature alone."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from model.projectors.projector import Projector


class MlpProjector(Projector):
    """Linear, GELU, Linear with hidden size `text_dim`: LLaVA-1.5's projector (arXiv:2310.03744).

    Parameters are float32 ("linear_1.weight", "linear_1.bias", "linear_2.weight", "linear_2.bias").
    Dropout, in training alone, acts between the GELU and the second layer.
    """

    name = "mlp"
    reads = "linear_1.weight"

    def __init__(
        self, vision_dim: int, text_dim: int, dropout: float = 0.0, queries: int = 0
    ) -> None:
        super().__init__(vision_dim, text_dim, dropout)
        self.linear_1 = nn.Linear(vision_dim, text_dim, dtype=torch.float32)
        self.linear_2 = nn.Linear(text_dim, text_dim, dtype=torch.float32)

    def forward(
        self,
        image_features: Tensor,
        row_keys: Sequence[int] | None = None,
        row_tokens: Sequence[int] | None = None,
    ) -> Tensor:
        """As `Projector.forward`; there are as many tokens as features."""
        hidden = functional.gelu(self.linear_1(image_features.to(self.linear_1.weight.dtype)))
        return self.linear_2(self.dropped(hidden, row_keys, row_tokens))
