"""Records in Parquet, Arrow, tar, CSV, gzip and folders of them: the same conversations as in JSON,
and whatever the bytes are, records or one line."""

from __future__ import annotations

import gzip
import io
import json
import multiprocessing
import os
import shutil
import tarfile
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import boxed
import pytest
import runs
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import checkpoints
import config as configs
from config import Config
from data import pictures as kept
from data.containers import arrow, arrow_child, folders, read_records, webdataset
from data.features import FeatureStore
from data.pictures import PictureFolders, Pictures
from data.prepare import prepare
from data.record_keys import BadRecord
from data.sources import Source, read_conversations, sources
from data.stream import NotRead
from errors import PhiSightError
from files import stamp_of
from model.vision import VisionTower
from workers.pool import Workers

REASON = "pyarrow, of requirements-extras.txt, is not installed"


def needs_pyarrow() -> None:
    pytest.importorskip("pyarrow", reason=REASON)


@pytest.fixture(scope="module")
def records(world) -> list[dict]:
    """A dozen records, each of a picture of its own, without ids."""
    found = json.loads((world / "train.json").read_text())
    by_picture = {record["image"]: record for record in found}
    return [{k: v for k, v in r.items() if k != "id"} for r in by_picture.values()]


@pytest.fixture(scope="module")
def written(records, world, tmp_path_factory) -> dict[str, Path]:
    """The records in every kind of file. Tests only read them."""
    folder = tmp_path_factory.mktemp("boxed")
    plain = folder / "plain.json"
    plain.write_text(json.dumps(records))
    found = {"json": plain}
    for name, write in boxed.WRITERS.items():
        if name in boxed.OF_PYARROW and not arrow.is_installed():
            continue
        found[name] = write(folder / name.replace(" ", "-"), records, world / "images")
    return found


def place_of(name: str, written: dict[str, Path]) -> Path:
    if name not in written:
        pytest.skip(REASON)
    return written[name]


def images_of(name: str, place: Path, world: Path) -> Path:
    return place if name == "metadata" else world / "images"


def faults(path: Path, **where: object) -> list[str]:
    return [
        str(record)
        for _, record in read_records(path, Pictures(**where))  # type: ignore[arg-type]
        if isinstance(record, NotRead)
    ]


def refusal(path: Path, unpacked: Path = Path("/nonexistent")) -> str:
    with pytest.raises(PhiSightError) as error:
        list(read_records(path, Pictures(None, unpacked)))
    assert "\n" not in str(error.value) and ";" in str(error.value)
    return str(error.value)


def png(number: int = 0) -> bytes:
    content = io.BytesIO()
    Image.new("RGB", (4, 4), (number % 256, 1, 2)).save(content, "PNG")
    return content.getvalue()


# -- the same as in JSON --------------------------------------------------------------------------


@pytest.mark.parametrize("name", list(boxed.WRITERS))
def test_a_container_holds_the_conversations_that_json_does(name, written, world, tmp_path):
    place = place_of(name, written)

    def read(path: Path, images: Path) -> list:
        """The messages, each picture as its bytes."""
        where = PictureFolders([images], tmp_path)
        source = Source(path, pictures=where.of_source(0))
        set_aside: list = []
        found = [
            [
                (m.role, [p.value if p.kind == "text" else where.path_of(p.value).read_bytes()
                          for p in m.parts])
                for m in conversation.messages
            ]
            for _, conversation in read_conversations(source, set_aside)
        ]  # fmt: skip
        assert set_aside == []
        return found

    assert read(place, images_of(name, place, world)) == read(written["json"], world / "images")


