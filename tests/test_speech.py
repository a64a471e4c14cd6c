"""The transcriber: models that are loaded or refused, and the tiny preset's Whisper."""

from __future__ import annotations

import argparse
import math
import os
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import runs
import torch
from sounds import JFK, RATE, TINY, needs_espeak, said, tiny, vowels

from assistant.messages import user_message
from benchmarks import ears
from errors import PhiSightError
from speech.activity import has_voice, utterances
from speech.model_file import _shapes
from speech.recordings import read_audio
from speech.spoken import listener
from speech.voice import Voice, write_wav
from speech.whisper import NoSpeech, Segment, Speech, TooLong, is_believable, write_down
from terminal.hearing import listening
from tools import build_whisper
from tools.tiny import listener as taught
from tools.tiny import utterances as sentences
from workers.pool import Cancelled
from workers.turns import Turns

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
        text, language, tokens = "hola", "es", (1, 2)
        no_speech_prob, avg_logprob, compression_ratio = 0.0, -0.1, 1.0

    def listen(audio, language, translate):
        asked.append(language)
        return Result

    model._decode = listen
    audio = np.concatenate([vowels(), np.zeros(RATE, np.float32), vowels()])
    assert [s.text for s in model.transcribe(audio)] == ["hola", "hola"]
    assert asked == [None, "es"]


@dataclass
class Heard:
    """What Whisper makes of a window."""

    no_speech_prob: float = 0.1
    avg_logprob: float = -0.2
    compression_ratio: float = 1.1
    text: str = "a star"
    tokens: Sequence[int] = (1, 2)
    language: str = "en"


@pytest.mark.parametrize(
    ("heard", "kept", "kept_without_voice"),
    [
        (Heard(), True, True),
        (Heard(0.7, -0.5), True, False),
        (Heard(0.7, -1.2), False, False),
        (Heard(0.95, -0.1), False, False),
        (Heard(0.1, -1.2), True, True),
        (Heard(0.13, -0.1, 5.3, "call me. " * 8), True, True),
        (Heard(0.57, -0.12, 49.0, "o" * 300), False, False),
        # As Whisper base heard them: an arpeggio, a siren, typing; whispering, "Stop." in noise.
        (Heard(0.27, -1.85, 0.3, "1.0%"), False, False),
        (Heard(0.55, -2.55, 0.1, "I"), False, False),
        (Heard(0.68, -0.83, 0.6, "Thank you."), True, False),
        (Heard(0.06, -0.21), True, True),
        (Heard(0.46, -0.51, 0.4, "Stop."), True, True),
    ],
)
def test_what_whisper_doubts_is_dropped(heard, kept, kept_without_voice):
    assert (is_believable(heard, True), is_believable(heard, False)) == (kept, kept_without_voice)


def of_full_size(results: Callable[[np.ndarray], Heard]) -> Speech:
    """A `Speech` with the room of OpenAI's Whispers, that answers with `results`."""
    model = Speech(tiny().model, "made up")
    model.joins, model.longest = True, 28.0
    model._decode = lambda window, language, translate: results(window)
    return model


@pytest.mark.parametrize("text", [" ... ", ""])
def test_a_text_without_letters_is_nothing(text):
    assert list(of_full_size(lambda window: Heard(text=text)).transcribe(vowels())) == []


def test_speech_that_repeats_itself_is_kept_and_circles_are_heard_in_parts():
    room = tiny().model.dims.n_text_ctx // 2
    again = Heard(0.1, -0.1, 5.3, "call me. " * 8, tokens=range(room - 1))
    assert len(list(of_full_size(lambda window: again).transcribe(vowels(8.0)))) == 1
    # Written until there was no more room: each part is heard alone, and what ends is kept.
    circles = Heard(0.1, -0.1, 26.0, "call me. " * 99, tokens=range(room))
    sizes = []

    def hear(window: np.ndarray) -> Heard:
        sizes.append(len(window) / RATE)
        return circles if len(window) > 5 * RATE else Heard(text="call me")

    segments = list(of_full_size(hear).transcribe(vowels(8.0)))
    assert [segment.text for segment in segments] == ["call me"] * (len(sizes) - 1)
    assert sizes[0] > 7.9 and abs(sum(sizes[1:]) - sizes[0]) < 0.1
    assert segments[0].start == 0 and abs(segments[-1].end - 8) < 0.1
    assert all(a.end <= b.start for a, b in zip(segments, segments[1:]))
    # What goes in circles again and again, as music does, comes to nothing after a few trials.
    sizes.clear()
    assert list(of_full_size(lambda window: sizes.append(1) or circles).transcribe(vowels(8))) == []
    assert len(sizes) <= 1 + 3 + 9
    noise_of_nobody = Heard(0.95, -0.1, 26.0, "woo " * 99, tokens=range(room))
    sizes.clear()
    assert (
        list(of_full_size(lambda w: sizes.append(1) or noise_of_nobody).transcribe(vowels(8))) == []
    )
    assert len(sizes) == 1  # nobody speaks: its parts need no hearing


