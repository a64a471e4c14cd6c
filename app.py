"""The web app: chat about pictures by text or voice, batches, and the curves of a training.

python app.py                                   # http://127.0.0.1:7860, the run runs/tiny
python app.py --run runs/mine --port 8000
PHISIGHT_API_KEY=... python app.py --host 0.0.0.0   # other machines need the key as a password
"""

from __future__ import annotations

import argparse
import sys

import threads  # noqa: F401 (before torch is loaded)

import config as configs
import paths
import space
from assistant.flags import add_assistant_flags, load_assistant
from errors import run_main
from speech.flags import add_speech_flag, add_voice_flag


def parse(arguments: list[str] | None) -> argparse.Namespace:
    from api.door import add_door_flags

    parser = configs.Parser(prog="app.py", description=__doc__.splitlines()[0])
    add_assistant_flags(parser)
    add_door_flags(parser, port=7860)
    for part in ("base", "vision"):
        parser.add_argument(f"--{part}-revision", help=f"of the hub, if not the run's {part}'s")
    parser.add_argument("--threads", type=int, help="of the CPU; 0 for all (default: the run's)")
    parser.add_argument(
        "--conversations",
        default=paths.located("cache/conversations"),
        help="folder of the saved conversations (%(default)s)",
    )
    parser.add_argument(
        "--runs", default=paths.located("runs"), help="folder of the training tab's runs"
    )
    parser.add_argument(
        "--examples",
        metavar="FOLDER",
        help="pictures and questions to begin with, as export.py --space writes them"
        " (default: of the tiny preset's world)",
    )
    parser.add_argument(
        "--public",
        action="store_true",
        help="for strangers: without the training tab, and conversations are removed after a day",
    )
    add_speech_flag(parser)
    add_voice_flag(parser)
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    # A Space's storage is chosen before torch and Gradio, which read where it is, are loaded.
    typed = sys.argv[1:] if arguments is None else arguments
    options = parse([*space.begin(paths.PROJECT), *typed])

    from api.door import KEY, guarded, opened
    from api.server import address_of, run
    from speech.spoken import loaded_once, voices_loaded_once
    from web.app import build_app, web_application

    with opened(options) as door:
        assistant = load_assistant(options)
        try:
            speech = assistant.config.speech if options.speech is None else options.speech
            page = build_app(
                assistant,
                conversations=options.conversations,
                runs=None if options.public else options.runs,
                examples=options.examples,
                speech=loaded_once(speech),
                voice=voices_loaded_once(options.voice),
            )
            announcement = f"PhiSight with {assistant.source}: {address_of(door.bound)}"
            if door.key:
                announcement += f"; the password is {KEY}"
            run(
                guarded(web_application(page, door.allowed.frames), door.key, door.allowed),
                door.bound,
                f"{announcement}  (Ctrl-C ends it)",
                grace=0.0,
                hurry=assistant.close,
            )
        finally:
            assistant.close()
    return 0


if __name__ == "__main__":
    run_main(main)
