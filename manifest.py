"""The manifest of a checkpoint: a row per tensor, a row per file, and its own sha256 at the end.

Apart from `checkpoints.py`, so that what a folder must hold, to the byte, stands by itself: how
rows are made, how a manifest is written and read again, how a folder is checked against it.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import stat
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from config import shown
from documents import (
    BYTE_LIMIT,
    COUNT,
    COUNT_OR_NULL,
    NUMBER_OR_NULL,
    TEXT,
    Kind,
    parse_json,
    problems,
    require,
)
from errors import PhiSightError, key_problems
from files import open_regular, read_regular, sync_tree
from tensors import as_float64, dtype_name, finite, sha256_of

MANIFEST = "MANIFEST.json"
FORMAT = 2
WEIGHTS = ("lora_weights", "image_projector")  # the stems that training changes and answers need

_TENSOR_ROW = {
    "file": TEXT,
    "owner": TEXT,
    "name": TEXT,
    "shape": [COUNT],
    "dtype": TEXT,
    "mean": NUMBER_OR_NULL,
    "std": NUMBER_OR_NULL,
    "sha256": TEXT,
}
_FILE_ROW = {"file": TEXT, "size": COUNT, "sha256?": TEXT, "header_sha256?": TEXT}
_MANIFEST = {
    "format": Kind(f"{FORMAT}", lambda value: type(value) is int and value == FORMAT),
    "step": COUNT,
    "tensors": [_TENSOR_ROW],
    "files": [_FILE_ROW],
    "change?": Kind("null or norms by owner", lambda value: value is None or _is_change(value)),
    "sha256": TEXT,
}


# How far an owner's weights moved: what `training.weight_change` writes, and a norm alone in
# checkpoints of former versions.
_MOVED = Kind(
    "a number, null, or an object of them",
    lambda value: NUMBER_OR_NULL.holds(value) or not [*problems(value, {"*": NUMBER_OR_NULL})],
)


def _is_change(value: Any) -> bool:
    wanted = {"since_step": COUNT_OR_NULL, "step?": COUNT, "*": _MOVED}
    return not [*problems(value, wanted)]


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
    with open_regular(path) as file:
        return row | {"sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def _header(path: Path) -> bytes:
    """The length and the JSON header of a safetensors file."""
    with open_regular(path) as file:
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


# -- what the weights are known by ----------------------------------------------------------------


def weights_digest(state: Mapping[str, Mapping[str, Tensor]]) -> str:
    """sha256 over names and bytes of all trained weights: the same number means the same model."""
    return _digest_of_rows(
        (stem, name, sha256_of(tensor.detach().cpu()))
        for stem in WEIGHTS
        for name, tensor in state[stem].items()
    )


def digest_in(manifest: Mapping[str, Any]) -> str:
    """The same number, from the rows of a manifest."""
    stems = ((Path(row["file"]).stem, row) for row in manifest["tensors"])
    return _digest_of_rows(
        (stem, row["name"], row["sha256"]) for stem, row in stems if stem in WEIGHTS
    )


def _digest_of_rows(rows: Iterable[tuple[str, str, str]]) -> str:
    return hashlib.sha256("\n".join(map(" ".join, sorted(rows))).encode()).hexdigest()


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
    data = read_regular(folder / MANIFEST, BYTE_LIMIT, follow_links=False)
    manifest = parse_json(data)
    try:
        require(manifest, _MANIFEST)
    except PhiSightError as error:
        raise PhiSightError(f"not a manifest of format {FORMAT} ({error})") from None
    if manifest_bytes(manifest) != data:
        raise PhiSightError("edited or damaged (its own sha256 does not match)")
    return manifest


def read_tensors(
    path: Path, rows: Mapping[str, Mapping[str, Any]], wrong: list[str]
) -> Iterator[tuple[str, Tensor]]:
    """Yield each tensor whose shape, dtype and bytes are those of its row, in the order of rows;
    what is wrong with the others is added to `wrong`."""
    with safe_open(path, framework="pt") as file:
        present = set(file.keys())
        wrong += key_problems(f"{path.name}: tensor ", set(rows), present)
        for name, row in rows.items():
            if name not in present:
                continue
            tensor = file.get_tensor(name).clone()  # not a view of a file that may change
            is_now = _described(tensor) | {"sha256": sha256_of(tensor)}
            if other := [key for key, value in is_now.items() if row[key] != value]:
                wrong.append(f"{path.name}: tensor {name} has another {' and '.join(other)}")
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
    owners: Mapping[str, str],
    step: int | None,
    keep_tensors: bool,
    problem_of: Callable[[str, str, Tensor], str] = lambda stem, name, tensor: "",
) -> Contents:
    """Read a folder and check everything that its manifest says. Each file is read once.

    Args:
        documents: the JSON files that must be there.
        owners: the stems of the safetensors files that must be there, and whose tensors they hold;
            beside both, `tokenizer/` may be.
        step: the one that the manifest must have; None for any.
        keep_tensors: without it the tensors are checked one by one and let go.
        problem_of: (stem, name, tensor) -> what is wrong with its values, or "".

    Raises:
        DamagedFolder: with every problem, each naming its file or tensor.
    """
    name = MANIFEST
    wrong: list[str] = []
    contents = Contents({}, {}, {stem: {} for stem in owners})
    try:
        if folder.is_symlink():
            raise PhiSightError("stands in a folder that is a link, not a folder of its own")
        manifest = read_manifest(folder)
        if step is not None and step != manifest["step"]:
            raise PhiSightError(f"it is of step {manifest['step']}, the folder's name says {step}")
        contents.manifest.update(manifest)
        file_rows, tensor_rows = _rows_by_file(manifest, owners)
        wrong += _other_files(folder, set(file_rows), {*documents, *tensor_rows})
        for name in sorted(set(file_rows) & set(files_below(folder))):
            path = folder / name
            status = path.lstat()
            if not stat.S_ISREG(status.st_mode) or status.st_size != file_rows[name]["size"]:
                wrong.append(f"{name}: a link, a pipe, or not of the size that was written")
                continue
            data = read_regular(path, BYTE_LIMIT) if name in documents else None
            if file_row(folder, name, data) != file_rows[name]:
                wrong.append(f"{name}: damaged or edited (another sha256)")
            elif data is not None:
                contents.documents[name] = parse_json(data)
            elif name in tensor_rows:
                for tensor_name, tensor in read_tensors(path, tensor_rows[name], wrong):
                    if problem := problem_of(path.stem, tensor_name, tensor):
                        wrong.append(f"{name}: tensor {tensor_name} {problem}")
                    if keep_tensors:
                        contents.tensors[path.stem][tensor_name] = tensor
    except FileNotFoundError:
        wrong.append(f"{name}: missing")
    except OSError as error:
        wrong.append(f"{name}: {error.strerror or error}")
    except (SafetensorError, PhiSightError) as error:
        wrong.append(f"{name}: {error}")
    if wrong:
        raise DamagedFolder(folder, wrong)
    return contents


def _other_files(folder: Path, rows: set[str], required: set[str]) -> list[str]:
    """Which files, and rows of files, are missing or unexpected."""
    tokenizer = {file for file in rows if file.startswith("tokenizer/")}
    return key_problems(f"{MANIFEST}: row for ", required, rows - tokenizer) + key_problems(
        "", required | tokenizer | {MANIFEST}, set(files_below(folder))
    )


def _rows_by_file(
    manifest: Mapping[str, Any], owners: Mapping[str, str]
) -> tuple[dict[str, dict[str, Any]], dict[str, dict[str, dict[str, Any]]]]:
    """File -> its row, and file -> tensor name -> its row. Raises `PhiSightError` for rows that no
    such folder has."""
    file_rows = {row["file"]: row for row in manifest["files"]}
    if len(file_rows) < len(manifest["files"]):
        raise PhiSightError("has two rows for one file")
    tensor_rows: dict[str, dict[str, dict[str, Any]]] = {
        f"{stem}.safetensors": {} for stem in owners
    }
    for row in manifest["tensors"]:
        file, name = row["file"], row["name"]
        if file not in tensor_rows or owners[file.removesuffix(".safetensors")] != row["owner"]:
            raise PhiSightError(f"gives tensor {shown(name)} of {shown(file)} another owner")
        if name in tensor_rows[file]:
            raise PhiSightError(f"has two rows for tensor {shown(name)} of {file}")
        tensor_rows[file][name] = row
    return file_rows, tensor_rows
