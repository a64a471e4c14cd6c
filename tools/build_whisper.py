"""Make the tiny preset's Whisper from nothing: synthesised speech, training, measurement.

    python tools/build_tiny.py --only whisper        # needs the program espeak-ng
    python tools/build_whisper.py --measure          # word errors of what is in assets/tiny

It hears the English questions of the picture world and single words of it, in espeak-ng's voices,
and nothing else. Sentences and voices of the measurement are in no training utterance.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from errors import PhiSightError, run_main
from speech.recordings import SAMPLE_RATE
from speech.whisper import Speech
from tools.tiny.listener import DIMENSIONS, Listener, Vocabulary, log_mels, save
from tools.tiny.utterances import (
    SEED,
    Recordings,
    disturb,
    measured_utterances,
    no_speech,
    say,
    training_utterances,
)

ROOT = Path(__file__).resolve().parent.parent

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


def lessons(
    recordings: Recordings, steps: int, batch: int
) -> Iterator[tuple[list[np.ndarray], list[str], np.random.Generator, float]]:
    """For each step its sounds, their texts, its random numbers, and how often it disturbs.

    Clear speech comes first and noise comes slowly: with noise from the start, a thousand steps
    taught less of the sounds than two hundred without.
    """
    epoch = 0
    plan: list[list[int]] = []
    for step in range(steps):
        if not plan:
            plan, epoch = batches(recordings, epoch, batch), epoch + 1
        rng = np.random.default_rng([SEED, step])
        often = min(1.0, max(0.0, 4 * step / steps - 0.4))
        yield *lesson(recordings, plan.pop(), rng, often), rng, often


def learn(
    listener: Listener,
    optimizer: torch.optim.Optimizer,
    mels: Tensor,
    silence: Tensor,
    texts: list[str],
) -> np.ndarray:
    """One optimiser step; (text loss, spelling loss) before it."""
    with torch.autocast("cpu", torch.bfloat16):
        text_loss, spelling_loss = listener(mels, silence, texts)
    optimizer.zero_grad()
    (text_loss + spelling_loss).backward()
    torch.nn.utils.clip_grad_norm_(listener.parameters(), 1.0)
    optimizer.step()
    return np.array([text_loss.item(), spelling_loss.item()])


def build(
    out: Path,
    cache: Path,
    steps: int = 2800,
    utterances: int = 14_000,
    batch: int = 32,
    learning_rate: float = 2e-3,
) -> None:
    """Train and write `tiny.pt`; it is written every 250 steps, so a cut run leaves one too."""
    from whisper.audio import mel_filters

    torch.manual_seed(SEED)
    out.mkdir(parents=True, exist_ok=True)
    recordings = Recordings(cache, training_utterances(utterances))
    listener = Listener(Vocabulary([u.text for u in recordings.utterances])).train()
    optimizer = torch.optim.AdamW(
        listener.parameters(), lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.01
    )
    filters = mel_filters("cpu", DIMENSIONS["n_mels"])
    started = time.time()
    running = np.zeros(2)
    bar = tqdm(lessons(recordings, steps, batch), total=steps, desc="whisper", mininterval=10)
    for step, (sounds, texts, rng, often) in enumerate(bar):
        for group in optimizer.param_groups:
            cosine = 0.5 * (1 + math.cos(math.pi * (step / steps)))
            group["lr"] = learning_rate * min(1, (step + 1) / 100) * cosine
        mels, silence = log_mels(sounds, filters)
        now = learn(listener, optimizer, mask_bands(mels, rng, often), silence, texts)
        running = 0.98 * running + 0.02 * now if step else now
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
    (out / "build_report.json").write_text(
        json.dumps(facts, indent=1), encoding="utf-8", newline="\n"
    )
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


def errors_of(listener: Speech, sound: np.ndarray, said: str) -> tuple[int, int, str]:
    """(words wrong, words said, text heard), after whisper's own normalising of both texts."""
    normalise = normaliser()
    heard = " ".join(s.text for s in listener.transcribe(sound))
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
    parser.add_argument("--each", type=int, default=300, help="utterances a measured group")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.measure:
        if not (options.out / "tiny.pt").is_file():
            raise PhiSightError(f"{options.out}/tiny.pt: no such file; build it first")
        print(json.dumps(measure(options.out / "tiny.pt", options.each), indent=1))
        return
    build(options.out, options.cache, options.steps, options.utterances, options.batch, options.lr)


if __name__ == "__main__":
    run_main(main)
