"""What a change to a model did to it: loss and greedy answers before and after, as a certificate.

Both sides see the same packed validation conversations with pictures, through the same forward
pass, and the same questions. Before, our decoder answers them; after, transformers does by the
folder's own defaults (`exports.generated`), since a folder is more than its weights.
"""

from __future__ import annotations

import dataclasses
import hashlib
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import checkpoints
from assistant.assistant import Assistant
from data.chat import RenderedSample
from data.dataset import load_questions
from data.features import FeatureStore
from data.prepare import DATA_REMEDY, TrainingData, evenly_spaced, prepare
from errors import PhiSightError
from evaluation.meter import packed_batches, validation_loss
from evaluation.questions import add_pictures, answer_prompts, question_prompt
from exports.folder import write_json
from model.base import BaseModel
from model.build import model_state
from model.projector import ImageProjector
from model.vision import VisionTower
from model.vlm import VisionLanguageModel
from paths import need_file

LONGEST_ANSWER = 96
LOSS_DIFFERENCE, GREEDY_EQUAL = 0.01, 99.0  # nats an answer token, percent
CERTIFICATE = "merge_certificate.json"
MERGE_METHODS = {
    "none": "dequantised NF4 + scaling * B A in float32, rounded once (arXiv:2305.14314)",
    "nf4": "NF4(dequantised NF4 + scaling * B A), as it was trained, dequantised and rounded once",
}
"""by `--merge-rounding`"""


@dataclass(frozen=True)
class Tolerance:
    """Past which a result is refused."""

    loss_difference: float = LOSS_DIFFERENCE
    greedy_equal: float = GREEDY_EQUAL

    def __post_init__(self) -> None:
        if not 0 <= self.loss_difference < float("inf"):
            raise PhiSightError(
                f"--max-loss-difference {self.loss_difference}: must be 0 or more nats"
            )
        if not 0 <= self.greedy_equal <= 100:
            raise PhiSightError(f"--min-greedy-equal {self.greedy_equal}: must be 0 to 100 percent")


@dataclass(frozen=True)
class Probe:
    """What models are measured on."""

    batches: list
    """packed validation conversations with a picture, see `evaluation.meter.packed_batches`"""
    prompts: list[RenderedSample]
    store: FeatureStore
    data: TrainingData
    facts: dict[str, Any]
    """what a certificate says about all this"""


@dataclass(frozen=True)
class Measured:
    """One side of a comparison."""

    loss: float
    """nats an answer token"""
    answers: list[str]


def make_probe(assistant: Assistant, greedy_answers: int) -> Probe:
    """The run's validation conversations and `greedy_answers` prompts with pictures: held-out
    questions where the run has some, else the first questions of validation conversations.

    Raises `PhiSightError` where the data are gone or have no picture.
    """
    if greedy_answers < 1:
        raise PhiSightError(f"--greedy-answers {greedy_answers}: must be at least 1")
    config, parts = assistant.config, assistant.parts
    store = FeatureStore(
        config.features, parts.vision.key, parts.vision.shape, config.feature_storage
    )
    data = prepare(
        config,
        parts.chat_format,
        store,
        lambda: VisionTower(parts.vision, parts.device),
        positions=parts.base.model.config.max_position_embeddings,
    )
    samples = [sample for sample in data.validation if sample.images]
    if not samples:
        remedy = "give data with pictures with --data"
        if not config.validation_fraction:
            remedy = (
                "the run has none: give a share of its data with --validation-fraction, and of"
                " other data with --data and --images too where its own have one picture alone"
            )
        raise PhiSightError(
            f"{config.data}: no validation conversation has a picture, so nothing can be measured;"
            f" {remedy}"
        )
    if config.held_out_questions:
        path = need_file(config.held_out_questions, "--held-out-questions", DATA_REMEDY)
        questions = evenly_spaced(load_questions(path), greedy_answers)
        add_pictures(assistant, questions, Path(config.images), store)
        prompts = [question_prompt(question, parts.chat_format) for question in questions]
    else:
        first = [sample for sample in data.first_exchanges if sample.images]
        prompts = [without_answer(sample) for sample in evenly_spaced(first, greedy_answers)]
    batches = packed_batches(
        samples,
        max(config.row_tokens, *(len(sample.input_ids) for sample in samples)),
        store.features_of,
        parts.chat_format.end_of_text_id,
        parts.chat_format.image_id,
        store.shape,
        parts.device,
    )
    saved = checkpoints.load(assistant.source).config.get("data_fingerprint")
    facts = {
        "data": config.data,
        "data_fingerprint": data.fingerprint,
        "data_are_those_of_the_run": saved == data.fingerprint,
        "conversations": len(samples),
        "answer_tokens": sum(batch.supervised_tokens for batch, _ in batches),
        "questions": len(prompts),
        "questions_from": config.held_out_questions or "validation conversations",
        "longest_answer_tokens": LONGEST_ANSWER,
    }
    return Probe(batches, prompts, store, data, facts)


def without_answer(sample: RenderedSample) -> RenderedSample:
    """A conversation of one exchange up to where its answer begins."""
    end = sample.supervised.index(True)
    return RenderedSample(sample.input_ids[:end], sample.supervised[:end], sample.images)


