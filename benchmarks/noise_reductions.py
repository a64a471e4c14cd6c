"""Ways to take noise out of a recording before it is heard, for benchmarks/noise.py to compare.

All take and give (samples,) float32 at 16 kHz of a whole recording. `--denoise` is the gate down to
-10 dB.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import librosa
import numpy as np
from numpy.typing import NDArray
from scipy import ndimage, signal, special

from speech.activity import STRIDE, WINDOW, reduce_noise
from speech.recordings import SAMPLE_RATE

Power = NDArray[np.floating]
"""(frequencies, frames)"""


def through_spectra(samples: np.ndarray, gain: Callable[[Power], Power]) -> np.ndarray:
    """Every bin of the spectra times what `gain` says for the power of all of them."""
    spectrum = librosa.stft(samples, n_fft=WINDOW, hop_length=STRIDE, pad_mode="reflect")
    spectrum *= gain(np.abs(spectrum) ** 2)
    return librosa.istft(spectrum, n_fft=WINDOW, hop_length=STRIDE, length=len(samples))


def quietest_tenth(power: Power) -> Power:
    """(frequencies, 1): the mean of the tenth of the frames that has the least power."""
    loudness = power.sum(0)
    return power[:, loudness <= np.quantile(loudness, 0.1)].mean(1, keepdims=True) + 1e-12


def tracked(power: Power) -> Power:
    """The noise in every bin, which may change: the power where speech is unlikely, smoothed
    (Gerkmann and Hendriks 2012, with their constants: speech has 15 dB over noise, half the
    time)."""
    over = 10**1.5
    noise = quietest_tenth(power)[:, 0]
    mean_presence = np.full_like(noise, 0.5)
    found = np.empty_like(power)
    for frame, now in enumerate(power.T):
        likelihood = (1 + over) * np.exp(-np.minimum(now / noise * over / (1 + over), 80))
        presence = 1 / (1 + likelihood)
        mean_presence = 0.9 * mean_presence + 0.1 * presence
        presence = np.where(mean_presence > 0.99, np.minimum(presence, 0.99), presence)
        noise = 0.8 * noise + 0.2 * (presence * noise + (1 - presence) * now) + 1e-12
        found[:, frame] = noise
    return found


def log_spectral(power: Power, least: float) -> Power:
    """The gain with the least mean square error of the logarithm (Ephraim and Malah 1985), the
    ratio before it decided by the frame before (their 1984), from `least` to 1."""
    posterior = np.clip(power / tracked(power), 1e-3, 1e3)
    gain = np.empty_like(power)
    clean = np.maximum(posterior[:, 0] - 1, 0)  # power of speech over that of noise
    for frame, ratio in enumerate(posterior.T):
        prior = np.maximum(0.98 * clean + 0.02 * np.maximum(ratio - 1, 0), 10**-2.5)
        share = prior / (1 + prior)
        own = np.minimum(share * np.exp(0.5 * special.exp1(share * ratio)), 1)
        gain[:, frame] = own
        clean = own**2 * ratio
    return np.maximum(gain, least)


def high_passed(samples: np.ndarray, hertz: float = 120.0) -> np.ndarray:
    """Without what lies below a voice."""
    sections = signal.butter(4, hertz, "highpass", fs=SAMPLE_RATE, output="sos")
    return signal.sosfilt(sections, samples).astype(np.float32)


def notched(samples: np.ndarray) -> np.ndarray:
    """Without the multiples of 50 or of 60 Hz, up to 1 kHz, that stand 10 dB over what is around
    them in the median of all spectra: a tone that never ends is hum and not a voice."""
    size = SAMPLE_RATE  # 1 Hz a bin
    if len(samples) < 2 * size:
        return samples
    _, power = signal.welch(samples, SAMPLE_RATE, nperseg=size, average="median")
    around = ndimage.median_filter(power, 31) + 1e-15
    for base in (50, 60):
        found = [n for n in range(base, 1001, base) if power[n - 1 : n + 2].max() > 10 * around[n]]
        if len(found) >= 3:
            for hertz in found:
                b, a = signal.iirnotch(hertz, hertz / 6, SAMPLE_RATE)
                samples = signal.filtfilt(b, a, samples)
    return samples.astype(np.float32)


def gentle_all(samples: np.ndarray) -> np.ndarray:
    """Notches, then the high-pass, then the logarithmic gain down to -10 dB."""
    gain = functools.partial(log_spectral, least=10 ** (-10 / 20))
    return through_spectra(high_passed(notched(samples)), gain)


def _by_spectra(gain: Callable[..., Power], decibels: float) -> Callable[[np.ndarray], np.ndarray]:
    least = 10 ** (decibels / 20)
    return lambda samples: through_spectra(samples, functools.partial(gain, least=least))


REDUCTIONS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "as it is": lambda samples: samples,
    "gate, -20 dB": functools.partial(reduce_noise, least=10 ** (-20 / 20)),
    "gate, -10 dB": reduce_noise,
    "log-spectral, -6 dB": _by_spectra(log_spectral, -6),
    "log-spectral, -12 dB": _by_spectra(log_spectral, -12),
    "high-pass, 120 Hz": high_passed,
    "notches": notched,
    "notches, high-pass, log-spectral -10 dB": gentle_all,
}
