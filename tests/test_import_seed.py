"""Checkpoints of the seed project: what they become, and what is refused."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
import runs
import torch
from exporting import BASE, VISION, draw, pictures
from torch import nn
from transformers import (
    CLIPModel,
)

import export
from assistant.assistant import Assistant
from data.dataset import Message, Part
from errors import PhiSightError
from exports import seed
from lora.state import lora_state
from model.base import load_base
from model.vision import VisionTower


@pytest.fixture
def seed_folder(tmp_path) -> Path:
    """A checkpoint as the seed project's training wrote it, for the tiny base and CLIP."""
    base = load_base(runs.BASE, None, torch.float32, "cpu", "none").model
    lora: dict[str, object] = {}
    for number, (name, layer) in enumerate(base.named_modules()):
        if name.endswith(("o_proj", "down_proj")):
            outputs, inputs = layer.weight.shape
            lora[f"{name}.lora_A.weight"] = draw(4, inputs, seed=number).half()
            lora[f"{name}.lora_B.weight"] = draw(outputs, 4, seed=number + 99).half()
            lora[f"{name}.scaling"] = {"default": 1.5}
    read = CLIPModel.from_pretrained(runs.VISION).visual_projection.out_features
    hidden, dim = 24, base.config.hidden_size
    projector = {
        "layer1.weight": draw(hidden, read, seed=1),
        "layer1.bias": draw(hidden, seed=2),
        "layer2.weight": draw(dim, hidden, seed=3),
        "layer2.bias": draw(dim, seed=4),
        "initial_weights1": draw(hidden, read),
        "initial_weights2": draw(dim, hidden),
    }
    folder = tmp_path / "checkpoint-50"
    folder.mkdir()
    torch.save(lora, folder / seed.LORA)
    torch.save(projector, folder / seed.PROJECTOR)
    return folder


def import_seed(folder: Path, out: Path) -> int:
    return export.main([f"--import-seed={folder}", f"--out={out}", BASE, VISION])


@torch.no_grad()
def test_a_seed_checkpoint_becomes_a_run_that_computes_the_same(seed_folder, tmp_path):
    assert import_seed(seed_folder, tmp_path / "run") == 0
    back = Assistant.load(tmp_path / "run")
    lora = torch.load(seed_folder / seed.LORA, weights_only=True)
    state = lora_state(back.parts.base.model)
    assert len(state) == len(lora)
    for name, tensor in state.items():
        given = lora.get(f"{name}.weight", lora.get(name))
        wanted = torch.tensor(given["default"]) if isinstance(given, dict) else given.float()
        assert torch.equal(tensor, wanted), name
    # Its projector read what CLIP gives after its own projection, with a hidden layer of its own.
    tower = VisionTower(back.parts.vision)
    clip = CLIPModel.from_pretrained(runs.VISION, dtype=torch.float32).eval()
    vector = clip.get_image_features(tower.prepare(pictures()[:1]))
    vector = getattr(vector, "pooler_output", vector)
    weights = torch.load(seed_folder / seed.PROJECTOR, weights_only=True)
    hidden = nn.functional.gelu(vector @ weights["layer1.weight"].T + weights["layer1.bias"])
    wanted = hidden @ weights["layer2.weight"].T + weights["layer2.bias"]
    torch.testing.assert_close(
        back.model.projector(tower(pictures()[:1]))[:, 0], wanted, atol=1e-5, rtol=1e-4
    )
    message = Message(
        "user",
        (Part("image", str(runs.world() / "images/train_000000.png")), Part("text", "What is it?")),
    )
    assert isinstance("".join(back.reply([message], 4)), str)


