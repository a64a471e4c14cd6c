"""The flags of hearing and speaking, each defined once. Loads no model and no library of sound."""

from __future__ import annotations

import argparse

VOICES = "espeak-ng, or folder or hub id of a VITS model; empty for none (%(default)s)"


def add_speech_flag(
    parser: argparse.ArgumentParser,
    help: str = "Whisper: name or .pt file; empty for none (default: the preset's)",
) -> None:
    """Which Whisper; None, if it is not given, is the preset's."""
    parser.add_argument("--speech", metavar="NAME", help=help)


def add_voice_flag(
    parser: argparse.ArgumentParser,
    help: str = VOICES,
) -> None:
    """Which voice speaks."""
    parser.add_argument("--voice", default="espeak-ng", metavar="NAME", help=help)


def add_recording_flags(parser: argparse.ArgumentParser) -> None:
    """How recordings are understood, and where a spoken answer goes."""
    parser.add_argument(
        "--transcribe", metavar="FILE", help="write a recording down, with times; needs no run"
    )
    add_speech_flag(parser, "Whisper that listens: its name or a .pt file; default: the preset's")
    parser.add_argument("--language", help="that is spoken, such as en or Spanish; default: heard")
    parser.add_argument("--translate", action="store_true", help="what is heard, into English")
    parser.add_argument(
        "--denoise", action="store_true", help="reduce steady noise first, for the tiny Whisper"
    )
    parser.add_argument("--speak", metavar="WAV", help="the answer as sound, written there")
    add_voice_flag(parser, "espeak-ng, or a VitsModel's folder or hub id (%(default)s)")
