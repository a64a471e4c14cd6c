"""The sides of benchmarks/decode.py that run in PyTorch, over the same 4-bit weights.

    python -m benchmarks.torch_sides '{"side": "ours", "base": FOLDER or config.json, "plan": …}'

ours: `assistant.decoding.Decoding`, as the engine uses it, with the operations that `ops` chooses.
transformers: `generate` in float32, bitsandbytes' layers as they are in a training.
bitsandbytes_bf16: `generate` in bfloat16 with the path that bitsandbytes has for answering on CPUs
with AVX512-BF16; it rounds the scales of blocks to bfloat16.
"""

from __future__ import annotations

import os
import time
from typing import Any

import bitsandbytes as bnb
import torch
from torch import nn

from assistant.decoding import Decoding
from benchmarks import measuring
from benchmarks.peft_trainer import hub_base
from benchmarks.random_base import random_base
from errors import PhiSightError, run_main
from model.base import BaseModel, load_base
from model.projectors.mlp import MlpProjector
from model.vlm import VisionLanguageModel
from ops import choose
from ops.kernels.target import SWITCH
from ops.nf4 import PanelLinear, packed_weight

SIDES = ("ours", "transformers", "bitsandbytes_bf16")
NO_PICTURE = -1  # a placeholder that no token is


class Prompt:
    """A row for `Decoding`."""

    def __init__(self, ids: list[int]) -> None:
        self.ids, self.image_features = ids, torch.zeros(0, 1, 8)


def load(base: str | dict, dtype: torch.dtype, cache: str = "") -> BaseModel:
    """The base of a folder, or a random one of a config.json, in NF4 on the CPU."""
    if isinstance(base, dict):
        return random_base(base, dtype)
    return load_base(base, None, dtype, "cpu", "nf4", cache)


def ours(base: BaseModel) -> measuring.Answer:
    projector = MlpProjector(8, base.model.config.hidden_size)
    model = VisionLanguageModel(base.model, projector, NO_PICTURE).eval()

    def answer(prompts: list[list[int]], tokens: int, seconds: float) -> list[float]:
        decoding: Decoding[Prompt] = Decoding(model)
        clocks = measuring.Clocks(tokens, seconds)
        decoding.add([Prompt(list(ids)) for ids in prompts])
        chosen = decoding.logits.argmax(-1).tolist()
        while not clocks.tick():
            decoding.advance(chosen)
            chosen = decoding.logits.argmax(-1).tolist()
        return clocks.read

    return answer


def transformers(base: BaseModel) -> measuring.Answer:
    model = hub_base(base).eval()

    def answer(prompts: list[list[int]], tokens: int, seconds: float) -> list[float]:
        clocks = measuring.Clocks(tokens, seconds)

        def stop(ids: torch.Tensor, scores: object, **_: object) -> torch.Tensor:
            return torch.full((len(ids),), clocks.tick(), dtype=torch.bool)

        model.generate(
            torch.tensor(prompts),
            attention_mask=torch.ones(len(prompts), len(prompts[0]), dtype=torch.long),
            max_new_tokens=tokens + 1,
            min_new_tokens=tokens + 1,
            do_sample=False,
            stopping_criteria=[stop],
        )
        return clocks.read

    return answer


def bitsandbytes_bf16(base: BaseModel) -> measuring.Answer:
    if not bnb.functional.has_avx512bf16():
        raise PhiSightError("bitsandbytes_bf16: this CPU has no AVX512-BF16; leave the side out")
    for module in base.model.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            module.support_avx512bf16_for_cpu = True  # `lora.layer.secure_four_bit` says why not
    return transformers(base)


def step_bytes(base: BaseModel) -> dict[str, int]:
    """Bytes that decoding one token reads at least: of the weights as they are stored, and of keys
    and values for each token of the context."""
    weights = 0
    for module in base.model.modules():
        if isinstance(module, PanelLinear):
            weights += module.panels.nbytes
        elif isinstance(module, bnb.nn.Linear4bit):
            count = module.in_features * module.out_features
            weights += count // 2 + 4 * count // packed_weight(module).blocksize
        elif not isinstance(module, nn.Embedding):  # of which a step reads one row
            weights += sum(parameter.nbytes for parameter in module.parameters(recurse=False))
    block = 64  # tokens, of which memory is taken in multiples
    return {
        "weights": weights,
        "a_token": base.model.model.empty_cache().bytes_of(block) // block,
    }


@torch.no_grad()
def run(side: str, base: str | dict, plan: measuring.Plan) -> dict[str, Any]:
    """All that is measured of one side."""
    torch.set_num_threads(plan.threads)
    if side != "ours":
        os.environ[SWITCH] = "off"  # their weights are in bitsandbytes' own order
    dtype = torch.bfloat16 if side == "bitsandbytes_bf16" else torch.float32
    started = time.perf_counter()
    loaded = load(base, dtype)
    seconds = time.perf_counter() - started
    facts = {"load_seconds": round(seconds, 2), "step_bytes": step_bytes(loaded)}
    if side == "ours":
        facts["operations"] = choose(torch.device("cpu"), dtype, False, answering=True)[1]
    answers = {
        "ours": ours,
        "transformers": transformers,
        "bitsandbytes_bf16": bitsandbytes_bf16,
    }
    found = measuring.measure(answers[side](loaded), plan)
    return {**found, **facts, **measuring.memory()}


@torch.no_grad()
def first_token(folder: str, cache: str, threads: int) -> None:
    """What a new process does to its first token, by transformers."""
    torch.set_num_threads(threads)
    os.environ[SWITCH] = "off"
    answer = transformers(load(folder, torch.float32, cache))
    answer(measuring.Plan().prompts(16), 0, 0)


def main() -> None:
    asked = measuring.argument()
    if "first" in asked:
        first_token(asked["first"], asked["cache"], asked["threads"])
        measuring.report({})
        return
    measuring.report(run(asked["side"], asked["base"], measuring.plan_of(asked["plan"])))


if __name__ == "__main__":
    run_main(main)
