"""An exported GGUF beside the run that it was made of, both asked the same, by llama.cpp itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jinja2.sandbox
import numpy
import torch
from torch import Tensor

from assistant.assistant import Assistant
from assistant.text_stream import decode
from data.chat import ChatFormat, RenderedSample, render
from data.chat_forms import ChatForm
from data.chat_forms.template import chat_template
from data.chat_tokenizer import FolderTokenizer
from data.dataset import Message, Part
from data.images import load_image
from data.pictures import PictureFolders
from errors import PhiSightError
from evaluation.meter import CONDITIONS, packed_batches
from evaluation.questions import answer_prompts
from exports.alignment import LONGEST_ANSWER, pictures_under
from exports.asked import marks_of
from exports.llama_cpp import eyes
from exports.llama_cpp.asked import Asked, Conversation, Told, ask
from exports.measure import Measured, Probe, equal_percent
from model.vlm import VisionLanguageModel

RIGHT = "right/"  # before the name of a picture, as the condition of the alignment meter
PREPARED = "prepared/"  # before that of one that our own preparation has made
COMPARED = 20  # pictures whose embeddings are compared under both preparations
# The relative difference of embeddings past which something else is computed: rounding to float16
# gives 0.0004.
ANOTHER_FORMULA = 0.05
PADDED = (
    "this run crops pictures that are not square, and llama.cpp pads them: crop them before it sees"
    " them, or train with --picture-fit pad"
)


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
    chat_format, features_of = assistant.parts.chat_format, probe.store.features_of
    bare = [without_pictures(sample, chat_format.image_id) for sample in samples_of(probe)]
    # A batch for each: packed together, they would come back in another order.
    bare_batches = [
        packed_batches(
            [sample],
            len(sample.input_ids),
            features_of,
            chat_format.padding_id,
            chat_format.image_id,
            probe.store.shape,
            assistant.parts.device,
        )[0]
        for sample in bare
    ]
    blind = [without_pictures(prompt, chat_format.image_id) for prompt in probe.prompts]
    return {
        "with_picture": Side(
            log_probabilities(assistant.model, probe.batches),
            answer_prompts(assistant, probe.prompts, features_of, LONGEST_ANSWER, "before"),
        ),
        "without_picture": Side(
            log_probabilities(assistant.model, bare_batches),
            answer_prompts(assistant, blind, features_of, LONGEST_ANSWER, "without pictures"),
        ),
    }


def samples_of(probe: Probe) -> list[RenderedSample]:
    """The conversations of a probe, in the order of its batches."""
    return [sample for _, samples in probe.batches for sample in samples]


@dataclass(frozen=True)
class Theirs:
    """What llama.cpp says."""

    sides: dict[str, Side]
    """as `our_side` has them"""
    answers: dict[str, list[str]]
    """{condition of the alignment meter: answers}"""
    told: Told
    texts: int
    """how many had the ids that they should have"""
    tokens: int
    """of the longest conversation that it was asked"""


def ask_llama(
    assistant: Assistant, probe: Probe, python: str, model: Path, mmproj: Path, line_end: str
) -> Theirs:
    """Ask llama.cpp all that we were asked, and about other pictures and a blank one.

    `line_end`: what follows a mark in the text of a chat.

    Raises `PhiSightError` where it does not load the files, or has other ids for a text.
    """
    parts = assistant.parts
    image_id = parts.chat_format.image_id
    samples = samples_of(probe)
    bare = [without_pictures(sample, image_id) for sample in samples]
    conversations = [
        Conversation(sample.input_ids, sample.supervised, [RIGHT + name for name in sample.images])
        for sample in (*samples, *bare)
    ]
    questions = [
        Conversation(prompt.input_ids, (), [f"{condition}/{name}" for name in prompt.images])
        for condition in CONDITIONS
        for prompt in probe.prompts
    ]
    questions += [
        Conversation(without_pictures(prompt, image_id).input_ids, ()) for prompt in probe.prompts
    ]
    said_before = [*samples, *probe.prompts]
    texts = chat_texts(said_before, parts.base.tokenizer, parts.chat_format, line_end)
    texts += template_texts(template_of(parts.chat_format, line_end), parts.chat_format)
    asked = Asked(
        model,
        mmproj,
        image_id,
        pictures_of(assistant, probe),
        texts,
        conversations,
        questions,
        LONGEST_ANSWER,
        torch.get_num_threads(),
    )
    told = ask(python, asked)
    if told.wrong_texts:
        text = texts[told.wrong_texts[0]][0]
        raise PhiSightError(
            f"gguf: refused, nothing was written: llama.cpp gives {len(told.wrong_texts)} of"
            f" {len(texts)} texts other token ids than {assistant.config.base}, the first is"
            f" {text[:80]!r}; export it with --merge or --llava"
        )
    said = [decode(parts.base.tokenizer, ids) for ids in told.answers]
    count = len(probe.prompts)
    pieces = [said[start : start + count] for start in range(0, len(said), count)]
    answers = dict(zip(CONDITIONS, pieces))
    sides = {
        "with_picture": Side(told.log_probabilities[: len(samples)], answers["right"]),
        "without_picture": Side(told.log_probabilities[len(samples) :], pieces[-1]),
    }
    return Theirs(sides, answers, told, len(texts), asked.tokens)


def pictures_of(assistant: Assistant, probe: Probe) -> dict[str, numpy.ndarray]:
    """What llama.cpp is shown: (height, width, 3) bytes as they were decoded, by condition and
    name, and some right ones as our own preparation makes them."""
    folders, fit = PictureFolders.of(assistant.config), assistant.parts.vision.preparation.fit
    asked = dict.fromkeys(name for prompt in probe.prompts for name in prompt.images)
    names = asked | dict.fromkeys(name for one in samples_of(probe) for name in one.images)
    pictures = {}
    for condition in CONDITIONS:
        picture_of = pictures_under(condition, probe, folders)
        for name in names if condition == "right" else asked:
            pictures[f"{condition}/{name}"] = numpy.array(picture_of(name))
    for name in [*names][:COMPARED]:
        pictures[PREPARED + name] = fit(load_image(folders.path_of(name))).pixels
    return pictures


def chat_texts(
    samples: Sequence[RenderedSample],
    tokenizer: FolderTokenizer,
    chat_format: ChatFormat,
    line_end: str,
) -> list[tuple[str, list[int]]]:
    """Conversations as the text of a chat, and their ids, in which a picture is one mark, and other
    marks have a `line_end`. Left out are those in which somebody typed what the tokenizer has as a
    mark: there it is read as one."""
    names = (*chat_format.form.marks, chat_format.image_token)
    marks = {tokenizer.backend_tokenizer.token_to_id(mark): mark for mark in names}
    alone = (chat_format.image_id, *chat_format.ending)  # no line ends behind these
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
                typed |= any(mark in words for mark in marks_of(tokenizer))
                text += words
                stretch = []
            if token is None or (token == chat_format.image_id and ids[-1:] == [token]):
                continue
            ids.append(token)
            text += marks[token] + (line_end if token not in alone else "")
        if not typed:
            texts.append((text, ids))
    return texts


def form_of(chat_format: ChatFormat, line_end: str) -> ChatForm:
    """The form of a chat whose text has, by llama.cpp's tokenizer, the ids of the training: without
    line ends that our marks swallow and its do not.

    `line_end`: what its marks swallow, empty for nothing.
    """
    form = chat_format.form
    swallows = len(chat_format.closing) == 1 and bool(form.after)
    if swallows and not line_end:
        return replace(form, opening=form.opening.rstrip("\n"), after="")
    return form


def template_of(chat_format: ChatFormat, line_end: str) -> str:
    """The chat template of a GGUF: pictures are parts with llama.cpp's own mark as their text.

    `line_end`: as `form_of` takes it.
    """
    return chat_template(form_of(chat_format, line_end), "media_marker", "part['text']")


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
        given = [
            {"role": message.role, "content": _content(message, chat_format.image_token)}
            for message in messages
        ]
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


def _content(message: Message, mark: str) -> str | list[dict[str, str]]:
    if len(message.parts) == 1 and message.parts[0].kind == "text":
        return message.parts[0].value
    return [
        {"type": "text", "text": part.value}
        if part.kind == "text"
        else {"type": "media_marker", "text": mark}
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
    as our own preparation made them, which is arithmetic alone, and as llama.cpp prepares them.

    Raises `PhiSightError` for a llama.cpp that is known to read pictures wrongly.
    """
    compared = [
        name.removeprefix(PREPARED) for name in told.embeddings if name.startswith(PREPARED)
    ]
    folders = PictureFolders.of(assistant.config)
    device = assistant.parts.device
    features = torch.stack([probe.store.features_of(name) for name in compared]).to(device)
    ours = assistant.model.projector(features).cpu()  # (pictures, tokens, dim)

    def apart(prefix: str, wanted: Tensor) -> dict[str, float]:
        theirs = torch.from_numpy(numpy.stack([told.embeddings[prefix + n] for n in compared]))
        relative = (theirs - wanted).flatten(1).norm(dim=1) / wanted.flatten(1).norm(dim=1)
        return {"mean": relative.mean().item(), "largest": relative.max().item()}

    by_us = apart(PREPARED, ours)
    if by_us["mean"] > ANOTHER_FORMULA:
        pictures = [load_image(folders.path_of(name)) for name in compared]
        shifted = eyes.embeddings_behind_class(assistant.parts.vision, assistant.model, pictures)
        if apart(PREPARED, shifted)["mean"] < ANOTHER_FORMULA:
            raise PhiSightError(
                "gguf: refused, nothing was written: this llama.cpp (llama-cpp-python"
                f" {told.version}) puts CLIP's class token behind the patches and reads pictures"
                " one place off, its issue 25814; take one where that is mended, as python -m"
                " tools.llama_cpp ../llama builds it"
            )
    shapes = [load_image(folders.path_of(name)).size for name in compared]
    return {
        "pictures": len(compared),
        "not_square": sum(height != width for height, width in shapes),
        "relative_difference": {
            "prepared_by_us": by_us,
            "prepared_by_llama_cpp": apart(RIGHT, ours),
        },
        "picture_fit": assistant.config.picture_fit,
        "note": PADDED if assistant.config.picture_fit == "crop" else "",
    }
