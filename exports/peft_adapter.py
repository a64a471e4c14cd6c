"""LoRA adapters in PEFT's folder form, with fused or with separate projections.

`adapter_config.json` and `adapter_model.safetensors`, whose tensors PEFT names
`base_model.model.<module>.lora_A.weight` (rank, inputs) and `.lora_B.weight` (outputs, rank).

Phi-3 computes queries, keys and values in one `qkv_proj`, and gate and up in one `gate_up_proj`;
models that declare them apart want an adapter for each. An adapter of the whole layer is cut: the
parts share A, and B is cut by rows. Adapters of the parts are put together where a model has the
whole layer alone: A below each other and B in blocks, of a rank that is the sum (`lora.split`).
Either way the product is the same. `exports.peft_import` is the way back.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from assistant.assistant import Assistant
from assistant.flags import load_assistant
from config import Config
from errors import PhiSightError
from exports.alignment import alignment_of_run, check_alignment
from exports.folder import (
    files_of,
    new_folder,
    read_tensors,
    write_card,
    write_generation_config,
    write_json,
)
from exports.form import Form, folder_to_write
from exports.peft_config import (
    CONFIG,
    PREFIX,
    PROJECTOR,
    PROVENANCE,
    REMEDY,
    WEIGHTS,
    read_peft_config,
)
from lora.split import join
from lora.state import adapters_in, lora_state
from model.decoder import DecoderConfig
from model.families.fused import fused_parts, whole_of


def export_peft(assistant: Assistant, out: str | Path, split: bool) -> str:
    """Write the adapter as PEFT reads it, and the projector beside it. Returns a line about it.

    Raises `PhiSightError` if the folder cannot be written.
    """
    config, base = assistant.config, assistant.parts.base
    apart = split or not base.family.is_fused  # as the base's own model in transformers has them
    projector = {
        name: tensor.cpu().clone()
        for name, tensor in assistant.model.projector.state_dict().items()
    }
    with new_folder(out) as folder:
        state = lora_state(base.model)
        count, rank = write_peft(folder, state, base.model.config, apart, config)
        save_file(projector, folder / PROJECTOR, metadata={"format": "pt"})
        write_generation_config(assistant, folder)
        write_card(folder, assistant, "peft")
        facts = {"what": "peft", "provenance": assistant.provenance, "files": files_of(folder)}
        write_json(folder / PROVENANCE, facts)
    return (
        f"{out}: PEFT adapter of {count} tensors, rank {rank}, for"
        f" {'split' if apart else 'fused'} projections; it belongs to {config.base} in"
        f" {config.quantization}, which is what it was trained over"
    )


def need_adapter(config: Config) -> None:
    """Raise `PhiSightError` for a run of `--merge-rounding`: other programs add A and B to a base
    as they are, which is another model than the rounded one that was trained."""
    if config.merge_rounding != "none":
        raise PhiSightError(
            "PEFT adapter: the run was trained with --merge-rounding, whose rounded"
            " weights an adapter cannot hold; use --requantize, --merge or --llava"
        )


def write_peft(
    folder: Path,
    state: Mapping[str, Tensor],
    decoder: DecoderConfig,
    apart: bool,
    config: Config,
    base: str = "",
) -> tuple[int, int]:
    """Write `lora.state`'s tensors of an adapter over `decoder`. Returns their number and rank.

    Args:
        apart: with an adapter for each of the parts of fused projections, or for the whole ones.
        base: what the adapter belongs to, if not the run's own base.

    Raises `PhiSightError` as `need_adapter` does.
    """
    need_adapter(config)
    scaling, factors = the_scale(state), peft_factors(state, decoder, apart)
    tensors = {
        f"{PREFIX}{module}.lora_{side}.weight": factor.cpu().clone()
        for module, pair in factors.items()
        for side, factor in zip("AB", pair)
    }
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    ranks = {module.rpartition(".")[2]: len(down) for module, (down, _) in factors.items()}
    rank, stabilized = min(ranks.values()), config.rank_stabilized
    others = {kind: own for kind, own in ranks.items() if own != rank}  # of several parts

    def alpha(rank: int) -> float:
        return scaling * (math.sqrt(rank) if stabilized else rank)

    write_json(
        folder / CONFIG,
        {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "inference_mode": True,
            "base_model_name_or_path": base or config.base,
            "revision": None if base else config.base_revision or None,
            "r": rank,
            "lora_alpha": alpha(rank),
            "use_rslora": stabilized,
            "lora_dropout": config.lora_dropout,
            "target_modules": sorted(ranks),
            "bias": "none",
            "fan_in_fan_out": False,
            "init_lora_weights": True,
            "modules_to_save": None,
            "rank_pattern": others,
            "alpha_pattern": {kind: alpha(own) for kind, own in others.items()},
        },
    )
    return len(tensors), rank


def the_scale(state: Mapping[str, Tensor]) -> float:
    """The scaling of an adapter, one for all its layers, as `Config` allows no others."""
    scales = {tensor.item() for name, tensor in state.items() if name.endswith(".scaling")}
    if len(scales) != 1:
        raise PhiSightError(
            f"PEFT adapter: layers have scales {sorted(scales)}; only one can be written, train"
            " with one"
        )
    return scales.pop()


def peft_factors(
    state: Mapping[str, Tensor], decoder: DecoderConfig, apart: bool
) -> dict[str, tuple[Tensor, Tensor]]:
    """Module, as the model for the adapter has it, -> A, (rank, inputs), and B, (outputs, rank), of
    `lora.state`'s tensors. apart: see `write_peft`."""
    fused = fused_parts(decoder)
    found: dict[str, tuple[Tensor, Tensor]] = {}
    of_parts: dict[str, dict[str, tuple[Tensor, Tensor]]] = {}
    for name, (a, b, _) in adapters_in(state).items():
        down, up = state[a], state[b]
        layer = whole_of(name)
        place, _, kind = (layer or name).rpartition(".")
        parts = fused.get(kind, {})
        if layer:
            of_parts.setdefault(layer, {})[name.rpartition(".")[2]] = down, up
        elif parts and apart:
            for part, piece in zip(parts, up.split(list(parts.values())), strict=True):
                found[f"{place}.{part}"] = down, piece
        else:
            found[name] = down, up
    for layer, pairs in of_parts.items():
        place, _, kind = layer.rpartition(".")
        if apart:
            found |= {f"{place}.{part}": pair for part, pair in pairs.items()}
        else:
            found[layer] = join(pairs, fused[kind])
    return found


