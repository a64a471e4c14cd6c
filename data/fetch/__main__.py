"""Get a data set: its JSON, and the pictures that are named in it.

python -m data.fetch llava-instruct-150k --images train2017 --fraction 0.05
"""

from __future__ import annotations

import argparse
import asyncio
import math
import re
import shlex
import shutil
from dataclasses import replace
from pathlib import Path
from urllib.parse import urlsplit

import httpx
from tqdm import tqdm

from alone import opened_alone
from config import Parser
from data import sources
from data.dataset import Quarantined
from data.fetch.client import Client, NotFetched, Patience
from data.fetch.parts import Part, sweep
from data.fetch.pictures import (
    NOT_FETCHED,
    STATE,
    Fetching,
    Sums,
    is_ours,
    not_there,
    sha256_of,
    write_not_fetched,
)
from data.fetch.sources import SOURCES, Source
from data.sources import read_conversations
from data.splits import Outline, take_fraction
from data.storage import RESERVE, existing_parent, size
from errors import PhiSightError, printable, run_main
from files import make_folder, whole_file
from paths import command

MOST_JSON_BYTES = 4 * 2**30  # of a JSON whose size is not known beforehand
MOST_CONNECTIONS, MOST_TRIES = 32, 100
LOCK = "lock"
AGAIN = "run again: what is whole is kept"


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The flags, checked as far as they can be before anything is asked for."""
    parser = Parser(
        prog="data.fetch",
        description=(__doc__ or "").splitlines()[0],
        epilog="\n\n".join(f"{name}\n{source.told()}" for name, source in SOURCES.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("data_set", choices=sorted(SOURCES), help="which data set; see below")
    add("--images", type=Path, required=True, help="folder for the pictures")
    add("--data", type=Path, help="file for the JSON (default: its own name, here)")
    add("--fraction", type=float, default=1.0, help="share of them, chosen as by --data-fraction")
    add("--seed", type=int, default=0, help="of the training that is to use them")
    add("--connections", type=int, default=8, help="pictures that are fetched at a time")
    add("--limit-rate", type=float, default=0.0, help="megabytes a second at most; 0: any")
    add("--tries", type=int, default=Patience().tries, help="times that a file is asked for")
    add("--json-url", help="another place of the same JSON")
    add("--pictures-url", help="another place of the pictures' folder")
    add("--sha256", help="of another JSON that is meant, 64 hexadecimal digits")
    options = parser.parse_args(arguments)
    source = SOURCES[options.data_set]
    options.data = options.data or Path(source.json_name)
    take_fraction([], options.fraction, options.seed)  # refuses what it cannot be
    _need_whole("--connections", options.connections, MOST_CONNECTIONS)
    _need_whole("--tries", options.tries, MOST_TRIES)
    if not (math.isfinite(options.limit_rate) and options.limit_rate >= 0):
        raise PhiSightError(f"--limit-rate {options.limit_rate}: must be 0 or more; give megabytes")
    if options.sha256 and not re.fullmatch("[0-9a-f]{64}", options.sha256):
        raise PhiSightError("--sha256: is not 64 hexadecimal digits; copy it whole")
    options.json_url = options.json_url or source.json_url
    folder = options.pictures_url or source.pictures_url
    _need_address("--json-url", options.json_url, "#")
    _need_address("--pictures-url", folder, "?#")
    options.pictures_url = folder.rstrip("/") + "/"
    return options


def _need_whole(flag: str, value: int, most: int) -> None:
    if not 1 <= value <= most:
        raise PhiSightError(f"{flag} {value}: out of range; give 1 to {most}")


def _need_address(flag: str, given: str, without: str) -> None:
    """Refuse what could only be found wrong at the first request."""
    try:
        url = httpx.URL(given)
        sound = url.scheme in ("http", "https") and bool(urlsplit(given).hostname)
    except (httpx.InvalidURL, ValueError):
        sound = False
    if not sound or any(mark in given for mark in without):
        raise PhiSightError(
            f"{flag} {printable(given, 100)}: not a web address that can be used; give one that"
            f" begins with http:// or https:// and has no {' or '.join(without)} in it"
        )


# -- the JSON -------------------------------------------------------------------------------------


def get_json(options: argparse.Namespace, source: Source, patience: Patience) -> None:
    """The JSON is at its place, and is the one that is meant. Raises `PhiSightError`."""
    path, sha256 = options.data, options.sha256 or source.json_sha256
    shown = printable(path)
    if path.exists():
        if (found := sha256_of(path)) != sha256:
            raise PhiSightError(
                f"{shown}: is there and is another file than the data set's; give another --data,"
                f" or --sha256 {found} if this one is meant"
            )
        print(f"{shown}: is there")
        return
    expected = source.json_bytes if sha256 == source.json_sha256 else 0
    check_room(options.images, 2 * expected, "the JSON")
    check_room(path.parent, expected, "the JSON")
    part = Part(options.images / STATE, options.json_url)
    try:
        asyncio.run(_receive_json(options, part, sha256, expected, patience))
    except NotFetched as error:
        raise PhiSightError(
            f"{printable(options.json_url, 200)}: {error}; try again later, or name another place"
            " with --json-url"
        ) from None
    make_folder(path.parent)
    with whole_file(path) as temporary:  # which may be on another disk than the pictures
        shutil.copyfile(part.path, temporary)
    part.clear()
    print(f"{shown}: fetched, {size(path.stat().st_size)}")


async def _receive_json(
    options: argparse.Namespace, part: Part, sha256: str, expected: int, patience: Patience
) -> None:
    """`expected`: the bytes that it has; 0 where that is not known."""

    def problem_of(path: Path) -> str:
        return "" if sha256_of(path) == sha256 else "its sha256 is not the one that it must have"

    async with Client(1, options.limit_rate * 1e6, patience) as client:
        name = options.data.name
        with tqdm(
            total=expected or None, desc=name, unit="B", unit_scale=True, disable=None
        ) as bar:
            await client.fetch(
                options.json_url,
                part,
                expected or MOST_JSON_BYTES,
                problem_of,
                lambda length: bar.update(length - bar.n),
            )


# -- the pictures ---------------------------------------------------------------------------------


def wanted(options: argparse.Namespace) -> list[str]:
    """The pictures that a training with this --data-fraction and --seed needs, in the order of the
    file, and a line that says so."""
    set_aside: list[Quarantined] = []
    shared: dict[str, str] = {}  # conversations share pictures: each name is held once
    everything = [
        Outline(record, 0, each.id, tuple(shared.setdefault(name, name) for name in each.images))
        for record, each in read_conversations(sources.Source(options.data), set_aside)
    ]
    used = take_fraction(everything, options.fraction, options.seed)
    names = list(dict.fromkeys(name for outline in used for name in outline.images))
    aside = f"; {len(set_aside):,} records cannot be used" if set_aside else ""
    print(
        f"{len(names):,} pictures in {len(used):,} of {len(everything):,} conversations"
        f" (--fraction {options.fraction:g} --seed {options.seed}){aside}"
    )
    return names


def get_pictures(options: argparse.Namespace, source: Source, patience: Patience) -> int:
    """Fetch what is wanted and not there. Returns how many pictures could not be had."""
    folder: Path = options.images
    names = wanted(options)
    refused = {name: "is the name of a file of data.fetch" for name in names if is_ours(name)}
    names = [name for name in names if name not in refused]
    missing = not_there(folder, names)
    need = len(missing) * source.picture_bytes
    check_room(folder, need, f"{len(missing):,} pictures")
    print(f"{len(names) - len(missing):,} are there, {len(missing):,} to fetch: about {size(need)}")
    sums, absent = Sums(folder), set(missing)
    sums.complete(folder, (name for name in names if name not in absent), absent)

    async def get() -> Fetching:
        async with Client(options.connections, options.limit_rate * 1e6, patience) as client:
            fetching = Fetching(client, folder, options.pictures_url, sums)
            await fetching.all(missing, options.connections)
            return fetching

    fetching = asyncio.run(get())
    sums.write()
    lost = refused | fetching.reasons
    write_not_fetched(folder, options.pictures_url, lost)
    list_of_lost = f": {printable(folder / NOT_FETCHED)}" if lost else ""
    print(
        f"{printable(folder)}: {fetching.fetched:,} fetched ({size(fetching.bytes)}),"
        f" {len(lost):,} could not be had{list_of_lost}"
    )
    return len(lost)


def check_room(folder: Path, need: int, what: str) -> None:
    """Raise `PhiSightError` if the disk is too small."""
    free = shutil.disk_usage(existing_parent(folder)).free
    if need + RESERVE > free:
        raise PhiSightError(
            f"{printable(folder)}: too little room for {what} (about {size(need)}; {size(free)}"
            " free); free some, give another folder, or a smaller --fraction"
        )


def main(arguments: list[str] | None = None, patience: Patience = Patience()) -> int:
    """The command line; exit code 1 if a picture could not be had."""
    options = parse(arguments)
    source, folder = SOURCES[options.data_set], options.images
    patience = replace(patience, tries=options.tries)
    print(source.told())
    try:
        make_folder(folder / STATE)
        with opened_alone(folder / STATE / LOCK, "--images"):
            get_json(options, source, patience)
            lost = get_pictures(options, source, patience)
            sweep(folder / STATE, noted=not lost)
    except OSError as error:
        name = printable(error.filename or folder, 200)
        raise PhiSightError(f"{name}: {error.strerror or error}; mend that, and {AGAIN}") from error
    flags = f" --data-fraction {options.fraction:g}" * (options.fraction < 1)
    flags += f" --seed {options.seed}" * bool(options.seed)
    data, images = (printable(shlex.quote(str(path))) for path in (options.data, folder))
    print(
        f"train on it: {command('train.py')} --preset phi35 --data {data} --images {images}{flags}"
    )
    return 1 if lost else 0


if __name__ == "__main__":
    run_main(main)
