"""The Hugging Face hub: where a model lies, and runs that are named `hf:owner/name[@revision]`.
Data sets are fetched by the same means, see `data.hub_sets`.

A model (a base, an encoder, a tokenizer) is the folder that a person names, or a snapshot in the
hub's own cache.

A run is fetched into a folder of its own, `phisight/` beside the hub's cache, and not read from
that cache, for two reasons: the cache holds links, where a checkpoint holds regular files alone;
and what it has downloaded it believes, whereas here a folder gets its name only once every file in
it has been compared with the manifest, so that wrong bytes are gone with the error that tells of
them. Only the files of a run are asked for, by their names; others are left where they are.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import logging
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from urllib.parse import quote

from errors import PhiSightError, printable
from fields import shown
from files import put_in_place, read_regular, sync_tree, write_whole
from paths import HUB_RUN, command, is_typed_as_path

TOKENIZER_LAYOUT = "tokenizer.json and tokenizer_config.json"
TOKENIZER_FILES = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
)
MAX_MIB = "PHISIGHT_HUB_MAX_MIB"  # the setting of how large a run may be that is fetched
SECONDS = 20.0  # to wait for the hub's answer about a repository

SILENCE = 120.0  # seconds of a connection on which nothing comes, after which it counts as broken

_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9_][\w.-]{0,95}", re.ASCII)
_REVISION = re.compile(r"\w[\w.+/-]{0,249}", re.ASCII)
COMMIT = re.compile(r"[0-9a-f]{40}")
_OF_THE_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)  # which name no file


# -- models ---------------------------------------------------------------------------------------


def find_folder(
    id_or_folder: str | Path,
    revision: str | None,
    what: str,
    layout: str,
    wanted: Sequence[str],
) -> Path:
    """The local folder of a model: the one given, or a snapshot that is downloaded or is in the
    hub's cache. HF_HUB_OFFLINE is respected.

    `what` names the model's part in errors, `layout` the files of a folder that would do instead,
    and `wanted` are the patterns of what is downloaded. Raises `PhiSightError` if there is none.
    """
    folder = Path(id_or_folder)
    if folder.is_dir():
        return folder
    name = str(id_or_folder)
    if folder.exists() or is_typed_as_path(name):
        raise PhiSightError(f"{what} {name}: there is no such folder; give one with {layout}")
    return _snapshot(name, revision, what, layout, wanted)


def _snapshot(
    name: str, revision: str | None, what: str, layout: str, wanted: Sequence[str]
) -> Path:
    import huggingface_hub  # 0.1 s, and no use where a folder is given
    from huggingface_hub import constants

    try:
        return Path(
            huggingface_hub.snapshot_download(name, revision=revision, allow_patterns=list(wanted))
        )
    except failures() as error:
        reason = first_line(error)
        if constants.is_offline_mode():
            reason = "HF_HUB_OFFLINE is set, and the hub's cache on this machine lacks it"
        raise PhiSightError(
            f"{what} {name}: it is not a folder and the hub did not give it ({reason}); "
            f"download it elsewhere and give a folder with {layout}"
        ) from error


# -- what can go wrong ----------------------------------------------------------------------------


def failures() -> tuple[type[Exception], ...]:
    """Every network, cache and naming error of the hub; most of its own are OSError or
    ValueError, and RuntimeError says which file the one behind it is about."""
    from huggingface_hub import errors

    return (
        OSError,
        RuntimeError,
        ValueError,
        errors.HTTPError,
        errors.EntryNotFoundError,
        errors.RevisionResolutionError,
        errors.CachedRepoTreeNotFoundError,
        errors.XetDownloadError,
    )


def first_line(error: BaseException) -> str:
    """What an error says, or what it is where it says nothing."""
    return printable((str(error).strip().splitlines() or [type(error).__name__])[0], 200)


def status_of(error: BaseException) -> int | None:
    """The HTTP status that the hub answered with; None where it did not answer."""
    for one in (error, error.__cause__):
        status = getattr(getattr(one, "response", None), "status_code", None)
        if isinstance(status, int):
            return status
    return None


def reason_of(error: BaseException) -> tuple[str, str]:
    """Why a repository was not given, and what can be done."""
    from huggingface_hub import errors

    log_in = "check the name, or log in with `hf auth login` if it is private"
    again = "try again; the files that came whole are kept"
    if isinstance(error, errors.GatedRepoError):
        return "its owner gives it to some people only", "ask there, and log in: `hf auth login`"
    if isinstance(error, errors.RepositoryNotFoundError):
        return "the hub has no such repository, or does not show it to you", log_in
    if isinstance(error, errors.RevisionNotFoundError):
        return "the repository has no such revision", "name a branch, a tag or a commit that it has"
    if isinstance(error, OSError) and (error.filename or error.errno in _OF_THE_DISK):
        return f"it cannot be kept here ({error})", "make room, or set HF_HOME to another folder"
    if status := status_of(error):
        return f"the hub answered with status {status}", (log_in if status < 500 else again)
    return f"the hub did not give it ({first_line(error.__cause__ or error)})", again


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without the hub's own messages, which tell of other tries in lines of their own; without its
    progress bars where nobody watches; and without waiting for ever."""
    from huggingface_hub import get_session
    from huggingface_hub.utils import disable_progress_bars, enable_progress_bars

    get_session().timeout = SILENCE  # by itself it would wait for ever
    log = logging.getLogger("huggingface_hub")
    level, bars = log.level, not sys.stderr.isatty()
    log.setLevel(logging.CRITICAL)
    if bars:
        disable_progress_bars()
    try:
        yield
    finally:
        log.setLevel(level)
        if bars:
            enable_progress_bars()


