"""A folder that is written whole or not at all, and the files that a model folder is made of."""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import save_torch_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from transformers import CONFIG_MAPPING, GenerationConfig, PretrainedConfig

import checkpoints
import files
from assistant.assistant import Assistant
from data.chat import ChatFormat
from data.chat_forms.template import chat_template, quoted
from errors import PhiSightError
from model.base import BaseModel
from model.decoder import DecoderConfig
from reports.card import CARD, model_card

# Copied, not saved anew: transformers may rewrite a tokenizer as another class with other ids.
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
)
GENERATION_CONFIG, TEMPLATE_FILE = "generation_config.json", "chat_template.jinja"
MAX_NEW_TOKENS = 256  # as infer.py, where nothing else is said


def template_of(chat_format: ChatFormat) -> str:
    """The chat template by which other programs give the ids of the training."""
    return chat_template(chat_format.form, "image", quoted(chat_format.image_token))


@contextlib.contextmanager
def new_folder(out: str | Path) -> Iterator[Path]:
    """`files.new_folder`, in which weights may be read by whoever may read what is beside them."""
    with files.new_folder(out) as temporary:
        try:
            yield temporary
        except SafetensorError as error:  # as what it is told of in: a full disk, mostly
            raise OSError(str(error)) from error
        for path in temporary.rglob("*.safetensors"):  # they are written as 0600
            beside = next(path.parent.glob("*.json"), None)
            if beside:
                shutil.copymode(beside, path)


def write_json(path: Path, content: dict) -> None:
    path.write_text(
        json.dumps(content, indent=2, allow_nan=False) + "\n", encoding="utf-8", newline="\n"
    )


def files_of(folder: Path) -> dict[str, str]:
    """sha256 of every file in a folder, by its path there."""
    hashes = {}
    for path in sorted(found for found in folder.rglob("*") if found.is_file()):
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256")
        hashes[path.relative_to(folder).as_posix()] = digest.hexdigest()
    return hashes


def write_card(
    folder: Path, assistant: Assistant, form: str, certificates: Sequence[Mapping[str, Any]] = ()
) -> None:
    """The model card of what is exported of a run, as the folder's README.md; see `reports.card`.

    Raises `PhiSightError` where the run's log and its checkpoint contradict each other.
    """
    checkpoint = checkpoints.resolve(assistant.source)
    card = model_card(
        checkpoint,
        checkpoints.records_of(checkpoint),
        certificates,
        form=form,
        license=assistant.license,
        model_type=assistant.parts.base.family.model_type,
    )
    (folder / CARD).write_text(card, encoding="utf-8", newline="\n")


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


def hub_config(base: BaseModel, dtype: torch.dtype) -> PretrainedConfig:
    """What transformers makes of the base's config.json; it names no code, and says `dtype` and
    the class of the base's family.

    Raises `PhiSightError` where transformers takes less than our loader, which reads few keys.
    """
    content = dict(base.hub_config)
    for place in ("rope_scaling", "rope_parameters"):
        rope = content.get(place)
        for key in ("rope_type", "type"):  # transformers knows today's names of kinds alone
            if isinstance(rope, dict) and isinstance(kind := rope.get(key), str):
                content[place] = rope = rope | {key: base.family.rope_kinds.get(kind, kind)}
    try:
        config = CONFIG_MAPPING[base.family.model_type].from_dict(content)
    except Exception as error:  # its checks raise whatever they like
        reason = " ".join(str(error).split())[:200]
        raise PhiSightError(
            f"{base.name}: transformers does not take its config.json ({reason}); mend that"
            " key before the next training; this run can be exported by --peft"
        ) from error
    config.dtype = dtype
    config.architectures = [base.family.architecture]
    if hasattr(config, "auto_map"):  # it names Python files that are not part of the folder
        delattr(config, "auto_map")
    return config


def rounded_state(
    weights: Iterable[tuple[str, Tensor]],
    base: BaseModel,
    dtype: torch.dtype,
    config: DecoderConfig | None = None,
) -> dict[str, Tensor]:
    """Weights of a language model by name, in `dtype` and on the CPU, as a file of the base's
    family holds them: a head that is the embedding stands there once.

    Args: `config`: the sizes, where they are no longer those of the base.

    Raises `PhiSightError` as `rounded` does.
    """
    tied = base.model.config.tie_word_embeddings
    small = (
        (name, rounded(name, tensor, dtype))
        for name, tensor in weights
        if not (tied and name == "lm_head.weight")
    )
    # Parts of a weight are cut from it, and a file has each in memory of its own.
    stored = base.family.to_stored(small, config or base.model.config)
    return {name: tensor.clone() for name, tensor in stored}


def write_causal_model(
    folder: Path,
    config: PretrainedConfig,
    state: dict[str, Tensor],
    base_folder: Path,
    assistant: Assistant,
) -> None:
    """A language model as transformers' class of the family reads it, such as `Phi3ForCausalLM`
    (safetensors, in shards where it is large), with the tokenizer of `base_folder`, byte for byte,
    and defaults by which it answers as `assistant` does."""
    config.save_pretrained(folder)
    save_torch_state_dict(state, folder, metadata={"format": "pt"})
    copy_tokenizer(base_folder, folder, assistant.parts.chat_format)
    write_generation_config(assistant, folder)


def copy_tokenizer(base_folder: Path, folder: Path, chat_format: ChatFormat) -> None:
    """The base's tokenizer, and the chat template that gives the ids of the training; a base's own
    may keep white space that we strip, or know no pictures."""
    for name in TOKENIZER_FILES:
        if (base_folder / name).is_file():
            shutil.copyfile(base_folder / name, folder / name)

    template = template_of(chat_format)
    (folder / TEMPLATE_FILE).write_text(template, encoding="utf-8", newline="\n")


def write_generation_config(assistant: Assistant, folder: Path) -> None:
    """The defaults by which other programs generate: those of infer.py. A base's own may end an
    answer at other ids, never at the mark of a turn's end, or draw by chance."""
    settings = GenerationConfig(
        do_sample=False,
        max_new_tokens=MAX_NEW_TOKENS,
        eos_token_id=sorted(assistant.stop_ids),
        suppress_tokens=[assistant.parts.chat_format.image_id],  # no answer shows a picture
        pad_token_id=assistant.parts.chat_format.padding_id,
        bos_token_id=assistant.parts.base.hub_config.get("bos_token_id"),
    )
    settings.save_pretrained(folder)
