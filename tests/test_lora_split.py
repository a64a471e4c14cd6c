"""Adapters of parts of a fused layer: against PEFT on transformers' own model, whose parts are
layers of their own, and against the matrices that they stand for."""

from __future__ import annotations

from pathlib import Path

import peft
import pytest
import runs
import torch
from hypothesis import given
from hypothesis import strategies as st
from random_model import hub_model, ours_of
from test_families import small_config
from test_lora import ALPHA, RANK, draw, four_bit_linear, plain_linear, seeded
from torch import Tensor, nn
from torch.nn import functional

import checkpoints
from assistant.assistant import Assistant
from errors import PhiSightError
from lora.inject import inject
from lora.layer import LoRALinear
from lora.merge import merged_weight
from lora.rounding import rounded_merge
from lora.split import SplitLoRALinear, join
from lora.state import load_lora_state, lora_state
from model.decoder import LanguageModel
from model.families.fused import fused_parts
from ops.nf4 import base_weight
from reports import layers
from training.optimizer import AdamW

ROWS = {"q_proj": 64, "k_proj": 16, "v_proj": 16}
SEPARATE = ("q_proj", "v_proj", "o_proj", "up_proj")


def split_layer(base: nn.Linear, dropout: float = 0.0, rounds: bool = False) -> SplitLoRALinear:
    """Adapters of queries and values, whose B are no longer zero."""
    given = (RANK, ALPHA, dropout, seeded(), 7, rounds)
    layer = SplitLoRALinear(base, *given, rows=ROWS, adapted=("v_proj", "q_proj"))
    with torch.no_grad():
        for number, part in enumerate(layer.parts().values()):
            part.lora_B.copy_(draw(*part.lora_B.shape, seed=number + 4))
    return layer


def update_of(layer: SplitLoRALinear) -> Tensor:
    """What the parts add to the weight, written row by row; nothing to the keys."""
    q, v = layer.parts()["q_proj"], layer.parts()["v_proj"]
    rows = [q.lora_B @ q.lora_A, torch.zeros(16, 64), v.lora_B @ v.lora_A]
    return ALPHA / RANK * torch.cat(rows)


# -- against PEFT ---------------------------------------------------------------------------------


CONFIGS = {
    "smollm2": small_config("llama", tied=True),
    "qwen2.5": small_config("qwen2"),
    "qwen3": small_config("qwen3", head_dim=32),
}


def base_pair(name: str) -> tuple[LanguageModel, nn.Module]:
    """Our decoder and transformers' of the same random weights."""
    hub = hub_model(CONFIGS[name])
    return ours_of(hub), hub


