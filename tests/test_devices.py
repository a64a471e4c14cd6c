"""Which device is computed on, and what Apple's GPU is given. There is none here: what is chosen is
tried with one that is said to be there, and what it would be given is computed on the CPU."""

from __future__ import annotations

import bitsandbytes as bnb
import pytest
import torch
from test_vlm import batch_of, samples, turn_dropout_off  # noqa: F401 (two of them are fixtures)
from torch.utils._python_dispatch import TorchDispatchMode

import ops
from config import replace
from errors import PhiSightError
from lora.dropout import RowDropout
from lora.layer import LoRALinear
from lora.rounding import rounded_merge
from model import devices
from model.base import quantize
from model.build import assemble
from ops.nf4 import PanelLinear, dense_weight
from ops.nf4_grid import round_to_nearest, unpacked
from training import ranks, rng, step
from training.loss_scaler import LossScaler
from training.optimizer import AdamW

CPU = torch.device("cpu")


@pytest.fixture
def on_a_mac(monkeypatch):
    """torch says that there is Apple's GPU, and no other."""
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def a_gpu_that(monkeypatch, change) -> None:
    """Have it compute what the CPU does, changed."""
    really = devices.probe

    def probe(device):
        found = really(CPU)
        return change(found) if device.type == "mps" else found

    monkeypatch.setattr(devices, "probe", probe)


# -- the choice -----------------------------------------------------------------------------------


