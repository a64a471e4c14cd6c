"""A folder that is written whole or not at all, and the files that a model folder is made of."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from huggingface_hub import save_torch_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from transformers import Phi3Config

from errors import PhiSightError
from files import make_folder, remove_empty, whole_folder
from model.base import BaseModel

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
    made: list[Path] = []
    try:
        made = make_folder(out.parent)
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
    finally:
        remove_empty(made)


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


def hub_config(base: BaseModel, dtype: torch.dtype) -> Phi3Config:
    """What transformers makes of the base's config.json; it names no code and says `dtype`."""
    config = Phi3Config.from_dict(dict(base.hub_config))
    config.dtype = dtype
    if hasattr(config, "auto_map"):  # it names Python files that are not part of the folder
        delattr(config, "auto_map")
    return config


def rounded_state(
    weights: Iterable[tuple[str, Tensor]], base: BaseModel, dtype: torch.dtype
) -> dict[str, Tensor]:
    """Weights of a language model by name, in `dtype` and on the CPU, as a file holds them: a head
    that is the embedding stands there once."""
    state = {name: rounded(name, tensor, dtype) for name, tensor in weights}
    if base.model.config.tie_word_embeddings:
        state.pop("lm_head.weight", None)
    return state


def write_phi3(
    folder: Path, config: Phi3Config, state: dict[str, Tensor], base_folder: Path
) -> None:
    """A `Phi3ForCausalLM` folder (safetensors, in shards where it is large), with the tokenizer of
    `base_folder`, byte for byte, and its defaults for generation."""
    config.architectures = ["Phi3ForCausalLM"]
    config.save_pretrained(folder)
    save_torch_state_dict(state, folder, metadata={"format": "pt"})
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
