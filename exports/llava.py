"""The whole model with its CLIP as a `LlavaForConditionalGeneration` folder with its processor.

LLaVA-1.5 (arXiv:2310.03744) is the same arithmetic: CLIP patches of one hidden layer, two linear
layers with a GELU between, spliced in where the picture token stands. So nothing is approximated:
in float32 the logits are equal bit for bit, and in 16 bits only rounding differs. transformers
loads the folder with `from_pretrained`, and programs that know the form of llava-hf, such as vLLM,
read the same files.
"""

from __future__ import annotations

import argparse
import dataclasses
from functools import partial
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import save_torch_state_dict
from torch import Tensor
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

from assistant.assistant import Assistant
from data.chat import IMAGE_TOKEN
from errors import PhiSightError
from evaluation.meter import validation_loss
from exports import measure
from exports.alignment import alignment_of, scored
from exports.folder import (
    CHAT_TEMPLATE,
    copy_tokenizer,
    hub_config,
    new_folder,
    rounded,
    rounded_state,
    write_generation_config,
)
from exports.form import Form, folder_to_write
from exports.generated import answers_as_llava
from exports.measure import CERTIFICATE, MERGE_METHODS, Measured, Probe, Tolerance
from exports.measured import export_measured
from exports.peft_adapter import add_adapter, need_adapter, part_sizes, write_peft
from lora.merge import merged_state
from lora.state import lora_state
from model.base import find_folder, language_model
from model.projector import ImageProjector
from model.vision import load_clip

ANSWERED_BY = "transformers' image-text-to-text pipeline, by the folder's own files"
UNMERGED_METHOD = "dequantised NF4 in float32, rounded once; A and B as they were trained"
# Folders within. transformers' Phi-3 has one layer for queries, keys and values, and PEFT adapts
# the layers that are there. vLLM has one too, but takes the adapter of a LLaVA under the names of
# Llama's (`packed_modules_mapping` of its LlavaForConditionalGeneration).
ADAPTERS = {"PEFT": "adapter", "vLLM": "adapter-vllm"}


def export_llava(
    assistant: Assistant,
    out: str | Path,
    dtype: torch.dtype,
    probe: Probe,
    tolerance: Tolerance | None,
    unmerged: bool = False,
) -> dict[str, Any]:
    """Merge, write, read back with transformers, measure both sides, keep it if they agree.

    Returns the certificate. The loss takes language model and projector from the folder, and
    features from the run's own store on both sides. The answers, and what they owe to the picture,
    are those of the folder alone: its CLIP, its processor.

    Args: `unmerged`: write the base without the adapter, and the adapter beside it in `ADAPTERS`;
        what is measured is both together.

    Raises:
        PhiSightError: the run pools its pictures' patches, a weight does not fit into `dtype`, the
            folder cannot be written, or the result is past the tolerance. Nothing is left then.
    """
    check_pictures(assistant, "--llava", "LLaVA")
    if unmerged:
        need_adapter(assistant.config)
    config = assistant.config
    base_folder = find_folder(config.base, config.base_revision or None)
    with new_folder(out) as folder:
        before = measure.measure(assistant, probe, "before exporting")
        llava_config(assistant, dtype).save_pretrained(folder)
        state = llava_state(assistant, dtype, adapter=not unmerged)
        save_torch_state_dict(state, folder, metadata={"format": "pt"})
        del state
        write_processor(assistant, folder, base_folder)
        write_generation_config(assistant, folder)
        if unmerged:
            write_adapters(assistant, folder, str(out))
        adapter = folder / ADAPTERS["PEFT"] if unmerged else None
        loss = validation_loss(read_back(assistant, folder, adapter).model, probe.batches)
        answers = answers_as_llava(assistant, probe, folder, adapter)
        run_sees = alignment_of(assistant, probe, before.answers)
        return measure.certify(
            folder / CERTIFICATE,
            "llava, adapter apart" if unmerged else "llava",
            assistant,
            probe,
            before,
            Measured(loss, answers["right"]),
            tolerance,
            dtype=str(dtype).removeprefix("torch."),
            method=UNMERGED_METHOD if unmerged else MERGE_METHODS[config.merge_rounding],
            answers_after_by=ANSWERED_BY,
            alignment=scored(probe, answers, ANSWERED_BY, run_sees),
        )


def check_pictures(assistant: Assistant, flag: str, program: str) -> None:
    """Raise `PhiSightError` for a run that reads pictures otherwise than LLaVA does, and `program`,
    which `flag` writes for."""
    config = assistant.config
    if config.vision_features != "patches":
        raise PhiSightError(
            f"{flag}: {assistant.source} sees one pooled vector, {program} reads patches; export a"
            " run that was trained with --vision-features patches"
        )
    if config.feature_pooling > 1:
        raise PhiSightError(
            f"{flag}: {assistant.source} averages {config.feature_pooling} x"
            f" {config.feature_pooling} patches into one token, {program} reads every patch; export"
            " a run that was trained with --feature-pooling 1"
        )


