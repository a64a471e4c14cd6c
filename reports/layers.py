"""Which layers training changed most: the size of every change beside that of what it changed.

An adapter changes the weight W of a layer by scaling * B A, a matrix as large as W. It is never
formed: with B = Q R and A^T = P S, whose Q and P have orthonormal columns, the Frobenius norm of
B A is that of the small R S^T. W is what the model multiplies by, dequantised, one at a time.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional

import config_values
from config import Config
from documents import OBJECT, TEXT, problems
from errors import PhiSightError, key_problems
from reports.compare import Saved
from tensors import check_fit, finite

if TYPE_CHECKING:
    from model.base import BaseModel

ADAPTER, PROJECTOR = "lora_weights", "image_projector"  # the files that hold what is trained
SHOWN = 20  # layers that are printed

Factors = tuple[Tensor, Tensor]
"""B (outputs, rank), times the scaling, and A (rank, inputs), both float64: their product is an
update"""


# -- what was changed ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Change:
    """How far a tensor was moved; both sizes are Frobenius norms."""

    owner: str
    name: str
    size: float
    """of the change"""
    weight: float
    """of what was changed"""

    @property
    def share(self) -> float:
        """The change by what was changed; infinite where that was zero."""
        if self.weight:
            return self.size / self.weight
        return math.inf if self.size else 0.0

    def as_json(self) -> dict[str, Any]:
        sizes = {"size": self.size, "weight": self.weight, "share": finite(self.share)}
        return {"owner": self.owner, "name": self.name, **sizes}


@dataclass(frozen=True)
class Changes:
    """The changes of all layers, the largest share first; last those of what was zero."""

    of_what: str
    changes: list[Change]
    note: str = ""

    @property
    def identical(self) -> bool:
        """Whether nothing was changed."""
        return not any(change.size for change in self.changes)

    def kinds(self) -> dict[str, float]:
        """Kind of adapted layer, such as "o_proj" -> the share of all layers of it together."""
        sums: dict[str, list[float]] = {}
        for change in self.changes:
            if change.owner == "lora":
                both = sums.setdefault(change.name.rpartition(".")[2], [0.0, 0.0])
                both[0] += change.size**2
                both[1] += change.weight**2
        shares = {k: Change("lora", k, *map(math.sqrt, both)).share for k, both in sums.items()}
        return dict(sorted(shares.items(), key=lambda item: -item[1]))

    def as_json(self) -> dict[str, Any]:
        return {
            "of": self.of_what,
            "note": self.note,
            "changes": [change.as_json() for change in self.changes],
            "kinds": {kind: finite(share) for kind, share in self.kinds().items()},
        }

    def __str__(self) -> str:
        lines = [self.of_what, f"{'change':>9}{'size':>11}{'weight':>11}  layer"]
        lines += [
            f"{percent(change.share):>9}{change.size:>11.4g}{change.weight:>11.4g}"
            f"  {change.owner} {change.name}"
            for change in self.changes[:SHOWN]
        ]
        if (left_out := len(self.changes) - SHOWN) > 0:
            lines.append(f"... and {left_out} more, which --json lists")
        kinds = ", ".join(f"{kind} {percent(share)}" for kind, share in self.kinds().items())
        return "\n".join(
            [*lines, f"layers of a kind together: {kinds}", *filter(None, [self.note])]
        )


def percent(share: float) -> str:
    return f"{100 * share:.3g} %" if math.isfinite(share) else "from 0"


def ranked(of_what: str, changes: list[Change], note: str = "") -> Changes:
    """As `Changes` has them. Raises `PhiSightError` for a change that is not finite."""
    for change in changes:
        if not math.isfinite(change.size):
            raise PhiSightError(
                f"{change.name}: holds values that are not finite; use another checkpoint"
            )
    # Without a share it is not the farthest, however little of it there is: biases begin as zeros.
    order = sorted(changes, key=lambda c: (math.isinf(c.share), -c.share, c.owner, c.name))
    return Changes(of_what, order, note)


# -- adapters --------------------------------------------------------------------------------------


def factors_of(state: Mapping[str, Tensor]) -> dict[str, Factors]:
    """Layer, or part of one, -> its update, of an adapter's tensors. Raises `PhiSightError`."""
    from lora.state import adapters_in  # bitsandbytes, a second

    layers = adapters_in(state)
    expected = {name for names in layers.values() for name in names}
    wrong = key_problems(f"{ADAPTER}: tensor ", expected, set(state))
    found: dict[str, Factors] = {}
    for layer, names in layers.items() if not wrong else ():
        a, b, scaling = (state[name] for name in names)
        if not (a.dim() == b.dim() == 2 and len(a) == b.shape[1] and scaling.numel() == 1):
            wrong.append(f"{ADAPTER}: the tensors of {layer} do not belong together")
        else:
            found[layer] = b.double() * scaling.double(), a.double()
    if wrong:
        raise PhiSightError(f"{wrong[0]}; use the checkpoint of a run")
    return found


