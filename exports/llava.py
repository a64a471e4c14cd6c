"""The whole model with its encoder as a `LlavaForConditionalGeneration` folder with its processor.

LLaVA-1.5 (arXiv:2310.03744) is the same arithmetic: patches of one hidden layer of an encoder, two
linear layers with a GELU between, spliced in where the picture token stands. So nothing is
approximated: in float32 the logits are equal (bit for bit over Phi-3 and CLIP), and in 16 bits only
rounding differs. transformers loads the folder with `from_pretrained`, and programs that know the
form of llava-hf, such as vLLM, read the same files.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Collection
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from huggingface_hub import save_torch_state_dict
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

from assistant.assistant import Assistant
from errors import PhiSightError
from evaluation.meter import validation_loss
from exports import measure
from exports.alignment import alignment_of, scored
from exports.folder import (
    copy_tokenizer,
    hub_config,
    new_folder,
    rounded,
    rounded_state,
    template_of,
    write_generation_config,
)
from exports.form import Form, folder_to_write
from exports.generated import answers_as_llava
from exports.measure import CERTIFICATE, MERGE_METHODS, Measured, Probe, Tolerance
from exports.measured import export_measured
from exports.peft_adapter import add_adapter, need_adapter, write_peft
from lora.merge import merged_state
from lora.state import lora_state
from model.base import find_folder, find_weight_files, language_model
from model.encoders.clip import ClipConfig
from model.encoders.dinov2 import Dinov2Config
from model.encoders.encoder import EncoderConfig
from model.encoders.siglip import SiglipConfig
from model.projectors import projector_of
from model.vision import PICKLED, VisionSpec, vision_tensors

ANSWERED_BY = "transformers' image-text-to-text pipeline, by the folder's own files"
UNMERGED_METHOD = "dequantised NF4 in float32, rounded once; A and B as they were trained"
# Folders within. PEFT adapts the layers that transformers has, which for Phi-3 is one for queries,
# keys and values. vLLM has one for every family, but takes the adapter of a LLaVA under the names
# of Llama's (`packed_modules_mapping` of its LlavaForConditionalGeneration).
ADAPTERS = {"PEFT": "adapter", "vLLM": "adapter-vllm"}
# The encoders of which transformers' LLaVA makes the same features, with what its checkpoints put
# before the names of their tensors. It leaves out one token in front of the patches, and no
# registers; and it gives an encoder pictures, where NaFlex takes patches.
TOWERS: dict[type[EncoderConfig], str] = {
    ClipConfig: "vision_model.",
    SiglipConfig: "vision_model.",
    Dinov2Config: "",
}


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
    are those of the folder alone: its encoder, its processor.

    Args: `unmerged`: write the base without the adapter, and the adapter beside it in `ADAPTERS`;
        what is measured is both together.

    Raises:
        PhiSightError: LLaVA reads pictures otherwise than the run, a weight does not fit into
            `dtype`, the folder cannot be written, or the result is past the tolerance. Nothing is
            left then.
    """
    check_run(assistant, unmerged)
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


def check_run(assistant: Assistant, unmerged: bool = False) -> None:
    """Raise `PhiSightError` for a run that cannot be such a folder."""
    check_pictures(assistant, "--llava", "LLaVA", TOWERS)
    if unmerged:
        need_adapter(assistant.config)


def check_pictures(
    assistant: Assistant, flag: str, program: str, encoders: Collection[type[EncoderConfig]]
) -> None:
    """Raise `PhiSightError` for a run that reads pictures otherwise than LLaVA does, and `program`,
    which `flag` writes for, or by another encoder than one of `encoders`."""
    config, encoder = assistant.config, assistant.parts.vision.config
    wrong: list[tuple[str, str]] = []  # what is otherwise, and the flag of a training that it takes
    if type(encoder) not in encoders:
        known = " or ".join(one.NAME for one in encoders)
        wrong.append(
            (f"sees by {encoder.NAME}, {program} reads {known} alone", f"--vision of {known}")
        )
    elif config.picture_fit == "pad" and not isinstance(encoder, ClipConfig):
        processor = f"which {program}'s own processor does not"
        wrong.append((f"pads the pictures of a {encoder.NAME}, {processor}", "--picture-fit crop"))
    if config.vision_features != "patches":
        wrong.append(
            (f"sees one pooled vector, {program} reads patches", "--vision-features patches")
        )
    if (side := config.feature_pooling) > 1:
        pooled = f"averages {side} x {side} patches into one token"
        wrong.append((f"{pooled}, {program} reads every patch", "--feature-pooling 1"))
    if config.projector != "mlp":
        made = f"has the projector {config.projector}, {program} reads mlp"
        wrong.append((made, "--projector mlp"))
    if wrong:  # all at once: who trains again wants to do it once
        found, flags = zip(*wrong, strict=True)
        raise PhiSightError(
            f"{flag}: {assistant.source} {'; it '.join(found)}; export a run that was trained with"
            f" {' and '.join(flags)}, or this one with --peft"
        )


