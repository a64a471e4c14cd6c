"""Training on the merged weight rounded to NF4: the grid, the gradient, and what is written."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import bitsandbytes as bnb
import pytest
import runs
import torch
from exporting import ANSWERS
from four_bit import LINEAR, VOCABULARY, four_bit_model, small_config
from hypothesis import given, settings
from hypothesis import strategies as st
from random_model import logits_of
from torch import nn

import checkpoints
import export
import lora.layer
from assistant.assistant import Assistant
from errors import PhiSightError
from exports import requantize
from lora.layer import LoRALinear
from lora.merge import merged_weight
from model.build import settle_rounded
from model.compiled import compiled_for
from model.decoder import LanguageModel
from ops import kernels
from ops.nf4 import PanelLinear, base_weight, quick_product
from ops.nf4_grid import CELLS, nearest, round_to_nearest, table
from training.optimizer import AdamW

CPU = torch.device("cpu")
NEEDS_KERNELS = pytest.mark.skipif(
    not kernels.available()[0], reason=f"no kernels here: {kernels.available()[1]}"
)


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# -- the grid --------------------------------------------------------------------------------------


def by_bitsandbytes(weight: torch.Tensor, block: int) -> tuple[torch.Tensor, torch.Tensor]:
    packed, state = bnb.functional.quantize_4bit(weight, blocksize=block, quant_type="nf4")
    return packed, state.absmax


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32), st.sampled_from([32, 64]), st.floats(-36, 36))
def test_codes_and_scales_are_those_of_bitsandbytes_and_stay_when_rounded_again(seed, block, size):
    weight = draw(6, 128, seed=seed) * 10.0**size
    weight[1, :block] = 0  # a block without a scale
    weight[2] = table(CPU).repeat(8) * weight[2].abs().max()  # points of the grid
    middles = (table(CPU)[1:] + table(CPU)[:-1]) / 2
    weight[3, :15], weight[3, 15] = middles, 1.0  # between two points
    weight[4, ::2] = weight[4, 1]  # the largest magnitude more than once
    rounded = round_to_nearest(weight, block)
    packed, scales = by_bitsandbytes(weight, block)
    assert torch.equal(rounded.packed(), packed) and torch.equal(rounded.scales.flatten(), scales)
    again = round_to_nearest(rounded.weight(), block)
    assert torch.equal(again.codes, rounded.codes) and torch.equal(again.scales, rounded.scales)
    assert torch.equal(again.weight(), rounded.weight())


def test_a_block_of_the_smallest_numbers_stays_too():
    """Of numbers under 1e-38, which have fewer digits, bitsandbytes makes zeros."""
    weight = draw(4, 64) * 1e-40
    rounded = round_to_nearest(weight, 64).weight()
    assert torch.equal(rounded, round_to_nearest(rounded, 64).weight())


def test_the_point_that_is_looked_up_is_the_nearest():
    middles = (table(CPU)[1:] + table(CPU)[:-1]) / 2
    starts = torch.arange(-CELLS, CELLS + 1) / CELLS
    assert (middles[:, None] - starts).abs().min() > 1e-4  # so that finding a cell may round
    assert torch.histc(middles, 2 * CELLS, -1, 1).max() == 1
    values = [torch.cat([middles, starts, table(CPU), draw(10_000), torch.tensor([5.0, -1e30])])]
    for towards in (2.0, -2.0):
        for _ in range(3):
            values.append(torch.nextafter(values[-1], torch.tensor(towards)))
    for some in values:
        expected = torch.bucketize(some.clamp(-1, 1), middles)
        assert torch.equal(nearest(some).long(), expected)
    assert nearest(torch.tensor([float("nan")])).item() < 16


# -- a layer ---------------------------------------------------------------------------------------


def four_bit_linear(compute_dtype: torch.dtype = torch.float32, seed: int = 2) -> bnb.nn.Linear4bit:
    linear = bnb.nn.Linear4bit(
        128, 96, bias=False, compute_dtype=compute_dtype, compress_statistics=False,
        quant_type="nf4",
    )  # fmt: skip
    linear.load_state_dict({"weight": draw(96, 128, seed=seed) / 8})
    return linear.to("cpu")


def bases() -> dict[str, nn.Linear]:
    made: dict[str, nn.Linear] = {"bitsandbytes": four_bit_linear()}
    if kernels.available()[0]:
        made["panels"] = PanelLinear.of(four_bit_linear())
    return made


def rounding(base: nn.Linear, b: bool = True) -> LoRALinear:
    layer = LoRALinear(base, 4, 6.0, generator=torch.Generator().manual_seed(0), rounds=True)
    if b:
        with torch.no_grad():
            layer.lora_B.copy_(draw(96, 4, seed=4) / 4)
    return layer


def reference(layer: LoRALinear) -> torch.Tensor:
    """The rounded merged weight, straight through for autograd, in plain torch."""
    update = layer.scaling * (layer.lora_B @ layer.lora_A)
    merged = base_weight(layer.base) + update
    packed, state = bnb.functional.quantize_4bit(
        (base_weight(layer.base).double() + update.detach().double()).float(),
        blocksize=64, quant_type="nf4",
    )  # fmt: skip
    return merged + (bnb.functional.dequantize_4bit(packed, state) - merged).detach()


@pytest.mark.parametrize("base", bases())
def test_forward_and_gradients_are_those_of_a_straight_through_reference(base):
    layer, x, y = rounding(bases()[base]), *(draw(3, 40, 128).requires_grad_() for _ in range(2))
    weight, slopes = reference(layer), draw(3, 40, 96, seed=5)
    (y @ weight.T * slopes).sum().backward()
    wanted = [y.grad, layer.lora_A.grad, layer.lora_B.grad]
    layer.zero_grad()
    result = layer(x)
    (result * slopes).sum().backward()
    torch.testing.assert_close(result, y @ weight.T, atol=1e-4, rtol=1e-5)
    assert (base_weight(layer.rounded()) - base_weight(layer.base)).abs().max() > 0.05
    for found, expected in zip([x.grad, layer.lora_A.grad, layer.lora_B.grad], wanted, strict=True):
        largest = expected.abs().max().item()
        torch.testing.assert_close(found, expected, atol=2e-6 * largest, rtol=1e-5)
    assert all(parameter.grad is None for parameter in layer.base.parameters())


@pytest.mark.parametrize("base", bases())
def test_the_weight_that_is_multiplied_by_is_what_rounding_the_merge_again_gives(base):
    """Equal to the bit: this is all that --requantize does."""
    layer = rounding(bases()[base])
    merged = merged_weight(layer)
    assert torch.equal(round_to_nearest(merged, 64).weight(), merged)
    x = draw(5, 128)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), x @ merged.T, atol=1e-5, rtol=1e-5)
    untouched = rounding(bases()[base], b=False)
    assert torch.equal(merged_weight(untouched), base_weight(untouched.base))


def test_in_bfloat16_the_rounded_weight_is_the_same_and_gradients_are_float32():
    layer, wide = rounding(four_bit_linear(torch.bfloat16)), rounding(four_bit_linear())
    layer.base.weight.quant_state.dtype = torch.bfloat16  # as `model.base.quantize` leaves it
    assert torch.equal(merged_weight(layer), merged_weight(wide))
    x = draw(8, 128).to(torch.bfloat16).requires_grad_()
    result = layer(x)
    result.sum().backward()
    expected = x.detach().float() @ merged_weight(wide).T
    assert result.dtype == torch.bfloat16 and x.grad.dtype == torch.bfloat16
    assert layer.lora_A.grad.dtype == layer.lora_B.grad.dtype == torch.float32
    assert (result.float() - expected).abs().max() < 0.02 * expected.abs().max()


@NEEDS_KERNELS
def test_a_settled_layer_is_not_repacked_when_it_answers():
    """bitsandbytes does it to every new layer on a CPU with AVX512-BF16, and what an export then
    reads of it is no weight at all."""
    layer = rounding(four_bit_linear(torch.bfloat16))
    layer.base.weight.quant_state.dtype = torch.bfloat16
    before = merged_weight(layer)
    assert not layer.rounded().support_avx512bf16_for_cpu  # for CPUs without it, too
    layer.settle()
    layer.eval()
    with torch.no_grad():
        layer(draw(40, 128).to(torch.bfloat16))
    assert torch.equal(merged_weight(layer), before)


def test_by_integers_the_forward_is_that_of_answering_and_the_backward_exact():
    base = PanelLinear.of(four_bit_linear())
    base.by_integers = True
    layer, x = rounding(base), draw(40, 128).requires_grad_()
    result = layer(x)
    result.sum().backward()
    assert torch.equal(result, quick_product(x.detach(), layer.rounded()))
    expected = merged_weight(layer).sum(0).expand(40, -1)
    torch.testing.assert_close(x.grad, expected, atol=1e-4, rtol=1e-5)


def test_the_weight_is_rounded_once_a_step_and_again_after_it(monkeypatch):
    rounded = []
    own = lora.layer.rounded_layer
    monkeypatch.setattr(
        lora.layer, "rounded_layer", lambda *given: rounded.append(1) or own(*given)
    )
    layer = rounding(four_bit_linear())
    optimizer = AdamW(
        [(n, p) for n, p in layer.named_parameters() if p.requires_grad], weight_decay=0.1
    )
    for step in range(1, 4):
        before = merged_weight(layer)
        for micro_batch in range(2):
            layer(draw(4, 128, seed=micro_batch)).square().sum().backward()
        assert len(rounded) == step
        optimizer.step(0.05)
        optimizer.zero_grad()
        assert not torch.equal(merged_weight(layer), before)
        assert len(rounded) == step + 1 or step == 3
        rounded[:] = rounded[: step + 1]


def test_what_cannot_be_rounded_is_refused():
    with pytest.raises(PhiSightError, match="Linear is no 4-bit layer"):
        LoRALinear(nn.Linear(64, 64), 4, 4.0, rounds=True)
    with pytest.raises(PhiSightError, match="--lora-dropout 0.1 makes another weight"):
        LoRALinear(four_bit_linear(), 4, 4.0, 0.1, rounds=True)


# -- a model ---------------------------------------------------------------------------------------


def model_that_rounds() -> LanguageModel:
    return four_bit_model(small_config(), LINEAR, rounds=True)


def plain_four_bit(model: LanguageModel) -> LanguageModel:
    """The same without an adapter: its rounded weights as plain 4-bit layers."""
    plain = copy.deepcopy(model)
    for name, layer in model.named_modules():
        if isinstance(layer, LoRALinear):
            plain.set_submodule(name, layer.rounded())
    return plain


@pytest.mark.parametrize("setting", ["products", "layers"])
def test_what_is_computed_again_changes_no_gradient(setting):
    gradients = []
    for recomputing in ("none", setting):
        model = model_that_rounds().train()
        model.model.recomputing = recomputing
        adapters = [p for n, p in model.named_parameters() if n.endswith(("lora_A", "lora_B"))]
        for parameter in adapters:
            parameter.requires_grad_(True)
        states = model.model(draw(1, 9, 64).requires_grad_(), torch.arange(9)[None], [9])
        states.square().sum().backward()
        gradients.append([parameter.grad for parameter in adapters])
    assert len(gradients[0]) == 16 and all(g.abs().max() > 0 for g in gradients[0])
    assert all(map(torch.equal, *gradients))


def test_it_computes_what_a_plain_4_bit_model_does_settled_or_not():
    ids = torch.arange(12) % VOCABULARY
    model = model_that_rounds()
    plain, names = plain_four_bit(model), [name for name, _ in model.named_parameters()]
    expected = logits_of(plain, ids)
    assert not torch.equal(logits_of(four_bit_model(small_config(), LINEAR), ids), expected)
    assert torch.equal(logits_of(model, ids), expected)
    settle_rounded(model)
    assert torch.equal(logits_of(model, ids), expected)
    assert [name for name, _ in model.named_parameters()] == names
    assert not any(one._rounded for one in model.modules() if isinstance(one, LoRALinear))


@NEEDS_KERNELS
def test_compiled_code_decodes_by_the_rounded_weights_alone():
    model = model_that_rounds()
    plain, found = plain_four_bit(model), []
    settled = copy.deepcopy(model)
    settle_rounded(settled)
    for one in (plain, model, settled):
        decoder, reason = compiled_for(one)
        assert decoder, reason
        cache = one.model.empty_cache()
        found.append(decoder.step(draw(1, 64), [cache], [1]))
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])
    with torch.no_grad():  # what was compiled of a model that is trained on is made anew
        next(one for one in model.modules() if isinstance(one, LoRALinear)).lora_B.mul_(3)
    decoder, _ = compiled_for(model)
    again = decoder.step(draw(1, 64), [model.model.empty_cache()], [1])
    assert not torch.equal(again, found[0])


# -- a run -----------------------------------------------------------------------------------------

FIELDS = runs.SHORT | {
    "merge_rounding": "nf4",
    "lora_dropout": 0.0,
    "max_steps": 4,
    "accumulation": 2,
    "learning_rate": 1e-2,  # so that weights leave their points
    "gradient_checkpointing": "products",
}


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("rounding") / "run"
    assert runs.start(folder, **FIELDS) == 0
    return folder


def test_a_resume_is_equal_to_the_bit_and_no_other_rounding_goes_on(run, tmp_path, capsys):
    stopped = tmp_path / "run"
    runs.start(stopped, "--stop-at-step=2", **FIELDS)
    with pytest.raises(PhiSightError, match="config.merge_rounding"):
        runs.resume(stopped, "--merge-rounding=none")
    assert runs.resume(stopped) == 0
    assert not checkpoints.diff(run, stopped).differences


def test_the_weights_of_a_run_have_left_the_grid_of_their_base(run):
    model = Assistant.load(run).parts.base.model
    layers = [layer for layer in model.modules() if isinstance(layer, LoRALinear)]
    assert layers and all(layer.settled for layer in layers)
    fresh = runs.assistant().parts.base.model
    moved = [
        not torch.equal(merged_weight(layer), base_weight(other.base))
        for layer, other in zip(
            layers, (m for m in fresh.modules() if isinstance(m, LoRALinear)), strict=True
        )
    ]
    assert all(moved)


def exported(run: Path, out: Path, *flags: str) -> dict:
    assert export.main([*flags, f"--out={out}", f"--run={run}", ANSWERS, "--dtype=float32"]) == 0
    return json.loads(next(out.glob("*_certificate.json")).read_text())


def test_in_4_bits_again_nothing_is_lost(run, tmp_path, monkeypatch):
    monkeypatch.setattr(requantize, "compensate", None)  # GPTQ is not asked
    found = exported(run, tmp_path / "q", "--requantize", "--max-loss-difference=0")
    assert found["loss_difference"] == 0.0 and found["greedy_equal"] == 100
    assert found["weights_equal"] is True and "naive" not in found
    assert "on which the run was trained" in found["method"]


def test_merged_it_has_the_rounded_weights_and_as_an_adapter_it_is_refused(run, tmp_path):
    found = exported(run, tmp_path / "m", "--merge", "--max-loss-difference=1e-6")
    assert "as it was trained" in found["method"]
    with pytest.raises(PhiSightError, match="an adapter cannot hold; use --requantize"):
        export.main([f"--peft={tmp_path / 'p'}", f"--run={run}"])
    assert not (tmp_path / "p").exists()


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"lora_dropout": 0.05}, "goes with --lora-dropout 0 only, not 0.05"),
        ({"quantization": "nf4-nested"}, "goes with --quantization nf4 only, not nf4-nested"),
        ({"quantization": "none"}, "goes with --quantization nf4 only, not none"),
    ],
)
def test_what_does_not_go_with_it_is_told_before_anything_is_loaded(fields, said, tmp_path):
    with pytest.raises(PhiSightError, match=said):
        runs.start(tmp_path / "run", **FIELDS | {"base": tmp_path / "none"} | fields)
