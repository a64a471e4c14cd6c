"""The routes of the batch room: rows as they are answered, and the table of them."""

from __future__ import annotations

import csv
import io
import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import runs
from hypothesis import given
from hypothesis import strategies as st
from pages import Site, pictures, served, wait_for

from assistant.messages import user_message
from assistant.refusals import Busy
from web.batch.routes import MOST_UPLOADS, place
from web.batch.table import FORMULA, TableRow, cell, table
from web.errors import RequestError

KEY = {"x-browser-key": "ab" * 16}
QUESTION = "How many objects are there?"


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Iterator[Site]:
    folder = tmp_path_factory.mktemp("conversations")
    with served(runs.assistant(), folder, folder) as site:
        yield site


def sent(site: Site, *paths: Path) -> list[str]:
    """The ids of uploads."""
    answers = [
        httpx.post(
            f"{site.url}/app/uploads",
            params={"name": path.name},
            content=path.read_bytes(),
            headers=KEY,
        )
        for path in paths
    ]
    return [answer.json()["id"] for answer in answers]


def asked(site: Site, **more: Any) -> dict[str, Any]:
    return {"question": QUESTION, "settings": {}} | more


def events(site: Site, body: dict[str, Any], headers: dict[str, str] = KEY) -> Iterator[tuple]:
    """(name, data) as they come; closing it leaves."""
    with httpx.stream(
        "POST", f"{site.url}/app/batches", json=body, headers=headers, timeout=60
    ) as response:
        assert response.status_code == 200, response.read()
        name = ""
        for line in response.iter_lines():
            if line.startswith("event: "):
                name = line[7:]
            elif line.startswith("data: "):
                yield name, json.loads(line[6:])


def rows(site: Site, body: dict[str, Any], headers: dict[str, str] = KEY) -> dict[str, Any]:
    """What became of each upload."""
    *told, last = events(site, body, headers)
    assert last == ("done", {}) and {name for name, _ in told} <= {"row"}
    return {data["upload"]: data for _, data in told}


def test_every_picture_is_answered_as_the_assistant_does(site):
    paths = pictures(4)
    ids = sent(site, *paths)
    told = rows(site, asked(site, uploads=[*ids, ids[0]]))  # named twice, asked once
    expected = {
        id: "".join(site.assistant.reply([user_message(QUESTION, [str(path)])])).strip()
        for id, path in zip(ids, paths, strict=True)
    }
    assert {id: row["answer"] for id, row in told.items()} == expected
    assert all(row["error"] is None and row["seconds"] >= 0 for row in told.values())


def test_what_is_wrong_with_one_is_told_in_its_row(site, tmp_path):
    (good,) = sent(site, *pictures(1))
    sound = tmp_path / "sound.wav"
    sound.write_bytes(b"RIFF....")
    (recording,) = sent(site, sound)
    told = rows(site, asked(site, uploads=["0" * 32, good, recording]))
    assert told["0" * 32]["error"]["key"] == "upload_gone"
    assert told[recording]["error"]["key"] == "batch_not_picture"
    assert told[recording]["error"]["values"] == {"name": "sound.wav"}
    assert told[good]["answer"] is not None and told[good]["error"] is None


def test_the_pictures_of_another_browser_are_not_there(site):
    ids = sent(site, *pictures(1))
    told = rows(site, asked(site, uploads=ids), {"x-browser-key": "cd" * 16})
    assert told[ids[0]]["error"]["key"] == "upload_gone" and told[ids[0]]["answer"] is None


def test_who_finds_the_engine_full_waits_for_it(site, monkeypatch):
    start, refused = site.assistant.start, []

    def full_at_first(answer):
        if len(refused) < 3:
            refused.append(answer)
            answer.end("failed", Busy("assistant: 64 questions wait already; ask later"))
            raise Busy("assistant: 64 questions wait already; ask later")
        start(answer)

    monkeypatch.setattr(site.assistant, "start", full_at_first)
    ids = sent(site, *pictures(2))
    told = rows(site, asked(site, uploads=ids))
    assert len(refused) == 3 and all(row["error"] is None for row in told.values())


def test_a_fault_of_the_server_is_told_without_details_and_the_others_go_on(site, monkeypatch):
    start = site.assistant.start
    first = threading.Lock()

    def faulty(answer):
        if first.acquire(blocking=False):
            raise RuntimeError("secret")
        start(answer)

    monkeypatch.setattr(site.assistant, "start", faulty)
    told = rows(site, asked(site, uploads=sent(site, *pictures(3))))
    keys = sorted(str(row["error"] and row["error"]["key"]) for row in told.values())
    assert keys == ["None", "None", "server_failed"] and "secret" not in str(told)


