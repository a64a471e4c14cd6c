"""A folder into a repository of the hub: in one commit, and read back.

The token is the one that `hf auth login` stored, or HF_TOKEN; it is never named on a command line
and never printed. Large files go up first, where nobody sees them, and the commit that names them
all is the last request, so that the repository shows what it showed before or the whole folder.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import hub
from checkpoint_state import CHECKPOINT
from errors import PhiSightError, printable
from exports.folder import GENERATION_CONFIG
from exports.peft_config import CONFIG, WEIGHTS
from exports.published import CERTIFICATE, CURVES
from files import open_regular
from hub import File
from manifest import MANIFEST, files_below
from reports.log import METRICS

if TYPE_CHECKING:
    from huggingface_hub import HfApi

CHUNK = 2**20
# What --push puts beside a checkpoint: what of it the new run has not is of the one before.
_BESIDE = {METRICS, CURVES, CERTIFICATE, WEIGHTS, CONFIG, GENERATION_CONFIG}
_OF_A_RUN = re.compile(rf"{CHECKPOINT}/.+")
# What a repository may have that holds nothing yet; the hub makes the first with it.
_OF_NOBODY = re.compile(r"\.gitattributes|README\.md|LICENSE[\w.]*")
LOG_IN = "log in with `hf auth login` and a token that may write"


def files_of(folder: Path) -> list[File]:
    """Every file below a folder, with the sha256 and git's name of its bytes."""
    files = []
    for name in files_below(folder):
        sha256 = hashlib.sha256()
        with open_regular(folder / name, follow_links=False) as file:
            size = os.fstat(file.fileno()).st_size
            blob = hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False)
            while chunk := file.read(CHUNK):
                sha256.update(chunk)
                blob.update(chunk)
        files.append(File(name, size, sha256.hexdigest(), blob.hexdigest()))
    return files


def account() -> str:
    """Whose token this machine has. Raises `PhiSightError` if it has none, or an invalid one."""
    from huggingface_hub import HfApi, errors

    try:
        with hub.quiet():
            said = HfApi().whoami()
    except errors.LocalTokenNotFoundError as error:
        raise PhiSightError(f"--push: this machine has no token of the hub; {LOG_IN}") from error
    except hub.failures() as error:
        if hub.status_of(error) == 401:
            raise PhiSightError(f"--push: the hub does not know this token; {LOG_IN}") from error
        reason, remedy = hub.reason_of(error)
        raise PhiSightError(f"--push: who you are: {reason}; {remedy}") from error
    name = said.get("name") if isinstance(said, dict) else None
    if not isinstance(name, str):
        raise PhiSightError(f"--push: the hub does not say whose token this is; {LOG_IN}")
    return name


def upload(
    repository: str,
    folder: Path,
    files: Sequence[File],
    *,
    branch: str,
    message: str,
    private: bool,
    user: str,
) -> str:
    """Put the files of a folder into a repository, which is made if it is not there, and compare
    what it then says it holds. What an earlier push put there and this one lacks, such as another
    checkpoint, is removed in the same commit.

    Args:
        branch: "" for the main one; another is made if it is not there.
        private: of a repository that is made; one that is there has to be so already.
        user: as `account` says it.

    Returns:
        The commit.

    Raises:
        PhiSightError: with the reason and a remedy.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    api = HfApi()
    with hub.quiet(), _refusals(repository, user):
        parent, known = _prepared(api, repository, branch, private)
        ours = {file.name for file in files}
        operations: list[CommitOperationAdd | CommitOperationDelete] = [
            CommitOperationDelete(file.name)
            for file in known
            if (_OF_A_RUN.fullmatch(file.name) or file.name in _BESIDE) and file.name not in ours
        ]
        operations += [CommitOperationAdd(name, folder / name) for name in sorted(ours)]
        commit = api.create_commit(
            repository,
            operations,
            commit_message=message,
            revision=branch or None,
            parent_commit=parent,
        ).oid
        found = {file.name: file for file in hub.listing(repository, commit)[2]}
    if wrong := [*_differences(files, found)]:
        more = f" and {len(wrong) - 1} more" if len(wrong) > 1 else ""
        raise PhiSightError(
            f"{repository}: commit {commit} is there, but {wrong[0]}{more}; run it again, and look"
            f" into the repository's settings if that is the same"
        )
    return commit


def _prepared(api: HfApi, repository: str, branch: str, private: bool) -> tuple[str, list[File]]:
    """The commit to put ours on, and the files that it has."""
    from huggingface_hub import errors

    try:
        commit, is_private, files = hub.listing(repository, None)
    except errors.RepositoryNotFoundError:
        api.create_repo(repository, private=private)
        commit, is_private, files = hub.listing(repository, None)
    if private and not is_private:
        raise PhiSightError(
            f"{repository}: is public; make it private in its settings on the hub, or leave out"
            " --private"
        )
    if branch:
        try:
            commit, _, files = hub.listing(repository, branch)
        except errors.RevisionNotFoundError:
            api.create_branch(repository, branch=branch)
    names = [file.name for file in files]
    others = [n for n in names if not _OF_NOBODY.fullmatch(n) and not _OF_A_RUN.fullmatch(n)]
    if others and not any(_OF_A_RUN.fullmatch(n) and n.endswith(f"/{MANIFEST}") for n in names):
        raise PhiSightError(
            f"{repository}: holds something else already ({printable(others[0], 100)}), and no run;"
            " give another name, or empty it on the hub"
        )
    return commit, files


def _differences(wanted: Sequence[File], found: dict[str, File]) -> Iterator[str]:
    """What the hub says of the files that is not so."""
    for file in wanted:
        there = found.get(file.name)
        if there is None:
            yield f"{file.name} is not in it"
        elif there.size != file.size:
            yield f"{file.name} has {there.size:,} bytes there and {file.size:,} here"
        # Of what lies in its large storage the hub says the sha256, of others git's name.
        elif (there.sha256 or there.blob) != (file.sha256 if there.sha256 else file.blob):
            yield f"{file.name} has another hash there"


@contextmanager
def _refusals(repository: str, user: str) -> Iterator[None]:
    """Whatever the hub refuses, and a connection that breaks, as one `PhiSightError`."""
    try:
        yield
    except hub.failures() as error:
        status = hub.status_of(error)
        if status == 401:
            reason, remedy = "the hub does not take this token", LOG_IN
        elif status == 403:
            reason = f"the hub does not let {printable(user, 100)} write there"
            remedy = (
                f"give a name under your own, as {printable(user, 100)}/NAME, or {LOG_IN} there"
            )
        elif status == 409:
            reason = "it is there already, and the hub does not show it to you"
            remedy = "give another name"
        elif status == 412:
            reason, remedy = "somebody else changed it meanwhile", "run it again"
        else:
            reason, _ = hub.reason_of(error)
            remedy = "it shows what it showed before, or all of this; run it again"
        raise PhiSightError(f"{repository}: not published: {reason}; {remedy}") from error
