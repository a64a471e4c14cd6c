"""One training step at Phi-3.5-mini's width, by what its backward computes again.

    python -m benchmarks.train_step [--layers 4] [--tokens 638] [--threads 2] [--settings products]

Random 4-bit weights made in memory: nothing is downloaded, quantised or written. One row of
`--tokens` tokens, of them 576 of a picture. Each setting is a process of its own, which makes a
step that is not counted and `--steps` that are. Prints an object for each: seconds and processor
seconds of the fastest step, peak memory of the process (without what making the weights took), how
much the steps added to what the model takes, and a digest of all gradients, which has to be one.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import threads  # noqa: F401 (before torch is loaded)

import torch

from benchmarks.full_shape import ROOT, phi_config
from benchmarks.random_base import random_base
from benchmarks.vs_peft_trainer import resident
from config import LORA_TARGETS, Parser
from data.collate import IGNORED, Batch, batch_of
from errors import PhiSightError, run_main
from lora.inject import inject
from model.build import multiply_by_integers
from model.projectors.mlp import MlpProjector
from model.recompute import LAYERS, NOTHING, PRODUCTS
from model.vlm import VisionLanguageModel
from tensors import sha256_of
from training.loss_scaler import LossScaler
from training.optimizer import AdamW
from training.step import train_step

PICTURE, PLACEHOLDER = (576, 1024), 7  # tokens and width of CLIP ViT-L/14-336; any id


class Watched(AdamW):
    """AdamW that remembers a digest of the gradients of its first step."""

    digest = ""

    def step(self, learning_rate: float) -> None:
        gradients = [p.grad for p in self.parameters.values() if p.grad is not None]
        hashes = "".join(sha256_of(gradient) for gradient in gradients)
        self.digest = self.digest or hashlib.sha256(hashes.encode()).hexdigest()[:12]
        super().step(learning_rate)


def model_of(layers: int) -> VisionLanguageModel:
    """Random weights with the adapters of the preset, whose B is not zero."""
    base = random_base(phi_config(layers), torch.float32)
    generator = torch.Generator().manual_seed(1)
    wrapped = inject(base.model, LORA_TARGETS, 16, 16.0, 0.05, generator)
    for layer in wrapped.values():
        torch.nn.init.normal_(layer.lora_B, std=0.01, generator=generator)
    projector = MlpProjector(PICTURE[1], base.model.config.hidden_size)
    projector.reset_parameters(generator)
    return VisionLanguageModel(base.model, projector, PLACEHOLDER).train()


def row_of(tokens: int) -> Batch:
    """A picture, then text; the last third of the text is an answer."""
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(100, 30000, (1, tokens), generator=generator)
    ids[:, : PICTURE[0]] = PLACEHOLDER
    answer = torch.arange(tokens) >= tokens - (tokens - PICTURE[0]) // 3
    return batch_of(
        input_ids=ids,
        labels=ids.where(answer, torch.tensor(IGNORED)),
        position_ids=torch.arange(tokens)[None],
        segment_ids=torch.ones(1, tokens, dtype=torch.long),
        image_features=torch.randn(1, *PICTURE, generator=generator),
        image_id=PLACEHOLDER,
        row_keys=[5],
    )


def measure(setting: str, options: argparse.Namespace) -> dict[str, Any]:
    torch.set_num_threads(options.threads)
    model, batch = model_of(options.layers), row_of(options.tokens)
    if options.compute_type == "int16":
        multiply_by_integers(model.language_model)
    model.language_model.model.recomputing = setting
    optimizer = Watched(model.trainable())
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # VmHWM starts anew
    before, clocks = resident("VmRSS"), []
    for _ in range(1 + options.steps):
        wall, processor = time.perf_counter(), time.process_time()
        train_step(model, optimizer, LossScaler(enabled=False), [batch], 1e-5, 1.0)
        clocks.append((time.perf_counter() - wall, time.process_time() - processor))
    peak = resident("VmHWM")
    return {
        "setting": setting,
        "layers": options.layers,
        "tokens": options.tokens,
        "threads": options.threads,
        "seconds": round(min(wall for wall, _ in clocks[1:]), 2),
        "processor_seconds": round(min(processor for _, processor in clocks[1:]), 2),
        "peak_memory_gb": round(peak / 1e9, 2),
        "of_the_steps_gb": round((peak - before) / 1e9, 2),
        "gradients": optimizer.digest,
    }


def main() -> None:
    parser = Parser(prog="train_step.py", description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=4, help="of the 32 that Phi-3.5-mini has")
    parser.add_argument("--tokens", type=int, default=638, help="of the row, at least 579")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--steps", type=int, default=1, help="steps that count, after one")
    parser.add_argument("--settings", default=",".join((NOTHING, PRODUCTS, LAYERS)))
    parser.add_argument(
        "--compute-type", choices=("float32", "int16"), default="float32", help="of the forward"
    )
    parser.add_argument("--here", action="store_true", help="in this process; for this program")
    options = parser.parse_args()
    if options.tokens < PICTURE[0] + 3:
        raise PhiSightError(f"--tokens {options.tokens}: a picture alone has {PICTURE[0]}")
    if options.here:
        print(json.dumps(measure(options.settings, options)))
        return
    for setting in options.settings.split(","):
        words = {**vars(options), "settings": setting}
        flags = [
            f"--{name.replace('_', '-')}={value}" for name, value in words.items() if name != "here"
        ]
        command = [sys.executable, "-m", "benchmarks.train_step", "--here", *flags]
        subprocess.run(command, cwd=ROOT, check=True)


if __name__ == "__main__":
    run_main(main)
