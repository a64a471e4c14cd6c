"""The manifest of a checkpoint: a row per tensor, a row per file, and its own sha256 at the end.

Apart from `checkpoints.py`, so that what a folder must hold, to the byte, stands by itself: how
rows are made, how a manifest is written and read again, how a folder is checked against it.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from errors import PhiSightError, key_problems
from files import sync_tree
from tensors import as_float64, dtype_name, finite, sha256_of

MANIFEST = "MANIFEST.json"
FORMAT = 2
BYTE_LIMIT = 64 * 2**20  # no JSON file or safetensors header of ours comes near this

_TENSOR_ROW = {
    "file": str,
    "owner": str,
    "name": str,
    "shape": list,
    "dtype": str,
    "mean": (int, float, type(None)),
    "std": (int, float, type(None)),
    "sha256": str,
}
_FILE_ROW = {"file": str, "size": int}


# -- rows -----------------------------------------------------------------------------------------


def tensor_row(file: str, owner: str, name: str, tensor: Tensor) -> dict[str, Any]:
    """What the manifest says of a tensor; mean and std are None where that means nothing."""
    values = as_float64(tensor)
    some = values.numel() > 0
    return {
        "file": file,
        "owner": owner,
        "name": name,
        **_described(tensor),
        "mean": finite(values.mean().item()) if some else None,
        "std": finite(values.std(correction=0).item()) if some else None,
        "sha256": sha256_of(tensor),
    }


def _described(tensor: Tensor) -> dict[str, Any]:
    return {"shape": list(tensor.shape), "dtype": dtype_name(tensor)}


def file_row(folder: Path, name: str, data: bytes | None = None) -> dict[str, Any]:
    """What the manifest says of a file; of a safetensors file only the header is hashed, since the
    rows of the tensors cover the rest. `data`: its bytes, where they have been read already."""
    path = folder / name
    if data is not None:
        return {"file": name, "size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    row = {"file": name, "size": path.stat().st_size}
    if "/" not in name and path.suffix == ".safetensors":
        return row | {"header_sha256": hashlib.sha256(_header(path)).hexdigest()}
    with path.open("rb") as file:
        return row | {"sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def _header(path: Path) -> bytes:
    """The length and the JSON header of a safetensors file."""
    with path.open("rb") as file:
        prefix = file.read(8)
        length = int.from_bytes(prefix, "little")
        if len(prefix) < 8 or length > min(BYTE_LIMIT, path.stat().st_size - 8):
            raise PhiSightError("its safetensors header is cut short or absurdly long")
        return prefix + file.read(length)


def files_below(folder: Path) -> list[str]:
    """Every file below, as relative posix paths; a link counts as a file and is never followed."""
    return sorted(
        path.relative_to(folder).as_posix()
        for path in folder.rglob("*")
        if path.is_symlink() or not path.is_dir()
    )


# -- writing and reading --------------------------------------------------------------------------


def manifest_bytes(body: Mapping[str, Any]) -> bytes:
    """The one way to write a manifest: a line per row, then the sha256 of all that comes before."""
    lines = []
    for key, value in body.items():
        if key == "sha256":
            continue
        rows = isinstance(value, list)
        text = ",\n".join(map(json.dumps, value)) if rows else json.dumps(value)
        lines.append(f"{json.dumps(key)}: " + (f"[\n{text}\n]" if rows else text) + ",\n")
    text = "{\n" + "".join(lines)
    return f'{text}"sha256": "{hashlib.sha256(text.encode()).hexdigest()}"\n}}\n'.encode()


def read_manifest(folder: Path) -> dict[str, Any]:
    """A manifest that is ours and as it was written. Raises `PhiSightError` with the reason alone,
    and `OSError`."""
    path = folder / MANIFEST
    if path.exists() and not path.is_file():  # reading a pipe would wait for ever
        raise PhiSightError("not a file")
    if path.stat().st_size > BYTE_LIMIT:
        raise PhiSightError("absurdly large")
    data = path.read_bytes()
    manifest = parse_json(data)
    if (
        manifest.get("format") != FORMAT
        or type(manifest.get("step")) is not int
        or not _are_rows(manifest.get("tensors"), _TENSOR_ROW)
        or not _are_rows(manifest.get("files"), _FILE_ROW)
    ):
        raise PhiSightError(f"not a manifest of format {FORMAT}")
    if manifest_bytes(manifest) != data:
        raise PhiSightError("edited or damaged (its own sha256 does not match)")
    return manifest


def _are_rows(rows: Any, types: Mapping[str, Any]) -> bool:
    return isinstance(rows, list) and all(
        isinstance(row, dict)
        and all(isinstance(row.get(field), kind) for field, kind in types.items())
        for row in rows
    )


def read_tensors(
    path: Path, rows: Mapping[str, Mapping[str, Any]], problems: list[str]
) -> Iterator[tuple[str, Tensor]]:
    """Yield each tensor whose shape, dtype and bytes are those of its row, in the order of rows;
    what is wrong with the others is added to `problems`."""
    with safe_open(path, framework="pt") as file:
        present = set(file.keys())
        problems += key_problems(f"{path.name}: tensor ", set(rows), present)
        for name, row in rows.items():
            if name not in present:
                continue
            tensor = file.get_tensor(name).clone()  # not a view of a file that may change
            is_now = _described(tensor) | {"sha256": sha256_of(tensor)}
            if wrong := [key for key, value in is_now.items() if row[key] != value]:
                problems.append(f"{path.name}: tensor {name} has another {' and '.join(wrong)}")
            else:
                yield name, tensor


def write_folder(
    folder: Path,
    facts: Mapping[str, Any],
    documents: Mapping[str, bytes],
    tensors: Mapping[str, Mapping[str, Tensor]],
    owners: Mapping[str, str],
) -> None:
    """Write all files and, last, a manifest that covers what was in the folder before too; all is
    synced on return. Raises `OSError` and `SafetensorError`.

    Args:
        facts: what the manifest begins with, beside its format.
        documents: JSON file -> its bytes.
        tensors: stem of a safetensors file -> name -> CPU tensor.
        owners: stem -> owner, as the rows say it.
    """
    for name, data in documents.items():
        (folder / name).write_bytes(data)
    for stem, named in tensors.items():
        path = folder / f"{stem}.safetensors"
        save_file(dict(named), path)
        shutil.copymode(folder / next(iter(documents)), path)  # safetensors writes 0600
    body = {
        "format": FORMAT,
        **facts,
        "tensors": [
            tensor_row(f"{stem}.safetensors", owners[stem], name, tensor)
            for stem, named in tensors.items()
            for name, tensor in named.items()
        ],
        "files": [file_row(folder, name) for name in files_below(folder)],
    }
    (folder / MANIFEST).write_bytes(manifest_bytes(body))
    sync_tree(folder)


class DamagedFolder(PhiSightError):
    """A folder that cannot be used. `problems`: all that is wrong with it, at least one."""

    def __init__(self, folder: Path, problems: list[str]) -> None:
        more = f" and {len(problems) - 1} more" if len(problems) > 1 else ""
        super().__init__(
            f"{folder}: {problems[0]}{more}; use an earlier checkpoint, or copy this "
            "one again from where it is whole"
        )
        self.problems = problems


@dataclass(frozen=True)
class Contents:
    """What a folder holds, in which nothing was found wrong."""

    manifest: dict[str, Any]
    documents: dict[str, dict[str, Any]]
    """JSON file -> what is in it"""
    tensors: dict[str, dict[str, Tensor]]
    """stem of the safetensors file -> name -> CPU tensor"""


def read_folder(
    folder: Path,
    documents: Collection[str],
    stems: Collection[str],
    step: int | None,
    keep_tensors: bool,
) -> Contents:
    """Read a folder and check everything that its manifest says. Each file is read once.

    Args:
        documents: the JSON files that must be there.
        stems: those of the safetensors files that must be there; beside both, `tokenizer/` may be.
        step: the one that the manifest must have; None for any.
        keep_tensors: without it the tensors are checked one by one and let go.

    Raises:
        DamagedFolder: with every problem, each naming its file or tensor.
    """
    name = MANIFEST
    problems: list[str] = []
    read: dict[str, dict[str, Any]] = {}
    tensors: dict[str, dict[str, Tensor]] = {stem: {} for stem in stems}
    try:
        manifest = read_manifest(folder)
        if step is not None and step != manifest["step"]:
            raise PhiSightError(f"it is of step {manifest['step']}, the folder's name says {step}")
        rows = {row["file"]: row for row in manifest["files"]}
        required = {*documents, *(f"{stem}.safetensors" for stem in stems)}
        present = set(files_below(folder))
        tokenizer = {file for file in rows if file.startswith("tokenizer/")}
        problems += key_problems(f"{MANIFEST}: row for ", required, set(rows) - tokenizer)
        problems += key_problems("", required | tokenizer | {MANIFEST}, present)
        for name in sorted(set(rows) & present):
            path = folder / name
            if path.is_symlink() or path.stat().st_size != rows[name]["size"]:
                problems.append(f"{name}: a link, or not of the size that was written")
                continue
            data = path.read_bytes() if name in documents else None
            if file_row(folder, name, data) != rows[name]:
                problems.append(f"{name}: damaged or edited (another sha256)")
            elif data is not None:
                read[name] = parse_json(data)
            elif name in required:
                own = {row["name"]: row for row in manifest["tensors"] if row["file"] == name}
                for tensor_name, tensor in read_tensors(path, own, problems):
                    if keep_tensors:
                        tensors[path.stem][tensor_name] = tensor
    except FileNotFoundError:
        problems.append(f"{name}: missing")
    except (OSError, SafetensorError, PhiSightError) as error:
        problems.append(f"{name}: {error}")
    if problems:
        raise DamagedFolder(folder, problems)
    return Contents(manifest, read, tensors)


# -- JSON -----------------------------------------------------------------------------------------


def parse_json(data: bytes) -> dict[str, Any]:
    """A JSON object. Raises `PhiSightError` with the reason alone."""
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:  # ValueError: bad JSON, and bad UTF-8
        raise PhiSightError(f"not readable as JSON ({error})") from error
    if not isinstance(value, dict):
        raise PhiSightError("not a JSON object")
    return value


def json_bytes(name: str, value: dict[str, Any]) -> bytes:
    """JSON that reads back as it was; infinities and NaN pass, as Python's own reader takes them.

    Raises PhiSightError for what would come back as something else (keys that are not strings).
    """
    _check_keys(name, value, "")
    try:
        return (json.dumps(value, indent=2) + "\n").encode()
    except (TypeError, ValueError) as error:
        raise PhiSightError(
            f"{name}: {error}; give it plain numbers, strings, lists and dictionaries"
        ) from error


def _check_keys(name: str, node: Any, path: str) -> None:
    if isinstance(node, dict):
        for key, inner in node.items():
            if not isinstance(key, str):
                raise PhiSightError(
                    f"{name}: the key {key!r} in {path or 'it'} is not a "
                    "string; JSON would change it, use a string"
                )
            _check_keys(name, inner, f"{path}.{key}".lstrip("."))
    elif isinstance(node, (list, tuple)):
        for inner in node:
            _check_keys(name, inner, path)
