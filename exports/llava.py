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
from pathlib import Path
from typing import Any

import torch
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
from exports.folder import (
    CHAT_TEMPLATE,
    copy_tokenizer,
    hub_config,
    new_folder,
    rounded,
    write_generation_config,
)
from exports.form import Form, folder_to_write
from exports.generated import answers_as_llava
from exports.measure import CERTIFICATE, MERGE_METHODS, Measured, Probe, Tolerance
from exports.measured import export_measured
from lora.merge import merged_state
from model.base import find_folder, language_model
from model.projector import ImageProjector
from model.vision import load_clip


def export_llava(
    assistant: Assistant,
    out: str | Path,
    dtype: torch.dtype,
    probe: Probe,
    tolerance: Tolerance | None,
) -> dict[str, Any]:
    """Merge, write, read back with transformers, measure both sides, keep it if they agree.

    Returns the certificate. The measurement takes language model and projector from the folder;
    features come from the run's own store on both sides.

    Raises:
        PhiSightError: the run pools its pictures' patches, a weight does not fit into `dtype`, the
            folder cannot be written, or the result is past the tolerance. Nothing is left then.
    """
    config = assistant.config
    if config.vision_features != "patches":
        raise PhiSightError(
            f"--llava: {assistant.source} sees one pooled vector, LLaVA reads patches; export a run"
            " that was trained with --vision-features patches"
        )
    if config.feature_pooling > 1:
        raise PhiSightError(
            f"--llava: {assistant.source} averages {config.feature_pooling} x"
            f" {config.feature_pooling} patches into one token, LLaVA reads every patch; export a"
            " run that was trained with --feature-pooling 1"
        )
    base_folder = find_folder(config.base, config.base_revision or None)
    with new_folder(out) as folder:
        before = measure.measure(assistant, probe, "before exporting")
        llava = llava_of(assistant, dtype)
        llava.save_pretrained(folder)
        del llava
        write_processor(assistant, folder, base_folder)
        write_generation_config(assistant, folder)
        after = Measured(
            validation_loss(read_back(assistant, folder).model, probe.batches),
            answers_as_llava(assistant, probe, folder),
        )
        return measure.certify(
            folder / CERTIFICATE,
            "llava",
            assistant,
            probe,
            before,
            after,
            tolerance,
            dtype=str(dtype).removeprefix("torch."),
            method=MERGE_METHODS[config.merge_rounding],
        )


def llava_of(assistant: Assistant, dtype: torch.dtype) -> LlavaForConditionalGeneration:
    """The merged language model, the projector and the CLIP as one model, on the CPU."""
    parts, spec = assistant.parts, assistant.parts.vision
    vision_config = CLIPVisionConfig.from_pretrained(spec.folder)
    vision_config.dtype = dtype
    config = LlavaConfig(
        vision_config=vision_config,
        text_config=hub_config(parts.base, dtype),
        image_token_index=parts.chat_format.image_id,
        image_seq_length=spec.shape[0],
        projector_hidden_act="gelu",
        vision_feature_layer=spec.layer,
        vision_feature_select_strategy="default",  # without the class token
    )
    config.dtype = dtype
    with torch.device("meta"):
        llava = LlavaForConditionalGeneration(config)
    language = dict(merged_state(parts.base.model))
    head = {"weight": language.pop("lm_head.weight")}
    decoder = {name.removeprefix("model."): tensor for name, tensor in language.items()}
    for module, state in (
        (llava.model.vision_tower, load_clip(spec).state_dict()),
        (llava.model.multi_modal_projector, parts.model.projector.state_dict()),
        (llava.model.language_model, decoder),
        (llava.lm_head, head),
    ):
        written = {name: rounded(name, tensor, dtype) for name, tensor in state.items()}
        module.load_state_dict(written, strict=True, assign=True)
    llava.tie_weights()
    return llava


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


def read_back(assistant: Assistant, folder: Path) -> Assistant:
    """The assistant over the language model and projector that stand in the folder."""
    base = assistant.parts.base
    llava = LlavaForConditionalGeneration.from_pretrained(
        folder, dtype=base.compute_dtype, local_files_only=True
    )
    weights = {f"model.{n}": t for n, t in llava.model.language_model.state_dict().items()}
    weights["lm_head.weight"] = llava.lm_head.weight
    model = language_model(base.model.config, weights.items())
    projector = assistant.model.projector
    copied = ImageProjector(projector.linear_1.in_features, projector.linear_1.out_features)
    copied.load_state_dict(llava.model.multi_modal_projector.state_dict(), strict=True)
    written = dataclasses.replace(base, model=model, name=str(folder))
    return measure.with_language_model(assistant, written, copied)


def run(options: argparse.Namespace) -> str:
    """`export.py --llava DIR`."""
    return export_measured(options, folder_to_write(options, "--llava"), export_llava)


FORM = Form(
    run,
    {
        "metavar": "DIR",
        "help": "the whole model as LlavaForConditionalGeneration, with its processor",
    },
)
