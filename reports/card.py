"""The model card: what a run is, made of its checkpoint and its log alone.

A card is a README.md: the head that the Hugging Face hub reads, then what was trained, on what and
how, what was measured, and what the model cannot do. Nothing in it is written by hand, and paths of
the machine that trained are left out. `provenance` is the chain that ties it all together: the
data, the steps, the weights. Every export and every server says the same one.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import config as configs
from config import Config
from errors import PhiSightError
from manifest import digest_in
from reports.compare import Saved
from reports.log import CHAIN, chain_problems, contradictions
from reports.markdown import name

CARD, CURVES = "README.md", "curves.png"
UNKNOWN = "unknown"  # the hub's own word for it
ROWS = 10  # of the tables over steps
FEW_STEPS = 100
SMALL_GAP = 10.0  # points between the right picture and a swapped one
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}(/[A-Za-z0-9][\w.-]{0,95})?", re.ASCII)
LICENSE_ID = re.compile(r"[a-z0-9][a-z0-9.+-]{0,63}")
ASSETS = "assets/"  # of this project: whoever has it has what lies there


@dataclass(frozen=True)
class Form:
    """What a folder that gets a card is."""

    what: str
    """ends the sentence "This folder holds ..." """
    library: str
    task: str
    relation: str
    """to the base, in the hub's words"""
    usage: str
    """code that asks the model; {where} is the folder's or the repository's name"""


_TEXT = """```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{where}")
tokenizer = AutoTokenizer.from_pretrained("{where}")
messages = [{{"role": "user", "content": "Hello"}}]
ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt")
print(tokenizer.decode(model.generate(**ids)[0]))
```"""
_PIPELINE = """```python
from transformers import pipeline

ask = pipeline("image-text-to-text", model="{where}")
content = [{{"type": "image", "path": "picture.png"}}, {{"type": "text", "text": "What is there?"}}]
print(ask([{{"role": "user", "content": content}}]))
```"""
_PEFT = """```python
from peft import PeftModel

model = PeftModel.from_pretrained(base, "{where}")  # base: the model it was trained over, loaded
```"""
_RUN = """```sh
python infer.py --run {where} --image picture.png --prompt "What is there?"
```"""
FORMS = {
    "run": Form(
        "a run of PhiSight: the adapter and the projector, with the log of their training",
        "phisight",
        "image-text-to-text",
        "adapter",
        _RUN,
    ),
    "peft": Form("the adapter in PEFT's form", "peft", "text-generation", "adapter", _PEFT),
    "merge": Form(
        "the language model with the adapter merged: it reads text, and sees no pictures",
        "transformers",
        "text-generation",
        "finetune",
        _TEXT,
    ),
    "requantize": Form(
        "the language model with the adapter merged, in 4 bits: it reads text, and sees no"
        " pictures",
        "transformers",
        "text-generation",
        "quantized",
        _TEXT,
    ),
    "prune": Form(
        "the language model with the adapter merged and channels cut out: it reads text, and sees"
        " no pictures",
        "transformers",
        "text-generation",
        "finetune",
        _TEXT,
    ),
    "llava": Form(
        "the whole model as `LlavaForConditionalGeneration`, with its CLIP and its processor",
        "transformers",
        "image-text-to-text",
        "finetune",
        _PIPELINE,
    ),
}
"""by what a certificate calls it"""


# -- the chain ------------------------------------------------------------------------------------


def provenance(saved: Saved, records: Sequence[Mapping[str, Any]] = ()) -> dict[str, Any]:
    """One chain from the data to the weights, as JSON holds it: sha256 digests, and the step.

    Args:
        saved: a checkpoint of a run.
        records: its log, which may go on after the checkpoint; without it the checkpoint alone is
            asked, which was verified when it was read.

    Returns:
        "data_fingerprint", "base_fingerprint", "vision_fingerprint", "step", "steps_digest" (over
        every step's loss, gradient norm and place), "chain" (of the last record of the log up to
        the checkpoint), "weights_digest", and "started_from", the weights digest of the run whose
        weights this one began with. None for what the checkpoint does not say, as an imported one.

    Raises:
        PhiSightError: the log and the checkpoint contradict each other.
    """
    records_to(saved, records)
    config, state = saved.config, saved.trainer_state
    return {
        "data_fingerprint": config.get("data_fingerprint"),
        "base_fingerprint": config.get("base_fingerprint"),
        "vision_fingerprint": config.get("vision_fingerprint"),
        "step": saved.step,
        "steps_digest": state.get("steps_digest") or None,
        CHAIN: state.get(CHAIN) or None,
        "weights_digest": digest_in(saved.manifest),
        "started_from": (config.get("started_from") or {}).get("weights_digest"),
    }


def records_to(saved: Saved, records: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The records of the log up to the checkpoint. Raises `PhiSightError` where it is the log of
    another run, or was edited."""
    chain = saved.trainer_state.get(CHAIN, "")
    links = [record.get(CHAIN) for record in records]
    known = list(records[: links.index(chain) + 1]) if chain in links else []
    wrong = chain_problems(known)
    if not wrong and records and chain:
        wrong = contradictions(known, saved.step, chain, digest_in(saved.manifest))
    if wrong:
        raise PhiSightError(
            f"{saved.path}: {wrong[0]}; put back the log that belongs to this run, or the"
            " checkpoint that does"
        )
    return known


# -- the card -------------------------------------------------------------------------------------


def model_card(
    saved: Saved,
    records: Sequence[Mapping[str, Any]],
    certificates: Sequence[Mapping[str, Any]] = (),
    repository: str = "",
    form: str = "run",
    license: str = "",
) -> str:
    """The README.md of a run or of what was exported of it, made of checkpoint and log alone.

    Args:
        saved: the run's checkpoint.
        records: its log, of which what comes after the checkpoint is left out; may be empty.
        certificates: of exports of these weights, as `exports.measure` makes them.
        repository: owner/name on the hub, if it has one.
        form: what the folder is, a name of `FORMS`.
        license: an id of the hub such as "mit"; empty if it is not known.

    Raises:
        PhiSightError: the checkpoint is not that of a run, the log is of another one, or a name is
            not one of the hub.
    """
    if repository and not HUB_ID.fullmatch(repository):
        raise PhiSightError(f"{repository!r}: not a name on the hub; give it as owner/name")
    if license and not LICENSE_ID.fullmatch(license):
        raise PhiSightError(
            f"--license {license!r}: not an id of the hub; give one such as mit or apache-2.0"
        )
    known = records_to(saved, records)
    config = configs.from_dict(saved.config["config"], str(saved.path))
    kind = FORMS[form]
    title = repository.rpartition("/")[2] or Path(config.run).name or "run"
    parts = [
        f"# {name(title)}",
        f"This folder holds {kind.what}.",
    ]
    return f"---\n{_head(config, kind, title, known, license)}\n---\n\n" + "\n\n".join(parts) + "\n"


def hub_id(base: str) -> str:
    """The id of a model on the hub, or "" for what lies in a folder."""
    return base if HUB_ID.fullmatch(base) and not Path(base).exists() else ""


def _head(
    config: Config,
    kind: Form,
    title: str,
    records: Iterable[Mapping[str, Any]],
    license: str,
) -> str:
    """The YAML that the hub reads, without its marks."""
    from huggingface_hub import ModelCardData  # a tenth of a second, for cards alone

    data = ModelCardData(
        license=license or UNKNOWN,
        base_model=hub_id(config.base) or None,
        library_name=kind.library,
        pipeline_tag=kind.task,
        tags=["phisight"],
    )
    return data.to_yaml()
