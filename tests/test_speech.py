"""The transcriber: models that are loaded or refused, and the tiny preset's Whisper."""

from __future__ import annotations

import argparse
import math
import os
import threading
from pathlib import Path

import numpy as np
import pytest
import runs
import torch
from sounds import JFK, RATE, TINY, needs_espeak, said, tiny, vowels

from assistant.messages import user_message
from errors import PhiSightError
from speech.activity import has_voice, utterances
from speech.recordings import read_audio
from speech.spoken import listener
from speech.voice import Voice, write_wav
from speech.whisper import Segment, Speech
from tools import build_whisper
from tools.tiny import listener as taught
from tools.tiny import utterances as sentences

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
