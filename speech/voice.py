"""Text to speech: answers spoken by espeak-ng or by a VITS model.

espeak-ng is a separate program (GPL-3), called and not linked; nothing needs it but the voice of
that name. The text goes to it on its standard input and never on its command line.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from errors import PhiSightError
from files import whole_file
from workers.pool import Cancelled, never

PROGRAM = "espeak-ng"
WORDS_A_MINUTE = 175  # espeak-ng's own; it speaks from 80 to 450
LONGEST_TEXT = 20_000  # characters: about half an hour of speech
SLOWEST = 60.0  # seconds; espeak-ng speaks half an hour in about ten
LONGEST_PIECE = 400  # characters a VITS model speaks at once: its attention costs their square
VOICE_NAME = re.compile(r"[A-Za-z0-9_-]{1,40}(\+[A-Za-z0-9_-]{1,40})?")
HOW_TO_HEAR = "install Debian's espeak-ng package, or name a VitsModel folder or hub id"


# -- espeak-ng ------------------------------------------------------------------------------------


def espeak(
    text: str, voice: str = "en", rate: int = WORDS_A_MINUTE, pitch: int = 50
) -> tuple[np.ndarray, int]:
    """(samples,) float32 mono and their rate in Hz, spoken by the program espeak-ng.

    `voice` is a language with an optional variant ("en-us+f3"), `rate` in words a minute, `pitch`
    from 0 to 99. Raises `PhiSightError` when the program is absent, fails, or takes too long.
    """
    program = shutil.which(PROGRAM)
    if program is None:
        raise PhiSightError(f"speech: the program {PROGRAM} is not there; {HOW_TO_HEAR}")
    if not VOICE_NAME.fullmatch(voice):
        raise PhiSightError(f"voice {voice!r}: is not a name of {PROGRAM}'s; try en or en-us")
    command = [
        program,
        "-v",
        voice,
        "-s",
        str(int(rate)),
        "-p",
        str(int(pitch)),
        "-b",
        "1",
        "--stdin",
        "--stdout",
    ]
    try:
        spoken = subprocess.run(
            command, input=_clean(text).encode(), capture_output=True, timeout=SLOWEST, check=False
        )
    except subprocess.TimeoutExpired:
        raise PhiSightError(
            f"speech: {PROGRAM} took over {SLOWEST:.0f} s; shorten the text"
        ) from None
    except OSError as error:
        reason = error.strerror  # without the program's place
        raise PhiSightError(f"speech: {PROGRAM} does not start ({reason}); {HOW_TO_HEAR}") from None
    if spoken.returncode != 0 or b"does not exist" in spoken.stderr:
        reason = spoken.stderr.decode(errors="replace").strip() or f"code {spoken.returncode}"
        raise PhiSightError(f"voice {voice!r}: {PROGRAM} says {reason!r}; see {PROGRAM} --voices")
    return _pcm(spoken.stdout)


def _pcm(stream: bytes) -> tuple[np.ndarray, int]:
    """The samples of a WAV that was written to a pipe: its length fields mean nothing."""
    data = stream.find(b"data", 12, 4096)
    if stream[:4] != b"RIFF" or stream[8:12] != b"WAVE" or data < 0 or len(stream) < 44:
        raise PhiSightError(f"speech: {PROGRAM} wrote no sound; is there a letter in the text?")
    rate = int.from_bytes(stream[24:28], "little")
    pcm = stream[data + 8 :]
    samples = np.frombuffer(pcm[: len(pcm) // 2 * 2], "<i2").astype(np.float32) / 32768
    return samples, rate


def _clean(text: str) -> str:
    """What is to be spoken: no control characters, which mean commands to some synthesisers."""
    if len(text) > LONGEST_TEXT:
        raise PhiSightError(
            f"speech: the text has {len(text)} characters, {LONGEST_TEXT} is the most; shorten it"
        )
    text = text.encode(errors="replace").decode()  # lone surrogates are not text
    clean = "".join(c if c.isprintable() else " " for c in text).strip()
    if not any(c.isalnum() for c in clean):
        raise PhiSightError("speech: there is nothing to say; give a text with letters in it")
    return clean


# -- VITS -----------------------------------------------------------------------------------------


class Vits:
    """A `VitsModel` of transformers with its tokenizer, from a folder or the hub (Kim et al.,
    arXiv 2106.06103). The same text sounds the same every time."""

    def __init__(self, name: str) -> None:
        from transformers import AutoTokenizer, VitsModel  # takes seconds
        from transformers import logging as transformers_logging

        transformers_logging.set_verbosity_error()
        transformers_logging.disable_progress_bar()
        if os.sep in name and not Path(name).is_dir() and name.count("/") != 1:
            raise PhiSightError(f"voice {name}: no such folder; {HOW_TO_HEAR}")
        try:
            self.model = VitsModel.from_pretrained(name, use_safetensors=True).eval()
            self.tokenizer = AutoTokenizer.from_pretrained(name)
        except (OSError, ValueError, RuntimeError, KeyError, ImportError) as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise PhiSightError(
                f"voice {name}: does not load as a VitsModel ({reason}); {HOW_TO_HEAR}"
            ) from None

    def speak(
        self, text: str, speed: float = 1.0, cancelled: Callable[[], bool] = never
    ) -> tuple[np.ndarray, int]:
        """(samples,) float32 mono and their rate in Hz."""
        import torch

        self.model.speaking_rate = self.model.config.speaking_rate * speed

        pieces = []
        for piece in sentences(_clean(text)):
            if cancelled():
                raise Cancelled
            try:
                inputs = self.tokenizer(piece, return_tensors="pt")
            except (ImportError, ValueError) as error:  # some voices read phonemes, not letters
                raise PhiSightError(
                    f"speech: this voice's tokenizer fails ({error}); take one that"
                    " reads letters, such as facebook/mms-tts-eng"
                ) from None
            if inputs["input_ids"].shape[1] < 2:
                continue  # a script that this voice's alphabet does not have
            # Its noise is drawn from the global generator.
            with torch.no_grad(), torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                pieces.append(self.model(**inputs).waveform[0].float().numpy())
        if not pieces:
            raise PhiSightError(
                "speech: this voice has none of the text's letters; take a voice of its language"
            )
        return np.concatenate(pieces), int(self.model.config.sampling_rate)


def sentences(text: str) -> list[str]:
    """The text in pieces of at most `LONGEST_PIECE` characters, cut after sentences or words."""
    pieces: list[str] = []
    for word in text.split():
        ended = pieces and pieces[-1][-1] in ".!?;:"
        if not pieces or ended or len(pieces[-1]) + 1 + len(word) > LONGEST_PIECE:
            pieces += [word[i : i + LONGEST_PIECE] for i in range(0, len(word), LONGEST_PIECE)]
        else:
            pieces[-1] += " " + word
    return pieces


# -- the voice ------------------------------------------------------------------------------------


class Speaker(Protocol):
    """Says a text: (samples,) float32 mono and their rate in Hz. `speed` 1 is as usual. Raises
    `workers.Cancelled` where it takes long and `cancelled` says that nobody waits."""

    def speak(
        self, text: str, speed: float = 1.0, cancelled: Callable[[], bool] = never
    ) -> tuple[np.ndarray, int]: ...


@dataclass(frozen=True)
class Espeak:
    """The program espeak-ng, in one of its languages or voices."""

    language: str

    def speak(
        self, text: str, speed: float = 1.0, cancelled: Callable[[], bool] = never
    ) -> tuple[np.ndarray, int]:
        return espeak(text, self.language, round(WORDS_A_MINUTE * speed))


class Voice:
    """Speaks texts. Loaded once; `speak` keeps nothing between calls."""

    def __init__(self, speaker: Speaker) -> None:
        self._speaker = speaker

    @classmethod
    def load(cls, name: str = PROGRAM, language: str = "en") -> Voice:
        """`name` is "espeak-ng", or the folder or hub id of a VitsModel, whose language is its own.

        `language` is a language or voice of espeak-ng ("de", "en-us+f3"). Raises `PhiSightError`
        naming what to install when the voice is not there.
        """
        if name != PROGRAM:
            return cls(Vits(name))
        voice = cls(Espeak(language))
        voice.speak("a")  # an absent program or language is told now, not at the first answer
        return voice

    def speak(
        self, text: str, speed: float = 1.0, cancelled: Callable[[], bool] = never
    ) -> tuple[np.ndarray, int]:
        """(samples,) float32 mono between -1 and 1, and the sample rate in Hz. `speed` 1 is the
        voice's own; espeak-ng follows from 0.5 to 2.5. Raises `workers.Cancelled` between sentences
        when `cancelled` says so."""
        samples, rate = self._speaker.speak(text, speed, cancelled)
        if not np.isfinite(samples).all():
            raise PhiSightError("speech: the voice made sound that is not finite; take another one")
        return np.clip(samples, -1.0, 1.0).astype(np.float32), rate


def write_wav(path: str | os.PathLike, samples: np.ndarray, rate: int) -> None:
    """Write (samples,) float32 mono as a 16-bit WAV, whole or not at all."""
    import soundfile

    try:
        with whole_file(path) as temporary:
            soundfile.write(temporary, samples, rate, subtype="PCM_16", format="WAV")
    except (OSError, soundfile.SoundFileError) as error:
        raise PhiSightError(
            f"{path}: cannot be written ({error}); name a file in a folder that is there"
        ) from None
