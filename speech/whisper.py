"""Speech to text: any recording -> 16 kHz mono -> windows cut at pauses -> Whisper -> text.

What is not speech never reaches Whisper, which would answer noise with an invented sentence: a
recording is first looked through for a voice (`has_voice`), and what Whisper itself doubts is
dropped after (Radford et al., arXiv 2212.04356, section 4.5). A voice is what vibrates: whispered
speech is not heard.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from errors import PhiSightError
from speech.activity import has_voice, join_neighbours, reduce_noise, utterances
from speech.recordings import SAMPLE_RATE, finite

LONGEST_WINDOW = 28.0  # seconds; Whisper hears 30 at a time
WHISPER_TEXT_TOKENS = 448  # n_text_ctx of every Whisper of OpenAI's
NO_SPEECH, UNLIKELY = 0.6, -1.0  # whisper's own: probability of no speech, mean log probability
SURELY_NO_SPEECH = 0.9
REPETITIVE = 2.4  # whisper's own: text that packs better than this goes in circles
LARGEST_MODEL = 8 << 30  # bytes unpacked; the largest of OpenAI's has 6 GB in float32
LARGEST_DIMENSIONS = {
    "n_mels": 128,
    "n_audio_ctx": 1500,
    "n_audio_state": 4096,
    "n_audio_head": 64,
    "n_audio_layer": 64,
    "n_vocab": 60_000,
    "n_text_ctx": 4096,
    "n_text_state": 4096,
    "n_text_head": 64,
    "n_text_layer": 64,
}


class NoSpeech(PhiSightError):
    """There is nothing in the recording that was understood as words."""

    def __init__(self) -> None:
        super().__init__("no speech heard; speak nearer to the microphone, or check the recording")


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
        self._turn = threading.Lock()  # whisper keeps its cache in hooks on the one model

    @classmethod
    def load(cls, name_or_path: str | Path, device: str = "cpu") -> Speech:
        """From a `.pt` file in whisper's layout, or by one of whisper's names ("base"), which is
        downloaded once. Raises `PhiSightError` when there is no such model or no network."""
        import torch
        import whisper  # takes seconds: it brings numba

        name = str(name_or_path)
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        if name not in whisper.available_models():
            _check_model_file(name, whisper.available_models())
        try:
            model = whisper.load_model(name, device=device).eval()
        except (OSError, RuntimeError, ValueError, TypeError) as error:
            reason = str(error).split("\n")[0] or type(error).__name__
            remedy = "name another .pt"
            if name in whisper.available_models():
                remedy = (
                    f"fetch {whisper._MODELS[name]} where there is a network, and name the"
                    f" file with --speech {name}.pt"
                )
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
    ) -> Iterator[Segment]:
        """What is said in (samples,) float32 at 16 kHz, window by window as it is understood.

        `language` is a code or an English name; None lets a multilingual model listen for it.
        `translate` puts it into English. Nothing comes of other sounds. Raises
        `PhiSightError` at once for a language or task that the model does not have.
        """
        if not isinstance(audio, np.ndarray) or audio.ndim != 1:
            raise PhiSightError("speech: audio must be one row of samples; use read_audio")
        code = self._language(language)
        if translate and not self.multilingual:
            raise PhiSightError(
                f"speech model {self.name}: hears English only and translates"
                " nothing; name a multilingual one such as base"
            )
        return self._segments(finite(audio).astype(np.float32), code, translate, denoise)

    def text(
        self,
        audio: np.ndarray,
        language: str | None = None,
        translate: bool = False,
        denoise: bool = False,
    ) -> str:
        """All that is said, in one line. Raises `NoSpeech` where nothing is."""
        segments = self.transcribe(audio, language, translate, denoise)
        text = " ".join(segment.text for segment in segments)
        if not text:
            raise NoSpeech
        return text

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
        self, audio: np.ndarray, language: str | None, translate: bool, denoise: bool
    ) -> Iterator[Segment]:
        """The windows of (samples,) that hold a voice, written down one by one."""
        if denoise:
            audio = reduce_noise(audio)
        windows = utterances(audio, self.longest)
        for start, end in join_neighbours(windows, self.longest) if self.joins else windows:
            if not has_voice(audio[start:end]):
                continue
            result = self._decode(audio[start:end], language, translate)
            text = " ".join(result.text.split())
            if _is_believable(result) and any(c.isalnum() for c in text):
                language = result.language  # one recording is in one language
                yield Segment(start / SAMPLE_RATE, end / SAMPLE_RATE, text, language)

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
        with self._turn:
            return whisper.decode(self.model, mels, options)


def _is_believable(result: Decoded) -> bool:
    """Whisper's own rules for silence and for text that goes in circles, and a stricter one."""
    doubted = result.no_speech_prob > NO_SPEECH and result.avg_logprob < UNLIKELY
    return not (
        doubted or result.no_speech_prob > SURELY_NO_SPEECH or result.compression_ratio > REPETITIVE
    )


def _check_model_file(name: str, known: list[str]) -> None:
    """That `name` is a `.pt` of sane dimensions, before a model is made by them."""
    import torch

    if not Path(name).is_file():
        raise PhiSightError(
            f"speech model {name}: no such file; name a .pt file, or one of {', '.join(known)}"
        )
    saved = _unpack_model_file(name)
    if not isinstance(saved, dict) or not _has_sane_dimensions(saved.get("dims")):
        raise _not_a_whisper(name)
    state = saved.get("model_state_dict")
    if not isinstance(state, dict) or not all(
        isinstance(value, torch.Tensor) for value in state.values()
    ):
        raise _not_a_whisper(name)


def _unpack_model_file(name: str) -> Any:
    """What a `.pt` of at most `LARGEST_MODEL` bytes holds, read without running code of its own."""
    import zipfile

    import torch

    try:
        with zipfile.ZipFile(name) as packed:
            too_large = sum(entry.file_size for entry in packed.infolist()) > LARGEST_MODEL
        saved = None if too_large else torch.load(name, map_location="cpu", weights_only=True)
    except Exception as error:  # an untrusted file makes torch.load raise anything
        raise _not_a_whisper(name) from error
    return saved


def _has_sane_dimensions(dims: Any) -> bool:
    """Whether `dims` holds Whisper's dimensions, whole numbers that fit together."""
    if not isinstance(dims, dict) or dims.keys() != LARGEST_DIMENSIONS.keys():
        return False
    limits = LARGEST_DIMENSIONS.items()
    if not all(type(dims[key]) is int and 1 <= dims[key] <= most for key, most in limits):
        return False
    return (
        dims["n_mels"] in (80, 128)
        and dims["n_audio_ctx"] == 1500
        and all(dims[f"n_{side}_state"] % dims[f"n_{side}_head"] == 0 for side in ("audio", "text"))
        and dims["n_vocab"] >= 51_864
    )


def _not_a_whisper(name: str) -> PhiSightError:
    return PhiSightError(
        f"speech model {name}: is no Whisper in the layout of openai-whisper"
        ' ({"dims", "model_state_dict"}); name another .pt'
    )
