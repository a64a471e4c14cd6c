"""Ask a trained model: pictures and text in, streamed text out.

python infer.py --image x.jpg --prompt "What colour is the star?"
python infer.py --image a.png --image b.png --prompt "<image> <image> Which one has a star?"
python infer.py --image x.jpg --audio question.wav --speak answer.wav
python infer.py --chat
python infer.py --batch questions.jsonl --out answers.jsonl
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

import config as configs
from assistant.assistant import Blocked
from assistant.flags import add_assistant_flags, add_sampling_flags, load_assistant, sampling_of
from assistant.messages import user_message
from assistant.sampling import Sampling
from data.images import load_image
from errors import PhiSightError, run_main
from speech.flags import add_recording_flags

# Loading libraries takes longer than answering does. What only some questions need (Whisper, the
# terminal) is therefore imported where it is used.


def parse(arguments: list[str] | None) -> argparse.Namespace:
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
    add_recording_flags(parser)
    options = parser.parse_args(arguments)
    one_question = options.prompt is not None or options.audio is not None
    asked = (options.prompt, options.audio, options.batch, options.chat or None)
    if sum(way is not None for way in asked) != 1:
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
    if options.chat:
        return chat(options, sampling)
    if options.batch is not None:
        return answer_batch(options, sampling)
    return answer_one(options, sampling)


def chat(options: argparse.Namespace, sampling: Sampling) -> int:
    """A conversation in the terminal."""
    from speech.recordings import read_audio
    from speech.spoken import listener
    from terminal.chat import Terminal

    assistant = load_assistant(options)
    try:
        listen = listener(options, assistant.config.speech, options.device)
        return Terminal(
            lambda messages: assistant.reply(
                messages, options.max_new_tokens, sampling, options.seed, options.stop
            ),
            lambda path: listen(read_audio(path)),
        ).run()
    finally:
        assistant.close()


def answer_batch(options: argparse.Namespace, sampling: Sampling) -> int:
    """A file of questions, their answers into another."""
    from terminal.batch import answer_file

    assistant = load_assistant(options)
    try:
        answered, failed = answer_file(
            Path(options.batch),
            Path(options.out),
            # Every line draws from its own seed, so that a line means the same after a resume.
            lambda message, line: assistant.reply(
                [message],
                options.max_new_tokens,
                sampling,
                None if options.seed is None else (options.seed + line) % 2**64,
                options.stop,
            ),
            in_flight=2 * options.max_rows,
        )
    finally:
        assistant.close()
    print(f"{options.out}: {answered} answered, {failed} failed")
    return 1 if failed else 0


def answer_one(options: argparse.Namespace, sampling: Sampling) -> int:
    """One question, typed or recorded; the answer streams, or is one JSON object."""
    if options.prompt is not None:
        user_message(options.prompt, options.image)
    for path in options.image:  # what cannot be used is told before the model is loaded
        load_image(path)
    if options.audio is not None:
        from speech.recordings import read_audio
        from speech.spoken import listener, tell_heard

        audio = read_audio(options.audio)
    if options.speak:
        from speech.spoken import SpokenAnswer

        spoken = SpokenAnswer(options)
    started = time.perf_counter()
    assistant = load_assistant(options)
    prompt = options.prompt
    if options.audio is not None:
        prompt = listener(options, assistant.config.speech, options.device, tell_heard)(audio)
    message = user_message(prompt, options.image)
    loaded = time.perf_counter()
    reply = assistant.reply([message], options.max_new_tokens, sampling, options.seed, options.stop)
    text, first = "", None
    try:
        for piece in reply:
            first = first or time.perf_counter()
            text += piece
            if not options.json:
                print(piece, end="", flush=True)
    finally:
        assistant.close()
    ended = time.perf_counter()
    if options.json:
        seconds = {"load": loaded - started, "first_token": (first or ended) - loaded}
        seconds["total"] = ended - started
        record = {
            "answer": text,
            "prompt": prompt,
            "images": options.image,
            "checkpoint": assistant.source,
            "finish_reason": reply.finish_reason,
            "tokens": {"prompt": reply.prompt_tokens, "answer": reply.completion_tokens},
            "seconds": {name: round(value, 3) for name, value in seconds.items()},
        }
        json.dump(record, sys.stdout)
    print()
    if options.speak and text.strip():
        spoken.write(text)
    if reply.finish_reason == "filtered":
        raise Blocked("answer: was stopped by the content filter")
    return 0


if __name__ == "__main__":
    run_main(main)
