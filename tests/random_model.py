"""A whole model of random weights whose every answer depends on every token and picture."""

from __future__ import annotations

import torch
from transformers import Phi3Config, Phi3ForCausalLM

from model.base import language_model
from model.decoder import LanguageModel
from model.phi3 import decoder_config
from model.projector import ImageProjector
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


def hub_model(config: Phi3Config) -> Phi3ForCausalLM:
    """transformers' own model, the reference, of random weights."""
    torch.manual_seed(0)
    model = Phi3ForCausalLM(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model.requires_grad_(False)


def ours_of(hub: Phi3ForCausalLM) -> LanguageModel:
    """Our decoder with the weights of transformers' model."""
    config = decoder_config(hub.config.to_dict())
    state = {n: t.clone() for n, t in hub.state_dict().items()}
    if config.tie_word_embeddings:
        del state["lm_head.weight"]
    return language_model(config, state.items())


@torch.no_grad()
def logits_of(model: LanguageModel, ids: torch.Tensor) -> torch.Tensor:
    """(tokens,) ids of one conversation -> (tokens, vocabulary)."""
    embeddings = model.model.embed_tokens(ids[None])
    return model.lm_head(model.model(embeddings, torch.arange(len(ids))[None], [len(ids)]))[0]


def phi(crossing: int) -> VisionLanguageModel:
    """A model that sees pictures, over `reference_phi(crossing)`."""
    language = ours_of(reference_phi(crossing))
    projector = ImageProjector(FEATURES[1], DIM)
    for parameter in projector.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return VisionLanguageModel(language, projector, PLACEHOLDER).requires_grad_(False)


def reference_phi(crossing: int) -> Phi3ForCausalLM:
    return hub_model(longrope_config(crossing))


def tokens(length: int, seed: int = 0) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1, VOCABULARY - 1, (length,), generator=generator).tolist()
