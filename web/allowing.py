"""Whether visitors may train: the flags of app.py, and what they do not go with."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from errors import PhiSightError

if TYPE_CHECKING:
    from api.door import Door

MOST_AT_ONCE = 16


def add_training_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--allow-training",
        action="store_true",
        help="let visitors start, stop and export trainings from the page, with any data that this"
        " user can read; beyond this machine they need the key",
    )
    parser.add_argument(
        "--trainings-at-once",
        type=int,
        default=1,
        metavar="N",
        help="how many may train at a time (%(default)s)",
    )


def check_flags(options: argparse.Namespace) -> None:
    """Raise PhiSightError for flags that do not go together."""
    if options.allow_training and options.public:
        raise PhiSightError(
            "--allow-training --public: strangers would train on this machine; give one of them"
        )
    if not 1 <= options.trainings_at_once <= MOST_AT_ONCE:
        raise PhiSightError(
            f"--trainings-at-once {options.trainings_at_once}: must be from 1 to {MOST_AT_ONCE}"
        )


def check_door(options: argparse.Namespace, door: Door) -> None:
    """Raise PhiSightError where somebody else could start trainings without a key: from another
    machine, through a proxy that has a name of its own, or by the page of another site."""
    from api.door import KEY
    from api.server import is_local

    reached = not is_local(door.bound) or options.allow_host or options.allow_origin
    if options.allow_training and reached and not door.key:
        raise PhiSightError(
            "--allow-training: who reaches it from beyond this machine could start programs and"
            f" read files; set {KEY}, or leave out --host, --allow-host and --allow-origin"
        )
