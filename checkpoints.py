"""Checkpoints: save so that a kill at any instant loses nothing, verify, load, compare.

A checkpoint is a folder `runs/NAME/checkpoint-000500/`:

    config.json, trainer_state.json            what the run is, and where it stands
    lora_weights, image_projector, optimizer, rng (.safetensors)
    tokenizer/                                 what `tokenizer.save_pretrained` writes
    MANIFEST.json                              a row per tensor and per file, and its own sha256

The order of a save is what makes it safe: write and fsync a temporary sibling folder, read it back
and verify it, rename it, fsync the parent, move `LATEST`, and only then remove what is older. So a
folder that bears a checkpoint's name has been verified, and one is there at every instant.

    python checkpoints.py show [RUN_OR_CHECKPOINT] | verify RUN_OR_CHECKPOINT | diff A B   [--json]
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import math
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

import config as configs
from errors import PhiSightError, key_problems, run_main
from reports.metrics import CHAIN, Parting, broken_link, parting, read_metrics

OWNERS = {
    "lora_weights": "lora",
    "image_projector": "projector",
    "optimizer": "optimizer",
    "rng": "rng",
}  # file stem -> owner
WEIGHTS = ("lora_weights", "image_projector")  # the stems that training changes and answers need
METRICS = "metrics.jsonl"
MANIFEST, CONFIG, TRAINER_STATE = "MANIFEST.json", "config.json", "trainer_state.json"
LATEST = "LATEST"
FORMAT = 2
BYTE_LIMIT = 64 * 2**20  # no JSON file or safetensors header of ours comes near this

# Fields of trainer_state, at any depth, that tell when or how fast a run went: two runs that are
# equal bit for bit differ in them. The metrics offset counts the bytes of the timings in the log.
VOLATILE_FIELDS = (
    "saved_at",
    "started_at",
    "seconds",
    "elapsed_seconds",
    "tokens_per_second",
    "memory_mb",
    "timing",
    "metrics_offset",
    "save_stall_seconds",
)
# Dotted paths in config.json that say where a run lies, not what it is.
RUN_FIELDS = ("name", "run", "config.name", "config.run")

_NAME = re.compile(r"checkpoint-(\d{6,})")
_LEFT_OVER = re.compile(r"\.(tmp|old)-(checkpoint-(\d{6,}))-(\d+)")
_ROW_TYPES = {
    "file": str,
    "owner": str,
    "name": str,
    "shape": list,
    "dtype": str,
    "mean": (int, float, type(None)),
    "std": (int, float, type(None)),
    "sha256": str,
}
_FILE_TYPES = {"file": str, "size": int}


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint. `state`: file stem -> tensor name -> CPU tensor."""

    path: Path
    step: int
    config: dict
    trainer_state: dict
    state: dict[str, dict[str, Tensor]]
    manifest: dict


@dataclass(frozen=True)
class Snapshot:
    """All that a checkpoint will hold, copied: training may go on while it is written."""

    step: int
    state: dict[str, dict[str, Tensor]]
    documents: dict[str, bytes]  # config.json and trainer_state.json as they will be written
    tokenizer: Any = None
    change: dict | None = None  # since the save before: {"since_step", owner: L2 norm}


# ---- bytes ---------------------------------------------------------------------------------------


def _raw(tensor: Tensor) -> numpy.ndarray:
    """The bytes of a CPU tensor in row-major order, (bytes,) uint8."""
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy()


def _float64(tensor: Tensor) -> Tensor:
    return (torch.view_as_real(tensor) if tensor.is_complex() else tensor).to(torch.float64)


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _describe(tensor: Tensor) -> dict:
    """What must be equal when the tensor is read again."""
    return {
        "shape": list(tensor.shape),
        "dtype": str(tensor.dtype).removeprefix("torch."),
        "sha256": hashlib.sha256(_raw(tensor)).hexdigest(),
    }


def _tensor_row(stem: str, name: str, tensor: Tensor) -> dict:
    values, seal = _float64(tensor), _describe(tensor)
    some = values.numel() > 0
    return {
        "file": f"{stem}.safetensors",
        "owner": OWNERS[stem],
        "name": name,
        "shape": seal["shape"],
        "dtype": seal["dtype"],
        "mean": _finite(values.mean().item()) if some else None,
        "std": _finite(values.std(correction=0).item()) if some else None,
        "sha256": seal["sha256"],
    }


