"""Who owns the tensors of what was loaded: a line for whoever started it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from errors import printable
from model.build import Assembled
from model.vision import VisionSpec
from ops.nf4 import is_four_bit, weight_count

UNUSED = ("optimizer", "rng")  # the owners of what only a training goes on from


def loaded_line(
    parts: Assembled, source: str = "", rows: Sequence[Mapping[str, Any]] = (), trains: bool = False
) -> str:
    """How many tensors, and numbers in them, were loaded from where, by owner.

    source, rows: the checkpoint's name and the rows of its manifest, all of which were read and
    have the bytes that they say; without, there was none. trains: whether all of it is used.
    """
    said = []
    if source:
        owners = dict.fromkeys(row["owner"] for row in rows)
        counts = {
            owner: counted(math.prod(row["shape"]) for row in rows if row["owner"] == owner)
            for owner in owners
        }
        unused = [] if trains else [owner for owner in UNUSED if owner in counts]
        used = ", ".join(f"{o} {count}" for o, count in counts.items() if o not in unused)
        said.append(f"{source}: {used}; config and trainer state")
        if unused:
            passed_over = " and ".join(f"{owner} {counts[owner]}" for owner in unused)
            said.append(f"of no use here: {passed_over}")
    base = [parameter for _, parameter in parts.model.owners()["base"]]
    four_bit = sum(map(is_four_bit, base))
    packed = f", {four_bit} of them in 4 bits" if four_bit else ""
    said.append(f"base {parts.base.name}: {counted(map(weight_count, base))}{packed}")
    when = "for pictures whose features are not stored" if trains else "when a picture comes"
    said.append(
        f"{parts.vision.config.NAME} {parts.vision.folder}: {vision_counted(parts.vision)}, {when}"
    )
    return printable("loaded " + "; ".join(said))


def counted(sizes: Iterable[int]) -> str:
    """As people read it: "48 tensors (139,280 numbers)"."""
    known = list(sizes)
    return f"{len(known)} tensors ({sum(known):,} numbers)"


def vision_counted(spec: VisionSpec) -> str:
    """The same of a picture encoder, none of whose weights is read for it."""
    with torch.device("meta"):
        model = spec.config.build()
    return counted(tensor.numel() for tensor in model.state_dict().values())
