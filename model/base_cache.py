"""The quantised base, kept on the disk: the next start reads it and does not quantise again.

    DIR/KEY/part-00001.safetensors   packed weights with their scales, and what is not quantised
    DIR/KEY/MANIFEST.json            shape, dtype and sha256 of every tensor, and its own sha256

KEY stands for the fingerprint of the base, the quantisation, the kind of processor that computed
it, and the versions of bitsandbytes and of this form. The compute dtype does not count: weights
are quantised as they are stored, and what is not quantised is kept as it is stored. What is read
equals what quantising afresh gives, tensor by tensor and bit by bit; every tensor is compared with
its sha256 on reading.

An entry is written to a temporary folder, synced and renamed, so that it is whole or absent. One
that was damaged is named and made anew. A cache that cannot be written is a warning: it is never
needed. Entries of other bases and versions stay until they are removed by hand.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import json
import math
import shutil
import sys
from collections import deque
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

import bitsandbytes as bnb
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from documents import COUNT, TEXT, Kind, read_json, require
from errors import PhiSightError
from files import byte_bar, put_in_place, sweep_stale, sync_tree, writer
from ops.kernels import CHUNK, PANEL, PanelWeight
from ops.nf4 import PanelLinear
from stored import NotStored, StoredTensors, opened
from tensors import dtype_name, sha256_of

FORMAT = 2
MANIFEST = "MANIFEST.json"
SCALES = "panel_scales"  # beside codes in the order of the kernels; see `ops.kernels.layout`
PART_BYTES = 256 * 10**6  # a part is held in memory once more while it is written
READERS = 2  # threads that read and hash: more gain nothing where a disk is read
RESERVE = 10**9  # bytes of the disk that are left free
_FILE = Kind("the name of a file", lambda value: isinstance(value, str) and "/" not in value)
_TENSOR = Kind("[shape, dtype, sha256]", lambda value: _is_description(value))
_ROWS = [{"name": TEXT, "file": _FILE, "tensors": {"*": _TENSOR}}]


class _Damaged(Exception):
    """Why an entry cannot be used."""


def key_of(fingerprint: str, quantization: str, device: torch.device, panels: bool) -> str:
    """The name of the entry of a base; panels: whether its codes are in the kernels' order."""
    facts: list[object] = [
        FORMAT,
        fingerprint,
        quantization,
        device.type,
        panels,
        importlib.metadata.version("bitsandbytes"),
    ]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:32]


def dtype_to_keep(
    name: str, stored: torch.dtype, compute_dtype: torch.dtype, device: torch.device
) -> torch.dtype:
    """The dtype in which the model holds a parameter that is not quantised. The embedding and the
    head are large, and float32 states need them in no wider form than they are stored in."""
    exact = stored in (torch.bfloat16, torch.float16) and compute_dtype == torch.float32
    if exact and device.type == "cpu" and name in ("model.embed_tokens.weight", "lm_head.weight"):
        return stored
    return compute_dtype


def warn(text: str) -> None:
    print(f"warning: {text}", file=sys.stderr)


def _describe(tensor: Tensor) -> list:
    """What must be equal when the tensor is read again."""
    return [list(tensor.shape), dtype_name(tensor), sha256_of(tensor)]


def _is_description(value: object) -> bool:
    """Whether it has the form of what `_describe` gives."""
    if not isinstance(value, list) or len(value) != 3 or not isinstance(value[1], str):
        return False
    shape, dtype, digest = value
    sizes = isinstance(shape, list) and all(COUNT.holds(size) for size in shape)
    return sizes and isinstance(getattr(torch, dtype, None), torch.dtype) and TEXT.holds(digest)


def _seal(rows: list) -> str:
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()


# -- writing --------------------------------------------------------------------------------------