@pytest.mark.parametrize("name", ["parquet", "tar", "metadata"])
def test_the_data_fingerprint_is_that_of_the_records_as_json(
    name, written, world, parts, tiny_config, tmp_path
):
    """Without a split, which goes by the names of pictures."""
    place = place_of(name, written)

    def fingerprint(path: Path, images: Path) -> str:
        config = configs.replace(
            configs.replace(tiny_config, validation_fraction=0.0),
            data=(str(path),),
            images=(str(images),),
            unpacked=str(tmp_path / "u"),
        )
        store = FeatureStore(tmp_path / path.name, parts.vision.key, parts.vision.shape)
        tower = VisionTower(parts.vision)
        return prepare(config, parts.chat_format, store, lambda: tower, positions=2048).fingerprint

    assert fingerprint(place, images_of(name, place, world)) == fingerprint(
        written["json"], world / "images"
    )


def test_a_run_on_all_of_them_goes_on_bit_for_bit(written, world, tmp_path, capsys):
    fields = runs.SHORT | {"unpacked": tmp_path / "pictures", "features": tmp_path / "features"}
    fields["validation_fraction"] = 0
    folders._tell.cache_clear()
    more = [f"--data={written['json']}:0.5", *(f"--data={written[n]}" for n in written)]
    more += [f"--images={images_of(n, written[n], world)}" for n in ("json", *written)]
    names = [f"train_{number:06}.png" for number in range(4)]
    contents = [(world / "images" / name).read_bytes() for name in names]
    texts = ["one red star", "two", "a big blue circle", "three"]
    captioned = boxed.captions(tmp_path / "captions", list(zip(names, contents, texts)))
    table = boxed.rows(tmp_path / "a.csv", [("path", "title"), *zip(names, texts)])
    more += [f"--data={captioned}", f"--images={captioned}"]
    more += [f"--data={table}", f"--images={world / 'images'}"]
    for run, ends in (("whole", []), ("cut", ["--stop-at-step=1"])):
        flags = [
            f for f in runs.flags(tmp_path / run, **fields) if f[:7] not in ("--data=", "--image")
        ]
        assert runs.train.main([*flags, *more, *ends]) == 0
    assert (tmp_path / "whole/quarantine.jsonl").read_text() == ""
    shutil.rmtree(tmp_path / "pictures")  # a cache: it is written again
    runs.resume(tmp_path / "cut")
    assert "1 file(s) for validation or testing are not read" in capsys.readouterr().err
    assert checkpoints.diff(tmp_path / "whole", tmp_path / "cut").identical


# -- tables ---------------------------------------------------------------------------------------


def write_parquet(path: Path, rows: list[dict], **settings: object) -> Path:
    import pyarrow
    from pyarrow import parquet

    parquet.write_table(pyarrow.Table.from_pylist(rows), path, **settings)
    return path


def test_what_a_table_holds_becomes_what_json_would_hold(tmp_path):
    needs_pyarrow()
    import datetime
    from decimal import Decimal

    import pyarrow

    rows = [
        {
            "images": [{"bytes": png(1), "path": "x.png"}, {"bytes": None, "path": "a/b.png"}],
            "conversations": {"from": ["human", "gpt"], "value": ["What?", "This."]},
            "when": datetime.datetime(2026, 1, 2, 3, 4, 5),
            "price": Decimal("1.50"),
            "score": float("nan"),
            "clip": [0.25, 0.5],
            "sound": b"RIFF",
            "tokens": [1, 2],
            "by": [("a", "b")],
            "lost": None,
        }
    ]
    held = pyarrow.Table.from_pylist(rows[:1]).set_column(
        8, "by", pyarrow.array([[("a", "b")]], pyarrow.map_(pyarrow.string(), pyarrow.string()))
    )
    from pyarrow import parquet

    parquet.write_table(held, tmp_path / "a.parquet")
    [(where, record)] = read_records(tmp_path / "a.parquet", Pictures(None, tmp_path / "u"))
    assert where == "a.parquet row 1"
    [first, second] = record.pop("images")
    assert PictureFolders((), tmp_path / "u").path_of(first).read_bytes() == png(1)
    assert second == "a/b.png"
    assert record == {
        "conversations": [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "This."}],
        "when": "2026-01-02 03:04:05",
        "price": "1.50",
        "clip": ["(not read)"],
        "sound": ["(not read)"],
        "tokens": [1, 2],
        "by": {"a": "b"},
    }


