"""Speech to text: any recording -> 16 kHz mono -> windows cut at pauses -> Whisper -> text.

What is no speech never reaches Whisper, which would answer noise with an invented sentence: a
recording is first looked through for a voice (`has_voice`), and what Whisper itself doubts is
dropped after (Radford et al., arXiv 2212.04356, section 4.5). A voice is what vibrates: whispered
speech is not heard.
"""

from __future__ import annotations

import io
import os
import stat
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
import torch.nn.functional as F

from errors import PhiSightError

SAMPLE_RATE = 16000
LARGEST_FILE = 1 << 30  # bytes
LONGEST_SECONDS = 3600.0
LOWEST_RATE, HIGHEST_RATE = 4000, 384_000  # Hz of a recording
MOST_CHANNELS = 32
BLOCK_SECONDS = 10.0
HOW_TO_CONVERT = "convert it to WAV, FLAC, MP3 or OGG"

LONGEST_WINDOW = 28.0  # seconds; Whisper hears 30 at a time
WHISPER_TEXT_TOKENS = 448  # n_text_ctx of every Whisper of OpenAI's
PAUSE = 0.5  # seconds of quiet between two utterances
SHORTEST = 0.1  # seconds that can hold a word


class NoSpeech(PhiSightError):
    """There is nothing in the recording that was understood as words."""

    def __init__(self) -> None:
        super().__init__("no speech heard; speak nearer to the microphone, or check the recording")


# -- recordings -----------------------------------------------------------------------------------


def read_audio(source: str | Path | bytes) -> np.ndarray:
    """(samples,) float32, finite, from -1 to 1, 16 kHz mono, from a file or its bytes: WAV, FLAC,
    MP3, or OGG with Vorbis or Opus.

    Samples that are not finite become silence. Raises `PhiSightError` for anything else, for a
    file that ends before its header says, and for one over `LARGEST_FILE` or `LONGEST_SECONDS`.
    """
    if isinstance(source, bytes):
        return _read(io.BytesIO(source), "recording", len(source))
    try:
        with open(source, "rb", opener=_open_without_waiting) as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise PhiSightError(f"{source}: is no file; name a recording")
            return _read(file, str(source), status.st_size)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        reason = getattr(error, "strerror", None) or str(error)
        raise PhiSightError(f"{source}: cannot be read ({reason}); name a recording") from None


def _open_without_waiting(path: str, flags: int) -> int:
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))  # a pipe would wait for a writer


def _read(file: BinaryIO, name: str, size: int) -> np.ndarray:
    import soundfile

    if size > LARGEST_FILE:
        raise PhiSightError(
            f"{name}: has {size >> 20} MB, {LARGEST_FILE >> 20} is the most; cut it into parts"
        )
    kind = _kind(file.read(512), name)
    if kind == "WAV" and (missing := _missing_from_wav(file, size)):
        raise _cut_short(name, f"{missing} bytes of sound are missing")
    if kind == "OGG" and _ends_inside_a_page(file, size):
        raise _cut_short(name, "it ends inside a page")
    file.seek(0)
    try:
        with soundfile.SoundFile(file) as sound:
            return _decode(sound, name, promised=kind in ("FLAC", "MP3"))
    except soundfile.SoundFileError as error:
        reason = str(error).split(": ")[-1].strip() or "the decoder gave no reason"
        raise PhiSightError(
            f"{name}: is not readable as {kind} ({reason}); record it again, or {HOW_TO_CONVERT}"
        ) from None


def _cut_short(name: str, how: str) -> PhiSightError:
    return PhiSightError(f"{name}: is cut short, {how}; copy or record it again")


def _kind(head: bytes, name: str) -> str:
    """The container by its first bytes. libsndfile reads many more; only these are let through."""
    if head[:4] in (b"RIFF", b"RF64") and head[8:12] == b"WAVE":
        return "WAV"
    if head[:4] == b"fLaC":
        return "FLAC"
    if head[:4] == b"OggS":
        return "OGG"
    if head[:3] == b"ID3" or (len(head) > 1 and head[0] == 0xFF and head[1] & 0xE6 == 0xE2):
        return "MP3"  # a tag, or the 11 sync bits and layer III
    found = "is no recording that can be read"
    if not head:
        found = "is empty"
    elif head[:4] == b"\x1a\x45\xdf\xa3":
        found = "is WebM or Matroska, as some browsers record"
    elif head[4:8] == b"ftyp":
        found = "is MP4 or M4A"
    raise PhiSightError(f"{name}: {found}, which is not read; {HOW_TO_CONVERT}")


