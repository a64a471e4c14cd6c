"""LoRA adapters in PEFT's folder form, out and in, with fused or with split projections.

`adapter_config.json` and `adapter_model.safetensors`, whose tensors PEFT names
`base_model.model.<module>.lora_A.weight` (rank, inputs) and `.lora_B.weight` (outputs, rank).

Phi-3 computes queries, keys and values in one `qkv_proj`, and gate and up in one `gate_up_proj`.
Programs that declare them apart (Llama's names) want an adapter for each: the parts share A, and B
is cut by rows, which is the same product. The way back joins parts that share A exactly, and others
by putting their A on top of each other and their B on a diagonal: the rank is then the sum.
"""

from __future__ import annotations

import argparse
import re
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
from exports.imported import (
    finite_number,
    imported_config,
    in_layer,
    model_for,
    need_matrix,
    write_run,
)
from lora.state import lora_state
from model.base import find_folder, read_config, read_json
from model.decoder import DecoderConfig

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
PROVENANCE = "provenance.json"  # what the weights come from: nothing is measured here
PROJECTOR = "image_projector.safetensors"  # PEFT does not look at it
PREFIX = "base_model.model."
PARTS = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
FUSED = {part: fused for fused, parts in PARTS.items() for part in parts}
PLACES = {"qkv_proj": "self_attn", "o_proj": "self_attn", "gate_up_proj": "mlp", "down_proj": "mlp"}
REMEDY = "export the adapter again with PEFT's save_pretrained"
# Fields of adapter_config.json that do not change what a loaded adapter computes. Any other one
# must be empty: an adapter that is read without its DoRA vector, say, is another adapter.
HARMLESS = {
    "task_type",
    "peft_type",
    "auto_mapping",
    "peft_version",
    "base_model_name_or_path",
    "revision",
    "inference_mode",
    "r",
    "target_modules",
    "exclude_modules",
    "lora_alpha",
    "lora_dropout",
    "bias",
    "init_lora_weights",
    "layers_to_transform",
    "layers_pattern",
    "megatron_config",
    "megatron_core",
    "loftq_config",
    "eva_config",
    "corda_config",
    "lora_ga_config",
    "qalora_group_size",
    "runtime_config",
    "ensure_weight_tying",
}
_REST = re.compile(r"lora_([AB])(?:\.(\w+))?\.weight")  # with the adapter's name if saved by hand


def part_sizes(config: DecoderConfig) -> dict[str, int]:
    """Rows of each part of the fused projections, by Llama's names."""
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    keys = (config.num_key_value_heads or config.num_attention_heads) * head
    return {
        "q_proj": config.num_attention_heads * config.head_dim,
        "k_proj": keys,
        "v_proj": keys,
        "gate_proj": config.intermediate_size,
        "up_proj": config.intermediate_size,
    }


def input_sizes(config: DecoderConfig) -> dict[str, tuple[int, int]]:
    """(outputs, inputs) of each projection that can have an adapter."""
    rows = part_sizes(config)
    return {
        **{
            fused: (sum(rows[part] for part in parts), config.hidden_size)
            for fused, parts in PARTS.items()
        },
        "o_proj": (config.hidden_size, rows["q_proj"]),
        "down_proj": (config.hidden_size, config.intermediate_size),
    }


# -- out -------------------------------------------------------------------------------------------


def export_peft(assistant: Assistant, out: str | Path, split: bool) -> str:
    """Write the adapter as PEFT reads it, and the projector beside it. Returns a line about it.

    Raises `PhiSightError` if the folder cannot be written.
    """
    config, model = assistant.config, assistant.parts.base.model
    projector = {
        name: tensor.cpu().clone()
        for name, tensor in assistant.model.projector.state_dict().items()
    }
    with new_folder(out) as folder:
        count, rank = write_peft(
            folder, lora_state(model), part_sizes(model.config) if split else {}, config
        )
        save_file(projector, folder / PROJECTOR, metadata={"format": "pt"})
        write_generation_config(assistant, folder)
        write_card(folder, assistant, "peft")
        facts = {"what": "peft", "provenance": assistant.provenance, "files": files_of(folder)}
        write_json(folder / PROVENANCE, facts)
    return (
        f"{out}: PEFT adapter of {count} tensors, rank {rank}, for"
        f" {'split' if split else 'fused'} projections; it belongs to {config.base} in"
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
    rows: Mapping[str, int],
    config: Config,
    base: str = "",
) -> tuple[int, int]:
    """Write `lora.state`'s tensors, split where `rows` says how. Returns their number and rank.

    Args: `base`: what the adapter belongs to, if not the run's own base.

    Raises `PhiSightError` as `need_adapter` does.
    """
    need_adapter(config)
    rank, scaling = the_scale(state)
    tensors = peft_tensors(state, rows)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    write_json(
        folder / CONFIG,
        {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "inference_mode": True,
            "base_model_name_or_path": base or config.base,
            "revision": None if base else config.base_revision or None,
            "r": rank,
            "lora_alpha": scaling * rank,
            "lora_dropout": config.lora_dropout,
            "target_modules": sorted({name.split(".")[-3] for name in tensors}),
            "bias": "none",
            "fan_in_fan_out": False,
            "init_lora_weights": True,
            "modules_to_save": None,
            "rank_pattern": {},
            "alpha_pattern": {},
        },
    )
    return len(tensors), rank