def test_a_row_that_cannot_be_used_costs_itself_alone(tmp_path):
    needs_pyarrow()
    pictures = (png(), b"no picture", png(2))
    rows = [{"image": content, "text": "x"} for content in pictures]
    rows.append({"image": png(3), "text": "x" * (arrow_child.RECORD_LIMIT + 1)})
    path = write_parquet(tmp_path / "a.parquet", rows)
    found = [record for _, record in read_records(path, Pictures(None, tmp_path / "u"))]
    assert [type(record) for record in found] == [dict, NotRead, dict, NotRead]
    assert "no kind that is read" in str(found[1]) and "16,777,216 characters" in str(found[3])


def test_rows_are_the_same_from_a_child_that_begins_anew_at_each_call(tmp_path, monkeypatch):
    needs_pyarrow()
    rows = [{"n": n, "text": str(n) * 50} for n in range(100)]
    path = write_parquet(tmp_path / "a.parquet", rows, row_group_size=30)
    monkeypatch.setattr(arrow_child, "PIECE", 1000)  # in this process: a call gives some rows
    stamp, found = stamp_of(path.stat()), []
    for forget in (False, True):
        found.append([])
        while True:
            if forget:
                arrow_child._open.clear()
            first = len(found[-1])
            about, content = arrow_child.rows(b"", str(path), "a", "parquet", first, stamp)
            found[-1] += [json.loads(line)["record"] for line in content.splitlines()]
            if about["end"]:
                break
            assert len(found[-1]) < first + 30
    assert found == [rows, rows]
    with pytest.raises(PhiSightError, match="changed while it was read"):
        arrow_child.rows(b"", str(path), "a", "parquet", 5, stamp, [0, *stamp[1:]])


def test_tables_that_lie_or_are_no_tables_are_refused_in_one_line(tmp_path, monkeypatch):
    needs_pyarrow()
    import numpy
    import pyarrow
    from pyarrow import parquet

    path = tmp_path / "a.parquet"
    path.write_bytes(b"PARE" + bytes(100))
    assert "encrypted" in refusal(path)
    write_parquet(path, [{"text": "x" * 100}] * 50)
    whole = path.read_bytes()
    path.write_bytes(whole[:-30])
    assert "cannot be read" in refusal(path)
    # One value, repeated five million times, in some kilobytes.
    parquet.write_table(pyarrow.table({"a": numpy.zeros(5_000_000, numpy.int8)}), path)
    assert "says that it has 5,000,000 rows in" in refusal(path)
    parquet.write_table(pyarrow.table({"a": [[0.5]], "b": [b"x"]}), path)
    assert "no column that a record could be made of" in refusal(path)
    twice = pyarrow.table([pyarrow.array(["x"])] * 2, names=["a", "a"])
    parquet.write_table(twice, path)
    assert "has the column 'a' twice" in refusal(path)
    monkeypatch.setattr(arrow, "is_installed", lambda: False)
    assert f"needs the package pyarrow to be read; pip install {arrow.PYARROW}" in refusal(path)
    assert arrow.PYARROW in (runs.ROOT / "requirements-extras.txt").read_text().split()


def test_bytes_that_were_changed_give_rows_or_one_line(tmp_path):
    needs_pyarrow()
    path = write_parquet(tmp_path / "a", [{"t": f"text {n}", "n": [n]} for n in range(40)])
    import random

    whole, chance, ends = path.read_bytes(), random.Random(1), set()
    with closing(Workers(1, replace(arrow.LIMITS, cpu_seconds=5))) as child:
        for _ in range(60):
            content = bytearray(whole)
            for _ in range(chance.choice((1, 3, 30))):
                content[chance.randrange(4, len(content))] = chance.randrange(256)
            path.write_bytes(content)
            arguments = {"path": str(path), "name": "a", "kind": "parquet", "first": 0}
            arguments["stamp"] = [chance.random()]  # another file
            try:
                child.call(arrow_child.rows, b"", arguments, name="a", remedy="mend it")
                ends.add("rows")
            except PhiSightError as error:
                assert "\n" not in str(error)
                ends.add("refused")
    assert ends == {"rows", "refused"}


