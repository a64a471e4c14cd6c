"""Which tensors of a base's files a decoder is made of: matched by name and shape before one is
read."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from errors import PhiSightError
from model.decoder import DecoderConfig, LanguageModel
from model.families import Family

STORED_DTYPES = ("F32", "F16", "BF16")
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
COMPUTED = "rotary_emb.inv_freq"  # in old files of Llama: config.json says it, and it is not read
MOST_PROBLEMS = 6  # that a message names
ROWS_AT_ONCE = 4096  # of a head that is compared
FAR_MORE = 8  # times the numbers that files have: a config.json of this size is of another model


@dataclass(frozen=True)
class Stored:
    """A tensor in a file, which is a parameter of the decoder or some rows of one."""

    path: Path
    name: str
    twin: Path | None = None
    """of the embedding: where the head is stored too, though the two are one"""


Sources = dict[str, tuple[Stored, ...]]
"""the decoder's parameters by name -> what they are made of, laid below each other"""


def check_size(config: DecoderConfig, weight_files: list[Path]) -> None:
    """Raise `PhiSightError` for a decoder of far more numbers than are stored, before any part of
    it is made: what a config.json asks for may fit into no memory."""
    stored = sum(math.prod(shape) for _, _, shape, _ in read_headers(weight_files))
    if config.numbers > FAR_MORE * max(stored, 2**20):
        raise PhiSightError(
            f"base model {weight_files[0].parent}: config.json describes {config.numbers:,} numbers"
            f" and {stored:,} are stored; the weight files do not belong to this config.json,"
            " download both again"
        )


def match_tensors(model: LanguageModel, family: Family, weight_files: list[Path]) -> Sources:
    """Where everything stands that `model` (on the meta device) needs.

    Raises:
        PhiSightError: names tensors that are missing, unexpected, double, misshapen, or of a dtype
            that is no 16- or 32-bit float.
    """
    is_tied = model.config.tie_word_embeddings
    needed: dict[str, dict[str, int]] = {}  # parameter -> the names and rows of its parts
    expected: dict[str, tuple[int, ...]] = {}
    for name, tensor in model.state_dict().items():
        if name == HEAD and is_tied:
            continue  # it is the embedding
        needed[name] = family.stored(name, model.config) or {name: len(tensor)}
        expected |= {part: (rows, *tensor.shape[1:]) for part, rows in needed[name].items()}
    found: dict[str, Path] = {}
    problems = []
    allowed = expected | ({HEAD: expected[EMBEDDING]} if is_tied else {})
    for path, name, shape, dtype in read_headers(weight_files):
        if name.endswith(COMPUTED):
            continue
        if name not in allowed:
            problems.append(f"unexpected {name}")
        elif name in found:
            problems.append(f"{name} is in both {found[name].name} and {path.name}")
        elif shape != allowed[name]:
            problems.append(f"{name} has shape {shape}, not {allowed[name]}")
        elif dtype not in STORED_DTYPES:
            problems.append(f"{name} is {dtype}, not one of {', '.join(STORED_DTYPES)}")
        found[name] = path
    problems += [f"missing {name}" for name in expected if name not in found]
    if problems:
        if len(problems) > MOST_PROBLEMS:
            problems[MOST_PROBLEMS:] = [f"and {len(problems) - MOST_PROBLEMS} more"]
        raise PhiSightError(
            f"base model {weight_files[0].parent}: {', '.join(problems)}; "
            "the weight files do not belong to this config.json, download both again"
        )
    twins = {EMBEDDING: found[HEAD]} if is_tied and HEAD in found else {}
    return {
        name: tuple(Stored(found[part], part, twins.get(part)) for part in parts)
        for name, parts in needed.items()
    }


def check_twin(embedding: Tensor, path: Path) -> None:
    """Raise `PhiSightError` unless the head that is stored in `path` is the embedding: some models'
    files hold both."""
    try:
        with safe_open(path, framework="pt") as file:
            head = file.get_slice(HEAD)
            for first in range(0, len(embedding), ROWS_AT_ONCE):
                rows = slice(first, first + ROWS_AT_ONCE)
                if not torch.equal(head[rows].float(), embedding[rows].float()):
                    raise PhiSightError(
                        f"{path}: {HEAD} is not {EMBEDDING}, though config.json ties the two; set"
                        " tie_word_embeddings to false there if the model has a head of its own"
                    )
    except (SafetensorError, OSError) as error:
        raise PhiSightError(f"{path}: {error}; download the file again") from error


def read_headers(weight_files: list[Path]) -> Iterator[tuple[Path, str, tuple[int, ...], str]]:
    """(file, tensor name, shape, dtype) of every stored tensor; no tensor is read."""
    for path in weight_files:
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():
                    stored = file.get_slice(name)
                    yield path, name, tuple(stored.get_shape()), stored.get_dtype()
        except (SafetensorError, OSError) as error:
            raise PhiSightError(f"{path}: {error}; download the file again") from error


def files_of(sources: Sources) -> list[Path]:
    """The files that are read, sorted."""
    return sorted({place.path for places in sources.values() for place in places})