def test_a_sound_without_a_voice_is_heard_and_doubted_more():
    whisper = np.random.default_rng(0).normal(0, 0.05, RATE).astype(np.float32)
    assert not has_voice(whisper)
    for share, kept in ((0.3, ["a star"]), (0.55, [])):
        model = of_full_size(lambda window: Heard(no_speech_prob=share))
        assert [segment.text for segment in model.transcribe(whisper)] == kept


@needs_espeak
def test_whispering_is_understood():
    assert tiny().text(ears.whispered(said(QUESTIONS[0]))) == QUESTIONS[0]


def test_a_model_that_knows_few_sentences_has_to_be_sure():
    assert is_believable(Heard(0.1, -0.8), True)
    assert not is_believable(Heard(0.1, -0.8), True, tiny().invented)


def test_noise_is_reduced_where_it_is_asked_for():
    windows: list[np.ndarray] = []
    model = of_full_size(lambda window: windows.append(window) or Heard())
    noisy = vowels() + 0.1 * np.random.default_rng(2).standard_normal(len(vowels()))
    for denoise in (False, True):
        assert [one.text for one in model.transcribe(noisy, denoise=denoise)] == ["a star"]
    assert np.array_equal(windows[0], noisy.astype(np.float32)[: len(windows[0])])
    assert np.square(windows[1]).mean() < 0.9 * np.square(windows[0]).mean()


# -- turns, and those who have gone ----------------------------------------------------------------


def test_who_goes_is_heard_no_further():
    heard: list[int] = []
    gap = np.zeros(RATE, np.float32)
    audio = np.concatenate([vowels(), gap] * 4)
    model = Speech(tiny().model, "made up")
    model._decode = lambda *window: heard.append(1) or Heard()
    with pytest.raises(Cancelled):
        for segment in model.transcribe(audio, cancelled=lambda: len(heard) == 2):
            assert segment.text == "a star"
    assert len(heard) == 2
    with pytest.raises(Cancelled):
        model.text(audio, cancelled=lambda: True)
    assert len(heard) == 2


def test_a_short_question_waits_for_one_window_of_a_long_recording():
    gap = np.zeros(RATE, np.float32)
    order: list[str] = []
    began, go_on = threading.Event(), threading.Event()
    model = Speech(tiny().model, "made up")

    def hear(window: np.ndarray, *rest: object) -> Heard:
        name = "short" if len(window) < 1.5 * RATE else "long"
        order.append(name)
        if len(order) == 1:
            began.set()
            assert go_on.wait(20)
        return Heard()

    model._decode = hear
    recording = np.concatenate([vowels(2), gap] * 6)
    long = threading.Thread(target=lambda: list(model.transcribe(recording)), daemon=True)
    short = threading.Thread(target=lambda: list(model.transcribe(vowels(0.8))), daemon=True)
    long.start()
    assert began.wait(20)
    short.start()
    while len(model._turns._asking) < 2:
        time.sleep(0.01)
    go_on.set()
    long.join(20)
    short.join(20)
    assert order == ["long", "short"] + ["long"] * 5


def test_who_waits_for_a_turn_can_leave():
    turns, left = Turns(), threading.Event()

    def wait() -> None:
        with pytest.raises(Cancelled), turns.take(left.is_set):
            raise AssertionError("the turn was not free")

    with turns.take():
        waiting = threading.Thread(target=wait)
        waiting.start()
        while len(turns._asking) < 2:
            time.sleep(0.01)
        left.set()
        waiting.join(20)
        assert not waiting.is_alive()
    with turns.take():  # nobody else has it
        pass


def test_a_recording_longer_than_the_context_stops_there_and_keeps_its_text():
    heard, shown = [], []
    model = Speech(tiny().model, "made up")
    model._decode = lambda *window: heard.append(1) or Heard(text="one two")
    audio = np.concatenate([vowels(), np.zeros(RATE, np.float32)] * 60)
    with pytest.raises(TooLong, match="first 0.1 minutes fill .*--transcribe") as error:
        write_down(model.transcribe(audio), lambda text: len(text.split()) <= 5, shown.append)
    assert error.value.text == "one two one two one two" and shown == ["one two"] * 3
    assert len(heard) == 3 and "picture" not in str(error.value)
    with pytest.raises(TooLong):
        model.text(audio, fits=lambda text: False)


@needs_espeak
def test_a_question_is_heard_as_far_as_the_model_has_room():
    """`infer.py --audio`, with a model that reads little."""
    rooms = []

    def has_room(messages) -> bool:
        rooms.append([part.value for part in messages[0].parts])
        return len(messages[0].parts[-1].value) < 30

    assistant = argparse.Namespace(config=argparse.Namespace(speech=str(TINY)), has_room=has_room)
    options = argparse.Namespace(
        speech=None, device="cpu", language=None, translate=False, denoise=False
    )
    gap = np.zeros(RATE, np.float32)
    audio = np.concatenate([part for text in QUESTIONS for part in (said(text), gap)])
    with pytest.raises(TooLong) as error:
        listening(options, assistant, images=["a.png"])(audio)
    assert error.value.text == " ".join(QUESTIONS[:2])
    assert rooms == [["a.png", QUESTIONS[0]], ["a.png", " ".join(QUESTIONS[:2])]]