def product_norm(b: Tensor, a: Tensor) -> float:
    """The Frobenius norm of B A, for (outputs, rank) and (rank, inputs) float64."""
    r = torch.linalg.qr(b, mode="r").R  # (at most rank, rank)
    s = torch.linalg.qr(a.T, mode="r").R
    return norm(r @ s.T)


def difference_norm(first: Factors, second: Factors) -> float:
    """The Frobenius norm of the difference of two updates of one layer, of any ranks."""
    rank = max(len(first[1]), len(second[1]))
    (b, a), (other_b, other_a) = (
        (functional.pad(b, (0, rank - len(a))), functional.pad(a, (0, 0, 0, rank - len(a))))
        for b, a in (first, second)
    )
    # B A - B' A' = B (A - A') + (B - B') A' is a product again: exact where the two are near, and
    # zero where they are equal.
    return product_norm(torch.cat([b, b - other_b], 1), torch.cat([a - other_a, other_a]))


def norm(tensor: Tensor) -> float:
    """The Frobenius norm, summed in float64."""
    return torch.linalg.vector_norm(tensor, dtype=torch.float64).item()


# -- over a base -----------------------------------------------------------------------------------


def changes(saved: Saved, *other: Saved, folder: str = "") -> Changes:
    """What training changed in `saved`, or, given another, what lies between the two; see
    `since_start` and `between`."""
    return between(saved, other[0], folder) if other else since_start(saved, folder)


def since_start(saved: Saved, folder: str = "") -> Changes:
    """What the whole training changed: each layer of the base by its update, and the projector
    since it was drawn.

    folder: where the base lies now, if not where it was trained. Raises `PhiSightError`.
    """
    config, updates = config_of(saved), factors_of(saved.state[ADAPTER])
    base = base_of(saved, config, folder)
    places = [place_of(base, layer, factors) for layer, factors in updates.items()]
    changes = [
        Change("lora", layer, product_norm(*factors), norm(base_weight(*place)))
        for (layer, factors), place in zip(updates.items(), places, strict=True)
    ]
    notes = []
    if config.merge_rounding != "none":
        notes.append("the sizes are those before the merged weights are rounded to NF4 again")
    if saved.config.get("started_from") or "imported_from" in saved.config:
        notes.append("the projector is left out: what it was at first is not in the checkpoint")
    else:
        changes += moved(drawn_projector(base, config, saved), saved.state[PROJECTOR])
    what = f"{saved.path}: what training changed, over {base.name} in {config.quantization}"
    return ranked(what, changes, "; ".join(notes))


def between(first: Saved, second: Saved, folder: str = "") -> Changes:
    """What lies between two checkpoints over one base: the difference of their updates beside the
    weight of each layer, and that of their projectors. Takes and raises what `since_start` does."""
    one, other = config_of(first), config_of(second)
    for what, a, b in (
        ("base", first.config["base_fingerprint"], second.config["base_fingerprint"]),
        ("--quantization", one.quantization, other.quantization),
    ):
        if a != b:
            raise PhiSightError(
                f"{second.path}: has another {what} than {first.path}, so that no layer of it can"
                " be compared; leave --by-layer out"
            )
    before, after = (saved.state[PROJECTOR] for saved in (first, second))
    check_fit(before, after, f"{second.path}: {PROJECTOR}", "leave --by-layer out")
    updates = [factors_of(saved.state[ADAPTER]) for saved in (first, second)]
    base = base_of(first, one, folder)
    updates = [apart(updates[0], updates[1], base), apart(updates[1], updates[0], base)]
    changes = moved(before, after)
    for layer in dict.fromkeys([*updates[0], *updates[1]]):
        given = [found[layer] for found in updates if layer in found]
        place = [place_of(base, layer, factors) for factors in given][0]
        none = given[0][0][:, :0], given[0][1][:0]  # of an adapter that leaves the layer as it is
        size = difference_norm(*(found.get(layer, none) for found in updates))
        changes.append(Change("lora", layer, size, norm(base_weight(*place))))
    what = f"{first.path} to {second.path}: what lies between, over {base.name}"
    return ranked(f"{what} in {one.quantization}", changes)


