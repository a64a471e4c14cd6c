"""Make the tiny preset's Whisper from nothing: synthesised speech, training, measurement.

    python tools/build_tiny.py --only whisper        # needs the program espeak-ng
    python tools/build_whisper.py --measure          # word errors of what is in assets/tiny

It hears the English questions of the picture world and single words of it, in espeak-ng's voices,
and nothing else. Sentences and voices of the measurement are in no training utterance.
"""

from __future__ import annotations

import argparse
import functools
import io
import json
import math
import random
import sys
import time
import zipfile
from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import soxr
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from data import world  # noqa: E402
from errors import PhiSightError, run_main  # noqa: E402
from speech.voice import espeak  # noqa: E402
from speech.whisper import Speech  # noqa: E402
from tools.padding import pad_batch  # noqa: E402

SEED = 20260101
SAMPLE_RATE = 16000
HOP = 160  # samples of a mel frame
DIMENSIONS = {
    "n_mels": 80,
    "n_audio_ctx": 1500,
    "n_audio_state": 128,
    "n_audio_head": 4,
    "n_audio_layer": 4,
    "n_vocab": 51864,  # English only: no language tokens
    "n_text_ctx": 96,  # half of it may be answer: the longest question has 14 tokens
    "n_text_state": 128,
    "n_text_head": 4,
    "n_text_layer": 2,
}

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
    training, held_out = [], []
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
    utterances = []
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
        if not index.exists() or json.loads(index.read_text())["utterances"] != wanted:
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
            index.write_text(json.dumps({"utterances": wanted, "ends": ends}))
        self.ends = json.loads(index.read_text())["ends"]
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


# -- batches --------------------------------------------------------------------------------------


class Vocabulary:
    """The tokens that are ever said, of the 51,864 of Whisper's English tokenizer."""

    def __init__(self, texts: list[str]) -> None:
        from whisper.tokenizer import get_tokenizer

        self.tokenizer = get_tokenizer(multilingual=False)
        special = self.tokenizer
        self.start, self.plain = special.sot, special.no_timestamps
        self.end, self.none = special.eot, special.no_speech
        said = {token for text in texts for token in self.encode(text)}
        self.used = sorted(said | {self.start, self.plain, self.end, self.none})
        self.place = {token: place for place, token in enumerate(self.used)}

    def encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(" " + text)

    def rows(self, texts: list[str]) -> tuple[Tensor, Tensor]:
        """(rows, length) inputs and targets as places in `used`; -1 is not a target. The text ""
        is no speech: the first target says so, and the text that follows is empty."""
        rows = []
        for text in texts:
            tokens = [self.start, self.plain, *(self.encode(text) if text else []), self.end]
            targets = [self.plain if text else self.none, *tokens[2:]]
            rows.append(([self.place[t] for t in tokens[:-1]], [self.place[t] for t in targets]))
        return pad_batch(rows)


def log_mels(sounds: list[np.ndarray], filters: Tensor) -> tuple[Tensor, Tensor]:
    """Whisper's log-mel spectrogram of a batch: (rows, 80, frames), and (rows,) the value of the
    silence with which it goes on. The frames end at least 12 after the longest sound."""
    samples = max(map(len, sounds)) + 12 * HOP
    samples = (samples // (20 * HOP) + 1) * 20 * HOP
    padded = torch.zeros(len(sounds), samples)
    for row, sound in enumerate(sounds):
        padded[row, : len(sound)] = torch.from_numpy(sound)
    spectrum = torch.stft(padded, 400, HOP, window=torch.hann_window(400), return_complex=True)
    power = torch.view_as_real(spectrum[..., :-1]).square().sum(-1)
    mels = torch.clamp(filters @ power, min=1e-10).log10()
    loudest = mels.amax((1, 2), keepdim=True)
    mels = (torch.maximum(mels, loudest - 8.0) + 4.0) / 4.0
    silence = (torch.clamp(loudest - 8.0, min=-10.0) + 4.0) / 4.0
    return mels, silence[:, 0, 0]


CHARACTERS = " abcdefghijklmnopqrstuvwxyz"


def spelled(texts: list[str]) -> tuple[Tensor, Tensor]:
    """(rows, length) letters, 0 is the blank and 1 the space; (rows,) their numbers."""
    rows = [
        torch.tensor([CHARACTERS.index(c) + 1 for c in " ".join(words_of(text))]) for text in texts
    ]
    lengths = torch.tensor([len(row) for row in rows])
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True), lengths


