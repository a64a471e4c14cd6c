"""A PEFT adapter becomes a run: whole and separate projections, whatever model they lie in.

What PEFT adapted as a projection of its own comes in as one, with its A and its B as they were
(`lora.split`). Parts of a fused layer that have A in common are one product, and come in as the
fused layer: what `--peft --split` wrote comes back as it went out.
"""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from config import Config
from documents import read_json
from errors import PhiSightError, printable
from exports.folder import read_tensors
from exports.form import Form, folder_to_write
from exports.imported import (
    imported_config,
    in_layer,
    model_for,
    need_matrix,
    write_run,
)
from exports.peft_config import (
    CONFIG,
    PREFIX,
    PROJECTOR,
    PROVENANCE,
    REMEDY,
    WEIGHTS,
    PeftConfig,
    read_peft_config,
)
from model.base import find_folder, read_family
from model.build import Assembled
from model.decoder import DecoderConfig
from model.families.fused import FUSED, PARTS, fused_parts, part_sizes

PLACES = {"qkv_proj": "self_attn", "o_proj": "self_attn", "gate_up_proj": "mlp", "down_proj": "mlp"}
# With the adapter's name if saved by hand; over a layer that was wrapped before.
_REST = re.compile(r"(?:base_layer\.)*lora_([AB])(?:\.(\w+))?\.weight")


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


@dataclass(frozen=True)
class Imported:
    """An adapter in this project's form, with what the config says of it."""

    state: dict[str, Tensor]
    """as `lora.state` names it"""
    targets: tuple[str, ...]
    rank: int
    alpha: float


@dataclass
class Pair:
    """A, (rank, inputs), and B, (outputs, rank), of one projection, and what B A is scaled by."""

    scaling: float
    down: Tensor | None = None
    up: Tensor | None = None

    @property
    def both(self) -> tuple[Tensor, Tensor]:
        assert self.down is not None and self.up is not None  # `pairs_by_layer` made sure
        return self.down, self.up


Factors = tuple[Tensor, Tensor]
"""A and B"""
ByLayer = dict[tuple[int, str], dict[str, Pair]]
"""(layer, kind of ours) -> projection as the adapter names it -> its pair"""


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
    family, base = read_family(find_folder(config.base, config.base_revision or None))
    check_targets(source, settings, f"{config.base} ({family.name})")
    found = lora_from_peft(source, tensors, base, settings)
    parts, config = model_for(
        config,
        lora_targets=found.targets,
        lora_rank=found.rank,
        lora_alpha=found.alpha,
        lora_dropout=settings.dropout,
        rank_stabilized=settings.rank_stabilized,
    )
    check_provenance(source, parts, config)
    write_run(out, parts, config, found.state, projector, source)
    targets = ", ".join(found.targets)
    return f"{out}: {len(tensors)} tensors of {source} became rank {found.rank} on {targets}"


def check_provenance(source: Path, parts: Assembled, config: Config) -> None:
    """Raise `PhiSightError` for a folder that says it was trained over another base or encoder:
    tensors that fit by their shapes alone would answer nonsense."""
    path = source / PROVENANCE
    if not path.is_file():  # of another program
        return
    try:
        chain = read_json(path, own=False).get("provenance")
    except (OSError, PhiSightError) as error:
        raise PhiSightError(f"{path}: {error}; {REMEDY}") from error
    if not isinstance(chain, dict):
        raise PhiSightError(f"{path}: says nothing of what was trained; {REMEDY}")
    how = "give --vision, --vision-layer, --feature-pooling and --picture-fit as they were"
    for what, named, told, found, remedy in (
        ("base", config.base, "base", parts.base.fingerprint, "give the right one with --base"),
        ("picture encoder, or way to read it,", config.vision, "vision", parts.vision.key, how),
    ):
        wanted = chain.get(f"{told}_fingerprint")
        if wanted is not None and wanted != found:
            raise PhiSightError(f"{source}: was trained with another {what} than {named}; {remedy}")


