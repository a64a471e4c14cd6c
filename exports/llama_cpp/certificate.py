"""An exported GGUF beside the run that it was made of, both asked the same, by llama.cpp itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2.sandbox
import numpy
import torch
from torch import Tensor

from assistant.assistant import Assistant
from assistant.text_stream import decode
from data.chat import MARKS, ChatFormat, RenderedSample, render
from data.chat_tokenizer import FolderTokenizer
from data.dataset import Message, Part
from data.images import load_image
from errors import PhiSightError
from evaluation.meter import packed_batches
from evaluation.questions import answer_prompts
from exports.llama_cpp.asked import Asked, Conversation, Told, ask
from exports.measure import LONGEST_ANSWER, Measured, Probe, equal_percent
from model.vlm import VisionLanguageModel

PREPARED = "prepared/"  # before the name of a picture that our own preparation has made
COMPARED = 20  # pictures whose embeddings are compared under both preparations
MARKER = "<__media__>"


@dataclass(frozen=True)
class Side:
    """What one program makes of the conversations and questions of a probe."""

    log_probabilities: list[numpy.ndarray]
    """of the answer tokens of each conversation, in nats"""
    answers: list[str]

    @property
    def measured(self) -> Measured:
        return Measured(-float(numpy.concatenate(self.log_probabilities).mean()), self.answers)


def without_pictures(sample: RenderedSample, image_id: int) -> RenderedSample:
    """The same words to a model that is shown nothing."""
    kept = [place for place, token in enumerate(sample.input_ids) if token != image_id]
    return RenderedSample(
        [sample.input_ids[place] for place in kept],
        [sample.supervised[place] for place in kept],
        (),
    )


@torch.no_grad()
def log_probabilities(model: VisionLanguageModel, batches: Sequence) -> list[numpy.ndarray]:
    """Of the supervised tokens of every conversation, in nats. `batches`: of `packed_batches`."""
    found = []
    for batch, samples in batches:
        logits, targets = model.supervised_logits(batch)
        values = logits.double().log_softmax(-1).gather(1, targets[:, None])[:, 0].cpu()
        found += [piece.numpy() for piece in values.split([sum(s.supervised) for s in samples])]
    return found


def our_side(assistant: Assistant, probe: Probe) -> dict[str, Side]:
    """What the run itself says: "with_picture" and "without_picture"."""
    parts = assistant.parts
    samples = [sample for _, samples in probe.batches for sample in samples]
    bare = [without_pictures(sample, parts.chat_format.image_id) for sample in samples]
    bare_batches = packed_batches(
        bare,
        max(assistant.config.row_tokens, *(len(sample.input_ids) for sample in bare)),
        probe.store.features_of,
        parts.chat_format.end_of_text_id,
        parts.chat_format.image_id,
        probe.store.shape,
        parts.device,
    )
    # Packing may reorder them.
    order = {id(sample): place for place, sample in enumerate(bare)}
    bare_values = [numpy.empty(0)] * len(bare)
    packed = [sample for _, samples in bare_batches for sample in samples]
    for sample, values in zip(
        packed, log_probabilities(assistant.model, bare_batches), strict=True
    ):
        bare_values[order[id(sample)]] = values
    blind = [without_pictures(prompt, parts.chat_format.image_id) for prompt in probe.prompts]
    features_of = probe.store.features_of
    return {
        "with_picture": Side(
            log_probabilities(assistant.model, probe.batches),
            answer_prompts(assistant, probe.prompts, features_of, LONGEST_ANSWER, "before"),
        ),
        "without_picture": Side(
            bare_values, answer_prompts(assistant, blind, features_of, LONGEST_ANSWER, "blind")
        ),
    }


def ask_llama(
    assistant: Assistant, probe: Probe, python: str, model: Path, mmproj: Path, template: str
) -> tuple[dict[str, Side], Told, int]:
    """The same of llama.cpp, all that it said, and how many texts it tokenised.

    Raises `PhiSightError` where it does not load the files, or has other ids for a text.
    """
    parts = assistant.parts
    image_id = parts.chat_format.image_id
    samples = [sample for _, samples in probe.batches for sample in samples]
    conversations = [
        Conversation(sample.input_ids, sample.supervised, sample.images)
        for seen in (samples, [without_pictures(sample, image_id) for sample in samples])
        for sample in seen
    ]
    questions = [
        Conversation(prompt.input_ids, prompt.supervised, prompt.images)
        for seen in (probe.prompts, [without_pictures(p, image_id) for p in probe.prompts])
        for prompt in seen
    ]
    texts = chat_texts([*samples, *probe.prompts], parts.base.tokenizer, parts.chat_format)
    texts += template_texts(template, parts.chat_format)
    told = ask(
        python,
        Asked(
            model,
            mmproj,
            image_id,
            pictures_of(assistant, probe),
            texts,
            conversations,
            questions,
            LONGEST_ANSWER,
            torch.get_num_threads(),
        ),
    )
    if told.wrong_texts:
        text = texts[told.wrong_texts[0]][0]
        raise PhiSightError(
            f"gguf: refused, nothing was written: llama.cpp gives {len(told.wrong_texts)} of"
            f" {len(texts)} texts other token ids than {assistant.config.base}, the first is"
            f" {text[:80]!r}; export it with --merge or --llava"
        )
    half, answered = len(samples), len(probe.prompts)
    said = [decode(parts.base.tokenizer, ids) for ids in told.answers]
    sides = {
        "with_picture": Side(told.log_probabilities[:half], said[:answered]),
        "without_picture": Side(told.log_probabilities[half:], said[answered:]),
    }
    return sides, told, len(texts)


def pictures_of(assistant: Assistant, probe: Probe) -> dict[str, numpy.ndarray]:
    """Every picture of the probe as it was decoded, and some as our own preparation makes them:
    (height, width, 3) bytes by name."""
    samples = [*probe.prompts, *(sample for _, samples in probe.batches for sample in samples)]
    names = dict.fromkeys(name for sample in samples for name in sample.images)
    folder, fit = Path(assistant.config.images), assistant.parts.vision.preparation.fit
    pictures = {}
    for number, name in enumerate(names):
        picture = load_image(folder / name)
        pictures[name] = numpy.array(picture)
        if number < COMPARED:
            pictures[PREPARED + name] = fit(picture).pixels
    return pictures


def chat_texts(
    samples: Sequence[RenderedSample], tokenizer: FolderTokenizer, chat_format: ChatFormat
) -> list[tuple[str, list[int]]]:
    """Conversations as the text of a chat, and their ids, in which a picture is one mark. Left out
    are those in which somebody typed what looks like a mark: there both programs read it."""
    marks = {tokenizer.backend_tokenizer.token_to_id(mark): mark for mark in MARKS}
    alone = (chat_format.image_id, chat_format.end_of_text_id)  # no line ends behind these
    texts = []
    for sample in samples:
        text, ids, stretch, typed = "", [], [], False
        for token in [*sample.input_ids, None]:
            if token is not None and token not in marks:
                stretch.append(token)
                ids.append(token)
                continue
            if stretch:
                words = decode(tokenizer, stretch)
                typed |= any(mark in words for mark in (*MARKS, "</s>", "<s>", "<unk>"))
                text += words
                stretch = []
            if token is None or (token == chat_format.image_id and ids[-1:] == [token]):
                continue
            ids.append(token)
            text += marks[token] + ("\n" if token not in alone else "")
        if not typed:
            texts.append((text, ids))
    return texts


def template_texts(template: str, chat_format: ChatFormat) -> list[tuple[str, list[int]]]:
    """Conversations as the chat template of a GGUF writes them, and the ids that they should have:
    with and without pictures, in the parts that llama.cpp's server gives a template."""
    asked = Message("user", (Part("image", "a"), Part("text", " What\nis it? ")))
    between = Message("user", (Part("text", "Is"), Part("image", "a"), Part("text", "a cat?")))
    system = Message("system", (Part("text", "Be brief."),))
    answer = Message("assistant", (Part("text", "A cat."),))
    made = []
    compiled = jinja2.sandbox.ImmutableSandboxedEnvironment().from_string(template)
    for messages in (
        [asked],
        [system, asked, answer, Message("user", (Part("text", "Where?"),))],
        [between],
        [Message("user", (Part("image", "a"), Part("image", "b"), Part("text", "Which?")))],
    ):
        given = [{"role": message.role, "content": _content(message)} for message in messages]
        text = compiled.render(messages=given, add_generation_prompt=True)
        sample = render(messages, chat_format, add_generation_prompt=True)
        ids = []
        step = chat_format.tokens_per_image
        place = 0
        while place < len(sample.input_ids):
            token = sample.input_ids[place]
            ids.append(token)
            place += step if token == chat_format.image_id else 1
        made.append((text, ids))
    return made


