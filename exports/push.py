"""A run onto the Hugging Face hub, to be asked by its name there: `hf:owner/name`.

What goes up is the run as strangers get it (`exports.published`), and beside it, for PEFT alone,
the adapter in PEFT's own form: `PeftModel.from_pretrained(base, "owner/name")` works then too, and
the hub's page knows the repository for an adapter of its base. The adapter is there twice for that,
as PEFT reads no other form; whoever fetches the run leaves those files there.

Without --yes nothing is sent, and the hub is not asked for anything.
"""

from __future__ import annotations

import argparse
import contextlib
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import checkpoints
import config as configs
import config_values
import hub
from assistant.assistant import Assistant
from assistant.flags import load_assistant
from checkpoint_state import Checkpoint
from errors import PhiSightError, printable
from exports.alignment import alignment_line, alignment_of_run, check_alignment
from exports.folder import new_folder, write_generation_config, write_json
from exports.form import Form, typed
from exports.measured import DATA_FIELDS
from exports.peft_adapter import write_peft
from exports.published import CERTIFICATE, without_paths, write_published
from exports.upload import account, files_of, upload
from hub import File
from paths import command

LONGEST_MESSAGE = 200
REMEDY = "give --push owner/name, with your name on the hub or that of an organisation"


def run_push(options: argparse.Namespace) -> str:
    """`export.py --push OWNER/NAME`: what would go up, or with --yes what went."""
    repository = options.push
    hub.check_repository(repository, "--push", REMEDY)
    if options.branch:
        hub.check_revision(options.branch, f"--branch {printable(options.branch, 100)}")
    if options.message is not None and not 0 < len(options.message.strip()) <= LONGEST_MESSAGE:
        raise PhiSightError(f"--message: must have 1 to {LONGEST_MESSAGE} characters")
    user = account() if options.yes else ""  # before a minute goes into measuring
    assistant = load_assistant(options)
    assistant.config = configs.replace(
        assistant.config, **typed(options, (*DATA_FIELDS, "evaluation_conversations"))
    )
    alignment = without_paths(alignment_of_run(assistant, options.greedy_answers), assistant.config)
    check_alignment(alignment, options.require_alignment, "push")
    with _folder(options.out) as folder:
        published = write_repository(folder, assistant, repository, alignment, options)
        message = options.message or f"Step {published.step:,}"
        files = files_of(folder)
        lines = [alignment_line(alignment), *_listed(files)]
        if not options.yes:
            kind = "private" if options.private else "public"
            return "\n".join(
                [
                    *lines,
                    f"would go to {repository} ({kind} if it is new), branch"
                    f" {options.branch or 'main'}, in one commit {message!r}; a checkpoint of"
                    " another step there would be removed with it. Nothing was sent: --yes does it",
                ]
            )
        commit = upload(
            repository,
            folder,
            files,
            branch=options.branch,
            message=message,
            private=options.private,
            user=user,
        )
    name = hub.Reference(repository, commit)
    return "\n".join(
        [
            *lines,
            f"{repository}: in one commit, {commit}; the hub has the sizes and hashes above",
            f'{command("infer.py")} --run {name} --prompt "..."',
        ]
    )


def write_repository(
    folder: Path,
    assistant: Assistant,
    repository: str,
    alignment: dict[str, Any],
    options: argparse.Namespace,
) -> Checkpoint:
    """Write all that goes up into an empty folder; the checkpoint as it is there."""
    checkpoint = checkpoints.resolve(assistant.source)
    config = config_values.from_dict(checkpoint.config["config"], checkpoint.name)
    config = configs.replace(config, **typed(options, ("base", "vision")))
    family = assistant.parts.base.family
    said = {"what": "run", "provenance": assistant.provenance, "alignment": alignment}
    published = write_published(
        folder, checkpoint, [said], repository, config, assistant.license, family.model_type
    )
    write_json(folder / CERTIFICATE, said)
    public = config_values.from_dict(published.config["config"], published.name)
    if public.merge_rounding == "none":  # else there is no adapter that PEFT could add
        named = configs.replace(public, base=published.config["config"]["base"])  # as all find it
        base, state = assistant.parts.base, published.state["lora_weights"]
        write_peft(folder, state, base.model.config, not family.is_fused, named)
        write_generation_config(assistant, folder)
    return published


@contextlib.contextmanager
def _folder(out: str | None) -> Iterator[Path]:
    """Where to write: a folder that stays if all goes well, or one that goes."""
    if out:
        with new_folder(out) as folder:
            yield folder
        return
    try:
        with tempfile.TemporaryDirectory(prefix="phisight-push-") as temporary:
            folder = Path(temporary) / "run"
            folder.mkdir()
            yield folder
    except OSError as error:
        raise PhiSightError(
            f"--push: the folder to send was not written ({error.strerror or error}); make room, or"
            " give another place with --out"
        ) from error


def _listed(files: Sequence[File]) -> list[str]:
    """A line for each file, and one for them all."""
    total = sum(file.size for file in files)
    return [
        *(f"{file.size:>13,}  {file.sha256}  {file.name}" for file in files),
        f"{total:>13,}  bytes in {len(files)} files",
    ]


FORM = Form(
    run_push,
    {
        "metavar": "OWNER/NAME",
        "help": "the run onto the Hugging Face hub; without --yes what would go up is only listed",
    },
    {
        "--yes": {"action": "store_true", "help": "with --push: send it"},
        "--private": {
            "action": "store_true",
            "help": "with --push: a new repository is for you alone",
        },
        "--branch": {
            "default": "",
            "help": "with --push: a branch of the repository (default: main)",
        },
        "--message": {"help": "with --push: what the commit says"},
    },
    carries_pictures=True,
)
