"""Speech out: espeak-ng as it is installed, a VITS model with random weights, WAV files."""

from __future__ import annotations

import json
import shutil

import huggingface_hub.constants
import numpy as np
import pytest
import soundfile
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from errors import PhiSightError
from speech import voice
from speech.voice import Voice, espeak, sentences, write_wav
from workers.pool import Cancelled

needs_espeak = pytest.mark.skipif(shutil.which("espeak-ng") is None, reason="no espeak-ng here")


# -- espeak-ng ------------------------------------------------------------------------------------


@needs_espeak
def test_espeak_speaks():
    samples, rate = Voice.load().speak("The star is red.")
    assert samples.dtype == np.float32 and samples.ndim == 1 and rate == 22050
    assert 0.5 < len(samples) / rate < 3
    assert 0.1 < np.abs(samples).max() <= 1


@needs_espeak
def test_rate_pitch_and_voice_are_used():
    said = "Where is the orange object?"
    plain = espeak(said, "en")[0]
    assert len(espeak(said, "en", rate=300)[0]) < 0.8 * len(plain)
    assert not np.array_equal(espeak(said, "en", pitch=90)[0], plain)
    assert not np.array_equal(espeak(said, "en+f3")[0], plain)
    assert not np.array_equal(Voice.load(language="de").speak(said)[0], plain)
    assert np.array_equal(espeak(said, "en")[0], plain)


