"""Is speech in noise heard better when the noise is reduced first? Words wrong, in turns.

    python -m benchmarks.noise                       # the tiny preset's Whisper, its own questions
    python -m benchmarks.noise --everyday base.pt    # one that knows all of English
    python -m benchmarks.noise --everyday base.pt --recordings FOLDER   # with people: a.wav, a.txt

On half of the sentences and noise the best reduction is chosen; the other half tells what it is
worth. The interval is the bootstrap's 95 %, sentences with their noise drawn together.
"""

from __future__ import annotations

import argparse
import json
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from benchmarks.ears import JFK, ROOT, SHARED, pink, spoken, world_sentences
from benchmarks.noise_reductions import REDUCTIONS
from config import default_config
from errors import run_main
from evaluation.intervals import cluster_sums, percentiles, ratio, resampled
from speech.recordings import SAMPLE_RATE, read_audio
from speech.whisper import Speech
from tools.build_whisper import normaliser, word_errors
from tools.tiny.utterances import say

AS_IT_IS = "as it is"
CHOOSING_LEVELS = (10.0, 0.0)  # dB of speech over noise
REPORTED_LEVELS = (np.inf, 20.0, 10.0, 5.0, 0.0, -5.0)
PASSAGES = (
    (
        "en-us",
        "The meeting was moved to Thursday. Please bring the signed papers and a pen."
        " Turn left at the church and go straight on. The bakery is next to the bank.",
    ),
    (
        "en-gb",
        "We walked along the beach until it was dark. Then we made a fire and sang songs."
        " Heavy rain is expected in the north tonight. Tomorrow will be dry and warm.",
    ),
    (
        "en-us+f3",
        "My brother plays the guitar in a small band. They practise in our garage."
        " The doctor told me to drink more water. I also have to sleep eight hours.",
    ),
    (
        "en-us+m4",
        "This bridge was built a hundred years ago. It was closed after the flood."
        " My aunt sells flowers at the market. On Sundays she gives them away.",
    ),
)
BABBLE = (
    ("en-us+m1", "I was going to tell you about the holiday, but you never called me back again."),
    ("en-gb+f4", "There were two kinds of soup and a very large plate of cheese on the table."),
    ("en-us+f1", "Nobody knows where the keys are, so somebody must have taken them by mistake."),
    ("en-gb+m7", "The price of bread has gone up three times since the beginning of the year."),
    ("en-gb-scotland", "He always leaves the window open and then he says that the room is cold."),
    ("en-us+m6", "If the bus is late again, we will have to run all the way to the office."),
)


# -- noise ----------------------------------------------------------------------------------------


def white(rng: np.random.Generator, samples: int) -> np.ndarray:
    return rng.standard_normal(samples)


def pink_noise(rng: np.random.Generator, samples: int) -> np.ndarray:
    return pink(samples, int(rng.integers(2**31)))


def babble(rng: np.random.Generator, samples: int) -> np.ndarray:
    """Six people who talk at the same time, on and on."""
    mixed = np.zeros(samples)
    for voice, text in BABBLE:
        sound = spoken(text, voice)
        sound = np.resize(np.roll(sound, int(rng.integers(len(sound)))), samples)
        mixed += rng.uniform(0.5, 1) * sound / (sound.std() + 1e-9)
    return mixed


def hum(rng: np.random.Generator, samples: int) -> np.ndarray:
    """Mains at 50 or 60 Hz with forty harmonics, and a little hiss."""
    times = np.arange(samples) / SAMPLE_RATE
    base = rng.choice([50.0, 60.0])
    sound = 0.02 * rng.standard_normal(samples)
    for number in range(1, 41):
        loud = rng.uniform(0.3, 1) / number**0.7
        sound += loud * np.sin(2 * np.pi * (base * number * times + rng.uniform()))
    return sound


def fan(rng: np.random.Generator, samples: int) -> np.ndarray:
    """Brown noise that beats with the blades, and their tone."""
    spectrum = np.fft.rfft(rng.standard_normal(samples))
    hertz = np.fft.rfftfreq(samples, 1 / SAMPLE_RATE)
    brown = np.fft.irfft(spectrum / np.maximum(hertz, 60), samples)
    phase = 2 * np.pi * rng.uniform(25, 60) * np.arange(samples) / SAMPLE_RATE
    tone = sum(np.sin(n * phase + rng.uniform(0, 6)) / n for n in range(1, 6))
    return brown / brown.std() * (1 + 0.3 * np.sin(phase)) + 0.3 * tone