@torch.no_grad()
def add_adapter(model: nn.Module, folder: Path) -> None:
    """Put a PEFT folder of ours over the weights of a model that it belongs to, as PEFT's own
    `merge_and_unload` does: W + scaling * B A, in float32, rounded to the type of W.

    Raises `PhiSightError` for an adapter of another model.
    """
    settings = read_peft_config(folder)
    tensors = read_tensors(folder / WEIGHTS, REMEDY)
    for key in (key for key in tensors if key.endswith(".lora_A.weight")):
        name = key.removesuffix(".lora_A.weight")
        scaling = settings.scaling_of(name.removeprefix(PREFIX))
        change = scaling * (tensors[f"{name}.lora_B.weight"] @ tensors[key])
        try:
            weight = model.get_parameter(f"{name.removeprefix(PREFIX)}.weight")
        except AttributeError:
            raise PhiSightError(f"{folder}: {name} is no layer of the model; {REMEDY}") from None
        weight.copy_(weight.float() + change.to(weight.device))


def run_export(options: argparse.Namespace) -> str:
    """`export.py --peft DIR`."""
    out = folder_to_write(options, "--peft")
    assistant = load_assistant(options)
    need_adapter(assistant.config)
    if options.require_alignment is not None:
        found = alignment_of_run(assistant, options.greedy_answers)
        check_alignment(found, options.require_alignment, "peft")
    return export_peft(assistant, out, options.split)


EXPORT = Form(
    run_export,
    {"metavar": "DIR", "help": "the adapter as a PEFT folder"},
    {
        "--split": {
            "action": "store_true",
            "help": "with --peft: q, k, v, gate and up apart, as Llama names them",
        }
    },
    carries_pictures=True,
)
