"""The sections of a model card, each made of facts alone."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import config as configs
from config import Config
from hub import is_repository
from reports.card_forms import Form
from reports.compare import Saved, projector_in
from reports.markdown import escaped, listed, name, number, table

CURVES = "curves.png"
ROWS = 8  # of the tables over steps
FEW_STEPS, FEW_QUESTIONS = 100, 100
SMALL_GAP = 10.0  # points between the right picture and a swapped one
ASSETS = "assets/"  # of this project: whoever has it has what lies there
OWN = f"{ASSETS}own/"  # of a Space: where `--copy-base` puts what nobody else has
RIGHT, SWAPPED, BLANK = "right", "swapped", "blank"
FOLDER = "FOLDER"  # what a card calls its own
SHOWN_DIGEST = 16  # of the 64 characters, in tables


@dataclass(frozen=True)
class Facts:
    """What a card is made of."""

    config: Config
    saved: Saved
    records: Sequence[Mapping[str, Any]]
    form: Form
    title: str
    repository: str
    license: str
    model_type: str
    """of the base, as its config.json has it and the hub tags it; empty where nobody knows"""
    chain: Mapping[str, Any]
    """see `reports.card.provenance`"""
    certificates: Sequence[Mapping[str, Any]]

    @property
    def recorded(self) -> Mapping[str, Any]:
        """The config as the checkpoint has it: paths of this project are relative to it."""
        return self.saved.config["config"]

    def of_kind(self, kind: str) -> list[Mapping[str, Any]]:
        return [record for record in self.records if record.get("kind") == kind]

    @property
    def last_evaluation(self) -> Mapping[str, Any]:
        evaluations = self.of_kind("evaluation")
        return evaluations[-1] if evaluations else {}


def opening(facts: Facts) -> str:
    config = facts.config
    pictures = (
        "every patch of the picture" if config.vision_features == "patches" else "one pooled vector"
    )
    kind = f", of the type {name(facts.model_type)}" if facts.model_type else ""
    together = "trained with it" if config.train_projector else "left as it was"
    return (
        f"This folder holds {facts.form.what}.\n\n"
        f"The base is {_model(facts, 'base')}{kind}. Pictures are read by {_model(facts, 'vision')}"
        f" ({pictures}) and a projector that was {together}. It was trained by PhiSight for"
        f" {facts.saved.step:,} steps, and this card was made of its checkpoint and its log."
    )


def _model(facts: Facts, field: str) -> str:
    """Which base or picture encoder; of a folder the last part of its path alone."""
    value = getattr(facts.config, field)
    if hub_id(value):
        revision = getattr(facts.config, f"{field}_revision")
        at = f" at revision {name(revision)}" if revision else ", newest revision when it was read"
        return f"[{escaped(value)}](https://huggingface.co/{value}){at}"
    recorded = str(facts.recorded.get(field, ""))
    if recorded.startswith(ASSETS) and ".." not in recorded:
        return f"{name(recorded)} of the {'Space' if recorded.startswith(OWN) else 'project'}"
    return f"a folder {name(Path(value).name)}"


def hub_id(model: str) -> str:
    """The id of a model on the hub, or "" for what lies in a folder."""
    return model if is_repository(model) and not Path(model).exists() else ""


def tags(facts: Facts) -> list[str]:
    made = ["phisight", "lora", *filter(None, [facts.model_type])]
    return [*made, "vision"] if facts.form.task == "image-text-to-text" else made


def metrics(facts: Facts) -> Iterator[tuple[str, str, float]]:
    """(the hub's name of the metric, what it is, value) of the last evaluation."""
    last = facts.last_evaluation
    alignment = last.get("alignment") or {}
    for kind, said, value in (
        ("loss", "nats an answer token", last.get("validation_loss")),
        ("accuracy", "exact answers with the right picture, %", alignment.get(RIGHT)),
        ("accuracy", "exact answers with a swapped picture, %", alignment.get(SWAPPED)),
        ("accuracy", "exact answers with a blank picture, %", alignment.get(BLANK)),
    ):
        if _is_number(value):
            assert value is not None  # it is a number
            yield kind, said, value


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


# -- sections -------------------------------------------------------------------------------------


def usage(facts: Facts) -> str:
    where = facts.repository or FOLDER
    if facts.form.library == "phisight" and facts.repository:
        where = f"hf:{where}"
    text = f"## How to run it\n\n{facts.form.usage.format(where=where)}"
    here = [
        f"`--{field}`"
        for field in ("base", "vision")
        if not hub_id(getattr(facts.config, field))
        and (
            not (at := str(facts.recorded.get(field, ""))).startswith(ASSETS) or at.startswith(OWN)
        )
    ]
    if facts.form.library == "phisight":
        text += "\n\nThe command is run in a checkout of PhiSight."
        if here:
            text += (
                f" Say with {' and '.join(here)} where these folders lie on your machine; others"
                " than those of the training are refused by their fingerprints."
            )
    if where == FOLDER:
        text += f"\n\n`{FOLDER}` is where this folder lies."
    return text


def limits(facts: Facts) -> str:
    return "## What it cannot do\n\n" + "\n".join(f"- {limit}" for limit in _limits(facts))


def _limits(facts: Facts) -> Iterator[str]:
    config, state, last = facts.config, facts.saved.trainer_state, facts.last_evaluation
    if facts.form.task == "text-generation":
        held = "the language model alone"
        if facts.form.library == "peft":
            held = "an adapter, and a projector beside it that PEFT does not read"
        yield f"It sees no pictures: this folder holds {held}."
    if facts.form.limit:
        yield facts.form.limit
    if "imported_from" in facts.saved.config:
        yield "It was imported from another program, so its training is not known."
    elif facts.saved.step < FEW_STEPS:
        yield f"It was trained for {facts.saved.step:,} steps, which is few."
    if not state.get("finished"):
        yield "Its training was not finished when this was saved."
    if not config.train_lora:
        yield "Only the projector was trained: the language model is that of the base."
    if not config.train_projector and not config.start_from:
        yield "Its projector was never trained: it is as it was drawn."
    if config.vision_features == "pooled":
        yield "It sees one vector a picture: where things are, and small things, are lost."
    elif config.feature_pooling > 1:
        side = config.feature_pooling
        yield f"It sees the mean of {side} x {side} patches at a time: small things are lost."
    yield from _measured_limits(facts, last.get("alignment") or {})
    yield (
        f"It was trained on conversations of at most {config.max_text_tokens:,} tokens of text;"
        " longer ones were not tried."
    )
    if config.quantization != "none" and facts.form.relation == "adapter":
        yield (
            f"The adapter belongs to the base in 4 bits ({name(config.quantization)}), over which"
            " it was trained; over other weights it answers otherwise."
        )
    yield (
        "Which languages and subjects it knows is up to its base and its data, of which this card"
        " knows a fingerprint alone."
    )
    yield (
        "It was not evaluated for safety, for bias, for what it refuses, or on public benchmarks."
        " Do not let it decide about people."
    )


def _measured_limits(facts: Facts, alignment: Mapping[str, Any]) -> Iterator[str]:
    gap = _gap(alignment)
    yield from _warnings(facts)
    asked = (facts.saved.config.get("data_counts") or {}).get("alignment_questions")
    if not facts.last_evaluation:
        yield "It was not evaluated: no figure says how well it answers."
    elif gap is None:
        yield "Whether its answers come from the picture was not measured."
    elif gap < SMALL_GAP:
        yield (
            f"Its answers hardly come from the picture: the right one gives {gap:.1f} points more"
            " than a swapped one."
        )
    if asked is not None and asked < FEW_QUESTIONS and gap is not None:
        yield f"That was measured on {asked} questions, which is few."
    if facts.last_evaluation:
        yield "It was measured on conversations like those of its training, and on no others."


def _warnings(facts: Facts) -> Iterator[str]:
    """What certificates say of exports that hardly see, or of which nobody knows."""
    for certificate in facts.certificates:
        alignment = certificate.get("alignment")
        if isinstance(alignment, Mapping) and alignment.get("warning"):
            yield f"**Warning:** {escaped(alignment['warning'])}"


def _gap(alignment: Mapping[str, Any]) -> float | None:
    right, swapped = alignment.get(RIGHT), alignment.get(SWAPPED)
    if not (_is_number(right) and _is_number(swapped)):
        return None
    assert right is not None and swapped is not None  # they are numbers
    return right - swapped


def evaluation(facts: Facts) -> str:
    """The evaluations of the training, and the alignment that an export was measured with."""
    rows = [
        (
            number(record.get("step"), ",d"),
            number(record.get("validation_loss"), ".4f"),
            *_alignment_cells(record.get("alignment") or {}),
        )
        for record in _some(facts.of_kind("evaluation"))
    ]
    own = [
        (
            f"certificate, {number(found.get('questions'), ',d')} questions",
            "-",
            *_alignment_cells(found),
        )
        for certificate in facts.certificates
        if isinstance(found := certificate.get("alignment"), Mapping)
    ]
    if not rows and not own:
        return ""
    heads = ("after step", "validation loss", "right picture", "swapped", "blank", "gap")
    asked = (facts.saved.config.get("data_counts") or {}).get("alignment_questions")
    of = f" {asked:,}" if isinstance(asked, int) else ""
    # Those of the training and of a certificate differ: see `exports.alignment`.
    other = (
        " The row of the certificate is of other questions, held-out ones where the run has any, so"
        " compare it with none of those above."
        if rows and own
        else ""
    )
    return (
        "## Does it see?\n\n"
        f"The same{of} validation questions are asked with the right picture, with a swapped one"
        " and with a blank one. Exact answers in percent; the gap is between the right picture and"
        " a swapped one, and is what comes from the picture. The loss is in nats an answer token."
        f"{other}\n\n{table(heads, [*rows, *own])}"
    )


def _alignment_cells(alignment: Mapping[str, Any]) -> tuple[str, ...]:
    shares = [number(alignment.get(condition), ".1f") for condition in (RIGHT, SWAPPED, BLANK)]
    return *shares, number(_gap(alignment), ".1f")


def curves(facts: Facts) -> str:
    records = _some(facts.of_kind("train"))
    if not records:
        return ""
    rows = [
        (
            number(record.get("step"), ",d"),
            number(record.get("loss"), ".4f"),
            number(record.get("lr"), ".3g"),
            number(record.get("gradient_norm"), ".3g"),
        )
        for record in records
    ]
    picture = f"![Loss and learning rate over steps]({CURVES})\n\n"
    return (
        "## Curves\n\n"
        + (picture if facts.form.library == "phisight" else "")
        + table(("step", "loss", "learning rate", "gradient norm"), rows)
    )


def _some(items: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """At most `ROWS` of them, spread evenly, the first and the last among them."""
    if len(items) <= ROWS:
        return list(items)
    return [items[round(i * (len(items) - 1) / (ROWS - 1))] for i in range(ROWS)]


def data(facts: Facts) -> str:
    counts = facts.saved.config.get("data_counts") or {}
    said = {
        "training_conversations": "conversations trained on",
        "pictures": "pictures in them",
        "tokens": "tokens in them, those of pictures included",
        "validation_conversations": "conversations of each evaluation",
        "quarantined": "records set aside as unusable",
        "shortened": "conversations that lost their last turns to the token limit",
    }
    rows = [(said[key], number(counts[key], ",d")) for key in said if key in counts]
    trained = facts.of_kind("train")
    if trained:
        for key, words in (
            ("tokens", "tokens seen in training, again in every epoch"),
            ("supervised_tokens", "of these, tokens of answers, which were learnt"),
        ):
            values = [record.get(key) for record in trained]
            total = sum(value for value in values if isinstance(value, int))
            rows.append((words, number(total, ",d")))
    if not rows:
        return ""
    return f"## Data\n\n{table(('what', 'how many'), rows)}"


def recipe(facts: Facts) -> str:
    config, saved = facts.config, facts.saved.config
    if "imported_from" in saved:
        return ""
    steps = f"{facts.saved.step:,} of {saved.get('total_steps') or facts.saved.step:,}"
    processes = saved.get("world_size", 1)
    adapter = (
        f"LoRA of rank {config.lora_rank}, alpha {config.lora_alpha:g}"
        f"{' over the root of the rank' if config.rank_stabilized else ''}, dropout"
        f" {config.lora_dropout:g}, on {', '.join(map(name, config.lora_targets))}"
    )
    side, processes = config.feature_pooling, saved.get("world_size", 1)
    batch = config.batch_size * config.accumulation
    rows = {
        "adapter": adapter if config.train_lora else f"{adapter}; not trained",
        "projector": f"{projector_in(facts.saved, name)}, "
        + ("trained" if config.train_projector else "not trained")
        + (f", dropout {config.projector_dropout:g}" if config.projector_dropout else ""),
        "base kept in": name(config.quantization),
        "pictures": f"{name(config.vision_features)} of hidden layer {config.vision_layer}"
        + (f", the mean of {side} x {side} each" if side > 1 else "")
        + f", made square by {name(config.picture_fit)}",
        "optimiser": f"AdamW, betas {config.adam_beta1:g} and {config.adam_beta2:g}, weight decay"
        f" {config.weight_decay:g}; gradients clipped to {config.max_gradient_norm:g}",
        "learning rate": f"{config.learning_rate:g} at its peak, {name(config.schedule)} after"
        f" {100 * config.warmup_fraction:g} % of the steps"
        + (f"; B at {config.lora_plus_ratio:g} times it" if config.lora_plus_ratio != 1 else "")
        + (f"; the projector at {peak:g}" if (peak := config.projector_learning_rate) else ""),
        "batch": f"{batch} {'packed rows' if config.pack else 'conversations'} a step,"
        f" {config.batch_size} at a time, on {processes} process{'es' if processes != 1 else ''}",
        "steps": f"{steps}, of {config.epochs} epoch{'s' if config.epochs > 1 else ''}",
        "computed in": f"{name(saved.get('compute_dtype', '?'))} on"
        f" {name(saved.get('device', '?'))}",
        "seed": str(config.seed),
    }
    versions = saved.get("versions") or {}
    rows |= {f"version of {name(one)}": name(version) for one, version in versions.items()}
    return f"## Recipe\n\n{table(('what', 'how'), [*rows.items()])}{_changed(config)}"


def _changed(config: Config) -> str:
    """Every field that differs from the full-size recipe, but for paths."""
    rows = [
        (
            f"`{configs.flag_of(spec.name)}`",
            listed(getattr(config, spec.name)),
            listed(spec.default),
            spec.metadata["help"].replace("|", "\\|"),
        )
        for spec in dataclasses.fields(config)
        if getattr(config, spec.name) != spec.default and not spec.metadata["place"]
    ]
    if not rows:
        return ""
    return (
        "\n\nSettings that differ from the defaults:\n\n"
        f"{table(('flag of train.py', 'here', 'default', 'what it is'), rows)}"
    )


def certificates(facts: Facts) -> str:
    rows = [
        (
            name(found.get("what", "?")),
            " -> ".join(number(found.get(f"loss_{side}"), ".5f") for side in ("before", "after")),
            number((found.get("measured_on") or {}).get("conversations"), ",d"),
            number(found.get("greedy_equal"), "g"),
            "yes" if found.get("within_tolerance") is True else "no",
        )
        for found in facts.certificates
        if "loss_after" in found  # a run that is published as it is has nothing to compare
    ]
    if not rows:
        return ""
    heads = ("export", "loss", "conversations", "equal greedy answers, %", "within tolerance")
    return (
        "## Certificates\n\nWhat the export did to the model, measured on the files as they were"
        f" read back.\n\n{table(heads, rows)}"
    )


def chain(facts: Facts) -> str:
    said = {
        "data_fingerprint": "data: every token id, mask and picture",
        "base_fingerprint": "base: its config.json and weights",
        "vision_fingerprint": "picture encoder: its files, and how it is read",
        "started_from": "weights that the training began with",
        "steps_digest": "steps: loss, gradient norm and place of each",
        "chain": "log, up to the last step",
        "weights_digest": "weights: every trained tensor",
    }
    rows = [(words, f"{name(facts.chain[key])}") for key, words in said.items() if facts.chain[key]]
    return (
        f"## Where it comes from\n\nSha256 digests, after step {facts.saved.step:,}. Exports of"
        " these weights, and a server that answers with them (`/v1/models`), name the same ones;"
        f" `python checkpoints.py verify` computes them again.\n\n{table(('of', 'digest'), rows)}"
    )


def licensing(facts: Facts) -> str:
    if facts.license != "unknown":
        return (
            f"## License\n\n{name(facts.license)}, which is the base's or was given by the person"
            " who made this card."
        )
    return (
        "## License\n\nUnknown: the weights carry the license of their base, whose card did not lie"
        " where this one was made. Whoever publishes this names it with `--license`, such as"
        " `--license mit`."
    )


SECTIONS: Sequence[Callable[[Facts], str]] = (
    usage,
    limits,
    evaluation,
    curves,
    data,
    recipe,
    certificates,
    chain,
    licensing,
)
