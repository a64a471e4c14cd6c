"""What transformers answers with an exported folder, by its own `generate` and the defaults in it.

Our decoder knows where an answer ends without reading a folder. Another program does not: it takes
the ids that end one, the length and the way of choosing from generation_config.json, the prompt
from the chat template, the type to compute in from config.json. So the greedy answers of a
certificate are made here, with nothing given but what a certificate has to bound: their length.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import (
    AutoModelForCausalLM,
    AutoProcessor,
    AutoTokenizer,
    LlavaForConditionalGeneration,
    PreTrainedTokenizerBase,
)

from assistant.assistant import Assistant
from assistant.text_stream import decode
from data.chat import render
from data.dataset import Message, Part
from data.images import load_image
from errors import PhiSightError
from evaluation.meter import validation_loss
from exports.measure import LONGEST_ANSWER, Measured, Probe, with_language_model
from model.base import BaseModel

Inputs = Callable[[int], dict[str, Tensor]]
"""Number of a prompt -> what `generate` is given for it, one row."""


def answers_as_text_model(assistant: Assistant, probe: Probe, folder: Path) -> list[str]:
    """Of a `Phi3ForCausalLM` folder. It reads no pictures, so the projector of `assistant` puts
    them in, as a program would that has it beside the folder."""
    check_prompts(assistant, AutoTokenizer.from_pretrained(folder, local_files_only=True))
    model = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True)

    def inputs(number: int) -> dict[str, Tensor]:
        prompt = probe.prompts[number]
        ids = torch.tensor([prompt.input_ids], device=assistant.parts.device)
        features = [probe.store.features_of(name) for name in prompt.images]
        stacked = torch.stack(features) if features else assistant.features([])
        embedded = assistant.model.embed(ids, stacked.to(ids.device))  # (1, tokens, dim)
        return {"inputs_embeds": embedded.to(model.dtype)}

    return _generated(assistant, probe, model, inputs)


def measured_folder(
    assistant: Assistant, written: BaseModel, probe: Probe, folder: Path
) -> Measured:
    """A `Phi3ForCausalLM` folder: the loss of the weights in it, which `written` are, and what
    transformers answers with it."""
    again = with_language_model(assistant, written)
    loss = validation_loss(again.model, probe.batches)
    return Measured(loss, answers_as_text_model(again, probe, folder))


def answers_as_llava(assistant: Assistant, probe: Probe, folder: Path) -> list[str]:
    """Of a `LlavaForConditionalGeneration` folder, with the pictures' files through its own
    processor and its own CLIP."""
    processor = AutoProcessor.from_pretrained(folder, local_files_only=True)
    check_prompts(assistant, processor.tokenizer)
    model = LlavaForConditionalGeneration.from_pretrained(folder, local_files_only=True)
    images = Path(assistant.config.images)

    def inputs(number: int) -> dict[str, Tensor]:
        prompt = probe.prompts[number]
        given = {"input_ids": torch.tensor([prompt.input_ids])}
        if prompt.images:
            pictures = [load_image(images / name) for name in prompt.images]
            made = processor.image_processor(images=pictures, return_tensors="pt")
            given["pixel_values"] = made["pixel_values"].to(model.dtype)
        return given

    return _generated(assistant, probe, model, inputs)


@torch.no_grad()
def _generated(assistant: Assistant, probe: Probe, model: Any, inputs: Inputs) -> list[str]:
    """One prompt after the other, as `generate` pads rows of different lengths on a side."""
    device = assistant.parts.device
    if not getattr(model, "is_quantized", False):  # such a model is where it was loaded to
        model.to(device)
    answers = []
    for number in tqdm(range(len(probe.prompts)), desc="generate", leave=False, disable=None):
        given = {name: tensor.to(device) for name, tensor in inputs(number).items()}
        length = len(probe.prompts[number].input_ids)
        mask = torch.ones(1, length, dtype=torch.int64, device=device)
        made = model.generate(**given, attention_mask=mask, max_new_tokens=LONGEST_ANSWER)
        ids = made[0, length if "input_ids" in given else 0 :].tolist()
        answers.append(decode(assistant.parts.base.tokenizer, ids))
    return answers


def check_prompts(assistant: Assistant, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise `PhiSightError` unless the folder's tokenizer and chat template give the ids that the
    model was trained on."""
    messages = [
        Message("system", (Part("text", "Be brief."),)),
        Message("user", (Part("text", " What\nis it? "),)),
        Message("assistant", (Part("text", "A cat."),)),
        Message("user", (Part("text", "Where?"),)),
    ]
    wanted = render(messages, assistant.parts.chat_format, add_generation_prompt=True).input_ids
    plain = [{"role": message.role, "content": message.parts[0].value} for message in messages]
    text = tokenizer.apply_chat_template(plain, add_generation_prompt=True, tokenize=False)
    if tokenizer(text, add_special_tokens=False).input_ids != wanted:
        raise PhiSightError(
            f"{assistant.config.base}: transformers' AutoTokenizer gives other ids than its"
            ' tokenizer.json; set "tokenizer_class": "PreTrainedTokenizerFast" in its'
            " tokenizer_config.json and export again"
        )
