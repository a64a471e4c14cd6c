"""How far apart pictures are by `data.features compare`: where its words begin and end.

python -m benchmarks.likeness              # the tiny preset's CLIP on its world's pictures
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Callable
from functools import partial
from io import BytesIO
from pathlib import Path

import torch
from PIL import Image, ImageOps

import config as configs
from data.feature_form import as_stored
from data.features import blank_picture
from data.images import load_image
from errors import PhiSightError, run_main
from evaluation.likeness import likeness
from model.vision import VisionTower, vision_of

SHARES = (0.0, 0.05, 0.5, 0.95, 1.0)  # of the pairs that are not farther apart


def saved_anew(picture: Image.Image, quality: int) -> Image.Image:
    buffer = BytesIO()
    picture.save(buffer, "JPEG", quality=quality)
    return Image.open(buffer).convert("RGB")


def measured(images: Path, pairs: int, copies: int) -> dict[str, list[float]]:
    """What is compared -> how far apart the pairs are, by how far they are from grey; sorted."""
    config = configs.default_config("tiny")
    tower, draw = VisionTower(vision_of(config)), random.Random(0)
    files = sorted(images.glob("*.png"))
    if len(files) < 2:
        raise PhiSightError(f"{images}: has fewer than two pictures; run `make demo` first")

    def apart(files: list[Path], first: Image.Image, second: Image.Image) -> float:
        features = as_stored(tower([first, second, blank_picture()]), config.feature_storage)
        return likeness(files, [tower.fit(first), tower.fit(second)], features).of_grey

    def changed(change: Callable[[Image.Image], Image.Image]) -> list[float]:
        chosen = [(file, load_image(file)) for file in draw.choices(files, k=copies)]
        return sorted(apart([file, file], one, change(one)) for file, one in chosen)

    two = [draw.sample(files, 2) for _ in range(pairs)]
    rows = {"two pictures": sorted(apart(each, *map(load_image, each)) for each in two)}
    for quality in (95, 75, 30):
        rows[f"its JPEG of quality {quality}"] = changed(partial(saved_anew, quality=quality))
    return rows | {"its mirror image": changed(ImageOps.mirror)}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.likeness", description=__doc__.split("\n")[0])
    parser.add_argument("--images", type=Path, default=Path("cache/world/images"))
    parser.add_argument("--pairs", type=int, default=200, help="of different pictures (200)")
    parser.add_argument("--copies", type=int, default=60, help="of each kind (60)")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    print(f"{'% of the distance from grey':<28}" + "".join(f"{100 * s:>7.0f}%" for s in SHARES))
    for name, values in measured(options.images, options.pairs, options.copies).items():
        found = [values[min(int(share * len(values)), len(values) - 1)] for share in SHARES]
        print(f"{name:<28}" + "".join(f"{100 * value:>8.1f}" for value in found))
    return 0


if __name__ == "__main__":
    run_main(main)
