"""Recordings of every kind, whole, damaged and hostile, become 16 kHz mono or are refused."""

from __future__ import annotations

import os

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sounds import KINDS, RATE, encoded, tone, vowels

from errors import PhiSightError
from speech import recordings
from speech.recordings import read_audio

# -- recordings -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "subtype"), KINDS)
@pytest.mark.parametrize(("rate", "channels"), [(8000, 1), (16000, 1), (48000, 2)])
def test_recordings_of_every_kind_become_16_khz_mono(kind, subtype, rate, channels, tmp_path):
    samples = np.repeat(tone(440, 1.5, rate)[:, None], channels, 1)
    data = encoded(samples, rate, kind, subtype)
    audio = read_audio(data)
    assert audio.dtype == np.float32 and audio.ndim == 1 and np.isfinite(audio).all()
    assert abs(len(audio) - 1.5 * RATE) < 0.1 * RATE  # coders add some silence
    spectrum = np.abs(np.fft.rfft(audio))
    assert abs(spectrum.argmax() * RATE / len(audio) - 440) < 2
    assert abs(np.abs(audio[4000:8000]).max() - 0.5) < 0.06
    (tmp_path / "a.bin").write_bytes(data)
    assert np.array_equal(read_audio(tmp_path / "a.bin"), audio)
    assert np.array_equal(read_audio(str(tmp_path / "a.bin")), audio)


def test_blocks_join_without_a_seam(monkeypatch):
    data = encoded(tone(300, 3, 44100), 44100, "WAV", "FLOAT")
    whole = read_audio(data)
    monkeypatch.setattr(recordings, "BLOCK_SECONDS", 0.25)
    assert np.abs(read_audio(data) - whole).max() < 1e-6
    assert np.abs(whole[500:-500] - tone(300, 3)[500:-500]).max() < 1e-3


def test_channels_are_averaged():
    both = np.stack([tone(400), np.zeros(RATE, np.float32)], 1)
    assert np.abs(read_audio(encoded(both, RATE, "WAV", "FLOAT")) - tone(400) / 2).max() < 1e-4


def test_samples_that_are_no_numbers_become_silence():
    samples = tone(400) * 1.8
    samples[1000:1100], samples[2000], samples[3000] = np.nan, np.inf, -1e38
    audio = read_audio(encoded(samples, RATE, "WAV", "FLOAT"))
    assert np.isfinite(audio).all() and np.abs(audio).max() <= 1
    assert not read_audio(encoded(np.full(RATE, np.nan, np.float32), RATE, "WAV", "FLOAT")).any()


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "is empty.*convert"),
        (b"What colour is the star?", "no recording.*convert"),
        (b"\x1a\x45\xdf\xa3" + bytes(99), "WebM.*convert it to WAV, FLAC, MP3 or OGG"),
        (b"\0\0\0\x20ftypM4A " + bytes(99), "MP4.*convert"),
        (b"RIFF\x10\0\0\0WAVE", "not readable"),
        (b"fLaC" + bytes(99), "not readable"),
        (b"OggS" + bytes(99), "cut short|not readable"),
        (b"\xff\xfb" + bytes(99), "not readable"),
        (b"ID3" + bytes(99), "not readable"),
        (encoded(tone(), RATE, "AIFF"), "no recording"),
        (encoded(tone(), RATE, "AU"), "no record"),
        (encoded(tone(), 2000, "WAV"), "2000 samples a second, 4000 to 384000"),
        (encoded(np.zeros((99, 33)), RATE, "WAV"), "33 channels, at most 32"),
    ],
)
def test_what_is_no_recording_is_told_in_one_line(data, reason, tmp_path):
    with pytest.raises(PhiSightError, match=f"^recording: .*({reason})") as error:
        read_audio(data)
    assert "\n" not in str(error.value)
    (tmp_path / "a.wav").write_bytes(data)
    with pytest.raises(PhiSightError, match=reason):
        read_audio(tmp_path / "a.wav")


def test_only_files_are_opened(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for name in (tmp_path, tmp_path / "none.wav", tmp_path / "pipe", "/dev/zero", "a\0b"):
        with pytest.raises(PhiSightError, match="name a recording"):
            read_audio(name)


@pytest.mark.parametrize(
    ("kind", "subtype"), [pair for pair in KINDS if pair[0] in ("WAV", "FLAC", "OGG", "MP3")]
)
@pytest.mark.parametrize("share", [0.4, 0.9])
def test_a_recording_that_was_cut_short_is_noticed(kind, subtype, share):
    data = encoded(vowels(4.0), RATE, kind, subtype)
    with pytest.raises(PhiSightError, match="cut short|not readable"):
        read_audio(data[: int(len(data) * share)])


@pytest.mark.parametrize("length", [0xFFFFFFFF, 0x7FFFF000])
def test_a_wav_that_was_written_to_a_pipe_is_whole(length):
    data = bytearray(encoded(tone(), RATE, "WAV", "PCM_16"))
    at = data.index(b"data") + 4
    data[4:8] = data[at : at + 4] = length.to_bytes(4, "little")
    assert len(read_audio(bytes(data))) == RATE


def test_a_small_file_that_unpacks_to_hours_stops_at_the_limit(monkeypatch):
    data = encoded(np.zeros(30 * RATE, np.int16), RATE, "FLAC")
    assert len(data) < 10_000
    monkeypatch.setattr(recordings, "LONGEST_SECONDS", 25.0)
    with pytest.raises(PhiSightError, match="longer than 0 minutes; cut it"):
        read_audio(data)
    monkeypatch.setattr(recordings, "LARGEST_FILE", 100)
    with pytest.raises(PhiSightError, match="is the most; cut it"):
        read_audio(data)


SAMPLES = [encoded(vowels(0.4), RATE, kind, subtype) for kind, subtype in KINDS]


@settings(max_examples=100)
@given(st.sampled_from(SAMPLES), st.data())
def test_damaged_recordings_are_read_or_refused(data, draw):
    damaged = bytearray(data)
    for _ in range(draw.draw(st.integers(1, 6))):
        place = draw.draw(st.integers(0, min(len(damaged), 400) - 1))
        damaged[place] = draw.draw(st.integers(0, 255))
    damaged = damaged[: draw.draw(st.integers(1, len(damaged)))]
    try:
        audio = read_audio(bytes(damaged))
    except PhiSightError as error:
        assert "\n" not in str(error)
    else:
        assert audio.dtype == np.float32 and np.isfinite(audio).all()
        assert np.abs(audio).max(initial=0) <= 1
