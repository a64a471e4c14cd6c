"""What is heard right, wrong, not at all, and where nothing was said: one table for any Whisper.

    python -m benchmarks.ears                       # the tiny preset's Whisper
    python -m benchmarks.ears --everyday base.pt    # beside one that knows all of English

Speech is made by espeak-ng; ../shared, where it is there, adds a person and what went wrong before.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soxr
from tqdm import tqdm

from config import default_config
from errors import run_main
from speech.recordings import SAMPLE_RATE, read_audio
from speech.voice import espeak
from speech.whisper import Speech
from tools.build_whisper import normaliser, word_errors
from tools.tiny.utterances import Utterance, measured_utterances, say

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared"
SEED = 11
EVERYDAY = (
    ("The train to the city leaves at a quarter past seven tomorrow morning.", "en-gb"),
    ("Please remember to water the plants in the kitchen before you leave.", "en-us+f3"),
    ("My sister bought a small house near the river last summer.", "en-gb-scotland+m3"),
    ("How far is it from the station to the library?", "en-us+m4"),
    ("She said that the weather would be better at the weekend.", "en-gb+f2"),
    ("Can you show me the picture of the dog with the red ball?", "en-us"),
)
SHORT = ("Yes.", "No.", "Hello.", "Thank you.", "Stop.", "What is this?")
JFK = (
    "And so my fellow Americans, ask not what your country can do for you,"
    " ask what you can do for your country."
)


@dataclass(frozen=True)
class Sound:
    """(samples,) float32 at 16 kHz, the words that are said in it, and the row it counts in."""

    row: str
    name: str
    samples: np.ndarray
    said: str


# -- speech ---------------------------------------------------------------------------------------


def spoken(text: str, voice: str) -> np.ndarray:
    samples, rate = espeak(text, voice)
    return soxr.resample(samples, rate, SAMPLE_RATE)


def world_sentences(each: int) -> Iterator[tuple[str, Utterance]]:
    for utterance in measured_utterances(each)["held-out sentences, held-out voices"]:
        yield utterance.text, utterance


def whispered(samples: np.ndarray) -> np.ndarray:
    """Speech without the voice: the spectrum's envelope, every 8 ms, filled with noise."""
    size, hop = 512, 128
    rng = np.random.default_rng(SEED)
    window = np.hanning(size)
    padded = np.pad(samples, size)
    made = np.zeros(len(padded), np.float64)
    for start in range(0, len(padded) - size, hop):
        frame = padded[start : start + size] * window
        log = np.log(np.abs(np.fft.rfft(frame)) + 1e-6)
        cepstrum = np.fft.irfft(log)
        cepstrum[30 : size - 29] = 0  # what is left has no pitch
        envelope = np.exp(np.fft.rfft(cepstrum).real)
        noise = np.fft.rfft(rng.standard_normal(size) * window)
        made[start : start + size] += np.fft.irfft(envelope * noise / np.sqrt(size / 4)) * window
    made = made[size : size + len(samples)]
    return (0.2 * made / (np.abs(made).max() + 1e-9)).astype(np.float32)


def pink(samples: int, seed: int = SEED) -> np.ndarray:
    """(samples,) of unit power whose power falls with the frequency."""
    spectrum = np.fft.rfft(np.random.default_rng(seed).standard_normal(samples))
    noise = np.fft.irfft(spectrum / np.sqrt(np.maximum(np.arange(len(spectrum)), 40)), samples)
    return (noise / noise.std()).astype(np.float32)


def in_noise(samples: np.ndarray, decibels: float) -> np.ndarray:
    """With pink noise that many decibels below it, for half a second around it too."""
    level = np.sqrt(np.mean(np.square(samples))) * 10 ** (-decibels / 20)
    padded = np.pad(samples, SAMPLE_RATE // 2)
    noisy = padded + np.float32(level) * pink(len(padded))
    return (noisy / max(1.0, float(np.abs(noisy).max()))).astype(np.float32)


def by_telephone(samples: np.ndarray) -> np.ndarray:
    spectrum = np.fft.rfft(samples)
    hertz = np.fft.rfftfreq(len(samples), 1 / SAMPLE_RATE)
    spectrum[(hertz < 300) | (hertz > 3400)] = 0
    return np.fft.irfft(spectrum, len(samples)).astype(np.float32)


def repeated(samples: np.ndarray, times: int, gap: float) -> np.ndarray:
    pause = np.zeros(int(gap * SAMPLE_RATE), np.float32)
    return np.concatenate([np.concatenate([samples, pause])] * times)


CONDITIONS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "clear": lambda sound: sound,
    "40 dB quieter": lambda sound: sound * 0.01,
    "by telephone": by_telephone,
    "noise at 10 dB": lambda sound: in_noise(sound, 10),
    "noise at 0 dB": lambda sound: in_noise(sound, 0),
    "whispered": whispered,
}


