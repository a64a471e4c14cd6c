"""Untrusted bytes in child processes: limits, cancelling, notes, and nothing left behind."""

from __future__ import annotations

import ctypes
import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

import workers.pool as workers
from errors import PhiSightError
from workers.child import LENGTHS, Result
from workers.pool import Cancelled, Limits, Workers

ROOT = Path(__file__).resolve().parent.parent
NAMED = {"name": "a.bin", "remedy": "send another"}


# -- what children are asked to do ----------------------------------------------------------------


def echo(data: bytearray, **arguments: object) -> Result:
    return {"bytes": len(data), "arguments": arguments, "process": os.getpid()}, data


def turn_forever(data: bytearray) -> Result:
    while True:
        pass


def sleep_forever(data: bytearray) -> Result:
    while True:
        time.sleep(1)


def take(data: bytearray, size: int) -> Result:
    return len(bytearray(size)), b""


def keep(data: bytearray, size: int) -> Result:
    """Hold on to memory, as a library that leaks does."""
    globals().setdefault("kept", []).append(b"x" * size)
    return os.getpid(), b""


def crash(data: bytearray) -> Result:
    ctypes.string_at(1)
    return None, b""


def refuse(data: bytearray) -> Result:
    raise PhiSightError("a.bin: is wrong; mend it")


def fail(data: bytearray) -> Result:
    raise KeyError("one\ntwo")


def leave(data: bytearray) -> Result:
    os._exit(0)


def write_notes(data: bytearray, lines: int) -> Result:
    for _ in range(lines):
        os.write(2, b"libtest: a header is \x1b[31mwrong\n" + b"\xff" * 200 + b"\n")
    return lines, b""


def modules(data: bytearray) -> Result:
    return sorted(sys.modules), b""


def nested(data: bytearray) -> Result:
    print("to standard output")  # belongs to nobody and harms nothing
    return {"a": [1, 2.5, None, "ä"]}, b""


@pytest.fixture
def pool(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT / "tests"))
    pool = Workers(2, Limits(cpu_seconds=5, memory=256 << 20, result=4 << 20))
    yield pool
    pool.close()


