"""Prefill and decode with a key-value cache; tokens come out one at a time, many rows at once."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import DynamicCache, Phi3Config

from errors import PhiSightError
from model.vlm import VisionLanguageModel

COLDEST = 1e-6  # a float32 divided by less than this could be infinite


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen. Temperature 0 takes the likeliest one (greedy)."""

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise PhiSightError(f"--temperature {self.temperature}: must be 0 or more")
        if not 0 < self.top_p <= 1:
            raise PhiSightError(f"--top-p {self.top_p}: must be over 0 and at most 1")
        if self.top_k < 0:
            raise PhiSightError(f"--top-k {self.top_k}: must be 0 (all tokens) or more")


def choose(logits: Tensor, sampling: Sampling, generator: torch.Generator | None = None) -> Tensor:
    """(rows, vocabulary) float logits -> (rows,) int64 token ids.

    Nucleus sampling (arXiv 1904.09751) keeps the smallest set of likeliest tokens whose share
    reaches `top_p`, the likeliest one always among them.
    """
    if sampling.temperature == 0:
        return logits.argmax(-1)
    # The likeliest token's logit becomes 0, so that a tiny temperature cannot overflow it.
    logits = logits.float() - logits.float().amax(-1, keepdim=True)
    logits = logits / max(sampling.temperature, COLDEST)
    if sampling.top_k:
        smallest = logits.topk(min(sampling.top_k, logits.shape[-1])).values[:, -1:]
        logits = logits.masked_fill(logits < smallest, float("-inf"))
    if sampling.top_p < 1:
        ordered, order = logits.sort(descending=True)
        shares = ordered.softmax(-1)
        before = shares.cumsum(-1) - shares  # what the likelier ones add up to
        ordered = ordered.masked_fill(before >= sampling.top_p, float("-inf"))
        logits = torch.empty_like(logits).scatter_(-1, order, ordered)
    return torch.multinomial(logits.softmax(-1), 1, generator=generator)[:, 0]


def rope_crossing(config: Phi3Config) -> int | None:
    """The first position at which LongRoPE (arXiv 2402.13753) changes its factors, if the model
    has it: transformers picks them by the largest position of a forward pass."""
    rope = config.rope_parameters or {}
    if rope.get("rope_type") != "longrope":
        return None
    return rope["original_max_position_embeddings"]


@torch.no_grad()
def generate(
    model: VisionLanguageModel,
    prompts: Sequence[Sequence[int]],
    image_features: Tensor,
    stop_ids: Collection[int],
    max_new_tokens: int,
    sampling: Sampling = Sampling(),
    generator: torch.Generator | None = None,
) -> Iterator[list[int | None]]:
    """Continue every prompt; yields one list a step with each row's token, None once it has ended.

    Args: `prompts`: token ids, one list a row, padded here on the left; `image_features` (images,
    tokens, vision dim) of all rows in order; a stop id ends its row and is not given out.
    """
    device = next(model.parameters()).device
    length = max(map(len, prompts))
    input_ids = torch.full((len(prompts), length), min(stop_ids))
    mask = torch.zeros(len(prompts), length, dtype=torch.long)
    for row, prompt in enumerate(prompts):
        input_ids[row, length - len(prompt) :] = torch.tensor(prompt)
        mask[row, length - len(prompt) :] = 1
    input_ids, mask = input_ids.to(device), mask.to(device)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)

    config = model.language_model.config
    cache = DynamicCache(config=config)
    crossing = rope_crossing(config)
    embeddings = model.embed(input_ids, image_features.to(device))  # (rows, length, dim)
    seen = [embeddings]  # all that was fed so far, kept only where it may have to be fed again
    ended = [False] * len(prompts)
    for step in range(max_new_tokens):
        hidden = model.language_model.model(
            inputs_embeds=embeddings, attention_mask=mask, position_ids=positions,
            past_key_values=cache, use_cache=True,
        ).last_hidden_state[:, -1]
        chosen = choose(model.language_model.lm_head(hidden).float(), sampling, generator)
        tokens: list[int | None] = []
        for row, token in enumerate(chosen.tolist()):
            ended[row] = ended[row] or token in stop_ids
            tokens.append(None if ended[row] else token)
        if all(ended):
            return
        yield tokens
        embeddings = model.language_model.model.embed_tokens(chosen)[:, None]  # (rows, 1, dim)
        mask = torch.cat([mask, mask.new_ones(len(prompts), 1)], dim=1)
        positions = positions[:, -1:] + 1
        if crossing is not None:
            seen.append(embeddings)
        if length + step == crossing:
            # From here on every position turns by other factors, so the cached keys are of no use.
            cache = DynamicCache(config=config)
            embeddings = torch.cat(seen, dim=1)
            positions = (mask.cumsum(-1) - 1).clamp(min=0)
