"""What a projector is: the trained bridge from picture features to the language model's
embeddings."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from lora.dropout import RowDropout, key_of


class Projector(nn.Module):
    """Features of pictures -> the embeddings that stand in their slots of the text.

    A member of `PROJECTORS` (`model.projectors`) has float32 parameters alone, whose names are
    those of no other member: by them a checkpoint's projector is known. It is made from the numbers
    of a feature and of an embedding; `queries` counts for a member that has some.
    """

    name: ClassVar[str]
    """what `--projector` calls it"""
    reads: ClassVar[str]
    """the parameter that has `patches` times the numbers of a feature as its last dimension"""
    patches: ClassVar[int] = 1
    has_queries: ClassVar[bool] = False

    def __init__(
        self, vision_dim: int, text_dim: int, dropout: float = 0.0, queries: int = 0
    ) -> None:
        super().__init__()
        self.dropout = RowDropout(dropout, key_of("dropout", "projector"))

    @classmethod
    def tokens_of(cls, given: int, queries: int) -> int:
        """How many tokens a picture becomes that comes as `given` features.

        Raises `PhiSightError` for a number that this projector cannot take.
        """
        return given

    def tokens(self, given: int) -> int:
        """As `tokens_of`."""
        return self.tokens_of(given, 0)

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator) -> None:
        """Draw the linear layers from U(-1/sqrt(inputs), 1/sqrt(inputs)), as `nn.Linear` does, one
        after the other; a layer norm begins as the identity. A member with other parameters draws
        those itself.

        Drawn on the generator's device and copied, so that a seed means the same on any machine.
        """
        for module in self.modules():
            if isinstance(module, nn.LayerNorm):
                module.reset_parameters()
            if isinstance(module, nn.Linear):
                bound = 1 / math.sqrt(module.in_features)
                for parameter in module.parameters(recurse=False):  # weight, bias
                    drawn = torch.empty(parameter.shape, device=generator.device)
                    parameter.copy_(drawn.uniform_(-bound, bound, generator=generator))

    def forward(
        self,
        image_features: Tensor,
        row_keys: Sequence[int] | None = None,
        row_tokens: Sequence[int] | None = None,
    ) -> Tensor:
        """(images, features, vision dim) of any float dtype -> (images, tokens, text dim) float32.

        row_keys, row_tokens: of the rows that the pictures stand in, what dropout draws by and how
        many picture tokens each has in the text; see `RowDropout`.
        """
        raise NotImplementedError

    def dropped(
        self, hidden: Tensor, row_keys: Sequence[int] | None, row_tokens: Sequence[int] | None
    ) -> Tensor:
        """(images, tokens, dim) -> the same with dropout, in training alone; by the row that a
        picture stands in."""
        # The pictures of all rows stand one behind the other, as rows without padding do.
        kept = self.dropout(hidden.flatten(0, 1)[None], row_keys, row_tokens)
        return kept.view_as(hidden)
