"""What the tiny preset's Whisper is taught and measured with: spoken sentences and disturbances.

Sentences and voices of the measurement are in no training utterance.
"""

from __future__ import annotations

import functools
import json
import random
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import soxr
from tqdm import tqdm

from data import world
from speech.recordings import SAMPLE_RATE
from speech.voice import espeak

SEED = 20260101

ACCENTS = (
    "en-gb",
    "en-us",
    "en-gb-scotland",
    "en-gb-x-gbclan",
    "en-gb-x-gbcwmd",
    "en-029",
    "en-us-nyc",
)
VARIANTS = (
    "",
    "f1",
    "f3",
    "f4",
    "m1",
    "m2",
    "m3",
    "m6",
    "m7",
    "m8",
    "Alex",
    "Alicia",
    "Andy",
    "Annie",
    "Gene",
    "Jacky",
    "Lee",
    "Mario",
    "Mike",
    "Storm",
    "adam",
    "aunty",
    "belinda",
    "benjamin",
    "caleb",
    "david",
    "ed",
    "edward",
    "grandma",
    "grandpa",
    "john",
    "klatt2",
    "klatt4",
    "linda",
    "max",
    "michel",
    "miguel",
    "norbert",
    "paul",
    "quincy",
    "robert",
    "steph",
    "steph3",
    "travis",
    "victor",
    "zac",
)
HELD_OUT_ACCENTS = ("en-gb-x-rp",)
HELD_OUT_VARIANTS = ("f2", "f5", "m4", "m5", "Andrea", "Michael", "rob", "steph2")


# -- what is said ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Utterance:
    """What is said and how: an espeak-ng voice, words a minute, pitch from 0 to 99."""

    text: str
    voice: str
    rate: int
    pitch: int


def questions() -> list[str]:
    """Every question that the picture world asks, found by asking it about many scenes."""
    asked = set()
    for index in range(3000):
        rng = random.Random(f"{SEED}/whisper/{index}")
        scene = world.make_scene(rng, "all")
        exchanges = [world.ask(scene, kind, rng) for kind in (*world.KINDS, world.TWO_STEP)]
        asked |= {e[1] for e in [*exchanges, world.detail(scene, rng)] if e is not None}
    return sorted(asked)


def short_questions() -> list[str]:
    """The words that an answer hangs on, asked alone or nearly so."""
    words = [*world.COLOURS, *world.SIZES, *world.NUMBERS, *world.SHAPES, "yes", "no"]
    words += [place for row in world.PLACES for place in row]
    asked = [f"{word.capitalize()}?" for word in words]
    asked += [f"Is it {word}?" for word in (*world.COLOURS, *world.SIZES)]
    for shape in world.SHAPES:
        asked += [f"Is it a {shape}?", f"How many {world.PLURALS[shape]}?"]
    asked += [f"Are there {number} objects?" for number in world.NUMBERS[2:]]
    return asked


@functools.cache
def held_out_sentences() -> tuple[list[str], list[str]]:
    """(training, held out): a sixth of the questions, none of which has a word of its own."""
    everything = questions() + short_questions()
    random.Random(f"{SEED}/held-out").shuffle(everything)
    uses: dict[str, int] = defaultdict(int)
    for text in everything:
        for word in words_of(text):
            uses[word] += 1
    training: list[str] = []
    held_out: list[str] = []
    for text in everything:
        own = words_of(text)
        spare = len(own) > 1 and all(uses[word] > 3 for word in own)
        if spare and len(held_out) < len(everything) // 6:
            held_out.append(text)
            for word in own:
                uses[word] -= 1
        else:
            training.append(text)
    return training, held_out


def words_of(text: str) -> list[str]:
    return "".join(c if c.isalpha() else " " for c in text.lower()).split()