@dataclass
class Writer:
    """Takes what `model.base.fill` puts into a model, parameter by parameter, and keeps it.

    Nothing raises: after the first failure, of which it warns, it takes no more.
    """

    folder: Path
    """of the entry, to be"""
    expected_bytes: int
    """about as much as will come"""
    failed: bool = False
    _rows: list[dict] = field(default_factory=list)
    _part: dict[str, dict[str, Tensor]] = field(default_factory=dict)  # of each parameter
    _parts: int = 0

    def __post_init__(self) -> None:
        self._temporary = self.folder.with_name(f".tmp-{self.folder.name}-{writer()}")
        try:
            self.folder.parent.mkdir(parents=True, exist_ok=True)
            free = shutil.disk_usage(self.folder.parent).free
            if self.expected_bytes + RESERVE > free:
                raise OSError(
                    f"it takes {self.expected_bytes / 1e9:.1f} GB of"
                    f" {free / 1e9:.1f} GB that are free"
                )
            shutil.rmtree(self._temporary, ignore_errors=True)
            self._temporary.mkdir()
        except OSError as error:
            self._give_up(error)

    def add(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """A parameter by its tensors as they are to be kept, by what follows its name."""
        if self.failed:
            return
        # Copies: neither a view into a file that is read, nor memory that others share.
        self._part[name] = {
            f"{name}.{key}" if key else name: torch.empty_like(value, device="cpu").copy_(value)
            for key, value in tensors.items()
        }
        if sum(t.nbytes for group in self._part.values() for t in group.values()) >= PART_BYTES:
            self._write_part()

    def _write_part(self) -> None:
        self._parts += 1
        path = self._temporary / f"part-{self._parts:05d}.safetensors"
        try:
            save_file(
                {key: tensor for group in self._part.values() for key, tensor in group.items()},
                path,
            )
        except (OSError, SafetensorError) as error:  # safetensors wraps a full disk in its own
            self._give_up(error)
            return
        self._rows += [
            {
                "name": name,
                "file": path.name,
                "tensors": {key: _describe(tensor) for key, tensor in group.items()},
            }
            for name, group in self._part.items()
        ]
        self._part = {}

    def close(self) -> None:
        """Give the entry its name, if all that was added has been written."""
        if self._part and not self.failed:
            self._write_part()
        if self.failed:
            return
        try:
            content = {"format": FORMAT, "parameters": self._rows, "sha256": _seal(self._rows)}
            manifest = self._temporary / MANIFEST
            manifest.write_text(
                json.dumps(content, indent=0) + "\n", encoding="utf-8", newline="\n"
            )
            sync_tree(self._temporary)
            if not self.folder.exists():  # another process may have been quicker
                put_in_place(self._temporary, self.folder)
        except OSError as error:
            if not self.folder.is_dir():
                self._give_up(error)
        finally:
            self.discard()

    def discard(self) -> None:
        """Leave nothing half written; of no effect after `close`."""
        shutil.rmtree(self._temporary, ignore_errors=True)

    def _give_up(self, error: Exception) -> None:
        self.failed, self._part = True, {}
        self.discard()
        warn(
            f"--base-cache {self.folder.parent}: the quantised base is not kept"
            f" ({getattr(error, 'strerror', None) or error}); make room, or give another folder"
        )


# -- reading --------------------------------------------------------------------------------------


def read_into(
    model: nn.Module,
    folder: Path,
    expected: set[str],
    compute_dtype: torch.dtype,
    device: torch.device,
) -> bool:
    """Fill `model`, whose linear layers are empty 4-bit ones, from the entry `folder`.

    `expected` are the names of the parameters that the base's own files hold. False if there is no
    entry, and, after a warning and its removal, if it was damaged.
    """
    sweep_stale(folder.parent, ".tmp-*")
    if not folder.is_dir():
        return False
    try:
        rows = _read_manifest(folder, expected)
        with byte_bar(_size(rows), "loading the quantised base") as bar:
            for name, tensors in _read_parameters(folder, rows):
                bar.update(sum(tensor.nbytes for tensor in tensors.values()))
                _put(model, name, tensors, compute_dtype, device)
    except _Damaged as error:
        warn(f"{folder}: the quantised base that was kept is damaged ({error}); making it anew")
        shutil.rmtree(folder, ignore_errors=True)
        return False
    return True


def _read_manifest(folder: Path, expected: set[str]) -> list[dict]:
    """The rows of a manifest that is ours, whole, and about these parameters."""
    try:
        content = read_json(folder / MANIFEST)
        if content.get("format") != FORMAT:
            raise _Damaged(f"{MANIFEST} is of another form")
        require(content, {"parameters": _ROWS, "sha256": TEXT})
    except (OSError, PhiSightError) as error:
        raise _Damaged(f"{MANIFEST}: {error}") from None
    rows = content["parameters"]
    if content["sha256"] != _seal(rows):
        raise _Damaged(f"{MANIFEST} does not have its sha256")
    if {row["name"] for row in rows} != expected:
        raise _Damaged(f"{MANIFEST} names other parameters than the base has")
    return rows


def _size(rows: list[dict]) -> int:
    return sum(
        math.prod(shape) * getattr(torch, dtype).itemsize
        for row in rows
        for shape, dtype, _ in row["tensors"].values()
    )


def _read_parameters(folder: Path, rows: list[dict]) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """(name, its tensors by what follows the name) for every row, each compared with its sha256;
    the next ones are read meanwhile. Raises `_Damaged`."""
    with contextlib.ExitStack() as open_files, ThreadPoolExecutor(READERS) as threads:
        files: dict[str, StoredTensors] = {}
        for part in dict.fromkeys(row["file"] for row in rows):
            try:
                files[part] = open_files.enter_context(opened(folder / part))
            except (OSError, NotStored) as error:
                raise _Damaged(f"{part}: {error}") from None
        reading: deque[tuple[str, Future[dict[str, Tensor]]]] = deque()
        try:
            for row in rows:
                reading.append((row["name"], threads.submit(_read, files[row["file"]], row)))
                if len(reading) > READERS:
                    name, tensors = reading.popleft()
                    yield name, tensors.result()
            while reading:
                name, tensors = reading.popleft()
                yield name, tensors.result()
        finally:  # also where one of them is damaged
            for _, tensors in reading:
                tensors.cancel()


def _read(file: StoredTensors, row: dict) -> dict[str, Tensor]:
    tensors = {}
    for key, described in row["tensors"].items():
        try:
            tensor = file.read(key)
        except (OSError, NotStored) as error:
            raise _Damaged(f"{row['file']}: {error}") from None
        if _describe(tensor) != described:
            raise _Damaged(f"{row['file']}: {key} does not have its sha256")
        tensors[key.removeprefix(row["name"]).removeprefix(".")] = tensor
    return tensors


def _put(
    model: nn.Module,
    name: str,
    tensors: dict[str, Tensor],
    compute_dtype: torch.dtype,
    device: torch.device,
) -> None:
    module_name, _, parameter_name = name.rpartition(".")
    module = model.get_submodule(module_name)
    if not (isinstance(module, bnb.nn.Linear4bit) and parameter_name == "weight"):
        kept = dtype_to_keep(name, tensors[""].dtype, compute_dtype, device)
        parameter = nn.Parameter(tensors[""].to(device=device, dtype=kept), requires_grad=False)
        if parameter.shape != getattr(module, parameter_name).shape:
            raise _Damaged(f"{name} has shape {tuple(parameter.shape)}")
        setattr(module, parameter_name, parameter)
        return
    empty = cast(bnb.nn.Params4bit, module.weight)
    if SCALES in tensors:
        _put_panels(model, module_name, module, PanelWeight(
            tensors[""], tensors[SCALES], module.out_features, empty.blocksize
        ))  # fmt: skip
        return
    count = module.out_features * module.in_features
    try:
        parameter = bnb.nn.Params4bit.from_prequantized(
            tensors.pop(""), tensors, device=device, module=module
        )
        state = parameter.quant_state
        fits = (
            (parameter.numel(), parameter.dtype) == (count // 2, torch.uint8)
            and tuple(state.shape) == (module.out_features, module.in_features)
            and (state.blocksize, state.nested) == (empty.blocksize, empty.compress_statistics)
            and state.absmax.numel() * state.blocksize == count
            and state.quant_type == "nf4"
        )
    except (LookupError, ValueError, TypeError, AttributeError, AssertionError, RuntimeError):
        fits = False
    if not fits:
        raise _Damaged(f"{name} is not this layer's")
    state.dtype = compute_dtype  # see `model.base.quantize`
    module.weight = parameter


def _put_panels(model: nn.Module, name: str, empty: bnb.nn.Linear4bit, panels: PanelWeight) -> None:
    """Put a layer in the place of an empty one."""
    inputs, outputs = empty.in_features, -(-empty.out_features // PANEL)
    codes = (outputs, inputs // CHUNK, PANEL, CHUNK // 2)
    scales = (outputs, inputs // panels.block, PANEL)
    found = (tuple(panels.codes.shape), tuple(panels.scales.shape))
    if found != (codes, scales) or (panels.codes.dtype, panels.scales.dtype) != (
        torch.uint8,
        torch.float32,
    ):
        raise _Damaged(f"{name} is not this layer's")
    model.set_submodule(name, PanelLinear.made_of(panels, empty))
