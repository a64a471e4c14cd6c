"""Speech to text: any recording -> 16 kHz mono -> windows cut at pauses -> Whisper -> text.

Whisper answers music and noise with invented words, and its own figures say so: a share for no
speech, and how likely it finds its text (Radford et al., arXiv 2212.04356, section 4.5). Where the
sound has no voice in it (`has_voice`), as most music and noise have none, and whispering too, less
doubt is enough to drop a text. benchmarks/ears.py measures what is heard wrong, lost and invented.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from errors import PhiSightError
from speech.activity import SHORTEST, has_voice, join_neighbours, reduce_noise, utterances
from speech.model_file import load_model_file
from speech.recordings import SAMPLE_RATE, finite
from workers.pool import Cancelled, never
from workers.turns import Turns

LONGEST_WINDOW = 28.0  # seconds; Whisper hears 30 at a time
WHISPER_TEXT_TOKENS = 448  # n_text_ctx of every Whisper of OpenAI's
NO_SPEECH, UNLIKELY = 0.6, -1.0  # whisper's own: probability of no speech, mean log probability
SURELY_NO_SPEECH = 0.9
NO_SPEECH_WITHOUT_VOICE = 0.5
# Mean log probability of what is made up, as benchmarks/ears.py saw it. OpenAI's models are seldom
# sure of what they hear; one that was taught a few sentences is, when it hears one of them.
INVENTED, INVENTED_BY_SMALL = -1.5, -0.6
REPETITIVE = 2.4  # whisper's own: text that packs better than this may go in circles,
DOUBTED_REPEATS = 0.4  # and does where no speech is this likely: people who repeat had up to 0.3
# A window over 4 s that went in circles is cut into parts of at most 0.6 of it, and those again.
SHORTEST_CUT, PART, MOST_CUTS = 4.0, 0.6, 2


class NoSpeech(PhiSightError):
    """There is nothing in the recording that was understood as words."""

    def __init__(self) -> None:
        super().__init__(
            "no speech heard: the sound was decoded, and nothing in it was understood as words; "
            "check that it is the right recording"
        )


class TooLong(PhiSightError):
    """What a recording says is more than the model reads; `text` is what was written down of it,
    `seconds` how far that is."""

    def __init__(self, text: str, seconds: float) -> None:
        self.text, self.seconds = text, seconds
        super().__init__(
            f"recording: its first {seconds / 60:.1f} minutes fill what the model reads at once;"
            " the rest was not listened to; ask about a shorter part, or have all of it written"
            " down by infer.py --transcribe"
        )


@dataclass(frozen=True)
class Segment:
    """What was said from `start` to `end` (seconds); `language` is Whisper's code of it."""

    start: float
    end: float
    text: str
    language: str


class Decoded(Protocol):
    """What is used of whisper's DecodingResult: the text of one window, and how sure Whisper is."""

    text: str
    language: str
    tokens: Sequence[int]
    no_speech_prob: float
    avg_logprob: float
    compression_ratio: float


