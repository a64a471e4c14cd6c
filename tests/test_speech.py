"""Speech in: recordings of every kind, what is no speech, windows, the tiny preset's Whisper."""

from __future__ import annotations

import argparse
import functools
import io
import math
import os
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import runs
import soundfile
import soxr
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from assistant.messages import user_message
from config import default_config
from errors import PhiSightError
from speech import recordings
from speech.activity import STEP, has_voice, join_neighbours, reduce_noise, utterances
from speech.recordings import read_audio
from speech.spoken import listener
from speech.voice import Voice, espeak, write_wav
from speech.whisper import NoSpeech, Segment, Speech
from tools import build_whisper
from tools.tiny import listener as taught
from tools.tiny import utterances as sentences

RATE = recordings.SAMPLE_RATE
TINY = runs.ROOT / default_config("tiny").speech
JFK = runs.ROOT.parent / "shared" / "real" / "speech" / "jfk.flac"
needs_espeak = pytest.mark.skipif(shutil.which("espeak-ng") is None, reason="no espeak-ng here")


def tone(hertz: float = 440, seconds: float = 1.0, rate: int = RATE) -> np.ndarray:
    return np.sin(2 * np.pi * hertz * np.arange(int(seconds * rate)) / rate).astype(np.float32) / 2


def vowels(seconds: float = 1.5, pitch: float = 120.0) -> np.ndarray:
    """A made-up voice: pulses at a falling pitch through two resonances that move."""
    times = np.arange(int(seconds * RATE)) / RATE
    phase = np.cumsum(pitch * (1.1 - 0.2 * times / seconds) / RATE)
    first, second = 500 + 250 * np.sin(9 * times), 1500 + 700 * np.cos(7 * times)
    sound = np.zeros_like(times)
    for number in range(1, 28):
        hertz = number * pitch
        loud = 1 / (1 + ((hertz - first) / 120) ** 2) + 0.5 / (1 + ((hertz - second) / 160) ** 2)
        sound += loud * np.sin(2 * np.pi * number * phase)
    return (0.4 * sound / np.abs(sound).max()).astype(np.float32)


def said(text: str, voice: str = "en-gb") -> np.ndarray:
    samples, rate = espeak(text, voice)
    return soxr.resample(samples, rate, RATE)


def encoded(samples: np.ndarray, rate: int, kind: str, subtype: str | None = None) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, samples, rate, format=kind, subtype=subtype)
    return file.getvalue()


@functools.cache
def tiny() -> Speech:
    return Speech.load(TINY)


# -- recordings -----------------------------------------------------------------------------------

KINDS = [
    ("WAV", "PCM_16"),
    ("WAV", "PCM_U8"),
    ("WAV", "PCM_24"),
    ("WAV", "FLOAT"),
    ("WAV", "ULAW"),
    ("WAVEX", "PCM_32"),
    ("RF64", "PCM_16"),
    ("FLAC", "PCM_16"),
    ("FLAC", "PCM_24"),
    ("OGG", "VORBIS"),
    ("OGG", "OPUS"),
    ("MP3", "MPEG_LAYER_III"),
]


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


# -- is there a voice? ----------------------------------------------------------------------------


def noise(kind: str, seconds: float = 4.0) -> np.ndarray:
    rng = np.random.default_rng(3)
    samples = int(seconds * RATE)
    spectrum = np.fft.rfft(rng.standard_normal(samples))
    power = {"white": 0, "pink": 0.5, "brown": 1}[kind]
    sound = np.fft.irfft(spectrum / np.maximum(np.arange(len(spectrum)), 40) ** power, samples)
    return (0.2 * sound / sound.std()).astype(np.float32)


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
    assert not has_voice(np.nan_to_num(NOT_SPEECH[name], posinf=0))  # not left to Whisper


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


@pytest.mark.parametrize("kind", ["white", "pink"])
def test_noise_is_reduced_and_the_voice_is_kept(kind):
    voice = np.concatenate([np.zeros(RATE, np.float32), vowels(2), np.zeros(RATE, np.float32)])
    noisy = voice + 0.15 * noise(kind)
    clean = reduce_noise(noisy)
    assert clean.dtype == np.float32 and clean.shape == noisy.shape
    assert np.square(clean - voice).mean() < 0.5 * np.square(noisy - voice).mean()
    assert clean[:8000].std() < 0.5 * noisy[:8000].std()


