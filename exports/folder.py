"""A folder that is written whole or not at all, and the files that a model folder is made of."""

from __future__ import annotations

import contextlib
import copy
import json
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from transformers import Phi3Config, Phi3ForCausalLM

from errors import PhiSightError
from files import whole_folder

# Copied, not saved anew: transformers may rewrite a tokenizer as another class with other ids.
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
)
GENERATION_CONFIG = "generation_config.json"


@contextlib.contextmanager
def new_folder(out: str | Path) -> Iterator[Path]:
    """A temporary sibling of `out` to write into, which gets its name when the block ends well.

    After an error, an interruption or a refusal nothing is left. Raises `PhiSightError` if `out` is
    there already or cannot be written.
    """
    out = Path(out).absolute()
    if out.exists() or out.is_symlink():
        raise PhiSightError(f"{out}: is there already; remove it or give another folder")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with whole_folder(out) as temporary:
            yield temporary
            for path in temporary.rglob("*.safetensors"):  # they are written as 0600
                beside = next(path.parent.glob("*.json"), None)
                if beside:
                    shutil.copymode(beside, path)
    except OSError as error:
        raise PhiSightError(
            f"{out}: not written ({error.strerror or error}); make room or give another folder"
        ) from error


def write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=2, allow_nan=False) + "\n", encoding="utf-8")


def read_tensors(path: Path, remedy: str) -> dict[str, Tensor]:
    """Every tensor of a safetensors file. Raises `PhiSightError` ending in `remedy`."""
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise PhiSightError(f"{path}: not readable ({error}); {remedy}") from None


def rounded(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """`tensor` on the CPU in `dtype`. Raises `PhiSightError` if a value does not fit into it."""
    small = tensor.to(device="cpu", dtype=dtype)
    if not small.isfinite().all():
        raise PhiSightError(
            f"{name}: holds values that {str(dtype).removeprefix('torch.')} cannot hold, or that"
            " are not finite; use --dtype bfloat16, or a checkpoint of before the run went wrong"
        )
    return small.contiguous()


def phi3_of(
    config: Phi3Config, state: Iterable[tuple[str, Tensor]], dtype: torch.dtype
) -> Phi3ForCausalLM:
    """A plain model with exactly these weights, rounded to `dtype`, on the CPU.

    Its rotary tables are not filled: it is there to be saved, not to be run.
    """
    config = plain_config(config, dtype)
    with torch.device("meta"):
        model = Phi3ForCausalLM(config)
    tensors = {name: rounded(name, tensor, dtype) for name, tensor in state}
    model.load_state_dict(tensors, strict=True, assign=True)
    model.tie_weights()
    return model


def plain_config(config: Phi3Config, dtype: torch.dtype) -> Phi3Config:
    """A copy that names no code of its own and says `dtype`."""
    config = copy.deepcopy(config)
    config.dtype = dtype
    if hasattr(config, "auto_map"):  # it names Python files that are not part of the folder
        delattr(config, "auto_map")
    return config


def write_phi3(folder: Path, model: Phi3ForCausalLM, base_folder: Path) -> None:
    """`model` as a `Phi3ForCausalLM` folder (safetensors, in shards where it is large), with the
    tokenizer of `base_folder`, byte for byte, and its defaults for generation."""
    model.save_pretrained(folder)
    copy_tokenizer(base_folder, folder)
    copy_generation_config(base_folder, folder)


def copy_tokenizer(base_folder: Path, folder: Path) -> None:
    for name in TOKENIZER_FILES:
        if (base_folder / name).is_file():
            shutil.copyfile(base_folder / name, folder / name)


def copy_generation_config(base_folder: Path, folder: Path) -> None:
    """It says which ids end an answer; transformers would write one without them."""
    if (base_folder / GENERATION_CONFIG).is_file():
        shutil.copyfile(base_folder / GENERATION_CONFIG, folder / GENERATION_CONFIG)
