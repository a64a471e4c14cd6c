"""A base of any Phi-3 shape with random 4-bit weights, made in memory: no file is written or read,
and no weight is quantised."""

from __future__ import annotations

from collections.abc import Mapping

import bitsandbytes as bnb
import torch
from torch import nn

from benchmarks.full_shape import ROOT, random_weight
from data.chat import load_tokenizer
from model.base import BaseModel, finish, swap_linear_layers
from model.base_cache import dtype_to_keep
from model.decoder import LanguageModel
from model.families import PHI3
from ops.nf4 import PanelLinear, packed_weight, quant_state, uses_panels

CODES = 1 << 22  # bytes that are drawn, and then used over and over, as in `random_weight`


def random_base(raw: Mapping[str, object], compute_dtype: torch.dtype) -> BaseModel:
    """What `model.base.load_base` gives for a folder with the config.json `raw`, on the CPU.

    Linear layers have random NF4 codes with scales as weights of a deviation of 0.02 have them;
    embeddings and head are random bfloat16, as a file's are.
    """
    device = torch.device("cpu")
    generator = torch.Generator().manual_seed(0)
    with torch.device("meta"):
        model = LanguageModel(PHI3.decoder_config(raw))
    swap_linear_layers(model, compute_dtype, nested=False)
    drawn = torch.randint(0, 256, (CODES,), dtype=torch.uint8, generator=generator)
    for name, empty in list(model.named_parameters()):
        module_name, _, parameter_name = name.rpartition(".")
        module = model.get_submodule(module_name)
        if isinstance(module, bnb.nn.Linear4bit):
            module.weight = random_four_bit(module, drawn, compute_dtype, generator)
            if uses_panels(device, compute_dtype):
                model.set_submodule(module_name, PanelLinear.of(module))
        else:
            weight = random_weight(tuple(empty.shape), generator)
            weight = weight.to(dtype_to_keep(name, weight.dtype, compute_dtype, device))
            setattr(module, parameter_name, nn.Parameter(weight, requires_grad=False))
    finish(model, device, compute_dtype)
    tokenizer = load_tokenizer(ROOT / "assets/tiny/phi3")
    return BaseModel(model, PHI3, tokenizer, "random", "random weights", compute_dtype, dict(raw))


def random_four_bit(
    module: bnb.nn.Linear4bit,
    drawn: torch.Tensor,
    compute_dtype: torch.dtype,
    generator: torch.Generator,
) -> bnb.nn.Params4bit:
    """A weight for an empty 4-bit layer, as `model.base.quantize` would make it."""
    shape = torch.Size((module.out_features, module.in_features))
    block, count = packed_weight(module).blocksize, shape.numel()
    packed = drawn.repeat(-(-count // 2 // len(drawn)))[: count // 2, None]
    # The largest of 64 numbers of deviation 0.02 is about 0.05.
    scales = 0.05 * (0.5 + torch.rand(count // block, generator=generator))
    state = quant_state(scales, shape, compute_dtype, block)
    module.quant_state = state
    return bnb.nn.Params4bit(
        packed.contiguous(),
        requires_grad=False,
        quant_state=state,
        blocksize=block,
        compress_statistics=False,
        quant_type="nf4",
        module=module,
        bnb_quantized=True,
    )
