"""Ask a trained model: pictures and text in, streamed text out.

python infer.py --image x.jpg --prompt "What colour is the star?"
python infer.py --image a.png --image b.png --prompt "<image> <image> Which one has a star?"
python infer.py --image x.jpg --audio question.wav --speak answer.wav
python infer.py --chat
python infer.py --batch questions.jsonl --out answers.jsonl
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import config as configs
from assistant.assistant import Blocked, Reply
from assistant.flags import add_assistant_flags, add_sampling_flags, load_assistant, sampling_of
from assistant.messages import user_message
from assistant.sampling import Sampling
from data.dataset import Message
from data.images import load_image
from errors import PhiSightError, run_main
from speech.recordings import read_audio
from speech.spoken import SpokenAnswer, add_speech_flags, listener, tell_heard
from terminal.batch import answer_file
from terminal.chat import Terminal


def parse(arguments: list[str] | None) -> object:
    parser = configs.Parser(prog="infer.py", description=__doc__.splitlines()[0])
    add_assistant_flags(parser)
    add_sampling_flags(parser)
    parser.add_argument("--image", action="append", default=[], help="a picture; may be repeated")
    parser.add_argument("--prompt", help="the question; <image> marks a place")
    parser.add_argument("--audio", metavar="FILE", help="the question as a recording")
    parser.add_argument("--chat", action="store_true", help="a conversation in the terminal")
    parser.add_argument(
        "--batch", metavar="JSONL", help='many questions: {"prompt": ..., "image": ...} a line'
    )
    parser.add_argument("--out", metavar="JSONL", help="where --batch writes; it goes on there")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of a stream")
    add_speech_flags(parser)
    options = parser.parse_args(arguments)
    one_question = options.prompt is not None or options.audio is not None
    if (
        sum(
            (
                options.prompt is not None,
                options.audio is not None,
                options.chat,
                options.batch is not None,
            )
        )
        != 1
    ):
        raise PhiSightError("infer.py: give one of --prompt, --audio, --chat and --batch")
    if (options.batch is None) != (options.out is None):
        raise PhiSightError("infer.py: --batch and --out belong together; give both")
    if not one_question and (options.image or options.json or options.speak):
        raise PhiSightError(
            "infer.py: --image, --json and --speak belong to one question; leave them out"
        )
    return options


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    sampling = sampling_of(options)
    if options.prompt is not None or options.audio is not None:
        return answer_one(options, sampling)
    assistant = load_assistant(options)

    def ask(messages: Sequence[Message], seed: int | None) -> Reply:
        return assistant.reply(messages, options.max_new_tokens, sampling, seed, options.stop)

    try:
        if options.chat:
            listen = listener(options, assistant.config.speech, options.device)
            return Terminal(
                lambda messages: ask(messages, options.seed), lambda path: listen(read_audio(path))
            ).run()
        answered, failed = answer_file(
            Path(options.batch),
            Path(options.out),
            # Every line draws from its own seed, so that a line means the same after a resume.
            lambda message, line: ask(
                [message], None if options.seed is None else (options.seed + line) % 2**64
            ),
            in_flight=2 * options.max_rows,
        )
        print(f"{options.out}: {answered} answered, {failed} failed")
        return 1 if failed else 0
    finally:
        assistant.close()


def answer_one(options: object, sampling: Sampling) -> int:
    """One question: its answer as it comes, or one JSON object."""
    prompt = options.prompt
    if prompt is not None:
        user_message(prompt, options.image)
    for path in options.image:  # what cannot be used is told before the model is loaded
        load_image(path)
    audio = None if options.audio is None else read_audio(options.audio)
    spoken = SpokenAnswer(options) if options.speak else None
    started = time.perf_counter()
    assistant = load_assistant(options)
    if audio is not None:
        listen = listener(options, assistant.config.speech, options.device, tell_heard)
        prompt = listen(audio)
    message = user_message(prompt, options.image)
    loaded = time.perf_counter()
    reply = assistant.reply([message], options.max_new_tokens, sampling, options.seed, options.stop)
    answer, first = "", None
    try:
        for piece in reply:
            first = first or time.perf_counter()
            answer += piece
            if not options.json:
                print(piece, end="", flush=True)
    finally:
        assistant.close()
    ended = time.perf_counter()
    if options.json:
        json.dump(
            {
                "answer": answer,
                "prompt": prompt,
                "images": options.image,
                "checkpoint": assistant.source,
                "finish_reason": reply.finish_reason,
                "tokens": {"prompt": reply.prompt_tokens, "answer": reply.completion_tokens},
                "seconds": {
                    "load": round(loaded - started, 3),
                    "first_token": round((first or ended) - loaded, 3),
                    "total": round(ended - started, 3),
                },
            },
            sys.stdout,
        )
    print()
    if spoken is not None and answer.strip():
        spoken.write(answer)
    if reply.finish_reason == "filtered":
        raise Blocked("answer: was stopped by the content filter")
    return 0


if __name__ == "__main__":
    run_main(main)
