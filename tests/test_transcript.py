"""`infer.py --transcribe`: recordings written down as text, SRT and JSON, with no trained model."""

from __future__ import annotations

import json
import re
import signal

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sounds import RATE, TINY, encoded, needs_espeak, said, vowels

import infer
from errors import PhiSightError
from speech.subtitles import CUE_CHARACTERS, as_srt, cues_of
from speech.whisper import NoSpeech, Segment, Speech

QUESTIONS = ("What colour is the star?", "How many circles are there?")
CUE = re.compile(
    r"(\d+)\n(\d\d):(\d\d):(\d\d),(\d{3}) --> (\d\d):(\d\d):(\d\d),(\d{3})\n([^\n]+)\n\n"
)


def recording(folder) -> str:
    """Two questions with a second of silence before each."""
    gap = np.zeros(RATE, np.float32)
    parts = [part for text in QUESTIONS for part in (gap, said(text))]
    path = folder / "talk.wav"
    path.write_bytes(encoded(np.concatenate(parts), RATE, "WAV"))
    return str(path)


def transcribe(*arguments: object) -> int:
    """In a folder without any run, as somebody who has trained nothing."""
    return infer.main(
        ["--speech", str(TINY), "--run", "no-run", "--transcribe", *map(str, arguments)]
    )


@needs_espeak
def test_a_recording_is_written_down_in_every_form(tmp_path, capsys):
    talk = recording(tmp_path)
    assert transcribe(talk) == 0
    assert capsys.readouterr().out.splitlines() == list(QUESTIONS)
    assert transcribe(talk, "--json") == 0
    record = json.loads(capsys.readouterr().out)
    assert record["text"] == " ".join(QUESTIONS) and record["language"] == "en"
    assert record["complete"] is True and record["seconds"] > 4
    assert [segment["text"] for segment in record["segments"]] == list(QUESTIONS)
    assert abs(record["segments"][0]["start"] - 1) < 0.4
    for name in ("talk.srt", "talk.txt", "talk.json"):
        assert transcribe(talk, "--out", tmp_path / name) == 0
    assert (tmp_path / "talk.txt").read_text().splitlines() == list(QUESTIONS)
    assert json.loads((tmp_path / "talk.json").read_text()) == record
    cues = CUE.findall((tmp_path / "talk.srt").read_text())
    assert [cue[0] for cue in cues] == ["1", "2"] and [cue[-1] for cue in cues] == list(QUESTIONS)
    assert capsys.readouterr().out.splitlines() == 3 * list(QUESTIONS)


@needs_espeak
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_what_was_written_down_is_kept_when_it_is_stopped(number, tmp_path, capsys, monkeypatch):
    decode, windows = Speech._decode, []

    def stop_at_the_second(self, window, language, translate):
        windows.append(len(window))
        if len(windows) == 2:
            signal.raise_signal(number)
        return decode(self, window, language, translate)

    monkeypatch.setattr(Speech, "_decode", stop_at_the_second)
    former = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt):
        transcribe(recording(tmp_path), "--out", tmp_path / "talk.json")
    record = json.loads((tmp_path / "talk.json").read_text())
    assert record["text"] == QUESTIONS[0] and record["complete"] is False
    assert "stopped after" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGTERM) is former


def test_a_recording_without_speech_says_so_and_fails(tmp_path):
    path = tmp_path / "silence.wav"
    path.write_bytes(encoded(np.zeros(RATE, np.float32), RATE, "WAV"))
    out = tmp_path / "a.srt"
    with pytest.raises(NoSpeech):
        transcribe(path, "--out", out)
    assert not out.exists()
    out.write_text("an earlier one")
    with pytest.raises(NoSpeech):
        transcribe(path, "--out", out)
    assert out.read_text() == "an earlier one"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["no-such.wav"], "no-such.wav: cannot be read"),
        (["a.wav", "--out", "a.doc"], "--out a.doc: the name of a transcript ends with .txt, .srt"),
        (["a.wav", "--out", "none/a.srt"], "--out none/a.srt: its folder does not exist"),
        (["a.wav", "--out", "folder.srt"], "--out folder.srt: is not a file"),
        (["a.wav", "--out", f"{'a' * 260}.srt"], "File name too long"),
        (["a.wav", "--out", f"{'a' * 230}.srt"], "File name too long"),  # with the temporary's end
        (["a.wav", "--image", "a.png"], "belong to one question"),
        (["a.wav", "--speech", ""], "--speech: is empty"),
        (["a.wav", "--denoise", "--language", "de"], "hears English only"),
        (["a.wav", "--prompt", "What?"], "give one of"),
    ],
)
def test_what_it_refuses_is_one_line(arguments, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.wav").write_bytes(encoded(vowels(0.3), RATE, "WAV"))
    (tmp_path / "folder.srt").mkdir()
    with pytest.raises(PhiSightError, match=re.escape(said)):
        transcribe(*arguments)


TEXTS = st.lists(st.text("ab,. ", min_size=1, max_size=120), min_size=1, max_size=4)


@given(TEXTS, st.floats(0, 3000), st.floats(0.1, 28))
def test_subtitles_are_short_in_order_and_hold_every_word(texts, start, length):
    segments, at = [], start
    for text in texts:
        if words := " ".join(text.split()):
            segments.append(Segment(at, at + length, words, "en"))
            at += length
    cues = CUE.findall(as_srt(segments))
    assert " ".join(cue[-1] for cue in cues).split() == [
        w for s in segments for w in s.text.split()
    ]
    times = [
        3600 * int(c[i]) + 60 * int(c[i + 1]) + int(c[i + 2]) + int(c[i + 3]) / 1000
        for c in cues
        for i in (1, 5)
    ]
    assert times == sorted(times)
    for segment in segments:
        parts = list(cues_of(segment))
        assert parts[0][0] == segment.start and abs(parts[-1][1] - segment.end) < 1e-6
        assert all(len(part[2]) <= CUE_CHARACTERS or " " not in part[2] for part in parts)
