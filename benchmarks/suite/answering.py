"""Answering about pictures: the assistant, and transformers' `generate` over the same weights.

Ours is the run as `infer.py` has it, a 4-bit base with its adapter; the reference is its export as
`LlavaForConditionalGeneration`, merged, in float32, with its processor. A first token is counted
from the bytes of a picture and a question on, without anything remembered; decoding is counted from
the first token to the last of `TOKENS`, which no stop token ends.
"""

from __future__ import annotations

import statistics
import time
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from assistant.answer import Answer
from assistant.assistant import Assistant
from assistant.engine import Engine
from benchmarks import measuring
from benchmarks.processes import Turn
from benchmarks.suite.material import Material
from data.dataset import Question, load_questions
from evaluation.questions import question_messages, question_prompt

QUESTIONS, TOKENS = 12, 192


def asked(material: Material) -> list[tuple[Question, bytes]]:
    """Questions with the bytes of their pictures, every one of another picture."""
    by_picture = {question.image: question for question in load_questions(material.questions)}
    return [
        (question, (material.world / "images" / image).read_bytes())
        for image, question in list(by_picture.items())[:QUESTIONS]
    ]


def ours(material: Material) -> Turn:
    assistant = Assistant.load(material.run, cache=False, threads=material.threads)
    questions = asked(material)
    # No token ends an answer of this engine.
    endless = Engine(
        assistant.model, frozenset(), assistant.parts.chat_format.tokens_per_image, queue_limit=0
    )
    question, picture = questions[0]
    prompt = question_prompt(question, assistant.parts.chat_format).input_ids
    features = assistant.features([Image.open(BytesIO(picture)).convert("RGB")])

    def first_token(question: Question, picture: bytes) -> float:
        started = time.perf_counter()
        pictures = {question.image: picture}
        assistant.reply(question_messages(question), 1, pictures=pictures).wait()
        return time.perf_counter() - started

    def turn() -> dict[str, float]:
        firsts = [first_token(*one) for one in questions]
        answer = Answer(list(prompt), TOKENS, features)
        started = time.perf_counter()
        endless.submit(answer)
        answer.wait()
        assert answer.seconds_to_first_token and len(answer.tokens) == TOKENS
        seconds = time.perf_counter() - started - answer.seconds_to_first_token
        return {
            "first_token_seconds": statistics.mean(firsts),
            "decode_tokens_per_second": (TOKENS - 1) / seconds,
            "prompt_tokens": len(prompt),
        }

    return turn


def transformers(material: Material) -> Turn:
    torch.set_num_threads(material.threads)
    ask = HubModel(material.llava)
    questions = asked(material)

    def turn() -> dict[str, float]:
        firsts = [ask(question.text, picture, 1) for question, picture in questions]
        question, picture = questions[0]
        clocks = ask(question.text, picture, TOKENS)
        return {
            "first_token_seconds": statistics.mean(c.read[1] - c.read[0] for c in firsts),
            "decode_tokens_per_second": (TOKENS - 1) / (clocks.read[-1] - clocks.read[1]),
            "prompt_tokens": ask.prompt_tokens,
        }

    return turn


class HubModel:
    """A LLaVA folder as transformers loads it, in float32, and asked greedily."""

    def __init__(self, folder: Path) -> None:
        from transformers import AutoProcessor, LlavaForConditionalGeneration

        self.processor = AutoProcessor.from_pretrained(folder)
        self.model: Any = LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
        self.model.eval()
        self.prompt_tokens = 0

    @torch.no_grad()
    def __call__(self, text: str, picture: bytes, tokens: int) -> measuring.Clocks:
        """Exactly `tokens` tokens; the clock at the start and after each."""
        clocks = measuring.Clocks(tokens - 1, float("inf"))
        content = [
            {"type": "image", "image": Image.open(BytesIO(picture)).convert("RGB")},
            {"type": "text", "text": text},
        ]
        inputs = self.processor.apply_chat_template(
            [{"role": "user", "content": content}],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        )
        self.prompt_tokens = inputs["input_ids"].shape[1]

        def stop(ids: torch.Tensor, scores: object, **_: object) -> torch.Tensor:
            return torch.full((len(ids),), clocks.tick(), dtype=torch.bool)

        self.model.generate(
            **inputs,
            max_new_tokens=tokens,
            min_new_tokens=tokens,
            do_sample=False,
            stopping_criteria=[stop],
        )
        return clocks
