"""Recordings of every kind, whole, damaged and hostile, become 16 kHz mono or are refused."""

from __future__ import annotations

import io
import os
import struct
import sys

import numpy as np
import pytest
import soxr
from hypothesis import given, settings
from hypothesis import strategies as st
from sounds import KINDS, RATE, encoded, tone, vowels

from errors import PhiSightError
from speech import decode as decoding
from speech.containers import kind_of, sound_of
from speech.mpeg import frame_that_counts, frames_of
from speech.recordings import read_audio
from workers.pool import Cancelled


def decode(data: bytes) -> np.ndarray:
    """As `read_audio`, in this process."""
    return decoding.decode(data, "recording")


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
    monkeypatch.setattr(decoding, "BLOCK_SECONDS", 0.25)
    assert np.abs(decode(data) - whole).max() < 1e-6
    assert np.abs(whole[500:-500] - tone(300, 3)[500:-500]).max() < 1e-3


def test_channels_are_averaged():
    both = np.stack([tone(400), np.zeros(RATE, np.float32)], 1)
    assert np.abs(read_audio(encoded(both, RATE, "WAV", "FLOAT")) - tone(400) / 2).max() < 1e-4


def test_channels_that_cancel_each_other_are_heard():
    sound = vowels(2)
    quieter = 0.9 * sound
    crossed = read_audio(encoded(np.stack([-quieter, sound], 1), RATE, "FLAC"))
    assert np.abs(crossed - sound).max() < 1e-3  # the louder of the two
    apart = np.stack([sound, np.zeros_like(sound)], 1)  # one of them is not plugged in
    assert np.abs(read_audio(encoded(apart, RATE, "FLAC")) - sound / 2).max() < 1e-3
    many = np.zeros((2 * RATE, 32))
    many[:, 7] = sound
    assert np.abs(read_audio(encoded(many, RATE, "WAV")) - sound / 32).max() < 1e-3