# -- the model in training ------------------------------------------------------------------------


class Listener(torch.nn.Module):
    """Whisper's own modules, with a forward pass that leaves out what a short sound never uses.

    Two things make it cheap and change nothing of what is computed, but for sampling. After the
    sound come up to 28 seconds of silence whose places all hold the same value plus their position:
    a few of them, drawn anew for each batch, stand for all, and attention counts each as many
    times as it stands for. And of the 51,864 tokens only those ever said have a row of their own;
    all others share one, so one logit stands for theirs.
    """

    def __init__(self, vocabulary: Vocabulary) -> None:
        from whisper.model import ModelDimensions, Whisper

        super().__init__()
        self.vocabulary = vocabulary
        self.whisper = Whisper(ModelDimensions(**DIMENSIONS))
        state = DIMENSIONS["n_text_state"]
        del self.whisper.decoder.token_embedding  # comes back, composed, in `state`
        self.rows = torch.nn.Parameter(torch.randn(len(vocabulary.used), state) * 0.05)
        self.other = torch.nn.Parameter(torch.zeros(state))
        self.letters = torch.nn.Linear(state, len(CHARACTERS) + 1)  # for training only
        torch.nn.init.normal_(self.whisper.decoder.positional_embedding, std=0.02)
        with torch.no_grad():  # else the positions, which never change, drown what is heard
            self.whisper.encoder.conv1.weight *= 3
            self.whisper.encoder.conv2.weight *= 3

    def state(self) -> dict[str, Tensor]:
        """The state dictionary of a plain Whisper."""
        table = self.other.detach().repeat(DIMENSIONS["n_vocab"], 1)
        table[self.vocabulary.used] = self.rows.detach()
        return {**self.whisper.state_dict(), "decoder.token_embedding.weight": table}

    def encode(self, mels: Tensor, silence: Tensor, stand_ins: int = 32) -> tuple[Tensor, Tensor]:
        """(rows, places, state) and (places,) log of how many places each stands for."""
        encoder = self.whisper.encoder
        positions = encoder.positional_embedding
        x = self._convolve(mels)  # (rows, frames / 2, state)
        heard = x.shape[1]
        tail = self._convolve(silence[:, None, None].expand(-1, 80, 12))[:, 3:4]
        stand_ins = min(stand_ins, len(positions) - heard)
        chosen = heard + torch.randperm(len(positions) - heard)[:stand_ins]
        x = torch.cat([x + positions[:heard], tail + positions[chosen]], 1)
        weight = torch.zeros(x.shape[1])
        weight[heard:] = math.log((len(positions) - heard) / stand_ins)
        for block in encoder.blocks:
            x = x + attend(block.attn, block.attn_ln(x), None, weight)
            x = x + block.mlp(block.mlp_ln(x))
        return encoder.ln_post(x), weight

    def _convolve(self, mels: Tensor) -> Tensor:
        encoder = self.whisper.encoder
        return F.gelu(encoder.conv2(F.gelu(encoder.conv1(mels)))).transpose(1, 2)

    def decode(self, tokens: Tensor, heard: Tensor, weight: Tensor) -> Tensor:
        """(rows, length) places in the vocabulary -> (rows, length, used + 1) logits; the last
        stands for all tokens that are never said."""
        decoder = self.whisper.decoder
        x = F.embedding(tokens, self.rows) + decoder.positional_embedding[: tokens.shape[1]]
        for block in decoder.blocks:
            x = x + attend(block.attn, block.attn_ln(x), None, None, causal=True)
            x = x + attend(block.cross_attn, block.cross_attn_ln(x), heard, weight)
            x = x + block.mlp(block.mlp_ln(x))
        x = decoder.ln(x)
        logits = (x @ torch.cat([self.rows, self.other[None]]).T).float()
        others = math.log(DIMENSIONS["n_vocab"] - len(self.rows))
        return torch.cat([logits[..., :-1], logits[..., -1:] + others], -1)

    def forward(self, mels: Tensor, silence: Tensor, texts: list[str]) -> tuple[Tensor, Tensor]:
        """(text loss, spelling loss): cross-entropy a token, and CTC (Graves et al. 2006) a letter
        over the encoder's output, which teaches it at once where each sound is."""
        heard, weight = self.encode(mels, silence)
        inputs, targets = self.vocabulary.rows(texts)
        logits = self.decode(inputs, heard, weight)
        text_loss = F.cross_entropy(
            logits[targets >= 0], targets[targets >= 0], label_smoothing=0.02
        )
        frames = mels.shape[2] // 2
        letters = self.letters(heard[:, :frames]).float().log_softmax(-1)
        wanted, lengths = spelled(texts)
        spelling_loss = F.ctc_loss(
            letters.transpose(0, 1),
            wanted,
            torch.full((len(texts),), frames),
            lengths,
            zero_infinity=True,
            reduction="sum",
        ) / lengths.sum().clamp(min=1)
        return text_loss, spelling_loss


