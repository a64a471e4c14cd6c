"""The program of the child processes of workers/pool.py: functions on untrusted bytes, in limits.

A request and a reply are each a length, a JSON header and raw bytes. The request names a function,
and the parent is trusted; the reply is not.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import socket
import struct
import sys
import threading
from typing import Any

from errors import PhiSightError
from system import limits, memory, pipes

Result = tuple[Any, "bytes | bytearray | memoryview"]
"""What a function of a child returns: a small value that JSON holds, and raw bytes."""

LENGTHS = struct.Struct("<IQ")  # bytes of the JSON header, and of the raw bytes behind it
REASON_CHARACTERS = 300


def serve(argument: str) -> None:
    """Answer requests from the socket of `system.pipes.Handing` until the parent closes it, or
    ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    limits.no_core_dumps()
    with pipes.received(argument) as connection:
        threading.Thread(target=_end_with_parent, daemon=True).start()
        while (request := _next_request(connection)) is not None:
            reply, result = _answer(*request)
            del request
            reply["resident"] = memory.resident()
            header = json.dumps(reply).encode()
            connection.sendall(LENGTHS.pack(len(header), len(result)) + header)
            connection.sendall(result)
            del result


def _end_with_parent() -> None:
    """Wait for the end of standard input: nobody writes to it, so the parent has ended."""
    while os.read(0, 1):
        pass
    os._exit(1)


def _next_request(connection: socket.socket) -> tuple[dict[str, Any], bytearray] | None:
    lengths = _receive_exactly(connection, LENGTHS.size)
    if not lengths:
        return None
    head, raw = LENGTHS.unpack(lengths)
    return json.loads(_receive_exactly(connection, head)), _receive_exactly(connection, raw)


def _receive_exactly(connection: socket.socket, count: int) -> bytearray:
    """`count` bytes; fewer only where the connection has ended."""
    data = bytearray(count)
    view, received = memoryview(data), 0
    while received < count and (got := connection.recv_into(view[received:])):
        received += got
    view.release()
    del data[received:]
    return data


def _answer(request: dict[str, Any], data: bytearray) -> tuple[dict[str, Any], memoryview]:
    """The header of the reply to a request, and the raw bytes behind it."""
    nothing = memoryview(b"")
    try:
        value, result = _within_limits(request, data)
        return {"value": value}, memoryview(result).cast("B")
    except PhiSightError as error:
        return {"refused": str(error)}, nothing
    except MemoryError:
        return {"died": f"takes over {request['memory'] >> 20:,} MB of memory to read"}, nothing
    except Exception as error:  # a stranger's bytes make decoders raise anything
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:REASON_CHARACTERS]
        return {"died": f"cannot be read ({reason})"}, nothing
    finally:
        sys.stderr.flush()


def _within_limits(request: dict[str, Any], data: bytearray) -> Result:
    """What the function that a request names returns; without limits again, however that ends, so
    that there is memory to say why."""
    module, name = request["function"].split(":")
    function = getattr(importlib.import_module(module), name)
    limits.limit(request["cpu_seconds"], request["memory"])
    try:
        return function(data, **request["arguments"])
    finally:
        limits.unlimit()


if __name__ == "__main__":
    serve(sys.argv[1])