def _content(message: Message) -> str | list[dict[str, str]]:
    if len(message.parts) == 1 and message.parts[0].kind == "text":
        return message.parts[0].value
    kinds = {"text": "text", "image": "media_marker"}
    return [
        {"type": kinds[part.kind], "text": part.value if part.kind == "text" else MARKS[-1]}
        for part in message.parts
    ]


def compared(ours: Side, theirs: Side) -> dict[str, Any]:
    """Log-probabilities and answers of both sides, in figures. Logs are in nats a token."""
    first, second = (numpy.concatenate(side.log_probabilities) for side in (ours, theirs))
    apart = numpy.abs(first - second)
    return {
        "answer_tokens": len(first),
        "mean_log_probability": {"ours": float(first.mean()), "llama_cpp": float(second.mean())},
        "mean_difference": float(apart.mean()),
        "largest_difference": float(apart.max()),
        "questions": len(ours.answers),
        "greedy_equal": equal_percent(ours.answers, theirs.answers),
    }


@torch.no_grad()
def picture_differences(assistant: Assistant, probe: Probe, told: Told) -> dict[str, Any]:
    """How far llama.cpp's embeddings of pictures are from ours, relative to their size: of pictures
    as our own preparation made them, which is arithmetic alone, and as llama.cpp prepares them."""
    names = [name for name in told.embeddings if PREPARED + name in told.embeddings]
    pictures = pictures_of(assistant, probe)
    ours: Mapping[str, Tensor] = {
        name: assistant.model.projector(
            probe.store.features_of(name)[None].to(assistant.parts.device)
        )[0].cpu()
        for name in names
    }

    def apart(prefix: str) -> dict[str, float]:
        values = []
        for name in names:
            theirs = torch.from_numpy(told.embeddings[prefix + name])
            values.append(float((theirs - ours[name]).norm() / ours[name].norm()))
        return {"mean": float(numpy.mean(values)), "largest": max(values)}

    shapes = {name: pictures[name].shape[:2] for name in pictures if not name.startswith(PREPARED)}
    return {
        "pictures": len(names),
        "not_square": sum(height != width for height, width in shapes.values()),
        "relative_difference": {
            "prepared_by_us": apart(PREPARED),
            "prepared_by_llama_cpp": apart(""),
        },
        "picture_fit": assistant.config.picture_fit,
    }