def test_librosa_is_imported_when_noise_is_reduced_and_not_before(tmp_path):
    """Reading flags imports none of the heavy packages, and a recording none but two."""
    (tmp_path / "a.wav").write_bytes(encoded(vowels(), RATE, "WAV", "FLOAT"))
    program = (
        "import sys\n"
        "heavy = {'librosa', 'numba', 'scipy', 'whisper', 'soundfile', 'soxr', 'torch'}\n"
        "import speech.spoken\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
        "from speech.activity import has_voice, reduce_noise, utterances\n"
        "from speech.recordings import read_audio\n"
        f"audio = read_audio({str(tmp_path / 'a.wav')!r})\n"
        "assert has_voice(audio) and utterances(audio, 28.0)\n"
        "assert heavy & set(sys.modules) == {'soundfile', 'soxr'}, heavy & set(sys.modules)\n"
        "try:\n"
        "    reduce_noise(audio)\n"
        "except Exception as error:\n"
        "    print(type(error).__name__, error)\n"
        "assert 'librosa' in sys.modules\n"
    )
    for locators, printed in (
        (None, ""),
        ("IPythonCacheLocator", "PhiSightError speech: noise is not reduced.*NUMBA_CACHE_DIR"),
    ):
        variables = {**os.environ, "PYTHONPATH": str(runs.ROOT)}
        if locators:  # numba finds no folder that it may write to
            variables["NUMBA_CACHE_LOCATOR_CLASSES"] = locators
        done = subprocess.run(
            [sys.executable, "-c", program], env=variables, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        assert re.fullmatch(printed, done.stdout.strip()), done.stdout


@pytest.mark.parametrize("samples", [0, 5, 1023, 1024, 16000])
def test_there_is_no_noise_in_silence(samples):
    assert not reduce_noise(np.zeros(samples, np.float32)).any()


# -- models ---------------------------------------------------------------------------------------


def small_whisper(path: Path, n_vocab: int = 51865, **changed: object) -> Path:
    """A Whisper with random weights in its own layout, by default a multilingual one."""
    from whisper.model import ModelDimensions, Whisper

    dims = {
        "n_mels": 80,
        "n_audio_ctx": 1500,
        "n_audio_state": 8,
        "n_audio_head": 2,
        "n_audio_layer": 1,
        "n_vocab": n_vocab,
        "n_text_ctx": 96,
        "n_text_state": 8,
        "n_text_head": 2,
        "n_text_layer": 1,
    }
    torch.manual_seed(0)
    model = Whisper(ModelDimensions(**dims))
    torch.nn.init.normal_(model.decoder.positional_embedding)
    torch.save({"dims": dims, "model_state_dict": model.state_dict()} | changed, path)
    return path


def test_a_multilingual_model_chooses_a_language_and_translates(tmp_path):
    from whisper.tokenizer import LANGUAGES

    model = Speech.load(small_whisper(tmp_path / "m.pt"))
    assert model.multilingual and not model.joins
    asked = []

    def listen(audio, language, translate):
        asked.append((language, translate))
        return decode(audio, language, translate)

    decode, model._decode = model._decode, listen
    heard = list(model.transcribe(vowels()))
    assert asked == [(None, False)] and all(s.language in LANGUAGES for s in heard)
    for language in ("de", "German", "german"):
        heard = list(model.transcribe(vowels(), language=language, translate=True))
        assert asked[-1] == ("de", True) and all(s.language == "de" for s in heard)


def test_the_language_of_the_first_words_is_that_of_all(tmp_path):
    model = Speech.load(small_whisper(tmp_path / "m.pt"))
    asked = []

    class Result:
        text, language = "hola", "es"
        no_speech_prob, avg_logprob, compression_ratio = 0.0, -0.1, 1.0

    def listen(audio, language, translate):
        asked.append(language)
        return Result

    model._decode = listen
    audio = np.concatenate([vowels(), np.zeros(RATE, np.float32), vowels()])
    assert [s.text for s in model.transcribe(audio)] == ["hola", "hola"]
    assert asked == [None, "es"]


@pytest.mark.parametrize(
    ("no_speech", "likely", "packing", "text", "kept"),
    [
        (0.1, -0.2, 1.1, "a star", True),
        (0.7, -0.5, 1.1, "a star", True),
        (0.7, -1.2, 1.1, "a star", False),
        (0.95, -0.1, 1.1, "a star", False),
        (0.1, -0.2, 2.6, "star star star", False),
        (0.1, -1.5, 1.1, "a star", True),
        (0.1, -0.2, 1.1, " ... ", False),
    ],
)
def test_what_whisper_doubts_is_dropped(tmp_path, no_speech, likely, packing, text, kept):
    class Result:
        language, no_speech_prob, avg_logprob, compression_ratio = "en", no_speech, likely, packing

    Result.text = text
    model = Speech(tiny().model, "tiny")
    model._decode = lambda *arguments: Result
    assert bool(list(model.transcribe(vowels()))) == kept


def test_what_the_model_cannot_do_is_told_before_anything_is_heard():
    for arguments, reason in (
        ({"language": "de"}, "hears English only, not german.*base"),
        ({"language": "Klingon"}, "'Klingon'.*none of that name"),
        ({"translate": True}, "translates nothing.*base"),
    ):
        with pytest.raises(PhiSightError, match=reason):
            tiny().transcribe(vowels(), **arguments)
    for audio in (np.zeros((2, RATE), np.float32), [0.0] * RATE):
        with pytest.raises(PhiSightError, match="read_audio"):
            tiny().transcribe(audio)


def test_a_run_without_a_whisper_says_what_to_name():
    """The model is missed where something is to be heard, and not before."""
    options = argparse.Namespace(speech="", language=None, translate=False, denoise=False)
    listen = listener(options, "", "cpu")
    with pytest.raises(PhiSightError, match="--speech: .*name one"):
        listen(vowels())


class Trap:
    def __reduce__(self):
        return os.mkdir, ("sprung",)


@pytest.mark.parametrize(
    "content",
    [
        "a list",
        "code",
        {"dims": {}},
        {"dims": {"n_mels": 80}},
        {"model_state_dict": {}},
        {"model_state_dict": {"encoder.conv1.weight": torch.zeros(3)}},
        {"model_state_dict": None},
        {"n_mels": 81},
        {"n_audio_ctx": 500},
        {"n_audio_head": 3},
        {"n_audio_layer": 10**9},
        {"n_vocab": 100},
        {"n_text_state": 8.0},
        {"n_text_layer": 2},
        b"no zip at all",
        b"",
    ],
    ids=str,
)
def test_a_file_that_is_no_whisper_is_refused(content, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = small_whisper(tmp_path / "m.pt")
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif isinstance(content, str):
        torch.save([1] if content == "a list" else Trap(), path)
    else:
        saved = torch.load(path, weights_only=True)
        if any(key.startswith("n_") for key in content):
            content = {"dims": saved["dims"] | content}
        if "dims" in content and content["dims"].get("n_vocab") == 100:
            saved["model_state_dict"]["decoder.token_embedding.weight"] = torch.zeros(100, 8)
        torch.save(saved | content, path)
    with pytest.raises(PhiSightError, match="m.pt: .*name another .pt") as error:
        Speech.load(path)
    assert "\n" not in str(error.value) and not (tmp_path / "sprung").exists()


def test_weights_that_are_not_finite_are_refused(tmp_path):
    saved = torch.load(small_whisper(tmp_path / "m.pt"), weights_only=True)
    saved["model_state_dict"]["encoder.conv1.bias"][0] = math.nan
    torch.save(saved, tmp_path / "m.pt")
    with pytest.raises(PhiSightError, match="not finite"):
        Speech.load(tmp_path / "m.pt")


def test_a_name_without_a_network_says_which_file_would_do(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")  # nobody listens there
    monkeypatch.delenv("no_proxy", raising=False)
    with pytest.raises(PhiSightError, match="model base: .*fetch https://.*--speech base.pt"):
        Speech.load("base")


@pytest.mark.parametrize("name", ["bass", "no/such.pt", ""])
def test_an_unknown_name_lists_the_known_ones(name):
    with pytest.raises(PhiSightError, match="no such file; name a .pt file, or one of .*base"):
        Speech.load(name)


# -- the tiny preset's Whisper ---------------------------------------------------------------------


def test_the_asset_is_a_small_plain_whisper():
    import whisper

    assert TINY.stat().st_size <= 8_000_000
    model = whisper.load_model(str(TINY), device="cpu")
    assert not model.is_multilingual and model.dims.n_audio_ctx == 1500


def test_training_computes_what_whisper_computes():
    """The short forward pass of the training, with every place standing for itself."""
    import whisper
    from whisper.audio import mel_filters
    from whisper.model import ModelDimensions, Whisper

    torch.manual_seed(0)
    texts = ["What colour is the star?", "Red?"]
    vocabulary = taught.Vocabulary(texts)
    student = taught.Listener(vocabulary).eval()
    torch.nn.init.normal_(student.other, std=0.05)
    model = Whisper(ModelDimensions(**taught.DIMENSIONS)).eval()
    model.load_state_dict(student.state())
    sounds = [vowels(1.5), vowels(0.7) * 0.1]
    mels, silence = taught.log_mels(sounds, mel_filters("cpu", 80))
    tokens, _ = vocabulary.rows(texts)
    with torch.no_grad():
        heard, weight = student.encode(mels, silence, stand_ins=1500)
        ours = student.decode(tokens, heard, weight)
        theirs = model(
            torch.stack([whisper.log_mel_spectrogram(whisper.pad_or_trim(s)) for s in sounds]),
            torch.tensor(vocabulary.used)[tokens],
        )
    assert (ours[..., :-1] - theirs[..., vocabulary.used]).abs().max() < 1e-3
    assert (ours.logsumexp(-1) - theirs.logsumexp(-1)).abs().max() < 1e-3
    said = [vocabulary.used[token] for token in tokens[0, 2:]]
    assert vocabulary.tokenizer.decode(said) == " " + texts[0]


def test_word_errors_are_the_edit_distance():
    for heard, wanted, errors in (
        ("", "", 0),
        ("a b c", "a b c", 0),
        ("", "a b", 2),
        ("a b", "", 2),
        ("a c", "a b c", 1),
        ("a x c d", "a b c", 2),
        ("b a", "a b", 2),
    ):
        assert build_whisper.word_errors(heard.split(), wanted.split()) == errors


def test_held_out_sentences_and_voices_are_in_no_training_utterance():
    training, held_out = sentences.held_out_sentences()
    assert len(held_out) > 40 and not set(training) & set(held_out)
    utterances = sentences.training_utterances(3000)
    heard = {tuple(sentences.words_of(u.text)) for u in utterances}
    assert not heard & {tuple(sentences.words_of(text)) for text in held_out}
    for utterance in utterances:
        accent, _, variant = utterance.voice.partition("+")
        assert accent not in sentences.HELD_OUT_ACCENTS
        assert variant not in sentences.HELD_OUT_VARIANTS
    known = {word for words in heard for word in words}
    assert all(set(sentences.words_of(text)) <= known for text in held_out)


@needs_espeak
def test_held_out_sentences_in_held_out_voices_are_understood():
    groups = sentences.measured_utterances(16)
    errors = words = 0
    for utterance in groups["held-out sentences, held-out voices"]:
        wrong, said, _ = build_whisper.errors_of(tiny(), sentences.say(utterance), utterance.text)
        errors, words = errors + wrong, words + said
    assert errors <= 0.1 * words


QUESTIONS = (
    "What colour is the star?",
    "Where is the orange object?",
    "How many circles are there?",
)


@needs_espeak
def test_text_appears_as_it_is_heard():
    gap = np.zeros(RATE, np.float32)
    spoken = [said(text) for text in QUESTIONS]
    audio = np.concatenate([np.concatenate([gap, sound]) for sound in spoken])
    model = Speech(tiny().model, "tiny")
    decoded = []

    def listen(*arguments):
        decoded.append(arguments)
        return tiny()._decode(*arguments)

    model._decode = listen
    stream = model.transcribe(audio)
    first = next(stream)
    assert isinstance(first, Segment) and len(decoded) == 1  # the rest waits
    segments = [first, *stream]
    assert tuple(segment.text for segment in segments) == QUESTIONS
    start = 0.0
    for segment, sound in zip(segments, spoken, strict=True):
        start += 1.0
        assert segment.language == "en" and abs(segment.start - start) < 0.4
        start += len(sound) / RATE
        assert abs(segment.end - start) < 0.8
    assert model.text(audio) == " ".join(QUESTIONS)


@needs_espeak
def test_loudness_silence_around_and_a_few_bad_samples_change_nothing():
    sound = said(QUESTIONS[1])
    bad = sound.copy()
    bad[::4000] = np.nan
    silence = np.zeros(5 * RATE, np.float32)
    for changed in (sound * 0.1, np.concatenate([silence, sound, silence]), bad):
        assert tiny().text(changed) == QUESTIONS[1]


@needs_espeak
def test_threads_take_turns():
    sounds = [said(text) for text in QUESTIONS] * 2
    heard: dict[int, str] = {}
    threads = [
        threading.Thread(target=lambda i=i: heard.update({i: tiny().text(sounds[i])}))
        for i in range(len(sounds))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [heard[i] for i in range(len(sounds))] == list(QUESTIONS) * 2


def test_a_real_recording_passes_through():
    if not JFK.exists():
        pytest.skip("the shared recording is not here")
    audio = read_audio(JFK)
    assert abs(len(audio) / RATE - 11) < 0.1 and has_voice(audio)
    segments = list(tiny().transcribe(audio, denoise=True))  # understood it is not
    assert all(0 <= s.start < s.end <= 11.1 and s.text for s in segments)
    assert len(utterances(audio, 28.0)) >= 3


@needs_espeak
def test_a_spoken_question_gets_a_spoken_answer(tmp_path):
    """Question -> espeak-ng -> Whisper -> answer -> speech, by files, as the commands do it."""
    voice = Voice.load()
    write_wav(tmp_path / "question.wav", *voice.speak(QUESTIONS[0]))
    question = tiny().text(read_audio(tmp_path / "question.wav"))
    assert question == QUESTIONS[0]
    picture = next((runs.world() / "images").glob("*.png"))
    answer = "".join(
        runs.assistant().reply([user_message(question, [str(picture)])], max_new_tokens=8)
    )
    assert any(c.isalnum() for c in answer)
    write_wav(tmp_path / "answer.wav", *voice.speak(answer))
    assert has_voice(read_audio(tmp_path / "answer.wav"))
