"""LongRoPE chosen by conversation: a long neighbour changes nothing in a short one."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import Phi3Config
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS


def rope_crossing(config: Phi3Config) -> int | None:
    """The first position at which LongRoPE (arXiv 2402.13753) changes its factors, if the model
    has it: a conversation of more tokens than this turns by the long ones, from its start on."""
    rope = config.rope_parameters or {}
    if rope.get("rope_type") != "longrope":
        return None
    return rope["original_max_position_embeddings"]


def ends_of_segments(position_ids: Tensor) -> Tensor:
    """(rows, length) positions -> for every token the largest position of its own segment.

    Positions count up within a segment and start at 0 in the next one, so a segment begins wherever
    they do not grow. Left padding, all of position 0, falls into segments of one token.
    """
    begins = torch.ones_like(position_ids, dtype=torch.bool)
    begins[:, 1:] = position_ids[:, 1:] <= position_ids[:, :-1]
    segments = begins.cumsum(-1) - 1  # (rows, length), numbered from 0 in each row
    largest = torch.zeros_like(position_ids)
    largest.scatter_reduce_(-1, segments, position_ids, "amax")
    return largest.gather(-1, segments)


class SegmentLongRope(nn.Module):
    """Rotary angles with LongRoPE's factors, short or long for each segment by its own length.

    transformers picks one set for a whole batch, by its largest position: a row of 20 tokens then
    answers differently beside one of 5,000. Alone in its batch a row gets the same angles here as
    there. With a cache, the tokens fed last decide, as they stand last in their conversation; the
    keys before them were turned by the same factors unless the crossing lies between.
    """

    def __init__(self, config: Phi3Config) -> None:
        super().__init__()
        self.crossing = rope_crossing(config)
        init = ROPE_INIT_FUNCTIONS["longrope"]
        short, self.attention_scaling = init(config, None)
        long, _ = init(config, None, seq_len=self.crossing + 1)
        self.register_buffer("inverse_frequencies", torch.stack([short, long]), persistent=False)

    @torch.no_grad()
    def forward(self, states: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """(rows, length) positions -> cosines and sines, (rows, length, rotary dim) each, in the
        dtype of `states`."""
        is_long = ends_of_segments(position_ids) >= self.crossing  # (rows, length)
        frequencies = self.inverse_frequencies[is_long.long()]  # (rows, length, rotary dim / 2)
        angles = position_ids[..., None].float() * frequencies
        angles = torch.cat((angles, angles), dim=-1)
        cosines, sines = angles.cos(), angles.sin()
        return (
            (cosines * self.attention_scaling).to(states.dtype),
            (sines * self.attention_scaling).to(states.dtype),
        )
