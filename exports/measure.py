"""What a change to a model did to it: loss and greedy answers before and after, as a certificate.

Both sides see the same packed validation conversations with pictures, through the same forward
pass, and the same questions. Before, our decoder answers them; after, transformers does by the
folder's own defaults (`exports.generated`), since a folder is more than its weights.
"""

from __future__ import annotations

import dataclasses
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import checkpoints
from assistant.assistant import Assistant
from data.prepare import TrainingData
from errors import PhiSightError
from evaluation.meter import packed_batches, validation_loss
from evaluation.questions import answer_prompts
from exports.alignment import LONGEST_ANSWER, STORED_BY, alignment_line, check_alignment
from exports.asked import Questions, feature_store, prepared, questions_of
from exports.folder import files_of, write_card, write_json
from model.base import BaseModel
from model.projectors.projector import Projector
from model.vlm import VisionLanguageModel

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
    alignment: float | None = None
    """of an export with pictures, points: see `exports.alignment.check_alignment`"""

    def __post_init__(self) -> None:
        if not 0 <= self.loss_difference < float("inf"):
            raise PhiSightError(
                f"--max-loss-difference {self.loss_difference}: must be 0 or more nats"
            )
        if not 0 <= self.greedy_equal <= 100:
            raise PhiSightError(f"--min-greedy-equal {self.greedy_equal}: must be 0 to 100 percent")


@dataclass(frozen=True)
class Probe(Questions):
    """What models are measured on: questions, and conversations."""

    batches: list
    """packed validation conversations with a picture, see `evaluation.meter.packed_batches`"""
    data: TrainingData


@dataclass(frozen=True)
class Measured:
    """One side of a comparison."""

    loss: float
    """nats an answer token"""
    answers: list[str]


def make_probe(assistant: Assistant, greedy_answers: int) -> Probe:
    """The run's validation conversations with pictures, and at most `greedy_answers` questions.

    Raises `PhiSightError` where the data are gone or have no picture.
    """
    config, parts = assistant.config, assistant.parts
    store = feature_store(assistant)
    data = prepared(assistant, store)
    samples = [sample for sample in data.validation if sample.images]
    if not samples:
        remedy = "give data with pictures with --data"
        if not config.validation_fraction:
            remedy = (
                "the run has none: give a share of its data with --validation-fraction, and of"
                " other data with --data and --images too where its own have one picture alone"
            )
        raise PhiSightError(
            f"{' '.join(config.data)}: no validation conversation has a picture, so nothing can be"
            f" measured; {remedy}"
        )
    questions = questions_of(assistant, greedy_answers, store, lambda: data)
    batches = packed_batches(
        samples,
        max(config.row_tokens, *(len(sample.input_ids) for sample in samples)),
        store.features_of,
        parts.chat_format.padding_id,
        parts.chat_format.image_id,
        store.shape,
        parts.device,
    )
    saved = checkpoints.resolve(assistant.source).config.get("data_fingerprint")
    facts = {
        "data": " ".join(config.data),
        "data_fingerprint": data.fingerprint,
        "data_are_those_of_the_run": saved == data.fingerprint,
        "conversations": len(samples),
        "answer_tokens": sum(batch.supervised_tokens for batch, _ in batches),
        **questions.facts,
        "longest_answer_tokens": LONGEST_ANSWER,
    }
    return Probe(questions.asked, questions.prompts, store, facts, batches, data)


def measure(assistant: Assistant, probe: Probe, label: str) -> Measured:
    """Loss and greedy answers of a model in eval mode; no random number is drawn."""
    return Measured(
        validation_loss(assistant.model, probe.batches),
        answer_prompts(assistant, probe.prompts, probe.store.features_of, LONGEST_ANSWER, label),
    )


def with_language_model(
    assistant: Assistant, base: BaseModel, projector: Projector | None = None
) -> Assistant:
    """The same assistant over another language model (and projector), moved to its device."""
    model = VisionLanguageModel(
        base.model, projector or assistant.model.projector, assistant.parts.chat_format.image_id
    ).to(assistant.parts.device)
    parts = dataclasses.replace(assistant.parts, model=model, base=base)
    return Assistant(parts, assistant.config, assistant.source)


def equal_percent(first: Sequence[str], second: Sequence[str]) -> float:
    """Answers that are equal but for the white space around them, in percent."""
    same = sum(a.strip() == b.strip() for a, b in zip(first, second, strict=True))
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
        "provenance": assistant.provenance,
        "base": config.base,
        "family": base.family.name,
        "encoder": assistant.parts.vision.config.NAME,
        "quantization": config.quantization,
        "projector": {
            "name": config.projector,
            "tokens": assistant.parts.chat_format.tokens_per_image,
        },
        "compute_dtype": str(base.compute_dtype).removeprefix("torch."),
        "device": assistant.parts.device.type,
        "loss_before": before.loss,
        "loss_after": after.loss,
        "loss_difference": difference,
        "greedy_equal": equal,
        "answers_after_by": "transformers' generate, by the folder's own defaults",
        "tolerance": tolerance_entry(tolerance),
        "within_tolerance": within,  # NaN is within none
        "measured_on": probe.facts,
        "versions": versions(),
        **more,
    }


def tolerance_entry(tolerance: Tolerance | None) -> dict[str, float] | None:
    """What a certificate says about the limits that were set."""
    if tolerance is None:
        return None
    entry = dataclasses.asdict(tolerance)
    return {name: limit for name, limit in entry.items() if limit is not None}


def versions() -> dict[str, str]:
    packages = ("torch", "transformers", "bitsandbytes", "safetensors")
    return {"python": platform.python_version()} | {
        package: metadata.version(package) for package in packages
    }


def check(certificate: dict[str, Any]) -> None:
    """Raises `PhiSightError` with both numbers if the certificate is past its tolerance, or if the
    model that it is about does not see as it has to."""
    allowed = certificate["tolerance"]
    if certificate["within_tolerance"]:
        if alignment := certificate.get("alignment"):
            required = allowed and allowed.get("alignment")
            check_alignment(alignment, required, certificate["what"])
        return
    note = certificate.get("context", {}).get("note")
    raise PhiSightError(
        f"{certificate['what']}: refused, nothing was written: the loss went from"
        f" {certificate['loss_before']:.4f} to {certificate['loss_after']:.4f} (at most"
        f" {allowed['loss_difference']:g} apart is allowed) and {certificate['greedy_equal']:g} %"
        f" of the greedy answers stayed equal (at least {allowed['greedy_equal']:g} % is asked);"
        f" use another {STORED_BY.get(certificate['what'], '--dtype')}, or say with"
        " --max-loss-difference and --min-greedy-equal what you accept"
        + (f"; {note}" if note else "")
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
    """Write the card and the certificate of the finished folder that `path` lies in, and return
    the certificate.

    Raises `PhiSightError` as `check` does; nothing is written then.
    """
    certificate = certificate_of(what, assistant, probe, before, after, tolerance, **more)
    check(certificate)
    write_card(path.parent, assistant, what, [certificate])
    certificate["files"] = files_of(path.parent)
    write_json(path, certificate)
    return certificate


def summary(certificate: dict[str, Any], out: str) -> str:
    """The certificate in a few lines."""
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
    for part in ("pictures", "context"):
        if note := certificate.get(part, {}).get("note"):
            line += f"\nnote: {note}"
    if alignment := certificate.get("alignment"):
        line += f"\n{alignment_line(alignment)}"
    return line
