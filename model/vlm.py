"""The whole model: token embeddings with projected picture features spliced in, Phi-3, the loss."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from errors import PhiSightError
from kernels.head import SummedCrossEntropy
from lora.dropout import set_row_keys
from model.layers import prepare_layers
from model.projector import ImageProjector

IGNORED = -100


def segment_mask(segment_ids: Tensor) -> Tensor:
    """(rows, length) -> (rows, 1, length, length) bool: who may look at whom.

    A token sees itself and what came before it in its own conversation, nothing of its neighbours
    in the row. Padding is a conversation of its own (number 0), so every query sees something.
    """
    same = segment_ids[:, :, None] == segment_ids[:, None, :]  # (rows, length, length)
    return same.tril()[:, None]


def segment_lengths(segment_ids: Tensor) -> list[int]:
    """Tokens of every conversation, and of every stretch of padding, row after row."""
    rows = torch.arange(len(segment_ids), device=segment_ids.device)[:, None]
    # Two rows may end and begin with the same number, as rows of one conversation do.
    numbers = segment_ids + rows * (segment_ids.max() + 1)
    return torch.unique_consecutive(numbers, return_counts=True)[1].tolist()


class VisionLanguageModel(nn.Module):
    """Owns no weights beyond its two parts: `language_model` (with its adapter) and `projector`."""

    def __init__(
        self, language_model: nn.Module, projector: ImageProjector, placeholder_id: int
    ) -> None:
        super().__init__()
        self.language_model = language_model
        prepare_layers(language_model)
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

    def hidden_states(
        self, input_ids: Tensor, position_ids: Tensor, segment_ids: Tensor, image_features: Tensor
    ) -> Tensor:
        """Last hidden states of packed rows, (rows, length, dim)."""
        by_segment = self.training and segment_ids.device.type == "cpu"
        return self.language_model.model(
            inputs_embeds=self.embed(input_ids, image_features),
            position_ids=position_ids,
            attention_mask=segment_mask(segment_ids),
            segment_lengths=segment_lengths(segment_ids) if by_segment else None,
            use_cache=False,
        ).last_hidden_state

    def supervised_states(
        self,
        input_ids: Tensor,
        labels: Tensor,
        position_ids: Tensor,
        segment_ids: Tensor,
        image_features: Tensor,
        row_keys: Sequence[int] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """States (supervised, dim) from which a token is predicted that counts, and the tokens."""
        set_row_keys(self.language_model, row_keys)
        hidden = self.hidden_states(input_ids, position_ids, segment_ids, image_features)
        targets = labels[:, 1:]  # the state at t predicts the token at t + 1
        chosen = targets != IGNORED
        return hidden[:, :-1][chosen], targets[chosen]

    def supervised_logits(self, **batch: Any) -> tuple[Tensor, Tensor]:
        """Logits (supervised, vocabulary) float32 where a token is trained on, and the tokens."""
        states, targets = self.supervised_states(**batch)
        return self.language_model.lm_head(states).float(), targets

    def forward(self, **batch: Any) -> tuple[Tensor, int]:
        """Summed cross-entropy over the supervised tokens (0-dim float32), and their count.

        Takes a batch as `supervised_states` does. `row_keys`: one a row, from which dropout masks
        are drawn; see `RowDropout`.
        """
        if self.training:
            states, targets = self.supervised_states(**batch)
            loss = SummedCrossEntropy.apply(states, self.language_model.lm_head.weight, targets)
        else:
            logits, targets = self.supervised_logits(**batch)
            loss = F.cross_entropy(logits, targets, reduction="sum")
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