def state(process: int) -> str:
    """The letter that Linux gives to what a process does; empty for none."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return ""


def gone(process: int) -> bool:
    return state(process) in ("", "Z")  # Z: ended, and nobody has asked how yet


def wait_until(condition) -> None:
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end, "it did not come about"
        time.sleep(0.01)


# -- results --------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [0, 1, 65_536, 3_000_001])
def test_bytes_go_there_and_back(pool, size):
    data = os.urandom(size)
    value, result = pool.call(echo, data, {"a": [1, "ä"]}, **NAMED)
    assert (value["bytes"], value["arguments"], result) == (size, {"a": [1, "ä"]}, data)


def test_values_are_what_json_holds(pool):
    assert pool.call(nested, **NAMED) == ({"a": [1, 2.5, None, "ä"]}, b"")


def test_a_child_is_used_again(pool):
    first, second = (pool.call(echo, **NAMED)[0]["process"] for _ in range(2))
    assert first == second != os.getpid()


def test_a_child_imports_no_torch(pool):
    assert "torch" not in pool.call(modules, **NAMED)[0]


def test_many_threads_share_the_children(pool):
    seen: list[tuple[int, bytes]] = []

    def ask(number: int) -> None:
        value, result = pool.call(echo, bytes([number]) * 1000, **NAMED)
        seen.append((value["process"], bytes(result)))

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(result for _, result in seen) == [bytes([n]) * 1000 for n in range(12)]
    assert len({process for process, _ in seen}) <= 2


# -- limits ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("function", "arguments", "limits", "reason"),
    [
        (turn_forever, {}, Limits(cpu_seconds=0), "took over 0 seconds of processor time"),
        (sleep_forever, {}, Limits(wall_seconds=0.3), "took over 0.3 seconds"),
        (take, {"size": 300 << 20}, None, "takes over 256 MB of memory"),
        (take, {"size": 2**62}, None, "takes over 256 MB of memory"),
        (crash, {}, None, "(SIGSEGV)"),
        (leave, {}, None, "(exit status 0)"),
        (fail, {}, None, "KeyError: 'one\\ntwo'"),
        (echo, {"a": 1}, Limits(result=10), "would give a result of"),
    ],
)
def test_what_goes_wrong_in_a_child_is_one_error_and_the_next_call_works(
    pool, function, arguments, limits, reason
):
    with pytest.raises(PhiSightError) as caught:
        pool.call(function, b"." * 100, arguments, limits=limits, **NAMED)
    said = str(caught.value)
    assert said.startswith("a.bin: ") and said.endswith("; send another") and reason in said
    assert "\n" not in said
    assert pool.call(echo, b"well", **NAMED)[1] == b"well"


def test_an_error_of_the_function_is_raised_as_it_is(pool):
    before = pool.call(echo, **NAMED)[0]["process"]
    with pytest.raises(PhiSightError, match="^a.bin: is wrong; mend it$"):
        pool.call(refuse, **NAMED)
    assert pool.call(echo, **NAMED)[0]["process"] == before


def test_limits_count_each_call_anew(pool):
    for _ in range(3):  # together over the limit
        assert pool.call(take, b"", {"size": 100 << 20}, **NAMED)[0] == 100 << 20


def test_a_child_that_has_grown_is_replaced(pool):
    first = pool.call(keep, b"", {"size": 200 << 20}, **NAMED)[0]
    assert gone(first)
    assert pool.call(echo, **NAMED)[0]["process"] != first


def test_children_without_work_end(pool, monkeypatch):
    monkeypatch.setattr(workers, "IDLE_SECONDS", 0.05)
    process = pool.call(echo, **NAMED)[0]["process"]
    wait_until(lambda: gone(process))
    assert pool.call(echo, b"again", **NAMED)[1] == b"again"


def test_a_child_that_was_killed_while_idle_is_replaced(pool):
    process = pool.call(echo, **NAMED)[0]["process"]
    os.kill(process, signal.SIGKILL)
    # Its first thread may be a zombie while the second one still ends, and the whole not yet dead.
    dead = os.WEXITED | os.WNOHANG | os.WNOWAIT
    wait_until(lambda: os.waitid(os.P_PID, process, dead) is not None)
    assert pool.call(echo, b"again", **NAMED)[1] == b"again"


# -- cancelling -----------------------------------------------------------------------------------


def test_a_call_is_ended_at_once_when_it_is_cancelled(pool):
    asked = []

    def cancelled() -> bool:
        asked.append(None)
        return len(asked) > 3

    with pytest.raises(Cancelled):
        pool.call(turn_forever, cancelled=cancelled, limits=Limits(cpu_seconds=600), **NAMED)
    assert pool._running == set() and pool._idle == []


def test_who_waits_for_a_child_can_be_cancelled(pool):
    left = threading.Event()

    def hold() -> None:
        with pytest.raises(Cancelled):
            pool.call(sleep_forever, cancelled=left.is_set, **NAMED)

    holders = [threading.Thread(target=hold) for _ in range(2)]
    for holder in holders:
        holder.start()
    wait_until(lambda: len(pool._running) == 2)
    looks = iter([False, False, True])
    with pytest.raises(Cancelled):
        pool.call(echo, cancelled=lambda: next(looks), **NAMED)
    left.set()
    for holder in holders:
        holder.join()
    assert pool.call(echo, b"free", **NAMED)[1] == b"free"


# -- standard error -------------------------------------------------------------------------------


def test_notes_are_one_bounded_line_of_the_log(pool, caplog, capfd):
    with caplog.at_level(logging.WARNING, "phisight.workers"):
        pool.call(write_notes, b"", {"lines": 20_000}, **NAMED)
        pool.call(write_notes, b"", {"lines": 1}, **NAMED)
    (record,) = caplog.records
    said = record.getMessage()
    assert said.startswith("a.bin: its decoder wrote 4660000 bytes of notes: libtest: a header is")
    assert len(said) < 400 and said.isprintable()
    assert capfd.readouterr().err.count("libtest") <= 1  # nothing but the log's own line


def test_notes_that_were_not_told_are_counted(pool, caplog, monkeypatch):
    with caplog.at_level(logging.WARNING, "phisight.workers"):
        for seconds in (1000.0, 1000.0, 0.0):
            monkeypatch.setattr(workers, "NOTE_SECONDS", seconds)
            pool.call(write_notes, b"", {"lines": 1}, **NAMED)
        pool._notes._next = 0.0
        pool.call(write_notes, b"", {"lines": 1}, **NAMED)
    assert len(caplog.records) == 2
    assert "(and 2 more that wrote something)" in caplog.records[1].getMessage()


def test_a_call_without_notes_says_nothing(pool, caplog):
    pool.call(echo, **NAMED)
    assert not caplog.records


# -- nothing is left ------------------------------------------------------------------------------

PARENT = """
import os, sys, threading, time
import test_workers, workers.pool as workers
pool = workers.Workers(2)
process = pool.call(test_workers.echo, name="a", remedy="b")[0]["process"]
threading.Thread(target=pool.call, args=(test_workers.{function},), daemon=True,
    kwargs=dict(name="a", remedy="b", limits=workers.Limits(cpu_seconds=600))).start()
