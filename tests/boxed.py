"""Records written into every kind of file that `data.containers` reads, for tests."""

from __future__ import annotations

import csv
import gzip
import io
import json
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

Record = dict[str, Any]


def tar(place: Path, members: Sequence[tuple[str, bytes]], mode: str = "w") -> Path:
    place.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(place, mode) as file:
        for name, content in members:
            about = tarfile.TarInfo(name)
            about.size = len(content)
            file.addfile(about, io.BytesIO(content))
    return place


def members(records: Sequence[Record], images: Path) -> list[tuple[str, bytes]]:
    """Each record beside its picture."""
    found = []
    for number, record in enumerate(records):
        rest = {key: value for key, value in record.items() if key != "image"}
        found += [
            (f"./{number:06}.json", json.dumps(rest).encode()),
            (f"./{number:06}.png", (images / record["image"]).read_bytes()),
        ]
    return found


def table(records: Sequence[Record], images: Path) -> Any:
    """With the pictures as `datasets` holds an Image."""
    import pyarrow

    def row(record: Record) -> Record:
        picture = {"bytes": (images / record["image"]).read_bytes(), "path": record["image"]}
        return record | {"image": picture, "embedding": [0.5] * 8, "unsure": None}

    return pyarrow.Table.from_pylist([row(record) for record in records])


def parquet(folder: Path, records: Sequence[Record], images: Path) -> Path:
    from pyarrow import parquet

    folder.mkdir(parents=True)
    parquet.write_table(table(records, images), folder / "a.parquet", row_group_size=3)
    return folder / "a.parquet"


def arrow_file(folder: Path, records: Sequence[Record], images: Path) -> Path:
    import pyarrow

    folder.mkdir(parents=True)
    held = table(records, images)
    with pyarrow.ipc.new_file(folder / "a", held.schema) as file:  # known by how it begins
        file.write_table(held, 4)
    return folder / "a"


def saved(folder: Path, records: Sequence[Record], images: Path) -> Path:
    """As `DatasetDict.save_to_disk` lays it out."""
    import pyarrow

    half = len(records) // 2
    for split, given in (("train", records), ("test", records[:1])):
        place = folder / split
        place.mkdir(parents=True)
        names = [f"data-0000{n}-of-00002.arrow" for n in (0, 1)]
        for name, part in zip(names, (given[:half], given[half:] or given)):
            held = table(part, images)
            with pyarrow.ipc.new_stream(place / name, held.schema) as file:
                file.write_table(held, 4)
        state = {"_data_files": [{"filename": name} for name in names], "_split": split}
        (place / "state.json").write_text(json.dumps(state))
        (place / "dataset_info.json").write_text("{}")
    (folder / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    return folder


def tar_shards(folder: Path, records: Sequence[Record], images: Path) -> Path:
    half, given = len(records) // 2 * 2, members(records, images)
    tar(folder / "a/train-000001.tgz", given[half:], "w:gz")
    tar(folder / "a/train-000000.tar", given[:half])
    tar(folder / "a/test-000000.tar", given[:2])
    return folder


def json_shards(folder: Path, records: Sequence[Record], images: Path) -> Path:
    folder.mkdir(parents=True)
    half = len(records) // 2
    with gzip.open(folder / "b.jsonl.gz", "wt") as file:
        file.writelines(json.dumps(record) + "\n" for record in records[half:])
    (folder / "a.json").write_text(json.dumps(records[:half]))
    (folder / "README.md").write_text("not data")
    return folder


def metadata(folder: Path, records: Sequence[Record], images: Path) -> Path:
    """As the hub's image folders are: the pictures beside a `metadata.jsonl`."""
    (folder / "train").mkdir(parents=True)
    lines = []
    for record in records:
        rest = {key: value for key, value in record.items() if key != "image"}
        lines.append(json.dumps({"file_name": record["image"]} | rest) + "\n")
        (folder / "train" / record["image"]).write_bytes((images / record["image"]).read_bytes())
    (folder / "train/metadata.jsonl").write_text("".join(lines))
    return folder


def captions(folder: Path, pairs: Sequence[tuple[str, bytes, str]]) -> Path:
    """(name, picture, caption) as pictures with a text beside each."""
    for name, content, text in pairs:
        place = folder / name
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(content)
        place.with_suffix(".txt").write_text(text)
    return folder


def rows(place: Path, lines: Sequence[Sequence[str]], separator: str = ",") -> Path:
    with open(place, "w", newline="", encoding="utf-8-sig") as file:
        csv.writer(file, delimiter=separator).writerows(lines)
    return place


WRITERS: dict[str, Callable[[Path, Sequence[Record], Path], Path]] = {
    "parquet": parquet,
    "arrow file": arrow_file,
    "saved": saved,
    "tar": tar_shards,
    "gzip": json_shards,
    "metadata": metadata,
}
OF_PYARROW = ("parquet", "arrow file", "saved")
