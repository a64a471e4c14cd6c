"""How much of what a picture shows can be read off a CLIP's patch features?

    python -m tools.probe_clip                              # of the tiny preset
    python -m tools.probe_clip --clip FOLDER --layer -1

A probe, one linear layer or one with a hidden layer, learns from training pictures to tell from
the patches of each cell whether a thing lies there, and its shape, colour and size. What the probe
gets wrong no projector and no adapter will get right: it tells the limit of the features apart
from that of the base (arXiv 1610.01644).
"""

from __future__ import annotations

from pathlib import Path

import threads  # noqa: F401 (before torch is loaded)

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import CLIPVisionModel

from config import Parser
from data import world
from errors import PhiSightError, run_main
from tools.tiny.clip import draw_many, normalise

ROOT = Path(__file__).resolve().parent.parent
GROUPS = {"shape": list(world.SHAPES), "colour": list(world.COLOURS), "size": list(world.SIZES)}
SEED, BATCH, STEPS, RATE = 0, 128, 1500, 2e-3
SETS = {"train": "seen", "held_out": "seen", "novel_pairs": "novel"}


def patch_features(tower: CLIPVisionModel, pixels: Tensor, layer: int) -> Tensor:
    """(pictures, 9, 4 x dim): the patches of each cell of the 3 x 3 grid side by side.

    Args: `pixels`: (pictures, 3, 96, 96) uint8; `layer`: of the tower's hidden states.
    """
    parts = []
    with torch.no_grad():
        for part in pixels.split(200):
            states = tower(pixel_values=normalise(part), output_hidden_states=True).hidden_states
            parts.append(states[layer][:, 1:])
    patches = torch.cat(parts)
    side = round(patches.shape[1] ** 0.5)
    if side % 3:
        raise PhiSightError(f"{side} x {side} patches: do not divide into 3 x 3 cells")
    inner = side // 3
    cells = patches.view(len(patches), 3, inner, 3, inner, -1).transpose(2, 3)
    return cells.reshape(len(patches), 9, -1)


def contents(scenes: list[world.Scene]) -> Tensor:
    """(scenes, 9, 3): numbers of shape, colour and size of what lies in a cell; -1 for nothing."""
    found = torch.full((len(scenes), 9, len(GROUPS)), -1)
    for index, scene in enumerate(scenes):
        for thing in scene.things:
            values = [names.index(getattr(thing, name)) for name, names in GROUPS.items()]
            found[index, 3 * thing.row + thing.column] = torch.tensor(values)
    return found


def novel_cells(scenes: list[world.Scene]) -> Tensor:
    """(scenes, 9) bool: where a pair of shape and colour lies that no training picture shows."""
    found = torch.zeros(len(scenes), 9, dtype=torch.bool)
    for index, scene in enumerate(scenes):
        for thing in scene.things:
            found[index, 3 * thing.row + thing.column] = thing.pair in world.HELD_OUT_PAIRS
    return found


def split_logits(logits: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Whether something is there, and the logits of each group."""
    sizes = [len(names) for names in GROUPS.values()]
    first, *groups = logits.split([1, *sizes], dim=-1)
    return first.squeeze(-1), groups


def train_probe(features: Tensor, found: Tensor, hidden: int) -> nn.Module:
    """A probe over (pictures, 9, dim) features; `hidden` units, or 0 for a linear one."""
    torch.manual_seed(SEED)
    outputs = 1 + sum(map(len, GROUPS.values()))
    width = features.shape[-1]
    probe = (
        nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, outputs))
        if hidden
        else nn.Linear(width, outputs)
    )
    optimizer = torch.optim.AdamW(probe.parameters(), RATE, weight_decay=0.02)
    for step in range(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = RATE * (1 - step / STEPS)
        chosen = torch.randint(len(features), (BATCH,))
        there, groups = split_logits(probe(features[chosen]))
        wanted = found[chosen]
        is_there = wanted[..., 0] >= 0
        loss = F.binary_cross_entropy_with_logits(there, is_there.float())
        for number, logits in enumerate(groups):
            loss = loss + F.cross_entropy(logits[is_there], wanted[is_there][:, number])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return probe


@torch.no_grad()
def figures(probe: nn.Module, features: Tensor, scenes: list[world.Scene]) -> dict[str, float]:
    """Percent right: whether something is there, each attribute of what is, whole scenes, and the
    shape of things of a pair that was never shown (0 where there are none)."""
    found, novel = contents(scenes), novel_cells(scenes)
    there, groups = split_logits(probe(features))
    is_there = found[..., 0] >= 0
    told = (there > 0) == is_there
    right = torch.stack([g.argmax(-1) == found[..., n] for n, g in enumerate(groups)], dim=-1)
    whole = (told & (right.all(-1) | ~is_there)).all(1)

    def percent(mask: Tensor) -> float:
        return round(100 * mask.float().mean().item(), 2) if mask.numel() else 0.0

    shares = {"there": percent(told)}
    shares |= {name: percent(right[..., n][is_there]) for n, name in enumerate(GROUPS)}
    return shares | {"whole_scene": percent(whole), "novel_shape": percent(right[..., 0][novel])}


def main() -> None:
    parser = Parser(prog="probe_clip.py", description=__doc__.splitlines()[0])
    parser.add_argument("--clip", default=str(ROOT / "assets" / "tiny" / "clip"))
    parser.add_argument("--layer", type=int, default=-2, help="hidden layer that is probed")
    parser.add_argument("--pictures", type=int, default=6000, help="to learn from")
    parser.add_argument("--held-out", type=int, default=500, help="pictures a set to be right on")
    options = parser.parse_args()
    tower = CLIPVisionModel.from_pretrained(options.clip, dtype=torch.float32).eval()
    drawn = {
        name: draw_many(f"probe-{name}", count, pairs)
        for (name, pairs), count in zip(
            SETS.items(), (options.pictures, options.held_out, options.held_out), strict=True
        )
    }
    features = {
        name: patch_features(tower, pixels, options.layer) for name, (_, pixels) in drawn.items()
    }
    mean, std = features["train"].mean((0, 1)), features["train"].std((0, 1)) + 1e-5
    features = {name: (of - mean) / std for name, of in features.items()}
    print(f"{options.clip}, hidden layer {options.layer}; percent right")
    for name, hidden in (("linear", 0), ("256 hidden units", 256)):
        probe = train_probe(features["train"], contents(drawn["train"][0]), hidden)
        for of in ("held_out", "novel_pairs"):
            shares = figures(probe, features[of], drawn[of][0])
            line = "  ".join(f"{what} {share:.1f}" for what, share in shares.items())
            print(f"{name:>18} {of:12} {line}", flush=True)


if __name__ == "__main__":
    run_main(main)