def config_of(saved: Saved) -> Config:
    """Raises `PhiSightError` for a checkpoint that is not one of a run."""
    for problem in problems(saved.config, {"config": OBJECT, "base_fingerprint": TEXT}):
        raise PhiSightError(f"{saved.path}: {problem}; use the checkpoint of a run")
    return config_values.from_dict(saved.config["config"], str(saved.path))


def base_of(saved: Saved, config: Config, folder: str) -> BaseModel:
    """The base that a checkpoint was trained over. Raises `PhiSightError` for another one."""
    from model.base import load_base  # seconds
    from model.devices import choose_compute_dtype, choose_device

    place, (device, _) = folder or config.base, choose_device("auto")
    revision = None if folder else config.base_revision or None
    dtype, _ = choose_compute_dtype(device)
    base = load_base(place, revision, dtype, device, config.quantization, config.base_cache)
    if base.fingerprint != saved.config["base_fingerprint"]:
        raise PhiSightError(
            f"{saved.path}: was trained over another base than {place}; name the right one with"
            " --base-folder"
        )
    return base


def apart(
    updates: Mapping[str, Factors], other: Mapping[str, Factors], base: BaseModel
) -> dict[str, Factors]:
    """The same updates, those of fused layers by part where `other` has them so: the parts have A
    in common, and B is cut by rows."""
    from model.families.fused import PARTS, rows_of, whole_of

    by_part = {whole_of(name) for name in other}
    found: dict[str, Factors] = {}
    for layer, (b, a) in updates.items():
        if layer in by_part:
            for part in PARTS[layer.rpartition(".")[2]]:
                found[f"{layer}.{part}"] = b[rows_of(part, base.model.config)], a
        else:
            found[layer] = b, a
    return found


def place_of(base: BaseModel, layer: str, factors: Factors) -> tuple[nn.Linear, slice]:
    """The layer of the base that an update belongs to, and which rows of its weight. Raises
    `PhiSightError` where there is none of that name and shape."""
    from model.families.fused import rows_of, whole_of

    (b, a), whole = factors, whole_of(layer)
    linear = dict(base.model.named_modules()).get(whole or layer)
    if isinstance(linear, nn.Linear):
        part = layer.rpartition(".")[2]
        rows = rows_of(part, base.model.config) if whole else slice(linear.out_features)
        if (len(range(linear.out_features)[rows]), linear.in_features) == (len(b), a.shape[1]):
            return linear, rows
    raise PhiSightError(
        f"{layer}: its update fits no layer of that name in {base.name}; use another checkpoint"
    )


def base_weight(linear: nn.Linear, rows: slice) -> Tensor:
    """Some rows of what the model multiplies by, dequantised; see there."""
    from ops import nf4  # bitsandbytes, a second

    return nf4.base_weight(linear)[rows]


def drawn_projector(base: BaseModel, config: Config, saved: Saved) -> dict[str, Tensor]:
    """The projector that a run began with, drawn again from its seed; the base gets an adapter, as
    that is drawn first. Raises `PhiSightError` where the saved one has other tensors."""
    from model.build import add_trained
    from model.projectors import PROJECTORS

    own, what = saved.state[PROJECTOR], f"{saved.path}: {PROJECTOR}"
    member = PROJECTORS[config.projector]
    first = own.get(member.reads, torch.zeros(0))
    if first.dim() != 2 or not first.numel():  # else whatever size it says would be drawn
        raise PhiSightError(f"{what}: has no first layer; use the checkpoint of a run")
    drawn = dict(add_trained(base.model, config, first.shape[1] // member.patches).state_dict())
    check_fit(drawn, own, what, "use the checkpoint of a run")
    return drawn


def moved(old: Mapping[str, Tensor], new: Mapping[str, Tensor]) -> list[Change]:
    """The change of each tensor of a projector."""
    return [
        Change("projector", name, norm(new[name].double() - tensor.double()), norm(tensor))
        for name, tensor in old.items()
    ]


# -- the command line ------------------------------------------------------------------------------


def add_flags(show: argparse.ArgumentParser, diff: argparse.ArgumentParser) -> None:
    """The flags of `checkpoints.py` that ask for changes by layer."""
    for command, flag in ((show, "--base"), (diff, "--by-layer")):
        about = "how far each layer moved, by the weights of the base, the farthest first"
        command.add_argument(flag, dest="by_layer", action="store_true", help=about)
        about = "the same, with the base that lies in FOLDER now"
        command.add_argument("--base-folder", default="", metavar="FOLDER", help=about)