@pytest.mark.parametrize("kind", [("OGG", "OPUS"), ("OGG", "VORBIS"), ("WAV", "PCM_16")])
def test_recordings_that_were_joined_byte_by_byte_are_heard_to_the_end(kind):
    parts = [encoded(tone(440, 1.0), RATE, *kind), encoded(tone(880, 0.5, 48_000), 48_000, *kind)]
    whole = read_audio(parts[0] + parts[1] + parts[0])
    assert np.array_equal(whole, np.concatenate([read_audio(part) for part in (*parts, parts[0])]))
    with pytest.raises(PhiSightError, match="is cut short"):
        read_audio(parts[0] + parts[1][: len(parts[1]) // 2])
    with pytest.raises(PhiSightError, match="more than 100 recordings one behind the other"):
        read_audio(parts[1] * 102)


def test_a_joined_recording_may_be_empty():
    empty, sound = encoded(np.zeros(0), RATE, "WAV"), encoded(tone(), RATE, "WAV")
    for data in (empty + sound, sound + empty, empty + sound + empty):
        assert np.array_equal(read_audio(data), read_audio(sound))
    with pytest.raises(PhiSightError, match="holds no sound"):
        read_audio(empty * 3)


def test_joined_recordings_share_the_limit_of_an_hour(monkeypatch):
    monkeypatch.setattr(decoding, "LONGEST_SECONDS", 2.2)
    data = encoded(tone(), RATE, "WAV")
    assert len(decode(2 * data)) == 2 * RATE
    with pytest.raises(PhiSightError, match="is longer than"):
        decode(3 * data)


def test_samples_that_are_no_numbers_become_silence():
    samples = tone(400) * 1.8
    samples[1000:1100], samples[2000], samples[3000] = np.nan, np.inf, -1e38
    audio = read_audio(encoded(samples, RATE, "WAV", "FLOAT"))
    assert np.isfinite(audio).all() and np.abs(audio).max() <= 1
    assert np.abs(audio[4000:8000]).max() > 0.8  # one absurd sample has not made all else silent
    assert not read_audio(encoded(np.full(RATE, np.nan, np.float32), RATE, "WAV", "FLOAT")).any()


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "is empty.*record it again"),
        (b"What colour is the star?", "is not a recording.*convert"),
        (b"\x1a\x45\xdf\xa3" + bytes(99), "WebM.*convert it to WAV, FLAC, MP3 or OGG"),
        (b"\0\0\0\x20ftypM4A " + bytes(99), "MP4.*convert"),
        (b"RIFF\x10\0\0\0WEBP" + bytes(99), "is not a recording.*convert"),
        (b"RIFF\x10\0\0\0WAVE", "not readable"),
        (b"fLaC" + bytes(99), "not readable"),
        (b"OggS" + bytes(99), "cut short|not readable"),
        (b"\xff\xfb" + bytes(99), "not readable"),
        (b"ID3" + bytes(99), "not readable"),
        (b"FORM\0\0\0\0AIFF" + bytes(99), "not readable"),
        (b".snd" + bytes(99), "not readable"),
        (encoded(tone(), RATE, "SVX"), "not a recording"),
        (encoded(tone(), RATE, "CAF"), "not a recording"),
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


# -- lengths that are not known -------------------------------------------------------------------

UNKNOWN = (0, 100, 0x7FFFF000, 0x7FFFFFFF, 0x80000000, 0xFFFFFFDB, 0xFFFFFFFF)


def with_length(kind: str, place: bytes, after: int, length: int, size: int = 4) -> bytes:
    """A second of sound of a kind, with another length `after` bytes behind a place of its
    header."""
    data = bytearray(encoded(tone(), RATE, kind, "PCM_16"))
    at = data.index(place) + after
    data[at : at + size] = length.to_bytes(size, "big" if kind in ("AIFF", "AU") else "little")
    return bytes(data)


@pytest.mark.parametrize("length", UNKNOWN)
def test_a_wav_that_was_written_to_a_pipe_is_whole(length):
    data = bytearray(with_length("WAV", b"data", 4, length))
    data[4:8] = length.to_bytes(4, "little")
    assert np.array_equal(read_audio(bytes(data)), read_audio(encoded(tone(), RATE, "WAV")))


@pytest.mark.parametrize(
    "data",
    [
        *(with_length("W64", b"data\xf3", 16, length, 8) for length in (0, 24, 2**63, 2**64 - 1)),
        *(with_length("RF64", b"ds64", 16, length, 8) for length in (0, 2**63, 2**64 - 1)),
        with_length("RF64", b"ds64", 16, 0, 8).replace(b"RF64", b"BW64", 1),
        encoded(tone(), RATE, "RF64").replace(b"RF64", b"BW64", 1),
        *(with_length("AIFF", b"SSND", 4, length) for length in (*UNKNOWN, 8)),
        with_length("AIFF", b"COMM", 10, 0),
        *(with_length("AU", b".snd", 8, length) for length in UNKNOWN),
    ],
)
def test_so_is_one_of_a_related_kind(data):
    audio = read_audio(data)
    assert len(audio) == RATE and np.abs(audio - tone()).max() < 1e-3


@pytest.mark.parametrize("subtype", ["ULAW", "PCM_24", "FLOAT", "IMA_ADPCM", "MS_ADPCM", "GSM610"])
def test_the_length_of_packed_samples_may_be_unknown_too(subtype):
    data = bytearray(encoded(tone(), RATE, "WAV", subtype))
    at = data.index(b"data") + 4
    data[at : at + 4] = bytes(4)
    assert RATE <= len(read_audio(bytes(data))) < RATE + 1000  # whole blocks


def test_a_flac_whose_header_leaves_its_length_open_is_read_to_its_end():
    data = bytearray(encoded(vowels(4), RATE, "FLAC"))
    data[21], data[22:26] = data[21] & 0xF0, bytes(4)
    whole = read_audio(bytes(data))
    assert len(whole) == 4 * RATE and np.abs(whole - vowels(4)).max() < 1e-3
    part = read_audio(bytes(data[: len(data) // 2]))  # its recorder was killed
    assert len(part) > RATE and np.array_equal(part, whole[: len(part)])


def with_frames(data: bytes, flags: int, frames: int | None) -> bytes:
    """An MP3 whose first frame says another number of frames, or is gone."""
    place = data.index(b"Xing")
    if frames is None:
        return data[data.index(data[:2], 4) :]
    return data[: place + 4] + struct.pack(">II", flags, frames) + data[place + 12 :]


@pytest.mark.parametrize("rate", [44100, 22050, 8000])  # MPEG 1, 2 and 2.5
@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize("tag", [b"", b"ID3\x04\0\0\0\0\2\0" + bytes(256)])
def test_an_mp3_that_does_not_say_how_long_it_is_is_read_to_its_end(rate, channels, tag):
    sound = np.repeat(vowels(8)[:, None], channels, 1)
    data = encoded(soxr.resample(sound, RATE, rate), rate, "MP3")
    whole = read_audio(data)
    assert abs(len(whole) - 8 * RATE) < 10
    true = int.from_bytes(data[data.index(b"Xing") + 8 :][:4], "big")
    for frames in (0, 1, true // 2, true, true + 1):
        assert abs(len(read_audio(tag + with_frames(data, 15, frames))) - 8 * RATE) < 0.1 * RATE
    for other in (with_frames(data, 14, true), with_frames(data, 0, None)):
        assert 8 * RATE <= len(read_audio(tag + other)) < 8.2 * RATE
    with pytest.raises(PhiSightError, match=f"cut short, {true} of {2 * true} frames are there"):
        read_audio(tag + with_frames(data, 15, 2 * true))


def test_tags_behind_the_sound_are_no_sound():
    for kind in ("FLAC", "MP3"):
        data = encoded(tone(), RATE, kind)
        for tag in (b"TAG" + bytes(125), b"APETAGEX" + bytes(24), bytes(5000)):
            assert np.array_equal(read_audio(data + tag), read_audio(data))


@given(st.binary(max_size=300), st.integers(0, 400))
def test_any_bytes_behind_the_head_of_an_mp3_are_counted(noise, kept):
    data = encoded(tone(440, 0.2), RATE, "MP3")
    file = io.BytesIO(data[:kept] + noise)
    frames = frames_of(file)
    if frames is not None:
        assert 0 <= frames.counted <= 1 + len(file.getvalue()) // 24
        changed = frames_of(io.BytesIO(frame_that_counts(frames) + data))
        assert changed is not None and changed.xing and changed.claimed == frames.counted


def test_chunks_after_the_sound_are_no_sound():
    text = b"LIST\x08\0\0\0INFOabcd"
    assert len(read_audio(encoded(tone(), RATE, "WAV", "PCM_16") + text)) == RATE
    short = encoded(tone(440, 0.0005), RATE, "WAV", "PCM_16")  # less than what follows it
    assert len(read_audio(short + 5 * text)) == 8


@pytest.mark.parametrize("kind", ["WAV", "RF64", "W64", "AIFF", "AU", "OGG"])
def test_an_empty_recording_says_that_nothing_was_decoded(kind):
    empty = encoded(np.zeros(0, np.float32), RATE, kind)
    with pytest.raises(PhiSightError, match="holds no sound, nothing could be decoded"):
        read_audio(empty)
    if kind == "WAV":
        with pytest.raises(PhiSightError, match="holds no sound"):
            read_audio(empty + b"LIST\x08\0\0\0INFOabcd")


@pytest.mark.parametrize("start", [b"RIFF\0\0\0\0WAVE", b"FORM\0\0\0\0AIFF"])
def test_endless_empty_chunks_are_not_walked(start):
    places = []

    class Counted(io.BytesIO):
        def read(self, size=-1):
            places.append(self.tell())
            return super().read(size)

    data = start + b"junk\0\0\0\0" * 100_000
    kind = kind_of(data[:512], "a")
    with pytest.raises(PhiSightError, match="not readable"):
        sound_of(Counted(data), kind, len(data), "a")
    assert len(places) < 2000


# -- as browsers record ---------------------------------------------------------------------------


def browser_recording(container: str, codec: str) -> bytes:
    """Two seconds of a tone as PyAV writes them."""
    av = pytest.importorskip("av", reason="the optional package av is not here")
    file = io.BytesIO()
    with av.open(file, "w", format=container) as writer:
        stream = writer.add_stream(codec, rate=48000, layout="mono")
        frame = av.AudioFrame.from_ndarray(tone(440, 2, 48000)[None], format="fltp", layout="mono")
        frame.sample_rate = 48000
        writer.mux(stream.encode(frame))
        writer.mux(stream.encode(None))
    return file.getvalue()


@pytest.mark.parametrize(
    ("container", "codec"), [("webm", "libopus"), ("mp4", "aac"), ("mp4", "libopus")]
)
def test_recordings_of_browsers_are_read_with_pyav(container, codec):
    data = browser_recording(container, codec)
    audio = read_audio(data)
    spectrum = np.abs(np.fft.rfft(audio))
    assert abs(len(audio) - 2 * RATE) < 0.1 * RATE
    assert abs(spectrum.argmax() * RATE / len(audio) - 440) < 2
    if container == "webm":  # its recorder was killed: nothing in it says how long it should be
        assert 0.5 * RATE < len(read_audio(data[: len(data) // 2])) < 1.5 * RATE


def test_without_pyav_one_line_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(PhiSightError, match="is WebM, .*pip install av, or convert it to WAV"):
        decode(b"\x1a\x45\xdf\xa3" + bytes(99))


# -- limits ---------------------------------------------------------------------------------------


def test_what_decoders_print_is_told_once_and_short(capfd, caplog):
    with pytest.raises(PhiSightError, match="not readable as MP3") as error:
        read_audio(b"\xff\xfb\x00\x00" * 20_000)
    assert "\n" not in str(error.value)
    assert capfd.readouterr().err.count("\n") <= 1
    assert len(caplog.records) <= 1 and all(len(r.getMessage()) < 500 for r in caplog.records)


def test_reading_ends_when_nobody_waits_for_it_any_more():
    with pytest.raises(Cancelled):
        read_audio(encoded(vowels(), RATE, "WAV"), cancelled=lambda: True)
    asked = []

    def soon() -> bool:
        asked.append(1)
        return len(asked) > 2

    with pytest.raises(Cancelled):
        read_audio(encoded(np.zeros((600 * RATE, 2), np.int16), RATE, "FLAC"), cancelled=soon)


def test_a_small_file_that_unpacks_to_hours_stops_at_the_limit(monkeypatch):
    data = encoded(np.zeros(30 * RATE, np.int16), RATE, "FLAC")
    assert len(data) < 10_000
    monkeypatch.setattr(decoding, "LONGEST_SECONDS", 25.0)
    with pytest.raises(PhiSightError, match="longer than 0 minutes; cut it"):
        decode(data)
    monkeypatch.setattr(decoding, "LARGEST_FILE", 100)
    with pytest.raises(PhiSightError, match="is the most; cut it"):
        decode(data)


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