def attend(
    attention: torch.nn.Module,
    x: Tensor,
    memory: Tensor | None,
    weight: Tensor | None,
    causal: bool = False,
) -> Tensor:
    """Whisper's attention; `weight` (keys,) is added to the scores of each key."""
    source = x if memory is None else memory

    def heads(y: Tensor) -> Tensor:
        return y.unflatten(2, (attention.n_head, -1)).transpose(1, 2)

    # Written out: torch's fused attention takes eight times as long backwards on a CPU.
    query = heads(attention.query(x))
    scores = query @ heads(attention.key(source)).transpose(2, 3) * query.shape[3] ** -0.5
    if weight is not None:
        scores = scores + weight.to(scores.dtype)
    if causal:
        later = torch.ones(scores.shape[2:], dtype=torch.bool).triu(1)
        scores = scores.masked_fill(later, float("-inf"))
    out = scores.softmax(-1).to(query.dtype) @ heads(attention.value(source))
    return attention.out(out.transpose(1, 2).flatten(2))


def save(listener: Listener, path: Path) -> None:
    """In Whisper's own layout, float16. The rows of never-said tokens are all alike, so the zip
    that a `.pt` is gets compressed: 3 MB instead of 17. `torch.load` reads either."""
    state = {
        name: t.detach().half() if t.is_floating_point() else t
        for name, t in listener.state().items()
    }
    plain = io.BytesIO()
    torch.save({"dims": DIMENSIONS, "model_state_dict": state}, plain)
    partial = path.with_suffix(".partial")
    with zipfile.ZipFile(plain) as source, zipfile.ZipFile(partial, "w") as target:
        for entry in source.infolist():
            dated = zipfile.ZipInfo(entry.filename, (1980, 1, 1, 0, 0, 0))
            target.writestr(dated, source.read(entry), zipfile.ZIP_DEFLATED, 9)
    partial.replace(path)


# -- training -------------------------------------------------------------------------------------


def batches(recordings: Recordings, epoch: int, batch: int) -> list[list[int]]:
    """One epoch's rows, alike in length within a batch."""
    rng = random.Random(f"{SEED}/epoch/{epoch}")
    order = list(range(len(recordings.utterances)))
    rng.shuffle(order)
    made = []
    for start in range(0, len(order), 20 * batch):
        near = sorted(order[start : start + 20 * batch], key=recordings.seconds)
        made += [near[i : i + batch] for i in range(0, len(near), batch)]
    rng.shuffle(made)
    return made