def speech(everyday: bool, each: int) -> Iterator[Sound]:
    """Sentences in every condition, and sentences that are said more than once."""
    sentences = [(text, say(utterance)) for text, utterance in world_sentences(each)]
    if everyday:
        sentences = [(text, spoken(text, voice)) for text, voice in EVERYDAY[:each]]
        if (SHARED / "real/speech/jfk.flac").is_file():
            sentences.append((JFK, read_audio(SHARED / "real/speech/jfk.flac")))
    for row, change in CONDITIONS.items():
        for text, sound in sentences:
            yield Sound(row, text[:24], change(sound), text)
    for text, sound in sentences:
        yield Sound("said twice", text[:24], repeated(sound, 2, 0.3), f"{text} {text}")
    for text, sound in sentences[:3]:
        times = max(4, min(10, int(24 * SAMPLE_RATE / len(sound))))
        yield Sound("said 4 to 10 times", text[:24], repeated(sound, times, 0.4), text * times)
    if everyday:
        back = "Please call me back. "
        for times in (4, 8, 14):
            sound = repeated(spoken(back, "en-us"), times, 0.3)
            yield Sound("said 4 to 10 times", f"{times} x {back}", sound, back * times)
        for voice in ("en-gb", "en-us+f3"):
            for text in SHORT:
                yield Sound("one to three words", text, np.pad(spoken(text, voice), 8000), text)
        files = SHARED / "faults"
        if files.is_dir():
            sound = read_audio(files / "speech_repeats_itself.flac")
            yield Sound("said 4 to 10 times", "speech_repeats_itself", sound, back * 5)
            sound = read_audio(files / "speech_whispered.flac")
            yield Sound("whispered", "speech_whispered", sound, JFK)


# -- other sounds ---------------------------------------------------------------------------------


def notes(hertz: list[float], seconds: float, partials: int, decay: float) -> np.ndarray:
    """Struck notes one after the other."""
    times = np.arange(int(seconds * SAMPLE_RATE)) / SAMPLE_RATE
    struck = [
        np.exp(-decay * times)
        * sum(np.sin(2 * np.pi * f * n * times) / n**1.5 for n in range(1, partials + 1))
        for f in hertz
    ]
    return np.concatenate(struck)


def swept(low: float, high: float, period: float, seconds: float) -> np.ndarray:
    """A siren: a tone that rises and falls."""
    times = np.arange(int(seconds * SAMPLE_RATE)) / SAMPLE_RATE
    hertz = low + (high - low) * 0.5 * (1 - np.cos(2 * np.pi * times / period))
    phase = 2 * np.pi * np.cumsum(hertz) / SAMPLE_RATE
    return np.sin(phase) + 0.3 * np.sin(2 * phase)


def struck_noise(seconds: float, every: float, decay: float, seed: int) -> np.ndarray:
    """Drums, knocks, typing: bursts of noise."""
    rng = np.random.default_rng(seed)
    sound = 0.002 * rng.standard_normal(int(seconds * SAMPLE_RATE))
    times = np.arange(int(0.3 * SAMPLE_RATE)) / SAMPLE_RATE
    at = 0.2
    while at < seconds - 0.4:
        start = int(at * SAMPLE_RATE)
        burst = rng.standard_normal(len(times)) * np.exp(-decay * times)
        sound[start : start + len(times)] += rng.uniform(0.4, 1) * burst
        at += every * rng.uniform(0.7, 1.3)
    return sound


