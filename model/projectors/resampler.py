"""A few learned queries that look at all features of a picture."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from errors import PhiSightError
from model.grid import positions, side_of
from model.projectors.projector import Projector

HEAD = 64  # numbers of an attention head, about
DEVIATION = 0.02  # of the queries, as they are drawn


class ResamplerProjector(Projector):
    """One cross-attention from learned queries to the features, a layer norm, Linear: the
    compression of Qwen-VL (arXiv:2308.12966), with 2D positions on the keys.

    It differs in two things: the attention is as wide as a feature and not as an embedding, which
    makes it small, and the queries get no positions, since they stand for no place.

    Parameters are float32: "queries" (queries, vision dim); the layer norms "norm_queries",
    "norm_features" and "norm_attended"; the linear layers "query", "key", "value" and "output" of
    the attention (vision dim to vision dim) and "linear" (to text dim). Dropout, in training alone,
    acts before "linear".
    """

    name = "resampler"
    reads = "queries"
    has_queries = True

    def __init__(
        self, vision_dim: int, text_dim: int, dropout: float = 0.0, queries: int = 0
    ) -> None:
        super().__init__(vision_dim, text_dim, dropout)
        if vision_dim % 4:  # a sine and a cosine, of the row and of the column
            raise PhiSightError(
                f"--projector resampler: places take features of a multiple of 4 numbers, not of"
                f" {vision_dim}; use --projector mlp, or another encoder"
            )
        most = max(1, vision_dim // HEAD)
        self.heads = next(heads for heads in range(most, 0, -1) if vision_dim % heads == 0)
        self.queries = nn.Parameter(torch.empty(queries, vision_dim, dtype=torch.float32))
        norms = (nn.LayerNorm(vision_dim, dtype=torch.float32) for _ in range(3))
        self.norm_queries, self.norm_features, self.norm_attended = norms
        square = (nn.Linear(vision_dim, vision_dim, dtype=torch.float32) for _ in range(3))
        self.query, self.value, self.output = square
        # What is added to all keys alike cancels in the softmax: a bias would learn nothing.
        self.key = nn.Linear(vision_dim, vision_dim, bias=False, dtype=torch.float32)
        self.linear = nn.Linear(vision_dim, text_dim, dtype=torch.float32)

    @classmethod
    def tokens_of(cls, given: int, queries: int) -> int:
        """One a query. Raises `PhiSightError` for features that are no grid of several patches."""
        if given == 1 or side_of(given) is None:
            found = "one vector" if given == 1 else f"{given} tokens, which make no square"
            raise PhiSightError(
                f"--projector {cls.name}: its queries look at a square grid of patches, and the"
                f" features of a picture are {found}; use --projector mlp, or an encoder and"
                " --vision-features that give patches"
            )
        return queries

    def tokens(self, given: int) -> int:
        return self.tokens_of(given, len(self.queries))

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator) -> None:
        """The linear layers as every projector draws them, then the queries from a normal
        distribution of deviation 0.02."""
        super().reset_parameters(generator)
        drawn = torch.empty(self.queries.shape, device=generator.device)
        self.queries.copy_(drawn.normal_(0, DEVIATION, generator=generator))

    def forward(
        self,
        image_features: Tensor,
        row_keys: Sequence[int] | None = None,
        row_tokens: Sequence[int] | None = None,
    ) -> Tensor:
        """As `Projector.forward`; the features are a square grid, row by row."""
        _, count, dim = image_features.shape
        features = self.norm_features(image_features.to(self.queries.dtype))
        places = positions(side_of(count) or 0, dim, features.device)
        query = self._by_head(self.query(self.norm_queries(self.queries))[None])
        key = self._by_head(self.key(features + places))
        value = self._by_head(self.value(features))
        # (images, heads, queries, features); written out, as torch's fused forms choose by device
        scores = query @ key.transpose(2, 3) * (dim // self.heads) ** -0.5
        attended = (scores.softmax(-1) @ value).transpose(1, 2).flatten(2)
        attended = self.norm_attended(self.output(attended))
        return self.linear(self.dropped(attended, row_keys, row_tokens))

    def _by_head(self, x: Tensor) -> Tensor:
        """(images, tokens, dim) -> (images, heads, tokens, dim of a head)."""
        return x.unflatten(2, (self.heads, -1)).transpose(1, 2)