def lesson(
    recordings: Recordings, chosen: list[int], rng: np.random.Generator, often: float
) -> tuple[list[np.ndarray], list[str]]:
    """Disturbed sounds and their texts, one in seventeen without speech; at times by twos, so that
    a second sentence is heard as well."""
    speech = [recordings[i] for i in chosen]
    texts = [recordings.utterances[i].text for i in chosen]
    if len(chosen) > 1 and rng.random() < 0.2 * often:
        pause = np.zeros(int(rng.uniform(0.1, 0.8) * SAMPLE_RATE), np.float32)
        firsts = range(0, len(chosen) - 1, 2)
        speech = [np.concatenate([speech[i], pause, speech[i + 1]]) for i in firsts]
        texts = [f"{texts[i]} {texts[i + 1]}" for i in firsts]
    sounds = [disturb(sound, rng, often) for sound in speech]
    for _ in range(max(1, len(chosen) // 16)):
        sounds.append(no_speech(rng))
        texts.append("")
    return sounds, texts


def build(
    out: Path,
    cache: Path,
    steps: int = 2800,
    utterances: int = 14_000,
    batch: int = 32,
    learning_rate: float = 2e-3,
) -> None:
    """Train and write `tiny.pt`; it is written every 250 steps, so a cut run leaves one too.

    Clear speech comes first and noise comes slowly: with noise from the start, a thousand steps
    taught less of the sounds than two hundred without.
    """
    from whisper.audio import mel_filters

    torch.manual_seed(SEED)
    out.mkdir(parents=True, exist_ok=True)
    recordings = Recordings(cache, training_utterances(utterances))
    vocabulary = Vocabulary([u.text for u in recordings.utterances])
    listener = Listener(vocabulary).train()
    optimizer = torch.optim.AdamW(
        listener.parameters(), lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.01
    )
    filters = mel_filters("cpu", DIMENSIONS["n_mels"])
    started, running, epoch, plan = time.time(), None, 0, []
    bar = tqdm(range(steps), desc="whisper", mininterval=10)
    for step in bar:
        if not plan:
            plan, epoch = batches(recordings, epoch, batch), epoch + 1
        rng = np.random.default_rng([SEED, step])
        chosen = plan.pop()
        often = min(1.0, max(0.0, 4 * step / steps - 0.4))
        sounds, texts = lesson(recordings, chosen, rng, often)
        for group in optimizer.param_groups:
            done = step / steps
            group["lr"] = (
                learning_rate * min(1, (step + 1) / 100) * 0.5 * (1 + math.cos(math.pi * done))
            )
        mels, silence = log_mels(sounds, filters)
        mels = mask_bands(mels, rng, often)
        with torch.autocast("cpu", torch.bfloat16):
            text_loss, spelling_loss = listener(mels, silence, texts)
        optimizer.zero_grad()
        (text_loss + spelling_loss).backward()
        torch.nn.utils.clip_grad_norm_(listener.parameters(), 1.0)
        optimizer.step()
        now = np.array([text_loss.item(), spelling_loss.item()])
        running = now if running is None else 0.98 * running + 0.02 * now
        bar.set_postfix(text=f"{running[0]:.3f}", spelling=f"{running[1]:.3f}", refresh=False)
        if (step + 1) % 250 == 0 or step + 1 == steps:
            save(listener, out / "tiny.pt")
            print(
                f"\nstep {step + 1}: text {running[0]:.4f}, spelling {running[1]:.4f},"
                f" {time.time() - started:.0f} s",
                flush=True,
            )
    facts = {
        "steps": steps,
        "batch": batch,
        "utterances": utterances,
        "parameters_without_vocabulary": sum(p.numel() for p in listener.whisper.parameters()),
        "text_loss": round(float(running[0]), 4),
        "seconds": round(time.time() - started),
        "seed": SEED,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "word_errors_percent": measure(out / "tiny.pt", 300),
    }
    (out / "build_report.json").write_text(json.dumps(facts, indent=1))
    print(json.dumps(facts))


def mask_bands(mels: Tensor, rng: np.random.Generator, often: float) -> Tensor:
    """Blank up to ten mel bands of up to half the rows (SpecAugment, arXiv 1904.08779)."""
    mels = mels.clone()
    for row in range(len(mels)):
        if rng.random() < 0.5 * often:
            width, low = int(rng.integers(1, 11)), int(rng.integers(0, 70))
            mels[row, low : low + width] = mels[row].min()
    return mels


# -- measurement ----------------------------------------------------------------------------------


def word_errors(heard: list[str], said: list[str]) -> int:
    """Words to insert, delete or replace: the edit distance."""
    row = list(range(len(said) + 1))
    for i, word in enumerate(heard, 1):
        former, row = row, [i]
        for j, wanted in enumerate(said, 1):
            row.append(min(former[j] + 1, row[-1] + 1, former[j - 1] + (word != wanted)))
    return row[-1]


@functools.cache
def normaliser() -> Callable[[str], str]:
    from whisper.normalizers import EnglishTextNormalizer

    return EnglishTextNormalizer()


def errors_of(
    listener: Speech, sound: np.ndarray, said: str, reduce_noise: bool = False
) -> tuple[int, int, str]:
    """(words wrong, words said, text heard), after whisper's own normalising of both texts."""
    normalise = normaliser()
    heard = " ".join(s.text for s in listener.transcribe(sound, denoise=reduce_noise))
    wanted = normalise(said).split()
    return word_errors(normalise(heard).split(), wanted), len(wanted), heard


def measure(path: Path, each: int) -> dict[str, float]:
    """Percent of words wrong by group, through `Speech` as the app hears. Mistakes are printed."""
    listener = Speech.load(path)
    rates = {}
    for name, utterances in measured_utterances(each).items():
        errors = words = 0
        for utterance in tqdm(utterances, desc=name, mininterval=10):
            wrong, said, heard = errors_of(listener, say(utterance), utterance.text)
            errors, words = errors + wrong, words + said
            if wrong:
                tqdm.write(f"{utterance.voice}: {utterance.text!r} heard as {heard!r}")
        rates[name] = round(100 * errors / words, 2)
    return rates


def measure_noise(path: Path, each: int) -> dict[str, dict[str, float]]:
    """Percent of words wrong at four levels of noise, as it is and reduced. The noise, white to
    brown, is there for half a second before and after the words too."""
    listener = Speech.load(path)
    group = measured_utterances(each)["held-out sentences, held-out voices"]
    rates: dict[str, dict[str, float]] = {}
    for level in (None, 20, 10, 5):
        errors, words = {"as it is": 0, "noise reduced": 0}, 0
        rng = np.random.default_rng(SEED)
        for utterance in tqdm(group, desc=f"noise {level}", mininterval=10):
            sound = np.pad(say(utterance), SAMPLE_RATE // 2)
            if level is not None:
                power = np.sqrt(np.mean(sound[SAMPLE_RATE // 2 : -SAMPLE_RATE // 2] ** 2))
                sound += power * np.float32(10 ** (-level / 20)) * coloured_noise(rng, len(sound))
            for how, reduced in (("as it is", False), ("noise reduced", True)):
                wrong, said, _ = errors_of(listener, sound, utterance.text, reduced)
                errors[how] += wrong
            words += said
        name = "no noise" if level is None else f"{level} dB"
        rates[name] = {how: round(100 * count / words, 1) for how, count in errors.items()}
    return rates


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "assets" / "tiny" / "whisper")
    parser.add_argument("--cache", type=Path, default=ROOT / "cache" / "speech")
    parser.add_argument("--utterances", type=int, default=14000)
    parser.add_argument("--steps", type=int, default=2800)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--measure", action="store_true", help="measure tiny.pt, train nothing")
    parser.add_argument("--measure-noise", action="store_true", help="with and without reduction")
    parser.add_argument("--each", type=int, default=300, help="utterances a measured group")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.measure or options.measure_noise:
        if not (options.out / "tiny.pt").is_file():
            raise PhiSightError(f"{options.out}/tiny.pt: no such file; build it first")
    if options.measure:
        print(json.dumps(measure(options.out / "tiny.pt", options.each), indent=1))
        return
    if options.measure_noise:
        print(json.dumps(measure_noise(options.out / "tiny.pt", options.each), indent=1))
        return
    build(options.out, options.cache, options.steps, options.utterances, options.batch, options.lr)


if __name__ == "__main__":
    run_main(main)
