"""LoRA: against PEFT on the same weights, its gradients, its state, and its merge."""

import bitsandbytes as bnb
import peft
import pytest
import torch
from torch import nn

from errors import PhiSightError
from lora.inject import inject
from lora.layer import LoRALinear
from lora.merge import merged_weight
from lora.state import load_lora_state, lora_state
from ops.nf4 import base_weight

RANK, ALPHA = 4, 10.0  # alpha / rank is neither 1 nor whole


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def draw(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(*shape, generator=seeded(seed))


def plain_linear(inputs: int = 64, outputs: int = 96, bias: bool = True) -> nn.Linear:
    linear = nn.Linear(inputs, outputs, bias=bias)
    with torch.no_grad():
        linear.weight.copy_(draw(outputs, inputs, seed=2) / 8)
        if bias:
            linear.bias.copy_(draw(outputs, seed=3))
    return linear


def four_bit_linear(nested: bool = False, outputs: int = 96) -> bnb.nn.Linear4bit:
    linear = bnb.nn.Linear4bit(
        64,
        outputs,
        bias=False,
        compute_dtype=torch.float32,
        compress_statistics=nested,
        quant_type="nf4",
    )
    linear.load_state_dict({"weight": plain_linear(outputs=outputs).weight.detach()})
    return linear.to("cpu")


def trained(base: nn.Linear, dropout: float = 0.0) -> LoRALinear:
    """A wrapped layer whose B is no longer zero."""
    layer = LoRALinear(base, RANK, ALPHA, dropout, seeded())
    with torch.no_grad():
        layer.lora_B.copy_(draw(base.out_features, RANK, seed=4))
    return layer


def peft_layer(base: nn.Linear, ours: LoRALinear) -> nn.Module:
    config = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=["target"])
    model = peft.inject_adapter_in_model(config, nn.ModuleDict({"target": base}))
    layer = model["target"]
    with torch.no_grad():
        layer.lora_A["default"].weight.copy_(ours.lora_A)
        layer.lora_B["default"].weight.copy_(ours.lora_B)
    return layer


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv_proj = plain_linear(32, 96, bias=False)
        self.o_proj = plain_linear(96, 32, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.o_proj(torch.tanh(self.qkv_proj(x)))


def blocks() -> nn.Sequential:
    return nn.Sequential(Block(), Block()).requires_grad_(False)


@pytest.mark.parametrize("make_base", [plain_linear, four_bit_linear])
def test_forward_and_gradients_equal_peft(make_base):
    ours = trained(make_base())
    theirs = peft_layer(make_base(), ours)
    assert type(theirs).__module__.startswith("peft.tuners.lora")
    mine, other = draw(3, 5, 64).requires_grad_(), draw(3, 5, 64).requires_grad_()
    weight = draw(3, 5, 96, seed=5)
    result, expected = ours(mine), theirs(other)
    (result * weight).sum().backward()
    (expected * weight).sum().backward()
    torch.testing.assert_close(result, expected, atol=1e-6, rtol=1e-6)
    pairs = [(mine.grad, other.grad)]
    for name in ("lora_A", "lora_B"):
        pairs.append((getattr(ours, name).grad, getattr(theirs, name)["default"].weight.grad))
    for gradient, expected in pairs:  # sums of products are rounded as the largest of them is
        largest = expected.abs().max().item()
        assert largest > 0.1
        torch.testing.assert_close(gradient, expected, atol=1e-6 * largest, rtol=1e-6)


@pytest.mark.parametrize("make_base", [plain_linear, four_bit_linear])
@pytest.mark.parametrize("keys", [None, [3, 4]])
def test_training_as_one_node_is_the_formula_with_the_same_mask(make_base, keys):
    layer = trained(make_base(), dropout=0.25)
    x, y = draw(2, 40, 64).requires_grad_(), draw(2, 40, 64).requires_grad_()
    weight = draw(2, 40, 96, seed=5)
    torch.manual_seed(0)
    result = layer(x, keys)
    (result * weight).sum().backward()
    gradients = [x.grad, layer.lora_A.grad, layer.lora_B.grad]
    layer.zero_grad()
    torch.manual_seed(0)
    masked = layer.dropout(y, keys)
    assert 0.2 < (masked == 0).float().mean() < 0.3
    expected = layer.base(y) + masked @ layer.lora_A.T @ layer.lora_B.T * layer.scaling
    (expected * weight).sum().backward()
    torch.testing.assert_close(result, expected, atol=1e-5, rtol=1e-6)
    for gradient, wanted in zip(
        gradients, [y.grad, layer.lora_A.grad, layer.lora_B.grad], strict=True
    ):
        largest = wanted.abs().max().item()
        torch.testing.assert_close(gradient, wanted, atol=1e-6 * largest, rtol=1e-6)


def test_initial_a_is_what_peft_draws_and_b_is_zero():
    torch.manual_seed(7)
    linear = nn.Linear(64, RANK, bias=False)
    torch.manual_seed(7)
    nn.init.kaiming_uniform_(linear.weight, a=5**0.5)
    layer = LoRALinear(plain_linear(), RANK, ALPHA, 0.0, seeded(7))
    assert torch.equal(layer.lora_A, linear.weight)
    assert torch.equal(layer.lora_B, torch.zeros(96, RANK))
    assert layer.scaling.item() == 2.5 and layer.scaling.dtype == torch.float32
    x = draw(2, 64)
    assert torch.equal(layer(x), layer.base(x))


def test_the_base_gets_no_gradient_and_passes_one_on():
    for base in (plain_linear(), four_bit_linear()):
        layer = trained(base)
        x = draw(2, 64).requires_grad_()
        layer(x).square().sum().backward()
        assert all(parameter.grad is None for parameter in base.parameters())
        assert {n for n, p in layer.named_parameters() if p.requires_grad} == {"lora_A", "lora_B"}
        with torch.no_grad():
            expected = 2 * layer(x) @ merged_weight(layer)
        torch.testing.assert_close(x.grad, expected, atol=1e-4, rtol=1e-5)


def test_half_precision_base_keeps_its_dtype_and_the_update_float32():
    layer = trained(plain_linear().to(torch.bfloat16))
    x = draw(2, 64).to(torch.bfloat16).requires_grad_()
    result = layer(x)
    result.sum().backward()
    assert result.dtype == torch.bfloat16 and x.grad.dtype == torch.bfloat16
    assert layer.lora_A.grad.dtype == torch.float32
    update = (x.float() @ layer.lora_A.T @ layer.lora_B.T * 2.5).to(torch.bfloat16)
    assert torch.equal(result, layer.base(x) + update)


def test_dropout_acts_in_training_only_and_on_the_update_only():
    layer = trained(plain_linear(), dropout=0.5)
    x = draw(2, 64)
    torch.manual_seed(0)
    kept = nn.functional.dropout(x, 0.5)
    torch.manual_seed(0)
    expected = layer.base(x) + kept @ layer.lora_A.T @ layer.lora_B.T * 2.5
    torch.testing.assert_close(layer(x), expected, atol=1e-6, rtol=1e-6)
    layer.eval()
    assert torch.equal(layer(x), layer(x))
    assert not torch.allclose(layer(x), expected, atol=1e-2)


@pytest.mark.parametrize("nested", [False, True])
def test_running_in_eval_mode_changes_no_weight(nested):
    """bitsandbytes repacks on CPUs with AVX512-BF16; 48 outputs would even stop it."""
    for outputs in (96, 48):
        layer = trained(four_bit_linear(nested, outputs))
        layer.base.support_avx512bf16_for_cpu = True  # as on such a CPU
        layer = trained(layer.base)
        before, packed = merged_weight(layer), layer.base.weight.data.clone()
        with torch.no_grad():
            evaluated = layer.eval()(draw(2, 64))
        x = draw(2, 64).requires_grad_()
        result = layer.train()(x)
        result.sum().backward()
        assert torch.equal(layer.base.weight.data, packed)
        assert torch.equal(merged_weight(layer), before)
        torch.testing.assert_close(evaluated, result.detach(), atol=1e-6, rtol=1e-6)
        assert x.grad.abs().max() > 0


@pytest.mark.skipif(
    not bnb.functional.has_avx512bf16(), reason="only CPUs with AVX512-BF16 repack weights"
)
def test_a_repacked_base_is_refused():
    base = four_bit_linear().eval()
    with torch.no_grad():
        base(draw(2, 64))
    with pytest.raises(PhiSightError, match="repacked"):
        LoRALinear(base, RANK, ALPHA)


@pytest.mark.parametrize(("inputs", "outputs"), [(64, 96), (128, 40), (192, 65)])
def test_dequantised_weight_is_code_times_block_scale(inputs, outputs):
    weight = plain_linear(inputs, outputs).weight.detach()
    linear = bnb.nn.Linear4bit(
        inputs, outputs, bias=False, quant_type="nf4", compress_statistics=False
    )
    linear.load_state_dict({"weight": weight})
    blocks = weight.reshape(-1, 64)
    scales = blocks.abs().amax(dim=1, keepdim=True)
    code = bnb.functional.get_4bit_type("nf4", device="cpu")
    nearest = (blocks[..., None] / scales[..., None] - code).abs().argmin(dim=-1)
    expected = (code[nearest] * scales).reshape(outputs, inputs)
    torch.testing.assert_close(base_weight(linear.to("cpu")), expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("base", ["plain", "nf4", "nested", "bfloat16 file"])
def test_merged_weight_computes_what_the_layer_computes(base):
    linear = plain_linear(bias=False) if base == "plain" else four_bit_linear(base == "nested")
    if base == "bfloat16 file":  # a state of another dtype must not round the merged weight
        linear.weight.quant_state.dtype = torch.bfloat16
    layer = trained(linear)
    x = draw(5, 64)
    merged = merged_weight(layer)
    assert merged.dtype == torch.float32 and not merged.requires_grad
    with torch.no_grad():
        torch.testing.assert_close(x @ merged.T, layer(x), atol=1e-5, rtol=1e-6)


def test_merge_is_over_the_dequantised_weight_and_leaves_the_layer_alone():
    layer = trained(four_bit_linear())
    original = plain_linear().weight.detach()
    before = layer.base.weight.data.clone()
    adapter = layer.scaling * layer.lora_B.detach() @ layer.lora_A.detach()
    base = merged_weight(layer) - adapter
    torch.testing.assert_close(base, base_weight(layer.base), atol=1e-6, rtol=1e-6)
    assert (base - original).abs().max() > 0.01  # NF4 rounding, which the adapter was trained over
    assert torch.equal(layer.base.weight.data, before)


def test_inject_wraps_in_module_order_and_keeps_names():
    model, x = blocks(), draw(2, 32)
    expected = model(x)
    wrapped = inject(model, ["o_proj", "qkv_proj"], RANK, ALPHA, 0.0, seeded())
    assert list(wrapped) == ["0.qkv_proj", "0.o_proj", "1.qkv_proj", "1.o_proj"]
    assert model.get_submodule("1.o_proj") is wrapped["1.o_proj"]
    assert torch.equal(model(x), expected)
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trainable == {f"{name}.{part}" for name in wrapped for part in ("lora_A", "lora_B")}
    generator = seeded()
    for layer in wrapped.values():
        drawn = torch.empty(layer.lora_A.shape)
        nn.init.kaiming_uniform_(drawn, a=5**0.5, generator=generator)
        assert torch.equal(layer.lora_A, drawn)


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (["o_proj", "q_proj"], r"q_proj matches no layer; .*are o_proj, qkv_proj"),
        ([], "the empty list matches no layer"),
        (["0"], "0 is not a linear layer"),
    ],
)
def test_inject_refuses_bad_targets_and_wraps_nothing(targets, message):
    model = blocks()
    with pytest.raises(PhiSightError, match=message):
        inject(model, targets, RANK, ALPHA, 0.0, seeded())
    assert not any(isinstance(module, LoRALinear) for module in model.modules())