def _header(path: Path) -> bytes:
    """The length and the JSON header of a safetensors file; the tensor rows cover the rest."""
    with path.open("rb") as file:
        prefix = file.read(8)
        length = int.from_bytes(prefix, "little")
        if len(prefix) < 8 or length > min(BYTE_LIMIT, path.stat().st_size - 8):
            raise PhiSightError("its safetensors header is cut short or absurdly long")
        return prefix + file.read(length)


def _file_row(folder: Path, name: str) -> dict:
    path = folder / name
    row = {"file": name, "size": path.stat().st_size}
    if "/" not in name and path.suffix == ".safetensors":
        return row | {"header_sha256": hashlib.sha256(_header(path)).hexdigest()}
    with path.open("rb") as file:
        return row | {"sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def _manifest_bytes(body: dict) -> bytes:
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


def _parse_json(data: bytes) -> dict:
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:  # ValueError: bad JSON, and bad UTF-8
        raise PhiSightError(f"not readable as JSON ({error})") from error
    if not isinstance(value, dict):
        raise PhiSightError("not a JSON object")
    return value


def _document(name: str, value: dict) -> bytes:
    """JSON that reads back as it was; infinities and NaN pass, as Python's own reader takes them.

    Raises PhiSightError for what would come back as something else (keys that are not strings).
    """

    def check(node: Any, path: str) -> None:
        if isinstance(node, dict):
            for key, inner in node.items():
                if not isinstance(key, str):
                    raise PhiSightError(
                        f"{name}: the key {key!r} in {path or 'it'} is not a "
                        "string; JSON would change it, use a string"
                    )
                check(inner, f"{path}.{key}".lstrip("."))
        elif isinstance(node, (list, tuple)):
            for inner in node:
                check(inner, path)

    check(value, "")
    try:
        return (json.dumps(value, indent=2) + "\n").encode()
    except (TypeError, ValueError) as error:
        raise PhiSightError(
            f"{name}: {error}; give it plain numbers, strings, lists and dictionaries"
        ) from error


# ---- saving --------------------------------------------------------------------------------------


def take_snapshot(
    step: int,
    state: Mapping[str, Mapping[str, Tensor]],
    config: dict,
    trainer_state: dict,
    tokenizer: Any = None,
    previous: Snapshot | Checkpoint | None = None,
) -> Snapshot:
    """Copy everything to the CPU. `state` holds every stem of OWNERS; tensors may share memory.
    With the save before as `previous`, how far the weights moved since is written down too.

    Raises PhiSightError for a missing or unknown stem, a bad step, a value that JSON cannot hold.
    """
    if set(state) != set(OWNERS):
        raise PhiSightError(
            f"checkpoint: state has {sorted(state)}, not {sorted(OWNERS)}; "
            "give an empty dictionary for what the run does not have"
        )
    if type(step) is not int or step < 0 or trainer_state.get("step", step) != step:
        raise PhiSightError(
            f"checkpoint: step {step!r} is not a count or not the step in "
            "trainer_state; save between two steps"
        )
    copies = {
        stem: {
            name: torch.empty(tensor.shape, dtype=tensor.dtype).copy_(tensor.detach())
            for name, tensor in state[stem].items()
        }
        for stem in OWNERS
    }
    documents = {
        CONFIG: _document(CONFIG, config),
        TRAINER_STATE: _document(TRAINER_STATE, trainer_state),
    }
    return Snapshot(step, copies, documents, tokenizer, _change(previous, copies))


def _change(
    previous: Snapshot | Checkpoint | None, now: Mapping[str, Mapping[str, Tensor]]
) -> dict | None:
    """The L2 norm of what each owner's weights moved; None where there is nothing to compare."""
    if previous is None or any(previous.state[stem].keys() != now[stem].keys() for stem in WEIGHTS):
        return None
    squares = {
        OWNERS[stem]: sum(
            (_float64(tensor) - _float64(previous.state[stem][name])).square().sum().item()
            for name, tensor in now[stem].items()
        )
        for stem in WEIGHTS
    }
    return {
        "since_step": previous.step,
        **{owner: _finite(math.sqrt(total)) for owner, total in squares.items()},
    }


def weights_digest(state: Mapping[str, Mapping[str, Tensor]]) -> str:
    """sha256 over names and bytes of all trained weights: the same number means the same model."""
    return _digest_of_rows(
        (stem, name, hashlib.sha256(_raw(tensor.detach().cpu())).hexdigest())
        for stem in WEIGHTS
        for name, tensor in state[stem].items()
    )


def _digest_of_rows(rows: Iterable[tuple[str, str, str]]) -> str:
    return hashlib.sha256("\n".join(map(" ".join, sorted(rows))).encode()).hexdigest()


def save(
    run_dir: str | Path,
    step: int,
    state: Mapping[str, Mapping[str, Tensor]],
    config: dict,
    trainer_state: dict,
    tokenizer: Any = None,
    keep: int = 1,
) -> Path:
    """Write `run_dir/checkpoint-STEP` and return its path; see `take_snapshot` and `commit`."""
    return commit(run_dir, take_snapshot(step, state, config, trainer_state, tokenizer), keep)


def commit(run_dir: str | Path, snapshot: Snapshot, keep: int = 1) -> Path:
    """Put a snapshot on the disk, then remove all but the `keep` newest up to its step.

    One process saves to a run, one save at a time. Raises PhiSightError with the path, the reason
    and the remedy; the temporary folder is then gone and the earlier checkpoints are as they were.
    """
    if keep < 1:
        raise PhiSightError(f"keep: {keep} checkpoints; keep at least 1")
    run_dir = Path(run_dir)
    final = run_dir / f"checkpoint-{snapshot.step:06d}"
    temporary = run_dir / f".tmp-{final.name}-{os.getpid()}"
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        sweep(run_dir)
        _write_folder(temporary, snapshot)
        # Verified before the rename, not after, so that no name ever points at an unread folder.
        if problems := verify(temporary):
            raise PhiSightError(
                f"{temporary}: read back different from what was written "
                f"({problems[0]}); check the disk"
            )
        _put_in_place(temporary, final)
        _write_file(run_dir / f".tmp-{LATEST}", f"{final.name}\n".encode())
        os.replace(run_dir / f".tmp-{LATEST}", run_dir / LATEST)
        _fsync(run_dir)
        _prune(run_dir, snapshot.step, keep)
    except (OSError, SafetensorError) as error:
        raise PhiSightError(
            f"{final}: not saved or not tidied up ({error}); earlier checkpoints "
            "are untouched: make room or mend the folder, then resume"
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return final


def _fsync(path: Path) -> None:
    """Flush a file or a folder to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _write_file(path: Path, data: bytes) -> None:
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _write_folder(folder: Path, snapshot: Snapshot) -> None:
    """Write every file of a checkpoint, the manifest last; all is fsynced on return."""
    folder.mkdir()
    for name, data in snapshot.documents.items():
        _write_file(folder / name, data)
    if snapshot.tokenizer is not None:  # in its own folder: its loader must not see our config.json
        snapshot.tokenizer.save_pretrained(str(folder / "tokenizer"))
    for stem, tensors in snapshot.state.items():
        save_file(tensors, folder / f"{stem}.safetensors")
        shutil.copymode(folder / CONFIG, folder / f"{stem}.safetensors")  # safetensors writes 0600
    names = _files_in(folder)
    for path in (folder / name for name in names if name not in snapshot.documents):
        _fsync(path)
    body = {
        "format": FORMAT,
        "step": snapshot.step,
        "change": snapshot.change,
        "tensors": [
            _tensor_row(stem, name, tensor)
            for stem, tensors in snapshot.state.items()
            for name, tensor in tensors.items()
        ],
        "files": [_file_row(folder, name) for name in names],
    }
    _write_file(folder / MANIFEST, _manifest_bytes(body))
    for path in (*folder.rglob("*"), folder):
        if path.is_dir():
            _fsync(path)


def _put_in_place(temporary: Path, final: Path) -> None:
    """Give a verified folder its name. One of that name is kept if it is the same, or replaced."""
    aside = final.with_name(f".old-{final.name}-{os.getpid()}")
    if final.exists():
        if (
            not verify(final)
            and (final / MANIFEST).read_bytes() == (temporary / MANIFEST).read_bytes()
        ):
            return
        os.replace(final, aside)  # killed here, `aside` still counts, and the next save restores it
    try:
        os.replace(temporary, final)
    except BaseException:
        if aside.exists():
            os.replace(aside, final)
        raise
    _fsync(final.parent)


def _prune(run_dir: Path, step: int, keep: int) -> None:
    sweep(run_dir)  # the folder that was replaced, if any
    older = sorted(
        (
            path
            for path in run_dir.iterdir()
            if not path.is_symlink()
            and (path / MANIFEST).is_file()
            and (found := _step_of(path)) is not None
            and found < step
        ),
        key=_step_of,
    )
    # A damaged one must not count among those to keep: an intact one would go for it.
    spared = list(
        itertools.islice((path for path in reversed(older) if not verify(path)), keep - 1)
    )
    for path in older:
        if path not in spared:
            _remove(path)


def _remove(path: Path) -> None:
    doomed = path.with_name(f".tmp-{path.name}-{os.getpid()}")
    os.replace(path, doomed)  # so that a kill while removing leaves no half checkpoint
    shutil.rmtree(doomed)


def remove_all(run_dir: str | Path) -> None:
    """Remove every checkpoint of a run that starts anew, damaged ones too; links and all else stay.
    Raises PhiSightError."""
    run_dir = Path(run_dir)
    try:
        sweep(run_dir)
        (run_dir / LATEST).unlink(missing_ok=True)
        for path in checkpoints_in(run_dir):
            if not path.is_symlink() and _step_of(path) is not None:
                _remove(path)
    except OSError as error:
        raise PhiSightError(
            f"{run_dir}: cannot remove its checkpoints ({error}); make the folder "
            "writable, or choose another"
        ) from error


def sweep(run_dir: Path) -> None:
    """Clear what saves of dead processes left; a checkpoint they had set aside is put back."""
    for path in list(run_dir.iterdir()):
        match = _LEFT_OVER.fullmatch(path.name)
        if not match or path.is_symlink() or _other_live_process(int(match[4])):
            continue
        if match[1] == "old" and not (run_dir / match[2]).exists():
            os.replace(path, run_dir / match[2])
        else:
            shutil.rmtree(path)


def _other_live_process(process: int) -> bool:
    if process == os.getpid():  # a name from an earlier life: in a container, always the same id
        return False
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return True


def _step_of(path: Path) -> int | None:
    match = _NAME.fullmatch(path.name)
    step = int(match[1]) if match else None
    return step if match and path.name == f"checkpoint-{step:06d}" else None


# ---- reading -------------------------------------------------------------------------------------


def _files_in(folder: Path) -> list[str]:
    """Every file below, as relative posix paths; a link counts as a file and is never followed."""
    return sorted(
        path.relative_to(folder).as_posix()
        for path in folder.rglob("*")
        if path.is_symlink() or not path.is_dir()
    )


def _read_manifest(folder: Path) -> dict:
    path = folder / MANIFEST
    if path.exists() and not path.is_file():  # reading a pipe would wait for ever
        raise PhiSightError("not a file")
    if path.stat().st_size > BYTE_LIMIT:
        raise PhiSightError("absurdly large")
    data = path.read_bytes()
    manifest = _parse_json(data)

    def sound(rows: Any, types: dict) -> bool:
        return isinstance(rows, list) and all(
            isinstance(row, dict)
            and all(isinstance(row.get(field), kind) for field, kind in types.items())
            for row in rows
        )

    if (
        manifest.get("format") != FORMAT
        or type(manifest.get("step")) is not int
        or not sound(manifest.get("tensors"), _ROW_TYPES)
        or not sound(manifest.get("files"), _FILE_TYPES)
    ):
        raise PhiSightError(f"not a manifest of format {FORMAT}")
    if _manifest_bytes(manifest) != data:
        raise PhiSightError("edited or damaged (its own sha256 does not match)")
    if (named := _step_of(folder)) is not None and named != manifest["step"]:
        raise PhiSightError(f"it is of step {manifest['step']}, the folder's name says {named}")
    return manifest


def _read_tensors(
    path: Path, rows: dict[str, dict], problems: list[str]
) -> Iterator[tuple[str, Tensor]]:
    """Yield each tensor whose shape, dtype and bytes are those of its row, in the order of rows."""
    with safe_open(path, framework="pt") as file:
        found = set(file.keys())
        problems += key_problems(f"{path.name}: tensor ", set(rows), found)
        for name, row in rows.items():
            if name not in found:
                continue
            tensor = file.get_tensor(name).clone()  # not a view of a file that may change
            if wrong := [key for key, value in _describe(tensor).items() if row[key] != value]:
                problems.append(f"{path.name}: tensor {name} has another {' and '.join(wrong)}")
            else:
                yield name, tensor


def _inspect(folder: Path, keep_tensors: bool) -> tuple[Checkpoint | None, list[str]]:
    """Check everything that the manifest says; a Checkpoint only if no problem was found."""
    name, problems = MANIFEST, []
    documents: dict[str, dict] = {}
    state: dict[str, dict[str, Tensor]] = {stem: {} for stem in OWNERS}
    try:
        manifest = _read_manifest(folder)
        listed = {row["file"]: row for row in manifest["files"]}
        present = set(_files_in(folder))
        required = {CONFIG, TRAINER_STATE} | {f"{stem}.safetensors" for stem in OWNERS}
        tokenizer = {file for file in listed if file.startswith("tokenizer/")}
        problems += key_problems(f"{MANIFEST}: row for ", required, set(listed) - tokenizer)
        problems += key_problems("", required | tokenizer | {MANIFEST}, present)
        for name in sorted(set(listed) & present):
            path = folder / name
            if path.is_symlink() or path.stat().st_size != listed[name]["size"]:
                problems.append(f"{name}: a link, or not of the size that was written")
            elif _file_row(folder, name) != listed[name]:
                problems.append(f"{name}: damaged or edited (another sha256)")
            elif name in (CONFIG, TRAINER_STATE):
                documents[name] = _parse_json(path.read_bytes())
            elif name in required:
                rows = {row["name"]: row for row in manifest["tensors"] if row["file"] == name}
                for tensor_name, tensor in _read_tensors(path, rows, problems):
                    if keep_tensors:
                        state[path.stem][tensor_name] = tensor
    except FileNotFoundError:
        problems.append(f"{name}: missing")
    except (OSError, SafetensorError, PhiSightError) as error:
        problems.append(f"{name}: {error}")
    if problems:
        return None, problems
    return Checkpoint(
        folder, manifest["step"], documents[CONFIG], documents[TRAINER_STATE], state, manifest
    ), []


def verify(path: str | Path) -> list[str]:
    """Every problem of a checkpoint folder, each naming its file or tensor; none: it is intact."""
    return _inspect(Path(path), keep_tensors=False)[1]


def load(path: str | Path) -> Checkpoint:
    """Read a checkpoint after verifying all of it. Raises PhiSightError naming file and tensor."""
    checkpoint, problems = _inspect(Path(path), keep_tensors=True)
    if checkpoint is None:
        more = f" and {len(problems) - 1} more" if len(problems) > 1 else ""
        raise PhiSightError(
            f"{path}: {problems[0]}{more}; use an earlier checkpoint, or copy this "
            "one again from where it is whole"
        )
    return checkpoint


def checkpoints_in(run_dir: str | Path) -> list[Path]:
    """The checkpoint folders of a run, newest last, with those that a killed save had set aside
    and whose place is empty."""
    run_dir, found = Path(run_dir), []
    for path in run_dir.iterdir() if run_dir.is_dir() else ():
        match = _LEFT_OVER.fullmatch(path.name)
        aside = match and match[1] == "old" and not (run_dir / match[2]).exists()
        step = int(match[3]) if aside else _step_of(path)
        if step is not None and path.is_dir():
            found.append((step, path))
    return [path for _, path in sorted(found)]


def find_newest_valid(run_dir: str | Path) -> tuple[Path, list[tuple[Path, str]]]:
    """The newest intact checkpoint and, as (path, problem), the damaged ones that are newer.

    Raises PhiSightError when there is none.
    """
    damaged: list[tuple[Path, str]] = []
    listed: list[Path] | None = None
    # A run that is being trained replaces its checkpoint under our eyes: look again.
    while not damaged and listed != (listed := checkpoints_in(run_dir)):
        for path in reversed(listed):
            if not (problems := verify(path)):
                return path, damaged
            if path.exists():
                damaged.append((path, problems[0]))
    if damaged:
        newest, problem = damaged[0]
        raise PhiSightError(
            f"{run_dir}: no checkpoint is intact (the newest, {newest.name}: "
            f"{problem}); copy one from a backup or start again"
        )
    raise PhiSightError(f"no checkpoint in {run_dir}; start one with python train.py ...")


def newest_with_warnings(run_dir: str | Path) -> Path:
    """`find_newest_valid`, with a warning on stderr for each newer one that is damaged."""
    newest, damaged = find_newest_valid(run_dir)
    for folder, problem in damaged:
        print(f"warning: {folder} is not used: {problem}; using {newest.name}", file=sys.stderr)
    return newest


def resolve(path: str | Path) -> Checkpoint:
    """Load a checkpoint folder, or the newest intact one of a run folder (with a warning on stderr
    for each newer one that is damaged)."""
    path = Path(path)
    is_checkpoint = (path / MANIFEST).exists() or _step_of(path) is not None
    return load(path if is_checkpoint else newest_with_warnings(path))


# ---- comparing -----------------------------------------------------------------------------------


def _field_differences(
    saved: Any, current: Any, skip: Callable[[str], bool], path: str = ""
) -> Iterator[tuple[str, str, str]]:
    """(dotted path, text of saved, text of current) of each leaf that differs; lists are leaves."""
    if isinstance(saved, Mapping) and isinstance(current, Mapping):
        for key in list(saved) + [key for key in current if key not in saved]:
            inner = f"{path}.{key}" if path else str(key)
            if skip(inner):
                continue
            if key in saved and key in current:
                yield from _field_differences(saved[key], current[key], skip, inner)
            else:
                yield (
                    inner,
                    *(
                        json.dumps(side[key], default=str) if key in side else "absent"
                        for side in (saved, current)
                    ),
                )
        return
    texts = tuple(json.dumps(side, default=str) for side in (saved, current))
    if texts[0] != texts[1] and saved != current:  # texts: NaN is NaN, and a tuple is a list
        yield (path, *texts)


def compare_configs(saved: dict, current: dict, ignore: tuple[str, ...] = ()) -> list[str]:
    """Readable differences of two configs; `ignore` names dotted paths, with all beneath them."""

    def skip(path: str) -> bool:
        return any(path == entry or path.startswith(f"{entry}.") for entry in ignore)

    return [
        f"{path}: {old} in the checkpoint, {new} now"
        for path, old, new in _field_differences(saved, current, skip)
    ]


@dataclass(frozen=True)
class Diff:
    """What differs between two checkpoints; each difference has owner, name and message."""

    step: int
    owners: dict[str, int]  # owner -> tensors in either
    differences: list[dict]
    parted: Parting | None = None  # of the two runs' logs, where both are runs

    @property
    def identical(self) -> bool:
        return not self.differences

    def as_json(self) -> dict:
        return {
            "identical": self.identical,
            "tensors": sum(self.owners.values()),
            "owners": self.owners,
            "step": self.step,
            "differences": self.differences,
            "parted": dataclasses.asdict(self.parted) if self.parted else None,
        }

    def __str__(self) -> str:
        owners = ", ".join(f"{owner} {count}" for owner, count in self.owners.items())
        tensors = f"{sum(self.owners.values())} tensors ({owners})"
        logs = [str(self.parted)] if self.parted else []
        if self.identical:
            return "\n  ".join([f"identical: {tensors}, RNG, position, step {self.step}", *logs])
        lines = [f"{row['owner']} {row['name']}: {row['message']}" for row in self.differences]
        more = [f"... and {len(lines) - 20} more, which --json lists"] if len(lines) > 20 else []
        return "\n  ".join(
            [
                f"different: {len(lines)} differences over {tensors} and the fields; "
                f"the first: {lines[0]}",
                *logs,
                *lines[1:20],
                *more,
            ]
        )


def _tensor_difference(first: Tensor | None, second: Tensor | None) -> dict | None:
    """None if equal to the bit, dtype and shape; else a message and, where it can be, numbers."""
    kinds = [
        "absent"
        if tensor is None
        else f"{tensor.dtype} {tuple(tensor.shape)}".removeprefix("torch.")
        for tensor in (first, second)
    ]
    if kinds[0] != kinds[1]:
        return {"message": f"{kinds[0]} against {kinds[1]}"}
    size = first.element_size()
    changed = (_raw(first) != _raw(second)).reshape(-1, size).any(axis=1)
    if not changed.any():
        return None
    gap = _finite((_float64(first) - _float64(second)).abs().max().item())
    shown = "not finite" if gap is None else f"{gap:.3g}"
    return {
        "message": f"{changed.sum()} of {first.numel()} elements differ, at most by {shown}",
        "elements": int(changed.sum()),
        "of": first.numel(),
        "max_abs_difference": gap,
    }


def diff(first: str | Path, second: str | Path) -> Diff:
    """Compare two checkpoints, or the newest intact ones of two runs, to the bit.

    Not compared: VOLATILE_FIELDS of trainer_state and RUN_FIELDS of config. Where both are runs,
    their logs are compared too, which tells when they parted. Raises PhiSightError when one cannot
    be loaded.
    """
    a, b = resolve(first), resolve(second)
    owners, found = {}, []
    for stem, owner in OWNERS.items():
        names = dict.fromkeys([*a.state[stem], *b.state[stem]])
        owners[owner] = len(names)
        for name in names:
            if row := _tensor_difference(a.state[stem].get(name), b.state[stem].get(name)):
                found.append({"owner": owner, "name": name} | row)

    def volatile(path: str) -> bool:
        return path.rpartition(".")[2] in VOLATILE_FIELDS

    fields = {  # owner -> the two sides, what to leave out
        "step": ({"step": a.step}, {"step": b.step}, lambda path: False),
        "trainer_state": (a.trainer_state, b.trainer_state, volatile),
        "config": (a.config, b.config, RUN_FIELDS.__contains__),
        "tokenizer": (
            *(
                {
                    row["file"]: row["sha256"]
                    for row in side.manifest["files"]
                    if row["file"].startswith("tokenizer/")
                }
                for side in (a, b)
            ),
            lambda path: False,
        ),
    }
    for owner, (one, other, skip) in fields.items():
        found += [
            {"owner": owner, "name": path, "message": f"{old} against {new}"}
            for path, old, new in _field_differences(one, other, skip)
        ]
    logs = [Path(side) / METRICS for side in (first, second)]
    parted = parting(*map(read_metrics, logs)) if all(log.is_file() for log in logs) else None
    return Diff(a.step, owners, found, parted)


# ---- command line --------------------------------------------------------------------------------


def summarise(checkpoint: Checkpoint) -> dict:
    """Where a run stands, and totals by owner; mean and std are over all elements of its tensors,
    and None where that means nothing (no elements, or values that are not finite)."""
    owners, change = {}, checkpoint.manifest.get("change") or {}
    for stem, owner in OWNERS.items():
        rows = [
            (math.prod(row["shape"]), row["mean"], row["std"])
            for row in checkpoint.manifest["tensors"]
            if row["owner"] == owner
        ]
        count = sum(size for size, _, _ in rows)
        mean = std = None
        if count and all(None not in row for row in rows if row[0]):
            mean = sum(size * each for size, each, _ in rows if size) / count
            square = sum(size * (each**2 + spread**2) for size, each, spread in rows if size)
            std = math.sqrt(max(square / count - mean**2, 0.0))
        owners[owner] = {
            "tensors": len(rows),
            "parameters": count,
            "bytes": sum(t.nbytes for t in checkpoint.state[stem].values()),
            "mean": mean,
            "std": std,
            "change": change.get(owner),
        }
    return {
        "path": str(checkpoint.path),
        "step": checkpoint.step,
        "owners": owners,
        "change_since_step": change.get("since_step"),
        "versions": checkpoint.config.get("versions"),
        "trainer_state": checkpoint.trainer_state,
    }


def _print_summary(summary: dict) -> None:
    print(f"{summary['path']}: step {summary['step']}, verified")
    print(
        f"{'owner':<12}{'tensors':>9}{'parameters':>14}{'bytes':>15}{'mean':>13}{'std':>13}"
        f"{'change':>13}"
    )
    for owner, row in summary["owners"].items():
        statistics = "".join(
            f"{'-' if row[key] is None else format(row[key], '.4g'):>13}"
            for key in ("mean", "std", "change")
        )
        print(
            f"{owner:<12}{row['tensors']:>9,}{row['parameters']:>14,}{row['bytes']:>15,}"
            f"{statistics}"
        )
    if summary["change_since_step"] is not None:
        print(f"change: L2 norm since the save of step {summary['change_since_step']}")
    fields = {"versions": summary["versions"]} | summary["trainer_state"]
    for key, value in fields.items():
        if key == "recent_losses" and isinstance(value, list):
            key, value = "last losses", value[-5:]
        text = json.dumps(value)
        print(f"{key}: {text if len(text) <= 200 else text[:197] + '...'}")


def _newest_run() -> Path:
    """The run under runs/ whose newest checkpoint was written last."""
    found = [paths[-1] for run in Path("runs").glob("*") if (paths := checkpoints_in(run))]
    if not found:
        raise PhiSightError("no checkpoint in runs; start one with python train.py ...")
    return max(found, key=lambda path: path.stat().st_mtime).parent


def verify_run(run_dir: str | Path) -> dict[str, list[str]]:
    """Every problem of a run, by path: of each checkpoint, and of the log: is its chain whole, and
    do its digests and the checkpoints say the same?"""
    run_dir = Path(run_dir)
    problems: dict[str, list[str]] = {}
    log = run_dir / METRICS
    records = read_metrics(log) if log.is_file() else []
    broken = broken_link(records)
    if log.is_file():
        problems[str(log)] = (
            []
            if broken is None
            else [
                f"line {broken + 1} (step {records[broken].get('step')}): does not follow from the"
                " lines before it; the log was edited, or lines are missing"
            ]
        )
    for folder in checkpoints_in(run_dir):
        checkpoint, found = _inspect(folder, keep_tensors=False)
        if checkpoint is not None and log.is_file() and broken is None:
            found = log_problems(checkpoint, records)
        problems[str(folder)] = found
    return problems


def log_problems(checkpoint: Checkpoint, records: Sequence[Mapping]) -> list[str]:
    """Where a checkpoint and the log of its run contradict each other."""
    chain = checkpoint.trainer_state.get(CHAIN, "")
    before = [
        record
        for record in records
        if isinstance(record.get("step"), int) and record["step"] <= checkpoint.step
    ]
    if (before[-1].get(CHAIN) if before else "") != chain:
        return [
            f"{TRAINER_STATE}: its chain is not that of the log at step {checkpoint.step}; one"
            " of them belongs to another run, or was edited"
        ]
    logged = [r for r in before if r.get("step") == checkpoint.step and "weights_digest" in r]
    own = _digest_of_rows(
        (Path(row["file"]).stem, row["name"], row["sha256"])
        for row in checkpoint.manifest["tensors"]
        if Path(row["file"]).stem in WEIGHTS
    )
    if logged and logged[-1]["weights_digest"] != own:
        return [f"its weights are not those that the log has for step {checkpoint.step}"]
    return []


def _verify_command(target: Path, as_json: bool) -> int:
    if not target.is_dir():
        raise PhiSightError(f"{target}: no such folder; name a run or a checkpoint")
    is_run = not (target / MANIFEST).exists() and bool(checkpoints_in(target))
    results = verify_run(target) if is_run else {str(target): verify(target)}
    if as_json:
        print(json.dumps({"intact": not any(results.values()), "problems": results}))
    else:
        for path, problems in results.items():
            print("\n  ".join([f"{path}: {'damaged' if problems else 'intact'}", *problems]))
    return 1 if any(results.values()) else 0


def main(arguments: list[str] | None = None) -> int:
    """Exit code 0; 1 when two checkpoints differ or one is damaged; 2 on errors."""
    parser = configs.Parser(prog="checkpoints.py", description="Look into checkpoints.")
    commands = parser.add_subparsers(dest="command", required=True)
    for name, targets, text in (
        ("show", ["target"], "what a checkpoint holds"),
        ("verify", ["target"], "check every file and tensor"),
        ("diff", ["first", "second"], "compare two to the bit"),
    ):
        command = commands.add_parser(name, help=text)
        for target in targets:
            command.add_argument(
                target,
                type=Path,
                nargs="?" if name == "show" else None,
                help="a run folder or a checkpoint folder",
            )
        command.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args(arguments)
    if options.command == "verify":
        return _verify_command(options.target, options.json)
    if options.command == "diff":
        result = diff(options.first, options.second)
        print(json.dumps(result.as_json()) if options.json else result)
        return 0 if result.identical else 1
    summary = summarise(resolve(options.target or _newest_run()))
    if options.json:
        print(json.dumps(summary))
    else:
        _print_summary(summary)
    return 0


if __name__ == "__main__":
    run_main(main)
