"""What transformers answers with an exported folder, by its own `generate` and the defaults in it.

Our decoder knows where an answer ends without reading a folder. Another program does not: it takes
the ids that end one, the length and the way of choosing from generation_config.json, the prompt
from the chat template, the type to compute in from config.json. So the greedy answers of a
certificate are made here, with nothing given but what a certificate has to bound: their length.
A LLaVA folder is asked as a user asks it, by `pipeline("image-text-to-text")` with messages and
pictures; a text model is given the pictures' embeddings, for which no pipeline has a place.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from tqdm import tqdm
from transformers import (
    AutoModelForCausalLM,
    AutoProcessor,
    AutoTokenizer,
    LlavaForConditionalGeneration,
    PreTrainedTokenizerBase,
    pipeline,
)

from assistant.assistant import Assistant
from assistant.text_stream import decode
from data.chat import render
from data.dataset import Message, Part
from data.pictures import PictureFolders
from errors import PhiSightError
from evaluation.meter import CONDITIONS, validation_loss
from exports.alignment import LONGEST_ANSWER, pictures_under
from exports.asked import Questions
from exports.measure import Measured, Probe, with_language_model
from exports.peft_adapter import add_adapter
from model.base import BaseModel


@torch.no_grad()
def answers_as_text_model(assistant: Assistant, probe: Probe, folder: Path) -> list[str]:
    """Of a folder of a language model. It reads no pictures, so the projector of `assistant` puts
    them in, as a program would that has it beside the folder."""
    check_prompts(assistant, AutoTokenizer.from_pretrained(folder, local_files_only=True))
    model: Any = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True)
    device = assistant.parts.device
    if not getattr(model, "is_quantized", False):  # such a model is where it was loaded to
        model.to(device)
    answers = []
    # One prompt after the other, as `generate` pads rows of different lengths on a side.
    for prompt in tqdm(probe.prompts, desc="generate", leave=False, disable=None):
        ids = torch.tensor([prompt.input_ids], device=device)
        features = [probe.store.features_of(name) for name in prompt.images]
        stacked = torch.stack(features) if features else assistant.features([])
        embedded = assistant.model.embed(ids, stacked.to(device))  # (1, tokens, dim)
        made = model.generate(
            inputs_embeds=embedded.to(model.dtype),
            attention_mask=torch.ones_like(ids),
            max_new_tokens=LONGEST_ANSWER,
        )
        answers.append(decode(assistant.parts.base.tokenizer, made[0].tolist()))
    return answers


def measured_folder(
    assistant: Assistant, written: BaseModel, probe: Probe, folder: Path
) -> Measured:
    """A folder of a language model: the loss of the weights in it, which `written` are, and what
    transformers answers with it."""
    again = with_language_model(assistant, written)
    loss = validation_loss(again.model, probe.batches)
    return Measured(loss, answers_as_text_model(again, probe, folder))


def answers_as_llava(
    assistant: Assistant, questions: Questions, folder: Path, adapter: Path | None = None
) -> dict[str, list[str]]:
    """Of a `LlavaForConditionalGeneration` folder, {condition of the meter: answers}: by its own
    processor and its own CLIP, from messages and pictures alone, as a user asks it.

    Args: `adapter`: a PEFT folder that is put over its weights, as PEFT merges it.
    """
    model = LlavaForConditionalGeneration.from_pretrained(folder, local_files_only=True)
    if adapter is not None:
        add_adapter(model, adapter)
    processor = AutoProcessor.from_pretrained(folder, local_files_only=True)
    check_prompts(assistant, processor.tokenizer)
    chat = pipeline(
        "image-text-to-text", model=model, processor=processor, device=assistant.parts.device
    )
    answers: dict[str, list[str]] = {}
    for condition in CONDITIONS:
        picture_of = pictures_under(condition, questions, PictureFolders.of(assistant.config))
        asked = tqdm(questions.asked, desc=f"{condition} picture", leave=False, disable=None)
        answers[condition] = [_said(chat, one.messages, picture_of) for one in asked]
    return answers


def _said(
    chat: Any,
    messages: Sequence[Message],
    picture_of: Callable[[str], Image.Image],
) -> str:
    """The answer of a pipeline, without the white space around it: the text is decoded together
    with its question, and then the first word has its space."""
    given = [
        {
            "role": message.role,
            "content": [
                {"type": "image", "image": picture_of(part.value)}
                if part.kind == "image"
                else {"type": "text", "text": part.value}
                for part in message.parts
            ],
        }
        for message in messages
    ]
    made = chat(text=given, return_full_text=False, max_new_tokens=LONGEST_ANSWER)
    return str(made[0]["generated_text"]).strip()


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
