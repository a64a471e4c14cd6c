"""The web app: chat about pictures by text or voice, batches, and the curves of a training.

python app.py                                   # http://127.0.0.1:7860, the run runs/tiny
python app.py --run runs/mine --port 8000
python app.py --host 0.0.0.0                    # lets other machines on the network ask too
"""

from __future__ import annotations

import argparse

import config as configs
import paths
from api.server import address_of, listening_socket, run
from assistant.flags import add_assistant_flags, load_assistant
from errors import run_main
from speech.flags import add_speech_flag, add_voice_flag
from speech.spoken import loaded_once
from web.app import build_app, voices_loaded_once, web_application


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = configs.Parser(prog="app.py", description=__doc__.splitlines()[0])
    add_assistant_flags(parser)
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (%(default)s)")
    parser.add_argument("--port", type=int, default=7860, help="0 takes a free one (%(default)s)")
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
    with listening_socket(options.host, options.port) as bound:
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
            announcement = f"PhiSight with {assistant.source}: {address_of(bound)}"
            run(
                web_application(page),
                bound,
                f"{announcement}  (Ctrl-C ends it)",
                grace=0.0,
                hurry=assistant.close,
            )
        finally:
            assistant.close()
    return 0


if __name__ == "__main__":
    run_main(main)
