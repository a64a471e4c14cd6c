"""AdamW, schedules, clipping and loss scaling against those of PyTorch and transformers."""

import json
import math

import pytest
import torch
from torch import nn
from transformers import get_cosine_schedule_with_warmup, get_linear_schedule_with_warmup

from errors import PhiSightError
from training.gradients import clip_gradients, owner_gradient_norms
from training.loss_scaler import LossScaler
from training.optimizer import AdamW
from training.schedule import lr_at

SHAPES = {"a.lora_A": (4, 32), "a.lora_B": (32, 4), "projector.bias": (7,), "scalar": ()}


def parameters(seed: int = 0) -> dict[str, nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return {n: nn.Parameter(torch.randn(s, generator=generator)) for n, s in SHAPES.items()}


def set_gradients(named: dict[str, nn.Parameter], step: int) -> None:
    generator = torch.Generator().manual_seed(1000 + step)
    for parameter in named.values():
        parameter.grad = torch.randn(parameter.shape, generator=generator) * 10.0 ** (step % 5 - 3)


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_twenty_steps_equal_torch_to_the_bit(weight_decay):
    mine, theirs = parameters(), parameters()
    start = parameters()
    ours = AdamW(mine.items(), (0.9, 0.95), 1e-8, weight_decay)
    reference = torch.optim.AdamW(
        theirs.values(), betas=(0.9, 0.95), eps=1e-8, weight_decay=weight_decay, foreach=True
    )
    for step in range(20):
        set_gradients(mine, step)
        set_gradients(theirs, step)
        rate = lr_at(step, 20, 0.1, 1e-2)
        reference.param_groups[0]["lr"] = rate
        reference.step()
        ours.step(rate)
    for name in SHAPES:
        assert torch.equal(mine[name], theirs[name]), name
        assert not torch.equal(mine[name], start[name])
        assert torch.equal(ours.exp_avg[name], reference.state[theirs[name]]["exp_avg"])
        assert torch.equal(ours.exp_avg_sq[name], reference.state[theirs[name]]["exp_avg_sq"])


def test_no_gradient_means_a_zero_gradient():
    mine, theirs = parameters(), parameters()
    ours, reference = AdamW(mine.items()), AdamW(theirs.items())
    for step in range(3):
        set_gradients(mine, step)
        set_gradients(theirs, step)
        if step == 1:
            mine["scalar"].grad = None
            theirs["scalar"].grad = torch.zeros(())
        ours.step(1e-2)
        reference.step(1e-2)
    assert all(torch.equal(mine[name], theirs[name]) for name in SHAPES)
    ours.zero_grad()
    assert all(parameter.grad is None for parameter in mine.values())


def test_state_round_trip_continues_to_the_bit():
    mine = parameters()
    ours = AdamW(mine.items(), weight_decay=0.01)
    for step in range(5):
        set_gradients(mine, step)
        ours.step(1e-2)
    state = {name: tensor.clone() for name, tensor in ours.state_tensors().items()}
    assert set(state) == {"step"} | {f"{n}.{k}" for n in SHAPES for k in ("exp_avg", "exp_avg_sq")}
    assert state["step"].item() == 5 and state["step"].dtype == torch.int64
    resumed = {name: nn.Parameter(p.detach().clone()) for name, p in mine.items()}
    theirs = AdamW(reversed(resumed.items()), weight_decay=0.01)  # by name, so any order will do
    theirs.load_state_tensors(state)
    for step in range(5, 10):
        for named, optimizer in ((mine, ours), (resumed, theirs)):
            set_gradients(named, step)
            optimizer.step(1e-2)
    assert all(torch.equal(mine[name], resumed[name]) for name in SHAPES)
    for name, tensor in ours.state_tensors().items():
        assert torch.equal(tensor, theirs.state_tensors()[name]), name


def test_load_names_every_problem_and_changes_nothing():
    optimizer = AdamW(parameters().items())
    state = {name: tensor + 1 for name, tensor in optimizer.state_tensors().items()}
    del state["scalar.exp_avg"]
    state["other.exp_avg"] = torch.zeros(1)
    state["a.lora_A.exp_avg"] = torch.zeros(4, 31)
    state["step"] = torch.tensor(1.0)
    with pytest.raises(PhiSightError) as caught:
        optimizer.load_state_tensors(state)
    for part in (
        "missing scalar.exp_avg",
        "unexpected other.exp_avg",
        "a.lora_A.exp_avg is (4, 31)",
        "step is () float32, not () int64",
    ):
        assert part in str(caught.value)
    assert all(not tensor.any() for tensor in optimizer.state_tensors().values())


def test_parameters_that_cannot_be_trained_are_refused():
    good = nn.Parameter(torch.zeros(2))
    cases = {
        "no trainable parameters": [],
        "b is given twice": [("a", good), ("b", good)],
        "a is given twice": [("a", good), ("a", nn.Parameter(torch.zeros(2)))],
        "a is frozen": [("a", nn.Parameter(torch.zeros(2), requires_grad=False))],
        "a is torch.bfloat16": [("a", nn.Parameter(torch.zeros(2, dtype=torch.bfloat16)))],
    }
    for message, pairs in cases.items():
        with pytest.raises(PhiSightError, match=message):
            AdamW(pairs)


@pytest.mark.parametrize(("total", "fraction"), [(50, 0.1), (50, 0.0), (7, 0.5), (100, 0.03)])
def test_rates_equal_transformers(total, fraction):
    makers = {"linear": get_linear_schedule_with_warmup, "cosine": get_cosine_schedule_with_warmup}
    for schedule, make in makers.items():
        optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=2e-4)
        reference = make(optimizer, math.ceil(total * fraction), total)
        for step in range(total + 1):
            expected = reference.get_last_lr()[0]
            assert math.isclose(
                lr_at(step, total, fraction, 2e-4, schedule), expected, rel_tol=1e-12, abs_tol=1e-18
            )
            optimizer.step()
            reference.step()


