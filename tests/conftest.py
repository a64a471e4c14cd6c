"""A small world and the tiny preset's model, made once for all tests."""

import os
import shutil
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import threads  # noqa: F401 (before torch is loaded)

import psutil
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

# `make test` starts this suite, and a make that a test starts is no part of that one: it would
# print which folders it enters and take over the flags.
for name in ("MAKEFLAGS", "MAKELEVEL", "MFLAGS"):
    os.environ.pop(name, None)

# A shell has what it starts with `&` ignore Ctrl-C, and so would every program that a test starts.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# What a run saves is synced, thousands of times, and each sync waits for the disk; not in memory.
MEMORY, ROOM = Path("/dev/shm"), 6 << 30
if (
    "TMPDIR" not in os.environ
    and os.access(MEMORY, os.W_OK)
    and min(shutil.disk_usage(MEMORY).free, psutil.virtual_memory().available) > ROOM
):
    os.environ["TMPDIR"], tempfile.tempdir = str(MEMORY), None

# The files that take longest, the longest first. `make test` gives them out in this order, so that
# no worker is alone with a long one at the end.
LONG = (
    "test_docs",
    "test_cluster",
    "test_ranks",
    "test_trainings",
    "test_torture",
    "test_export_gguf",
    "test_notebook",
    "test_app_trainings",
    "test_train",
    "test_hub_runs",
    "test_export_peft",
    "test_space_process",
    "test_rollback_processes",
    "test_serve_process",
    "test_sweep",
    "test_status",
    "test_app_views",
    "test_app_start",
    "test_rollback",
    "test_kernels",
    "test_golden",
)

# The same examples in every run, and no time limit: a test must not fail by chance or by load.
settings.register_profile("repeatable", derandomize=True, deadline=None, max_examples=50)
settings.load_profile("repeatable")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    place = {f"{name}.py": number for number, name in enumerate(LONG)}
    items.sort(key=lambda item: place.get(item.path.name, len(place)))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown(item: pytest.Item) -> Iterator[None]:
    """pytest removes what a test wrote that passed. Its folder stays, empty: another would get the
    same path, of which this process may remember something."""
    folder = getattr(item, "funcargs", {}).get("tmp_path")
    yield
    if folder is not None:
        folder.mkdir(exist_ok=True)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """A browser without a head, for all tests of a file; skips them where there is none."""
    from pages import chromium  # not for tests that need none

    with chromium() as start:
        yield start()


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
