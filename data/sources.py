"""What `--data` and `--images` name: where conversations lie, how often each is taken, and where
the pictures are that they name.

A source is a file or a folder of any form of `data.containers`, or a data set of the hub. Behind
its name `:N` says how often each of its conversations is taken: `a.json:2` twice in an epoch,
`b.parquet:0.25` a quarter of them once, `c.jsonl:1.5` all of them, and half of them again. Which
part that is depends on the pictures alone, as with `--data-fraction`; so a mixture is a list of
conversations like any other, and their order a pure function of seed, epoch and lengths.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from config import Config
from data.containers import container_of, read_records
from data.dataset import Conversation, Quarantined, conversation_or_fault
from data.pictures import PictureFolders, Pictures
from errors import PhiSightError
from fields import split_weight
from hub import is_reference


@dataclass(frozen=True)
class Source:
    """One of the places that `--data` names."""

    path: Path
    weight: float = 1.0
    pictures: Pictures = Pictures()
    """what the pictures are called that its records name"""

    @property
    def holds_pictures(self) -> bool:
        """Whether pictures may lie inside, so that they are there without `--images`."""
        return container_of(self.path) is not None

    def records(self) -> Iterator[tuple[str, object]]:
        """As `data.containers.read_records` gives them."""
        return read_records(self.path, self.pictures)


def read_conversations(
    source: Source, quarantined: list[Quarantined], strict: bool = False
) -> Iterator[tuple[int, Conversation]]:
    """The good conversations of a source one by one, each with its place among all its records.

    Neither the text nor the conversations are held. A bad record is appended to `quarantined` with
    its reason; with `strict` it raises PhiSightError. A file that is missing, empty, of no form
    that is read, or without one good record raises PhiSightError.
    """
    good = 0
    bad: list[Quarantined] = []
    for number, (where, record) in enumerate(source.records()):
        result = conversation_or_fault(record, source.pictures)
        if isinstance(result, Conversation):
            good += 1
            yield number, result
            continue
        if strict:
            raise PhiSightError(f"{where}: {result.reason}; mend or remove the record")
        bad.append(Quarantined(where, result.id, result.reason, result.kind))
        quarantined.append(bad[-1])
    if not good:
        first = [f", the first ({entry.where}): {entry.reason}" for entry in bad[:1]]
        raise PhiSightError(
            f"{source.path}: no usable record among {len(bad)}{''.join(first)}; give conversations"
            " in one of the forms of docs/data.md"
        )


def sources_of(config: Config, remedy: str) -> list[Source]:
    """The places that a config names, in their order, each with the names of its pictures.

    Raises `PhiSightError` where none is given, one is not there, or `--images` are not one for all
    or one for each; `remedy` says what to do where none is given.
    """
    return sources(config.data, PictureFolders.of(config), remedy)


def sources(data: Sequence[str], folders: PictureFolders, remedy: str) -> list[Source]:
    """As `sources_of`, of what the two flags were given."""
    if not all(data) or not data:
        raise PhiSightError(f"--data: not given; {remedy}")
    given = len(folders.folders)
    if given > 1 and given != len(data):
        raise PhiSightError(
            f"--images: {given} folders for {len(data)} --data; give one for all, or one for each"
            " in the same order"
        )
    found = []
    for number, text in enumerate(data):
        name, weight = split_weight(text)
        pictures = folders.of_source(number if given > 1 else 0)
        if is_reference(name):
            from data.hub_sets import data_set  # torch, of no use where no data are of the hub

            kept = data_set(name)
            own = (kept.folder, kept.mark)
            if pictures.folder is None:  # then names are relative to the data set itself
                pictures = replace(pictures, folder=own[0], mark=own[1])
            found.append(Source(kept.path, weight, replace(pictures, beside=own)))
        elif Path(name).exists():
            found.append(Source(Path(name), weight, pictures))
        else:
            remedy = _what_was_meant(name, text) or remedy
            raise PhiSightError(f"{name}: no such file; {remedy}")
    return found


def _what_was_meant(name: str, text: str) -> str:
    """What to write where a name with a colon is not taken as it was meant; "" for any other."""
    if name != text and Path(text).exists():
        return f"if {text} is meant, write {text}:1"
    before, colon, weight = name.rpartition(":")
    if colon and Path(before).is_file():
        return f"if {weight!r} is how often {before} is taken, write it as 2 or 0.25, under 1000000"
    return ""


def pinned(data: Sequence[str]) -> list[str]:
    """What `--data` was given, with the commit of each data set of the hub in place of the branch
    that it was. Raises as `data_set` does."""
    found = []
    for text in data:
        name, _ = split_weight(text)
        if is_reference(name):
            from data.hub_sets import data_set

            text = data_set(name).name + text[len(name) :]
        found.append(text)
    return found
