"""Pictures a second: files to stored features, and transformers' CLIP with its processor."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from benchmarks.processes import Turn
from benchmarks.suite.material import Material
from data.features import FeatureStore
from model.vision import VisionTower, vision_of

PICTURES, BATCH = 128, 64


def names_in(material: Material) -> list[str]:
    return sorted(path.name for path in (material.world / "images").glob("train_*"))[:PICTURES]


def ours(material: Material) -> Turn:
    """As `train.py` computes them: decoded beside, encoded, written to an empty store."""
    config = material.config(material.run)
    torch.set_num_threads(material.threads)
    names, spec = names_in(material), vision_of(config)
    tower = VisionTower(spec)

    def turn() -> dict[str, float]:
        with tempfile.TemporaryDirectory() as folder:
            store = FeatureStore(folder, spec.key, spec.shape, config.feature_storage)
            started = time.perf_counter()
            assert not store.add(names, Path(config.images[0]), lambda: tower, BATCH)
            seconds = time.perf_counter() - started
            norm = torch.stack([store.features_of(name) for name in names]).norm().item()
        return {"pictures_per_second": len(names) / seconds, "norm": norm}

    return turn


def transformers(material: Material) -> Turn:
    config = material.config(material.run)
    torch.set_num_threads(material.threads)
    encode = hub_clip(config.vision, config.vision_layer)
    names, folder = names_in(material), Path(config.images[0])

    def turn() -> dict[str, float]:
        features, started = [], time.perf_counter()
        for start in range(0, len(names), BATCH):
            batch = names[start : start + BATCH]
            features.append(encode([Image.open(folder / name).convert("RGB") for name in batch]))
        seconds = time.perf_counter() - started
        return {
            "pictures_per_second": len(names) / seconds,
            "norm": torch.cat(features).norm().item(),
        }

    return turn


def hub_clip(folder: str, layer: int) -> Callable[[list[Image.Image]], Tensor]:
    """transformers' own CLIP in float32: pictures -> (pictures, patches, dim) of a hidden layer."""
    from transformers import CLIPImageProcessorPil, CLIPVisionModel

    processor = CLIPImageProcessorPil.from_pretrained(folder)
    model = CLIPVisionModel.from_pretrained(folder, dtype=torch.float32).eval()

    @torch.no_grad()
    def encode(pictures: list[Image.Image]) -> Tensor:
        pixels = processor(pictures, return_tensors="pt")["pixel_values"]
        return model(pixels, output_hidden_states=True).hidden_states[layer][:, 1:]

    return encode
