"""Ask a trained model: pictures and text in, streamed text out.

python infer.py --image x.jpg --prompt "What colour is the star?"
python infer.py --image a.png --image b.png --prompt "<image> <image> Which one has a star?"
python infer.py --image x.jpg --audio question.wav --speak answer.wav
python infer.py --chat
python infer.py --batch questions.jsonl --out answers.jsonl
python infer.py --transcribe talk.mp3 --out talk.srt
"""

from __future__ import annotations

import argparse
import json
import time

import threads  # noqa: F401 (before torch is loaded)

import config as configs
from assistant.flags import (
    add_assistant_flags,
    add_sampling_flags,
    asker,
    import_assistant,
    load_assistant,
    sampling_of,
)
from assistant.messages import user_message
from data.reading import checked_image_files
from errors import PhiSightError, run_main
from speech.flags import add_recording_flags, check_recording_flags

# Imports are most of a start: what only some uses need (torch, Whisper) is imported by them.


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
    parser.add_argument("--out", metavar="FILE", help="where --batch or --transcribe writes")
    parser.add_argument("--retry-failed", action="store_true", help="ask failed lines again")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of a stream")
    add_recording_flags(parser)
    options = parser.parse_args(arguments)
    check_recording_flags(options)
    ways = (options.prompt, options.audio, options.batch, options.transcribe, options.chat or None)
    if sum(way is not None for way in ways) != 1:
        one = "give one of --prompt, --audio, --chat and --batch, or --transcribe"
        raise PhiSightError(f"infer.py: {one}")
    if options.transcribe is None and (options.batch is None) != (options.out is None):
        raise PhiSightError("infer.py: --batch and --out belong together; give both")
    if options.retry_failed and options.batch is None:
        raise PhiSightError("infer.py: --retry-failed belongs to --batch; leave it out")
    of_one = options.image or options.speak or (options.json and options.transcribe is None)
    if of_one and (options.prompt, options.audio) == (None, None):
        alone = "--image, --json and --speak belong to one question"
        raise PhiSightError(f"infer.py: {alone}; leave them out")
    return options


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    sampling_of(options)  # a bad number is told before anything is loaded
    if options.transcribe is not None:
        from terminal.transcript import transcribe

        return transcribe(options)
    if options.prompt is not None or options.audio is not None:
        return answer_one(options)
    assistant = load_assistant(options)
    ask = asker(assistant, options)
    try:
        if not options.chat:
            from terminal import batch

            return batch.run(options, ask)
        from terminal.chat import converse

        return converse(ask, options, assistant)
    finally:
        assistant.close()


def answer_one(options: argparse.Namespace) -> int:
    """One question, typed or recorded; the answer streams, or is one JSON object."""
    if options.prompt is not None:
        user_message(options.prompt, options.image)
    audio, spoken = None, None
    # What cannot be used is told before the model is loaded.
    with checked_image_files(options.image):
        if options.audio is not None or options.speak:
            from speech.recordings import read_audio
            from speech.spoken import SpokenAnswer, tell_heard
            from terminal.hearing import listening

            audio = None if options.audio is None else read_audio(options.audio)
            spoken = SpokenAnswer(options) if options.speak else None
        import_assistant()
    started = time.perf_counter()
    assistant, prompt = load_assistant(options), options.prompt
    if audio is not None:
        prompt = listening(options, assistant, tell_heard, options.image)(audio)
    loaded = time.perf_counter()
    reply = asker(assistant, options)([user_message(prompt, options.image)])
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
        times = (loaded - started, (first or ended) - loaded, ended - started)
        record = {
            "answer": text,
            "prompt": prompt,
            "images": options.image,
            "checkpoint": assistant.source,
            "weights_digest": assistant.provenance["weights_digest"],
            "finish_reason": reply.finish_reason,
            "tokens": {"prompt": reply.prompt_tokens, "answer": reply.completion_tokens},
            "decoding": assistant.engine.decoding,
            "seconds": dict(zip(("load", "first_token", "total"), (round(t, 3) for t in times))),
        }
        print(json.dumps(record), end="")
    print()
    if spoken and text.strip():
        spoken.write(text)
    if reply.finish_reason == "filtered":
        raise PhiSightError("answer: was stopped by the content filter")
    return 0


if __name__ == "__main__":
    run_main(main)
