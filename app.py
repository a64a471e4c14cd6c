"""The web app: chat about pictures by text or voice, batches, and the curves of a training.

python app.py                                   # http://127.0.0.1:7860, the run runs/tiny
python app.py --run runs/mine --port 8000
PHISIGHT_API_KEY=... python app.py --host 0.0.0.0   # other machines need the key as a password
"""

from __future__ import annotations

import argparse

import threads  # noqa: F401 (before torch is loaded)

import config as configs
import paths
from api.door import KEY, add_door_flags, guarded, opened
from api.server import address_of, run
from assistant.flags import add_assistant_flags, load_assistant
from errors import run_main
from speech.flags import add_speech_flag, add_voice_flag
from speech.spoken import loaded_once, voices_loaded_once
from web.app import build_app, web_application


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = configs.Parser(prog="app.py", description=__doc__.splitlines()[0])
    add_assistant_flags(parser)
    add_door_flags(parser, port=7860)
    parser.add_argument(
        "--conversations",
        default=paths.located("cache/conversations"),
        help="folder of the saved conversations (%(default)s)",
    )
    parser.add_argument(
        "--runs", default=paths.located("runs"), help="folder of the training tab's runs"
    )
    add_speech_flag(parser)
    add_voice_flag(parser)
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    with opened(options) as door:
        assistant = load_assistant(options)
        try:
            speech = assistant.config.speech if options.speech is None else options.speech
            page = build_app(
                assistant,
                conversations=options.conversations,
                runs=options.runs,
                speech=loaded_once(speech),
                voice=voices_loaded_once(options.voice),
            )
            announcement = f"PhiSight with {assistant.source}: {address_of(door.bound)}"
            if door.key:
                announcement += f"; the password is {KEY}"
            run(
                guarded(web_application(page), door.key, door.allowed),
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
