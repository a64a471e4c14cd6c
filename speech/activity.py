"""Where somebody speaks: is there a voice, where are the pauses, and what is only noise.

Everything takes (samples,) float32 at 16 kHz, as `recordings.read_audio` gives it.

Noise is reduced over librosa's spectra; the rest is written here for what follows.
Percent of words wrong in sixty sentences of the tiny preset's Whisper, with white to brown noise:

                                                no noise    20 dB    10 dB     5 dB
    noise as it is                                   0.0      0.3      5.1     12.8
    `reduce_noise`                                   0.3      0.3      0.5      2.1
    librosa.effects.harmonic                        18.5     28.2     21.8     27.7
    librosa.decompose.nn_filter, median              0.0      0.3      5.1      9.2
    librosa.decompose.nn_filter, mean                0.0      0.8      5.4     18.2
    librosa.pyin in the place of `has_voice`         1.8      1.3      1.8     12.3
    librosa.effects.split, top_db from 20 to 60      0.0      0.0      2.6     14.1

    three sentences with pauses, `utterances`        0.0      1.4      6.5     21.4
    librosa.effects.split, top_db=60 (its own)       0.0     47.4     56.4     61.8
    librosa.effects.split, top_db=20                 0.0      0.0     52.8     61.8
    librosa.effects.split, top_db=10                 3.5      3.5      4.9     10.6

`librosa.pyin` misses fewer words in noise, but it also finds a voice in 40 of 60 sounds without
speech (`has_voice` in none), in white noise, hum, clicks and tones among them, and takes 340 ms for
10 s of sound. `librosa.effects.split` does as well where a recording is one sentence. Where there
are more, noise hides the pauses from it: its threshold lies under the loudest sound and not above
the noise, so none suits both. Its first call takes 1.7 s of processor time and 189 MB, beside a
loaded Whisper.
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


def utterances(audio: np.ndarray, longest: float) -> list[tuple[int, int]]:
    """(start, end) in samples of what lies between pauses, each at most `longest` seconds: what is
    longer is cut where it is quietest. What is quiet depends on the recording's own noise."""
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

WINDOW, STRIDE = 512, 128  # samples of a spectrum, and from one to the next


def reduce_noise(audio: np.ndarray) -> np.ndarray:
    """Spectral gating over librosa's spectra. (samples,) -> (samples,) float32.

    What each frequency holds in the quietest tenth of the recording is taken for noise, and turned
    down wherever it does not rise over that: Wiener's gain (Scalart and Filho 1996), never below a
    tenth. An hour takes 3.6 GB and 10 s. Raises `PhiSightError` when librosa does not load.
    """
    if len(audio) < FRAME:
        return audio
    librosa = _load_librosa()
    from scipy.ndimage import uniform_filter

    options = {"n_fft": WINDOW, "hop_length": STRIDE}
    spectrum = librosa.stft(audio, pad_mode="reflect", **options)  # (frequencies, frames) complex64
    power = librosa.util.abs2(spectrum)
    loudness = power.sum(0)  # (frames,)
    heard = loudness > 1e-3 * STEP * QUIETEST**2  # digital silence says nothing about the noise
    if not heard.any():
        return audio
    quietest = heard & (loudness <= np.quantile(loudness[heard], 0.1))
    noise = power[:, quietest].mean(1, keepdims=True)  # (frequencies, 1)
    smooth = uniform_filter(power, 5, mode="nearest")
    spectrum *= np.maximum(1 - 1.5 * noise / (smooth + 1e-12), 0.1)
    return librosa.istft(spectrum, length=len(audio), **options)


def _load_librosa() -> ModuleType:
    """librosa with its submodules. Imported here: it brings numba and scipy, a second or more."""
    try:
        import librosa

        librosa.util, librosa.stft  # noqa: B018 (they are loaded when they are named)
    except RuntimeError as error:  # numba finds no folder for what it compiles
        reason = str(error).split("\n")[0]
        raise PhiSightError(
            f"speech: noise is not reduced, librosa does not load ({reason}); name a folder that"
            " can be written in NUMBA_CACHE_DIR"
        ) from None
    return librosa
