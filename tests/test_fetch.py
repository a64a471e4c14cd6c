"""Fetching a data set, from a server on this machine that does what servers do: it drops, stalls,
lies and refuses. What has a picture's name is the whole picture, whatever happened."""

from __future__ import annotations

import hashlib
import io
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path
from urllib.parse import unquote, urlsplit

import httpx
import picture_server
import pytest
from conftest import ROOT
from hypothesis import given
from hypothesis import strategies as st
from picture_server import PictureServer, running, serve
from PIL import Image

from alone import opened_alone
from data.fetch import client as clients
from data.fetch import parts, pictures
from data.fetch.__main__ import main
from data.fetch.client import (
    Pace,
    Patience,
    range_of,
    seconds_to_wait,
    validator_of,
)
from data.fetch.parts import Part
from data.fetch.pictures import NOT_FETCHED, OUR_NAMES, STATE, SUMS, Sums, is_ours, url_of
from data.fetch.sources import SOURCES
from errors import PhiSightError

QUICK = Patience(
    tries=4, connect=20, stall=20, answer=60, back_off=0.01, longest_back_off=0.02, longest_wait=3
)
NAMES = [f"{number:03d}.jpg" for number in range(9)]
LARGE = NAMES[0]  # several pieces of a connection


def jpeg(seed: int, width: int = 24, comment: bytes = b"one") -> bytes:
    """A picture of noise, which does not compress."""
    pixels = random.Random(seed).randbytes(width * width * 3)
    made = io.BytesIO()
    Image.frombytes("RGB", (width, width), pixels).save(made, "JPEG", comment=comment, quality=95)
    return made.getvalue()


PICTURES = {name: jpeg(seed, 400 if name == LARGE else 24) for seed, name in enumerate(NAMES)}
OTHER = jpeg(0, 400, b"two")  # as many bytes
LONGER = jpeg(99, 410)


def record(name: str, words: str = "What is it?") -> dict:
    turns = [{"from": "human", "value": f"<image>\n{words}"}, {"from": "gpt", "value": "Noise."}]
    return {"id": name, "image": name, "conversations": turns}


class Place:
    """A server with a data set, and a folder to fetch it into."""

    def __init__(self, server: PictureServer, folder: Path) -> None:
        self.server, self.folder = server, folder
        self.images, self.data = folder / "images", folder / "d.json"
        server.files |= {f"/pictures/{name}": data for name, data in PICTURES.items()}
        self.offer([record(name) for name in NAMES])

    def offer(self, records: list[dict]) -> None:
        self.json = json.dumps(records).encode()
        self.server.files["/d.json"] = self.json

    def answers(self, name: str, *answers: picture_server.Answer) -> None:
        self.server.answers[f"/pictures/{name}"] = list(answers)

    def flags(self, *more: object) -> list[str]:
        address = self.server.address
        return [
            "llava-instruct-150k",
            *("--images", str(self.images), "--data", str(self.data)),
            *("--json-url", f"{address}/d.json", "--pictures-url", f"{address}/pictures"),
            *("--sha256", hashlib.sha256(self.json).hexdigest()),
            *map(str, more),
        ]

    def fetch(self, *more: object, patience: Patience = QUICK) -> int:
        return main(self.flags("--tries", patience.tries, *more), patience)

    def lost(self) -> dict[str, str]:
        """What could not be had, and why."""
        path = self.images / NOT_FETCHED
        if not path.exists():
            return {}
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        assert all(row["url"] == f"{self.server.address}/pictures/{row['name']}" for row in rows)
        return {row["name"]: row["reason"] for row in rows}

    def there(self) -> dict[str, bytes]:
        """The pictures that are there."""
        files = (path for path in self.images.rglob("*") if path.is_file())
        found = {str(path.relative_to(self.images)): path for path in files}
        return {n: p.read_bytes() for n, p in found.items() if not is_ours(n)}

    def requests(self, name: str) -> int:
        return len(self.server.asked_for(f"/pictures/{name}"))

    def process(self, *more: object) -> subprocess.Popen:
        command = [sys.executable, "-m", "data.fetch", *self.flags(*more)]
        return subprocess.Popen(
            command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )


@pytest.fixture
def place(tmp_path, monkeypatch) -> Iterator[Place]:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with running() as server:
        yield Place(server, tmp_path)


def tree(folder: Path) -> dict[str, bytes]:
    """Every file of a folder, hidden ones too."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def wait_until(holds: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < end, "nothing happened for a minute"
        time.sleep(0.01)


# -- all is well ----------------------------------------------------------------------------------


def test_the_json_and_the_pictures_that_it_names_are_fetched_and_listed(place, capsys):
    place.server.files["/pictures/of-nobody.jpg"] = jpeg(7)
    assert place.fetch() == 0
    assert place.data.read_bytes() == place.json
    assert place.there() == PICTURES
    assert tree(place.images).keys() == {*NAMES, SUMS, f"{STATE}/lock"}
    checked = subprocess.run(
        ["sha256sum", "--check", "--strict", SUMS], cwd=place.images, capture_output=True, text=True
    )
    assert (checked.returncode, checked.stdout.count(": OK")) == (0, len(NAMES))
    said = capsys.readouterr().out
    assert "9 pictures in 9 of 9 conversations" in said
    assert f"9 fetched ({sum(map(len, PICTURES.values())) / 1000:.1f} KB), 0 could not" in said
    assert f"--preset phi35 --data {place.data} --images {place.images}" in said


def test_what_is_there_and_whole_is_not_asked_for_again(place):
    place.fetch()
    (place.images / NAMES[1]).write_bytes(PICTURES[NAMES[1]][:-400])  # half a picture
    (place.images / NAMES[2]).unlink()
    place.server.asked.clear()
    assert place.fetch() == 0
    asked = {one.path for one in place.server.asked}
    assert asked == {f"/pictures/{name}" for name in NAMES[1:3]}
    assert place.there() == PICTURES


def test_pictures_of_ones_own_are_taken_and_summed(place):
    place.images.mkdir()
    own = jpeg(55)
    (place.images / NAMES[3]).write_bytes(own)
    place.fetch()
    assert place.there() == PICTURES | {NAMES[3]: own}
    assert place.requests(NAMES[3]) == 0
    assert hashlib.sha256(own).hexdigest() in (place.images / SUMS).read_text()


def test_few_connections_are_used_again_and_say_who_asks(place):
    place.fetch("--connections", 2)
    for_pictures = [one for one in place.server.asked if one.path != "/d.json"]
    assert len({one.client for one in for_pictures}) <= 2
    assert {one.agent for one in place.server.asked} == {"PhiSight/0.1 (python -m data.fetch)"}


def test_the_part_is_fetched_that_training_uses(place, tmp_path):
    """The whole way: what `train.py` would look for with the same flags is what is there."""
    from test_prepare import Workspace

    from data.chat import ChatFormat, load_tokenizer

    (tmp_path / "training").mkdir()
    chat_format = ChatFormat.from_tokenizer(load_tokenizer(ROOT / "assets/tiny/phi3"), 3)
    workspace = Workspace(tmp_path / "training", chat_format)
    place.server.files |= {
        f"/pictures/{name}": (workspace.folder / "images" / name).read_bytes()
        for name in workspace.names
    }
    workspace.records[4]["image"] = workspace.records[3]["image"]
    workspace.records[5]["conversations"].pop()  # cannot be used, so its picture is not either
    place.offer(workspace.records)
    assert place.fetch("--fraction", 0.4, "--seed", 3) == 0
    shutil.rmtree(workspace.folder / "images")
    place.images.rename(workspace.folder / "images")
    data = workspace.prepare(data_fraction=0.4, seed=3)
    samples = [*data.train, *data.validation]
    used = {name for sample in samples for name in sample.images}
    place.images = workspace.folder / "images"
    assert used == place.there().keys()
    assert [q.where for q in data.quarantined] == ["data.json record 6"]
    assert 3 < len(used) < 12


def test_a_larger_part_asks_for_what_is_new_alone(place):
    place.fetch("--fraction", 0.5)
    first = place.there()
    place.server.asked.clear()
    place.fetch()
    assert 0 < len(first) < len(NAMES)
    assert len(place.server.asked) == len(NAMES) - len(first)
    assert place.there() == PICTURES


# -- servers that fail ----------------------------------------------------------------------------

html = picture_server.sends(b"<html>Please log in</html>", Content_Type="text/html")
MIDDLE = len(PICTURES[LARGE]) // 2


@pytest.mark.parametrize(
    ("failures", "asked"),
    [
        ([picture_server.drop(0)], 2),
        ([picture_server.drop(100), picture_server.drop(MIDDLE)], 3),
        ([picture_server.says(2 * len(PICTURES[LARGE]))], 3),  # asked for a rest that is not there
        ([picture_server.says(MIDDLE)], 2),
        ([picture_server.status(500), picture_server.status(502)], 3),
        ([picture_server.status(429)], 2),
        ([html], 2),
        ([picture_server.sends(b"")], 2),
        ([picture_server.drop(MIDDLE), picture_server.whole], 2),
        ([picture_server.drop(MIDDLE), picture_server.status(416)], 3),
        ([picture_server.drop(MIDDLE), picture_server.part_of(OTHER)], 3),
        ([picture_server.drop(MIDDLE), picture_server.part_of(LONGER, tagged=False)], 3),
    ],
    ids=[
        "hangs up",
        "drops twice",
        "says too much",
        "says too little",
        "fails",
        "is busy",
        "sends a page",
        "sends nothing",
        "ignores ranges",
        "has no such range",
        "gives a part of another version",
        "gives a part of a longer version",
    ],
)
def test_a_failure_that_passes_costs_a_try(place, failures, asked):
    place.answers(LARGE, *failures, serve)
    assert place.fetch() == 0
    assert place.there() == PICTURES
    assert place.requests(LARGE) == asked


def test_what_came_before_a_drop_is_not_asked_for_again(place):
    place.answers(LARGE, picture_server.drop(MIDDLE), serve)
    place.fetch()
    first, second = place.server.asked_for(f"/pictures/{LARGE}")
    assert (first.range, first.if_range) == ("", "")
    assert second.range == f"bytes={MIDDLE}-"
    assert second.if_range == picture_server.tag_of(PICTURES[LARGE])


def test_a_file_that_changes_between_two_tries_comes_whole_in_its_new_version(place):
    def drop_and_change(handler: picture_server.Handler, data: bytes) -> None:
        place.server.files[f"/pictures/{LARGE}"] = OTHER
        picture_server.drop(MIDDLE)(handler, data)

    place.answers(LARGE, drop_and_change, serve)
    assert place.fetch() == 0
    assert place.there() == PICTURES | {LARGE: OTHER}


@pytest.mark.parametrize(
    ("answer", "reason", "tries"),
    [
        (picture_server.status(404), "status 404", 1),
        (picture_server.status(403), "status 403", 1),
        (picture_server.status(500), "status 500 (try 4 of 4)", 4),
        (picture_server.says(10**9), "over the limit of 52,428,800", 1),
        (picture_server.says(MIDDLE), "broken or truncated picture", 2),
        (html, "not a picture in a known format", 2),
        (picture_server.sends(bytes(50), Content_Encoding="gzip"), "comes packed as gzip", 1),
        (picture_server.status(302, Location="x.jpg"), "redirected more than 5 times", 1),
        (picture_server.status(302, Location="file:///etc/passwd"), "which is no web address", 1),
        (picture_server.status(302, Location="ftp://127.0.0.1/x"), "which is no web address", 1),
        (picture_server.status(302, Location="http://[x"), "the connection broke", 4),
        (picture_server.status(304), "status 304", 1),
        (picture_server.status(206, Content_Range="bytes 0-0/1"), "it changed on the server", 4),
        (picture_server.unending, "has more than 52,428,800 bytes", 1),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_cannot_be_had_is_listed_with_its_reason(place, answer, reason, tries, capsys):
    place.answers("x.jpg", answer)  # where one of them redirects to
    place.answers(LARGE, answer)
    assert place.fetch() == 1
    assert place.lost().keys() == {LARGE}
    assert reason in place.lost()[LARGE]
    assert place.requests(LARGE) == tries
    assert place.there() == {name: PICTURES[name] for name in NAMES if name != LARGE}
    assert f"1 could not be had: {place.images / NOT_FETCHED}" in capsys.readouterr().out
    place.server.answers.clear()
    place.server.asked.clear()
    assert place.fetch() == 0
    assert {one.path for one in place.server.asked} == {f"/pictures/{LARGE}"}
    assert place.lost() == {}
    assert place.there() == PICTURES


def test_a_silence_costs_a_try(place):
    place.answers(LARGE, picture_server.stall(MIDDLE), serve)
    place.answers(NAMES[1], picture_server.stall(10))
    assert place.fetch(patience=replace(QUICK, tries=2, stall=1)) == 1
    assert place.lost() == {NAMES[1]: "nothing came for 1 seconds (try 2 of 2)"}
    assert place.there()[LARGE] == PICTURES[LARGE]


@pytest.mark.parametrize("answer", [picture_server.drip, picture_server.drip_head])
def test_an_answer_that_never_ends_is_ended(place, answer):
    place.answers(LARGE, answer)
    assert place.fetch(patience=replace(QUICK, tries=1, answer=1.5, slowest=1e9)) == 1
    assert place.lost() == {LARGE: "came too slowly (try 1 of 1)"}


def test_a_large_file_has_the_time_that_its_size_takes(place):
    place.server.seconds_a_piece = 0.6  # LARGE has three pieces
    assert place.fetch(patience=replace(QUICK, tries=1, answer=1.5, slowest=10_000)) == 0
    assert place.there() == PICTURES


def test_a_redirect_is_followed(place):
    place.server.files["/elsewhere/y.jpg"] = PICTURES[LARGE]
    place.answers(LARGE, picture_server.status(302, Location="/elsewhere/y.jpg"))
    assert place.fetch() == 0
    assert place.there() == PICTURES


def test_a_redirect_from_https_to_http_is_refused():
    with pytest.raises(clients.NotFetched, match="from https to http"):
        clients._check_redirect(httpx.URL("https://a.org/x"), httpx.URL("http://a.org/x"))


def test_a_server_that_asks_for_a_pause_gets_it_from_every_connection(place):
    told, is_told = [], threading.Event()

    def busy(handler: picture_server.Handler, data: bytes) -> None:
        told.append(time.monotonic())
        picture_server.status(429, Retry_After=2)(handler, data)
        is_told.set()

    def once_that_is_known(handler: picture_server.Handler, data: bytes) -> None:
        is_told.wait()
        time.sleep(0.7)
        serve(handler, data)

    place.answers(NAMES[0], once_that_is_known)
    place.answers(NAMES[1], busy, serve)
    assert place.fetch("--connections", 2) == 0
    later = [one for one in place.server.asked if one.at > told[0] and one.path[-7:] != NAMES[0]]
    assert len(later) == len(NAMES) - 1
    assert all(one.at >= told[0] + 2 for one in later)
    assert place.there() == PICTURES


def test_a_server_that_asks_for_a_long_pause_is_left_alone(place):
    place.answers(NAMES[1], picture_server.status(503, Retry_After=3600))
    with pytest.raises(PhiSightError, match="127.0.0.1: asks for a pause of 3,600 seconds; run"):
        place.fetch()
    place.server.answers.clear()
    assert place.fetch() == 0
    assert place.there() == PICTURES


def test_a_server_that_gives_nothing_is_not_asked_for_everything(place, monkeypatch):
    monkeypatch.setattr(pictures, "FAILURES_IN_A_ROW", 3)
    for name in NAMES:
        place.answers(name, picture_server.status(404))
    assert place.fetch("--connections", 1) == 1
    assert sum(place.requests(name) for name in NAMES) == 3
    reasons = list(place.lost().values())
    assert reasons[:3] == ["the server answers with status 404"] * 3
    assert reasons[3:] == ["not asked for: 3 in a row had failed"] * 6


def test_without_a_server_it_ends_with_one_line(place):
    flags = place.flags("--tries", 1)
    flags[flags.index("--json-url") + 1] = "http://127.0.0.1:9/d.json"
    with pytest.raises(PhiSightError, match="^http://127.0.0.1:9/d.json: the connection broke"):
        main(flags, QUICK)
    assert not place.data.exists()


# -- the JSON -------------------------------------------------------------------------------------


def test_a_json_of_another_hash_gets_no_name(place):
    flags = place.flags("--tries", 4)
    place.server.files["/d.json"] = json.dumps([record("evil.jpg")]).encode()
    with pytest.raises(PhiSightError, match="its sha256 is not the one that it must have"):
        main(flags, QUICK)
    assert not place.data.exists()
    assert len(place.server.asked) == 2


def test_a_json_that_is_there_and_is_another_is_left_and_told(place):
    place.data.write_text("[]")
    found = hashlib.sha256(b"[]").hexdigest()
    with pytest.raises(PhiSightError, match=f"is there and is another.*--sha256 {found} if this"):
        place.fetch()
    assert place.data.read_text() == "[]"
    assert place.server.asked == []


def test_without_sha256_it_must_be_the_published_json(place):
    flags = place.flags()
    del flags[flags.index("--sha256") : flags.index("--sha256") + 2]
    with pytest.raises(PhiSightError, match="its sha256 is not the one that it must have"):
        main(flags, QUICK)


def test_names_of_strangers_never_lead_out_of_the_folder_or_onto_files_of_ours(place):
    hostile = ["../out.jpg", "/tmp/out.jpg", "a/../../out.jpg", "..\\out.jpg", "C:\\out.jpg"]
    ours = [f"{STATE}/lock", ".FETCH/x.jpg", SUMS, f"{NOT_FETCHED}", "sha256sums"]
    odd = ["a b/#1?x=%41.jpg", "naïve/..jpg", "back/slash.jpg"]
    clash = [NAMES[0] + "/below.jpg"]  # a folder's name that a picture has
    for name in (*hostile, *ours, *odd, *clash):
        place.server.files[f"/pictures/{name}"] = PICTURES[NAMES[1]]
    place.offer([record(name) for name in (*NAMES, *hostile, *ours, *odd, *clash)])
    assert place.fetch("--connections", 1) == 1
    assert place.there() == PICTURES | {name: PICTURES[NAMES[1]] for name in odd}
    assert place.lost().keys() == {*ours, *clash}
    assert {path.name for path in place.folder.iterdir()} == {"images", "d.json"}
    checked = subprocess.run(["sha256sum", "--check", "--strict", SUMS], cwd=place.images)
    assert checked.returncode == 0


# -- kills ----------------------------------------------------------------------------------------


def test_after_kills_at_any_instant_the_result_is_that_of_an_unbroken_run(place):
    """Each run is killed after some more requests; what has its name is whole at every moment."""
    place.offer([record(name, "x" * 700_000) for name in NAMES])  # 6.3 MB: a part is noted
    place.fetch()
    unbroken = tree(place.images)
    shutil.rmtree(place.images)
    place.data.unlink()
    place.server.asked.clear()
    place.server.seconds_a_piece = 0.02
    instants = (
        lambda: any((place.images / STATE).glob("*.json")),  # a part of the JSON is noted
        lambda: len(place.server.asked) > 4,
        lambda: len(place.there()) > 6,
    )
    for instant in instants:
        process = place.process("--connections", 2)
        wait_until(instant)
        process.kill()
        process.communicate()
        assert place.there().items() <= PICTURES.items()
        assert not place.data.exists() or place.data.read_bytes() == place.json
    place.server.seconds_a_piece = 0.0
    assert place.fetch() == 0
    assert tree(place.images) == unbroken
    first, second = place.server.asked_for("/d.json")
    assert first.range == ""
    assert int(second.range.removeprefix("bytes=").removesuffix("-")) >= parts.NOTE_EVERY


def test_ctrl_c_ends_at_once_and_keeps_what_is_whole(place):
    place.answers(LARGE, picture_server.stall(MIDDLE))
    process = place.process()
    others = {name: PICTURES[name] for name in NAMES if name != LARGE}
    state = place.images / STATE
    wait_until(
        lambda: place.there() == others and any(p.stat().st_size for p in state.glob("*.part"))
    )
    process.send_signal(signal.SIGINT)
    out, error = process.communicate(timeout=20)
    assert (process.returncode, error) == (130, "interrupted: what was saved is kept\n")
    place.server.answers.clear()
    place.server.asked.clear()
    assert place.fetch() == 0
    (again,) = place.server.asked
    assert 0 < int(again.range.removeprefix("bytes=").removesuffix("-")) <= MIDDLE
    assert place.there() == PICTURES


def test_two_processes_do_not_fetch_into_one_folder(place):
    (place.images / STATE).mkdir(parents=True)
    with opened_alone(place.images / STATE / "lock", "--images"):
        with pytest.raises(PhiSightError, match="another process writes it"):
            place.fetch()
    assert place.server.asked == []
    assert place.fetch() == 0


def test_too_small_a_disk_is_told_before_a_picture_is_asked_for(place, monkeypatch):
    usage = shutil.disk_usage(place.folder)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=64 * 2**20 + 10**6))
    with pytest.raises(PhiSightError, match="too little room for 9 pictures .about 1.5 MB; "):
        place.fetch()
    assert {one.path for one in place.server.asked} == {"/d.json"}


def test_a_disk_that_cannot_be_written_ends_it_with_one_line(place, monkeypatch):
    place.images.write_text("a file")
    with pytest.raises(PhiSightError, match="images.*; mend that, and run again"):
        place.fetch()


# -- flags ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--fraction", "0"], "data fraction 0.0: out of range"),
        (["--fraction", "nan"], "data fraction nan: out of range"),
        (["--connections", "33"], "--connections 33: out of range; give 1 to 32"),
        (["--tries", "0"], "--tries 0: out of range"),
        (["--limit-rate", "-1"], "--limit-rate -1.0: must be 0 or more"),
        (["--limit-rate", "inf"], "--limit-rate inf: must be 0 or more"),
        (["--sha256", "ABC"], "--sha256: is not 64 hexadecimal digits"),
        (["--json-url", "file:///etc/passwd"], "--json-url file:///etc/passwd: not a web address"),
        (["--json-url", "http://"], "--json-url http://: not a web address"),
        (["--pictures-url", "http://a.org/?x="], "--pictures-url http://a.org/?x=: not a web"),
        (["--pictures-url", "http://["], "--pictures-url http://[: not a web address"),
    ],
)
def test_a_flag_that_cannot_be_is_refused_before_anything_is_asked(place, flags, message):
    with pytest.raises(PhiSightError) as error:
        main([*place.flags(), *flags])
    assert str(error.value).startswith(message)
    assert place.server.asked == []
    assert not place.images.exists()


def test_help_tells_what_a_data_set_costs_and_its_licence(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    said = capsys.readouterr().out
    assert "157,712 records about 81,479 pictures, about 13.5 GB in all" in said
    assert "CC BY 4.0" in said


@pytest.mark.parametrize("source", SOURCES.values(), ids=list(SOURCES))
def test_every_source_is_pinned(source):
    assert len(bytes.fromhex(source.json_sha256)) == 32
    assert source.json_url.startswith("https://")
    assert source.pictures_url.endswith("/")
    if "huggingface.co" in source.json_url:
        commit = source.json_url.partition("/resolve/")[2].split("/")[0]
        assert len(bytes.fromhex(commit)) == 20, "a branch may change"


# -- what servers say -----------------------------------------------------------------------------

NOW = datetime(2026, 11, 29, 5, 0, tzinfo=UTC)


@given(st.integers(0, 10**9), st.integers(1, 10**9))
def test_a_range_to_the_end_is_read(first, more):
    whole = first + more
    assert range_of(f"bytes {first}-{whole - 1}/{whole}") == (first, whole)
    assert range_of(f"bytes {first}-{whole - 1}/{whole + 1}") is None


@given(st.text() | st.from_regex(r"bytes \d+-\d+/(\d+|\*)"))
def test_any_other_range_is_none(text):
    found = range_of(text)
    if found is not None:
        first, whole = found
        assert text == f"bytes {text[6:].split('-')[0]}-{text.split('-')[1]}"
        assert 0 <= first < whole


@pytest.mark.parametrize(
    ("said", "seconds"),
    [
        ("0", 0),
        ("120", 120),
        (format_datetime(NOW + timedelta(seconds=90), usegmt=True), 90),
        ("Sunday, 29-Nov-26 05:01:00 GMT", 60),
        ("Sun Nov 29 05:01:00 2026", 60),
        (format_datetime(NOW - timedelta(days=1), usegmt=True), 0),
        ("", None),
        ("-5", None),
        ("1.5", None),
        ("soon", None),
        ("٣", None),
    ],
)
def test_retry_after_is_seconds_or_a_date(said, seconds):
    assert seconds_to_wait(said, NOW) == seconds


@given(st.text(max_size=50) | st.from_regex(r"\w{3}, \d{1,3} \w{3} \d{1,5} \d+:\d+:\d+ [+-]?\w+"))
def test_retry_after_of_any_text_is_bounded_below_or_none(text):
    found = seconds_to_wait(text, NOW)
    assert found is None or found >= 0


@pytest.mark.parametrize(
    ("headers", "validator"),
    [
        ({"ETag": '"abc"', "Last-Modified": "Sun, 29 Nov 2026 05:00:00 GMT"}, '"abc"'),
        ({"ETag": 'W/"abc"'}, ""),
        (
            {"ETag": 'W/"abc"', "Last-Modified": "Sun, 29 Nov 2026 05:00:00 GMT"},
            "Sun, 29 Nov 2026 05:00:00 GMT",
        ),
        ({"ETag": "abc"}, ""),
        ({"ETag": f'"{"a" * 300}"'}, ""),
        ({"Last-Modified": "yesterday"}, ""),
        ({}, ""),
    ],
)
def test_only_a_name_that_tells_bytes_apart_is_gone_on_with(headers, validator):
    assert validator_of(httpx.Headers(headers)) == validator


@given(st.text(st.characters(exclude_categories=["Cs"]), min_size=1))
def test_a_name_stands_in_its_address_whatever_it_holds(name):
    address = url_of("http://a.org/b/", name)
    parsed = urlsplit(address)
    assert unquote(parsed.path) == f"/b/{name}"
    assert (parsed.query, parsed.fragment) == ("", "")
    assert httpx.URL(address).raw_path.decode() == parsed.path


def test_bytes_wait_for_the_rate(monkeypatch):
    """Two connections that take together what one may: the waiting adds up."""
    import asyncio

    now, slept = [100.0], []

    async def sleep(seconds: float) -> None:
        slept.append(seconds)

    monkeypatch.setattr(clients.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(clients.asyncio, "sleep", sleep)
    pace = Pace(bytes_per_second=1000)

    async def pass_some() -> None:
        await pace.passed(500)
        await pace.passed(500)
        now[0] = 200.0
        await pace.passed(500)

    asyncio.run(pass_some())
    assert slept == [0.5, 1.0, 0.5]


# -- what is kept ---------------------------------------------------------------------------------


def test_a_part_is_gone_on_with_as_far_as_it_was_noted(tmp_path):
    part = Part(tmp_path, "http://a.org/x")
    part.begin(3 * parts.NOTE_EVERY, '"v"')
    part.append(bytes(parts.NOTE_EVERY))
    part.append(b"after the note")
    part.close()  # as a kill leaves it
    again = Part(tmp_path, "http://a.org/x")
    assert (again.length, again.size, again.validator) == (part._noted, part.size, '"v"')
    assert again.can_go_on
    again.append(b"other bytes")
    again.close()
    assert again.path.read_bytes() == bytes(parts.NOTE_EVERY) + b"other bytes"
    assert not Part(tmp_path, "http://a.org/y").can_go_on


@pytest.mark.parametrize(
    "note",
    [
        b"",
        b"{}",
        b'{"length": 9, "size": 99, "validator": "v"}',  # more than there is
        b'{"length": -1, "size": 99, "validator": "v"}',
        b'{"length": 5, "size": null, "validator": "v"}',
        b'{"length": 5, "size": 5, "validator": "v"}',
        b'{"length": 5, "size": 99, "validator": ""}',
        b"[" * 5000,
    ],
)
def test_a_note_that_does_not_fit_is_not_believed(tmp_path, note):
    part = Part(tmp_path, "http://a.org/x")
    part.append(b"bytes")
    part.close()
    part._note.write_bytes(note)
    assert not Part(tmp_path, "http://a.org/x").can_go_on


def test_a_link_in_the_place_of_a_part_is_not_followed(tmp_path):
    outside = tmp_path / "outside"
    outside.write_text("mine")
    part = Part(tmp_path, "http://a.org/x")
    part.path.symlink_to(outside)
    with pytest.raises(OSError):
        part.append(b"theirs")
    assert outside.read_text() == "mine"


def test_sums_leave_out_what_a_kill_cut(tmp_path):
    sums = Sums(tmp_path)
    sums.add("a\\b.jpg", "1" * 64)
    sums.add("c.jpg", "2" * 64)
    path = tmp_path / SUMS
    path.write_bytes(path.read_bytes()[:-3])  # "c." would be another picture
    again = Sums(tmp_path)
    again.write()
    assert path.read_text() == f"\\{'1' * 64}  a\\\\b.jpg\n"


def test_a_picture_that_is_not_there_any_more_has_no_sum(tmp_path):
    sums = Sums(tmp_path)
    sums.add("a.jpg", "1" * 64)
    (tmp_path / "b.jpg").write_bytes(b"b")
    sums.complete(tmp_path, there=["b.jpg"], absent=["a.jpg"])
    assert (tmp_path / SUMS).read_text() == f"{hashlib.sha256(b'b').hexdigest()}  b.jpg\n"


def test_parts_that_nobody_goes_on_with_are_swept(place):
    """What was noted stays until nothing is missing any more: it may be the missing one's."""
    state = place.images / STATE
    state.mkdir(parents=True)
    for name in ("noted.part", "noted.json", "stray.part"):
        (state / name).touch()
    place.answers(LARGE, picture_server.status(404))
    assert place.fetch() == 1
    assert {path.name for path in state.iterdir()} == {"lock", "noted.part", "noted.json"}
    place.server.answers.clear()
    assert place.fetch() == 0
    assert {path.name for path in state.iterdir()} == {"lock"}


def test_another_list_of_that_name_is_not_overwritten(tmp_path):
    (tmp_path / SUMS).write_text("MD5 (a.jpg) = 0\n")
    with pytest.raises(PhiSightError, match="is not a list of sha256 sums; move it away"):
        Sums(tmp_path)


def test_our_names_are_told_whatever_their_letters():
    assert all(is_ours(name.upper()) for name in OUR_NAMES)
    assert is_ours(f"{STATE}/any.jpg")
    assert not is_ours(f"below/{SUMS}")
    assert os.sep == "/"
