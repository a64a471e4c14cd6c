"""Training and saving: the loop of train.py, and a plain PyTorch loop over transformers and PEFT.

Both see the samples of the same steps of the tiny preset: ours in packed rows, the plain loop in
rows of one sample, padded to the longest. A turn is `STEPS` steps that count, with a save after
every `SAVE_EVERY` of them.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

import train
from benchmarks.peft_trainer import Samples, padding_collator, peft_model
from benchmarks.processes import Turn
from benchmarks.suite.material import Material
from benchmarks.vs_peft_trainer import prepared, samples_of_steps
from data.collate import IGNORED
from training.options import RunOptions
from training.run import Run
from training.saving import BackgroundSaver
from training.step import StepResult

WARM_UP, STEPS, SAVE_EVERY = 2, 6, 2


class Watched:
    """Clocks of the steps and saves of a loop of train.py."""

    def __init__(self) -> None:
        self.steps: list[float] = []
        """when each began"""
        self.results: list[StepResult] = []
        self.saves: list[float] = []
        """seconds that each held the loop"""

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """While a training runs in this process: between the beginnings of two steps lies all that
        the loop does."""
        own_step, own_save = train.train_step, train.save_checkpoint

        def step(*given: Any, **settings: Any) -> StepResult:
            self.steps.append(time.perf_counter())
            self.results.append(own_step(*given, **settings))
            return self.results[-1]

        def save(run: Run, saver: BackgroundSaver) -> None:
            started = time.perf_counter()
            own_save(run, saver)
            self.saves.append(time.perf_counter() - started)

        train.train_step, train.save_checkpoint = step, save
        try:
            yield
        finally:
            train.train_step, train.save_checkpoint = own_step, own_save


def ours(material: Material) -> Turn:
    def turn() -> dict[str, float]:
        watched = Watched()
        with tempfile.TemporaryDirectory() as name, watched.watching():
            config = material.config(
                Path(name) / "run", max_steps=WARM_UP + STEPS + 1, save_steps=SAVE_EVERY
            )
            train.train(config, None, RunOptions(overwrite=True))
        counted = slice(WARM_UP, WARM_UP + STEPS)
        seconds = watched.steps[WARM_UP + STEPS] - watched.steps[WARM_UP]
        saves = watched.saves[WARM_UP // SAVE_EVERY :][: STEPS // SAVE_EVERY]
        first = watched.results[0]
        return {
            "tokens_per_second": sum(r.tokens for r in watched.results[counted]) / seconds,
            "stall_seconds": sum(saves) / len(saves),
            "step_seconds": (seconds - sum(saves)) / STEPS,
            "first_loss": first.loss_sum / first.supervised_tokens,
        }

    return turn


class PlainLoop:
    """The loop as a user of PyTorch writes it: AdamW, clipping, a warm-up, and `torch.save`."""

    def __init__(self, run: Run) -> None:
        self.samples, self.collator = Samples(run), padding_collator(run)
        self.model = peft_model(run).train()
        self.trained = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        config = run.config
        self.max_norm, self.path = config.max_gradient_norm, Path(config.run) / "checkpoint.pt"
        self.optimizer = torch.optim.AdamW(
            self.trained.values(), lr=config.learning_rate, weight_decay=config.weight_decay
        )
        self.schedule = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, lambda step: min(1.0, (step + 1) / 100)
        )

    def step(self, micro_batches: Sequence[Sequence[int]]) -> tuple[float, int]:
        """One step over the samples of these numbers; its mean loss, and tokens."""
        self.optimizer.zero_grad()
        batches = [self.collator([self.samples[i] for i in micro]) for micro in micro_batches]
        supervised = sum((batch["labels"] != IGNORED).sum().item() for batch in batches)
        total = 0.0
        for batch in batches:
            loss = self.model(**batch, num_items_in_batch=supervised).loss
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(self.trained.values(), self.max_norm)
        self.optimizer.step()
        self.schedule.step()
        return total, sum(int(batch["attention_mask"].sum()) for batch in batches)

    def save(self, number: int) -> float:
        """A checkpoint that is on the disk when this returns, as ours is; seconds."""
        started, new = time.perf_counter(), self.path.with_suffix(".new")
        weights = {name: p.detach() for name, p in self.trained.items()}
        state = {"model": weights, "optimizer": self.optimizer.state_dict(), "step": number}
        with new.open("wb") as file:
            torch.save(state, file)
            os.fsync(file.fileno())
        new.replace(self.path)
        return time.perf_counter() - started


def plain(material: Material) -> Turn:
    folder = tempfile.TemporaryDirectory()  # until the process ends: `turn` holds it
    run = prepared(material.config(Path(folder.name) / "run", max_steps=WARM_UP + STEPS + 1))
    torch.use_deterministic_algorithms(False)  # as PyTorch runs unless told otherwise
    steps, loop = samples_of_steps(run, WARM_UP + STEPS), PlainLoop(run)
    first_loss: list[float] = []

    def turn(kept: tempfile.TemporaryDirectory = folder) -> dict[str, float]:
        saves, tokens, started = list[float](), 0, 0.0
        for number, micro_batches in enumerate(steps):
            if number == WARM_UP:
                saves, tokens, started = [], 0, time.perf_counter()
            loss, seen = loop.step(micro_batches)
            first_loss.append(loss)
            tokens += seen
            if (number + 1) % SAVE_EVERY == 0:
                saves.append(loop.save(number))
        seconds = time.perf_counter() - started
        return {
            "tokens_per_second": tokens / seconds,
            "stall_seconds": sum(saves) / len(saves),
            "step_seconds": (seconds - sum(saves)) / STEPS,
            "first_loss": first_loss[0],
        }

    return turn