def test_inject_refuses_a_rank_larger_than_every_layer():
    """A rank of many zeros would end in an allocation that fails."""
    model = blocks()
    with pytest.raises(PhiSightError, match="--lora-rank 1000000000: larger than every wrapped"):
        inject(model, ["o_proj", "qkv_proj"], 10**9, ALPHA, 0.0, seeded())
    assert not any(isinstance(module, LoRALinear) for module in model.modules())


def test_inject_twice_is_refused():
    model = blocks()
    inject(model, ["o_proj"], RANK, ALPHA, 0.0, seeded())
    with pytest.raises(PhiSightError, match="0.o_proj has an adapter already"):
        inject(model, ["qkv_proj"], RANK, ALPHA, 0.0, seeded())


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        ((0, 1.0, 0.0), "rank"),
        ((4, 0.0, 0.0), "alpha"),
        ((4, float("nan"), 0.0), "alpha"),
        ((4, 1.0, 1.0), "dropout"),
    ],
)
def test_bad_numbers_are_refused(numbers, message):
    with pytest.raises(PhiSightError, match=f"LoRA {message}"):
        LoRALinear(plain_linear(), *numbers)


def test_rows_that_are_no_whole_number_of_blocks_are_refused():
    """Why: on a CPU with AVX-512 bitsandbytes gives them the block scales of other rows."""
    base = bnb.nn.Linear4bit(96, 64, bias=False, quant_type="nf4").to("cpu")
    with pytest.raises(PhiSightError, match="96 inputs are not a multiple of the NF4 block"):
        LoRALinear(base, RANK, ALPHA)


