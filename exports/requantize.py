"""The merged model in 4 bits again, without the loss that rounding it once more would cost.

Rounding merged weights to NF4 (arXiv:2305.14314) throws away much of what the adapter learnt: its
update is smaller than the steps of the grid. GPTQ (arXiv:2210.17323) goes through a layer's inputs
one after another, rounds their weights, and corrects those not yet rounded so that the layer's
output changes least on calibration inputs; here its grid is NF4's, with the usual scale for every
block. The result is a plain 4-bit model: no adapter and no extra tensor.

A run that was trained with `--merge-rounding nf4` is on the grid already, and is written as it is.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import BitsAndBytesConfig

from assistant.assistant import Assistant
from data.collate import Batch
from exports import measure
from exports.calibrate import (
    calibration_batches,
    damped,
    input_moments,
    language_model_in,
    merged_assistant,
)
from exports.folder import (
    copy_tokenizer,
    hub_config,
    new_folder,
    read_tensors,
    rounded_state,
    write_generation_config,
)
from exports.form import Form, folder_to_write
from exports.generated import measured_folder
from exports.measure import Measured, Probe, Tolerance
from exports.measured import GREEDY_EQUAL_IN_4_BITS, export_measured
from model.base import BaseModel, find_folder, finish, swap_linear_layers
from model.decoder import DecoderConfig, LanguageModel
from ops.nf4 import PanelLinear, block_of, quant_state, uses_panels
from ops.nf4_grid import LEAST_SCALE, FourBit, nearest, round_to_nearest, table, unpacked

CERTIFICATE = "requantize_certificate.json"
WEIGHTS = "model.safetensors"
SHARE = 0.25  # of the naive increase that the compensated one should stay under


def round_with_compensation(weight: Tensor, moment: Tensor, block: int) -> FourBit:
    """GPTQ on the NF4 grid: `moment` is the (inputs, inputs) sum of x x^T of the layer's inputs.

    With H = moment and U the upper Cholesky factor of its inverse, rounding column j by `error`
    is paid back by the columns after it: W[:, j+1:] -= error / U[j, j] * U[j, j+1:]. Columns with
    the largest inputs come first, while there are many left to pay; the blocks keep the scales of
    naive rounding, so that the order of rounding need not be the order of storing.
    """
    grid, naive = table(weight.device), round_to_nearest(weight, block)
    order = moment.diagonal().argsort(descending=True)
    weight = weight[:, order].clone()
    scales = naive.scales.repeat_interleave(block, 1)[:, order]
    divisors = scales.clamp(min=LEAST_SCALE)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped(moment[order][:, order])))
    factor = torch.linalg.cholesky(inverse, upper=True).float()
    codes = torch.empty_like(naive.codes)
    for start in range(0, weight.shape[1], block):  # in blocks: one large product for what is after
        here = slice(start, start + block)
        columns, own = weight[:, here], factor[here, here]
        scale, divisor = scales[:, here], divisors[:, here]
        errors = torch.empty_like(columns)
        for j in range(block):
            code = nearest(columns[:, j] / divisor[:, j])
            codes[:, order[start + j]] = code
            errors[:, j] = (columns[:, j] - grid[code.long()] * scale[:, j]) / own[j, j]
            columns[:, j + 1 :] -= errors[:, j, None] * own[j, None, j + 1 :]
        weight[:, start + block :] -= errors @ factor[here, start + block :]
    return FourBit(codes, naive.scales)


def export_requantized(
    assistant: Assistant,
    out: str | Path,
    dtype: torch.dtype,
    probe: Probe,
    tolerance: Tolerance | None,
    conversations: int,
) -> dict[str, Any]:
    """Merge, round to NF4, write in bitsandbytes' own form, read back, measure.

    `dtype` is that of what stays in 16 bits: embeddings, norms, `lm_head`. The certificate, which
    is returned, says how it was rounded: see `with_compensation` and `as_trained`.

    Raises:
        PhiSightError: as `exports.merge.export_merged`, and for layers that NF4 cannot take.
    """
    config, base = assistant.config, assistant.parts.base
    base_folder = find_folder(config.base, config.base_revision or None)
    on_grid = config.merge_rounding != "none"
    batches = [] if on_grid else calibration_batches(assistant, probe, conversations)
    with new_folder(out) as folder:
        before = measure.measure(assistant, probe, "before")
        changed = merged_assistant(assistant)
        empty = empty_four_bit(base.model.config, dtype)
        blocks = {name: block_of(layer) for name, layer in four_bit_layers(empty)}
        if on_grid:
            quantised, facts = as_trained(changed, blocks)
        else:
            quantised, facts = with_compensation(changed, blocks, batches, probe, before)
            facts["calibration"]["conversations"] = conversations
        weights = language_model_in(changed).state_dict()
        write_four_bit(folder, base, empty, quantised, weights, dtype)
        copy_tokenizer(base_folder, folder, assistant.parts.chat_format)
        write_generation_config(assistant, folder)
        after = measured_folder(assistant, read_back(assistant, folder).parts.base, probe, folder)
        if naive := facts.get("naive"):
            least = SHARE * naive["loss_difference"]
            facts["under_a_quarter_of_naive"] = after.loss - before.loss < least
        return measure.certify(
            folder / CERTIFICATE,
            "requantize",
            assistant,
            probe,
            before,
            after,
            tolerance,
            dtype=f"nf4, {str(dtype).removeprefix('torch.')} for the rest",
            **facts,
        )


Rounded = tuple[dict[str, FourBit], dict[str, Any]]
"""(layers by name, what a certificate says of how they were rounded)"""


def as_trained(changed: Assistant, blocks: Mapping[str, int]) -> Rounded:
    """Round to the nearest point what a training with `--merge-rounding` had rounded already: the
    weights stay as they are. Whether they did, to the bit, stands in the certificate."""
    model = language_model_in(changed)
    quantised = {
        name: round_to_nearest(weight_of(model, name), block) for name, block in blocks.items()
    }
    return quantised, {
        "method": "to the nearest point of the NF4 grid, on which the run was trained",
        "weights_equal": all(
            torch.equal(four_bit.weight(), weight_of(model, name))
            for name, four_bit in quantised.items()
        ),
    }


def with_compensation(
    changed: Assistant,
    blocks: Mapping[str, int],
    batches: Sequence[Batch],
    probe: Probe,
    before: Measured,
) -> Rounded:
    """GPTQ, decoder layer by decoder layer, each on what the rounded layers before it make of the
    calibration conversations, which costs a pass over them up to each layer. The certificate has
    what naive rounding gives beside it."""
    naive = measured_naively(changed, blocks, probe)
    return compensate(changed, blocks, batches), {
        "method": "GPTQ (arXiv:2210.17323) on the NF4 grid of the merged weights",
        "calibration": {"of": "training", "tokens": sum(batch.tokens for batch in batches)},
        "naive": {
            "loss_after": naive.loss,
            "loss_difference": naive.loss - before.loss,
            "greedy_equal": measure.equal_percent(before.answers, naive.answers),
        },
    }


def measured_naively(changed: Assistant, blocks: Mapping[str, int], probe: Probe) -> Measured:
    """What rounding the layers of `blocks` without compensation gives; they are put back after."""
    model = language_model_in(changed)
    originals = {name: weight_of(model, name).clone() for name in blocks}
    for name, weight in originals.items():
        put(model, name, round_to_nearest(weight, blocks[name]).weight())
    naive = measure.measure(changed, probe, "naive rounding")
    for name, weight in originals.items():
        put(model, name, weight)
    return naive


def four_bit_layers(model: nn.Module) -> list[tuple[str, bnb.nn.Linear4bit]]:
    return [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, bnb.nn.Linear4bit)
    ]


def empty_four_bit(config: DecoderConfig, dtype: torch.dtype) -> LanguageModel:
    """A model on the meta device with `Linear4bit` where `model.base` puts them."""
    with torch.device("meta"):
        model = LanguageModel(config)
    swap_linear_layers(model, dtype, nested=False)
    return model


def weight_of(model: nn.Module, name: str) -> Tensor:
    """The weight of the layer `name`, not a copy."""
    return model.get_parameter(f"{name}.weight").detach()


def put(model: nn.Module, name: str, weight: Tensor) -> None:
    weight_of(model, name).copy_(weight)


def compensate(
    changed: Assistant, blocks: Mapping[str, int], batches: Sequence[Batch]
) -> dict[str, FourBit]:
    """Round every layer of `blocks`, decoder layer by decoder layer, in place in the model too."""
    model = language_model_in(changed)
    quantised: dict[str, FourBit] = {}
    for number in range(model.config.num_hidden_layers):
        names = [name for name in blocks if name.startswith(f"model.layers.{number}.")]
        moments = input_moments(changed.model, names, batches, number + 1)
        for name, moment in moments.items():
            quantised[name] = round_with_compensation(weight_of(model, name), moment, blocks[name])
            put(model, name, quantised[name].weight())
    return quantised


def packed(name: str, value: FourBit, dtype: torch.dtype) -> dict[str, Tensor]:
    """The tensors that bitsandbytes stores for the weight `name`, by name."""
    scales = value.scales.cpu().flatten().contiguous()
    state = quant_state(scales, value.codes.shape, dtype, value.block)
    return {name: value.packed().cpu()} | {
        f"{name}.{key}": tensor for key, tensor in state.as_dict(packed=True).items()
    }


def stored_parts(base: BaseModel, name: str, value: FourBit) -> dict[str, FourBit]:
    """The weight of the layer `name` as the base's family stores it: whole, or in parts. A row has
    blocks of its own, so that parts are cut without rounding anything again."""
    rows = base.family.stored(f"{name}.weight", base.model.config)
    if not rows:
        return {f"{name}.weight": value}
    sizes = list(rows.values())
    pieces = zip(value.codes.split(sizes), value.scales.split(sizes), strict=True)
    return {part: FourBit(*piece) for part, piece in zip(rows, pieces, strict=True)}


def four_bit_in(tensors: dict[str, Tensor], name: str) -> FourBit:
    """The inverse of `packed`: takes out of `tensors` what belongs to the weight `name`."""
    stats = {
        key.removeprefix(f"{name}."): tensors.pop(key)
        for key in list(tensors)
        if key.startswith(f"{name}.")
    }
    state = bnb.functional.QuantState.from_dict(stats, torch.device("cpu"))
    return unpacked(tensors.pop(name), state.absmax, state.shape)


def write_four_bit(
    folder: Path,
    base: BaseModel,
    empty: LanguageModel,
    quantised: dict[str, FourBit],
    weights: Mapping[str, Tensor],
    dtype: torch.dtype,
) -> None:
    """model.safetensors and config.json as transformers writes a model that is in NF4.

    `weights`: of the whole model by name; what is not in `quantised` is written in `dtype`.
    """
    tied = {"lm_head.weight"} if empty.config.tie_word_embeddings else set()
    left_out = tied | {f"{name}.weight" for name in quantised}
    others = {name: tensor for name, tensor in weights.items() if name not in left_out}
    tensors = rounded_state(others.items(), base, dtype)
    for name, _ in four_bit_layers(empty):
        for part, value in stored_parts(base, name, quantised[name]).items():
            tensors |= packed(part, value, dtype)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    config = hub_config(base, dtype)
    config.quantization_config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=False,
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=["lm_head"],
    ).to_dict()
    config.save_pretrained(folder)


def read_back(assistant: Assistant, folder: Path) -> Assistant:
    """The assistant over the 4-bit model that stands in a folder of ours."""
    base = assistant.parts.base
    model = empty_four_bit(base.model.config, base.compute_dtype)
    tensors = read_tensors(folder / WEIGHTS, "export again")
    for name, layer in four_bit_layers(model):
        weight = f"{name}.weight"
        parts = base.family.stored(weight, base.model.config) or (weight,)
        values = [four_bit_in(tensors, part) for part in parts]
        codes, scales = (
            torch.cat([getattr(value, field) for value in values]) for field in ("codes", "scales")
        )
        whole = packed(weight, FourBit(codes, scales), base.compute_dtype)
        stats = {key.removeprefix(f"{weight}."): whole[key] for key in whole if key != weight}
        layer.weight = bnb.nn.Params4bit.from_prequantized(
            whole[weight], stats, device="cpu", module=layer
        )
        if uses_panels(torch.device("cpu"), base.compute_dtype):  # as the run itself, to the bit
            model.set_submodule(name, PanelLinear.of(layer))
    for name, tensor in base.family.from_stored(tensors, base.model.config).items():
        module_name, _, parameter_name = name.rpartition(".")
        parameter = nn.Parameter(tensor.to(base.compute_dtype), requires_grad=False)
        setattr(model.get_submodule(module_name), parameter_name, parameter)
    finish(model, torch.device("cpu"))
    written = dataclasses.replace(base, model=model, name=str(folder))
    return measure.with_language_model(assistant, written)


def run(options: argparse.Namespace) -> str:
    """`export.py --requantize`."""
    write = partial(export_requantized, conversations=options.calibration)
    usual = Tolerance(greedy_equal=GREEDY_EQUAL_IN_4_BITS)
    return export_measured(options, folder_to_write(options), write, usual)


FORM = Form(
    run,
    {
        "action": "store_true",
        "help": "merged and in NF4 again, rounded with compensation (GPTQ)",
    },
)
