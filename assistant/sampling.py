"""Choosing tokens, and continuing many prompts at once."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from assistant.decoding import Decoding, Row
from errors import PhiSightError
from model.vlm import VisionLanguageModel, slots_filled

COLDEST = 1e-6  # a float32 divided by less than this could be infinite


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen. Temperature 0 takes the likeliest one (greedy)."""

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise PhiSightError(f"--temperature {self.temperature}: must be 0 or more")
        if not 0 < self.top_p <= 1:
            raise PhiSightError(f"--top-p {self.top_p}: must be over 0 and at most 1")
        if self.top_k < 0:
            raise PhiSightError(f"--top-k {self.top_k}: must be 0 (all tokens) or more")
        if not 0 < self.repetition_penalty < float("inf"):
            raise PhiSightError(
                f"--repetition-penalty {self.repetition_penalty}: must be over 0; 1 is none"
            )


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


@torch.no_grad()
def penalize(logits: Tensor, seen: Sequence[int], penalty: float) -> Tensor:
    """(vocabulary,) logits with those of tokens seen before made less likely: divided by `penalty`
    where positive, multiplied where negative (CTRL, arXiv 1909.05858)."""
    if penalty == 1 or not seen:
        return logits
    ids = torch.tensor(sorted(set(seen)), device=logits.device)
    scores = logits[ids]
    return logits.index_copy(0, ids, torch.where(scores > 0, scores / penalty, scores * penalty))


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
    rows = split_features(prompts, image_features, model.placeholder_id)
    decoding = Decoding(model)
    if max_new_tokens:
        decoding.add(rows)
    for step in range(max_new_tokens):
        logits = decoding.logits
        if sampling.repetition_penalty != 1:
            logits = torch.stack(
                [
                    penalize(row_logits, row.ids, sampling.repetition_penalty)
                    for row_logits, row in zip(logits, decoding.rows, strict=True)
                ]
            )
        chosen = choose(logits, sampling, generator).tolist()
        going_on = [i for i, token in enumerate(chosen) if token not in stop_ids]
        if not going_on:
            return
        said = {id(decoding.rows[i]): chosen[i] for i in going_on}
        yield [said.get(id(row)) for row in rows]
        if step + 1 == max_new_tokens:
            return
        if len(going_on) < len(chosen):
            decoding.keep(going_on)
        decoding.advance([chosen[i] for i in going_on])


def split_features(
    prompts: Sequence[Sequence[int]], image_features: Tensor, placeholder_id: int
) -> list[Row]:
    """Every prompt with its share of the (images, tokens, vision dim) features, in order.

    Raises `PhiSightError` naming both numbers when there are not as many pictures as slots.
    """
    slots = [sum(token == placeholder_id for token in prompt) for prompt in prompts]
    given = slots_filled(sum(slots), image_features)
    shares = [count // image_features.shape[1] if given else 0 for count in slots]
    features = image_features.split(shares)
    return [Row(list(prompt), share) for prompt, share in zip(prompts, features, strict=True)]