def test_an_assistant_knows_its_room():
    assert runs.assistant().has_room([user_message("What is a star?", [])])
    assert not runs.assistant().has_room([user_message("star " * 5000, [])])


def test_no_speech_blames_nothing_but_the_sound():
    with pytest.raises(NoSpeech) as error:
        tiny().text(np.zeros(RATE, np.float32))
    assert "microphone" not in str(error.value)


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


LIMITS_OF_SIZE = """
import resource, sys, zipfile
import torch
from errors import PhiSightError
from speech import model_file
from speech.whisper import Speech

folder = sys.argv[1]
DIMENSIONS = model_file.LARGEST_DIMENSIONS | {"n_audio_layer": 8, "n_text_layer": 8}  # 10 GB
shapes = model_file._shapes(DIMENSIONS)


class Bytes:
    def __reduce__(self):
        return bytearray, (8 << 30,)


def with_state(value):
    return {"dims": DIMENSIONS, "model_state_dict": {key: value(s) for key, s in shapes.items()}}


files = {
    "no weights": {"dims": DIMENSIONS, "model_state_dict": {}},
    "one element repeated": with_state(lambda shape: torch.zeros(1).expand(shape)),
    "no elements at all": with_state(lambda shape: torch.empty(shape, device="meta")),
    "sparse": with_state(lambda s: torch.sparse_coo_tensor(torch.zeros(len(s), 0), [], s)),
    "whole numbers": with_state(lambda shape: torch.zeros(1, dtype=torch.int8).expand(shape)),
    "8 GB of bytes": {"dims": DIMENSIONS, "model_state_dict": {}, "more": Bytes()},
}
paths = []
for name, content in files.items():
    paths.append(f"{folder}/{name}.pt")
    torch.save(content, paths[-1])
torch.save({"dims": DIMENSIONS, "more": torch.zeros(25_000_000)}, f"{folder}/large.pt")
paths.append(f"{folder}/packed.pt")
with zipfile.ZipFile(f"{folder}/large.pt") as a, zipfile.ZipFile(paths[-1], "w") as b:
    for entry in a.infolist():
        b.writestr(entry.filename, a.read(entry), zipfile.ZIP_DEFLATED)
import whisper
used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for path in paths:
    try:
        Speech.load(path)
    except PhiSightError as error:
        assert "name another .pt" in str(error), error
    else:
        print(path, "was loaded")
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - used) >> 10, "MB")
"""


def test_no_model_is_made_by_sizes_that_a_file_only_claims(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", LIMITS_OF_SIZE, str(tmp_path)],
        env={**os.environ, "PYTHONPATH": str(runs.ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    megabytes, unit = done.stdout.split()
    assert unit == "MB" and int(megabytes) < 50, done.stdout


@pytest.mark.parametrize(
    ("pickled", "reason"),
    [
        (b"\x80\x02}q\0(h\0t0.", "it is damaged: Unsupported operand 48"),
        (b"\x80\x04\x8c\x05posix\x8c\x06system\x93.", "its pickle uses STACK_GLOBAL"),
    ],
)
def test_a_damaged_file_is_not_recommended_to_be_run(pickled, reason, tmp_path):
    """torch advises `weights_only=False`, which runs what is in the file."""
    with zipfile.ZipFile(tmp_path / "m.pt", "w") as packed:
        packed.writestr("m/data.pkl", pickled)
        packed.writestr("m/version", "3")
    with pytest.raises(PhiSightError, match=f"{reason}.*; name another .pt$") as error:
        Speech.load(tmp_path / "m.pt")
    assert "weights_only" not in str(error.value)


def test_tensors_that_are_one_and_the_same_are_refused(tmp_path):
    """As a file of one layer could claim to be one of many."""
    saved = torch.load(small_whisper(tmp_path / "m.pt"), weights_only=True)
    state = saved["model_state_dict"]
    state["encoder.blocks.0.attn.query.weight"] = state["encoder.blocks.0.attn.value.weight"]
    torch.save(saved, tmp_path / "m.pt")
    with pytest.raises(PhiSightError, match="one and the same.*name another .pt"):
        Speech.load(tmp_path / "m.pt")


def test_the_shapes_that_are_wanted_are_those_of_whisper(tmp_path):
    saved = torch.load(small_whisper(tmp_path / "m.pt"), weights_only=True)
    shapes = {key: tuple(value.shape) for key, value in saved["model_state_dict"].items()}
    assert _shapes(saved["dims"]) == shapes


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