def the_scale(state: Mapping[str, Tensor]) -> tuple[int, float]:
    """Rank and scaling of an adapter, one for all its layers, as `Config` allows no others."""
    ranks = {len(tensor) for name, tensor in state.items() if name.endswith(".lora_A")}
    scales = {tensor.item() for name, tensor in state.items() if name.endswith(".scaling")}
    if len(ranks) != 1 or len(scales) != 1:
        raise PhiSightError(
            f"PEFT adapter: layers have ranks {sorted(ranks)} and scales {sorted(scales)}; only one"
            " of each can be written, train with one"
        )
    return ranks.pop(), scales.pop()


def peft_tensors(state: Mapping[str, Tensor], rows: Mapping[str, int]) -> dict[str, Tensor]:
    """`lora.state`'s tensors under PEFT's names; with `rows`, cut into Llama's projections."""
    tensors = {}
    for name in (name for name in state if name.endswith(".lora_A")):
        module = name.removesuffix(".lora_A")
        place, _, kind = module.rpartition(".")
        down, up = state[name], state[f"{module}.lora_B"]  # (rank, inputs), (outputs, rank)
        parts = PARTS.get(kind, ()) if rows else ()
        pieces = up.split([rows[part] for part in parts]) if parts else [up]
        for part, piece in zip(parts or [kind], pieces, strict=True):
            tensors[f"{PREFIX}{place}.{part}.lora_A.weight"] = down.cpu().clone()
            tensors[f"{PREFIX}{place}.{part}.lora_B.weight"] = piece.cpu().clone()
    return tensors


@torch.no_grad()
def add_adapter(model: nn.Module, folder: Path) -> None:
    """Put a PEFT folder of ours over the weights of a model that it belongs to, as PEFT's own
    `merge_and_unload` does: W + alpha / r * B A, in float32, rounded to the type of W.

    Raises `PhiSightError` for an adapter of another model.
    """
    settings = read_peft_config(folder)
    tensors = read_tensors(folder / WEIGHTS, REMEDY)
    scaling = settings["lora_alpha"] / settings["r"]
    for key in (key for key in tensors if key.endswith(".lora_A.weight")):
        name = key.removesuffix(".lora_A.weight")
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

# -- in --------------------------------------------------------------------------------------------


def import_peft(source: str | Path, out: str | Path, config: Config) -> str:
    """Read a PEFT adapter over the base of `config` into a new run. Returns a line about it.

    The projector is read from `image_projector.safetensors` in the same folder.

    Raises:
        PhiSightError: the folder is not a LoRA adapter of this base, does more than LoRA, or has no
            projector.
    """
    source = Path(source)
    settings = read_peft_config(source)
    tensors = read_tensors(source / WEIGHTS, REMEDY)
    if not (source / PROJECTOR).is_file():
        raise PhiSightError(
            f"{source}: has no {PROJECTOR}, without which pictures mean nothing; put that of a"
            " checkpoint with the same base and CLIP there"
        )
    projector = read_tensors(source / PROJECTOR, "copy it again from its checkpoint")
    base = read_config(find_folder(config.base, config.base_revision or None))
    scaling = settings["lora_alpha"] / settings["r"]
    lora, targets, rank = lora_from_peft(source, tensors, base, settings["r"], scaling)
    parts, config = model_for(
        config,
        lora_targets=targets,
        lora_rank=rank,
        lora_alpha=scaling * rank,
        lora_dropout=settings["lora_dropout"],
    )
    write_run(out, parts, config, lora, projector, source)
    return f"{out}: {len(tensors)} tensors of {source} became rank {rank} on {', '.join(targets)}"


def read_peft_config(source: Path) -> dict:
    """adapter_config.json, if it says nothing that this project's LoRA does not do."""
    path = source / CONFIG
    if not path.is_file():
        raise PhiSightError(f"{path}: is missing; {REMEDY}")
    settings = read_json(path)
    problems = [name for name, value in settings.items() if name not in HARMLESS and value]
    if settings.get("peft_type") != "LORA":
        problems.append("peft_type")
    if settings.get("bias", "none") != "none":
        problems.append("bias")
    if settings.get("init_lora_weights", True) not in (True, False, "gaussian"):
        problems.append("init_lora_weights")  # some, such as PiSSA, change the base as well
    if problems:
        shown = ", ".join(f"{name} {settings.get(name)!r}"[:80] for name in problems)
        raise PhiSightError(
            f"{path}: {shown}: not plain LoRA, so it cannot be taken over; merge it"
            " with PEFT and use the result as base"
        )
    rank, alpha = settings.get("r"), finite_number(settings.get("lora_alpha"))
    dropout = finite_number(settings.get("lora_dropout", 0.0))
    whole_rank = isinstance(rank, int) and not isinstance(rank, bool) and rank >= 1
    if not whole_rank or alpha is None or alpha <= 0 or dropout is None or not 0 <= dropout < 1:
        named = ("r", "lora_alpha", "lora_dropout")
        given = ", ".join(f"{name} {settings.get(name)!r}"[:80] for name in named)
        raise PhiSightError(f"{path}: {given} make no adapter; {REMEDY}")
    return settings | {"lora_alpha": alpha, "lora_dropout": dropout}