def composed(rng: random.Random, vocabulary: list[str]) -> str:
    """A sentence that the world never asks, so that listening pays and guessing does not: things
    with all attributes, relations between them, or words in any order."""

    def thing() -> str:
        words = [rng.choice(list(world.COLOURS)), rng.choice(world.SHAPES)]
        return " ".join(([rng.choice(list(world.SIZES))] if rng.random() < 0.5 else []) + words)

    where = rng.choice([place for row in world.PLACES for place in row])
    draw = rng.random()
    if draw < 0.15:
        return (
            f"Is the {thing()} {rng.choice(('left of', 'right of', 'above', 'below'))} the "
            f"{thing()}?"
        )
    if draw < 0.25:
        return f"Is there {world.with_article(thing())} in the {where}?"
    if draw < 0.32:
        return f"{world.with_article(thing()).capitalize()} in the {where}."
    if draw < 0.4:
        return f"What {rng.choice(('colour', 'shape', 'size'))} is the {thing()}?"
    words = rng.choices(vocabulary, k=rng.randint(2, 8))
    return " ".join(words).capitalize() + rng.choice(".?")


def draw_voice(rng: random.Random, accents: tuple[str, ...], variants: tuple[str, ...]) -> str:
    variant = rng.choice(variants)
    return rng.choice(accents) + (f"+{variant}" if variant else "")


def training_utterances(count: int) -> list[Utterance]:
    training, held_out = held_out_sentences()
    forbidden = {tuple(words_of(text)) for text in held_out}
    vocabulary = sorted({word for text in training for word in words_of(text)})
    utterances: list[Utterance] = []
    rng = random.Random(f"{SEED}/utterances")
    while len(utterances) < count:
        text = rng.choice(training) if rng.random() < 0.6 else composed(rng, vocabulary)
        if tuple(words_of(text)) not in forbidden:
            voice = draw_voice(rng, ACCENTS, VARIANTS)
            utterances.append(Utterance(text, voice, rng.randint(115, 225), rng.randint(15, 85)))
    return utterances


def measured_utterances(each: int) -> dict[str, list[Utterance]]:
    """Groups of `each` utterances. The first is the one that the bar is about."""
    training, held_out = held_out_sentences()
    unheard_voices = (ACCENTS + HELD_OUT_ACCENTS, HELD_OUT_VARIANTS)
    groups = {
        "held-out sentences, held-out voices": (held_out, *unheard_voices),
        "held-out sentences, held-out accent": (
            held_out,
            HELD_OUT_ACCENTS,
            VARIANTS + HELD_OUT_VARIANTS,
        ),
        "held-out sentences, known voices": (held_out, ACCENTS, VARIANTS),
        "known sentences, held-out voices": (training, *unheard_voices),
        "colours, numbers, shapes alone, held-out voices": (short_questions(), *unheard_voices),
    }
    measured = {}
    for name, (texts, accents, variants) in groups.items():
        rng = random.Random(f"{SEED}/measured/{name}")
        measured[name] = [
            Utterance(
                texts[i % len(texts)],
                draw_voice(rng, accents, variants),
                rng.randint(120, 220),
                rng.randint(20, 80),
            )
            for i in range(each)
        ]
    return measured


# -- speech ---------------------------------------------------------------------------------------


def say(utterance: Utterance) -> np.ndarray:
    """(samples,) float32, 16 kHz."""
    samples, rate = espeak(utterance.text, utterance.voice, utterance.rate, utterance.pitch)
    return soxr.resample(samples, rate, SAMPLE_RATE)


