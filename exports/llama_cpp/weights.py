"""Writing a GGUF one tensor at a time: nothing larger than one weight is in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy
import torch
from torch import Tensor
from tqdm import tqdm

from errors import PhiSightError
from exports.llama_cpp.language import EMBEDDINGS

MISSING = "--gguf: the package gguf is not installed; pip install gguf"
BLOCK = 32  # weights that share a scale in Q8_0 and Q4_0
VALUES = 1 << 22  # that are rounded at once
BAR_BYTES = 1 << 30
# What `--quantize` says -> how layers are stored, how embeddings and head are, and the name that
# `gguf.LlamaFileType` has for a file of it. Embeddings and head are the most sensitive to rounding.
QUANTISATIONS = {
    "f16": ("F16", "F16", "MOSTLY_F16"),
    "q8_0": ("Q8_0", "Q8_0", "MOSTLY_Q8_0"),
    "q4_0": ("Q4_0", "Q8_0", "MOSTLY_Q4_0"),
    # llama.cpp itself makes it, of the one in float16.
    "q4_k_m": ("F16", "F16", "MOSTLY_F16"),
}


def need_gguf() -> ModuleType:
    """The optional package. Raises `PhiSightError` where it is not installed."""
    try:
        import gguf
    except ImportError:
        raise PhiSightError(MISSING) from None
    return gguf


def kind_of(name: str, shape: tuple[int, ...], quantise: str) -> str:
    """How a tensor is stored: vectors whole, and in float16 what is no whole number of blocks."""
    if len(shape) == 1:
        return "F32"
    of_layers, of_embeddings, _ = QUANTISATIONS[quantise]
    kind = of_embeddings if name in EMBEDDINGS else of_layers
    return kind if shape[-1] % BLOCK == 0 else "F16"


def write(
    path: Path,
    architecture: str,
    describe: Callable[[Any], None],
    tensors: Mapping[str, tuple[tuple[int, ...], str]],
    values: Iterable[tuple[str, Tensor]],
) -> None:
    """Write a GGUF.

    Args:
        describe: writes all that is no tensor with the `gguf.GGUFWriter` that it is given.
        tensors: name -> shape and how it is stored, in the order of `values`.
        values: (name, float tensor of any device).

    Raises:
        PhiSightError: `gguf` is not installed, or a value does not fit.
        OSError: the disk refuses.
    """
    gguf = need_gguf()
    writer = gguf.GGUFWriter(path, architecture)
    describe(writer)
    sizes = []
    for name, (shape, kind) in tensors.items():
        dtype, stored = _stored(gguf, shape, kind)
        sizes.append(int(numpy.prod(stored)) * dtype.itemsize)
        writer.add_tensor_info(
            name, stored, dtype, sizes[-1], raw_dtype=gguf.GGMLQuantizationType[kind]
        )
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        quick = True if sum(sizes) < BAR_BYTES else None  # None: a bar on a terminal
        bar = tqdm(values, path.name, len(sizes), unit=" tensors", disable=quick)
        for (name, tensor), (wanted, (shape, kind)) in zip(bar, tensors.items(), strict=True):
            assert (name, tuple(tensor.shape)) == (wanted, shape), (name, tensor.shape, wanted)
            writer.write_tensor_data(_data(gguf, name, tensor, kind))
    finally:
        writer.close()


def _stored(
    gguf: ModuleType, shape: tuple[int, ...], kind: str
) -> tuple[numpy.dtype, tuple[int, ...]]:
    """The type and shape of the array that is written for a tensor."""
    if kind == "F32":
        return numpy.dtype(numpy.float32), shape
    if kind == "F16":
        return numpy.dtype(numpy.float16), shape
    quantised = gguf.GGMLQuantizationType[kind]
    return numpy.dtype(numpy.uint8), gguf.quant_shape_to_byte_shape(shape, quantised)


def _data(gguf: ModuleType, name: str, tensor: Tensor, kind: str) -> numpy.ndarray:
    """The bytes that are written for a tensor. Raises `PhiSightError` for what does not fit."""
    values = tensor.detach().to("cpu", torch.float32).numpy()
    if not numpy.isfinite(values).all():
        raise PhiSightError(
            f"--gguf: {name} has values that are not finite; use a checkpoint of before the run"
            " went wrong"
        )
    if kind == "F32":
        return values
    if kind == "F16":
        if numpy.abs(values).max(initial=0.0) > numpy.finfo(numpy.float16).max:
            raise PhiSightError(
                f"--gguf: {name} has values that float16 cannot hold; use --quantize q8_0"
            )
        return values.astype(numpy.float16)
    # Not `gguf.quants.quantize`, which goes by 16 rows at a time and takes minutes.
    rounding = getattr(gguf.quants, kind)
    rows = max(1, VALUES // values.shape[-1])
    pieces = [
        rounding.quantize_rows(values[start : start + rows])
        for start in range(0, len(values), rows)
    ]
    return numpy.concatenate(pieces)
