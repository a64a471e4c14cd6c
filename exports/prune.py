"""A smaller merged model: the MLP channels that matter least are cut out of every layer.

How much a channel matters is what the loss would change by if it were silent, to first order, on
training conversations: |activation * gradient|, summed over tokens (LLM-Pruner, arXiv:2305.11627).
What is left of `down_proj` is then fitted to give, on the same conversations, what all of it gave
(least squares, the step that Optimal Brain Surgeon and GPTQ, arXiv:2210.17323, are made of). No
weight is trained, so some of the quality goes; the certificate says how much.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from assistant.assistant import Assistant
from data.collate import Batch
from errors import PhiSightError
from exports import measure
from exports.calibrate import (
    calibration_batches,
    damped,
    input_moments,
    language_model_in,
    merged_assistant,
)
from exports.folder import hub_config, new_folder, rounded_state, write_causal_model
from exports.form import Form, folder_to_write
from exports.generated import measured_folder
from exports.measure import Probe, Tolerance
from exports.measured import export_measured
from model.base import find_folder, load_base
from model.decoder import LanguageModel
from model.vlm import VisionLanguageModel

CERTIFICATE = "prune_certificate.json"
GRAIN = 32  # widths stay a multiple of this, or the model could not be quantised again


def kept_channels(width: int, share: float) -> int:
    """How many of `width` channels stay when about `share` of them go.

    Raises `PhiSightError` if that is none or all of them.
    """
    if not 0 < share < 1:
        raise PhiSightError(f"--prune {share:g}: must be a share between 0 and 1, such as 0.1")
    left = round(width * (1 - share) / GRAIN) * GRAIN
    if not 0 < left < width:
        raise PhiSightError(
            f"--prune {share:g}: of {width} channels in multiples of {GRAIN} that keeps {left};"
            " ask for another share"
        )
    return left


def export_pruned(
    assistant: Assistant,
    out: str | Path,
    dtype: torch.dtype,
    probe: Probe,
    tolerance: Tolerance | None,
    share: float,
    conversations: int,
) -> dict[str, Any]:
    """Merge, cut, fit, write a plain model of its family with narrower MLPs, read back, measure.

    Returns the certificate; with `tolerance` None no loss is refused.

    Raises:
        PhiSightError: as `exports.merge.export_merged`, and for a share that leaves nothing to do.
    """
    config, parts = assistant.config, assistant.parts
    base_folder = find_folder(config.base, config.base_revision or None)
    width = parts.base.model.config.intermediate_size
    left = kept_channels(width, share)
    batches = calibration_batches(assistant, probe, conversations)
    with new_folder(out) as folder:
        before = measure.measure(assistant, probe, "before")
        changed = merged_assistant(assistant)
        model = language_model_in(changed)
        weights = sum(tensor.numel() for tensor in model.parameters())
        state = cut(model, changed.model, channel_effects(changed.model, batches), left, batches)
        narrow = hub_config(parts.base, dtype)
        narrow.intermediate_size = left
        sizes = dataclasses.replace(parts.base.model.config, intermediate_size=left)
        written = rounded_state(state.items(), parts.base, dtype, sizes)
        smaller = sum(tensor.numel() for tensor in written.values())
        write_causal_model(folder, narrow, written, base_folder, assistant)
        again = load_base(folder, None, parts.base.compute_dtype, parts.device, "none")
        after = measured_folder(assistant, again, probe, folder)
        return measure.certify(
            folder / CERTIFICATE,
            "prune",
            assistant,
            probe,
            before,
            after,
            tolerance,
            dtype=str(dtype).removeprefix("torch."),
            method="MLP channels by |activation * gradient| (LLM-Pruner, arXiv:2305.11627),"
            " down_proj refitted by least squares",
            channels={
                "before": width,
                "after": left,
                "asked_share": share,
                "share": round(1 - left / width, 4),
            },
            weights={"before": weights, "after": smaller},
            calibration={
                "conversations": conversations,
                "of": "training",
                "tokens": sum(batch.tokens for batch in batches),
            },
        )


def channel_effects(model: VisionLanguageModel, batches: Sequence[Batch]) -> list[Tensor]:
    """For each decoder layer, (channels,): the sum over tokens of |activation * d loss / d it|."""
    down_projections = [
        module
        for name, module in model.language_model.named_modules()
        if name.endswith(".mlp.down_proj")
    ]
    weights = [module.get_parameter("weight") for module in down_projections]
    effects = [weight.new_zeros(weight.shape[1]) for weight in weights]
    seen: list[Tensor] = []

    def hook(module: torch.nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor]:
        # No weight of the model takes a gradient, so the graph begins at the first MLP.
        activation = inputs[0] if inputs[0].requires_grad else inputs[0].requires_grad_()
        activation.retain_grad()
        seen.append(activation)
        return (activation,)

    handles = [module.register_forward_pre_hook(hook) for module in down_projections]
    try:
        with torch.enable_grad():
            for batch in batches:
                seen.clear()
                loss, _ = model(batch)
                loss.backward()
                for effect, activation in zip(effects, seen, strict=True):
                    assert activation.grad is not None  # it was retained
                    effect += (activation * activation.grad).detach().abs().sum((0, 1))
    finally:
        for handle in handles:
            handle.remove()
    return effects


@torch.no_grad()
def cut(
    model: LanguageModel,
    whole: VisionLanguageModel,
    effects: Sequence[Tensor],
    left: int,
    batches: Sequence[Batch],
) -> dict[str, Tensor]:
    """The state of the narrower model. `down_proj` W becomes W M[:, left] M[left, left]^-1, M being
    the sum of x x^T over its inputs: of all weights over the left inputs the ones that come
    nearest to the old output."""
    state = dict(model.state_dict())
    names = [f"model.layers.{i}.mlp.down_proj" for i in range(len(effects))]
    moments = input_moments(whole, names, batches)
    for name, effect in zip(names, effects, strict=True):
        chosen = effect.topk(left).indices.sort().values
        moment = damped(moments[name], 1e-4)
        fitted = torch.linalg.solve(moment[chosen][:, chosen], moment[chosen]).float()
        state[f"{name}.weight"] = state[f"{name}.weight"] @ fitted.T
        gate_up = name.replace("down_proj", "gate_up_proj.weight")
        gate, up = state[gate_up].chunk(2)
        state[gate_up] = torch.cat([gate[chosen], up[chosen]])
    return state


def run(options: argparse.Namespace) -> str:
    """`export.py --prune SHARE`; some quality goes, so nothing is refused unless it is asked."""
    write = partial(export_pruned, share=options.prune, conversations=options.calibration)
    return export_measured(options, folder_to_write(options), write, usual=None)


FORM = Form(
    run,
    {
        "type": float,
        "metavar": "SHARE",
        "help": "merged, with this share of the MLP channels cut out",
    },
)