def test_other_bases_are_refused():
    with pytest.raises(PhiSightError, match="not a linear layer"):
        LoRALinear(nn.Embedding(4, 4), RANK, ALPHA)
    with pytest.raises(PhiSightError, match="not quantised yet"):
        LoRALinear(bnb.nn.Linear4bit(64, 64, quant_type="nf4"), RANK, ALPHA)


def adapted(seed: int, alpha: float = ALPHA) -> nn.Module:
    model = blocks()
    for index, layer in enumerate(
        inject(model, ["qkv_proj", "o_proj"], RANK, alpha, 0.0, seeded(seed)).values()
    ):
        layer.lora_B.data.copy_(draw(layer.out_features, RANK, seed=seed + index))
    return model


def test_state_round_trip_restores_every_tensor_and_scaling():
    source, target = adapted(10), adapted(20, alpha=3.0)
    state = {name: tensor.clone() for name, tensor in lora_state(source).items()}
    assert list(state)[:3] == ["0.qkv_proj.lora_A", "0.qkv_proj.lora_B", "0.qkv_proj.scaling"]
    assert len(state) == 12 and not any(tensor.requires_grad for tensor in state.values())
    assert not torch.equal(target(draw(2, 32)), source(draw(2, 32)))
    load_lora_state(target, state)
    for name, tensor in lora_state(target).items():
        assert torch.equal(tensor, state[name]), name
    assert torch.equal(target(draw(2, 32)), source(draw(2, 32)))
    assert target.get_submodule("0.o_proj").lora_A.requires_grad


def test_load_names_every_problem_and_changes_nothing():
    model = adapted(10)
    before = {name: tensor.clone() for name, tensor in lora_state(model).items()}
    state = {name: tensor + 1 for name, tensor in before.items()}
    del state["0.qkv_proj.lora_A"]
    state["2.o_proj.lora_A"] = torch.zeros(1)
    state["1.o_proj.lora_B"] = torch.zeros(32, RANK + 1)
    state["1.qkv_proj.scaling"] = state["1.qkv_proj.scaling"].double()
    with pytest.raises(PhiSightError) as caught:
        load_lora_state(model, state)
    for part in (
        "missing 0.qkv_proj.lora_A",
        "unexpected 2.o_proj.lora_A",
        "1.o_proj.lora_B is (32, 5) float32, not (32, 4) float32",
        "1.qkv_proj.scaling is () float64, not () float32",
    ):
        assert part in str(caught.value)
    for name, tensor in lora_state(model).items():
        assert torch.equal(tensor, before[name]), name
