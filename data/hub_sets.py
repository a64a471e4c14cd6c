"""Data sets of the Hugging Face hub: `hf:owner/name[/file-or-folder][@revision]`.

Of a repository only the files are fetched that `data.containers` reads, and the pictures that those
may name; what is kept back for validation or testing stays there. A branch is followed once: a run
keeps the commit that it was, so that it goes on with the very same files. Each file is compared
with the size and the hash that the hub lists for that commit before the folder gets its name, and
the folder is then what is read, with a network or without.

Pictures that are files of the repository are known as `#hub/DATA-SET/COMMIT/NAME`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import hub
from archive import check_names
from data.containers import folders
from data.pictures import HUB, hub_folder
from errors import PhiSightError, printable
from files import CHUNK, open_regular
from paths import HUB_RUN

DEFAULT_MAX_MIB = 65_536
MAX_LISTED = 200_000  # files in a repository
EXAMPLE = "write hf:owner/name, hf:owner/name/FILE-OR-FOLDER or hf:owner/name@REVISION"


@dataclass(frozen=True)
class DataSet:
    """A data set of the hub on this machine."""

    folder: Path
    """with all that was fetched of the repository"""
    path: Path
    """what is read: the folder, or what was named in it"""
    name: str
    """hf:owner/name[/file-or-folder]@commit"""
    mark: str
    """what the names of its pictures begin with"""


def parse(name: str) -> hub.Reference:
    """What `hf:owner/name[/path][@revision]` names. Raises `PhiSightError`."""
    named, at, revision = name.removeprefix(HUB_RUN).partition("@")
    owner, _, rest = named.partition("/")
    repository, slash, path = rest.partition("/")
    shown = printable(name, 120)
    hub.check_repository(f"{owner}/{repository}", shown, EXAMPLE)
    if slash:
        try:
            check_names([path], lambda name: "")
        except PhiSightError as error:
            raise PhiSightError(f"{shown}: {error}; {EXAMPLE}") from None
    if at:
        hub.check_revision(revision, shown)
    return hub.Reference(f"{owner}/{repository}", revision, path)


def data_set(name: str) -> DataSet:
    """A data set, which is fetched if it is not on this machine yet.

    Raises `PhiSightError` as `hub.fetch` does, and where it holds nothing that is read.
    """
    reference = parse(name)
    kept_as = reference.repository.replace("/", "--")
    if reference.path:
        kept_as += "--" + hub.as_file(reference.path)
    wanted = hub.Wanted(
        "dataset", hub_folder() / kept_as, lambda files: _chosen(reference, files), _problem_of
    )
    found = hub.fetch(reference, wanted)
    mark = f"{HUB}/{kept_as}/{found.folder.name}"
    return DataSet(found.folder, found.folder / reference.path, found.name, mark)


def _chosen(reference: hub.Reference, files: Sequence[hub.File]) -> list[hub.File]:
    """The files to fetch, all checked before the first is. Raises `PhiSightError`."""
    try:
        if len(files) > MAX_LISTED:
            raise PhiSightError(f"has {len(files):,} files; name one of them, or a folder")
        inner = f"{reference.path}/"
        below = [file.name for file in files if file.name.startswith(inner)]
        if not reference.path:
            names = _wanted([file.name for file in files])
        elif below:
            names = {inner + name for name in _wanted([n.removeprefix(inner) for n in below])}
        else:
            names = {reference.path}
    except PhiSightError as error:
        raise PhiSightError(f"{reference}: {error}") from None
    try:
        check_names(sorted(names), lambda name: "")
    except PhiSightError as error:
        raise PhiSightError(f"{reference}: {error}; tell its owner") from None
    chosen = [file for file in files if file.name in names]
    if not chosen:
        raise PhiSightError(f"{reference}: there is no such file or folder; check the name")
    hub.check_size(reference, chosen, "what would be read of it", DEFAULT_MAX_MIB)
    return chosen


def _wanted(names: Sequence[str]) -> set[str]:
    what = folders.plan(names)
    return {*what.read, *what.beside}


def _problem_of(folder: Path, files: Sequence[hub.File]) -> str:
    """The first file that is not what the hub listed; "" where all are."""
    for file in files:
        own = hashlib.sha256() if file.sha256 else hashlib.sha1(b"blob %d\0" % file.size)
        try:
            with open_regular(folder / file.name) as content:
                while piece := content.read(CHUNK):
                    own.update(piece)
        except OSError as error:
            return f"its file {printable(file.name, 100)} cannot be read ({error.strerror})"
        if own.hexdigest() != (file.sha256 or file.blob):
            return (
                f"its file {printable(file.name, 100)} has other bytes than the hub says, and was"
                " not kept"
            )
    return ""