def _missing_from_wav(file: BinaryIO, size: int) -> int:
    """How many bytes of sound the header promises and the file lacks. 0 where it promises nothing:
    programs that write to a pipe leave 0 or a number over 2 GB there."""
    file.seek(12)
    while len(header := file.read(8)) == 8:
        length = int.from_bytes(header[4:], "little")
        if header[:4] == b"data":
            return 0 if length >= 0x7FFF0000 else max(0, file.tell() + length - size)
        file.seek(length + length % 2, os.SEEK_CUR)
    return 0


def _ends_inside_a_page(file: BinaryIO, size: int) -> bool:
    """Whether the last page of an Ogg stream (at most 65,307 bytes, RFC 3533) is incomplete."""
    file.seek(max(0, size - 65_307))
    tail = file.read()
    start = tail.rfind(b"OggS")
    if start < 0:
        return True
    page = tail[start:]
    if len(page) < 27 or len(page) < 27 + page[26]:
        return True
    return len(page) < 27 + page[26] + sum(page[27 : 27 + page[26]])


def _decode(sound: Any, name: str, promised: bool) -> np.ndarray:
    """Blocks of frames -> mono -> 16 kHz; a small file that unpacks to hours stops at the limit."""
    import soxr

    rate, channels, frames = sound.samplerate, sound.channels, sound.frames
    if not LOWEST_RATE <= rate <= HIGHEST_RATE:
        raise PhiSightError(
            f"{name}: has {rate} samples a second, {LOWEST_RATE} to {HIGHEST_RATE}"
            f" are read; {HOW_TO_CONVERT}"
        )
    if not 1 <= channels <= MOST_CHANNELS:
        raise PhiSightError(
            f"{name}: has {channels} channels, at most {MOST_CHANNELS} are read; {HOW_TO_CONVERT}"
        )
    resampler = soxr.ResampleStream(rate, SAMPLE_RATE, 1, dtype="float32")
    pieces, read = [], 0
    while True:
        block = sound.read(int(BLOCK_SECONDS * rate), dtype="float32", always_2d=True)
        read += len(block)
        if read > LONGEST_SECONDS * rate:
            raise PhiSightError(
                f"{name}: is longer than {LONGEST_SECONDS / 60:.0f} minutes; cut it into parts"
            )
        last = len(block) < int(BLOCK_SECONDS * rate)
        pieces.append(resampler.resample_chunk(_finite(block).mean(1), last=last))
        if last:
            break
    if promised and read < frames:
        raise _cut_short(name, f"{read / rate:.1f} of {frames / rate:.1f} seconds are there")
    samples = np.concatenate(pieces).astype(np.float32, copy=False)
    loudest = float(np.abs(samples).max(initial=0.0))
    return samples / loudest if loudest > 1 else samples  # a float file may go beyond


def _finite(samples: np.ndarray) -> np.ndarray:
    """NaN and infinities become silence, and absurd values are held where float32 can compute."""
    return np.clip(np.nan_to_num(samples, nan=0.0, posinf=0.0, neginf=0.0), -1e6, 1e6)


# -- is there a voice? ----------------------------------------------------------------------------

FRAME, HOP = 1024, 256  # samples: 64 ms hold three periods of a deep voice; every 16 ms
LOWEST_PITCH, HIGHEST_PITCH = 60.0, 450.0  # Hz
PERIODIC = 0.28  # autocorrelation of a whitened frame at the period of its pitch
QUIETEST = 1e-3  # root mean square of a frame: 60 dB below full scale
VOICED_FRAMES = 6  # in a row: 96 ms, longer than two clicks in one frame look alike
CHANGING = 0.09  # share of its energy that a voice moves between bands while it lasts


def has_voice(audio: np.ndarray) -> bool:
    """Whether (samples,) at 16 kHz hold something periodic as voices are: at a pitch of a voice,
    for the time of a vowel, and changing while it lasts."""
    if len(audio) < SHORTEST * SAMPLE_RATE:
        return False
    frames = np.lib.stride_tricks.sliding_window_view(np.pad(audio, (0, FRAME)), FRAME)[::HOP]
    for start in range(0, len(frames), 4096):  # about a minute at a time
        if _voiced_run(frames[start : start + 4096]):
            return True
    return False