def check_targets(source: Path, settings: PeftConfig, base: str) -> None:
    """Raise `PhiSightError` for an adapter none of whose layers a base of any family here has."""
    known = (*PLACES, *FUSED)
    kinds = {target.rpartition(".")[2] for target in settings.targets}
    if kinds and kinds.isdisjoint(known):
        shown = ", ".join(printable(kind, 40) for kind in sorted(kinds)[:8])
        raise PhiSightError(
            f"{source / CONFIG}: adapts {shown}, which the base {base} has not (it has"
            f" {', '.join(known)}): an adapter of another family{settings.made_for}; give one"
            " that was trained over this base"
        )


def lora_from_peft(
    source: Path, tensors: Mapping[str, Tensor], base: DecoderConfig, settings: PeftConfig
) -> Imported:
    """PEFT's tensors -> `lora.state`'s.

    A layer without an adapter, and what a smaller rank lacks, is filled with zeros, which adds
    nothing to what the model computes. Where layers have scales of their own, they are put into B.

    Raises:
        PhiSightError: a tensor is not of this base or lacks its other half, or scales differ so
            that this would round B.
    """
    by_layer = pairs_by_layer(source, tensors, base, settings)
    if not by_layer:
        raise PhiSightError(f"{source}: holds no tensor; {REMEDY}")
    pairs = [pair for given in by_layer.values() for pair in given.values()]
    rank, scaling = max(len(pair.both[0]) for pair in pairs), pairs[0].scaling
    put_scales_into_b(source, by_layer, scaling)
    state: dict[str, Tensor] = {}
    targets: list[str] = []
    for kind, (outputs, inputs) in input_sizes(base).items():
        parts = fused_parts(base).get(kind, {})
        own = {layer: given for (layer, of), given in by_layer.items() if of == kind}
        adapted = wholes(own, kind, parts) or apart(own, kind, parts)
        names = {name for given in adapted.values() for name in given}
        for name, rows in ({kind: outputs} | parts).items():
            if name not in names:
                continue
            targets.append(name)
            for layer in range(base.num_hidden_layers):
                module = f"model.layers.{layer}.{PLACES[kind]}.{kind}"
                state[f"{module}.scaling"] = torch.tensor(scaling)
                place = module if name == kind else f"{module}.{name}"
                down, up = filled(adapted.get(layer, {}).get(name), rank, rows, inputs)
                state |= {f"{place}.lora_A": down, f"{place}.lora_B": up}
    alpha = settings.alpha
    if settings.ranks or settings.alphas:
        alpha = scaling * (math.sqrt(rank) if settings.rank_stabilized else rank)
    return Imported(state, tuple(targets), rank, alpha)


def wholes(
    own: Mapping[int, Mapping[str, Pair]], kind: str, parts: Mapping[str, int]
) -> dict[int, dict[str, Factors]]:
    """The adapters of the layers of one kind, each of the whole layer; nothing where one of them
    has parts with an A of their own, or lacks one."""
    joined = {}
    for layer, given in own.items():
        names = [kind] if kind in given else list(parts)
        pairs = [given[name].both for name in names if name in given]
        together = all(torch.equal(down, pairs[0][0]) for down, _ in pairs[1:])
        if len(pairs) < len(names) or not together:
            return {}
        joined[layer] = {kind: (pairs[0][0], torch.cat([up for _, up in pairs]))}
    return joined


def apart(
    own: Mapping[int, Mapping[str, Pair]], kind: str, parts: Mapping[str, int]
) -> dict[int, dict[str, Factors]]:
    """The same by part; those of a whole layer have A in common, and B is cut by rows."""
    found = {}
    for layer, given in own.items():
        if kind in given:
            down, up = given[kind].both
            pieces = up.split(list(parts.values()))
            found[layer] = {part: (down, piece) for part, piece in zip(parts, pieces, strict=True)}
        else:
            found[layer] = {name: pair.both for name, pair in given.items()}
    return found