def street(rng: np.random.Generator, samples: int) -> np.ndarray:
    """Cars that pass, knocks and horns over a quiet bed."""
    sound = 0.15 * pink_noise(rng, samples).astype(np.float64)
    for _ in range(1 + samples // (2 * SAMPLE_RATE)):
        length = int(rng.uniform(1, 3) * SAMPLE_RATE)
        car = rng.uniform(0.4, 1.5) * pink_noise(rng, length) * np.hanning(length) ** 2
        _add(sound, car, int(rng.integers(samples)))
        length = int(0.2 * SAMPLE_RATE)
        knock = rng.standard_normal(length) * np.exp(-np.arange(length) / 500)
        _add(sound, rng.uniform(0.5, 2) * knock, int(rng.integers(samples)))
    length = int(rng.uniform(0.3, 0.8) * SAMPLE_RATE)
    times = np.arange(length) / SAMPLE_RATE
    horn = np.zeros(length)
    for number in range(1, 6):
        horn += sum(np.sin(2 * np.pi * f * number * times) / number for f in (410, 515))
    _add(sound, 0.7 * horn, int(rng.integers(samples)))
    return sound


def _add(sound: np.ndarray, part: np.ndarray, at: int) -> None:
    part = part[: len(sound) - at]
    sound[at : at + len(part)] += part


NOISES: dict[str, Callable[[np.random.Generator, int], np.ndarray]] = {
    "white": white,
    "pink": pink_noise,
    "babble": babble,
    "hum": hum,
    "fan": fan,
    "street": street,
}


def mixed(speech: np.ndarray, kind: str, decibels: float, seed: int) -> np.ndarray:
    """Speech with noise that many decibels below it, for half a second around it too."""
    padded = np.pad(speech, SAMPLE_RATE // 2)
    if np.isfinite(decibels):
        noise = NOISES[kind](np.random.default_rng(seed), len(padded))
        level = np.sqrt(np.mean(np.square(speech))) * 10 ** (-decibels / 20)
        padded = padded + level * noise / (noise.std() + 1e-12)
    return (padded / max(1.0, float(np.abs(padded).max()))).astype(np.float32)


# -- what is heard --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Passage:
    """What is said in (samples,) float32 at 16 kHz; `chosen_by`: the half that it belongs to, None
    for both."""

    name: str
    said: str
    samples: np.ndarray
    chosen_by: bool | None


@dataclass(frozen=True)
class Heard:
    """One passage in one noise, heard after one reduction."""

    passage: str
    kind: str
    decibels: float
    reduction: str
    wrong: int
    words: int


def passages(everyday: bool, each: int, folder: Path | None) -> list[Passage]:
    """What is heard: the picture world's questions, or everyday sentences and people."""
    if not everyday:
        own = enumerate(world_sentences(each))
        return [Passage(f"{n} {text}", text, say(u), n % 2 == 0) for n, (text, u) in own]
    found = [
        Passage(voice, text, spoken(text, voice), n % 2 == 0)
        for n, (voice, text) in enumerate(PASSAGES)
    ]
    if (file := SHARED / "real/speech/jfk.flac").is_file():
        found.append(Passage("jfk", JFK, read_audio(file), None))
    for n, text in enumerate(sorted(folder.glob("*.txt")) if folder else ()):
        sound = next(f for f in sorted(text.parent.glob(f"{text.stem}.*")) if f != text)
        found.append(Passage(text.stem, text.read_text(), read_audio(sound), n % 2 == 0))
    return found


def listen(
    speech: Speech,
    found: Sequence[Passage],
    reductions: Sequence[str],
    levels: Sequence[float],
    choosing: bool,
    kept: dict[str, Heard],
    keep: Callable[[str, Heard], None],
) -> list[Heard]:
    """All passages of a half, in every noise at every level, after every reduction."""
    plan = [
        (passage, kind, level, reduction)
        for passage in found
        if passage.chosen_by in (choosing, None)
        for level in levels
        for kind in (NOISES if np.isfinite(level) else ("none",))
        for reduction in reductions
    ]
    heard = []
    normalise = normaliser()
    for passage, kind, level, reduction in tqdm(plan, mininterval=10):
        key = f"{speech.name} {choosing} {passage.name} {kind} {level} {reduction}"
        if key not in kept:
            seed = zlib.crc32(f"{choosing} {passage.name} {kind}".encode())
            sound = REDUCTIONS[reduction](mixed(passage.samples, kind, level, seed))
            text = " ".join(segment.text for segment in speech.transcribe(sound, "en"))
            wanted = normalise(passage.said).split()
            wrong = word_errors(normalise(text).split(), wanted)
            kept[key] = Heard(passage.name, kind, level, reduction, wrong, len(wanted))
            keep(key, kept[key])
        heard.append(kept[key])
    return heard


# -- figures --------------------------------------------------------------------------------------


def percent(heard: Sequence[Heard], reduction: str) -> float:
    own = [one for one in heard if one.reduction == reduction]
    return 100 * sum(one.wrong for one in own) / max(1, sum(one.words for one in own))


def difference(heard: Sequence[Heard], reduction: str) -> tuple[float, float, float]:
    """Percent of words wrong after `reduction`, less those of the same sounds as they are, and
    both ends of its interval."""
    values = np.array(
        [
            [
                one.wrong * (1 if one.reduction == reduction else -1),
                one.words * (one.reduction == reduction),
            ]
            for one in heard
            if one.reduction in (reduction, AS_IT_IS)
        ],
        dtype=float,
    )
    clusters = [
        f"{one.passage} {one.kind}" for one in heard if one.reduction in (reduction, AS_IT_IS)
    ]
    sums = cluster_sums(values, clusters)
    draws = resampled(sums)
    low, high = percentiles(100 * ratio(draws[:, 0], draws[:, 1]))
    return 100 * float(sums[:, 0].sum() / max(1.0, sums[:, 1].sum())), low, high


def table(heard: Sequence[Heard], reductions: Sequence[str], by: str) -> Iterator[str]:
    """Markdown: a row for each value of the field `by`, and one for all; a column a reduction."""
    yield f"| {by} | " + " | ".join(reductions) + " |"
    yield "|---" * (len(reductions) + 1) + "|"
    groups = {str(getattr(one, by)): None for one in heard}
    for group in [*groups, "all"]:
        own = [one for one in heard if group in ("all", str(getattr(one, by)))]
        cells = []
        for reduction in reductions:
            cell = f"{percent(own, reduction):.1f} %"
            if reduction != AS_IT_IS:
                cell += " ({:+.1f}; {:+.1f} to {:+.1f})".format(*difference(own, reduction))
            cells.append(cell)
        yield f"| {group} | " + " | ".join(cells) + " |"


def kept_in(file: Path | None) -> dict[str, Heard]:
    if file is None or not file.is_file():
        return {}
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    return {row["key"]: Heard(**row["heard"]) for row in rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--everyday", metavar="PT", help="a Whisper that knows all of English")
    parser.add_argument(
        "--recordings", type=Path, help="people: sound files, and .txt of the words"
    )
    parser.add_argument("--each", type=int, default=20, help="the tiny one's sentences")
    parser.add_argument("--reductions", nargs="*", default=list(REDUCTIONS), metavar="NAME")
    parser.add_argument("--keep", type=Path, help="what was heard, to go on where it was stopped")
    options = parser.parse_args()
    kept = kept_in(options.keep)

    def keep(key: str, heard: Heard) -> None:
        if options.keep is not None:
            with options.keep.open("a") as file:
                print(json.dumps({"key": key, "heard": asdict(heard)}), file=file)

    speech = Speech.load(options.everyday or ROOT / default_config("tiny").speech)
    found = passages(bool(options.everyday), options.each, options.recordings)
    chosen = listen(speech, found, options.reductions, CHOOSING_LEVELS, True, kept, keep)
    print("words wrong (less those as it is; 95 % of the bootstrap), the half that chooses")
    others = [name for name in options.reductions if name != AS_IT_IS]
    for name in options.reductions:
        figures = (
            ""
            if name == AS_IT_IS
            else " ({:+.1f}; {:+.1f} to {:+.1f})".format(*difference(chosen, name))
        )
        print(f"{name}: {percent(chosen, name):.1f} %{figures}")
    best = min(others, key=lambda name: percent(chosen, name))
    reported = listen(speech, found, [AS_IT_IS, best], REPORTED_LEVELS, False, kept, keep)
    print(f"\nthe other half, {best}")
    for by in ("kind", "decibels", "passage"):
        print("\n" + "\n".join(table(reported, [AS_IT_IS, best], by)))


if __name__ == "__main__":
    run_main(main)
