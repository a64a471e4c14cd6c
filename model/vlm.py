"""The whole model: token embeddings with projected picture features spliced in, the decoder, the
loss."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from data.collate import IGNORED, Batch
from errors import PhiSightError
from model.decoder import LanguageModel, Tokens
from model.projector import ImageProjector
from ops.head import summed_cross_entropy


class VisionLanguageModel(nn.Module):
    """Owns no weights beyond its two parts: `language_model` (with its adapter) and `projector`."""

    def __init__(
        self, language_model: LanguageModel, projector: ImageProjector, placeholder_id: int
    ) -> None:
        super().__init__()
        self.language_model = language_model
        self.projector = projector
        self.placeholder_id = placeholder_id

    def embed(self, input_ids: Tensor, image_features: Tensor) -> Tensor:
        """(rows, length) ids, (images, tokens, vision dim) features -> (rows, length, dim)."""
        embeddings = self.language_model.model.embed_tokens(input_ids)
        slots = input_ids == self.placeholder_id  # (rows, length)
        if slots_filled(int(slots.sum()), image_features):
            projected = self.projector(image_features)  # (images, tokens, dim)
            embeddings = embeddings.clone()
            embeddings[slots] = projected.flatten(0, 1).to(embeddings.dtype)
        return embeddings

    def hidden_states(self, batch: Batch) -> Tensor:
        """Last hidden states of packed rows, (rows, length, dim); zeros on padding."""
        return self.language_model.model(
            self.embed(batch.input_ids, batch.image_features),
            batch.position_ids,
            segment_lengths(batch.segment_ids),
            row_keys=batch.row_keys,
            tokens=tokens_of(batch.segment_ids),
        )

    def supervised_states(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """States (supervised, dim) from which a token is predicted that counts, and the tokens."""
        hidden = self.hidden_states(batch)
        targets = batch.labels[:, 1:]  # the state at t predicts the token at t + 1
        chosen = targets != IGNORED
        return hidden[:, :-1][chosen], targets[chosen]

    def supervised_logits(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Logits (supervised, vocabulary) float32 where a token is trained on, and the tokens."""
        states, targets = self.supervised_states(batch)
        return self.language_model.lm_head(states).float(), targets

    def forward(self, batch: Batch) -> tuple[Tensor, int]:
        """Summed cross-entropy over the supervised tokens (0-dim float32), and their count."""
        states, targets = self.supervised_states(batch)
        loss = summed_cross_entropy(states, self.language_model.lm_head.weight, targets)
        return loss, targets.numel()

    def owners(self) -> dict[str, list[tuple[str, nn.Parameter]]]:
        """Every parameter under one owner: "lora", "projector" (trained), "base" (frozen)."""
        owned: dict[str, list[tuple[str, nn.Parameter]]] = {"lora": [], "projector": [], "base": []}
        for name, parameter in self.named_parameters():
            owned[owner_of(name)].append((name, parameter))
        return owned

    def trainable(self) -> Iterator[tuple[str, nn.Parameter]]:
        for name, parameter in self.named_parameters():
            if parameter.requires_grad:
                yield name, parameter


def segment_lengths(segment_ids: Tensor) -> list[int]:
    """Tokens of every conversation, row after row."""
    rows = torch.arange(len(segment_ids), device=segment_ids.device)[:, None]
    # Two rows may end and begin with the same number, as rows of one conversation do.
    numbers = (segment_ids + rows * (segment_ids.max() + 1))[segment_ids > 0]
    return torch.unique_consecutive(numbers, return_counts=True)[1].tolist()


def tokens_of(segment_ids: Tensor) -> Tokens | None:
    """Where packed rows have tokens; None where they have no padding."""
    there = segment_ids > 0  # (rows, length)
    row_tokens = there.sum(1).tolist()
    if sum(row_tokens) == there.numel():
        return None
    return Tokens(there.flatten().nonzero()[:, 0], row_tokens)


def slots_filled(wanted: int, image_features: Tensor) -> int:
    """How many picture slots (images, tokens, vision dim) features fill.

    Raises `PhiSightError` naming both numbers when it is not `wanted`.
    """
    given = image_features.shape[0] * image_features.shape[1]
    if wanted != given:
        raise PhiSightError(
            f"pictures: the text has {wanted} picture slots, the features fill {given};"
            " give as many pictures as <image> places"
        )
    return given


def owner_of(name: str) -> str:
    """Who owns a parameter of the whole model, by its name."""
    if name.startswith("projector."):
        return "projector"
    return "lora" if name.endswith((".lora_A", ".lora_B")) else "base"
