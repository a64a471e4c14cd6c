"""The trainable bridge from picture features to the language model's embedding space."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional


class ImageProjector(nn.Module):
    """Linear, GELU, Linear with hidden size `text_dim`: LLaVA-1.5's projector (arXiv:2310.03744).

    Parameters are float32 ("linear_1.weight", "linear_1.bias", "linear_2.weight", "linear_2.bias").
    """

    def __init__(self, vision_dim: int, text_dim: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(vision_dim, text_dim, dtype=torch.float32)
        self.linear_2 = nn.Linear(text_dim, text_dim, dtype=torch.float32)

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator) -> None:
        """Draw all parameters from U(-1/sqrt(inputs), 1/sqrt(inputs)), as `nn.Linear` does.

        Drawn on the generator's device and copied, so that a seed means the same on any machine.
        """
        for linear in (self.linear_1, self.linear_2):
            bound = 1 / math.sqrt(linear.in_features)
            for parameter in (linear.weight, linear.bias):
                drawn = torch.empty(parameter.shape, device=generator.device)
                parameter.copy_(drawn.uniform_(-bound, bound, generator=generator))

    def forward(self, image_features: Tensor) -> Tensor:
        """(images, tokens, vision_dim) of any float dtype -> (images, tokens, text_dim) float32."""
        hidden = self.linear_1(image_features.to(self.linear_1.weight.dtype))
        return self.linear_2(functional.gelu(hidden))
