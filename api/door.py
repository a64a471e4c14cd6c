"""Where serve.py and app.py are reached and by whom: their flags, their key and their socket."""

from __future__ import annotations

import argparse
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from starlette.types import ASGIApp

from api.guards import KeyGuard, Reporting
from api.measures import Measures
from api.origins import Allowed, OriginGuard
from api.places import Places
from api.server import is_local, listening_socket
from errors import PhiSightError

KEY = "PHISIGHT_API_KEY"


@dataclass(frozen=True)
class Door:
    """A bound socket, the key that requests have to bring (empty for none), and from where."""

    bound: socket.socket
    key: str
    allowed: Allowed


def add_door_flags(parser: argparse.ArgumentParser, port: int) -> None:
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (%(default)s)")
    parser.add_argument("--port", type=int, default=port, help="0 takes a free one (%(default)s)")
    without_key = f"let other machines ask although {KEY} is not set"
    parser.add_argument("--without-key", action="store_true", help=without_key)
    parser.add_argument(
        "--allow-host",
        action="append",
        default=[],
        metavar="NAME",
        help="a name under which it is reached, such as that of a proxy; * for any",
    )
    parser.add_argument(
        "--allow-origin",
        action="append",
        default=[],
        metavar="ORIGIN",
        help="a site whose pages may ask too, such as http://localhost:3000; * for any",
    )
    parser.add_argument(
        "--allow-frame",
        action="append",
        default=[],
        metavar="ORIGIN",
        help="a site whose pages may show the app in a frame, such as https://example.org",
    )


@contextmanager
def opened(options: argparse.Namespace) -> Iterator[Door]:
    """The door that the flags ask for, closed when the block is left. Raises PhiSightError where
    anybody could come in."""
    key = environment_key()
    with listening_socket(options.host, options.port) as bound:
        if not (key or options.without_key or is_local(bound)):
            raise PhiSightError(
                f"--host {options.host}: anyone who reaches it could ask;"
                f" set {KEY}, or add --without-key"
            )
        allowed = Allowed.of(
            bound, options.host, options.allow_host, options.allow_origin, options.allow_frame
        )
        yield Door(bound, key, allowed)


def environment_key() -> str:
    """The key that requests have to bring; empty for none."""
    key = os.environ.get(KEY)
    if key is None:
        return ""
    if not key.strip() or not key.isascii() or key != key.strip():
        raise PhiSightError(f"{KEY}: is empty or not plain ASCII; set a key or unset it")
    return key


def guarded(app: ASGIApp, key: str, allowed: Allowed) -> ASGIApp:
    """An application that is reached through a door, as the API is through its own."""
    measures = Measures(Places({}))
    if key:
        app = KeyGuard(app, key)
    return OriginGuard(Reporting(app, measures, ()), allowed, measures)
