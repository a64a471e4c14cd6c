"""The model card: what a run is, made of its checkpoint and its log alone.

A card is a README.md: the head that the Hugging Face hub reads, then what was trained, on what and
how, what was measured, and what the model cannot do. Nothing in it is written by hand, and paths of
the machine that trained are left out. `provenance` is the chain that ties it all together: the
data, the steps, the weights. Every export and every server says the same one.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import config_values
from config import Config
from documents import read_json
from errors import PhiSightError, printable
from files import read_regular
from hub import check_repository
from reports import card_sections as sections
from reports.card_forms import FORMS
from reports.card_sections import Facts
from reports.card_sections import hub_id as hub_id
from reports.chain import provenance as provenance  # others call it by this module
from reports.chain import records_to
from reports.compare import Saved
from reports.log import without_abandoned
from reports.markdown import LONGEST, name

CARD = "README.md"
UNKNOWN = "unknown"  # the hub's own word for a license that nobody knows
LICENSE_ID = re.compile(r"[a-z0-9][a-z0-9.+-]{0,63}")
# As the head of the base's own card has it. A name alone: a list or a text is not one to take over.
_LICENSE_LINE = re.compile(r"^license:[ \t]*[\"']?([A-Za-z0-9.+-]+)[\"']?[ \t]*$", re.MULTILINE)
CARD_BYTES = 2**20  # of a base's card
MODEL_TYPE = re.compile(r"[a-z0-9][a-z0-9_]{0,63}")


# -- the license ----------------------------------------------------------------------------------


def license_id(given: str) -> str:
    """A license as the hub names it. Raises `PhiSightError` for what is not such a name."""
    if not LICENSE_ID.fullmatch(given):
        raise PhiSightError(
            f"--license {printable(given, LONGEST)!r}: not an id of the hub; give one such as mit"
            " or apache-2.0"
        )
    return given


def license_of_base(config: Config) -> str:
    """The license that the base's own card names, where one lies in its folder or in the hub's
    cache on this machine; else "". Nothing is downloaded."""
    card = _beside_base(config, CARD)
    try:
        text = read_regular(card, CARD_BYTES).decode("utf-8", "replace") if card else ""
    except OSError:  # a base without a card, or one too long to be one
        return ""
    head = text.split("\n---", 1)[0] if text.startswith("---") else ""
    match = _LICENSE_LINE.search(head)
    license = match[1].lower() if match else ""
    return license if LICENSE_ID.fullmatch(license) else ""


def model_type_of_base(config: Config) -> str:
    """The `model_type` of the base's config.json, such as "qwen3", found as `license_of_base` finds
    the card; else ""."""
    described = _beside_base(config, "config.json")
    try:
        found = read_json(described, own=False).get("model_type") if described else ""
    except (OSError, PhiSightError):  # a card is made of what is there
        return ""
    return found if isinstance(found, str) and MODEL_TYPE.fullmatch(found) else ""


def _beside_base(config: Config, file: str) -> Path | None:
    """Where a file of the base lies on this machine, if the base is here."""
    if hub_id(config.base):
        from huggingface_hub import try_to_load_from_cache

        found = try_to_load_from_cache(config.base, file, revision=config.base_revision or None)
        return Path(found) if isinstance(found, str) else None
    return Path(config.base) / file if config.base and Path(config.base).is_dir() else None


# -- the card -------------------------------------------------------------------------------------


def model_card(
    saved: Saved,
    records: Sequence[Mapping[str, Any]],
    certificates: Sequence[Mapping[str, Any]] = (),
    repository: str = "",
    form: str = "run",
    license: str = "",
    model_type: str = "",
) -> str:
    """The README.md of a run or of what was exported of it, made of checkpoint and log alone.

    Args:
        saved: the run's checkpoint.
        records: its log, of which what comes after the checkpoint is left out; may be empty.
        certificates: of exports of these weights, as `exports.measure` makes them.
        repository: owner/name on the hub, if it has one.
        form: what the folder is, a name of `FORMS`.
        license: an id of the hub such as "mit"; empty for what `license_of_base` finds.
        model_type: of the base, such as "qwen3"; empty for what `model_type_of_base` finds.

    Raises:
        PhiSightError: the checkpoint is not that of a run, the log is of another one, or a name is
            not one of the hub.
    """
    if repository:
        check_repository(repository, "the model card", "give owner/name")
    known = records_to(saved, records)
    config = config_values.from_dict(saved.config["config"], str(saved.path))
    facts = Facts(
        config=config,
        saved=saved,
        records=without_abandoned(known),
        form=FORMS[form],
        title=repository.rpartition("/")[2] or Path(config.run).name or "run",
        repository=repository,
        license=license_id(license) if license else license_of_base(config) or UNKNOWN,
        model_type=model_type or model_type_of_base(config),
        chain=provenance(saved, known),
        certificates=certificates,
    )
    parts = [
        f"# {name(facts.title)}",
        sections.opening(facts),
        *(part for part in (section(facts) for section in sections.SECTIONS) if part),
    ]
    return f"---\n{head_of(facts)}\n---\n\n" + "\n\n".join(parts) + "\n"


def head_of(facts: Facts) -> str:
    """The YAML that the hub reads, without its marks."""
    from huggingface_hub import EvalResult, ModelCardData  # 0.1 s, for cards alone

    task, config = facts.form.task, facts.config
    results = [
        EvalResult(
            task_type=task,
            dataset_type="validation",
            dataset_name="validation conversations of the run",
            dataset_args={"data_fingerprint": facts.chain["data_fingerprint"]},
            metric_type=kind,
            metric_name=said,
            metric_value=value,
        )
        for kind, said, value in sections.metrics(facts)
    ]
    base = hub_id(config.base)
    more: dict[str, Any] = {"base_model_relation": facts.form.relation} if base else {}
    data = ModelCardData(
        license=facts.license,
        base_model=base or None,
        library_name=facts.form.library,
        pipeline_tag=task,
        tags=sections.tags(facts),
        # Each of them is asked for by the other.
        model_name=printable(facts.title, LONGEST) if results else None,
        eval_results=results or None,
        **more,
    )
    return data.to_yaml()