def _voiced_run(frames: np.ndarray) -> bool:
    """Whether some `VOICED_FRAMES` frames in a row are voiced. (frames, samples)."""
    loudness = np.sqrt(np.mean(np.square(frames), 1))
    voiced = loudness > max(QUIETEST, 0.05 * float(loudness.max()))
    power = np.abs(np.fft.rfft(frames * np.hanning(FRAME), 2 * FRAME)) ** 2 + 1e-12
    voiced &= _periodicity(power) > PERIODIC
    # Shares of the energy in 20 bands from 100 to 4000 Hz.
    edges = (np.geomspace(100, 4000, 21) * 2 * FRAME / SAMPLE_RATE).astype(int)
    bands = np.add.reduceat(power, edges, axis=1)[:, :-1]
    bands /= bands.sum(1, keepdims=True)
    run = 0
    for index, good in enumerate(voiced):
        run = run + 1 if good else 0
        if run >= VOICED_FRAMES:
            own = bands[index + 1 - run : index + 1]
            if np.abs(own - own.mean(0)).sum(1).mean() / 2 > CHANGING:
                return True
    return False


def _periodicity(power: np.ndarray) -> np.ndarray:
    """(frames, bins) -> (frames,) from 0 to 1: the autocorrelation at the best period of a voice,
    of the frame with its spectrum flattened, so that deep noise does not look like a pitch."""
    bins = power.shape[1]
    hertz = np.arange(bins) * SAMPLE_RATE / (2 * (bins - 1))
    width = int(600 / hertz[1])  # flattened over 600 Hz
    summed = np.cumsum(np.pad(power, ((0, 0), (width // 2 + 1, width // 2)), "edge"), 1)
    envelope = (summed[:, width // 2 * 2 :] - summed[:, : -(width // 2) * 2])[:, :bins]
    flat = np.where((hertz > 80) & (hertz < 3500), power / (envelope + 1e-12), 0)
    correlation = np.fft.irfft(flat, axis=1)
    first, last = int(SAMPLE_RATE / HIGHEST_PITCH), int(SAMPLE_RATE / LOWEST_PITCH)
    # The window fades towards later lags; what it takes away is known and given back.
    window = np.fft.irfft(np.abs(np.fft.rfft(np.hanning(FRAME), 2 * FRAME)) ** 2)
    shape = (window / window[0])[first:last]
    return (correlation[:, first:last] / shape / (correlation[:, :1] + 1e-12)).max(1)


# -- windows --------------------------------------------------------------------------------------

STEP = 320  # samples, 20 ms: what loudness is told in


def utterances(audio: np.ndarray, longest: float) -> list[tuple[int, int]]:
    """(start, end) in samples of what lies between pauses, each at most `longest` seconds: what is
    longer is cut where it is quietest."""
    steps = -(-len(audio) // STEP)
    blocks = np.pad(audio, (0, steps * STEP - len(audio))).reshape(steps, STEP)
    decibels = 10 * np.log10(np.mean(np.square(blocks), 1) + 1e-10)
    floor, top = np.percentile(decibels, (10, 95)) if steps else (0.0, 0.0)
    quiet = decibels < max(20 * np.log10(QUIETEST), floor + 0.25 * (top - floor))
    return [
        (start * STEP, min(end * STEP, len(audio)))
        for first, last in _between_pauses(quiet)
        for start, end in _cut(decibels, first, last, int(longest * SAMPLE_RATE / STEP))
    ]


def _between_pauses(quiet: np.ndarray) -> list[tuple[int, int]]:
    """Stretches of steps without a pause in them, with up to half a pause of quiet around each."""
    pause = int(PAUSE * SAMPLE_RATE / STEP)
    found: list[list[int]] = []
    for index in np.flatnonzero(~quiet).tolist():
        if found and index - found[-1][1] < pause:
            found[-1][1] = index + 1
        else:
            found.append([index, index + 1])
    return [
        (max(0, first - pause // 2), min(len(quiet), last + pause // 2)) for first, last in found
    ]


def _cut(decibels: np.ndarray, first: int, last: int, longest: int) -> Iterator[tuple[int, int]]:
    """`first` to `last` in parts of at most `longest` steps, cut in the quietest 0.2 s of each
    part's second half."""
    smooth = np.convolve(decibels, np.ones(11) / 11, "same")
    while last - first > longest:
        middle = first + longest // 2
        at = middle + int(np.argmin(smooth[middle : first + longest]))
        yield first, at + 1
        first = at + 1
    yield first, last


def joined(pieces: list[tuple[int, int]], longest: float) -> Iterator[tuple[int, int]]:
    """Neighbours put together as long as they fit: more context and fewer windows."""
    start = end = None
    for first, last in pieces:
        if start is not None and last - start > longest * SAMPLE_RATE:
            yield start, end
            start = None
        start, end = first if start is None else start, last
    if start is not None:
        yield start, end


# -- noise ----------------------------------------------------------------------------------------


def reduce_noise(audio: np.ndarray) -> np.ndarray:
    """Spectral gating: what each frequency holds in the quietest tenth of the recording is taken
    for noise, and turned down wherever it does not rise over that (Wiener's gain, as in Scalart
    and Filho 1996, never below a tenth). (samples,) -> (samples,) float32."""
    if len(audio) < FRAME:
        return audio
    window = torch.hann_window(512)
    spectrum = torch.stft(torch.from_numpy(audio), 512, 128, window=window, return_complex=True)
    power = spectrum.real**2 + spectrum.imag**2  # (frequencies, frames)
    loudness = power.sum(0)
    heard = loudness > 1e-3 * STEP * QUIETEST**2  # digital silence says nothing about the noise
    if not heard.any():
        return audio
    quietest = loudness <= torch.quantile(loudness[heard], 0.1)
    noise = power[:, quietest & heard].mean(1, keepdim=True)
    smooth = F.avg_pool2d(power[None], 5, 1, 2, count_include_pad=False)[0]
    gain = (1 - 1.5 * noise / (smooth + 1e-12)).clamp(min=0.1)
    clean = torch.istft(spectrum * gain, 512, 128, window=window, length=len(audio))
    return clean.numpy()


# -- Whisper --------------------------------------------------------------------------------------

NO_SPEECH, UNLIKELY = 0.6, -1.0  # whisper's own: probability of no speech, mean log probability
SURELY_NO_SPEECH = 0.9
REPETITIVE = 2.4  # whisper's own: text that packs better than this goes in circles
LARGEST_MODEL = 8 << 30  # bytes unpacked; the largest of OpenAI's has 6 GB in float32


@dataclass(frozen=True)
class Segment:
    """What was said from `start` to `end` (seconds); `language` is Whisper's code of it."""

    start: float
    end: float
    text: str
    language: str


class Speech:
    """A Whisper, loaded once. Any number of threads may transcribe; windows take turns."""

    def __init__(self, model: torch.nn.Module, name: str) -> None:
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
        `translate` puts it into English. Nothing comes of what is no speech. Raises
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
        return self._segments(_finite(audio).astype(np.float32), code, translate, denoise)

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
        if denoise:
            audio = reduce_noise(audio)
        windows = utterances(audio, self.longest)
        for start, end in joined(windows, self.longest) if self.joins else windows:
            if not has_voice(audio[start:end]):
                continue
            result = self._decode(audio[start:end], language, translate)
            text = " ".join(result.text.split())
            if _is_believable(result) and any(c.isalnum() for c in text):
                language = result.language  # one recording is in one language
                yield Segment(start / SAMPLE_RATE, end / SAMPLE_RATE, text, language)

    def _decode(self, window: np.ndarray, language: str | None, translate: bool) -> Any:
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


def _is_believable(result: Any) -> bool:
    """Whisper's own rules for silence and for text that goes in circles, and a stricter one."""
    doubted = result.no_speech_prob > NO_SPEECH and result.avg_logprob < UNLIKELY
    return not (
        doubted or result.no_speech_prob > SURELY_NO_SPEECH or result.compression_ratio > REPETITIVE
    )


def _check_model_file(name: str, known: list[str]) -> None:
    """That `name` is a `.pt` of sane dimensions, before a model is made by them."""
    import zipfile

    if not Path(name).is_file():
        raise PhiSightError(
            f"speech model {name}: no such file; name a .pt file, or one of {', '.join(known)}"
        )
    bad = PhiSightError(
        f"speech model {name}: is no Whisper in the layout of openai-whisper"
        ' ({"dims", "model_state_dict"}); name another .pt'
    )
    try:
        with zipfile.ZipFile(name) as packed:
            if sum(entry.file_size for entry in packed.infolist()) > LARGEST_MODEL:
                raise bad
        saved = torch.load(name, map_location="cpu", weights_only=True)
    except PhiSightError:
        raise
    except Exception as error:  # a stranger's file makes torch.load raise anything
        raise bad from error
    dims = saved.get("dims") if isinstance(saved, dict) else None
    limits = {
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
    if (
        not isinstance(dims, dict)
        or dims.keys() != limits.keys()
        or not all(
            type(dims[key]) is int and 1 <= dims[key] <= most for key, most in limits.items()
        )
    ):
        raise bad
    if (
        dims["n_mels"] not in (80, 128)
        or dims["n_audio_ctx"] != 1500
        or any(dims[f"n_{side}_state"] % dims[f"n_{side}_head"] for side in ("audio", "text"))
        or dims["n_vocab"] < 51_864
    ):
        raise bad
    state = saved.get("model_state_dict")
    if not isinstance(state, dict) or not all(
        isinstance(value, torch.Tensor) for value in state.values()
    ):
        raise bad
