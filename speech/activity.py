"""Where somebody speaks: is there a voice, where are the pauses, and what is only noise.

Everything takes (samples,) float32 at 16 kHz, as `recordings.read_audio` gives it.

Spectra and the mel scale are librosa's, for the pauses and for reducing noise. Three sentences
with pauses of 0.8 s in white and pink noise, a fan's and hum, 5 dB below the voice, by the tiny
preset's Whisper: 2.5 % of the words wrong where each band is measured over its noise, 15.8 % where
it was the whole loudness (2026-11-29). Of librosa's ready-made ways three were worse (2026-11-25).
The threshold of `effects.split` lies under the loudest sound and not over the noise, which hides
pauses from it: 52.8 % of the words wrong at 10 dB, 6.5 % by the whole loudness. `pyin` in the place
of `has_voice` finds a voice in 40 of 60 sounds without speech (`has_voice` in none), and takes
340 ms for 10 s of sound. `effects.harmonic` got 18.5 % of the words wrong without any noise.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType

import numpy as np

from errors import PhiSightError
from speech.recordings import SAMPLE_RATE

PAUSE = 0.5  # seconds of quiet between two utterances
SHORTEST = 0.1  # seconds that can hold a word

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
WINDOW = 512  # samples of a spectrum, from the beginning of a step
BANDS, LOWEST, HIGHEST = 20, 100.0, 4000.0  # of the mel scale, in Hz: where speech is
AT_ONCE = 3000  # steps, a minute: spectra of an hour would take half a gigabyte


def utterances(audio: np.ndarray, longest: float) -> list[tuple[int, int]]:
    """(start, end) in samples of what lies between pauses, each at most `longest` seconds: what is
    longer is cut where it is quietest. What is quiet depends on the recording's own noise.

    Raises `PhiSightError` when librosa does not load.
    """
    if not len(audio):
        return []
    decibels, loudness = _over_noise(audio)
    floor, top = np.percentile(decibels, (10, 95))
    quiet = decibels < max(0.0, floor + 0.25 * (top - floor))
    return [
        (start * STEP, min(end * STEP, len(audio)))
        for first, last in _between_pauses(quiet)
        for start, end in _cut(loudness, first, last, int(longest * SAMPLE_RATE / STEP))
    ]


def _over_noise(audio: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(samples,) -> (steps,) decibels of each step over the noise, and its loudness.

    In each band it is the power by what the band has in the quietest tenth of the steps, and the
    mean of that over the bands. So noise hides only what it lies upon: hum and rumble have few
    bands, and speech is heard in the others.
    """
    librosa = load_librosa()
    filters = librosa.filters.mel(  # (bands, frequencies), each band a mean
        sr=SAMPLE_RATE, n_fft=WINDOW, n_mels=BANDS, fmin=LOWEST, fmax=HIGHEST, norm=1
    )
    steps = -(-len(audio) // STEP)
    # No window reaches over the end, where noise that stops at once would sound in all bands.
    whole = 1 + max(0, len(audio) - WINDOW) // STEP
    power = np.empty((BANDS, whole), np.float32)
    for start in range(0, whole, AT_ONCE):
        end = min(start + AT_ONCE, whole)
        part = audio[start * STEP : (end - 1) * STEP + WINDOW]
        part = np.pad(part, (0, max(0, WINDOW - len(part))))
        spectra = librosa.stft(part, n_fft=WINDOW, hop_length=STEP, center=False)
        power[:, start:end] = filters @ np.abs(spectra) ** 2
    silence = QUIETEST**2 * np.square(np.hanning(WINDOW)).sum()  # of white noise that is as quiet
    loudness = np.log(np.maximum(power, silence)).mean(0)  # of all bands alike
    quietest = loudness <= np.quantile(loudness, 0.1)
    noise = np.maximum(power[:, quietest].mean(1, keepdims=True), silence)
    decibels = 10 * np.log10(np.mean(power / noise, 0) + 1e-10)
    last = (0, steps - whole)
    return np.pad(decibels, last, "edge"), np.pad(loudness, last, "edge")


def load_librosa() -> ModuleType:
    """librosa with what is used of it. Imported here: it brings numba and scipy, 2 s of processor
    time and 155 MB beside a loaded Whisper, and 18 s the first time, when numba compiles."""
    try:
        import librosa

        librosa.filters, librosa.stft  # noqa: B018 (they are loaded when they are named)
    except RuntimeError as error:  # numba finds no folder for what it compiles
        reason = str(error).split("\n")[0]
        raise PhiSightError(
            f"speech: librosa does not load ({reason}); name a folder that can be written in"
            " NUMBA_CACHE_DIR"
        ) from None
    return librosa


def _between_pauses(quiet: np.ndarray) -> list[tuple[int, int]]:
    """Stretches of steps without a pause in them, with up to half a pause of quiet around each."""
    pause = int(PAUSE * SAMPLE_RATE / STEP)
    stretches: list[list[int]] = []
    for index in np.flatnonzero(~quiet).tolist():
        if stretches and index - stretches[-1][1] < pause:
            stretches[-1][1] = index + 1
        else:
            stretches.append([index, index + 1])
    return [
        (max(0, first - pause // 2), min(len(quiet), last + pause // 2))
        for first, last in stretches
    ]


def _cut(loudness: np.ndarray, first: int, last: int, longest: int) -> Iterator[tuple[int, int]]:
    """`first` to `last` in parts of at most `longest` steps, cut in the quietest 0.2 s of each
    part's second half."""
    smooth = np.convolve(loudness, np.ones(11) / 11, "same")
    while last - first > longest:
        middle = first + longest // 2
        at = middle + int(np.argmin(smooth[middle : first + longest]))
        yield first, at + 1
        first = at + 1
    yield first, last


def join_neighbours(pieces: list[tuple[int, int]], longest: float) -> Iterator[tuple[int, int]]:
    """Neighbours of `pieces` put together as long as they last at most `longest` seconds: more
    context and fewer windows."""
    window: tuple[int, int] | None = None
    for first, last in pieces:
        if window is not None and last - window[0] > longest * SAMPLE_RATE:
            yield window
            window = None
        window = (first if window is None else window[0], last)
    if window is not None:
        yield window


# -- noise ----------------------------------------------------------------------------------------

STRIDE = 128  # samples from one spectrum to the next
LEAST = 10 ** (-10 / 20)  # a Whisper of OpenAI's size understands less where noise is cut deeper
PART = 300 * SAMPLE_RATE  # samples whose noise is reduced at once; all of an hour takes 3.6 GB


def reduce_noise(audio: np.ndarray, least: float = LEAST) -> np.ndarray:
    """Spectral gating over librosa's spectra. (samples,) -> (samples,) float32.

    What each frequency holds in the quietest tenth of five minutes is taken for noise, and turned
    down wherever it does not rise over that: Wiener's gain (Scalart and Filho 1996), never below
    `least`. Raises `PhiSightError` when librosa does not load.
    """
    parts = [_with_less_noise(audio[at : at + PART], least) for at in range(0, len(audio), PART)]
    return np.concatenate(parts) if parts else audio


def _with_less_noise(audio: np.ndarray, least: float) -> np.ndarray:
    if len(audio) < FRAME:
        return audio
    librosa = load_librosa()
    from scipy.ndimage import uniform_filter

    options = {"n_fft": WINDOW, "hop_length": STRIDE}
    spectrum = librosa.stft(audio, pad_mode="reflect", **options)  # (frequencies, frames) complex64
    power = np.abs(spectrum) ** 2
    loudness = power.sum(0)  # (frames,)
    heard = loudness > 1e-3 * STEP * QUIETEST**2  # digital silence says nothing about the noise
    if not heard.any():
        return audio
    quietest = heard & (loudness <= np.quantile(loudness[heard], 0.1))
    noise = power[:, quietest].mean(1, keepdims=True)  # (frequencies, 1)
    smooth = uniform_filter(power, 5, mode="nearest")
    spectrum *= np.maximum(1 - 1.5 * noise / (smooth + 1e-12), least)
    return librosa.istft(spectrum, length=len(audio), **options)
