"""The web app: chat about pictures by text or voice, batches, and the curves of a training.

python app.py                                   # http://127.0.0.1:7860, the run runs/tiny
python app.py --run runs/mine --port 8000
PHISIGHT_API_KEY=... python app.py --host 0.0.0.0   # other machines need the key as a password
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import threads  # noqa: F401 (before torch is loaded)

import config as configs
import paths
import space
from assistant.flags import add_assistant_flags, load_assistant
from errors import PhiSightError, run_main
from speech.flags import add_speech_flag, add_voice_flag
from web.allowing import add_training_flags, check_door, check_flags

if TYPE_CHECKING:  # torch is loaded when the page is there
    from starlette.types import ASGIApp

    from api.door import Door
    from assistant.assistant import Assistant
    from web.site import Site


def parse(arguments: list[str] | None) -> argparse.Namespace:
    from api.door import add_door_flags

    parser = configs.Parser(prog="app.py", description=__doc__.splitlines()[0])
    add_assistant_flags(parser, verbose=True)
    add_door_flags(parser, port=7860)
    for part in ("base", "vision"):
        parser.add_argument(f"--{part}-revision", help=f"of the hub, if not the run's {part}'s")
    parser.add_argument("--threads", type=int, help="of the CPU; 0 for all (default: the run's)")
    folders = (("conversations", "cache/conversations"), ("runs", "runs"))
    for name, path in folders:
        about = f"folder of the {name} (%(default)s)"
        parser.add_argument(f"--{name}", default=paths.located(path), help=about)
    parser.add_argument(
        "--examples",
        metavar="FOLDER",
        help="pictures to begin with, x.jpg with questions in x.txt, a line each"
        " (default: those that the run carries)",
    )
    parser.add_argument(
        "--public",
        action="store_true",
        help="for strangers: without the training room, and conversations are removed after a day",
    )
    add_training_flags(parser)
    add_speech_flag(parser)
    add_voice_flag(parser)
    return parser.parse_args(arguments)


def check(options: argparse.Namespace) -> None:
    """Raise PhiSightError for what can be known to be wrong before anything is loaded."""
    run = options.run
    if not run.startswith(paths.HUB_RUN) and not Path(run).exists():
        raise PhiSightError(f"--run {run}: no such folder; train a run, or name another one")
    check_flags(options)


def main(arguments: list[str] | None = None) -> int:
    # A Space's storage is chosen before torch and Gradio, which read where it is, are loaded.
    typed = sys.argv[1:] if arguments is None else arguments
    options = parse([*space.begin(paths.PROJECT), *typed])

    from api.door import opened
    from api.server import run
    from web.model import FAILED

    with opened(options) as door:
        check(options)
        check_door(options, door)
        site = site_of(options)
        model = site.model

        def load(end: Callable[[], None]) -> None:
            """The page is there first: loading torch and the model takes longer than Gradio."""
            model.begin(options.run, failed=lambda error: end())

        try:
            run(
                application(site, door),
                door.bound,
                announcement(options, door),
                started=load,
                grace=0.0,
                hurry=model.close,
            )
        finally:
            model.close()
            site.close()
    if model.state == FAILED:
        raise PhiSightError(model.error)
    return 0


def site_of(options: argparse.Namespace) -> Site:
    """What the page is made of; its model is not loaded yet."""
    from speech.spoken import loaded_once, voices_loaded_once
    from web.app import build_site
    from web.model import Model

    def load(run: str) -> Assistant:
        options.run = run
        assistant = load_assistant(options)
        if options.speech is None:  # the run says which Whisper hears for it
            site.speech = loaded_once(assistant.config.speech)
        return assistant

    site = build_site(
        Model(load=load, source=options.run),
        conversations=options.conversations,
        runs=None if options.public else options.runs,
        examples=options.examples,
        speech=loaded_once(options.speech or ""),
        voice=voices_loaded_once(options.voice),
        may_train=options.allow_training,
        trainings_at_once=options.trainings_at_once,
    )
    return site


def application(site: Site, door: Door) -> ASGIApp:
    from api.door import guarded
    from web.app import web_application

    return guarded(web_application(site, door.allowed.frames), door.key, door.allowed)


def announcement(options: argparse.Namespace, door: Door) -> str:
    from api.door import KEY
    from api.server import address_of

    password = f"; the password is {KEY}" if door.key else ""
    return f"PhiSight with {options.run}: {address_of(door.bound)}{password}  (Ctrl-C ends it)"


if __name__ == "__main__":
    run_main(main)
