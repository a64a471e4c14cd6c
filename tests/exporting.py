"""What the tests of the exports share: exported folders made once, small models, drawn tensors."""

from __future__ import annotations

import functools
from pathlib import Path

import random_model
import runs
import torch
from PIL import Image
from torch import nn
from transformers import Phi3Config, Phi3ForCausalLM

import export
from assistant.assistant import Assistant
from data.chat import render
from data.dataset import Message, Part
from exports import measure
from model.decoder import LanguageModel

ANSWERS = "--greedy-answers=8"
BASE, VISION = f"--base={runs.BASE}", f"--vision={runs.VISION}"


@functools.cache
def probe() -> measure.Probe:
    return measure.make_probe(runs.assistant(), 8)


@functools.cache
def merged() -> Path:
    """What `--merge --dtype float32` writes: without rounding, so that equal means equal."""
    out = runs.shared() / "merged"
    run = f"--run={runs.finished_run()}"
    assert export.main(["--merge", f"--out={out}", run, "--dtype=float32", ANSWERS]) == 0
    return out


@functools.cache
def llava() -> Path:
    """What `--llava DIR --dtype float32` writes."""
    out = runs.shared() / "llava"
    run = f"--run={runs.finished_run()}"
    assert export.main([f"--llava={out}", run, "--dtype=float32", ANSWERS]) == 0
    return out


def pictures() -> list[Image.Image]:
    return [Image.open(runs.world() / f"images/train_00000{i}.png").convert("RGB") for i in (0, 1)]


def text_ids(assistant: Assistant) -> torch.Tensor:
    asked = [Message("user", (Part("text", "How many red stars are there?"),))]
    prompt = render(asked, assistant.parts.chat_format, add_generation_prompt=True)
    return torch.tensor([prompt.input_ids])


@torch.no_grad()
def logits_of(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """(1, tokens, vocabulary) of a model of transformers or of ours."""
    if isinstance(model, LanguageModel):
        return random_model.logits_of(model.eval(), ids[0])[None]
    return model.eval()(input_ids=ids).logits


def logits_over(model: LanguageModel, embeddings: torch.Tensor) -> torch.Tensor:
    """(1, tokens, dim) embeddings -> (1, tokens, vocabulary)."""
    length = embeddings.shape[1]
    return model.lm_head(model.model(embeddings, torch.arange(length)[None], [length]))


def drawn_phi3(seed: int = 0, **fields: object) -> Phi3ForCausalLM:
    """A small Phi-3 with grouped keys and values; with full rotary it is Llama, fused."""
    config = Phi3Config(
        **{
            "vocab_size": 96,
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 64,
            "original_max_position_embeddings": 64,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "tie_word_embeddings": False,
            "sliding_window": None,
        }
        | fields
    )
    torch.manual_seed(seed)
    model = Phi3ForCausalLM(config).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    return model


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) / 8