def lora_from_peft(
    source: Path, tensors: Mapping[str, Tensor], base: DecoderConfig, rank: int, scaling: float
) -> tuple[dict[str, Tensor], tuple[str, ...], int]:
    """PEFT's tensors -> `lora.state`'s, the layer names that they adapt, and their common rank.

    A layer without an adapter, and what a smaller rank lacks, is filled with zeros, which adds
    nothing to what the model computes.
    """
    sizes = input_sizes(base)
    rows, by_layer = part_sizes(base), pairs_by_layer(source, tensors, base, rank)
    layers = {}
    for (layer, kind), given in by_layer.items():
        for name, pair in given.items():
            if set(pair) != {"A", "B"}:
                raise PhiSightError(f"{source}: {name} of layer {layer} lacks its A or B; {REMEDY}")
        if kind in given and len(given) > 1:
            raise PhiSightError(
                f"{source}: layer {layer} has {kind} both whole and in parts; {REMEDY}"
            )
        layers[layer, kind] = (
            (given[kind]["A"], given[kind]["B"]) if kind in given else fuse(given, kind, rows)
        )
    if not layers:
        raise PhiSightError(f"{source}: holds no tensor; {REMEDY}")
    targets = tuple(kind for kind in PLACES if any(kind == k for _, k in layers))
    rank = max(len(down) for down, _ in layers.values())
    state: dict[str, Tensor] = {}
    for layer in range(base.num_hidden_layers):
        for kind in targets:
            outputs, inputs = sizes[kind]
            down, up = torch.zeros(rank, inputs), torch.zeros(outputs, rank)
            if (layer, kind) in layers:
                small_down, small_up = layers[layer, kind]
                down[: len(small_down)], up[:, : len(small_down)] = small_down, small_up
            module = f"model.layers.{layer}.{PLACES[kind]}.{kind}"
            state |= {
                f"{module}.lora_A": down,
                f"{module}.lora_B": up,
                f"{module}.scaling": torch.tensor(scaling),
            }
    return state, targets, rank


def pairs_by_layer(
    source: Path, tensors: Mapping[str, Tensor], base: DecoderConfig, rank: int
) -> dict[tuple[int, str], dict[str, dict[str, Tensor]]]:
    """(layer, fused kind) -> projection as the adapter names it -> {"A": ..., "B": ...}."""
    rows, sizes = part_sizes(base), input_sizes(base)
    places = PLACES | {part: PLACES[fused] for part, fused in FUSED.items()}
    found: dict[tuple[int, str], dict[str, dict[str, Tensor]]] = {}
    adapters = set()
    for key, tensor in tensors.items():
        where = in_layer(source, key, base.num_hidden_layers, places, _REST.pattern)
        kind = FUSED.get(where.kind, where.kind)
        [(side, adapter)] = _REST.findall(where.rest)
        adapters.add(adapter)
        outputs, inputs = rows.get(where.kind, sizes[kind][0]), sizes[kind][1]
        shape = (rank, inputs) if side == "A" else (outputs, rank)
        pair = found.setdefault((where.layer, kind), {}).setdefault(where.kind, {})
        if side in pair or len(adapters) > 1:
            raise PhiSightError(
                f"{source}: {key[:120]} is there twice, under other names; save one adapter of one"
                " model"
            )
        pair[side] = need_matrix(source, key, tensor, *shape)
    return found


def fuse(
    given: Mapping[str, Mapping[str, Tensor]], kind: str, rows: Mapping[str, int]
) -> tuple[Tensor, Tensor]:
    """A and B of a fused projection from those of some of its parts."""
    downs = [pair["A"] for pair in given.values()]
    rank, together = len(downs[0]), all(torch.equal(down, downs[0]) for down in downs)
    total = rank if together else rank * len(given)
    up, start, column = torch.zeros(sum(rows[part] for part in PARTS[kind]), total), 0, 0
    ordered = [part for part in PARTS[kind] if part in given]
    for part in PARTS[kind]:
        if part in given:
            up[start : start + rows[part], column : column + rank] = given[part]["B"]
            column += 0 if together else rank
        start += rows[part]
    down = downs[0] if together else torch.cat([given[part]["A"] for part in ordered])
    return down, up


def run_import(options: argparse.Namespace) -> str:
    """`export.py --import-peft DIR`."""
    out = folder_to_write(options)
    return import_peft(options.import_peft, out, imported_config(options))


IMPORT = Form(run_import, {"metavar": "DIR", "help": "a PEFT adapter into a new run"})