class Speech:
    """A Whisper, loaded once. Any number of threads may transcribe; windows take turns."""

    def __init__(self, model: Any, name: str) -> None:
        """`model` is a `whisper.model.Whisper`, in the state for evaluation."""
        self.model, self.name = model, name
        self.multilingual = bool(model.is_multilingual)
        room = model.dims.n_text_ctx
        # Whisper writes at most half its text length, enough for 28 seconds at its full size.
        self.longest = LONGEST_WINDOW * min(1.0, room / WHISPER_TEXT_TOKENS)
        # A model with less room than that was made for single utterances.
        self.joins = room >= WHISPER_TEXT_TOKENS
        self.invented = INVENTED if self.joins else INVENTED_BY_SMALL
        self._turns = Turns()  # whisper keeps its cache in hooks on the one model

    @classmethod
    def load(cls, name_or_path: str | Path, device: str = "cpu") -> Speech:
        """From a `.pt` file in whisper's layout, or by one of whisper's names ("base"), which is
        downloaded once. Raises `PhiSightError` when there is no such model or no network."""
        import torch
        import whisper  # takes seconds: it brings numba

        name = str(name_or_path)
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        known = whisper.available_models()
        remedy = "name another .pt"
        if name in known:
            remedy = (
                f"fetch {whisper._MODELS[name]} where there is a network, and name the file with"
                f" --speech {name}.pt"
            )
        try:
            if name in known:
                model = whisper.load_model(name, device=device).eval()
            else:
                model = load_model_file(name, known).to(device).eval()
        except (OSError, RuntimeError, ValueError, TypeError) as error:
            reason = str(error).split("\n")[0] or type(error).__name__
            raise PhiSightError(
                f"speech model {name}: does not load ({reason}); {remedy}"
            ) from None
        for parameter in model.parameters():
            if not torch.isfinite(parameter).all():
                raise PhiSightError(
                    f"speech model {name}: has weights that are not finite; fetch it again"
                )
        return cls(model.requires_grad_(False), name)

    def transcribe(
        self,
        audio: np.ndarray,
        language: str | None = None,
        translate: bool = False,
        denoise: bool = False,
        cancelled: Callable[[], bool] = never,
    ) -> Iterator[Segment]:
        """What is said in (samples,) float32 at 16 kHz, window by window as it is understood.

        `language` is a code or an English name; None lets a multilingual model listen for it.
        `translate` puts it into English. `denoise` reduces noise first, which helps where it is
        about as loud as the voice. Nothing comes of other sounds. Raises `PhiSightError` at once
        for what the model cannot do, and `workers.Cancelled` between windows, or while it waits
        for others, when `cancelled` says so.
        """
        if not isinstance(audio, np.ndarray) or audio.ndim != 1:
            raise PhiSightError("speech: audio must be one row of samples; use read_audio")
        code = self._language(language)
        if translate and not self.multilingual:
            raise PhiSightError(
                f"speech model {self.name}: hears English only and translates"
                " nothing; name a multilingual one such as base"
            )
        samples = finite(audio).astype(np.float32)
        return self._segments(samples, code, translate, denoise, cancelled)

    def text(
        self,
        audio: np.ndarray,
        language: str | None = None,
        translate: bool = False,
        denoise: bool = False,
        cancelled: Callable[[], bool] = never,
        fits: Callable[[str], bool] | None = None,
    ) -> str:
        """All that is said, in one line: `write_down` of `transcribe`."""
        return write_down(self.transcribe(audio, language, translate, denoise, cancelled), fits)

    def _language(self, language: str | None) -> str | None:
        from whisper.tokenizer import LANGUAGES, TO_LANGUAGE_CODE

        if language is None:
            return None if self.multilingual else "en"
        code = TO_LANGUAGE_CODE.get(language.lower(), language.lower())
        if code not in LANGUAGES:
            raise PhiSightError(
                f"language {language!r}: Whisper has none of that name; give a code"
                " such as en, es, de or zh"
            )
        if code != "en" and not self.multilingual:
            raise PhiSightError(
                f"speech model {self.name}: hears English only, not"
                f" {LANGUAGES[code]}; name a multilingual one such as base"
            )
        return code

    def _segments(
        self,
        audio: np.ndarray,
        language: str | None,
        translate: bool,
        denoise: bool,
        cancelled: Callable[[], bool],
    ) -> Iterator[Segment]:
        """The windows of (samples,) that hold speech, written down one by one."""
        if denoise:
            audio = reduce_noise(audio)
        waiting = [(start, end, 0) for start, end in reversed(self._windows(audio, self.longest))]
        while waiting:
            start, end, depth = waiting.pop()
            window = audio[start:end]
            if cancelled():
                raise Cancelled
            if len(window) < SHORTEST * SAMPLE_RATE:
                continue
            voice = has_voice(window)
            with self._turns.take(cancelled):
                result = self._decode(window, language, translate)
            if not is_believable(result, voice, self.invented):
                continue
            if self._went_in_circles(result):
                seconds = (end - start) / SAMPLE_RATE
                if depth < MOST_CUTS and seconds > SHORTEST_CUT:
                    parts = self._windows(window, PART * seconds)
                    waiting += [(start + a, start + b, depth + 1) for a, b in reversed(parts)]
                continue
            text = " ".join(result.text.split())
            if any(c.isalnum() for c in text):
                language = result.language  # one recording is in one language
                yield Segment(start / SAMPLE_RATE, end / SAMPLE_RATE, text, language)

    def _windows(self, audio: np.ndarray, longest: float) -> list[tuple[int, int]]:
        windows = utterances(audio, longest)
        return list(join_neighbours(windows, longest)) if self.joins else windows

    def _went_in_circles(self, result: Decoded) -> bool:
        """Whether Whisper wrote the same over and over until its room was full. Speech that repeats
        itself packs as well, and comes to an end."""
        full = self.model.dims.n_text_ctx // 2
        return result.compression_ratio > REPETITIVE and len(result.tokens) >= full

    def _decode(self, window: np.ndarray, language: str | None, translate: bool) -> Decoded:
        """What Whisper makes of one window, (samples,) of at most 30 seconds."""
        import whisper

        device = self.model.device
        mels = whisper.log_mel_spectrogram(
            whisper.pad_or_trim(window), self.model.dims.n_mels, device=device
        )
        options = whisper.DecodingOptions(
            task="translate" if translate else "transcribe",
            language=language,
            temperature=0.0,
            without_timestamps=True,
            fp16=device.type == "cuda",
        )
        return whisper.decode(self.model, mels, options)


def is_believable(result: Decoded, voice: bool, invented: float = INVENTED) -> bool:
    """Whether a text was heard. `voice`: whether its sound has a voice in it; `invented`: the mean
    log probability below which a text is made up."""
    doubted = result.no_speech_prob > NO_SPEECH and result.avg_logprob < UNLIKELY
    limit = SURELY_NO_SPEECH if voice else NO_SPEECH_WITHOUT_VOICE
    if result.compression_ratio > REPETITIVE:
        limit = DOUBTED_REPEATS
    return not (doubted or result.avg_logprob < invented or result.no_speech_prob > limit)


def write_down(
    segments: Iterable[Segment],
    fits: Callable[[str], bool] | None = None,
    show: Callable[[str], None] | None = None,
) -> str:
    """The text of all segments, in one line; `show` gets every piece as it comes.

    Raises `NoSpeech` where there is none, and `TooLong` as soon as the text so far does not pass
    `fits`, which may ask whether a model has room for it: the rest is then not listened to.
    """
    text = ""
    for segment in segments:
        longer = f"{text} {segment.text}".strip()
        if show is not None:
            show(segment.text)
        if fits is not None and not fits(longer):
            raise TooLong(longer, segment.end)
        text = longer
    if not text:
        raise NoSpeech
    return text