# -- tar ------------------------------------------------------------------------------------------


def shard(path: Path, *members: tuple[str, bytes]) -> Path:
    return boxed.tar(path / "a.tar", members)


def test_neighbours_of_one_name_are_a_record(tmp_path):
    turns = {"messages": [{"role": "user", "content": [{"type": "image", "image": "c.b.png"}]}]}
    path = shard(
        tmp_path,
        *(("d/a.0.png", png(1)), ("d/a.1.PNG", png(2)), ("d/a.json", b'{"messages": [1]}')),
        *(("b.jpg.txt", b"none"), ("e.png", png(3)), ("e.txt", "\ufeffA thing".encode())),
        *(("e.cls", b"3"), ("c.png", png(4)), ("c.b.png", png(5))),
        *(("c.json", json.dumps(turns).encode()), (".hidden", b""), ("README", b"")),
        *(("f.png", png(6)), ("f.json", b'{"image": "elsewhere.jpg", "caption": "c"}')),
    )
    where = PictureFolders((), tmp_path / "u")
    found = dict(read_records(path, where.of_source(0)))

    def content(name: str) -> bytes:
        return where.path_of(name).read_bytes()

    first = found["a.tar sample d/a"]
    assert [content(name) for name in first.pop("images")] == [png(1), png(2)]
    assert first == {"messages": [1]}
    assert content(found["a.tar sample e"].pop("image")) == png(3)
    assert found["a.tar sample e"] == {"caption": "A thing", "cls": "e.cls"}
    [message] = found["a.tar sample c"].pop("messages")
    assert content(message["content"][0]["image"]) == png(5)
    assert found["a.tar sample c"] == {"png": "c.png"}  # which nothing names: it is counted
    assert content(found["a.tar sample f"]["image"]) == png(6)
    assert found["a.tar sample b"] == {"jpg.txt": "b.jpg.txt"} or isinstance(
        found["a.tar sample b"], NotRead
    )


@pytest.mark.parametrize(
    ("members", "reason"),
    [
        ([("a.png", png())], "a picture without a caption or a record"),
        ([("a.png", b"GARBAGE"), ("a.txt", b"x")], "no kind that is read"),
        ([("a.heic", b"\0\0\0\x18ftypheic" + bytes(9)), ("a.txt", b"x")], "HEIC, which is not"),
        ([("a.txt", b"x"), ("a.txt", b"y")], "has the member a.txt twice"),
        ([("a.json", b"{"), ("a.png", png())], "not JSON"),
        ([("a.json", b"[1]"), ("a.png", png())], "its .json is not an object"),
        ([("a.json", b'{"a":' * 5000), ("a.png", png())], "nested too deeply"),
        ([("a.txt", b"\xff"), ("a.png", png())], "not UTF-8"),
        ([("a.json", b'{"images": ["x", "y"]}'), ("a.png", png())], "names 2 picture"),
        ([("../a.txt", b"x"), ("../a.png", png())], "leads out of the shard"),
        ([("/etc/a.txt", b"x"), ("/etc/a.png", png())], "leads out of the shard"),
        ([(f"a.{n}.cls", b"") for n in range(1001)], "more than 1,000 members"),
    ],
)
def test_members_that_make_no_record_are_set_aside(members, reason, tmp_path):
    path = shard(tmp_path, *members, ("z.png", png()), ("z.txt", b"a cap"))
    [fault] = faults(path, unpacked=tmp_path / "u")
    assert reason in fault