def test_without_a_gpu_it_is_the_cpu_and_nothing_is_told(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert devices.choose_device("auto") == devices.choose_device("cpu") == (CPU, "")
    for name in ("cuda", "mps"):
        with pytest.raises(PhiSightError, match=f"^--device {name}: .*; use --device cpu$"):
            devices.choose_device(name)


def test_a_gpu_that_computes_as_the_cpu_does_is_chosen(on_a_mac, monkeypatch):
    a_gpu_that(monkeypatch, lambda found: found)
    for name in ("auto", "mps"):
        assert devices.choose_device(name) == (torch.device("mps"), "")
    assert devices.choose_device("cpu") == (CPU, "")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert devices.choose_device("auto")[0].type == "cuda"


@pytest.mark.parametrize("what", ["4-bit product", "attention", "loss", "gradient"])
@pytest.mark.parametrize("by", [0.01, float("nan")])
def test_one_that_computes_wrongly_is_not_and_the_reason_is_told(on_a_mac, monkeypatch, what, by):
    a_gpu_that(monkeypatch, lambda found: found | {what: found[what] * (1 + by) + by})
    device, told = devices.choose_device("auto")
    assert device == CPU and told.startswith(f"Apple's GPU is not used: its {what} is off by ")
    with pytest.raises(PhiSightError, match=f"--device mps: its {what} is off by"):
        devices.choose_device("mps")


def test_one_that_fails_is_not_and_the_log_says_so(on_a_mac, tiny_config):
    """Here torch itself says that there is none."""
    parts = assemble(replace(tiny_config, device="auto"))
    assert parts.device == CPU
    assert "Apple's GPU is not used: it does not compute what a training needs (" in (
        parts.compute_reason
    )
    assert parts.compute_reason.endswith("takes a scalar path on a CPU")


def test_several_processes_do_not_use_it(on_a_mac, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert devices.choose_device("auto")[0] == CPU
    with pytest.raises(PhiSightError, match="^--device mps: torch sums no gradients"):
        with ranks.joined("mps"):
            pass


def test_what_is_tried_is_what_the_cpu_computes_by_other_ways():
    found = devices.probe(CPU)
    generator = torch.Generator().manual_seed(0)
    table, weight = (torch.randn(shape, generator=generator) for shape in ((32, 64), (64, 64)))
    ids = torch.randint(32, (16,), generator=generator)
    packed, state = bnb.functional.quantize_4bit(weight, blocksize=64, quant_type="nf4")
    product = torch.nn.functional.silu(table[ids]) @ bnb.functional.dequantize_4bit(packed, state).T
    torch.testing.assert_close(found["4-bit product"], product)
    loss = torch.nn.functional.cross_entropy(
        found["attention"].transpose(0, 1).flatten(1) @ table.T, ids, reduction="sum"
    )
    torch.testing.assert_close(found["loss"], loss)
    assert found["gradient"].abs().sum() > 0


# -- what it is given -----------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(1, 64), (7, 128), (96, 320)])
def test_codes_are_unpacked_as_bitsandbytes_does_it_to_the_bit(shape):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    weight[0, :64] = 0
    rounded = round_to_nearest(weight, 64)
    again = unpacked(rounded.packed(), rounded.scales.flatten(), weight.shape)
    assert torch.equal(again.codes, rounded.codes) and torch.equal(again.scales, rounded.scales)
    packed, state = bnb.functional.quantize_4bit(weight, blocksize=64, quant_type="nf4")
    assert torch.equal(
        unpacked(packed, state.absmax, weight.shape).weight(),
        bnb.functional.dequantize_4bit(packed, state),
    )


def test_nested_scales_are_refused_there():
    layer = bnb.nn.Linear4bit(64, 64, bias=False, compress_statistics=True, quant_type="nf4")
    with pytest.raises(PhiSightError, match="^--quantization nf4-nested: .*--quantization nf4"):
        quantize(torch.randn(64, 64), layer, torch.float32, torch.device("mps"))


class NoDouble(TorchDispatchMode):
    """No operation makes or takes a float64, which Apple's GPUs do not have."""

    def __torch_dispatch__(self, function, types, arguments=(), named=None):
        result = function(*arguments, **(named or {}))
        for value in (*arguments, result):
            if isinstance(value, torch.Tensor) and value.dtype == torch.float64:
                raise TypeError(f"{function}: float64")
        return result


def test_a_step_there_takes_no_float64(model, samples, batch_of, monkeypatch):  # noqa: F811
    monkeypatch.setattr(ops, "choose", lambda *_: (ops.mps, ""))
    monkeypatch.setattr(step, "widest", lambda device: torch.float32)
    turn_dropout_off(model, monkeypatch)
    before = {name: p.detach().clone() for name, p in model.trainable()}
    model.train()
    optimizer, batches = AdamW(model.trainable()), [batch_of([samples])]
    try:
        with NoDouble():
            found = step.train_step(
                model, optimizer, LossScaler(False), batches, 0.0, 1.0, measure_updates=True
            )
        monkeypatch.setattr(step, "widest", lambda device: torch.float64)
        with NoDouble(), pytest.raises(TypeError, match="float64"):
            step.train_step(model, optimizer, LossScaler(False), batches, 0.0, 1.0)
    finally:
        with torch.no_grad():
            for name, parameter in model.trainable():
                parameter.copy_(before[name])
    assert found.loss_sum > 0 and found.gradient_norm > 0


def test_dropout_is_drawn_on_the_cpu_for_it(monkeypatch):
    """The same masks as a CPU's: a device that only says that it is one takes what is sent."""

    class OnMps:
        device, shape = torch.device("mps"), (2, 5, 64)

        def numel(self):
            return 640

    sent = []
    really = torch.Tensor.to

    def to(tensor, device, *rest):
        if getattr(device, "type", "") == "mps":
            sent.append(tensor)
            return tensor
        return really(tensor, device, *rest)

    dropout = RowDropout(0.5, 3)
    expected = dropout.draws(torch.empty(2, 5, 64), [1, 2], [5, 5])
    monkeypatch.setattr(torch.Tensor, "to", to)
    assert torch.equal(dropout.draws(OnMps(), [1, 2], [5, 5]), expected) and len(sent) == 1


def test_a_merge_is_rounded_by_the_cpu_where_there_is_no_float64(parts, monkeypatch):
    layer = next(
        m for m in parts.model.modules() if isinstance(m, LoRALinear) and m.base.in_features >= 64
    )
    assert (
        isinstance(layer.base, PanelLinear | bnb.nn.Linear4bit)
        and dense_weight(layer.base, torch.float32).isfinite().all()
    )
    expected = rounded_merge(layer.base, layer.lora_A, layer.lora_B, layer.scaling)
    monkeypatch.setattr("lora.rounding.widest", lambda device: torch.float32)
    found = rounded_merge(layer.base, layer.lora_A, layer.lora_B, layer.scaling)
    assert torch.equal(found.codes, expected.codes) and torch.equal(found.scales, expected.scales)


# -- its generator --------------------------------------------------------------------------------


def test_its_generator_is_saved_and_put_back_for_a_run_that_computes_on_it(monkeypatch):
    generator = torch.Generator().manual_seed(7)
    monkeypatch.setattr(torch.mps, "get_rng_state", generator.get_state)
    monkeypatch.setattr(torch.mps, "set_rng_state", generator.set_state)
    mps = torch.device("mps")
    saved = {name: tensor.clone() for name, tensor in rng.rng_state(mps).items()}
    assert saved["torch.mps"].dtype == torch.uint8
    drawn = torch.rand(5, generator=generator)
    rng.set_rng_state(saved, mps)
    assert torch.equal(torch.rand(5, generator=generator), drawn)
    assert "torch.mps" not in rng.rng_state(CPU)
    with pytest.raises(PhiSightError, match="torch.mps is missing"):
        rng.set_rng_state({n: t for n, t in saved.items() if n != "torch.mps"}, mps)
    with pytest.raises(PhiSightError, match="torch.mps is unexpected"):
        rng.set_rng_state(saved, CPU)
    rng.set_rng_state(rng.state_of_rank(saved, 1, ranks.Ranks()), mps)
