"""The measures: what each is, beside what, and how far a ratio may move by chance.

A band is three times the median absolute deviation of the ratios of repeated runs from their
median, as `--update --repeat 3` measures and commits it, and at least what stands here.
"""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.suite.material import EXPORT, RUN

HIGHER, LOWER = "higher", "lower"
OURS, REFERENCE = "ours", "reference"


@dataclass(frozen=True)
class Group:
    """Measures that the same turns give."""

    name: str
    ours: str
    """module and function of benchmarks/suite that prepare a turn"""
    reference: str
    turns: int
    """of each side, after one that warms up"""
    in_processes: bool = True
    """whether a side is a process that waits for its turns; else a turn starts processes itself"""
    warms_up: bool = True
    needs: tuple[str, ...] = ()
    """of `NEEDS` in benchmarks/suite/material.py"""
    agrees: tuple[str, float] | None = None
    """a figure that both sides must have alike, and by which share it may differ: the sides do the
    same work"""


@dataclass(frozen=True)
class Measure:
    """One figure of a group, as a ratio of ours to the reference."""

    name: str
    group: str
    figure: str
    """its name in what a turn gives"""
    what: str
    unit: str
    reference: str
    """what the reference is"""
    better: str
    """HIGHER or LOWER"""
    band: float
    """share by which the ratio may be worse than the committed one, at least"""
    quick: bool = False
    """whether --quick measures it"""


GROUPS = {
    group.name: group
    for group in (
        Group("training", "training.ours", "training.plain", 5, agrees=("first_loss", 1e-3)),
        Group("resume", "starting.resume", "starting.plain_resume", 3, in_processes=False,
              needs=(RUN,)),
        Group("pictures", "seeing.ours", "seeing.transformers", 15, agrees=("norm", 1e-3)),
        Group("answering", "answering.ours", "answering.transformers", 15,
              needs=(RUN, EXPORT), agrees=("prompt_tokens", 0.0)),
        Group("cold_start", "starting.answer", "starting.plain_answer", 5, in_processes=False,
              needs=(RUN, EXPORT)),
        Group("quality", "quality.ours", "quality.whole", 1, warms_up=False),
    )
}  # fmt: skip
PLAIN_LOOP = "a plain PyTorch loop over transformers' Phi-3 with PEFT, float32, padded rows"
GENERATE = "transformers' generate over the exported LLaVA, float32, its processor among it"
MEASURES = {
    measure.name: measure
    for measure in (
        Measure("training", "training", "tokens_per_second", "training, saves among it",
                "tokens/s", PLAIN_LOOP, HIGHER, 0.15),
        Measure("saving_stall", "training", "stall_seconds", "what a save holds the loop",
                "s", "torch.save of the same tensors to the disk, in the plain loop", LOWER, 0.15),
        Measure("resume", "resume", "seconds", "a new process, over one step, that is saved",
                "s", "the plain loop started anew, over one step, that is saved", LOWER, 0.15),
        Measure("pictures", "pictures", "pictures_per_second", "files to stored features",
                "pictures/s", "transformers' CLIPVisionModel and processor, float32", HIGHER,
                0.15, quick=True),
        Measure("first_token", "answering", "first_token_seconds",
                "a question about a new picture, to the first token", "s", GENERATE, LOWER, 0.15,
                quick=True),
        Measure("decode", "answering", "decode_tokens_per_second", "further tokens of an answer",
                "tokens/s", GENERATE, HIGHER, 0.15, quick=True),
        Measure("cold_start", "cold_start", "seconds", "infer.py, to the first token",
                "s", "a script that loads the exported LLaVA by transformers, to its first token",
                LOWER, 0.15),
        Measure("quality", "quality", "exact", "exact answers after a short training",
                "%", "every answer exact", HIGHER, 0.15),
    )
}  # fmt: skip
