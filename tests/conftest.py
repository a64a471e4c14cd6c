"""A small world and the tiny preset's model, made once for all tests."""

from pathlib import Path

import threads  # noqa: F401 (before torch is loaded)

import pytest
import torch
from hypothesis import settings

from config import Config, default_config, replace
from data.features import FeatureStore
from data.prepare import TrainingData, prepare
from data.world import world_fields, write_world
from model.build import Assembled, assemble
from model.vision import VisionTower
from model.vlm import VisionLanguageModel

ROOT = Path(__file__).resolve().parents[1]

# The same examples in every run, and no time limit: a test must not fail by chance or by load.
settings.register_profile("repeatable", derandomize=True, deadline=None, max_examples=50)
settings.load_profile("repeatable")


@pytest.fixture(scope="session")
def world(tmp_path_factory) -> Path:
    """A picture world of a dozen pictures."""
    folder = tmp_path_factory.mktemp("world")
    write_world(folder, pictures=12, held_out=3, seed=1, turns=4)
    return folder


@pytest.fixture(scope="session")
def tiny_config(world, tmp_path_factory) -> Config:
    """The tiny preset on that world."""
    folder = tmp_path_factory.mktemp("tiny")
    return replace(
        default_config("tiny"),
        base=str(ROOT / "assets/tiny/phi3"),
        vision=str(ROOT / "assets/tiny/clip"),
        **world_fields(world),
        run=str(folder / "run"),
        features=str(folder / "features"),
        validation_fraction=0.3,
        device="cpu",
    )


@pytest.fixture(scope="session")
def parts(tiny_config) -> Assembled:
    """The assembled tiny model. Its B is drawn: with a fresh one the adapter would do nothing."""
    parts = assemble(tiny_config)
    draw_adapter(parts.model)
    parts.model.eval()
    return parts


@torch.no_grad()
def draw_adapter(model: VisionLanguageModel) -> None:
    generator = torch.Generator().manual_seed(2)
    for name, parameter in model.trainable():
        if name.endswith(".lora_B"):
            parameter.normal_(std=0.05, generator=generator)


@pytest.fixture
def model(parts) -> VisionLanguageModel:
    """The model of `parts` in eval mode; mode and gradients are put back after."""
    yield parts.model
    parts.model.zero_grad(set_to_none=True)
    parts.model.eval()


@pytest.fixture(scope="session")
def store(tiny_config, parts) -> FeatureStore:
    """The feature store of `tiny_config`; `prepared` fills it."""
    return FeatureStore(tiny_config.features, parts.vision.key, parts.vision.shape)


@pytest.fixture(scope="session")
def prepared(tiny_config, parts, store) -> TrainingData:
    return prepare(
        tiny_config, parts.chat_format, store, lambda: VisionTower(parts.vision), positions=2048
    )