def llava_config(assistant: Assistant, dtype: torch.dtype) -> LlavaConfig:
    """Sizes and settings of the folder, with the names of the classes that others look up."""
    parts, spec = assistant.parts, assistant.parts.vision
    whole = AutoConfig.from_pretrained(spec.folder, local_files_only=True)
    vision_config = getattr(whole, "vision_config", whole)  # of a model with a text half, or alone
    vision_config.dtype = dtype
    text_config = hub_config(parts.base, dtype)
    config = LlavaConfig(
        vision_config=vision_config,
        text_config=text_config,
        image_token_index=parts.chat_format.image_id,
        image_seq_length=spec.shape[0],
        projector_hidden_act="gelu",
        vision_feature_layer=spec.layer,
        vision_feature_select_strategy=strategy_of(spec),
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
    parts, spec = assistant.parts, assistant.parts.vision
    language = rounded_state(merged_state(parts.base.model, adapter), parts.base, dtype)
    state = {f"language_model.{name}": tensor for name, tensor in language.items()}
    tower = f"vision_tower.{TOWERS[type(spec.config)]}"
    for name, read in vision_tensors(spec.config, find_weight_files(spec.folder, PICKLED)):
        if not name.endswith(".position_ids"):  # which older versions of transformers wrote
            state[f"{tower}{name}"] = rounded(name, read().float(), dtype)
    for name, tensor in parts.model.projector.state_dict().items():
        state[f"multi_modal_projector.{name}"] = rounded(name, tensor, dtype)
    return state


def strategy_of(spec: VisionSpec) -> Literal["default", "full"]:
    """What transformers does with the token in front of the patches: leaves it out, if there is
    one."""
    return "default" if spec.config.in_front else "full"


def write_processor(assistant: Assistant, folder: Path, base_folder: Path) -> None:
    """What turns pictures and chat into the ids and pixels that the model was trained on."""
    parts, spec = assistant.parts, assistant.parts.vision
    pads = assistant.config.picture_fit == "pad"
    LlavaProcessor(
        image_processor=(
            LlavaImageProcessorPil.from_pretrained(spec.folder, do_pad=True)
            if pads
            else AutoImageProcessor.from_pretrained(
                spec.folder, backend="pil", local_files_only=True
            )
        ),
        tokenizer=parts.base.tokenizer.full,
        patch_size=spec.config.patch_size,
        vision_feature_select_strategy=strategy_of(spec),
        num_additional_image_tokens=spec.config.in_front,  # which the strategy drops
        image_token=parts.chat_format.image_token,
        chat_template=template_of(parts.chat_format),
    ).save_pretrained(folder)
    copy_tokenizer(base_folder, folder, parts.chat_format)


def write_adapters(assistant: Assistant, folder: Path, base: str) -> None:
    """The adapter over the language model of the folder, in both of `ADAPTERS`; `base`: the name
    that the folder gets."""
    base_model = assistant.parts.base
    state = {
        name.replace("model.", "model.language_model.", 1): tensor
        for name, tensor in lora_state(base_model.model).items()
    }
    for program, apart in (("PEFT", not base_model.family.is_fused), ("vLLM", True)):
        (folder / ADAPTERS[program]).mkdir()
        write_peft(
            folder / ADAPTERS[program],
            state,
            base_model.model.config,
            apart,
            assistant.config,
            base,
        )


def read_back(assistant: Assistant, folder: Path, adapter: Path | None) -> Assistant:
    """The assistant over the language model and projector that stand in the folder, with the
    `adapter` merged where it lies apart."""
    base = assistant.parts.base
    llava = LlavaForConditionalGeneration.from_pretrained(
        folder, dtype=base.compute_dtype, local_files_only=True
    )
    if adapter is not None:
        add_adapter(llava, adapter)
    stored = {f"model.{n}": t for n, t in llava.model.language_model.state_dict().items()}
    stored["lm_head.weight"] = llava.lm_head.weight
    weights = base.family.from_stored(stored, base.model.config)
    model = language_model(base.model.config, weights.items())
    width = assistant.parts.vision.shape[1]
    copied = projector_of(assistant.config, width, model.config.hidden_size)
    copied.load_state_dict(llava.model.multi_modal_projector.state_dict(), strict=True)
    written = dataclasses.replace(base, model=model, name=str(folder))
    return measure.with_language_model(assistant, written, copied)


def run(options: argparse.Namespace) -> str:
    """`export.py --llava DIR [--unmerged]`."""
    write = partial(export_llava, unmerged=options.unmerged)
    check = partial(check_run, unmerged=options.unmerged)
    return export_measured(options, folder_to_write(options, "--llava"), write, check=check)


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
