"""The merged model in 4 bits again, without the loss that rounding it once more would cost.

Rounding merged weights to NF4 (arXiv:2305.14314) throws away much of what the adapter learnt: its
update is smaller than the steps of the grid. GPTQ (arXiv:2210.17323) goes through a layer's inputs
one after another, rounds their weights, and corrects those not yet rounded so that the layer's
output changes least on calibration inputs; here its grid is NF4's, with the usual scale for every
block. The result is a plain 4-bit model: no adapter and no extra tensor.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
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
    rounded,
    write_generation_config,
)
from exports.form import Form, folder_to_write
from exports.generated import measured_folder
from exports.measure import Measured, Probe, Tolerance
from exports.measured import GREEDY_EQUAL_IN_4_BITS, export_measured
from model.base import BaseModel, find_folder, finish, swap_linear_layers
from model.decoder import DecoderConfig, LanguageModel

CERTIFICATE = "requantize_certificate.json"
WEIGHTS = "model.safetensors"
SHARE = 0.25  # of the naive increase that the compensated one should stay under


@dataclass(frozen=True)
class FourBit:
    """An (outputs, inputs) weight on the NF4 grid."""

    codes: Tensor
    """(outputs, inputs) uint8, 0 to 15: places in the table of NF4"""
    scales: Tensor
    """(outputs, blocks) float32: what a block's codes are multiplied by"""

    def weight(self) -> Tensor:
        """What the layer multiplies by, (outputs, inputs) float32."""
        size = self.codes.shape[1] // self.scales.shape[1]
        return table(self.codes.device)[self.codes.long()] * self.scales.repeat_interleave(size, 1)


def table(device: torch.device) -> Tensor:
    """The 16 values of NF4 in rising order, float32."""
    return bnb.functional.get_4bit_type("nf4", device=device)


def nearest(values: Tensor, grid: Tensor) -> Tensor:
    """Places of the nearest values of a rising `grid`, int64."""
    return torch.bucketize(values, (grid[1:] + grid[:-1]) / 2)


def round_naively(weight: Tensor, block: int) -> FourBit:
    """Every weight to its nearest point, as bitsandbytes does it."""
    grid = table(weight.device)
    blocks = weight.unflatten(1, (-1, block))  # (outputs, blocks, block)
    scales = blocks.abs().amax(-1).clamp(min=1e-30)
    codes = nearest(blocks / scales[..., None], grid).flatten(1)
    return FourBit(codes.to(torch.uint8), scales)


