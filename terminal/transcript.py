"""A recording written down, with times: text, SRT subtitles, or JSON. Needs no trained model."""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import config as configs
import config_values
from errors import PhiSightError
from files import whole_file
from speech.recordings import SAMPLE_RATE, read_audio
from speech.spoken import loaded_once
from speech.subtitles import as_srt
from speech.whisper import NoSpeech, Segment


def transcribe(options: argparse.Namespace) -> int:
    """`infer.py --transcribe`: every piece is printed as it is understood (with `--json` all at the
    end), and `--out` gets the whole. What was written down is kept when it is interrupted, by
    Ctrl-C or SIGTERM.

    Raises `PhiSightError` for what cannot be read or written, and `NoSpeech`.
    """
    out = None if options.out is None else Path(options.out)
    form = form_of(out)
    audio = read_audio(options.transcribe)
    load = loaded_once(whisper_of(options), options.device)
    if load is None:
        raise PhiSightError("--speech: is empty; name a Whisper, such as base, or a .pt file")
    seconds, segments = len(audio) / SAMPLE_RATE, list[Segment]()
    pieces = load().transcribe(audio, options.language, options.translate, options.denoise)
    complete = False
    former = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        for segment in pieces:
            segments.append(segment)
            if not options.json:
                print(segment.text, flush=True)
        complete = True
    finally:
        signal.signal(signal.SIGTERM, former)
        if out is not None and segments:  # nothing said: what lies there is not replaced
            _write(out, form(segments, seconds, complete))
        if not complete and segments:
            print(f"stopped after {segments[-1].end:.0f} of {seconds:.0f} s", file=sys.stderr)
    if options.json:
        print(as_json(segments, seconds, complete), end="")
    if not segments:
        raise NoSpeech
    return 0


def _write(out: Path, text: str) -> None:
    try:
        with whole_file(out) as temporary:
            temporary.write_text(text, encoding="utf-8", newline="\n")
    except OSError as error:
        raise PhiSightError(f"--out {out}: {error.strerror}; give another --out") from None


def whisper_of(options: argparse.Namespace) -> str:
    """The Whisper that the flags name, else the run's, else the default preset's."""
    if options.speech is not None:
        return str(options.speech)
    from checkpoints import checkpoints_in

    run = Path(options.run)
    for folder in (run, *reversed(checkpoints_in(run) if run.is_dir() else [])):
        file = folder / "config.json"
        if file.is_file():
            try:
                saved = json.loads(file.read_text(encoding="utf-8"))["config"]
            except (OSError, ValueError, KeyError, TypeError, RecursionError):
                continue  # the command needs no run: a damaged one does not stop it
            return config_values.from_dict(saved, str(folder)).speech
    return configs.default_config(configs.DEFAULT_PRESET).speech


Form = Callable[[Sequence[Segment], float, bool], str]


def form_of(out: Path | None) -> Form:
    """What writes a file, by the end of its name."""
    if out is None:
        return as_text
    forms: dict[str, Form] = {".txt": as_text, ".srt": as_subtitles, ".json": as_json}
    if out.suffix.lower() not in forms:
        raise PhiSightError(f"--out {out}: the name of a transcript ends with {', '.join(forms)}")
    if not os.path.isdir(out.parent):  # unlike a Path's, it never raises
        raise PhiSightError(f"--out {out}: its folder does not exist; make it first")
    if os.path.exists(out) and not os.path.isfile(out):
        raise PhiSightError(f"--out {out}: is not a file; give another --out")
    if not os.access(out.parent, os.W_OK):  # told before an hour is heard
        raise PhiSightError(f"--out {out}: its folder cannot be written; give another --out")
    return forms[out.suffix.lower()]


def as_text(segments: Sequence[Segment], seconds: float, complete: bool) -> str:
    """A line for every piece."""
    return "".join(f"{segment.text}\n" for segment in segments)


def as_json(segments: Sequence[Segment], seconds: float, complete: bool) -> str:
    """One object; `seconds` is how long the recording is, `complete` whether it was heard to its
    end."""
    record = {
        "text": " ".join(segment.text for segment in segments),
        "language": segments[0].language if segments else None,
        "seconds": round(seconds, 3),
        "complete": complete,
        "segments": [
            {"start": round(s.start, 3), "end": round(s.end, 3), "text": s.text} for s in segments
        ],
    }
    return json.dumps(record, ensure_ascii=False) + "\n"


def as_subtitles(segments: Sequence[Segment], seconds: float, complete: bool) -> str:
    return as_srt(segments)