# -- a run on the hub -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Reference:
    """A run or a data set on the hub: `hf:owner/name[/path][@revision]`."""

    repository: str
    """owner/name"""
    revision: str = ""
    """a branch, a tag or a commit; "" for the newest"""
    path: str = ""
    """a file or a folder of a data set; "" for all of it"""

    def __str__(self) -> str:
        named = f"{self.repository}/{self.path}" if self.path else self.repository
        return f"{HUB_RUN}{named}" + (f"@{self.revision}" if self.revision else "")


@dataclass(frozen=True)
class File:
    """What the hub says of a file."""

    name: str
    size: int
    """bytes"""
    sha256: str | None
    """of a file in its large storage"""
    blob: str
    """git's name of what it holds, for a file that git itself stores"""


@dataclass(frozen=True)
class Wanted:
    """What is fetched of a repository, and where it is kept."""

    kind: str
    """of repository, as the hub calls it: model or dataset"""
    home: Path
    """a folder, in which each commit has one"""
    choose: Callable[[Sequence[File]], list[File]]
    """the files to fetch of those that are there; raises `PhiSightError`"""
    problem_of: Callable[[Path, Sequence[File]], str]
    """what is wrong with the files of a folder that were fetched, and are not kept; "" for
    nothing"""


@dataclass(frozen=True)
class Fetched:
    """A run or a data set on this machine."""

    folder: Path
    name: str = ""
    """hf:owner/name@commit; "" for one that was here from the first"""


def is_reference(run: str | Path) -> bool:
    """Whether this names a run on the hub."""
    return str(run).startswith(HUB_RUN)


