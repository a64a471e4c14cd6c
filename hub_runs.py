"""A run on the hub: which files of a repository it is, and whether they are right."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from errors import PhiSightError
from hub import Fetched, File, Reference, Wanted, check_size, fetch, home_of, is_reference, parse

DEFAULT_MAX_MIB = 4096  # an adapter of Phi-3.5 of rank 16 on all layers has 100
MAX_LISTED = 10_000  # files in a repository; those of a run are a dozen

Verify = Callable[[Path], Mapping[str, Sequence[str]]]


def fetch_run(
    run: str | Path,
    choose: Callable[[Sequence[str]], list[str]],
    verify: Verify,
) -> Fetched:
    """The folder of a run: the one given, or one of the hub, as `hub.fetch` fetches it.

    Args:
        choose: which of the names in a repository are the run's.
        verify: what was fetched -> its problems, by path.
    """
    if not is_reference(run):
        return Fetched(Path(run))
    reference = parse(run)
    wanted = Wanted(
        "model",
        home_of(reference.repository),
        lambda files: _of_a_run(reference, files, choose),
        lambda folder, files: _problem_of(folder, verify),
    )
    return fetch(reference, wanted)


def _of_a_run(
    reference: Reference, files: Sequence[File], choose: Callable[[Sequence[str]], list[str]]
) -> list[File]:
    """The files of a run, all checked before the first is fetched. Raises `PhiSightError`."""
    if len(files) > MAX_LISTED:
        raise PhiSightError(
            f"{reference}: has {len(files):,} files, where a published run has a dozen; name one"
            " that export.py --push made"
        )
    names = set(choose([file.name for file in files]))
    if not names:
        raise PhiSightError(
            f"{reference}: holds no run (no checkpoint-NNNNNN/MANIFEST.json); name one that"
            " export.py --push made"
        )
    chosen = [file for file in files if file.name in names]
    check_size(reference, chosen, "its run", DEFAULT_MAX_MIB)
    return chosen


def _problem_of(folder: Path, verify: Verify) -> str:
    """What is wrong with a run that was fetched into a folder that goes; "" for nothing."""
    try:
        problem = next((problem for each in verify(folder).values() for problem in each), "")
    except PhiSightError as error:  # of a log that cannot be read at all
        problem = str(error).replace(f"{folder}{os.sep}", "").partition(";")[0]
    return problem and f"is not as its manifest says, and was not kept ({problem})"
