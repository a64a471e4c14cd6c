"""Folders: shards read one after the other, a saved data set of the hub, pictures with captions.

- `state.json` and `dataset_dict.json` stand in what `datasets.save_to_disk` wrote.
- `metadata.jsonl`, `metadata.csv` or `metadata.parquet` names the pictures beside it, `file_name`.
- Files of one kind (`*.parquet`, `*.arrow`, `*.tar`, `*.csv`, JSON), in whatever folders, are
  shards, read in the order of their names.
- Where there is none of these, pictures and the texts beside them (`a.jpg`, `a.txt`) are captions.

Where files are kept back for validation or testing, by their names or those of their folders, the
others alone are read, and that is told.
"""

from __future__ import annotations

import functools
import os
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from data.containers import one_file
from data.containers.webdataset import PICTURES
from data.pictures import Pictures
from data.record_content import picture_name
from data.record_keys import BadRecord
from data.stream import NotRead, decode
from errors import PhiSightError, printable
from files import read_regular

KINDS = {  # how a file's name ends, less .gz -> what it is called here
    ".parquet": "Parquet",
    ".arrow": "Arrow",
    ".tar": "tar",
    ".tgz": "tar",
    ".csv": "CSV",
    ".tsv": "CSV",
    ".json": "JSON",
    ".jsonl": "JSON",
    ".ndjson": "JSON",
}
ABOUT = re.compile(  # JSON files that tell of a data set and hold none of it
    r"(?:dataset_infos?|dataset_dict|state|config|croissant|package|.*_stats)\.json"
)
METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
HELD_OUT = re.compile(
    r"(?:^|[-_. ])(?:validation|valid|val|dev|test|testing|eval|evaluation|testdev|minival)"
    r"(?:$|[-_. 0-9])",
    re.I,
)
NAMING = ("JSON", "CSV")  # whose records name pictures as files
TEXT_ENDINGS = (".txt", ".caption")
CAPTION_BYTES = 1 << 17
STATE_BYTES = 1 << 24
FILES = 10_000_000  # in a folder


def is_one(path: Path) -> bool:
    """Whether this is a folder."""
    return path.is_dir()


@dataclass(frozen=True)
class Plan:
    """Which files of a folder are read, as paths relative to it."""

    kind: str
    """saved, metadata, shards, or captions"""
    read: list[str]
    """in this order"""
    beside: list[str]
    """what those may name"""
    back: list[str]
    """files like those, that are kept back for validation or testing"""


def read(path: Path, pictures: Pictures) -> Iterator[tuple[str, object]]:
    """Every record of the files of a folder, with its place; see `data.containers`.

    Raises PhiSightError for a folder that holds no data, or files of several kinds, and all that
    reading one of its files raises.
    """
    try:
        what = plan(_names_in(path))
    except PhiSightError as error:
        raise PhiSightError(f"{path}: {error}") from None
    if what.back:
        _tell(path, len(what.back), what.back[0])
    if what.kind == "captions":
        yield from _captions(path, what, pictures)
        return
    for name in what.read:
        if what.kind == "metadata":
            records = _with_metadata(path / name, pictures)
        elif what.kind == "saved":
            records = _saved(path / name, pictures)
        else:
            records = one_file.read(path / name, pictures)
        for where, record in records:
            yield f"{Path(name).parent / where}", record


def plan(names: Sequence[str]) -> Plan:
    """How a folder of these files is read. Raises PhiSightError, without the folder's name."""
    names = sorted(names)
    seen = [name for name in names if PICTURES.fullmatch(PurePosixPath(name).suffix[1:])]
    if saved := [name for name in names if PurePosixPath(name).name == "state.json"]:
        chosen, back = for_training(saved)
        if len(chosen) > 1:
            raise PhiSightError(f"holds {len(chosen)} saved data sets; name one of them")
        place = PurePosixPath(chosen[0]).parent
        beside = [n for n in names if n.endswith(".arrow") and PurePosixPath(n).parent == place]
        return Plan("saved", chosen, beside, back)
    if metadata := [name for name in names if PurePosixPath(name).name in METADATA]:
        chosen, back = for_training(metadata)
        places = [PurePosixPath(name).parent for name in chosen]
        beside = [n for n in seen if any(PurePosixPath(n).is_relative_to(p) for p in places)]
        return Plan("metadata", chosen, beside, back)
    shards = [name for name in names if kind_of_file(name)]
    kinds = sorted({kind_of_file(name) for name in shards})
    if len(kinds) > 1:
        raise PhiSightError(f"holds {' and '.join(kinds)} files; name one of them")
    if shards:
        chosen, back = for_training(shards)
        return Plan("shards", chosen, seen if kinds[0] in NAMING else [], back)
    if seen:
        return Plan("captions", seen, [n for n in names if n.lower().endswith(TEXT_ENDINGS)], [])
    raise PhiSightError(
        "holds no data that is read: JSON, Parquet, Arrow, tar, CSV, or pictures with texts; give"
        " a folder that does"
    )