def no_run_in(folder: str | Path) -> PhiSightError:
    """What to tell a person who named a folder without a checkpoint for a run."""
    said, folder = f"no checkpoint in {printable(folder, 250)}", Path(folder)
    if (folder / "space.json").is_file():
        return PhiSightError(f"{said}, which is a Space; name the run in it: {folder / 'run'}")
    if (folder / "MANIFEST.json").is_file():
        return PhiSightError(f"{said}, which is a checkpoint itself; name its run: {folder.parent}")
    exported = ("generation_config.json", "adapter_config.json", "Modelfile")
    if any((folder / name).is_file() for name in exported):
        return PhiSightError(
            f"{said}, which is a model for other programs; name the run it was made of, or bring an"
            f" adapter in with {command('export.py')} --import-peft"
        )
    start = f"start one with {command('train.py')} ..."
    if _REPOSITORY.fullmatch(str(folder)) and not folder.exists():
        start += f", or write hf:{folder} if it is on the hub"
    return PhiSightError(f"{said}; {start}")


def parse(run: str | Path) -> Reference:
    """What `hf:owner/name[@revision]` names. Raises `PhiSightError` before any network is used."""
    name, at, revision = str(run).removeprefix(HUB_RUN).partition("@")
    check_repository(name, printable(run, 120), "write hf:owner/name or hf:owner/name@revision")
    if at:
        check_revision(revision, printable(run, 120))
    return Reference(name, revision)


def is_repository(name: str) -> bool:
    """Whether a text can be the name of a repository, owner/name."""
    wrong = not _REPOSITORY.fullmatch(name) or any(part in name for part in ("--", ".."))
    return not wrong and not any(part.endswith((".git", "-", ".")) for part in name.split("/"))


def check_repository(name: str, what: str, remedy: str) -> None:
    """Raise `PhiSightError` unless `name` can be a repository, owner/name."""
    if not is_repository(name):
        raise PhiSightError(
            f"{what}: {shown(name)} cannot be a repository, whose name has letters, digits and"
            f" single - _ . in it; {remedy}"
        )


def check_revision(revision: str, what: str) -> None:
    """Raise `PhiSightError` unless this can be a branch, a tag or a commit."""
    if not _REVISION.fullmatch(revision) or ".." in revision or "//" in revision:
        raise PhiSightError(
            f"{what}: {shown(revision)} cannot be a branch, a tag or a commit; name one that can,"
            " or leave it out"
        )


def model_name(source: str) -> str:
    """What people call the model of a run: the repository's name, or that of the run's folder.
    `source`: a checkpoint's path, or `hf:owner/name@commit`."""
    return parse(source).repository if is_reference(source) else Path(source).parent.name


def listing(
    repository: str, revision: str | None, kind: str = "model"
) -> tuple[str, bool, list[File]]:
    """(commit, private, files) of a repository as the hub says it. Raises one of `failures()`."""
    from huggingface_hub import HfApi

    try:
        ask = HfApi().dataset_info if kind == "dataset" else HfApi().model_info
        info = ask(repository, revision=revision, files_metadata=True, timeout=SECONDS)
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError("its answer is not that of a hub") from error
    if not isinstance(info.sha, str) or not COMMIT.fullmatch(info.sha):
        raise ValueError(f"it calls its commit {shown(info.sha)}")
    files = []
    for one in info.siblings or []:
        large = one.lfs
        sha256 = large.sha256 if large else None
        size = large.size if large else one.size
        sound = type(size) is int and size >= 0 and isinstance(one.rfilename, str)
        if not sound or not isinstance(sha256, str | None) or not isinstance(one.blob_id, str):
            raise ValueError(f"it says no size or hash of {shown(one.rfilename)}")
        files.append(File(one.rfilename, size or 0, sha256, one.blob_id))
    return info.sha, bool(info.private), files


def home_of(name: str) -> Path:
    """Where what is fetched of a repository is kept."""
    from huggingface_hub import constants

    return Path(constants.HF_HOME) / "phisight" / name.replace("/", "--")


