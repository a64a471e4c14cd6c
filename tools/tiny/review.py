"""The last part of the base's lessons: everything again, and more of what takes several steps."""

from __future__ import annotations

import random
import time
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm
from transformers import Phi3ForCausalLM

from documents import read_json
from tools.tiny.base import (
    ComposedEmbedding,
    answer_accuracy,
    answer_loss,
    batches_of_pool,
    save_base,
)
from tools.tiny.report import SEED, write_report
from tools.tiny.tokenizer import Encoder
from tools.tiny.told import LESSONS, REVIEW, text_conversation


def review_batches(
    encoder: Encoder, step: int, batch: int
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Padded ids and turn numbers of the next four batches."""
    pool = [
        encoder.render(text_conversation(random.Random(f"{SEED}/review/{step}/{i}"), REVIEW))
        for i in range(4 * batch)
    ]
    return batches_of_pool(pool, batch, f"{SEED}/review/{step}")


def optimizers_of(
    model: Phi3ForCausalLM, learning_rate: float
) -> list[torch.optim.AdamW | torch.optim.Muon]:
    """Muon for the matrices of the layers (https://kellerjordan.github.io/posts/muon), with updates
    as large as AdamW's, and AdamW for the rest."""
    named = list(model.named_parameters())
    inner = [p for name, p in named if p.ndim == 2 and ".layers." in name]
    rest = [p for name, p in named if not (p.ndim == 2 and ".layers." in name)]
    adamw = torch.optim.AdamW(
        rest, lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.01, fused=True
    )
    muon = torch.optim.Muon(
        inner, lr=learning_rate, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"
    )
    return [adamw, muon]


def review_base(out: Path, steps: int, batch: int, learning_rate: float) -> None:
    """Go on from the base saved in `out` (after its lessons), over a cosine to 0."""
    torch.manual_seed(SEED)
    encoder = Encoder(out)
    model = Phi3ForCausalLM.from_pretrained(out, dtype=torch.float32).train()
    composed = ComposedEmbedding(model.model.embed_tokens, encoder)
    model.model.embed_tokens = composed
    optimizers = optimizers_of(model, learning_rate)
    started, running = time.time(), None
    for step in (bar := tqdm(range(steps), desc="review", mininterval=10)):
        share = min(1.0, (step + 1) / 40) * 0.5 * (1 + np.cos(np.pi * step / steps))
        if step % 4 == 0:
            batches = review_batches(encoder, step, batch)
        loss = answer_loss(model, *batches[step % 4])
        model.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate * share
            optimizer.step()
        running = loss.item() if running is None else 0.98 * running + 0.02 * loss.item()
        bar.set_postfix(loss=f"{running:.4f}", refresh=False)
    save_base(model, composed, out)
    lessons = read_json(out / "build_report.json")
    write_report(
        out,
        **lessons,
        review={
            "steps": steps,
            "batch": batch,
            "seconds": round(time.time() - started),
            "loss": running,
            "exact_answers_percent": answer_accuracy(model, encoder, LESSONS[-1], 960),
        },
    )