def test_constant_rate_warms_up_and_stays():
    rates = [lr_at(step, 10, 0.2, 1.0, "constant") for step in range(12)]
    assert rates == [0.0, 0.5] + [1.0] * 10
    with pytest.raises(PhiSightError, match="'step' is unknown"):
        lr_at(0, 10, 0.0, 1.0, "step")


@pytest.mark.parametrize("max_norm", [0.5, 1e6])
def test_clipping_equals_torch(max_norm):
    mine, theirs = parameters(), parameters()
    for named in (mine, theirs):
        set_gradients(named, 3)
        named["scalar"].grad = None
    expected = nn.utils.clip_grad_norm_(theirs.values(), max_norm)
    norm = clip_gradients((p for p in mine.values()), max_norm)
    torch.testing.assert_close(norm, expected, rtol=1e-6, atol=0)
    assert norm.shape == () and norm.dtype == torch.float32 and 0.5 < norm < 1e6
    for name in SHAPES:
        if name != "scalar":
            torch.testing.assert_close(mine[name].grad, theirs[name].grad, rtol=1e-6, atol=0)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_norm_that_is_not_finite_is_reported_and_nothing_is_scaled(bad):
    named = parameters()
    set_gradients(named, 4)
    named["projector.bias"].grad[2] = bad
    before = {name: p.grad.clone() for name, p in named.items()}
    assert not torch.isfinite(clip_gradients(named.values(), 1.0))
    assert all(
        torch.equal(p.grad.nan_to_num(5.0), before[name].nan_to_num(5.0))
        for name, p in named.items()
    )


def test_clipping_without_gradients_and_without_a_norm():
    assert clip_gradients(parameters().values(), 1.0) == 0
    for bad in (0.0, -1.0, float("nan")):
        with pytest.raises(PhiSightError, match="is not a norm"):
            clip_gradients(parameters().values(), bad)


def test_owner_norms_add_up_to_the_global_norm():
    named = parameters()
    set_gradients(named, 4)
    norms = owner_gradient_norms(
        named.items(), lambda name: "lora" if "lora" in name else "image_projector"
    )
    assert list(norms) == ["lora", "image_projector"]
    both = torch.cat([named["a.lora_A"].grad.flatten(), named["a.lora_B"].grad.flatten()])
    torch.testing.assert_close(norms["lora"], both.norm())
    total = clip_gradients(named.values(), 1.0)
    torch.testing.assert_close(torch.stack(list(norms.values())).norm(), total)


def test_loss_scale_moves_as_that_of_torch():
    ours = LossScaler(True, initial_scale=64.0, growth_interval=3)
    scale, tracker = torch.tensor(64.0), torch.tensor(0, dtype=torch.int32)
    seen = set()
    for finite in [True, True, False, True, True, True, True, False, False] + [True] * 12:
        ours.update(finite)
        torch._amp_update_scale_(scale, tracker, torch.tensor(float(not finite)), 2.0, 0.5, 3)
        assert (ours.scale, ours.growth_tracker) == (scale.item(), tracker.item())
        seen.add(ours.scale)
    assert len(seen) > 4


def test_scaled_gradients_come_back_unscaled():
    weight, other = nn.Parameter(torch.tensor([1.0, 2.0])), nn.Parameter(torch.zeros(1))
    scaler = LossScaler(True, initial_scale=1024.0)
    scaler.scale_loss((weight * torch.tensor([3.0, 4.0])).sum()).backward()
    assert torch.equal(weight.grad, torch.tensor([3072.0, 4096.0]))
    scaler.unscale_gradients([weight, other])
    assert torch.equal(weight.grad, torch.tensor([3.0, 4.0])) and other.grad is None


def test_scaler_state_round_trip_and_strictness():
    scaler = LossScaler(True, growth_interval=5)
    for finite in (True, False, True, True):
        scaler.update(finite)
    state = json.loads(json.dumps(scaler.state_dict()))
    resumed = LossScaler(True)
    resumed.load_state_dict(state)
    for _ in range(3):
        scaler.update(True)
        resumed.update(True)
    assert scaler.state_dict() == resumed.state_dict() and resumed.scale == 2.0**16
    with pytest.raises(PhiSightError, match="enabled was True and is False"):
        LossScaler(False).load_state_dict(state)
    del state["growth_tracker"]
    with pytest.raises(PhiSightError, match="loss scaler state"):
        resumed.load_state_dict(state)


def test_disabled_scaler_does_nothing_and_a_diverged_one_stops():
    scaler, loss = LossScaler(False), torch.tensor(3.0)
    scaler.update(False)
    assert scaler.scale == 1.0 and scaler.scale_loss(loss) is loss
    stuck = LossScaler(True)
    with pytest.raises(PhiSightError, match="diverged"):
        for _ in range(40):
            stuck.update(False)
    assert stuck.scale == 2.0**-14
