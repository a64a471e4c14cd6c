"""Members that do not fit together are refused in one line: what was found, and what would do."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

import export
import infer
import train
from benchmarks.cells import Cell, Grid
from errors import PhiSightError
from tools.small.encoders import PATCH, write_encoder

CELL = Cell("qwen3", "siglip", "mlp")
OTHERS = (Cell("qwen2.5", "dinov2", "mlp"), Cell("llama-3.2", "clip", "mlp"))


@pytest.fixture(scope="module")
def grid(tmp_path_factory) -> Grid:
    made = Grid(tmp_path_factory.mktemp("grid"))
    made.prepare([CELL, *OTHERS])
    return made


@pytest.fixture(scope="module")
def run(grid) -> Path:
    """A run that stopped after its first step. Tests only read it."""
    folder = grid.out / "run"
    assert train.main([*grid.flags(CELL), f"--run={folder}", "--stop-at-step=1"]) == 0
    return folder


@pytest.fixture(scope="module")
def five(grid) -> Path:
    """The encoder with 5 x 5 patches in place of 4 x 4."""
    return write_encoder("siglip", grid.out / "five", image_size=5 * PATCH)


def refusal(main: Callable[[list[str]], int], arguments: list[str]) -> str:
    """The one line that a command ends with; `errors.run_main` prints it and exits with 2."""
    with pytest.raises(PhiSightError) as error:
        main(arguments)
    assert "\n" not in str(error.value)
    return str(error.value)


def begun(grid: Grid, tmp_path: Path, **fields: object) -> str:
    """How `train.py` refuses a new run with some fields of the cell's replaced."""
    more = [f"--{name.replace('_', '-')}={value}" for name, value in fields.items()]
    return refusal(train.main, [*grid.flags(CELL), f"--run={tmp_path / 'new'}", *more])


def copied(folder: Path, tmp_path: Path, model_type: str) -> Path:
    """The folder with another model_type in its config.json."""
    target = Path(shutil.copytree(folder, tmp_path / folder.name))
    config = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps(config | {"model_type": model_type}))
    return target


def renamed(folder: Path, tmp_path: Path, *tokens: str) -> Path:
    """The base with other names for some tokens of its tokenizer."""
    target = Path(shutil.copytree(folder, tmp_path / folder.name))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        text = (target / name).read_text()
        for token in tokens:
            text = text.replace(token, token.replace("<|", "<|other_"))
        (target / name).write_text(text)
    return target


def question(grid: Grid, run: Path, *more: str) -> list[str]:
    picture = next((grid.out / "world/images").glob("held_out_*"))
    return [f"--run={run}", f"--image={picture}", "--prompt=What is it?", "--device=cpu", *more]


def test_a_base_of_no_family(grid, tmp_path):
    base = copied(grid.out / "bases/qwen3", tmp_path, "gemma3")
    assert begun(grid, tmp_path, base=base) == (
        f"{base}/config.json: model_type is 'gemma3', which no family of bases has; give a model of"
        " 'phi3' (Phi-3), 'llama' (Llama), 'qwen2' (Qwen2.5), 'qwen3' (Qwen3)"
    )


def test_an_encoder_of_no_kind(grid, tmp_path):
    vision = copied(grid.out / "encoders/siglip", tmp_path, "vit")
    assert begun(grid, tmp_path, vision=vision) == (
        f"{vision}: not the folder of an encoder (its model_type is 'vit', none of clip,"
        " clip_vision_model, siglip, siglip_vision_model, siglip2, siglip2_vision_model, dinov2,"
        " dinov2_with_registers); it needs config.json, preprocessor_config.json and"
        " model.safetensors (or pytorch_model.bin)"
    )


@pytest.mark.parametrize(
    ("tokens", "told"),
    [
        (
            ("<|image_pad|>", "<|vision_pad|>", "<|video_pad|>"),
            "has none of <|image_pad|> <|vision_pad|> <|video_pad|> to hold the place of a picture;"
            " use the tokenizer of Qwen3",
        ),
        (
            ("<|im_start|>", "<|im_end|>"),
            "has no <|im_start|> <|im_end|> of the chat of Qwen3; use the tokenizer of Qwen3,"
            " Phi-3 and Phi-3.5 mini, Phi-4-mini, Llama 3.1 and 3.2, Qwen2.5, SmolLM2",
        ),
    ],
    ids=["no picture slot", "an unknown chat"],
)
def test_a_tokenizer(tokens, told, grid, tmp_path):
    base = renamed(grid.out / "bases/qwen3", tmp_path, *tokens)
    assert begun(grid, tmp_path, base=base) == f"tokenizer {base}: {told}"


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        (
            {"projector": "pixel-shuffle", "vision": "five"},
            "--projector pixel-shuffle: lays 2 x 2 patches into one token, and the features of a"
            " picture are 5 x 5 patches; use --projector mlp, or an encoder, --vision-features and"
            " --feature-pooling that give an even number of patches a side",
        ),
        (
            {"projector": "resampler", "vision_features": "pooled"},
            "--projector resampler: its queries look at a square grid of patches, and the features"
            " of a picture are one vector; use --projector mlp, or an encoder and --vision-features"
            " that give patches",
        ),
        (
            {"projector": "perceiver"},
            "config: --projector must be one of mlp, linear, pixel-shuffle, resampler, not"
            " 'perceiver'",
        ),
    ],
    ids=["an odd grid", "one vector", "an unknown one"],
)
def test_a_projector(fields, told, grid, five, tmp_path):
    places = {"vision": five} if "vision" in fields else {}
    assert begun(grid, tmp_path, **fields | places) == told


def test_an_encoder_with_other_patches_than_the_run_s(grid, run, five):
    own = grid.out / "encoders/siglip"
    assert refusal(infer.main, question(grid, run, f"--vision={five}")) == (
        f"{run}/checkpoint-000001: was trained on another picture encoder ({own}) than {five}"
        " (SigLIP: 25 tokens of 32 numbers a picture); name the right one with --vision"
    )
    line = refusal(train.main, ["--resume", f"--run={run}", f"--vision={five}"])
    assert line.startswith(
        f'--resume: would not be exact, these differ: config.vision: "{own}" in the checkpoint,'
        f' "{five}" now; vision_fingerprint: '
    )
    assert line.endswith("; restore them, or go on all the same with --allow-changes")


def test_a_base_of_another_family_than_the_run_s(grid, run):
    own, other = grid.out / "bases/qwen3", grid.out / "bases/qwen2.5"
    assert refusal(infer.main, question(grid, run, f"--base={other}")) == (
        f"{run}/checkpoint-000001: was trained on another base ({own}) than {other}; name the right"
        " one with --base"
    )


@pytest.fixture(scope="module")
def adapter(grid, run) -> Path:
    """The run's adapter as PEFT reads it."""
    folder = grid.out / "adapter"
    export.main(["--peft", str(folder), f"--run={run}", "--device=cpu"])
    return folder


@pytest.mark.parametrize("other", [cell.base for cell in OTHERS])
def test_an_adapter_of_another_family(other, grid, adapter, tmp_path):
    members = [f"--base={grid.out / 'bases' / other}", f"--vision={grid.out / 'encoders/siglip'}"]
    out = tmp_path / "imported"
    line = refusal(export.main, ["--import-peft", str(adapter), f"--out={out}", *members])
    assert line.startswith(f"{adapter}: base_model.model.model.layers.0.self_attn.")
    assert not out.exists()
