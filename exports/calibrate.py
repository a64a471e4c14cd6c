"""What a model's layers see on training conversations: the basis of every compensated change."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from assistant.assistant import Assistant
from data.collate import Batch
from data.prepare import evenly_spaced
from errors import PhiSightError
from evaluation.meter import packed_batches
from exports import measure
from exports.measure import Probe
from lora.merge import merged_state
from model.base import language_model
from model.decoder import LanguageModel
from model.vlm import VisionLanguageModel


def merged_assistant(assistant: Assistant) -> Assistant:
    """The same assistant over its merged language model, unquantised, in float32: to be changed."""
    base = assistant.parts.base
    model = language_model(base.model.config, merged_state(base.model))
    merged = dataclasses.replace(base, model=model, compute_dtype=torch.float32)
    return measure.with_language_model(assistant, merged)


def language_model_in(assistant: Assistant) -> LanguageModel:
    return assistant.parts.base.model


def calibration_batches(assistant: Assistant, probe: Probe, conversations: int) -> list[Batch]:
    """Packed training conversations with pictures, spread evenly over the training data. None of
    them is measured on: the validation conversations are of other pictures."""
    if conversations < 1:
        raise PhiSightError(f"--calibration {conversations}: must be at least 1 conversation")
    train = probe.data.train
    pictured = [i for i, images in enumerate(train.images) if images]
    samples = [train[i] for i in evenly_spaced(pictured, conversations)]
    if not samples:
        raise PhiSightError(
            f"{' '.join(assistant.config.data)}: no training conversation has a picture to"
            " calibrate with; give data with pictures"
        )
    parts = assistant.parts
    row_tokens = max(assistant.config.row_tokens, *(len(s.input_ids) for s in samples))
    return [
        batch
        for batch, _ in packed_batches(
            samples,
            row_tokens,
            probe.store.features_of,
            parts.chat_format.padding_id,
            parts.chat_format.image_id,
            probe.store.shape,
            parts.device,
        )
    ]


@torch.no_grad()
def input_moments(
    model: VisionLanguageModel,
    names: Sequence[str],
    batches: Sequence[Batch],
    depth: int | None = None,
) -> dict[str, Tensor]:
    """Sum of x x^T over every token of the batches, for the input x of each named layer of the
    language model: (inputs, inputs) float32 by name. Padding is left out, and so are the decoder
    layers from `depth` on, which the named ones do not depend on."""
    moments: dict[str, Tensor] = {}
    real = torch.empty(0)  # of the batch under way: which of the computed places are not padding

    def hook_for(name: str):
        def hook(module: torch.nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
            seen = inputs[0].flatten(0, 1)[real].float()  # (tokens, inputs)
            moments[name] = moments.get(name, 0) + seen.T @ seen

        return hook

    handles = [
        model.language_model.get_submodule(name).register_forward_hook(hook_for(name))
        for name in names
    ]
    decoder = model.language_model.model
    layers = decoder.layers
    decoder.layers = layers[:depth]
    try:
        for batch in batches:
            real = batch.segment_ids.flatten()[batch.computed] > 0
            model.hidden_states(batch)
    finally:
        decoder.layers = layers
        for handle in handles:
            handle.remove()
    return moments


def damped(moment: Tensor, share: float = 0.01) -> Tensor:
    """`moment` in float64 with a share of its mean diagonal added, so that it can be inverted."""
    moment = moment.double()
    added = share * moment.diagonal().mean().clamp(min=1e-12)
    return moment + added * torch.eye(len(moment), dtype=torch.float64, device=moment.device)