def filled(pair: Factors | None, rank: int, rows: int, inputs: int) -> Factors:
    """A and B of `rank`, with zeros where `pair` has a smaller one or is not there."""
    down, up = torch.zeros(rank, inputs), torch.zeros(rows, rank)
    if pair:
        down[: len(pair[0])], up[:, : len(pair[0])] = pair
    return down, up


def put_scales_into_b(source: Path, by_layer: ByLayer, scaling: float) -> None:
    """Multiply B where its scale is another one than `scaling`, by a power of two: that is exact.

    Raises `PhiSightError` where it would round.
    """
    for (layer, _), given in by_layer.items():
        for name, pair in given.items():
            factor = pair.scaling / scaling
            if torch.tensor(pair.scaling) == torch.tensor(scaling):
                continue
            if math.frexp(factor)[0] != 0.5:  # no power of two
                raise PhiSightError(
                    f"{source / CONFIG}: B A is scaled by {pair.scaling:g} in {name} of layer"
                    f" {layer} and by {scaling:g} elsewhere; a run has one scale, and B cannot take"
                    " up the difference to the bit; merge it with PEFT and use the result as base"
                )
            assert pair.up is not None
            pair.up *= factor


def pairs_by_layer(
    source: Path, tensors: Mapping[str, Tensor], base: DecoderConfig, settings: PeftConfig
) -> ByLayer:
    """The tensors of an adapter, put together. Raises as `lora_from_peft` does."""
    sizes = input_sizes(base)
    rows = {kind: outputs for kind, (outputs, _) in sizes.items()} | part_sizes(base)
    places = PLACES | {part: PLACES[fused] for part, fused in FUSED.items()}
    remedy = (
        f"the base and the rank in {CONFIG} ask for that{settings.made_for}; give the base that it"
        " was trained over with --base, and its --vision and --projector"
    )
    found: ByLayer = {}
    adapters = set()
    for key, tensor in tensors.items():
        where = in_layer(source, key, base.num_hidden_layers, places, _REST.pattern)
        kind = FUSED.get(where.kind, where.kind)
        [(side, adapter)] = _REST.findall(where.rest)
        adapters.add(adapter)
        if len(adapters) > 1:
            names = ", ".join(sorted(name or "one without a name" for name in adapters))
            raise PhiSightError(
                f"{source}: holds several adapters ({printable(names, 80)}); save one of them with"
                " PEFT's save_pretrained(selected_adapters=[...])"
            )
        # As PEFT finds it in its patterns: by the name within the whole model.
        module = key.removeprefix(PREFIX).removesuffix(f".{where.rest}")
        pair = found.setdefault((where.layer, kind), {}).setdefault(
            where.kind, Pair(settings.scaling_of(module))
        )
        if (pair.down if side == "A" else pair.up) is not None:
            raise PhiSightError(
                f"{source}: {key[:120]} is there twice, under other names; save one adapter of one"
                " model"
            )
        rank, outputs, inputs = settings.rank_of(module), rows[where.kind], sizes[kind][1]
        shape = (rank, inputs) if side == "A" else (outputs, rank)
        matrix = need_matrix(source, key, tensor, *shape, remedy=remedy)
        if side == "A":
            pair.down = matrix
        else:
            pair.up = matrix
    check_whole(source, found)
    return found


def check_whole(source: Path, found: ByLayer) -> None:
    """Raise `PhiSightError` for half a pair, and for a layer that is there whole and in parts."""
    for (layer, kind), given in found.items():
        for name, pair in given.items():
            if pair.down is None or pair.up is None:
                raise PhiSightError(f"{source}: {name} of layer {layer} lacks its A or B; {REMEDY}")
        if kind in given and len(given) > 1:
            raise PhiSightError(
                f"{source}: layer {layer} has {kind} both whole and in parts; {REMEDY}"
            )


def run_import(options: argparse.Namespace) -> str:
    """`export.py --import-peft DIR`."""
    out = folder_to_write(options)
    return import_peft(options.import_peft, out, imported_config(options))


IMPORT = Form(run_import, {"metavar": "DIR", "help": "a PEFT adapter into a new run"})