def other_sounds() -> Iterator[Sound]:
    """Music, machines and noise: nothing is said in any of them."""
    rng = np.random.default_rng(SEED)
    scale = [220 * 2 ** (step / 12) for step in (0, 4, 7, 12, 16, 12, 7, 4)]
    seconds = 8.0
    times = np.arange(int(seconds * SAMPLE_RATE)) / SAMPLE_RATE
    ring = np.sin(2 * np.pi * 440 * times) + np.sin(2 * np.pi * 480 * times)
    chord = sum(
        np.sin(2 * np.pi * f * times + 0.02 * np.sin(2 * np.pi * 5 * times))
        for f in (196, 247, 294, 392)
    )
    wind = pink(len(times)) * (0.3 + np.abs(np.sin(2 * np.pi * 0.3 * times)))
    dial = [(697, 1209), (770, 1336), (852, 1477), (941, 1336), (697, 1477)]
    tone = np.arange(int(0.25 * SAMPLE_RATE)) / SAMPLE_RATE
    dialled = [
        np.pad(sum(np.sin(2 * np.pi * f * tone) for f in pair), (0, 2400)) for pair in dial * 3
    ]
    engine = np.sign(np.sin(2 * np.pi * np.cumsum(55 + 25 * np.sin(times)) / SAMPLE_RATE))
    made = {
        "silence": np.zeros(len(times)),
        "white noise": rng.standard_normal(len(times)),
        "pink noise": pink(len(times)),
        "wind": wind,
        "hum": sum(np.sin(2 * np.pi * 50 * n * times) / n for n in range(1, 9)),
        "arpeggio, plucked": notes(scale * 3, 0.3, 8, 5),
        "arpeggio, bells": notes([2 * f for f in scale] * 3, 0.35, 3, 3),
        "arpeggio, organ": notes([f / 2 for f in scale] * 2, 0.5, 10, 0.5),
        "melody, flute": notes([523, 587, 659, 698, 784, 659, 587, 523] * 3, 0.4, 2, 0.2),
        "bass notes": notes([55, 65, 73, 82, 98, 82] * 4, 0.4, 12, 3),
        "chord with vibrato": chord,
        "siren, slow": swept(500, 1500, 4, seconds),
        "siren, fast": swept(600, 1300, 0.35, seconds),
        "sweep": swept(100, 3000, 16, seconds),
        "telephone rings": ring
        * (np.sin(2 * np.pi * 0.25 * times) > 0)
        * (1 + np.sin(126 * times)),
        "dialled": np.concatenate(dialled),
        "drums": struck_noise(seconds, 0.4, 25, 1),
        "typing": struck_noise(seconds, 0.15, 150, 2),
        "knocks": struck_noise(seconds, 1.0, 60, 3),
        "engine": engine + 0.1 * pink(len(times)),
        "birds": swept(2500, 4500, 0.2, seconds) * (np.sin(2 * np.pi * 1.1 * times) > 0.3),
        "crying gulls": swept(700, 1100, 0.7, seconds) * (np.sin(2 * np.pi * 0.7 * times) > 0.2),
        "alarm": np.sign(np.sin(2 * np.pi * 880 * times)) * (np.sin(2 * np.pi * 2 * times) > 0),
    }
    for name, samples in made.items():
        loudest = float(np.abs(samples).max()) or 1.0
        yield Sound("nothing said", name, (0.5 * samples / loudest).astype(np.float32), "")
    for name in ("music_arpeggio", "siren"):
        if (file := SHARED / "faults" / f"{name}.flac").is_file():
            yield Sound("nothing said", name, read_audio(file), "")


# -- what was heard -------------------------------------------------------------------------------


@dataclass
class Row:
    """Counts of one kind of sound."""

    sounds: int = 0
    words: int = 0
    wrong: int = 0
    lost: int = 0
    invented: int = 0


def listen(speech: Speech, sounds: Iterable[Sound], show: Callable[[str], None]) -> dict[str, Row]:
    """By row: words said and wrong, recordings of which nothing was heard though something was
    said, and the other way round."""
    normalise = normaliser()
    rows: dict[str, Row] = {}
    for sound in sounds:
        row = rows.setdefault(sound.row, Row())
        segments = list(speech.transcribe(sound.samples, "en"))
        heard = " ".join(segment.text for segment in segments)
        wanted = normalise(sound.said).split()
        wrong = word_errors(normalise(heard).split(), wanted)
        row.sounds += 1
        row.words += len(wanted)
        if wanted:
            row.wrong += wrong
            row.lost += not heard
        else:
            row.invented += bool(heard)
        if wrong:
            show(f"{sound.row}: {sound.name!r} heard as {heard[:100]!r}")
    return rows


def table(columns: dict[str, dict[str, Row]]) -> str:
    """A Markdown table; a cell is words wrong in percent, lost and invented recordings."""
    names = list(dict.fromkeys(row for column in columns.values() for row in column))
    lines = ["| sound | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for name in names:
        cells = []
        for column in columns.values():
            row = column.get(name)
            if row is None:
                cells.append("")
                continue
            wrong = f"{100 * row.wrong / row.words:.1f} %" if row.words else "-"
            cells.append(f"{row.sounds}: {wrong}, {row.lost}, {row.invented}")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--everyday", metavar="PT", help="a Whisper that knows all of English")
    parser.add_argument("--each", type=int, default=20, help="the tiny one's sentences a row")
    parser.add_argument("--mistakes", action="store_true", help="a line for each")
    options = parser.parse_args()
    given = {"tiny": (ROOT / default_config("tiny").speech, False)}
    if options.everyday:
        given[Path(options.everyday).stem] = (Path(options.everyday), True)
    columns = {}
    for name, (path, everyday) in given.items():
        sounds = [*other_sounds(), *speech(everyday, options.each)]
        bar = tqdm(sounds, desc=name, mininterval=10)
        show = tqdm.write if options.mistakes else (lambda line: None)
        columns[name] = listen(Speech.load(path), bar, show)
    print("recordings: words wrong, recordings lost, recordings with invented words")
    print(table(columns))


if __name__ == "__main__":
    run_main(main)
