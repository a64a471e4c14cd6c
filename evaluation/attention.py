"""How much attention do answers give to the picture, layer by layer?

The decoder's attention is fused: it never has the probabilities in memory. Here they are computed
beside it, from the same queries and keys, for the tokens from which an answer is predicted: the
last one of the prompt, and all of the answer but its last. They say where a layer reads, which is
weaker than what it needs: that the answer changes with the picture is for `evaluation.meter`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from data.chat import RenderedSample
from data.collate import Batch
from model.decoder import Attention, Layout
from model.vlm import VisionLanguageModel
from tensors import widest


@dataclass(frozen=True)
class AttentionShares:
    """The mean over heads, and over the tokens from which answers are predicted."""

    by_layer: tuple[float, ...]
    """0 to 1, of each layer: the attention that goes to picture tokens"""
    chance: float
    """the same if every token that is seen got an equal part: picture tokens of all tokens"""
    tokens: int
    """that the mean is over"""


def probabilities(query: Tensor, key: Tensor, window: int | None) -> Tensor:
    """(heads, tokens, dim) queries and (key-value heads, tokens, dim) keys of one conversation ->
    (heads, tokens, tokens) float32: softmax(Q K^T / sqrt(dim)) over what each may see
    (arXiv:1706.03762), of which there is at most `window` tokens, itself among them."""
    key = key.repeat_interleave(len(query) // len(key), 0)
    scores = query.float() @ key.float().transpose(1, 2) * query.shape[-1] ** -0.5
    hidden = ~visible(query.shape[1], window, query.device)
    return scores.masked_fill(hidden, -torch.inf).softmax(-1)


def visible(tokens: int, window: int | None, device: torch.device) -> Tensor:
    """(tokens, tokens) bool: whether the token of a row sees that of a column."""
    places = torch.arange(tokens, device=device)
    distance = places[:, None] - places
    return (distance >= 0) & (distance < (window or tokens))


class _Meter:
    """Sums, of every layer, over the batches that are shown to a model."""

    def __init__(self, layers: int) -> None:
        self.sums, self.chance, self.tokens = [0.0] * layers, 0.0, 0
        self._asked: list[Tensor] = []
        self._pictures: list[Tensor] = []

    def look_at(self, batch: Batch, window: int | None) -> None:
        """The batch that the layers are to be shown next."""
        flat = batch.input_ids.flatten()
        asked, pictures = torch.zeros_like(flat).bool(), torch.zeros_like(flat).bool()
        asked[batch.predicting], pictures[batch.slots] = True, True
        # What the layers are given is these places, in this order, cut into conversations.
        lengths = list(batch.lengths)
        self._pictures = list(pictures[batch.computed].split(lengths))
        self._asked = [
            where & bool(seen.any())  # a conversation without a picture has no share
            for where, seen in zip(
                asked[batch.computed].split(lengths), self._pictures, strict=True
            )
        ]
        for where, seen in zip(self._asked, self._pictures, strict=True):
            may_see = visible(len(where), window, where.device)[where]  # (asked, tokens)
            share = (may_see & seen).sum(1).to(widest(where.device)) / may_see.sum(1)
            self.chance += share.sum().item()
            self.tokens += int(where.sum())

    def hook(self, attention: nn.Module, given: tuple[Tensor, Layout]) -> None:
        """Called before `attention(x, layout)`."""
        assert isinstance(attention, Attention)
        x, layout = given
        qkv = attention.rotated(x, layout).transpose(0, 1)  # (heads, tokens, dim)
        query, key, _ = qkv.split([attention.heads, attention.kv_heads, attention.kv_heads])
        start = 0
        for where, seen in zip(self._asked, self._pictures, strict=True):
            here = slice(start, start + len(where))
            start = here.stop
            if where.any():
                weights = probabilities(query[:, here], key[:, here], attention.window)
                share = weights[:, where][..., seen].sum(-1).mean(0)  # (asked,)
                self.sums[attention.number] += share.sum().item()


@contextlib.contextmanager
def _watched(model: VisionLanguageModel, meter: _Meter) -> Iterator[None]:
    """Every layer's attention tells the meter what it is given, until the block is left."""
    hooks = [
        module.register_forward_pre_hook(meter.hook)
        for module in model.language_model.modules()
        if isinstance(module, Attention)
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def attention_shares(
    model: VisionLanguageModel, batches: Iterable[tuple[Batch, Sequence[RenderedSample]]]
) -> AttentionShares | None:
    """The shares over all answers in the batches, see `evaluation.meter.packed_batches`; None where
    no conversation has a picture and an answer. The model is left in the mode it was in."""
    decoder = model.language_model.model
    meter = _Meter(len(decoder.layers))
    was_training = model.training
    model.eval()
    try:
        with _watched(model, meter):
            for batch, _ in batches:
                meter.look_at(batch, decoder.config.sliding_window)
                model.hidden_states(batch)
    finally:
        model.train(was_training)
    if not meter.tokens:
        return None
    return AttentionShares(
        tuple(total / meter.tokens for total in meter.sums),
        meter.chance / meter.tokens,
        meter.tokens,
    )