@pytest.mark.parametrize(
    "kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE]
)
def test_what_is_no_file_in_a_tar_is_set_aside(kind, tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as file:
        about = tarfile.TarInfo("a.png")
        about.type, about.linkname = kind, "/etc/passwd"
        file.addfile(about)
        file.add(runs.ROOT / "LICENSE", "a.txt")
    [fault] = faults(tmp_path / "a.tar", unpacked=tmp_path / "u")
    assert "a link, a device or the like" in fault and not (tmp_path / "u").exists()


def header(name: str, size: int, kind: bytes = tarfile.REGTYPE) -> bytes:
    about = tarfile.TarInfo(name)
    about.size, about.type = size, kind
    return about.tobuf(tarfile.GNU_FORMAT)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (header("x", 2 << 20, tarfile.XHDTYPE) + bytes(4 << 20), "header of more than 1,048,576"),
        (header("x", 512, tarfile.XHDTYPE) + b"9 size=x\n".ljust(512, b"\0"), "without a size"),
        (header("x", 512, tarfile.XHDTYPE) + b"99999 a=b\n".ljust(512, b"\0"), "POSIX header"),
        (header("a.txt", 10**12, tarfile.REGTYPE), "is cut short"),
        (header("a.txt", 600) + bytes(512), "is cut short"),
        (header("a.txt", 1) + bytes(512), "is cut short"),
        (header("a.txt", 1) + b"x".ljust(512, b"\0") + b"y" * 512, "cut short or damaged"),
    ],
)
def test_a_tar_that_lies_is_refused_in_one_line(content, reason, tmp_path):
    (tmp_path / "a.tar").write_bytes(content)
    assert reason in refusal(tmp_path / "a.tar")


def test_a_header_of_a_hundred_thousand_records_is_read_in_time_that_grows_with_its_length(
    tmp_path,
):
    many = b"6 a=b\n" * 170_000
    content = header("x", len(many), tarfile.XHDTYPE) + many + bytes(-len(many) % 512)
    last = header("a.txt", 1) + b"x".ljust(512, b"\0") + bytes(1024)
    (tmp_path / "a.tar").write_bytes(content + last)
    assert [record for _, record in read_records(tmp_path / "a.tar")] == [{"caption": "x"}]


@settings(max_examples=60)
@given(st.data())
def test_bytes_of_a_tar_that_were_changed_give_records_or_one_line(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("tar")
    members = [(f"{n}.{e}", b"{}") for n in range(2) for e in ("json", "txt", "cls")]
    content = bytearray(shard(folder, *members).read_bytes()[: 13 * 512])
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path = folder / "a.tar"
    path.write_bytes(content[: data.draw(st.integers(512, len(content)))])
    try:
        for _, record in webdataset.read(path, Pictures(None, folder / "u")):
            assert isinstance(record, (dict, NotRead))
    except PhiSightError as error:
        assert "\n" not in str(error)


# -- CSV, gzip ------------------------------------------------------------------------------------

cells = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\r\0"), max_size=20)


@given(st.lists(st.tuples(cells, cells, cells), max_size=5), st.sampled_from(",\t;|"))
def test_rows_of_text_come_back_as_they_were_written(tmp_path_factory, lines, separator):
    path = tmp_path_factory.mktemp("csv") / "a.csv"
    boxed.rows(path, [("file_name", "Text", "other"), *lines], separator)
    names = ("image", "caption", "other")
    assert [record for _, record in read_records(path)] == [
        {name: cell for name, cell in zip(names, line) if cell.strip()} for line in lines
    ]


@settings(max_examples=60)
@given(st.binary(max_size=80))
def test_any_bytes_called_csv_are_rows_or_refused_in_one_line(tmp_path_factory, content):
    path = tmp_path_factory.mktemp("csv") / "a.csv"
    path.write_bytes(b"image,caption\n" + content)
    try:
        assert all(isinstance(record, (dict, NotRead)) for _, record in read_records(path))
    except PhiSightError as error:
        assert "\n" not in str(error)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "the file is empty"),
        ("a,b\n1,2\n", "none of its columns (a, b) has a caption"),
        ("image,image\n", "or one twice"),
        ('image,caption\na,"b"c\n', "mend its quotes"),
        ('image,caption\na,"b\n' + "c\n" * 200_000, "field limit"),
        ("image,caption\na," + "b" * (1 << 20) + "\n", "a row is longer than"),
    ],
)
def test_a_table_of_text_that_is_none_is_refused_in_one_line(text, reason, tmp_path):
    (tmp_path / "a.csv").write_text(text)
    assert reason in refusal(tmp_path / "a.csv")