def llava_config(assistant: Assistant, dtype: torch.dtype) -> LlavaConfig:
    """Sizes and settings of the folder, with the names of the classes that others look up."""
    parts, spec = assistant.parts, assistant.parts.vision
    vision_config = CLIPVisionConfig.from_pretrained(spec.folder)
    vision_config.dtype = dtype
    text_config = hub_config(parts.base, dtype)
    text_config.architectures = ["Phi3ForCausalLM"]
    config = LlavaConfig(
        vision_config=vision_config,
        text_config=text_config,
        image_token_index=parts.chat_format.image_id,
        image_seq_length=spec.shape[0],
        projector_hidden_act="gelu",
        vision_feature_layer=spec.layer,
        vision_feature_select_strategy="default",  # without the class token
        architectures=["LlavaForConditionalGeneration"],
    )
    config.dtype = dtype
    return config


def llava_state(assistant: Assistant, dtype: torch.dtype, adapter: bool) -> dict[str, Tensor]:
    """Language model, projector and CLIP by the names of llava-hf's own checkpoints: with the
    `adapter` merged, or the base alone, dequantised.

    transformers 5 reads these and the names of its own modules, which it would save. vLLM and older
    programs read these alone: without `vision_model` they would find no CLIP.
    """
    parts = assistant.parts
    language = rounded_state(merged_state(parts.base.model, adapter), parts.base, dtype)
    state = {f"language_model.{name}": tensor for name, tensor in language.items()}
    for place, module in (
        ("vision_tower.vision_model", load_clip(parts.vision)),
        ("multi_modal_projector", parts.model.projector),
    ):
        for name, tensor in module.state_dict().items():
            state[f"{place}.{name}"] = rounded(name, tensor, dtype)
    return state


def write_processor(assistant: Assistant, folder: Path, base_folder: Path) -> None:
    """What turns pictures and chat into the ids and pixels that the model was trained on."""
    parts = assistant.parts
    pads = assistant.config.picture_fit == "pad"
    LlavaProcessor(
        image_processor=(
            LlavaImageProcessorPil.from_pretrained(parts.vision.folder, do_pad=True)
            if pads
            else CLIPImageProcessorPil.from_pretrained(parts.vision.folder)
        ),
        tokenizer=parts.base.tokenizer.full,
        patch_size=CLIPVisionConfig.from_pretrained(parts.vision.folder).patch_size,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,  # the class token, which the strategy drops
        image_token=IMAGE_TOKEN,
        chat_template=CHAT_TEMPLATE,
    ).save_pretrained(folder)
    copy_tokenizer(base_folder, folder)


def write_adapters(assistant: Assistant, folder: Path, base: str) -> None:
    """The adapter over the language model of the folder, in both of `ADAPTERS`; `base`: the name
    that the folder gets."""
    model = assistant.parts.base.model
    state = {
        name.replace("model.", "model.language_model.", 1): tensor
        for name, tensor in lora_state(model).items()
    }
    for program, rows in (("PEFT", {}), ("vLLM", part_sizes(model.config))):
        (folder / ADAPTERS[program]).mkdir()
        write_peft(folder / ADAPTERS[program], state, rows, assistant.config, base)


def read_back(assistant: Assistant, folder: Path, adapter: Path | None) -> Assistant:
    """The assistant over the language model and projector that stand in the folder, with the
    `adapter` merged where it lies apart."""
    base = assistant.parts.base
    llava = LlavaForConditionalGeneration.from_pretrained(
        folder, dtype=base.compute_dtype, local_files_only=True
    )
    if adapter is not None:
        add_adapter(llava, adapter)
    weights = {f"model.{n}": t for n, t in llava.model.language_model.state_dict().items()}
    weights["lm_head.weight"] = llava.lm_head.weight
    model = language_model(base.model.config, weights.items())
    projector = assistant.model.projector
    copied = ImageProjector(projector.linear_1.in_features, projector.linear_1.out_features)
    copied.load_state_dict(llava.model.multi_modal_projector.state_dict(), strict=True)
    written = dataclasses.replace(base, model=model, name=str(folder))
    return measure.with_language_model(assistant, written, copied)


def run(options: argparse.Namespace) -> str:
    """`export.py --llava DIR [--unmerged]`."""
    write = partial(export_llava, unmerged=options.unmerged)
    return export_measured(options, folder_to_write(options, "--llava"), write)


FORM = Form(
    run,
    {
        "metavar": "DIR",
        "help": "the whole model as LlavaForConditionalGeneration, with its processor",
    },
    {
        "--unmerged": {
            "action": "store_true",
            "help": "with --llava: the base alone, and the adapter beside it for PEFT and for vLLM",
        }
    },
    carries_pictures=True,
)
