"""What makes a resumed run equal, bit for bit, one that was never stopped."""

from __future__ import annotations

import importlib.metadata
import os
import sys
from collections.abc import Callable, Mapping
from typing import Any

import numpy
import safetensors
import tokenizers
import torch

import config as configs
import config_values
from config import Config
from data.prepare import TrainingData
from errors import PhiSightError
from model.build import Assembled
from model.devices import name_of
from reports.compare import compare_configs
from training.progress import Progress
from training.ranks import Ranks

OTHER_WEIGHTS = {"config.projector", "config.projector_queries"}  # fit into no other's
ARITHMETIC = "2026-11-28"
"""Since when this code computes the bits of a step as it does: set it anew with every change that
rounds otherwise, and a run that was begun before is not gone on with as if nothing had changed."""
FORMER_ARITHMETIC = "before 2026-11-28"  # of checkpoints that do not say


def choose_algorithms(deterministic: bool) -> None:
    """The same bits every time, or whatever is fastest on a GPU."""
    # torch refuses matrix products in deterministic mode unless cuBLAS was told, before its first
    # use, to work in buffers of a fixed size.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    # What `torch.use_deterministic_algorithms` sets, without that function's import of the compiler
    # of torch, which nothing here uses and which takes a third of the start of a training.
    torch.set_deterministic_debug_mode("error" if deterministic else "default")
    # That mode also fills every new tensor, in case something reads what it has not written: a
    # sixth of a step on a CPU.
    deterministic_mode: Any = torch.utils.deterministic  # whose type stub lacks the setting
    deterministic_mode.fill_uninitialized_memory = False
    # `ops.cuda` has flash attention by conversation, whose backward adds in a fixed order in this
    # mode. Where a GPU or a type has only `ops.plain`, torch could take memory-efficient attention,
    # whose backward adds in the order in which blocks finish. By torch's source it does not in this
    # mode, but that was never tried here: without it the formula is left, a matrix a conversation.
    torch.backends.cuda.enable_mem_efficient_sdp(not deterministic)


def describe_run(
    config: Config,
    parts: Assembled,
    data: TrainingData,
    total_steps: int,
    ranks: Ranks,
    started_from: dict[str, Any] | None,
) -> dict[str, Any]:
    """What a checkpoint's config.json says: the config and the facts exactness rests on."""
    return {
        "config": config_values.to_dict(config),
        "base_fingerprint": parts.base.fingerprint,
        "tokenizer_fingerprint": parts.base.tokenizer.fingerprint,
        "vision_fingerprint": parts.vision.key,
        "picture_tokens": parts.chat_format.tokens_per_image,
        "data_fingerprint": data.fingerprint,
        "data_counts": data.counts(),
        "compute_dtype": str(parts.base.compute_dtype).removeprefix("torch."),
        "device": parts.device.type,
        "threads": torch.get_num_threads(),
        "total_steps": total_steps,
        "world_size": ranks.size,
        "versions": {
            "phisight_arithmetic": ARITHMETIC,
            "python": ".".join(map(str, sys.version_info[:3])),
            "torch": torch.__version__,
            "transformers": importlib.metadata.version("transformers"),
            "tokenizers": tokenizers.__version__,
            "safetensors": safetensors.__version__,
            "bitsandbytes": importlib.metadata.version("bitsandbytes"),
            "numpy": numpy.__version__,
        },
        "processor": name_of(parts.device),
        "started_from": started_from,
    }


def changed_fields(saved: Mapping[str, Any], current: Mapping[str, Any], *free: str) -> list[str]:
    """A sentence for each difference of two descriptions of a run that the result depends on.

    `free`: dotted names of more fields that may differ.
    """
    without = set(configs.fields_without_effect())
    if current["config"].get("on_spike") == configs.ROLLBACK:
        without.remove("save_steps")  # which say what a rollback goes back to
    without_effect = (f"config.{name}" for name in without)
    # As this version would write it: with what describes the checkpoints of before a field.
    written = config_values.to_dict(config_values.from_dict(saved["config"], "the checkpoint"))
    # These follow from what is compared: counts from the data, a picture's tokens from the encoder
    # and the projector. Checkpoints of former versions have none, and none of the tokenizer.
    ignored = ("data_counts", "picture_tokens", *without_effect, *free)
    if "tokenizer_fingerprint" not in saved:
        ignored += ("tokenizer_fingerprint",)
    return compare_configs({**saved, "config": written}, dict(current), ignored)


def check_same_run(
    saved: Mapping[str, Any],
    current: Mapping[str, Any],
    allow_changes: bool,
    say: Callable[[str], None] = print,
) -> list[str]:
    """Stop, naming the fields, where going on would not be exact; with `allow_changes`, say so, and
    return them.

    Another number of processes is allowed: samples, order and global batch stay the same. So is
    another place of base, encoder, data or pictures: their fingerprints are compared.
    """
    free = tuple(
        f"config.{name}"
        for name, fact in configs.fields_known_by_facts().items()
        if saved.get(fact) == current[fact]
    )
    if saved.get("world_size") != current["world_size"]:
        free += ("world_size", "threads", "config.threads")
        say(
            f"saved on {saved.get('world_size')} processes, resumed on {current['world_size']}:"
            " same samples, order and global batch; sums are taken in another order, so losses"
            " agree to rounding and not to the bit"
        )
    versions = {"phisight_arithmetic": FORMER_ARITHMETIC} | saved.get("versions", {})
    changes = changed_fields({**saved, "versions": versions}, current, *free)
    if not changes:
        return []
    listed = "; ".join(changes)
    if not allow_changes:
        fits = not OTHER_WEIGHTS & {change.partition(":")[0] for change in changes}
        otherwise = (
            "go on all the same with --allow-changes" if fits else "begin another with --run"
        )
        raise PhiSightError(
            f"--resume: would not be exact, these differ: {listed}; restore them, or {otherwise}"
        )
    say(f"warning: the resumed run is not exact, these differ: {listed}")
    return changes


def check_place(progress: Progress, total_steps: int) -> None:
    """Stop where changes that a person allowed leave nothing to do after the saved place."""
    if progress.step >= total_steps:
        raise PhiSightError(
            f"--resume: the checkpoint stands at step {progress.step} (epoch {progress.epoch}, row"
            f" {progress.row}), the changed run ends at step {total_steps}; ask for more --epochs"
            " or --max-steps"
        )
