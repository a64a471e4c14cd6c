"""The adapter folded into the base: a plain folder of its family, with proof that it is equal.

The adapter is merged into the *dequantised NF4* weights, in float32, because those are what it was
trained over (QLoRA, arXiv:2305.14314; `lora.merge` says why), and rounded once, on writing.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch

from assistant.assistant import Assistant
from exports import measure
from exports.folder import hub_config, new_folder, rounded_state, write_causal_model
from exports.form import Form, folder_to_write
from exports.generated import measured_folder
from exports.measure import CERTIFICATE, MERGE_METHODS, Probe, Tolerance
from exports.measured import export_measured
from lora.merge import merged_state
from model.base import find_folder, load_base


def export_merged(
    assistant: Assistant,
    out: str | Path,
    dtype: torch.dtype,
    probe: Probe,
    tolerance: Tolerance | None,
) -> dict[str, Any]:
    """Merge, write, read back what was written, measure both, and keep it if they agree.

    The folder holds the language model alone, for programs that read text; pictures need the
    projector too, which `exports.llava` writes. Returns the certificate, which lies in the folder.

    Raises:
        PhiSightError: a weight does not fit into `dtype`, the folder cannot be written, or the
            merged model is past the tolerance. Nothing is left then.
    """
    config, parts = assistant.config, assistant.parts
    base_folder = find_folder(config.base, config.base_revision or None)
    described = hub_config(parts.base, dtype)
    with new_folder(out) as folder:
        before = measure.measure(assistant, probe, "before merging")
        state = rounded_state(merged_state(parts.base.model), parts.base, dtype)
        write_causal_model(folder, described, state, base_folder, assistant)
        del state
        written = load_base(folder, None, parts.base.compute_dtype, parts.device, "none")
        after = measured_folder(assistant, written, probe, folder)
        return measure.certify(
            folder / CERTIFICATE,
            "merge",
            assistant,
            probe,
            before,
            after,
            tolerance,
            dtype=str(dtype).removeprefix("torch."),
            method=MERGE_METHODS[config.merge_rounding],
        )


def run(options: argparse.Namespace) -> str:
    """`export.py --merge`."""
    return export_measured(options, folder_to_write(options), export_merged)


FORM = Form(
    run,
    {
        "action": "store_true",
        "help": "fold the adapter into the base: a plain model of its family",
    },
)