def kind_of_file(name: str) -> str:
    """Which kind of data a file holds by its name; "" for none."""
    last = PurePosixPath(name).name.lower()
    if last.startswith((".", "_")) or ABOUT.fullmatch(last):
        return ""
    return KINDS.get(PurePosixPath(last.removesuffix(".gz")).suffix, "")


def for_training(names: Sequence[str]) -> tuple[list[str], list[str]]:
    """Files in the order in which they are read, and those of them that are kept back.

    One that is kept back says so in its name, or in that of a folder it lies in. Raises
    PhiSightError, without the folder's name, where they are kept back for more than one purpose
    and there are no others.
    """
    back = {name: _purpose(name) for name in sorted(names)}
    others = [name for name, purpose in back.items() if not purpose]
    if others:
        return others, [name for name in back if back[name]]
    if len(purposes := set(back.values())) > 1:
        raise PhiSightError(
            f"holds files for {' and '.join(sorted(purposes))} alone; name one of them"
        )
    return list(back), []


# -- which files ----------------------------------------------------------------------------------


def _purpose(name: str) -> str:
    """What a file is kept back for, by its name; "" for training."""
    for part in PurePosixPath(name).parts:
        if re.match(r"train", part, re.I):
            return ""
        if match := HELD_OUT.search(part):
            return match[0].strip("-_. 0123456789").lower()
    return ""


@functools.cache
def _tell(path: Path, count: int, first: str) -> None:
    print(
        f"{path}: {count} file(s) for validation or testing are not read, such as"
        f" {printable(first, 100)}; name one to read it",
        file=sys.stderr,
    )


def _names_in(folder: Path) -> list[str]:
    """Every file below a folder, relative to it, in the order of their names; links to folders are
    not followed, and what is hidden is left out, such as the `._a.jpg` of macOS."""
    found: list[str] = []
    for place, below, files in os.walk(folder):
        below[:] = sorted(name for name in below if not name.startswith("."))
        inner = os.path.relpath(place, folder)
        seen = (name for name in files if not name.startswith("."))
        found += [name if inner == "." else f"{inner}/{name}" for name in seen]
        if len(found) > FILES:
            raise PhiSightError(f"{folder}: holds over {FILES:,} files; name the one that is meant")
    return sorted(found)


def _saved(state: Path, pictures: Pictures) -> Iterator[tuple[str, object]]:
    """The records of the files that the `state.json` of a saved data set lists."""
    try:
        content = decode(read_regular(state, STATE_BYTES).decode("utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise PhiSightError(
            f"{state}: cannot be read ({error}); save the data set again"
        ) from error
    rows = content.get("_data_files") if isinstance(content, dict) else None
    listed = rows if isinstance(rows, list) else []
    names = [str(row.get("filename")) for row in listed if isinstance(row, dict)]
    if not names or not all(re.fullmatch(r"\w[\w.-]*", name) for name in names):
        raise PhiSightError(f"{state}: does not list what was saved; save the data set again")
    for name in names:
        yield from one_file.read(state.parent / name, pictures)


# -- pictures beside their texts ------------------------------------------------------------------


def _with_metadata(file: Path, pictures: Pictures) -> Iterator[tuple[str, object]]:
    """The records of a metadata file, whose pictures are named from where it lies."""
    for where, record in one_file.read(file, pictures):
        yield where, _from_here(record, file.parent) if isinstance(record, dict) else record


def _from_here(record: dict, folder: Path) -> object:
    """A record of a metadata file as other records are: with a picture's path, and a caption."""
    others = {key: value for key, value in record.items() if key not in ("file_name", "image")}
    try:
        name = picture_name(record.get("file_name", record.get("image")))
    except BadRecord as error:
        return NotRead(str(error))
    return {"image": _beside(folder, name)} | others


def _beside(folder: Path, name: str) -> str:
    return os.path.join(os.path.abspath(folder), name)


def _captions(folder: Path, what: Plan, pictures: Pictures) -> Iterator[tuple[str, object]]:
    """A record for each picture with a text beside it, and a fault for each without the other."""
    texts: dict[str, list[str]] = {}
    for text in what.beside:
        texts.setdefault(text.rpartition(".")[0], []).append(text)
    stems = set()
    for name in what.read:
        stems.add(stem := name.rpartition(".")[0])
        yield f"{folder.name}/{name}", _captioned(folder, name, texts.get(stem, ()))
    for text in what.beside:
        if text.rpartition(".")[0] not in stems:
            yield f"{folder.name}/{text}", NotRead("a text without a picture beside it")


def _captioned(folder: Path, name: str, texts: Sequence[str]) -> object:
    if len(texts) != 1:
        count = f"{len(texts)} texts" if texts else "no text"
        return NotRead(f"a picture with {count} beside it")
    try:
        text = read_regular(folder / texts[0], CAPTION_BYTES).decode("utf-8-sig").strip()
    except (OSError, UnicodeDecodeError) as error:
        return NotRead(f"its text cannot be read ({error})")
    if not text:
        return NotRead("its text is empty")
    return {"image": _beside(folder, name), "caption": text}