class Bomb:
    """Its pickle would run a command."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self):
        return os.system, (f"touch {self.mark}",)


@pytest.mark.parametrize("name", [seed.LORA, seed.PROJECTOR])
def test_code_in_a_seed_file_is_refused_and_does_not_run(seed_folder, tmp_path, name):
    content = torch.load(seed_folder / name, weights_only=True)
    mark = tmp_path / "ran"
    torch.save(content | {"extra": Bomb(mark)}, seed_folder / name)
    with pytest.raises(PhiSightError, match=f"{name}: is not read, .*such as code"):
        import_seed(seed_folder, tmp_path / "run")
    assert not mark.exists() and not (tmp_path / "run").exists()


O_PROJ = "model.layers.0.self_attn.o_proj"


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        (seed.LORA, {f"{O_PROJ}.lora_A.weight": torch.zeros(4, 3)}, "not a float tensor of anyx"),
        (seed.LORA, {f"{O_PROJ}.lora_A.weight": [1, 2]}, "is list, not a tensor"),
        (seed.LORA, {f"{O_PROJ}.lora_A.weight": torch.zeros(3, 128)}, "ranks"),
        (seed.LORA, {f"{O_PROJ}.scaling": {"default": "1"}}, "not a positive number"),
        (seed.LORA, {f"{O_PROJ}.scaling": 2.0}, r"scales \[1.5, 2.0\]"),
        (seed.LORA, {f"{O_PROJ}.lora_embedding_A": {"x": torch.zeros(1)}}, "belongs to no layer"),
        (seed.LORA, {"model.layers.99.mlp.down_proj.scaling": 1.5}, "belongs to no layer"),
        (seed.LORA, {"model.layers.0.self_attn.q_proj.scaling": 1.5}, "belongs to no layer"),
        (seed.LORA, {"model.layers.99.mlp\n.x": 1.5}, "belongs to no layer"),
        (seed.LORA, {f"{O_PROJ}.lora_B.weight": None}, "is NoneType"),
        (seed.PROJECTOR, {"linear.weight": torch.zeros(1)}, "holds .*linear.weight"),
        (seed.PROJECTOR, {"layer1.bias": torch.zeros(3)}, "layer1.bias is .3,. float32"),
        (seed.PROJECTOR, {"layer1.weight": torch.zeros(24, 5)}, "reads vectors of 5 numbers"),
        (seed.PROJECTOR, {"layer2.bias": torch.tensor(float("nan")).expand(1)}, "layer2.bias"),
    ],
)
def test_a_seed_file_with_anything_unexpected_is_refused(
    seed_folder, tmp_path, name, change, message
):
    content = torch.load(seed_folder / name, weights_only=True)
    torch.save(content | change, seed_folder / name)
    with pytest.raises(PhiSightError, match=message) as caught:
        import_seed(seed_folder, tmp_path / "run")
    assert name in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04" + b"\0" * 40, b"not a torch file", None])
def test_a_seed_file_that_is_none_is_named(seed_folder, tmp_path, content):
    (seed_folder / seed.LORA).unlink()
    if content is not None:
        (seed_folder / seed.LORA).write_bytes(content)
    with pytest.raises(PhiSightError, match=seed.LORA):
        import_seed(seed_folder, tmp_path / "run")
    torch.save([1, 2], seed_folder / seed.LORA)
    with pytest.raises(PhiSightError, match="no dictionary of names"):
        import_seed(seed_folder, tmp_path / "run")


def test_a_layer_that_a_seed_file_lacks_is_named(seed_folder, tmp_path):
    content = torch.load(seed_folder / seed.LORA, weights_only=True)
    short = {key: value for key, value in content.items() if not key.startswith(O_PROJ)}
    torch.save(short, seed_folder / seed.LORA)
    with pytest.raises(PhiSightError, match=f"missing {re.escape(O_PROJ)}.lora_A"):
        import_seed(seed_folder, tmp_path / "run")


def test_the_base_is_kept_where_base_cache_says(seed_folder, tmp_path):
    cache, out = tmp_path / "bases", tmp_path / "run"
    arguments = [f"--import-seed={seed_folder}", f"--out={out}", BASE, VISION]
    assert export.main([*arguments, f"--base-cache={cache}"]) == 0
    assert Assistant.load(out).config.base_cache == str(cache)
    assert [path for path in cache.rglob("*.safetensors")]
