"""The flags of hearing and speaking, each defined once. Loads no model and no library of sound."""

from __future__ import annotations

import argparse

from errors import PhiSightError

VOICES = "espeak-ng, or folder or hub id of a VITS model; empty for none (%(default)s)"


def add_speech_flag(
    parser: argparse._ActionsContainer,
    help: str = "Whisper: name or .pt file; empty for none (default: the preset's)",
) -> None:
    """Which Whisper; None, if it is not given, is the preset's."""
    parser.add_argument("--speech", metavar="NAME", help=help)


def add_voice_flag(
    parser: argparse._ActionsContainer,
    help: str = VOICES,
) -> None:
    """Which voice speaks."""
    parser.add_argument("--voice", default="espeak-ng", metavar="NAME", help=help)


def add_recording_flags(parser: argparse.ArgumentParser) -> None:
    """How recordings are understood, and where a spoken answer goes."""
    group = parser.add_argument_group("recordings and speech")
    group.add_argument(
        "--transcribe", metavar="FILE", help="write a recording down, with times; needs no run"
    )
    add_speech_flag(
        group,
        "Whisper that listens: its name or a .pt file (default: the run's, else the preset's)",
    )
    group.add_argument(
        "--language", help="of the recording, such as en or Spanish (default: heard)"
    )
    group.add_argument(
        "--translate", action="store_true", help="write down in English what is said"
    )
    group.add_argument(
        "--denoise", action="store_true", help="reduce noise first, where it is as loud as a voice"
    )
    group.add_argument("--speak", metavar="WAV", help="speak the answer into this file")
    add_voice_flag(group, "espeak-ng, or a VitsModel's folder or hub id (%(default)s)")


def check_recording_flags(options: argparse.Namespace) -> None:
    """Raise `PhiSightError` for flags of a recording where none is heard: with a typed question, or
    a file of them."""
    if options.prompt is None and options.batch is None:
        return
    for name in ("language", "translate", "denoise"):
        if getattr(options, name):
            raise PhiSightError(f"--{name}: is about a recording; ask by --audio, or leave it out")