class Recordings:
    """Utterances spoken once and kept in one file of int16."""

    def __init__(self, folder: Path, utterances: list[Utterance]) -> None:
        self.utterances = utterances
        wanted = [asdict(u) for u in utterances]
        index, sound = folder / "utterances.json", folder / "speech.int16"
        if (
            not index.exists()
            or json.loads(index.read_text(encoding="utf-8"))["utterances"] != wanted
        ):
            folder.mkdir(parents=True, exist_ok=True)
            index.unlink(missing_ok=True)
            ends, end = [], 0
            with open(sound, "wb") as file, ThreadPoolExecutor(2) as pool:
                spoken = pool.map(say, utterances)
                for samples in tqdm(spoken, total=len(utterances), desc="speaking", mininterval=10):
                    pcm = (np.clip(samples, -1, 1) * 32767).astype(np.int16)
                    file.write(pcm.tobytes())
                    end += len(pcm)
                    ends.append(end)
            index.write_text(
                json.dumps({"utterances": wanted, "ends": ends}), encoding="utf-8", newline="\n"
            )
        self.ends = json.loads(index.read_text(encoding="utf-8"))["ends"]
        self.samples = np.memmap(sound, np.int16, "r")

    def __getitem__(self, index: int) -> np.ndarray:
        start = self.ends[index - 1] if index else 0
        return self.samples[start : self.ends[index]].astype(np.float32) / 32768

    def seconds(self, index: int) -> float:
        return (self.ends[index] - (self.ends[index - 1] if index else 0)) / SAMPLE_RATE


def fast_length(samples: int) -> int:
    """The next length whose Fourier transform is quick: a multiple of 4096."""
    return -(-samples // 4096) * 4096


def coloured_noise(rng: np.random.Generator, samples: int) -> np.ndarray:
    """Unit-power noise whose spectrum falls by 0 to 2 powers of the frequency (white to brown)."""
    spectrum = np.fft.rfft(rng.standard_normal(fast_length(samples)))
    frequency = np.maximum(np.arange(len(spectrum)), 1 + len(spectrum) // 200)
    noise = np.fft.irfft(spectrum / frequency ** rng.uniform(0, 1))[:samples]
    return (noise / (noise.std() + 1e-9)).astype(np.float32)


def disturb(speech: np.ndarray, rng: np.random.Generator, often: float) -> np.ndarray:
    """Silence around it, another loudness, and as often as `often` (0 to 1) says a narrower band
    and noise over it."""
    before, after = (int(rng.uniform(0, 0.6) * SAMPLE_RATE) for _ in range(2))
    sound = np.pad(speech, (before, after))
    if rng.random() < 0.25 * often:  # as through a telephone or a cheap microphone
        length = fast_length(len(sound))
        spectrum = np.fft.rfft(sound, length)
        hertz = np.fft.rfftfreq(length, 1 / SAMPLE_RATE)
        low, high = rng.uniform(30, 250), rng.uniform(3300, 7500)
        spectrum *= 1 / (1 + (hertz / high) ** 8) / (1 + (low / np.maximum(hertz, 1)) ** 4)
        sound = np.fft.irfft(spectrum)[: len(sound)].astype(np.float32)
    if rng.random() < 0.7 * often:
        level = np.sqrt(np.mean(speech**2)) * 10 ** (-rng.uniform(3, 45) / 20)
        sound = sound + level * coloured_noise(rng, len(sound))
    return sound * np.float32(10 ** rng.uniform(-1.6, 0.1) / (np.abs(sound).max() + 1e-6))


def no_speech(rng: np.random.Generator) -> np.ndarray:
    """Noise, hum, clicks or nearly nothing: what must not be heard as words."""
    samples = int(rng.uniform(0.3, 4.0) * SAMPLE_RATE)
    kind = rng.integers(4)
    sound = coloured_noise(rng, samples) * 0.3
    if kind == 1:
        times = np.arange(samples) / SAMPLE_RATE
        sound = sound * 0.02 + np.sin(2 * np.pi * rng.uniform(40, 2000) * times)
    elif kind == 2:
        sound = sound * 0.01
        for at in rng.integers(0, samples, rng.integers(1, 8)):
            sound[at : at + rng.integers(1, 300)] += rng.uniform(-1, 1)
    level = 10 ** rng.uniform(-4 if kind == 3 else -1.6, 0)
    return (sound * level / (np.abs(sound).max() + 1e-9)).astype(np.float32)