def fetch(reference: Reference, wanted: Wanted) -> Fetched:
    """A folder with what is wanted of a repository.

    A commit that is here already is not asked for again; with HF_HUB_OFFLINE, a branch is what it
    was when the hub was last asked.

    Raises:
        PhiSightError: with the reason, and a remedy; no folder has got a name then.
    """
    from huggingface_hub import constants

    home = wanted.home
    named = home / "refs" / as_file(reference.revision or "main")
    if COMMIT.fullmatch(reference.revision) and (home / reference.revision).is_dir():
        return Fetched(home / reference.revision, str(reference))
    if constants.is_offline_mode():
        if not (known := _known(home, named)):
            raise PhiSightError(
                f"{reference}: HF_HUB_OFFLINE is set, and it was never fetched to this machine;"
                " unset it, or name a folder"
            )
        return Fetched(home / known, str(replace(reference, revision=known)))
    try:
        with quiet():
            commit, _, files = listing(
                reference.repository, reference.revision or None, wanted.kind
            )
            if COMMIT.fullmatch(reference.revision) and commit != reference.revision:
                raise ValueError(f"it gives another commit for it, {commit}")
            pinned = replace(reference, revision=commit)
            if not (home / commit).is_dir():
                _download(pinned, wanted, wanted.choose(files))
        if _known(home, named) != commit:  # else the folder may be one that is only read
            named.parent.mkdir(parents=True, exist_ok=True)
            write_whole(named, commit.encode())
    except failures() as error:
        reason, remedy = reason_of(error)
        if status_of(error) is None and _known(home, named):
            remedy = (
                f"try again, or set HF_HUB_OFFLINE=1 for what was fetched: {_known(home, named)}"
            )
        raise PhiSightError(f"{reference}: {reason}; {remedy}") from error
    return Fetched(home / commit, str(pinned))


def as_file(revision: str) -> str:
    """A branch or a tag as the name of a file, which is shorter than what the hub takes."""
    name = quote(revision, safe="")
    return name if len(name) <= 200 else hashlib.sha256(name.encode()).hexdigest()


def _known(home: Path, named: Path) -> str:
    """The commit that a branch or a tag was, if it is on this machine; else ""."""
    try:
        commit = read_regular(named, 100).decode("ascii")
    except (OSError, ValueError):
        return ""
    return commit if COMMIT.fullmatch(commit) and (home / commit).is_dir() else ""


def check_size(reference: Reference, files: Sequence[File], what: str, most: int) -> None:
    """Raise `PhiSightError` where files have more than `most` MiB, unless a setting says more."""
    text = os.environ.get(MAX_MIB, str(most))
    if not re.fullmatch("[0-9]{1,9}", text):
        raise PhiSightError(f"{MAX_MIB}: {shown(text)} is not a whole number of MiB; mend it")
    size = sum(file.size for file in files)
    if size > int(text) * 2**20:
        raise PhiSightError(
            f"{reference}: {what} has {size / 2**20:,.0f} MiB, and at most {int(text):,} are"
            f" fetched; if you expect that much, say so: {MAX_MIB}={size // 2**20 + 1}"
        )


def _download(pinned: Reference, wanted: Wanted, files: Sequence[File]) -> None:
    """Fetch the files of a commit into a folder that is named once it is right. Where a connection
    breaks, those that came whole are kept for the next time; what is wrong is removed."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.utils import WeakFileLock

    home = wanted.home
    final, partial = home / pinned.revision, home / f".partial-{pinned.revision}"
    home.mkdir(parents=True, exist_ok=True)
    with WeakFileLock(home / ".lock"):
        if final.is_dir():  # another process was quicker
            return
        for file in files:
            hf_hub_download(
                pinned.repository,
                file.name,
                repo_type=wanted.kind,
                revision=pinned.revision,
                local_dir=partial,
                etag_timeout=SECONDS,
            )
        shutil.rmtree(partial / ".cache", ignore_errors=True)  # what the hub noted meanwhile
        if problem := wanted.problem_of(partial, files):
            shutil.rmtree(partial)
            raise PhiSightError(
                f"{pinned}: {problem}; fetch it again, and if that is the same, tell its owner"
            )
        sync_tree(partial)
        put_in_place(partial, final)
