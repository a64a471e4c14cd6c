"""Checkpoints: save so that a kill at any instant loses nothing, verify, load, compare.

A checkpoint is a folder `runs/NAME/checkpoint-000500/`:

    config.json, trainer_state.json            what the run is, and where it stands
    lora_weights, image_projector, optimizer, rng (.safetensors)
    tokenizer/                                 what `tokenizer.save_pretrained` writes
    MANIFEST.json                              a row per tensor and per file, and its own sha256

The order of a save is what makes it safe: write and sync a temporary sibling folder, read it back
and verify it, rename it, sync the parent, and only then remove what is older. So a folder that
bears a checkpoint's name has been verified, and one is there at every instant.

    python checkpoints.py show [RUN] [--base] | verify RUN | diff A B [--by-layer]   [--json]
    python checkpoints.py pack RUN OUT.tar | unpack OUT.tar FOLDER
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import itertools
import json
import re
import shutil
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import threads  # noqa: F401 (before torch is loaded)

from safetensors import SafetensorError
from torch import Tensor

import config as configs
import files
import hub
import hub_runs
import manifest as manifests
import packing
from checkpoint_state import (
    CHECKPOINT,
    CONFIG,
    OWNERS,
    TRAINER_STATE,
    Checkpoint,
    Snapshot,
    Tokenizer,
    document_problems,
    published_files,
    take_snapshot,
    tensor_problem,
)
from documents import read_json
from errors import PhiSightError, run_main
from manifest import MANIFEST, DamagedFolder
from manifest import weights_digest as weights_digest  # others call it by this module
from paths import EXAMPLES, command, located
from reports import compare, layers, show
from reports.chain import log_problems as log_problems
from reports.chain import records_of as records_of
from reports.log import METRICS, chain_problems, read_metrics

NAMED = ("best_step", "rollback_step", "rollback_best")  # of trainer_state, and kept
BEST = "best"  # RUN/best names the checkpoint of the lowest validation loss that is kept
FORMER_LATEST = "LATEST"  # former versions wrote the newest one's name there; nothing reads it
# What a run's folder holds beside checkpoints and is written whole, under a temporary name first.
WRITTEN = (FORMER_LATEST, "curves.png", "quarantine.jsonl", "starts.jsonl", EXAMPLES)

_NAME = re.compile(CHECKPOINT)


# ---- saving --------------------------------------------------------------------------------------


def save(
    run_dir: str | Path,
    step: int,
    state: Mapping[str, Mapping[str, Tensor]],
    config: dict,
    trainer_state: dict,
    tokenizer: Tokenizer | None = None,
    keep: int = 1,
) -> Path:
    """Write `run_dir/checkpoint-STEP` and return its path; see `take_snapshot` and `commit`."""
    return commit(run_dir, take_snapshot(step, state, config, trainer_state, tokenizer), keep)


def commit(run_dir: str | Path, snapshot: Snapshot, keep: int = 1) -> Path:
    """Put a snapshot on the disk, then remove all but the `keep` newest up to its step and `NAMED`.

    One process saves to a run, one save at a time. Raises PhiSightError with the path, the reason
    and the remedy; the temporary folder is then gone and the earlier checkpoints are as they were.
    """
    if keep < 1:
        raise PhiSightError(f"keep: {keep} checkpoints; keep at least 1")
    run_dir = Path(run_dir)
    final = run_dir / f"checkpoint-{snapshot.step:06d}"
    temporary = files.temporary_for(final)
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
        if not _is_same(temporary, final):
            files.replace_folder(temporary, final)
        _prune(run_dir, snapshot.step, keep)
    except (OSError, SafetensorError) as error:
        raise PhiSightError(
            f"{final}: not saved or not tidied up ({error}); earlier checkpoints "
            "are untouched: make room or mend the folder, then resume"
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return final


def _write_folder(folder: Path, snapshot: Snapshot) -> None:
    """Write every file of a checkpoint, the manifest last; all is synced on return."""
    folder.mkdir()
    if snapshot.tokenizer is not None:  # in its own folder: its loader must not see our config.json
        snapshot.tokenizer.save_pretrained(str(folder / "tokenizer"))
    facts = {"step": snapshot.step, "change": snapshot.change}
    manifests.write_folder(folder, facts, snapshot.documents, snapshot.state, OWNERS)


def _is_same(temporary: Path, final: Path) -> bool:
    """Whether `final` is there, intact, and holds what `temporary` does: then it is kept."""
    return (
        final.exists()
        and not verify(final)
        and (final / MANIFEST).read_bytes() == (temporary / MANIFEST).read_bytes()
    )


def _prune(run_dir: Path, step: int, keep: int) -> None:
    sweep(run_dir)  # the folder that was replaced, if any
    older = [
        (saved_step, path)
        for path in run_dir.iterdir()
        if not path.is_symlink()
        and (path / MANIFEST).is_file()
        and (saved_step := _step_of(path)) is not None
        and saved_step < step
    ]
    newest_first = [path for _, path in sorted(older, reverse=True)]
    # A damaged one must not count among those to keep: an intact one would go for it.
    spared = list(itertools.islice((path for path in newest_first if not verify(path)), keep - 1))
    kept = [run_dir / f"checkpoint-{step:06d}", *spared]
    named = {read_json(path / TRAINER_STATE).get(name) for path in kept for name in NAMED}
    for path in reversed(newest_first):
        if path not in spared and _step_of(path) not in named:
            files.remove_folder(path)


def remove_all(run_dir: str | Path, after: int = -1) -> None:
    """Remove every checkpoint of steps after `after`, damaged ones too; links and all else stay.
    Raises PhiSightError."""
    run_dir = Path(run_dir)
    with _tidying(run_dir):
        sweep(run_dir)
        for path in checkpoints_in(run_dir):
            if not path.is_symlink() and (step := _step_of(path)) is not None and step > after:
                files.remove_folder(path)


def tidy(run_dir: str | Path, newest: Checkpoint | None = None, keep: int = 1) -> None:
    """What a writer that was killed left is cleared, and what it had still to do is done: on every
    start, by the process that holds the run. Given the `newest` checkpoint, those go that a save
    of it with `keep` removes. Raises PhiSightError."""
    run_dir = Path(run_dir)
    with _tidying(run_dir):
        sweep(run_dir)
        if newest is not None:
            _prune(run_dir, newest.step, keep)


@contextlib.contextmanager
def _tidying(run_dir: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise PhiSightError(
            f"{run_dir}: cannot remove its checkpoints ({error}); make the folder "
            "writable, or choose another"
        ) from error


def sweep(run_dir: Path) -> None:
    """Clear what dead processes left of the files that are written to a run, and what former
    versions wrote beside checkpoints; a checkpoint that was set aside is put back."""
    for name in (FORMER_LATEST, f".tmp-{FORMER_LATEST}"):
        (run_dir / name).unlink(missing_ok=True)
    files.sweep_dead(run_dir, lambda name: name in WRITTEN or _NAME.fullmatch(name) is not None)


def _step_of(path: Path) -> int | None:
    return int(path.name.removeprefix("checkpoint-")) if _NAME.fullmatch(path.name) else None


# ---- reading -------------------------------------------------------------------------------------


def _read(folder: Path, keep_tensors: bool) -> Checkpoint:
    contents = manifests.read_folder(
        folder, (CONFIG, TRAINER_STATE), OWNERS, _step_of(folder), keep_tensors, tensor_problem
    )
    manifest, documents, tensors = contents.manifest, contents.documents, contents.tensors
    if problems := [*document_problems(documents, manifest["step"])]:
        raise DamagedFolder(folder, problems)
    config, trainer_state = documents[CONFIG], documents[TRAINER_STATE]
    return Checkpoint(folder, manifest["step"], config, trainer_state, tensors, manifest)


def verify(path: str | Path) -> list[str]:
    """Every problem of a checkpoint folder, each naming its file or tensor; none: it is intact."""
    try:
        _read(Path(path), keep_tensors=False)
    except DamagedFolder as error:
        return error.problems
    return []


def load(path: str | Path) -> Checkpoint:
    """Read a checkpoint and verify all of it, reading and hashing each file once. Raises
    DamagedFolder naming file and tensor."""
    return _read(Path(path), keep_tensors=True)


def checkpoints_in(run_dir: str | Path) -> list[Path]:
    """The checkpoint folders of a run, newest last, with those that a killed save had set aside
    and whose place is empty."""
    run_dir, steps = Path(run_dir), []
    for path in run_dir.iterdir() if run_dir.is_dir() else ():
        step = _step_of(path.with_name(files.former_name(path) or path.name))
        if step is not None and path.is_dir():
            steps.append((step, path))
    return [path for _, path in sorted(steps)]


def find_newest(run_dir: str | Path) -> tuple[Checkpoint, list[tuple[Path, str]]]:
    """The newest intact checkpoint, loaded, and, as (path, problem), the damaged ones that are
    newer. Each is read once.

    Raises PhiSightError when there is none.
    """
    damaged: list[tuple[Path, str]] = []
    tried: list[Path] | None = None
    # A run that is being trained replaces its checkpoint under our eyes: look again.
    while not damaged and (listed := checkpoints_in(run_dir)) != tried:
        for path in reversed(listed):
            try:
                return load(path), damaged
            except DamagedFolder as error:
                if path.exists():
                    damaged.append((path, error.problems[0]))
        tried = listed
    if damaged:
        newest, problem = damaged[0]
        raise PhiSightError(
            f"{run_dir}: no checkpoint is intact (the newest, {newest.name}: "
            f"{problem}); copy one from a backup or start again"
        )
    raise hub.no_run_in(run_dir)


def load_newest(run_dir: str | Path) -> Checkpoint:
    """The newest intact checkpoint of a run, with a warning on stderr for each newer one that is
    damaged. Raises PhiSightError when there is none."""
    checkpoint, damaged = find_newest(run_dir)
    for folder, problem in damaged:
        used = checkpoint.path.name
        print(f"warning: {folder} is not used: {problem}; using {used}", file=sys.stderr)
    return checkpoint


def load_best(run_dir: str | Path) -> Checkpoint:
    """The checkpoint of the lowest validation loss, of those that a run has kept. Raises
    PhiSightError when none was kept, or it is damaged."""
    newest = load_newest(run_dir)
    if (step := newest.trainer_state.get("best_step")) is None:
        raise PhiSightError(
            f"{run_dir}: keeps no best checkpoint; train with --keep-best or --early-stopping, or"
            f" name the run alone for its newest"
        )
    if step == newest.step:
        return newest
    path = Path(run_dir) / f"checkpoint-{step:06d}"
    try:
        return load(path)
    except DamagedFolder:
        if path.exists() or load_newest(run_dir).step == newest.step:
            raise
    return load_best(run_dir)  # a training has just found a better one


def resolve(path: str | Path) -> Checkpoint:
    """Load a checkpoint folder, the newest intact one of a run folder (with a warning on stderr
    for each newer one that is damaged), the best one, as RUN/best, or that of a run on the hub, as
    hf:owner/name[@revision]."""
    run = fetched(path)
    if run.name:
        try:
            return dataclasses.replace(load_newest(run.folder), published_as=run.name)
        except PhiSightError as error:
            again = f"remove {run.folder}, and it is fetched again"
            raise PhiSightError(f"{run.name}: not as it was fetched; {again} ({error})") from error
    path = run.folder
    if path.name == BEST and not path.exists():
        return load_best(path.parent)
    if path.is_symlink() and _step_of(path) is None:  # a person's own link to a checkpoint or run
        path = path.resolve()
    is_checkpoint = (path / MANIFEST).exists() or _step_of(path) is not None
    return load(path) if is_checkpoint else load_newest(path)


def fetched(run: str | Path) -> hub.Fetched:
    """The folder of a run: the one given, or that of hf:owner/name[@revision], which is fetched if
    it is not on this machine yet. Raises `PhiSightError`."""
    return hub_runs.fetch_run(run, published_files, verify_run)


# ---- runs and their logs -------------------------------------------------------------------------


def verify_run(run_dir: str | Path) -> dict[str, list[str]]:
    """Every problem of a run, by path: of each checkpoint, and of the log: is its chain whole, and
    do its digests and the checkpoints say the same?"""
    run_dir = Path(run_dir)
    problems: dict[str, list[str]] = {}
    log = run_dir / METRICS
    if log.exists():
        problems[str(log)] = chain_problems(read_metrics(log))
    for folder in checkpoints_in(run_dir):
        try:
            checkpoint = _read(folder, keep_tensors=False)
        except DamagedFolder as error:
            problems[str(folder)] = error.problems
            continue
        comparable = log.exists() and not problems[str(log)]
        problems[str(folder)] = log_problems(checkpoint, log) if comparable else []
    return problems


def diff(first: str | Path, second: str | Path) -> compare.Diff:
    """Compare two checkpoints, or the newest intact ones of two runs, to the bit; see
    `reports.compare`. Where both are runs, their logs tell when they parted. Raises PhiSightError
    when one cannot be loaded."""
    sides = [fetched(side).folder for side in (first, second)]
    logs = [side / METRICS for side in sides]
    a, b = map(resolve, sides)
    records = None
    if all(log.exists() for log in logs):
        records = (read_metrics(logs[0]), read_metrics(logs[1]))
    return compare.compare(a, b, OWNERS, records)


# ---- command line --------------------------------------------------------------------------------


def _newest_run() -> Path:
    """The run under runs/ whose newest checkpoint was written last."""
    runs = Path(located("runs"))
    newest = [paths[-1] for run in runs.glob("*") if (paths := checkpoints_in(run))]
    if not newest:
        raise PhiSightError(f"no checkpoint in {runs}; start one with {command('train.py')} ...")
    return max(newest, key=lambda path: path.stat().st_mtime).parent


def _verified(run: Path) -> Checkpoint:
    """The newest checkpoint of a run in which nothing is wrong. Raises PhiSightError."""
    for path, problems in verify_run(run).items():
        if problems and Path(path).exists():  # else a training has just removed it
            raise PhiSightError(f"{path}: {problems[0]}; copy it again from where it is whole")
    return load_newest(run)


def _pack(options: argparse.Namespace) -> str:
    run = fetched(options.run).folder
    if run.name == BEST or (run / MANIFEST).exists():
        raise PhiSightError(f"{run}: is a checkpoint; pack its run, {run.parent}")
    newest, parts, license = _verified(run), packing.chosen_parts(options), options.license or ""
    folders, records = checkpoints_in(run), records_of(newest)
    return packing.pack(newest, folders, records, options.out, parts, license)


def _verify_command(options: argparse.Namespace) -> int:
    target = fetched(options.target).folder
    if target.name == BEST and not target.exists():
        target = load_best(target.parent).path
    if not target.is_dir():
        raise PhiSightError(f"{target}: no such folder; name a run or a checkpoint")
    is_run = not (target / MANIFEST).exists() and bool(checkpoints_in(target))
    problems = verify_run(target) if is_run else {str(target): verify(target)}
    found = {"intact": not any(problems.values()), "problems": problems}
    print(json.dumps(found) if options.json else show.verified_text(problems))
    return 0 if found["intact"] else 1


def _by_layer(options: argparse.Namespace, saved: Checkpoint, *other: Checkpoint) -> layers.Changes:
    folder = options.base_folder or packing.packed_parts(saved.path.parent).get("base", "")
    return layers.changes(saved, *other, folder=folder)


def main(arguments: list[str] | None = None) -> int:
    """Exit code 0; 1 when two checkpoints differ or one is damaged; 2 on errors."""
    parser = configs.Parser(prog="checkpoints.py", description="Look into checkpoints.")
    commands = parser.add_subparsers(dest="command", required=True)
    about = "a run folder, a checkpoint folder, or hf:owner/name[@revision]"
    for name, nargs, targets, text in (
        ("show", "?", ["target"], "what a checkpoint holds"),
        ("verify", None, ["target"], "check every file and tensor"),
        ("diff", None, ["first", "second"], "compare two to the bit, or layer by layer"),
    ):
        command = commands.add_parser(name, help=text)
        for target in targets:
            command.add_argument(target, type=Path, nargs=nargs, help=about)
        command.add_argument("--json", action="store_true", help="print JSON")
    layers.add_flags(commands.choices["show"], commands.choices["diff"])
    packing.add_commands(commands)
    options = parser.parse_args(arguments)
    if options.command == "verify":
        return _verify_command(options)
    if options.command == "unpack":
        print(packing.unpack(options.archive, options.folder, _verified))
        return 0
    if options.command == "pack":
        print(_pack(options))
        return 0
    by_layer = options.by_layer or options.base_folder
    if options.command == "diff":
        both = options.first, options.second
        result = _by_layer(options, *map(resolve, both)) if by_layer else diff(*both)
        print(json.dumps(result.as_json()) if options.json else result)
        return 0 if result.identical else 1
    saved = resolve(options.target or _newest_run())
    told = _by_layer(options, saved) if by_layer else show.summarise(saved, OWNERS)
    print(json.dumps(told.as_json()) if options.json else told)
    return 0


if __name__ == "__main__":
    run_main(main)
