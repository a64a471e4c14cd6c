"""What reading records costs in each kind of data file: time, and the memory of both processes.

    python -m benchmarks.containers                                # 1.2 GB of pictures a kind
    python -m benchmarks.containers --records 50 --kilobytes 20    # in seconds

Each kind is read twice in a process of its own: the first time pictures that lie inside are written
to the folder of unpacked ones, the second time they are there. Parquet is one row group.
"""

from __future__ import annotations

import argparse
import io
import json
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from PIL import Image

from benchmarks.pictures import Peaks, resident
from data.containers import read_records
from data.pictures import Pictures
from data.stream import NotRead
from errors import PhiSightError, run_main
from paths import PROJECT

BATCH = 100  # rows of an Arrow file that are written at once, as `datasets` does with pictures


def records(count: int, size: int) -> Iterator[tuple[bytes, dict[str, Any]]]:
    """A BMP of noise of about `size` bytes, and what is said of it."""
    side = max(int((size / 3) ** 0.5), 1)
    for number in range(count):
        noise = np.random.default_rng(number).integers(0, 256, (side, side, 3), np.uint8)
        buffer = io.BytesIO()
        Image.fromarray(noise).save(buffer, "BMP")
        turns = [("human", "<image>\nWhat is it?"), ("gpt", f"Noise, number {number}.")]
        yield buffer.getvalue(), {"conversations": [{"from": f, "value": v} for f, v in turns]}


def tables(given: Iterator[tuple[bytes, dict[str, Any]]]) -> Iterator[Any]:
    import pyarrow

    rows: list[dict[str, Any]] = []
    for content, record in given:
        rows.append({"image": {"bytes": content, "path": "a.bmp"}} | record)
        if len(rows) == BATCH:
            yield pyarrow.RecordBatch.from_pylist(rows)
            rows = []
    if rows:
        yield pyarrow.RecordBatch.from_pylist(rows)


def write_parquet(folder: Path, given: Iterator) -> Path:
    import pyarrow
    from pyarrow import parquet

    table = pyarrow.Table.from_batches(tables(given))
    parquet.write_table(table, folder / "a.parquet", row_group_size=len(table))
    return folder / "a.parquet"


def write_arrow(folder: Path, given: Iterator) -> Path:
    import pyarrow

    writer = None
    with open(folder / "a.arrow", "wb") as file:
        for batch in tables(given):
            writer = writer or pyarrow.ipc.new_stream(file, batch.schema)
            writer.write_batch(batch)
        if writer:
            writer.close()
    return folder / "a.arrow"


def write_tar(folder: Path, given: Iterator) -> Path:
    with tarfile.open(folder / "a.tar", "w") as file:
        for number, (content, record) in enumerate(given):
            for ending, data in (("bmp", content), ("json", json.dumps(record).encode())):
                about = tarfile.TarInfo(f"{number:08}.{ending}")
                about.size = len(data)
                file.addfile(about, io.BytesIO(data))
    return folder / "a.tar"


def write_json(folder: Path, given: Iterator) -> Path:
    """Beside files: what the others are compared with."""
    with open(folder / "a.jsonl", "w", encoding="utf-8") as file:
        for number, (content, record) in enumerate(given):
            (folder / f"{number}.bmp").write_bytes(content)
            file.write(json.dumps({"image": f"{number}.bmp"} | record) + "\n")
    return folder / "a.jsonl"


KINDS: dict[str, Callable[[Path, Iterator], Path]] = {
    "JSONL and files": write_json,
    "Parquet": write_parquet,
    "Arrow": write_arrow,
    "tar": write_tar,
}


def read(path: Path, unpacked: Path) -> dict[str, float]:
    """Both readings of a file: seconds and memory in MB."""
    found: dict[str, float] = {"MB": path.stat().st_size / 1e6}
    for name in ("first", "second"):
        started = time.perf_counter()
        with Peaks() as peaks:
            for where, record in read_records(path, Pictures(path.parent, unpacked)):
                if isinstance(record, NotRead):
                    raise PhiSightError(f"{where}: was not read ({record}); look into it")
        seconds = time.perf_counter() - started
        peak = max(peaks.own, resident(psutil.Process()), found.get("peak", 0))
        found |= {f"{name} s": seconds, "peak": peak}
        found["child"] = max(found.get("child", 0), peaks.child)
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="benchmarks.containers", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--records", type=int, default=3000)
    parser.add_argument("--kilobytes", type=int, default=400, help="of each picture")
    parser.add_argument("--read", nargs=2, metavar=("FILE", "FOLDER"), help="this one, here")
    options = parser.parse_args(arguments)
    if options.read:
        print(json.dumps(read(*map(Path, options.read))))
        return 0
    for kind, write in KINDS.items():
        with tempfile.TemporaryDirectory() as folder:
            path = write(Path(folder), records(options.records, options.kilobytes * 1000))
            command = [sys.executable, "-m", "benchmarks.containers", "--read", str(path)]
            command.append(f"{folder}/unpacked")
            done = subprocess.run(
                command, check=True, stdout=subprocess.PIPE, text=True, cwd=PROJECT
            )
        values = json.loads(done.stdout)
        print(f"{kind}: " + ", ".join(f"{name} {value:,.1f}" for name, value in values.items()))
    print("memory in MB; `child`: the process that pyarrow runs in")
    return 0


if __name__ == "__main__":
    run_main(main)
