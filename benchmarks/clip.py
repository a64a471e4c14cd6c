"""A CLIP's features in float32 and in bfloat16, by torch's products and by oneDNN's packed ones.

    python -m benchmarks.clip --vision FOLDER [--images FOLDER] [--repeats 3]

For each form the processor seconds of one picture, in turns, and how far its features are from
those of float32 by torch's own products. Without `--images` the pictures are noise.
"""

from __future__ import annotations

import copy
import json
import time
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn

from config import Parser
from errors import run_main
from model.encoders.clip import ClipVision
from model.vision import load_clip, read_clip_config, read_vision_spec

PICTURES = 4


class PackedLinear(nn.Module):
    """A linear layer whose weight lies in the order in which oneDNN reads it."""

    def __init__(self, linear: nn.Linear, rows: int) -> None:
        super().__init__()
        self.weight = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), rows)
        self.bias = linear.bias.detach()

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")


def packed(model: ClipVision, rows: int) -> ClipVision:
    """A copy with packed weights, in the model's dtype; `rows`: tokens that come at once."""
    model = copy.deepcopy(model)
    for name, linear in list(model.named_modules()):
        if isinstance(linear, nn.Linear):
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, PackedLinear(linear, rows))
    return model


@torch.no_grad()
def main() -> None:
    parser = Parser(prog="clip.py", description=__doc__.splitlines()[0])
    parser.add_argument("--vision", required=True, help="CLIP: hub id or local folder")
    parser.add_argument("--images", type=Path, help="pictures to look at")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    clock = time.thread_time if options.threads == 1 else time.perf_counter
    spec = read_vision_spec(options.vision)
    wide, config = load_clip(spec), read_clip_config(spec.folder)
    if options.images:
        paths = sorted(options.images.iterdir())[:PICTURES]
        pixels = spec.preparation([Image.open(path).convert("RGB") for path in paths])
    else:
        side = config.image_size
        pixels = torch.randn(PICTURES, 3, side, side, generator=torch.Generator().manual_seed(0))
    narrow = copy.deepcopy(wide).bfloat16()
    forms = {
        "float32": wide,
        "float32, packed": packed(wide, config.tokens),
        "bfloat16": narrow,
        "bfloat16, packed": packed(narrow, config.tokens),
    }
    seconds: dict[str, list[float]] = {name: [] for name in forms}
    features: dict[str, Tensor] = {}
    for picture in (pixels[i % len(pixels)][None] for i in range(options.repeats)):
        for name, model in forms.items():
            dtype = model.pre_layrnorm.weight.dtype
            started = clock()
            features[name] = model.hidden_state(picture.to(dtype), spec.layer)[:, 1:].float()
            seconds[name].append(clock() - started)
    right = features["float32"]
    for name, found in features.items():
        error = found - right  # of the last picture
        facts = {
            "seconds": round(sorted(seconds[name])[options.repeats // 2], 3),
            "relative_rms": (error.norm() / right.norm()).item(),
            "worst_token": (error.norm(dim=-1) / right.norm(dim=-1)).max().item(),
            "largest_error": error.abs().max().item(),
            "largest_feature": right.abs().max().item(),
        }
        print(json.dumps({"form": name, "threads": options.threads, **facts}))


if __name__ == "__main__":
    run_main(main)