@needs_espeak
@pytest.mark.parametrize(
    "text", ["--version", "-f /etc/passwd", "$(touch made) `touch made`; touch made | cat", "a\0b"]
)
def test_text_is_spoken_and_never_a_command(text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    samples, rate = espeak(text)
    assert len(samples) / rate > 0.2 and list(tmp_path.iterdir()) == []


def test_text_does_not_stand_on_the_command_line(tmp_path, monkeypatch):
    """Other users of a machine can read command lines."""
    program = tmp_path / "espeak-ng"
    program.write_text(f'#!/bin/sh\necho "$@" > {tmp_path}/arguments\ncat > {tmp_path}/input\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    with pytest.raises(PhiSightError, match="wrote no sound"):
        espeak("a secret", "en-us")
    assert "secret" not in (tmp_path / "arguments").read_text()
    assert (tmp_path / "input").read_text() == "a secret"


def test_an_absent_program_is_named_with_what_to_install(monkeypatch):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(PhiSightError, match="espeak-ng is not there; install.*VitsModel"):
        Voice.load()


@needs_espeak
def test_an_unknown_language_is_told_when_it_is_loaded():
    with pytest.raises(PhiSightError, match="'xx'.*does not exist.*--voices"):
        Voice.load(language="xx")


@pytest.mark.parametrize("name", ["-f", "../../etc/passwd", "en us", "", "en+a+b", "en\n"])
@needs_espeak
def test_a_voice_name_is_a_name(name):
    with pytest.raises(PhiSightError, match="is not a name|does not exist"):
        Voice.load(language=name)


@needs_espeak
@pytest.mark.parametrize("text", ["", "  \n", "...", "?!", "\x01\x02"])
def test_nothing_to_say_is_an_error(text):
    with pytest.raises(PhiSightError, match="nothing to say"):
        Voice.load().speak(text)


@needs_espeak
def test_limits_of_length_and_time(monkeypatch):
    with pytest.raises(PhiSightError, match="20001 characters, 20000 is the most"):
        espeak("a" * 20001)
    monkeypatch.setattr(voice, "SLOWEST", 1e-4)
    with pytest.raises(PhiSightError, match="took over.*shorten"):
        espeak("one " * 4000)


@needs_espeak
@settings(max_examples=20)
@given(st.text(max_size=60))
def test_any_text_is_spoken_or_refused(text):
    try:
        samples, _ = espeak(text)
    except PhiSightError as error:
        assert not any(c.isalnum() for c in text) or "wrote no sound" in str(error)
    else:
        assert np.isfinite(samples).all()


# -- VITS -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def vits_folder(tmp_path_factory):
    """A VitsModel of random weights and a tokenizer of letters, as a folder of the hub has them."""
    from transformers import VitsConfig, VitsModel, VitsTokenizer

    folder = tmp_path_factory.mktemp("vits")
    letters = ["<pad>", "<unk>", *" abcdefghijklmnopqrstuvwxyz'"]
    (folder / "letters.json").write_text(json.dumps({c: i for i, c in enumerate(letters)}))
    VitsTokenizer(
        str(folder / "letters.json"),
        pad_token="<pad>",
        unk_token="<unk>",
        add_blank=True,
        normalize=True,
        phonemize=False,
        is_uroman=False,
    ).save_pretrained(folder)
    config = VitsConfig(
        vocab_size=len(letters),
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        ffn_dim=16,
        flow_size=16,
        spectrogram_bins=17,
        prior_encoder_num_flows=1,
        prior_encoder_num_wavenet_layers=1,
        posterior_encoder_num_wavenet_layers=1,
        upsample_initial_channel=16,
        upsample_rates=[4, 4],
        upsample_kernel_sizes=[8, 8],
        resblock_kernel_sizes=[3],
        resblock_dilation_sizes=[[1]],
        duration_predictor_num_flows=2,
        duration_predictor_filter_channels=16,
        wavenet_dilation_rate=1,
        sampling_rate=11025,
    )
    torch.manual_seed(0)
    VitsModel(config).save_pretrained(folder)
    return folder


def test_a_vits_folder_speaks_the_same_every_time(vits_folder):
    speaker = Voice.load(str(vits_folder))
    torch.manual_seed(5)
    former = torch.get_rng_state()
    samples, rate = speaker.speak("The star is red. It is small.")
    assert torch.equal(torch.get_rng_state(), former)  # a training beside it stays exact
    assert rate == 11025 and samples.dtype == np.float32 and samples.ndim == 1
    assert len(samples) > 100 and np.isfinite(samples).all() and np.abs(samples).max() <= 1
    torch.manual_seed(6)
    assert np.array_equal(speaker.speak("The star is red. It is small.")[0], samples)


def test_text_without_a_letter_of_the_voice_is_refused(vits_folder):
    with pytest.raises(PhiSightError, match="none of the text's letters"):
        Voice.load(str(vits_folder)).speak("日本語")


def test_nobody_waits_for_the_second_sentence(vits_folder):
    asked: list[bool] = []

    def cancelled() -> bool:
        asked.append(True)
        return len(asked) > 1

    with pytest.raises(Cancelled):
        Voice.load(str(vits_folder)).speak("The star is red. It is small.", cancelled=cancelled)
    assert len(asked) == 2


@pytest.mark.parametrize("name", ["/no/such/folder", "no/such/folder/here", "nobody/nothing"])
def test_a_voice_that_is_not_there_is_told_with_what_to_install(name, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(PhiSightError, match=f"voice {name}.*; install .*espeak-ng"):
        Voice.load(name)


def test_a_folder_of_another_model_is_no_voice(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "vits"}')
    with pytest.raises(PhiSightError, match="does not load as a VitsModel"):
        Voice.load(str(tmp_path))


@given(st.text(alphabet="ab .!?", max_size=2000), st.integers(0, 900))
def test_pieces_are_short_and_hold_every_word(text, at):
    text = text[:at] + "x" * at + text[at:]
    pieces = sentences(text)
    assert all(0 < len(piece) <= voice.LONGEST_PIECE for piece in pieces)
    assert "".join("".join(pieces).split()) == "".join(text.split())


# -- files ----------------------------------------------------------------------------------------


def test_a_wav_holds_what_was_spoken(tmp_path):
    samples = np.sin(np.linspace(0, 300, 8000)).astype(np.float32) * 0.5
    write_wav(tmp_path / "a.wav", samples, 16000)
    read, rate = soundfile.read(tmp_path / "a.wav", dtype="float32")
    assert rate == 16000 and np.abs(read - samples).max() < 1e-4
    assert [path.name for path in tmp_path.iterdir()] == ["a.wav"]


def test_a_wav_that_cannot_be_written_is_told(tmp_path):
    with pytest.raises(PhiSightError, match="no/a.wav: cannot be written"):
        write_wav(tmp_path / "no" / "a.wav", np.zeros(10, np.float32), 16000)
    (tmp_path / "folder").mkdir()
    with pytest.raises(PhiSightError, match="folder: cannot be written"):
        write_wav(tmp_path / "folder", np.zeros(10, np.float32), 16000)
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]