@pytest.mark.parametrize(
    ("name", "targets", "stabilized"),
    [
        ("smollm2", ("q_proj", "v_proj"), False),
        ("qwen2.5", ("k_proj", "v_proj", "o_proj", "gate_proj", "down_proj"), False),
        ("qwen3", ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"), True),
    ],
)
def test_four_steps_are_those_of_peft(name, targets, stabilized):
    """Losses, gradients and weights, over random text; every part has its own A in both."""
    ours, hub = base_pair(name)
    settings = peft.LoraConfig(
        r=4, lora_alpha=6, target_modules=list(targets), use_rslora=stabilized, lora_dropout=0.0
    )
    theirs = peft.get_peft_model(hub, settings).train()
    inject(
        ours, targets, 4, 6.0, 0.0, seeded(),
        rank_stabilized=stabilized, fused=fused_parts(ours.config),
    )  # fmt: skip
    pairs = {}
    for own, parameter in theirs.named_parameters():
        if "lora_" in own:
            place, _, rest = own.removeprefix("base_model.model.").partition(".lora_")
            block, _, kind = place.rpartition(".")
            found = [n for n, _ in ours.named_parameters() if n.startswith(block)]
            [mine] = [n for n in found if n.endswith(f".{kind}.lora_{rest[0]}")]
            pairs[mine] = parameter
            nn.init.normal_(parameter, std=0.1)
            ours.get_parameter(mine).data.copy_(parameter)
    trained = {n: p for n, p in ours.named_parameters() if p.requires_grad}
    assert trained.keys() == pairs.keys() and len(pairs) == 2 * 2 * len(targets)
    mine, reference = AdamW(trained.items()), torch.optim.AdamW(pairs.values(), weight_decay=0.0)
    for step in range(4):
        ids = torch.randint(1, 61, (33,), generator=seeded(step))
        embedded = ours.model.embed_tokens(ids[None, :-1])
        states = ours.model.train()(embedded, torch.arange(32)[None], [32])
        loss = functional.cross_entropy(ours.lm_head(states)[0], ids[1:])
        expected = functional.cross_entropy(theirs(input_ids=ids[None, :-1]).logits[0], ids[1:])
        torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
        loss.backward()
        expected.backward()
        for one, parameter in trained.items():
            torch.testing.assert_close(parameter.grad, pairs[one].grad, rtol=1e-4, atol=1e-5)
        mine.step(1e-3)
        reference.param_groups[0]["lr"] = 1e-3
        reference.step()
        mine.zero_grad()
        reference.zero_grad()
    for one, parameter in trained.items():
        torch.testing.assert_close(parameter, pairs[one], rtol=1e-3, atol=1e-4)


# -- the layer ------------------------------------------------------------------------------------


@given(st.sets(st.sampled_from([*ROWS]), min_size=1), st.integers(1, 3))
def test_joined_parts_have_the_product_of_each(present, rank):
    pairs = {
        part: (draw(rank, 7, seed=place), draw(rows, rank, seed=place + 9))
        for place, (part, rows) in enumerate(ROWS.items())
        if part in present
    }
    a, b = join(pairs, ROWS)
    wanted = torch.cat(
        [
            pairs[p][1] @ pairs[p][0] if p in pairs else torch.zeros(rows, 7)
            for p, rows in ROWS.items()
        ]
    )
    assert a.shape == (rank * len(pairs), 7)
    torch.testing.assert_close(b @ a, wanted, atol=1e-6, rtol=1e-6)


def test_forward_and_merge_are_of_the_rows_of_the_parts():
    layer, x = split_layer(plain_linear()).eval(), draw(3, 5, 64)
    whole = layer.base.weight + update_of(layer)
    torch.testing.assert_close(layer(x), functional.linear(x, whole, layer.base.bias))
    torch.testing.assert_close(merged_weight(layer), whole)
    keys = slice(64, 80)
    assert torch.equal(merged_weight(layer)[keys], layer.base.weight[keys])


def test_one_mask_hides_the_input_from_all_parts():
    layer, x = split_layer(plain_linear(), dropout=0.5).train(), draw(2, 5, 64)
    mask, scale = layer.dropout.mask(x, [3, 4])
    expected = layer.base(x) + functional.linear(x * mask * scale, update_of(layer))
    torch.testing.assert_close(layer(x, [3, 4]), expected)


def test_a_part_that_is_changed_counts_at_once_without_a_gradient():
    layer, x = split_layer(plain_linear()).eval(), draw(3, 64)
    with torch.no_grad():
        before = layer(x)
        assert layer.factors()[1] is layer.factors()[1]  # made once
        layer.parts()["v_proj"].lora_B.mul_(2)
        after = layer(x)
    assert torch.equal(before[:, :80], after[:, :80]) and not torch.equal(before, after)


def test_a_layer_that_rounds_multiplies_by_the_rounded_sum():
    base = four_bit_linear()
    layer, x = split_layer(base, rounds=True), draw(3, 64)
    made = rounded_merge(base, *layer.factors(), layer.scaling)
    torch.testing.assert_close(made.weight(), base_weight(layer.rounded()))
    y = layer(x)
    torch.testing.assert_close(y, x @ made.weight().T)
    y.square().sum().backward()
    assert all(part.lora_A.grad.any() and part.lora_B.grad.any() for part in layer.parts().values())
    old = layer.rounded()
    with torch.no_grad():
        layer.parts()["q_proj"].lora_A.add_(0.5)
    assert layer.rounded() is not old


# -- into a model, and its state ------------------------------------------------------------------


class Block(nn.Module):
    """Queries, keys and values in one layer, and what follows."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv_proj, self.o_proj = plain_linear(64, 96), plain_linear(64, 64)


FUSED = {"qkv_proj": ROWS}


def injected(*targets: str, seed: int = 0) -> nn.ModuleList:
    model = nn.ModuleList([Block(), Block()])
    inject(model, targets, RANK, ALPHA, 0.1, seeded(seed), fused=FUSED)
    return model


def test_parts_are_drawn_in_the_order_of_their_rows_and_named_after_them():
    model, generator = injected("v_proj", "o_proj", "q_proj"), seeded()
    names = [
        *("0.qkv_proj.q_proj", "0.qkv_proj.v_proj", "0.o_proj"),
        *("1.qkv_proj.q_proj", "1.qkv_proj.v_proj", "1.o_proj"),
    ]
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert trained == [f"{name}.{factor}" for name in names for factor in ("lora_A", "lora_B")]
    for name in names:
        drawn = torch.empty(RANK, 64)
        nn.init.kaiming_uniform_(drawn, a=5**0.5, generator=generator)
        assert torch.equal(model.get_parameter(f"{name}.lora_A"), drawn)
        assert not model.get_parameter(f"{name}.lora_B").any()
    assert model[0].qkv_proj.lora_B.shape == (96, 2 * RANK)


def test_the_state_has_the_parts_and_one_scaling_and_goes_back_in():
    source, target = injected("q_proj", "k_proj"), injected("q_proj", "k_proj", seed=1)
    for number, parameter in enumerate(source.parameters()):
        parameter.data.copy_(draw(*parameter.shape, seed=number))
    state = lora_state(source)
    parts = ("q_proj.lora_A", "q_proj.lora_B", "k_proj.lora_A", "k_proj.lora_B", "scaling")
    assert [*state] == [f"{block}.qkv_proj.{name}" for block in (0, 1) for name in parts]
    load_lora_state(target, state)
    for a, b in zip(source[1].qkv_proj.factors(), target[1].qkv_proj.factors(), strict=True):
        assert torch.equal(a, b)
    with pytest.raises(PhiSightError, match="0.qkv_proj.k_proj.lora_A.*unexpected|missing"):
        load_lora_state(injected("q_proj", "v_proj"), state)


def test_named_whole_nothing_is_otherwise():
    """The same draws and the same names, whether or not the parts are known."""
    with_parts = lora_state(injected("qkv_proj", "o_proj"))
    model = nn.ModuleList([Block(), Block()])
    inject(model, ["qkv_proj", "o_proj"], RANK, ALPHA, 0.1, seeded())
    without = lora_state(model)
    assert [*with_parts] == [*without]
    assert all(torch.equal(with_parts[name], tensor) for name, tensor in without.items())


def test_the_head_gets_no_adapter():
    model = nn.ModuleDict({"layer": Block(), "lm_head": nn.Linear(64, 99)})
    with pytest.raises(PhiSightError) as error:
        inject(model, ["o_proj", "lm_head"], RANK, ALPHA, 0.1, seeded(), fused=FUSED)
    assert str(error.value) == (
        "LoRA targets: lm_head gets no adapter: the loss is computed from its weight as it is; the"
        " layers that can have one are o_proj, qkv_proj (or its parts q_proj, k_proj, v_proj)"
    )


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (
            ("q_proj", "qkv_proj"),
            "LoRA targets: qkv_proj and its part q_proj are both named; name the whole layer, or"
            " of its parts (q_proj, k_proj, v_proj) those that get an adapter",
        ),
        (
            ("c_attn", "q_proj"),
            "LoRA targets: c_attn matches no layer; the layers that can have one are o_proj,"
            " qkv_proj (or its parts q_proj, k_proj, v_proj)",
        ),
        (
            ("gate_proj",),
            "LoRA targets: gate_proj matches no layer; the layers that can have one are o_proj,"
            " qkv_proj (or its parts q_proj, k_proj, v_proj)",
        ),
    ],
)
def test_bad_targets_are_one_line(targets, message):
    with pytest.raises(PhiSightError) as error:
        injected(*targets)
    assert str(error.value) == message


def test_parts_that_do_not_fill_the_layer_and_a_rank_above_them_are_refused():
    model = nn.ModuleList([Block()])
    with pytest.raises(PhiSightError, match="a layer of 96 outputs is not q_proj 64 . k_proj 16"):
        inject(
            model, ["q_proj"], RANK, ALPHA, 0.0, seeded(),
            fused={"qkv_proj": {"q_proj": 64, "k_proj": 16}},
        )  # fmt: skip
    model = nn.ModuleList([Block()])
    with pytest.raises(PhiSightError, match=r"--lora-rank 65: larger than every wrapped layer .64"):
        inject(model, ["q_proj"], 65, ALPHA, 0.0, seeded(), fused=FUSED)
    assert not any(isinstance(module, LoRALinear) for module in model.modules())


# -- a run ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A short run of separate targets, rank-stabilised. Tests only read it."""
    folder = tmp_path_factory.mktemp("split") / "run"
    runs.start(folder, **FIELDS)
    return folder


FIELDS = runs.SHORT | {
    "lora_targets": ",".join(SEPARATE),
    "rank_stabilized": "true",
    "lora_rank": 4,
    "max_steps": 3,
}


def test_a_run_that_was_stopped_ends_as_one_that_was_not(run, tmp_path):
    runs.start(tmp_path / "run", "--stop-at-step=1", **FIELDS)
    runs.resume(tmp_path / "run")
    assert checkpoints.diff(run, tmp_path / "run").identical
    state = checkpoints.resolve(run).state["lora_weights"]
    assert {name.split(".")[-2] for name in state if name.endswith("lora_B")} == set(SEPARATE)
    assert all(tensor.any() for tensor in state.values())
    scales = {tensor.item() for name, tensor in state.items() if name.endswith("scaling")}
    assert scales == {16.0 / 4**0.5}


def test_changes_by_layer_are_those_of_the_rows(run):
    found = layers.changes(checkpoints.resolve(run))
    assert set(found.kinds()) == set(SEPARATE)
    model = Assistant.load(run).model.language_model
    layer = model.model.layers[0].self_attn.qkv_proj
    part, weight = layer.parts()["v_proj"], base_weight(layer.base)[-layer.rows["v_proj"] :]
    [change] = [c for c in found.changes if c.name == "model.layers.0.self_attn.qkv_proj.v_proj"]
    size = (layer.scaling * part.lora_B @ part.lora_A).double().norm().item()
    assert change.weight == pytest.approx(weight.norm().item(), rel=1e-6)
    assert change.size == pytest.approx(size, rel=1e-4) and size > 0


def test_runs_of_whole_and_of_separate_layers_are_compared_by_part(run):
    """Each part of the one beside its rows of the other, not each beside nothing."""
    whole = checkpoints.resolve(runs.stopped_run())
    found = layers.changes(whole, checkpoints.resolve(run))
    names = {change.name for change in found.changes if "layers.0." in change.name}
    place = "model.layers.0.self_attn."
    assert f"{place}qkv_proj" not in names
    assert {f"{place}qkv_proj.{part}" for part in ROWS} <= names