def test_a_row_of_other_cells_costs_itself_alone(tmp_path):
    (tmp_path / "a.tsv").write_text("path\ttitle\na.png\tb\nc.png\n\nd.png\te\tf\n")
    rows = dict(read_records(tmp_path / "a.tsv"))
    assert rows["a.tsv line 2"] == {"image": "a.png", "caption": "b"}
    assert faults(tmp_path / "a.tsv") == [
        "it has 1 cells where the first line has 2",
        "it has 3 cells where the first line has 2",
    ]


def test_gzip_that_is_damaged_or_cut_short_is_refused_in_one_line(tmp_path):
    whole = gzip.compress(json.dumps([{"n": n} for n in range(5000)]).encode())
    for name in ("a.json", "a.csv", "a.tar"):
        (tmp_path / name).write_bytes(whole[: len(whole) // 2])
        assert "gzip is damaged or cut short" in refusal(tmp_path / name)
    damaged = bytearray(whole)
    damaged[-6] ^= 1  # of the check sum
    (tmp_path / "b.json").write_bytes(damaged)
    assert "gzip is damaged" in refusal(tmp_path / "b.json")


# -- folders --------------------------------------------------------------------------------------


def test_pictures_and_the_texts_beside_them_are_captions(tmp_path):
    place = boxed.captions(tmp_path / "p", [("a.png", png(), " A "), ("b/c.png", png(), "C")])
    (place / "._a.png").write_bytes(png())  # as macOS leaves one beside each file
    (place / "alone.png").write_bytes(png())
    (place / "alone.too.txt").write_text("x")
    (place / "blank.png").write_bytes(png())
    (place / "blank.txt").write_text(" ")
    (place / "b/c.caption").write_text("another")
    (place / "d.jpg").write_bytes(png())
    (place / "d.txt").write_bytes(b"\xff")
    assert list(read_records(place))[0] == (
        "p/a.png",
        {"image": str(place / "a.png"), "caption": "A"},
    )
    [alone, two, blank, broken, lost] = faults(place)
    assert "no text beside it" in alone and "2 texts beside it" in two and "empty" in blank
    assert "cannot be read" in broken and lost == "a text without a picture beside it"


@pytest.mark.parametrize(
    ("names", "read", "back"),
    [
        (["b.json", "a.jsonl.gz", "x.md"], ["a.jsonl.gz", "b.json"], []),
        (["data/train-0-of-2.json", "data/validation-0.json"], ["data/train-0-of-2.json"], 1),
        (["test/a.json", "train/a.json", "val/a.json"], ["train/a.json"], 2),
        (["all.json", "test.json"], ["all.json"], 1),
        (["test.json"], ["test.json"], []),
        (["latest.json", "contest.json", "devices.json"], 3, []),
        (["a.json", "dataset_infos.json", ".x.json"], ["a.json"], []),
    ],
)
def test_which_files_of_a_folder_are_read(names, read, back):
    what = folders.plan(names)
    assert what.read == read if isinstance(read, list) else len(what.read) == read
    assert len(what.back) == (back or 0)


@pytest.mark.parametrize(
    ("names", "reason"),
    [
        ([], "holds no data that is read"),
        (["x.md"], "holds no data that is read"),
        (["a.json", "b.parquet"], "holds JSON and Parquet files; name one"),
        (["test.json", "val.json"], "for test and val alone"),
        (["a/state.json", "b/state.json"], "2 saved data sets"),
    ],
)
def test_a_folder_that_could_mean_several_things_is_asked_about(names, reason, tmp_path):
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("[]")
    assert reason in refusal(tmp_path)


def test_a_state_file_names_files_beside_it(tmp_path):
    for listed in ("../a", "/etc/passwd", 5, None):
        state = {"_data_files": [{"filename": listed}] if listed else None}
        (tmp_path / "state.json").write_text(json.dumps(state))
        if listed != 5:
            assert "does not list what was saved" in refusal(tmp_path)
    (tmp_path / "state.json").write_text("[")
    assert "does not list" in refusal(tmp_path)


def test_pictures_outside_the_image_folder_are_refused(tmp_path):
    place = boxed.captions(tmp_path / "p", [("a.png", png(), "A")])
    with pytest.raises(BadRecord, match="outside the image folder"):
        Pictures(tmp_path / "q").named(str(place / "a.png"))
    assert Pictures(tmp_path).named(str(place / "a.png")) == "p/a.png"
    with pytest.raises(BadRecord, match="as those of the hub are"):
        Pictures(tmp_path).named("#hub/a/b/c.png")


# -- pictures that lie inside ---------------------------------------------------------------------


def _keep(folder: Path, count: int) -> None:
    for number in range(count):
        Pictures(None, folder).keep(png(number))


def test_a_picture_is_written_once_by_whoever_comes_first(tmp_path):
    writers = [
        multiprocessing.get_context("fork").Process(target=_keep, args=(tmp_path, 40))
        for _ in range(2)
    ]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert [writer.exitcode for writer in writers] == [0, 0]
    found = sorted(path for path in tmp_path.rglob("*") if path.is_file())
    assert len(found) == 40 and not any(path.name.startswith(".") for path in found)
    before = [path.stat().st_mtime_ns for path in found]
    _keep(tmp_path, 40)
    assert [path.stat().st_mtime_ns for path in found] == before
    found[0].write_bytes(b"")  # as after a lost power supply
    _keep(tmp_path, 40)
    assert {path.read_bytes() for path in found} == {png(number) for number in range(40)}


def test_what_a_killed_writer_left_is_cleared_and_a_full_disk_is_one_line(tmp_path):
    name = Pictures(None, tmp_path).keep(png())
    place = PictureFolders((), tmp_path).path_of(name)
    left = place.with_name(f".tmp-{place.name}-999999999.{kept.writer().split('.')[1]}00000000")
    left.write_bytes(b"half")
    place.unlink()
    kept._sweep_once.cache_clear()
    Pictures(None, tmp_path).keep(png())
    assert place.read_bytes() == png() and not left.exists()
    with pytest.raises(PhiSightError, match="a picture cannot be written .*; make room"):
        Pictures(None, place).keep(png())  # a file where the folder should be


def test_kinds_of_pictures_are_known_by_their_bytes(tmp_path):
    avif = io.BytesIO()
    Image.new("RGB", (8, 8)).save(avif, "AVIF")
    assert Pictures(None, tmp_path).keep(avif.getvalue()).endswith(".avif")
    assert Pictures(None, tmp_path).keep(png()).endswith(".png")
    with pytest.raises(BadRecord, match="has more than"):
        Pictures(None, tmp_path).keep(b"\xff\xd8\xff" + bytes(kept.PICTURE_BYTES))


def test_a_source_may_be_a_folder(tmp_path):
    boxed.captions(tmp_path, [("a.png", png(), "A")])
    [source] = sources((f"{tmp_path}:2",), PictureFolders.of(Config()), "")
    assert source.path == tmp_path and source.weight == 2 and os.fspath(source.path)
