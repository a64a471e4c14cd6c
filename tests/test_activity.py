"""What is a voice and what is not, and windows cut at pauses, also where there is noise."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import numpy as np
import pytest
import runs
from hypothesis import given, settings
from hypothesis import strategies as st
from sounds import RATE, encoded, needs_espeak, noise, said, tiny, tone, vowels

from speech import activity
from speech.activity import STEP, has_voice, join_neighbours, reduce_noise, utterances
from speech.whisper import NoSpeech

# -- is there a voice? ----------------------------------------------------------------------------


def clicks() -> np.ndarray:
    rng = np.random.default_rng(4)
    sound = 0.0005 * rng.standard_normal(3 * RATE)
    for at in rng.integers(0, len(sound) - 300, 12):
        sound[at : at + rng.integers(1, 300)] += rng.uniform(-1, 1)
    return sound.astype(np.float32)


NOT_SPEECH = {
    "nothing": np.zeros(0, np.float32),
    "one sample": np.ones(1, np.float32),
    "silence": np.zeros(2 * RATE, np.float32),
    "a constant": np.full(2 * RATE, 0.5, np.float32),
    "nearly silence": noise("white") * 1e-4,
    "a faint voice, 80 dB down": vowels() * 2e-4,
    "white noise": noise("white"),
    "pink noise": noise("pink"),
    "brown noise": noise("brown"),
    "NaN": np.full(2 * RATE, np.nan, np.float32),
    "infinity": np.full(2 * RATE, np.inf, np.float32),
    "clicks": clicks(),
    "a tone": tone(200),
    "a tone in noise": tone(200, 4) + 0.2 * noise("white"),
    "hum": sum(tone(50 * n, 3) / n for n in range(1, 9)) + 0.01 * noise("white", 3),
    "20 ms of a voice": vowels()[4000:4320],
    "50 ms of a voice": vowels()[4000:4800],
}


@pytest.mark.parametrize("name", NOT_SPEECH)
def test_what_is_no_speech_is_not_heard_as_words(name):
    assert list(tiny().transcribe(NOT_SPEECH[name])) == []
    with pytest.raises(NoSpeech, match="no speech heard"):
        tiny().text(NOT_SPEECH[name])
    assert not has_voice(np.nan_to_num(NOT_SPEECH[name], posinf=0))  # Whisper is doubted more


@pytest.mark.parametrize("pitch", [75, 120, 210, 320])
def test_a_voice_is_a_voice_at_any_loudness_and_in_some_noise(pitch):
    for sound in (
        vowels(pitch=pitch),
        vowels(pitch=pitch) * 0.02,
        vowels(pitch=pitch) + 0.1 * noise("white", 1.5),
    ):
        assert has_voice(sound)
    assert has_voice(np.concatenate([np.zeros(90 * RATE, np.float32), vowels(pitch=pitch)]))


@needs_espeak
@pytest.mark.parametrize("voice", ["en-gb", "en-us+f3", "en-gb-scotland+m3", "en-us+klatt2"])
def test_synthetic_voices_are_voices(voice):
    assert has_voice(said("Red?", voice)) and has_voice(said("Where is the star?", voice))


# -- windows --------------------------------------------------------------------------------------


@settings(max_examples=60)
@given(
    st.lists(st.tuples(st.floats(0, 1.5), st.floats(0.05, 9)), max_size=5),
    st.floats(2, 28),
    st.integers(0, 5000),
)
def test_windows_are_in_order_short_enough_and_hold_all_that_is_loud(parts, longest, more):
    loud = np.random.default_rng(0).uniform(0.1, 0.5, 10 * RATE).astype(np.float32)
    pieces = [np.zeros(more, np.float32)]
    for silence, sound in parts:
        pieces += [np.zeros(int(silence * RATE), np.float32), loud[: int(sound * RATE)]]
    audio = np.concatenate(pieces)
    cut = utterances(audio, longest)
    for windows in (cut, list(join_neighbours(cut, longest))):
        covered = np.zeros(len(audio), bool)
        end = 0
        for start, stop in windows:
            assert end <= start < stop <= len(audio)
            assert stop - start <= longest * RATE + STEP
            covered[start:stop], end = True, stop
        assert covered[np.abs(audio) > 0].all()


def test_windows_are_cut_at_pauses():
    gap = np.zeros(RATE, np.float32)
    audio = np.concatenate([gap, vowels(2), gap, vowels(1), gap[: RATE // 5], vowels(1), gap])
    found = [(start / RATE, end / RATE) for start, end in utterances(audio, 28.0)]
    assert np.allclose(found, [(0.76, 3.24), (3.76, 6.44)], atol=0.1)
    assert len(list(join_neighbours(utterances(audio, 28.0), 28.0))) == 1
    assert len(list(join_neighbours(utterances(audio, 28.0), 5.0))) == 2


def test_a_long_stretch_is_cut_where_it_is_quietest():
    audio = vowels(8.0)
    audio[int(3.4 * RATE) : int(3.6 * RATE)] *= 0.2
    windows = utterances(audio, 5.0)
    assert len(windows) == 2 and abs(windows[0][1] / RATE - 3.5) < 0.1


# -- noise ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["pink", "brown", "hum"])
def test_pauses_are_found_in_noise_that_is_louder_than_the_voice(kind):
    gap = np.zeros(RATE, np.float32)
    voice = np.concatenate([gap, vowels(1.5), gap, vowels(1.5), gap])
    seconds = len(voice) / RATE
    if kind == "hum":
        loud = sum(tone(50 * n, seconds) / n for n in range(1, 9))
    else:
        loud = noise(kind, seconds)
    level = {"pink": 0.7, "brown": 1.5, "hum": 1.5}[kind] * vowels(1.5).std()
    found = [(a / RATE, b / RATE) for a, b in utterances(voice + level * loud / loud.std(), 28.0)]
    assert np.allclose(found, [(0.76, 2.74), (3.26, 5.24)], atol=0.25), found


def test_an_hour_is_looked_at_a_minute_at_a_time(monkeypatch):
    """The seams between the parts change nothing."""
    rng = np.random.default_rng(5)
    audio = np.concatenate([vowels(2.5), np.zeros(RATE, np.float32), vowels(1.3)])
    audio += 0.01 * rng.standard_normal(len(audio)).astype(np.float32)
    whole = activity._over_noise(audio)
    monkeypatch.setattr(activity, "AT_ONCE", 7)
    for parts, together in zip(activity._over_noise(audio), whole, strict=True):
        assert np.allclose(parts, together, atol=1e-4)
        assert len(together) == -(-len(audio) // STEP)


@pytest.mark.parametrize("kind", ["white", "pink"])
def test_noise_is_reduced_by_10_db_and_the_voice_is_kept(kind, monkeypatch):
    voice = np.concatenate([np.zeros(RATE, np.float32), vowels(2), np.zeros(RATE, np.float32)])
    noisy = voice + 0.15 * noise(kind)
    for part in (activity.PART, 2 * RATE):  # a long recording, part by part
        monkeypatch.setattr(activity, "PART", part)
        clean = reduce_noise(noisy)
        assert clean.dtype == np.float32 and clean.shape == noisy.shape
        assert np.square(clean - voice).mean() < 0.6 * np.square(noisy - voice).mean()
        assert 0.3 < clean[:8000].std() / noisy[:8000].std() < 0.6


@pytest.mark.parametrize("samples", [0, 5, 1023, 1024, 16000])
def test_there_is_no_noise_in_silence(samples):
    assert not reduce_noise(np.zeros(samples, np.float32)).any()


def test_librosa_is_imported_when_somebody_is_heard_and_not_before(tmp_path):
    """Reading flags and a recording imports none of the heavy packages."""
    (tmp_path / "a.wav").write_bytes(encoded(vowels(), RATE, "WAV", "FLOAT"))
    program = (
        "import sys\n"
        "heavy = {'librosa', 'numba', 'scipy', 'whisper', 'soundfile', 'soxr', 'torch'}\n"
        "import speech.spoken\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
        "from speech.activity import has_voice, utterances\n"
        "from speech.recordings import read_audio\n"
        f"audio = read_audio({str(tmp_path / 'a.wav')!r})\n"
        "assert has_voice(audio)\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"  # a child has them
        "try:\n"
        "    assert utterances(audio, 28.0)\n"
        "except Exception as error:\n"
        "    print(type(error).__name__, error)\n"
        "assert 'librosa' in sys.modules\n"
    )
    for locators, printed in (
        (None, ""),
        ("IPythonCacheLocator", "PhiSightError speech: librosa does not load.*NUMBA_CACHE_DIR"),
    ):
        variables = {**os.environ, "PYTHONPATH": str(runs.ROOT)}
        if locators:  # numba finds no folder that it may write to
            variables["NUMBA_CACHE_LOCATOR_CLASSES"] = locators
        done = subprocess.run(
            [sys.executable, "-c", program], env=variables, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        assert re.fullmatch(printed, done.stdout.strip()), done.stdout