def round_with_compensation(weight: Tensor, moment: Tensor, block: int) -> FourBit:
    """GPTQ on the NF4 grid: `moment` is the (inputs, inputs) sum of x x^T of the layer's inputs.

    With H = moment and U the upper Cholesky factor of its inverse, rounding column j by `error`
    is paid back by the columns after it: W[:, j+1:] -= error / U[j, j] * U[j, j+1:]. Columns with
    the largest inputs come first, while there are many left to pay; the blocks keep the scales of
    naive rounding, so that the order of rounding need not be the order of storing.
    """
    grid, naive = table(weight.device), round_naively(weight, block)
    order = moment.diagonal().argsort(descending=True)
    weight = weight[:, order].clone()
    scales = naive.scales.repeat_interleave(block, 1)[:, order]
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped(moment[order][:, order])))
    factor = torch.linalg.cholesky(inverse, upper=True).float()
    codes = torch.empty_like(naive.codes)
    for start in range(0, weight.shape[1], block):  # in blocks: one large product for what is after
        here = slice(start, start + block)
        columns, scale, own = weight[:, here], scales[:, here], factor[here, here]
        errors = torch.empty_like(columns)
        for j in range(block):
            code = nearest(columns[:, j] / scale[:, j], grid)
            codes[:, order[start + j]] = code.to(torch.uint8)
            errors[:, j] = (columns[:, j] - grid[code] * scale[:, j]) / own[j, j]
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
    """Merge, round to NF4 with compensation, write in bitsandbytes' own form, read back, measure.

    `dtype` is that of what stays in 16 bits: embeddings, norms, `lm_head`. Decoder layers are
    rounded in order, each on what the rounded layers before it make of the calibration
    conversations, which costs a pass over them up to each layer. The certificate, which is
    returned, has the loss after naive rounding beside it.

    Raises:
        PhiSightError: as `exports.merge.export_merged`, and for layers that NF4 cannot take.
    """
    config = assistant.config
    base_folder = find_folder(config.base, config.base_revision or None)
    batches = calibration_batches(assistant, probe, conversations)
    with new_folder(out) as folder:
        before = measure.measure(assistant, probe, "before")
        changed = merged_assistant(assistant)
        model = language_model_in(changed)
        empty = empty_four_bit(model.config, dtype)
        blocks = {name: block_size(layer) for name, layer in four_bit_layers(empty)}
        naive = measured_naively(changed, blocks, probe)
        quantised = compensate(changed, blocks, batches)
        base = assistant.parts.base
        write_four_bit(folder, base, empty, quantised, model.state_dict(), dtype)
        copy_tokenizer(base_folder, folder)
        write_generation_config(assistant, folder)
        after = measured_folder(assistant, read_back(assistant, folder).parts.base, probe, folder)
        naive_increase = naive.loss - before.loss
        return measure.certify(
            folder / CERTIFICATE,
            "requantize",
            assistant,
            probe,
            before,
            after,
            tolerance,
            dtype=f"nf4, {str(dtype).removeprefix('torch.')} for the rest",
            method="GPTQ (arXiv:2210.17323) on the NF4 grid of the merged weights",
            calibration={
                "conversations": conversations,
                "of": "training",
                "tokens": sum(batch.tokens for batch in batches),
            },
            naive={
                "loss_after": naive.loss,
                "loss_difference": naive_increase,
                "greedy_equal": measure.equal_percent(before.answers, naive.answers),
            },
            under_a_quarter_of_naive=after.loss - before.loss < SHARE * naive_increase,
        )


def measured_naively(changed: Assistant, blocks: Mapping[str, int], probe: Probe) -> Measured:
    """What rounding the layers of `blocks` without compensation gives; they are put back after."""
    model = language_model_in(changed)
    originals = {name: weight_of(model, name).clone() for name in blocks}
    for name, weight in originals.items():
        put(model, name, round_naively(weight, blocks[name]).weight())
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


def block_size(layer: bnb.nn.Linear4bit) -> int:
    """How many weights of a layer share a scale."""
    weight = layer.weight
    assert isinstance(weight, bnb.nn.Params4bit)
    return weight.blocksize


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


def packed(name: str, value: FourBit, block: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """The tensors that bitsandbytes stores for a layer, by name; two codes share a byte."""
    codes = value.codes.cpu().reshape(-1, 2)
    state = bnb.functional.QuantState(
        absmax=value.scales.cpu().flatten().contiguous(),
        shape=value.codes.shape,
        dtype=dtype,
        blocksize=block,
        code=table(torch.device("cpu")),
        quant_type="nf4",
    )
    return {f"{name}.weight": (codes[:, :1] << 4) | codes[:, 1:]} | {
        f"{name}.weight.{key}": tensor for key, tensor in state.as_dict(packed=True).items()
    }


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
    tensors = {
        name: rounded(name, tensor, dtype)
        for name, tensor in weights.items()
        if name not in left_out
    }
    for name, layer in four_bit_layers(empty):
        tensors |= packed(name, quantised[name], block_size(layer), dtype)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    config = hub_config(base, dtype)
    config.architectures = ["Phi3ForCausalLM"]
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
        stats = {
            key.removeprefix(f"{name}.weight."): tensors.pop(key)
            for key in list(tensors)
            if key.startswith(f"{name}.weight.")
        }
        layer.weight = bnb.nn.Params4bit.from_prequantized(
            tensors.pop(f"{name}.weight"), stats, device="cpu", module=layer
        )
        layer.weight.quant_state.dtype = base.compute_dtype  # see `model.base.quantize`
    for name, tensor in tensors.items():
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