def test_who_leaves_ends_all_of_it(site, monkeypatch):
    engine = site.assistant.engine
    step = engine._step

    def unhurried() -> None:
        time.sleep(0.01)
        step()

    monkeypatch.setattr(engine, "stop_ids", frozenset())
    monkeypatch.setattr(engine, "_step", unhurried)
    ids = sent(site, *pictures(3), *pictures(3), *pictures(3), *pictures(3))
    body = asked(site, uploads=ids, settings={"max_new_tokens": 100_000, "temperature": 1.0})
    with httpx.stream("POST", f"{site.url}/app/batches", json=body, headers=KEY, timeout=60):
        wait_for(lambda: site.assistant.statistics()["running"] > 0)
    wait_for(lambda: site.assistant.statistics()["running"] == 0)
    assert site.assistant.statistics()["waiting"] == 0


def test_an_answer_that_was_cut_off_is_none(site, monkeypatch):
    start = site.assistant.start

    def cut_off(answer):
        answer.cancel()
        start(answer)

    monkeypatch.setattr(site.assistant, "start", cut_off)
    ids = sent(site, *pictures(1))
    told = rows(site, asked(site, uploads=ids, settings={"temperature": 1.0, "seed": "7"}))
    assert told[ids[0]]["error"]["key"] == "batch_cut_off"


@pytest.mark.parametrize(
    ("more", "status", "key"),
    [
        ({"uploads": []}, 409, "batch_needs"),
        ({"uploads": ["0" * 32], "question": " \n"}, 409, "batch_needs"),
        ({"uploads": ["0" * 32], "settings": {"seed": "x"}}, 409, "bad_seed"),
        ({"uploads": ["../../etc/passwd"]}, 422, None),
        ({"uploads": ["0" * 32] * (MOST_UPLOADS + 1)}, 422, None),
        ({"uploads": ["0" * 32], "question": "x" * 20_001}, 422, None),
        ({"uploads": ["0" * 32], "more": 1}, 422, None),
        ({"uploads": ["0" * 32], "settings": {"more": 1}}, 422, None),
        ({"uploads": ["0" * 32], "settings": {"temperature": -1}}, 400, None),
    ],
)
def test_what_is_refused_before_anything_is_asked(site, more, status, key):
    sent = httpx.post(f"{site.url}/app/batches", json=asked(site, **more), headers=KEY)
    assert sent.status_code == status and sent.json()["error"]["key"] == key


def test_a_request_without_a_browser_key_is_refused(site):
    sent = httpx.post(f"{site.url}/app/batches", json=asked(site, uploads=["0" * 32]))
    assert sent.json()["error"]["key"] == "key_damaged"


def test_so_many_batches_at_once_and_no_more():
    places = threading.BoundedSemaphore(1)
    with place(places):
        with pytest.raises(RequestError, match="batch_busy"), place(places):
            pass
    with place(places):  # it is free again
        pass


# -- the table -------------------------------------------------------------------------------------

ROWS = [
    {"picture": "a,b.png", "question": "=1+1", "answer": "-2", "error": None, "seconds": 0.25},
    {"picture": "ü.png", "question": "=1+1", "answer": None, "error": "@x\ny", "seconds": None},
]


def made(site: Site, **more: Any) -> httpx.Response:
    body = {"form": "csv", "language": "en", "rows": ROWS} | more
    return httpx.post(f"{site.url}/app/batches/table", json=body)


def test_a_csv_opens_as_text_in_the_chosen_language(site):
    sent = made(site, language="de")
    assert sent.content.startswith("\ufeffBild,Frage,Antwort,Fehler,Sekunden\r\n".encode())
    assert list(csv.reader(io.StringIO(sent.content.decode("utf-8-sig"), newline="")))[1:] == [
        ["a,b.png", "'=1+1", "'-2", "", "0.25"],
        ["ü.png", "'=1+1", "", "'@x\ny", ""],
    ]
    assert 'filename="phisight-batch.csv"' in sent.headers["content-disposition"]


def test_portions_of_a_table_make_the_whole(site):
    portions = [made(site, rows=ROWS[:1]), made(site, rows=ROWS[1:], head=False)]
    assert b"".join(part.content for part in portions) == made(site).content


def test_jsonl_has_the_same_keys_in_every_language(site):
    sent = made(site, form="jsonl", language="zh")
    assert [json.loads(line) for line in sent.content.decode().splitlines()] == ROWS


def test_a_table_to_paste_has_tabs_and_no_mark(site):
    assert made(site, form="tsv").content.startswith(b"Picture\tQuestion\tAnswer")


def test_what_is_not_a_row_is_refused_and_an_unknown_language_is_english(site):
    assert made(site, language="xx").content == made(site).content
    for damage in ({"seconds": -1}, {"picture": None}, {"more": 1}, {"answer": "x" * 200_001}):
        assert made(site, rows=[ROWS[0] | damage]).status_code == 422
    assert made(site, form="xlsx").status_code == 422


@given(st.text(), st.sampled_from(FORMULA))
def test_no_cell_is_a_formula(text, first):
    assert not cell(text).startswith(FORMULA) and cell(first + text) == f"'{first}{text}"
    row = TableRow(text, text, text, None, 1.0)
    read = list(csv.reader(io.StringIO(table("csv", [row], "en"), newline="")))[1]
    assert read[0] == cell(text)
