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
from transformers import GenerationConfig, Phi3Config

import checkpoints
import files
from assistant.assistant import Assistant
from data.chat import END_OF_TEXT, IMAGE_TOKEN
from errors import PhiSightError
from model.base import BaseModel
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


def chat_template(picture: str, shown: str, line_end: str = "\\n") -> str:
    """A chat template in Jinja, which gives what `data.chat.render` does, from messages of roles
    and parts of "text" and pictures: text is stripped, and text next to text is joined by a
    newline. The newlines after the marks are swallowed by the tokenizer, as they are in Phi-3's own
    template.

    `picture`: the type of a part that is a picture; `shown`: the expression that stands for it;
    `line_end`: what follows a mark, empty for a tokenizer that swallows nothing.
    """
    return (
        "{% for message in messages %}{{ '<|' + message['role'] + '|>" + line_end + "' }}"
        "{% if message['content'] is string %}{{ message['content'] | trim }}{% else %}"
        "{% set last = namespace(text=false) %}"
        "{% for part in message['content'] %}{% if part['type'] == '" + picture + "' %}"
        "{{ " + shown + " }}{% set last.text = false %}"
        "{% elif part['text'] | trim %}"
        "{{ ('\\n' if last.text else '') + (part['text'] | trim) }}{% set last.text = true %}"
        "{% endif %}{% endfor %}{% endif %}{{ '<|end|>" + line_end + "' }}{% endfor %}"
        "{{ '<|assistant|>" + line_end + "' if add_generation_prompt else '" + END_OF_TEXT + "' }}"
    )


CHAT_TEMPLATE = chat_template("image", f"'{IMAGE_TOKEN}'")


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
    path.write_text(json.dumps(content, indent=2, allow_nan=False) + "\n", encoding="utf-8")


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
    )
    (folder / CARD).write_text(card, encoding="utf-8")


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
    folder: Path,
    config: Phi3Config,
    state: dict[str, Tensor],
    base_folder: Path,
    assistant: Assistant,
) -> None:
    """A `Phi3ForCausalLM` folder (safetensors, in shards where it is large), with the tokenizer of
    `base_folder`, byte for byte, and defaults by which it answers as `assistant` does."""
    config.architectures = ["Phi3ForCausalLM"]
    config.save_pretrained(folder)
    save_torch_state_dict(state, folder, metadata={"format": "pt"})
    copy_tokenizer(base_folder, folder)
    write_generation_config(assistant, folder)


def copy_tokenizer(base_folder: Path, folder: Path) -> None:
    """The base's tokenizer, and the chat template that gives the ids of the training; a base's own
    may keep white space that we strip, or know no pictures."""
    for name in TOKENIZER_FILES:
        if (base_folder / name).is_file():
            shutil.copyfile(base_folder / name, folder / name)

    (folder / TEMPLATE_FILE).write_text(CHAT_TEMPLATE, encoding="utf-8")


def write_generation_config(assistant: Assistant, folder: Path) -> None:
    """The defaults by which other programs generate: those of infer.py. A base's own may end an
    answer at other ids, never at the mark of a turn's end, or draw by chance."""
    end_of_text = assistant.parts.chat_format.end_of_text_id
    settings = GenerationConfig(
        do_sample=False,
        max_new_tokens=MAX_NEW_TOKENS,
        eos_token_id=sorted(assistant.stop_ids),
        pad_token_id=end_of_text,
        bos_token_id=assistant.parts.base.hub_config.get("bos_token_id"),
    )
    settings.save_pretrained(folder)