while not pool._running:
    time.sleep(0.01)
print(process, flush=True)
{then}
"""


@pytest.mark.parametrize("function", ["turn_forever", "sleep_forever"])
@pytest.mark.parametrize("then", ["os.kill(os.getpid(), 9)", "sys.exit()"])
def test_children_end_with_their_parent(function, then):
    program = PARENT.format(function=function, then=then)
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    ended = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": path},
        check=False,
    )
    process = int(ended.stdout)
    wait_until(lambda: gone(process))


def where(data: bytearray) -> Result:
    return os.getcwd(), b""


def test_a_child_works_where_our_own_folder_is_gone(pool, tmp_path, monkeypatch):
    """A server goes on when the folder that it was started in is removed."""
    monkeypatch.chdir(tmp_path)
    tmp_path.rmdir()
    assert pool.call(where, **NAMED)[0] == str(ROOT)


def test_a_closed_pool_refuses(pool):
    process = pool.call(echo, **NAMED)[0]["process"]
    pool.close()
    assert gone(process)
    with pytest.raises(PhiSightError, match="closed"):
        pool.call(echo, **NAMED)


def test_closing_ends_the_calls_that_run(pool):
    failed = threading.Event()

    def ask() -> None:
        with pytest.raises(PhiSightError, match="SIGKILL"):
            pool.call(sleep_forever, **NAMED)
        failed.set()

    thread = threading.Thread(target=ask)
    thread.start()
    wait_until(lambda: any(child.running for child in pool._running))
    pool.close()
    thread.join()
    assert failed.is_set() and not pool._running


def framed(header: bytes, raw: bytes = b"") -> bytearray:
    return bytearray(LENGTHS.pack(len(header), len(raw)) + header + raw)


@pytest.mark.parametrize(
    "reply",
    [
        framed(b"{"),
        framed(b"[]"),
        framed(b"{}"),
        framed(b"[" * 100_000),
        framed(b'{"value": 1}'),
        framed(b'{"resident": 1}'),
        framed(b'{"resident": 1.5, "value": 1}'),
        framed(b'{"resident": 1, "refused": 1}'),
        framed(b'{"resident": 1, "died": null}'),
        framed(b'\xff{"resident": 1, "value": 1}'),
        bytearray(LENGTHS.pack(2**31, 0)),
        bytearray(LENGTHS.pack(10, 2**63)),
    ],
)
def test_a_reply_that_was_tampered_with_is_refused(reply):
    with pytest.raises(workers._Died):
        workers._complete(reply, Limits())


def test_a_reply_is_complete_when_all_of_it_is_there():
    whole = framed(json.dumps({"resident": 1, "value": "v"}).encode(), b"raw")
    for end in range(len(whole)):
        assert workers._complete(whole[:end], Limits()) is None
    assert workers._complete(whole, Limits()) == {"resident": 1, "value": "v"}
    assert whole == b"raw"
