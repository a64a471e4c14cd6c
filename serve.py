"""Serve a trained model to programs that speak OpenAI's API.

python serve.py --port 8000                             # http://127.0.0.1:8000/v1
PHISIGHT_API_KEY=... python serve.py --host 0.0.0.0     # other machines need the key
python serve.py --app                                   # the web app too, on the same port
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from typing import Any

import threads  # noqa: F401 (before torch is loaded)

import config as configs
from api.api import Api
from api.door import KEY, add_door_flags, opened
from api.forms import MIB, Limits
from api.senses import listening, speaking, transcribing
from api.server import address_of, run
from assistant.assistant import Assistant
from assistant.flags import add_assistant_flags, add_length_flag, load_assistant
from errors import PhiSightError, run_main
from speech.flags import add_speech_flag, add_voice_flag
from speech.spoken import loaded_once, voices_loaded_once


def parse(arguments: list[str] | None) -> argparse.Namespace:
    limits = Limits()
    parser = configs.Parser(prog="serve.py", description=__doc__.splitlines()[0])
    add_assistant_flags(parser, verbose=True)
    add_door_flags(parser, port=8000)
    parser.add_argument("--model-name", help="what programs call the model (default: the run's)")
    parser.add_argument(
        "--queue-limit",
        type=int,
        default=64,
        help="answers that may wait for a place (%(default)s)",
    )
    add_length_flag(parser, limits.new_tokens, "tokens of the longest answer (%(default)s)")
    parser.add_argument(
        "--max-body",
        type=int,
        default=limits.body_bytes // MIB,
        metavar="MIB",
        help="largest request; pictures take 4/3 of their size (%(default)s)",
    )
    parser.add_argument(
        "--grace",
        type=float,
        default=10.0,
        metavar="SECONDS",
        help="in which answers may end after Ctrl-C or SIGTERM (%(default)s)",
    )
    add_speech_flag(parser)
    add_voice_flag(parser)
    parser.add_argument("--app", action="store_true", help="serve the web app at / too")
    options = parser.parse_args(arguments)
    for name, low, high in (
        ("queue_limit", 0, 10**6),
        ("max_new_tokens", 1, 10**6),
        ("max_body", 1, 1024),
        ("grace", 0, 3600),
    ):
        if not low <= getattr(options, name) <= high:
            raise PhiSightError(f"--{name.replace('_', '-')}: must be from {low} to {high}")
    return options


def web_app(
    assistant: Assistant,
    speech: Callable[[], Any] | None = None,
    voice: str = "",
    frames: Sequence[str] = (),
) -> Any:
    """The web app, to stand at the paths that the API does not take."""
    from web.app import build_site, web_application

    site = build_site(assistant, speech=speech, voice=voices_loaded_once(voice))
    return web_application(site, frames)


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    with opened(options) as door:
        assistant = load_assistant(options)
        speech = loaded_once(assistant.config.speech if options.speech is None else options.speech)
        try:
            limits = Limits(new_tokens=options.max_new_tokens, body_bytes=options.max_body * MIB)
            api = Api(
                assistant,
                key=door.key,
                allowed=door.allowed,
                name=options.model_name,
                limits=limits,
                listen=listening(speech) if speech else None,
                transcribe=transcribing(speech) if speech else None,
                speak=speaking(options.voice),
                max_requests=options.max_rows + options.queue_limit,
                rest=(
                    web_app(assistant, speech, options.voice, door.allowed.frames)
                    if options.app
                    else None
                ),
            )
            address = address_of(door.bound)
            announcement = (
                f"{api.name} ({assistant.source}, {assistant.engine.decoding}): {address}/v1"
                + (f", the app at {address}/" if options.app else "")
                + (f"; requests need {KEY}" if door.key else "")
            )
            run(api, door.bound, announcement, grace=options.grace, busy=api.busy, hurry=api.close)
        finally:
            assistant.close()
    return 0


if __name__ == "__main__":
    run_main(main)
