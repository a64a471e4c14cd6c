"""A whole model of random weights whose every answer depends on every token and picture."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from transformers import Phi3Config, Phi3ForCausalLM

from assistant.answer import Answer
from assistant.engine import Engine
from model.projector import ImageProjector
from model.rope import SegmentLongRope
from model.vlm import VisionLanguageModel

VOCABULARY, DIM = 97, 64
PLACEHOLDER = VOCABULARY - 1
FEATURES = (4, 8)  # tokens of a picture, numbers of a token
NO_PICTURES = torch.zeros(0, *FEATURES)


def phi(crossing: int, ours: bool = True) -> VisionLanguageModel:
    """Two layers of random weights whose angles differ greatly past the crossing; `ours` or with
    transformers' own rotary module."""
    torch.manual_seed(0)
    config = Phi3Config(
        vocab_size=VOCABULARY,
        hidden_size=DIM,
        intermediate_size=DIM,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=4 * crossing,
        original_max_position_embeddings=crossing,
        pad_token_id=0,
        sliding_window=None,
        rope_parameters={
            "rope_type": "longrope",
            "rope_theta": 10000.0,
            "short_factor": [1.0] * 8,
            "long_factor": [40.0] * 8,
            "original_max_position_embeddings": crossing,
        },
    )
    model = Phi3ForCausalLM(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    if ours:
        model.model.rotary_emb = SegmentLongRope(config)
    projector = ImageProjector(FEATURES[1], DIM)
    for parameter in projector.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return VisionLanguageModel(model, projector, PLACEHOLDER).requires_grad_(False)


def tokens(length: int, seed: int = 0) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1, VOCABULARY - 1, (length,), generator=generator).tolist()


@dataclass(eq=False)
class Row:
    """A sequence for `Decoding` alone."""

    ids: list[int]
    image_features: torch.Tensor


def continued(
    model: VisionLanguageModel,
    prompts: Sequence[tuple[Sequence[int], torch.Tensor]],
    stop_ids: Collection[int],
    limit: int,
    **options: object,
) -> list[list[int]]:
    """The tokens with which an engine continues prompts (ids, features), all in one batch."""
    engine = Engine(
        model, frozenset(stop_ids), prompts[0][1].shape[1], max_rows=len(prompts), queue_limit=0
    )
    answers = [Answer(list(ids), limit, features, **options) for ids, features in prompts]
    try:
        engine.submit(*answers)
        for answer in answers:
            answer.wait()
            assert len(answer.tokens) == answer.completion_tokens
    finally:
        engine.close()
    return [answer.tokens for answer in answers]
