"""How far a save's weights have moved: since the save before, and since the run began.

Computed beside the training, by the thread that saves, from the copies that it holds. Printed in a
line, kept in the checkpoint's manifest, and in the log under "timing" of the next record: when a
run is saved, the clock and whoever stops it decide, and no result may depend on that.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from checkpoint_state import OWNERS, Checkpoint, Snapshot
from manifest import WEIGHTS
from tensors import as_float64, distance, finite

State = Mapping[str, Mapping[str, Tensor]]
"""file stem -> tensor name -> CPU tensor"""


def copy_of_weights(state: State) -> dict[str, dict[str, Tensor]]:
    """The trained weights of a model's state, copied to the CPU."""
    return {
        stem: {n: tensor.detach().to("cpu", copy=True) for n, tensor in state[stem].items()}
        for stem in WEIGHTS
    }


def change_of(
    now: Snapshot, before: Snapshot | Checkpoint | None, start: State | None
) -> dict[str, Any]:
    """The statistics of a save.

    Args:
        before: the save that it is compared with; None for the first of a run.
        start: the weights that the run began with; None where they are not known.

    Returns:
        {"step", "since_step", OWNER: {"norm", "moved", "mean_change", "moved_since_start"}}: L2
        norms over all weights of the owner, and the mean of the absolute change of a weight since
        `before`; None for what is not known or not finite.
    """
    told: dict[str, Any] = {"step": now.step, "since_step": before.step if before else None}
    for stem in WEIGHTS:
        own = now.state[stem]
        former = before.state[stem] if before and fits(before.state[stem], own) else None
        first = start[stem] if start and fits(start[stem], own) else None
        told[OWNERS[stem]] = {
            "norm": norm(own),
            "moved": None if former is None else distance(former, own),
            "mean_change": None if former is None else mean_change(former, own),
            "moved_since_start": None if first is None else distance(first, own),
        }
    return told


def fits(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> bool:
    """Whether the same tensors, of the same shapes, are in both."""
    return first.keys() == second.keys() and all(
        first[name].shape == tensor.shape for name, tensor in second.items()
    )


def norm(weights: Mapping[str, Tensor]) -> float | None:
    """The L2 norm of all tensors together; None if it is not finite."""
    return distance({name: torch.zeros((), dtype=t.dtype) for name, t in weights.items()}, weights)


def mean_change(before: Mapping[str, Tensor], now: Mapping[str, Tensor]) -> float | None:
    """The mean over all elements of |now - before|; None without elements or if not finite."""
    count = sum(tensor.numel() for tensor in now.values())
    total = sum(
        (as_float64(tensor) - as_float64(before[name])).abs().sum().item()
        for name, tensor in now.items()
    )
    return finite(total / count) if count else None


def change_line(change: Mapping[str, Any], trained: set[str]) -> str:
    """One line about a save for people. `trained`: the owners whose weights are trained."""
    parts = [
        f"{owner} norm {_number(told['norm'])}: {_moved_text(told, change['since_step'])}"
        for owner, told in change.items()
        if owner in trained
    ]
    return f"saved step {change['step']:>6}  {'; '.join(parts)}"


def _moved_text(told: Mapping[str, float | None], since_step: int | None) -> str:
    size, moved, since_start = told["norm"], told["moved"], told["moved_since_start"]
    words = []
    if moved == 0:
        words.append(f"did not move since step {since_step}")
    elif moved is not None:
        words.append(f"moved {_number(moved)}{_share(moved, size)} since step {since_step}")
    if since_start is not None:
        verb = "" if words else "moved "
        words.append(f"{verb}{_number(since_start)}{_share(since_start, size)} since the start")
    if moved:
        words.append(f"mean change {_number(told['mean_change'])}")
    return ", ".join(words) or "not compared"


def _number(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.3g}"


def _share(part: float, whole: float | None) -> str:
    return f" ({part / whole:.1%})" if whole else ""
