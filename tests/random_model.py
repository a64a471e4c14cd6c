"""A whole model of random weights whose every answer depends on every token and picture."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, Phi3Config, PreTrainedConfig, PreTrainedModel

from assistant.answer import Answer
from assistant.engine import Engine
from model.base import language_model
from model.decoder import LanguageModel
from model.families import FAMILIES
from model.projectors.mlp import MlpProjector
from model.vlm import VisionLanguageModel

VOCABULARY, DIM = 97, 64
PLACEHOLDER = VOCABULARY - 1
FEATURES = (4, 8)  # tokens of a picture, numbers of a token
NO_PICTURES = torch.zeros(0, *FEATURES)


def longrope_config(crossing: int) -> Phi3Config:
    """Two layers whose angles differ greatly past the crossing."""
    return Phi3Config(
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


def hub_model(config: PreTrainedConfig) -> PreTrainedModel:
    """transformers' own model, the reference, of random weights."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model.requires_grad_(False)


def ours_of(hub: PreTrainedModel) -> LanguageModel:
    """Our decoder with the weights of transformers' model."""
    family = FAMILIES[hub.config.model_type]
    config = family.decoder_config(hub.config.to_dict())
    state = {n: t.clone() for n, t in hub.state_dict().items()}
    if config.tie_word_embeddings:
        del state["lm_head.weight"]
    return language_model(config, family.from_stored(state, config).items())


def logits_of(model: LanguageModel, ids: torch.Tensor) -> torch.Tensor:
    """(tokens,) ids of one conversation -> (tokens, vocabulary)."""
    return packed_logits(model, ids)[0]


@torch.no_grad()
def packed_logits(model: LanguageModel, *conversations: torch.Tensor) -> list[torch.Tensor]:
    """(tokens, vocabulary) of each conversation, all of them packed into one row."""
    lengths = [len(conversation) for conversation in conversations]
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    embeddings = model.model.embed_tokens(torch.cat(conversations)[None])
    return list(model.lm_head(model.model(embeddings, positions, lengths))[0].split(lengths))


@torch.no_grad()
def cached_logits(model: LanguageModel, tokens: torch.Tensor, cut: list[int]) -> torch.Tensor:
    """The same of one conversation, fed in pieces of these lengths over a cache."""
    cache, logits = model.model.empty_cache(), []
    for piece in tokens.split(cut):
        positions = torch.arange(cache.length, cache.length + len(piece))[None]
        embeddings = model.model.embed_tokens(piece[None])
        hidden = model.model(embeddings, positions, [len(piece)], [cache])
        logits.append(model.lm_head(hidden)[0])
    assert cache.length == len(tokens)
    return torch.cat(logits)


def assert_near(found: torch.Tensor, expected: torch.Tensor) -> None:
    """To 1e-5 of the largest number."""
    size = max(1.0, expected.abs().max().item())
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * size)


def some_ids(vocabulary: int, length: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(length * 101 + seed)
    return torch.randint(1, vocabulary, (length,), generator=generator)


@st.composite
def pieces(draw: st.DrawFn, whole: int) -> list[int]:
    """Lengths that a conversation of `whole` tokens may be fed in."""
    cut: list[int] = []
    while sum(cut) < whole:
        cut.append(draw(st.integers(1, whole - sum(cut))))
    return cut


def assert_logits_are_those_of_transformers(
    config: PreTrainedConfig, vocabulary: int, lengths: Sequence[int], cut: list[int] | None
) -> None:
    """Of conversations packed into one row and alone; `cut`: of the first, over a cache."""
    hub = hub_model(config)
    ours = ours_of(hub)
    conversations = [some_ids(vocabulary, length, seed) for seed, length in enumerate(lengths)]
    for conversation, packed in zip(conversations, packed_logits(ours, *conversations)):
        with torch.no_grad():
            expected = hub(conversation[None]).logits[0]
        assert_near(packed, expected)
        assert_near(logits_of(ours, conversation), expected)
    if cut:
        whole = conversations[0]
        assert_near(cached_logits(ours, whole, cut), logits_of(ours, whole))


def phi(crossing: int) -> VisionLanguageModel:
    """A model that sees pictures, over `reference_phi(crossing)`."""
    language = ours_of(reference_phi(crossing))
    projector = MlpProjector(FEATURES[1], DIM)
    for parameter in projector.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return VisionLanguageModel(language, projector, PLACEHOLDER).requires_grad_(False)


def reference_phi(crossing: int) -> PreTrainedModel:
    return hub_model(longrope_config(crossing))


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
    tokens_per_image = prompts[0][1].shape[1]
    engine = Engine(model, frozenset(stop_ids), tokens_per_image, len(prompts), queue_limit=0)
    answers = [Answer(list(ids), limit, features, **options) for ids, features in prompts]
    try:
        engine.submit(*answers)
        for answer in answers:
            answer.wait()
            assert len(answer.tokens) == answer.completion_tokens
    finally:
        engine.close()
    return [answer.tokens for answer in answers]