def measure(assistant: Assistant, probe: Probe, label: str) -> Measured:
    """Loss and greedy answers of a model in eval mode; no random number is drawn."""
    return Measured(
        validation_loss(assistant.model, probe.batches),
        answer_prompts(assistant, probe.prompts, probe.store.features_of, LONGEST_ANSWER, label),
    )


def with_language_model(
    assistant: Assistant, base: BaseModel, projector: ImageProjector | None = None
) -> Assistant:
    """The same assistant over another language model (and projector), moved to its device."""
    model = VisionLanguageModel(
        base.model, projector or assistant.model.projector, assistant.parts.chat_format.image_id
    ).to(assistant.parts.device)
    parts = dataclasses.replace(assistant.parts, model=model, base=base)
    return Assistant(parts, assistant.config, assistant.source)


def equal_percent(first: Sequence[str], second: Sequence[str]) -> float:
    same = sum(a == b for a, b in zip(first, second, strict=True))
    return round(100 * same / len(first), 2)


def certificate_of(
    what: str,
    assistant: Assistant,
    probe: Probe,
    before: Measured,
    after: Measured,
    tolerance: Tolerance | None,
    **more: Any,
) -> dict[str, Any]:
    """What was done, measured on what, with which result; `tolerance` None refuses nothing."""
    difference = after.loss - before.loss
    equal = equal_percent(before.answers, after.answers)
    within = tolerance is None or (
        abs(difference) <= tolerance.loss_difference and equal >= tolerance.greedy_equal
    )
    config, base = assistant.config, assistant.parts.base
    return {
        "what": what,
        "checkpoint": assistant.source,
        "weights_digest": checkpoints.weights_digest(model_state(assistant.model)),
        "base": config.base,
        "base_fingerprint": base.fingerprint,
        "quantization": config.quantization,
        "compute_dtype": str(base.compute_dtype).removeprefix("torch."),
        "device": assistant.parts.device.type,
        "loss_before": before.loss,
        "loss_after": after.loss,
        "loss_difference": difference,
        "greedy_equal": equal,
        "answers_after_by": "transformers' generate, by the folder's own defaults",
        "tolerance": dataclasses.asdict(tolerance) if tolerance else None,
        "within_tolerance": within,  # NaN is within none
        "measured_on": probe.facts,
        **more,
        "versions": versions(),
    }


def versions() -> dict[str, str]:
    packages = ("torch", "transformers", "bitsandbytes", "safetensors")
    return {"python": platform.python_version()} | {
        package: metadata.version(package) for package in packages
    }


def check(certificate: dict[str, Any]) -> None:
    """Raises `PhiSightError` with both numbers if the certificate is past its tolerance."""
    if certificate["within_tolerance"]:
        return
    allowed = certificate["tolerance"]
    raise PhiSightError(
        f"{certificate['what']}: refused, nothing was written: the loss went from"
        f" {certificate['loss_before']:.4f} to {certificate['loss_after']:.4f} (at most"
        f" {allowed['loss_difference']:g} apart is allowed) and {certificate['greedy_equal']:g} %"
        f" of the greedy answers stayed equal (at least {allowed['greedy_equal']:g} % is asked);"
        " use another --dtype, or say with --max-loss-difference and --min-greedy-equal what you"
        " accept"
    )


def certify(
    path: Path,
    what: str,
    assistant: Assistant,
    probe: Probe,
    before: Measured,
    after: Measured,
    tolerance: Tolerance | None,
    **more: Any,
) -> dict[str, Any]:
    """Write the certificate of the finished folder that `path` lies in, and return it.

    Raises `PhiSightError` as `check` does; nothing is written then.
    """
    certificate = certificate_of(
        what, assistant, probe, before, after, tolerance, **more, files=files_of(path.parent)
    )
    check(certificate)
    write_json(path, certificate)
    return certificate


def files_of(folder: Path) -> dict[str, str]:
    """sha256 of every file in a folder, by name."""
    hashes = {}
    for path in sorted(folder.iterdir()):
        if path.is_file():
            with path.open("rb") as file:
                hashes[path.name] = hashlib.file_digest(file, "sha256").hexdigest()
    return hashes


def summary(certificate: dict[str, Any], out: str) -> str:
    """The certificate in a line or two."""
    facts = certificate["measured_on"]
    line = (
        f"{out}: {certificate['what']}: loss"
        f" {certificate['loss_before']:.5f} -> {certificate['loss_after']:.5f}"
        f" ({certificate['loss_difference']:+.5f}) over {facts['answer_tokens']:,} answer tokens of"
        f" {facts['conversations']} conversations; {certificate['greedy_equal']:g} % of"
        f" {facts['questions']} greedy answers equal"
    )
    if naive := certificate.get("naive"):
        line += (
            f"\nrounded naively: loss {naive['loss_after']:.5f}"
            f" ({naive['loss_difference']:+.5f}), {naive['greedy_equal']:g} % equal"
        )
    if weights := certificate.get("weights"):
        channels = certificate["channels"]
        line += (
            f"\n{channels['before']} -> {channels['after']} MLP channels a layer,"
            f" {weights['before']:,} -> {weights['after']:,} weights"
        )
    return line
