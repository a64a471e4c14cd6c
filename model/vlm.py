"""The whole model: token embeddings with projected picture features spliced in, the decoder, the
loss."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import Tensor, nn

from data.collate import Batch, places_of
from errors import PhiSightError
from model.decoder import LanguageModel, Tokens
from model.projectors.projector import Projector
from ops.head import summed_cross_entropy


class VisionLanguageModel(nn.Module):
    """Owns no weights beyond its two parts: `language_model` (with its adapter) and `projector`."""

    def __init__(
        self, language_model: LanguageModel, projector: Projector, placeholder_id: int
    ) -> None:
        super().__init__()
        self.language_model = language_model
        self.projector = projector
        self.placeholder_id = placeholder_id

    def embed(
        self,
        input_ids: Tensor,
        image_features: Tensor,
        slots: Tensor | None = None,
        row_keys: Sequence[int] | None = None,
        row_slots: Sequence[int] | None = None,
    ) -> Tensor:
        """(rows, length) ids, (images, features, vision dim) features -> (rows, length, dim).

        slots, row_keys, row_slots: see `Batch`; without slots, they are looked for, and a GPU is
        waited for.
        """
        embeddings = self.language_model.model.embed_tokens(input_ids)
        if slots is None:
            slots = places_of(input_ids, self.placeholder_id)
        if not self.slots_filled(len(slots), image_features):
            return embeddings
        projected = self.projector(image_features, row_keys, row_slots)
        return spliced(embeddings, projected.flatten(0, 1), slots)

    def slots_filled(self, wanted: int, image_features: Tensor) -> int:
        """How many picture slots (images, features, vision dim) fill.

        Raises `PhiSightError` naming both numbers when it is not `wanted`.
        """
        images, features, _ = image_features.shape
        given = images and images * self.projector.tokens(features)
        if wanted != given:
            raise PhiSightError(
                f"pictures: the text has {wanted} picture slots, the features fill {given};"
                " give as many pictures as <image> places"
            )
        return given

    def hidden_states(self, batch: Batch) -> Tensor:
        """Last hidden states of packed rows, (rows, length, dim); zeros on padding."""
        return self.language_model.model(
            self.embed(
                batch.input_ids,
                batch.image_features,
                batch.slots,
                batch.row_keys,
                batch.row_slots,
            ),
            batch.position_ids,
            batch.lengths,
            row_keys=batch.row_keys,
            tokens=Tokens(batch.computed, batch.row_tokens) if batch.leaves_out else None,
        )

    def supervised_states(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """States (supervised, dim) from which a token is predicted that counts, and the tokens."""
        return self.hidden_states(batch).flatten(0, 1)[batch.predicting], batch.targets

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


def spliced(embeddings: Tensor, projected: Tensor, slots: Tensor) -> Tensor:
    """(rows, length, dim) with (picture tokens, dim) in the places `slots` of the flattened rows,
    as a new tensor."""
    placed = embeddings.flatten(0, 1).index_copy(0, slots, projected.to(embeddings.dtype))
    return placed.view_as(embeddings)


def owner_of(name: str) -> str:
    """Who owns a parameter of the whole model, by its name."""
    if name.startswith("projector."):
        return "projector"
    return "lora" if name.endswith((".lora_A", ".lora_B")) else "base"
