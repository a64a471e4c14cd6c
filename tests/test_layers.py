"""Which layers training changed most: the sizes are those of matrices that are written out."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import runs
import torch
from hypothesis import given
from hypothesis import strategies as st

import checkpoints
import config as configs
import config_values
from errors import PhiSightError
from lora.merge import merged_weight
from model.build import assemble, load_model_state, model_state
from ops.nf4 import base_weight
from reports import layers
from reports.layers import difference_norm, product_norm


def written_out(checkpoint: checkpoints.Checkpoint) -> dict[str, torch.Tensor]:
    """Layer -> what its adapter adds to the weight of the base, (outputs, inputs) float64."""
    parts = assemble(config_values.from_dict(checkpoint.config["config"], "here"))
    load_model_state(parts.model, checkpoint.state)
    wrapped = {
        name.removesuffix(".lora_A"): parts.model.language_model.get_submodule(name[:-7])
        for name in checkpoint.state["lora_weights"]
        if name.endswith(".lora_A")
    }
    return {
        name: (layer.scaling.double() * (layer.lora_B.double() @ layer.lora_A.double())).detach()
        for name, layer in wrapped.items()
    }


def altered(checkpoint: checkpoints.Checkpoint, change) -> checkpoints.Checkpoint:
    """The checkpoint with copies of its tensors, of which `change` may change some."""
    state = {
        stem: {name: tensor.clone() for name, tensor in tensors.items()}
        for stem, tensors in checkpoint.state.items()
    }
    change(state)
    return dataclasses.replace(checkpoint, state=state)


@pytest.fixture(scope="module")
def finished() -> checkpoints.Checkpoint:
    return checkpoints.resolve(runs.finished_run())


@pytest.fixture(scope="module")
def found(finished) -> layers.Changes:
    return layers.since_start(finished)


# -- the norm of a product ------------------------------------------------------------------------


@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 6), st.integers(0, 2**32))
def test_the_norm_of_a_product_is_that_of_the_matrix(outputs, inputs, rank, seed):
    generator = torch.Generator().manual_seed(seed)
    b = torch.randn(outputs, rank, generator=generator, dtype=torch.float64)
    a = torch.randn(rank, inputs, generator=generator, dtype=torch.float64)
    assert product_norm(b, a) == pytest.approx(torch.linalg.matrix_norm(b @ a).item(), rel=1e-12)
    assert product_norm(4 * b, a / 4) == pytest.approx(product_norm(b, a), rel=1e-14)
    other_b = torch.randn(outputs, rank + 2, generator=generator, dtype=torch.float64)
    other_a = torch.randn(rank + 2, inputs, generator=generator, dtype=torch.float64)
    for first, second in (((b, a), (other_b, other_a)), ((other_b, other_a), (b, a))):
        gap = torch.linalg.matrix_norm(first[0] @ first[1] - second[0] @ second[1]).item()
        assert difference_norm(first, second) == pytest.approx(gap, rel=1e-12)
    assert difference_norm((b, a), (b.clone(), a.clone())) == 0.0


def test_a_difference_in_the_last_bit_is_measured():
    generator = torch.Generator().manual_seed(0)
    b, a = (torch.randn(size, generator=generator) for size in ((64, 8), (8, 48)))
    other = a.clone()
    other[3, 5] = torch.nextafter(a[3, 5], torch.tensor(9.0))
    step = (other[3, 5] - a[3, 5]).double()
    size = difference_norm((b.double(), a.double()), (b.double(), other.double()))
    assert size == pytest.approx((b[:, 3].double().norm() * step).item(), rel=1e-9)


# -- over a base ----------------------------------------------------------------------------------


def test_sizes_and_ranks_are_those_of_the_matrices(finished, found):
    parts = assemble(config_values.from_dict(finished.config["config"], "here"))
    drawn = model_state(parts.model)["image_projector"]
    drawn = {name: tensor.clone() for name, tensor in drawn.items()}
    load_model_state(parts.model, finished.state)
    expected = {}
    for name in finished.state["lora_weights"]:
        layer_name, _, part = name.rpartition(".")
        if part == "lora_A":
            layer = parts.model.language_model.get_submodule(layer_name)
            weight = base_weight(layer.base).double()
            update = merged_weight(layer).double() - weight
            expected[layer_name] = (update.norm().item(), weight.norm().item())
    for name, tensor in finished.state["image_projector"].items():
        gap = (tensor.double() - drawn[name].double()).norm().item()
        expected[name] = (gap, drawn[name].double().norm().item())
    assert {change.name for change in found.changes} == expected.keys()
    for change in found.changes:
        size, weight = expected[change.name]
        assert change.weight == pytest.approx(weight, rel=1e-12)
        # A merged weight is rounded to float32, which is not small beside what training changed.
        assert change.size == pytest.approx(size, rel=1e-3) and change.size > 0
    shares = [expected[change.name][0] / expected[change.name][1] for change in found.changes]
    assert shares == sorted(shares, reverse=True)


def test_an_update_is_the_same_however_its_scale_is_told(finished, found):
    def rescale(state):
        for name, tensor in state["lora_weights"].items():
            tensor.mul_(0.25 if name.endswith("scaling") else 2.0)

    assert layers.since_start(altered(finished, rescale)).changes == found.changes


@pytest.mark.parametrize("part", ["lora_A", "lora_B"])
def test_the_layer_that_was_changed_comes_first(finished, part):
    name = next(n for n in finished.state["lora_weights"] if n.endswith(f"1.mlp.down_proj.{part}"))

    def change_one(state):
        state["lora_weights"][name] += 1

    other = altered(finished, change_one)
    assert layers.since_start(other).changes[0].name == name.removesuffix(f".{part}")
    between = layers.between(finished, other)
    assert [change.name for change in between.changes if change.size] == [name[:-7]]
    gap = torch.linalg.matrix_norm(
        written_out(other)[name[:-7]] - written_out(finished)[name[:-7]]
    ).item()
    assert between.changes[0].size == pytest.approx(gap, rel=1e-9)
    assert not between.identical and layers.between(finished, finished).identical


def test_an_adapter_of_other_layers_and_another_rank_is_compared(finished, tmp_path):
    fields = runs.SHORT | {"lora_rank": 4, "lora_targets": "o_proj", "save_steps": 2}
    runs.start(tmp_path / "other", **fields)
    other = checkpoints.resolve(tmp_path / "other")
    first, second = written_out(finished), written_out(other)
    assert second.keys() < first.keys()
    for change in layers.between(other, finished).changes:
        if change.owner == "lora":
            gap = first[change.name] - second.get(change.name, 0)
            assert change.size == pytest.approx(torch.linalg.matrix_norm(gap).item(), rel=1e-9)


def test_what_a_projector_began_with_is_known_where_it_was_drawn(finished, tmp_path):
    runs.start(tmp_path / "second", **runs.SHORT, start_from=runs.finished_run())
    second = layers.since_start(checkpoints.resolve(tmp_path / "second"))
    assert {change.owner for change in second.changes} == {"lora"}
    assert "what it was at first is not in the checkpoint" in str(second)
    frozen = tmp_path / "frozen"
    runs.start(frozen, **runs.SHORT, train_projector="false")
    projector = [
        change.size
        for change in layers.since_start(checkpoints.resolve(frozen)).changes
        if change.owner == "projector"
    ]
    assert projector == [0.0] * 4


# -- the command ----------------------------------------------------------------------------------


def test_the_command_tells_and_its_exit_code_says_whether_two_differ(found, tmp_path, capsys):
    run = str(runs.finished_run())
    assert checkpoints.main(["show", run, "--base"]) == 0
    lines = capsys.readouterr().out.splitlines()
    first = found.changes[0]
    assert lines[0].endswith(f"over {runs.BASE} in nf4")
    assert lines[2].endswith(f"  {first.owner} {first.name}")
    assert lines[2].startswith(f"{100 * first.share:.3g} %".rjust(9))
    assert checkpoints.main(["show", run, "--base", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == found.as_json()
    assert checkpoints.main(["diff", run, run, "--by-layer"]) == 0
    assert checkpoints.main(["diff", run, str(runs.stopped_run()), "--by-layer", "--json"]) == 1
    shown = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert shown["changes"][0]["share"] > 0 and set(shown["kinds"]) == set(configs.LORA_TARGETS)


def test_a_base_that_was_unpacked_with_its_run_is_taken(tmp_path, capsys):
    run = runs.copy_of(runs.stopped_run(), tmp_path)
    shutil.copytree(runs.BASE, run / "packed/base")
    assert checkpoints.main(["show", str(run), "--base"]) == 0
    assert f"over {run}/packed/base in nf4" in capsys.readouterr().out


def test_the_base_may_have_moved_and_another_is_refused(finished, found, tmp_path):
    moved = Path(shutil.copytree(runs.BASE, tmp_path / "moved"))
    assert layers.since_start(finished, str(moved)).changes == found.changes
    config = moved / "config.json"
    config.write_text(config.read_text() + "\n")
    with pytest.raises(PhiSightError, match="another base than .*moved; name .*--base-folder"):
        layers.since_start(finished, str(moved))
    facts = finished.config | {"base_fingerprint": "0"}
    with pytest.raises(PhiSightError, match="has another base than .*; leave --by-layer out"):
        layers.between(finished, dataclasses.replace(finished, config=facts))


def test_what_was_zero_has_no_share_and_comes_last():
    """As the biases of a projector's norms, which begin as zeros, would else come first."""
    given = [
        layers.Change("projector", "norm.bias", 0.5, 0.0),
        layers.Change("lora", "a", 1.0, 4.0),
    ]
    found = layers.ranked("of", given)
    assert [change.name for change in found.changes] == ["a", "norm.bias"]
    assert [line.split("  ")[-1] for line in str(found).splitlines()[2:4]] == [
        "lora a",
        "projector norm.bias",
    ]
    assert str(found).splitlines()[3].split()[:2] == ["from", "0"]
    assert found.as_json()["changes"][1]["share"] is None


@pytest.mark.parametrize(
    ("stem", "change", "said"),
    [
        ("lora_weights", lambda name, t: {name: t[:, :-1]}, "fits no layer of that name"),
        ("lora_weights", lambda name, t: {name: t[:-1]}, "do not belong together"),
        ("lora_weights", lambda name, t: {f"x{name}": t}, "is missing; use the checkpoint"),
        ("lora_weights", lambda name, t: {name: t * float("nan")}, "not finite; use another"),
        ("image_projector", lambda name, t: {name: t * float("inf")}, "not finite; use another"),
        ("image_projector", lambda name, t: {name: t[:0]}, "has no first layer"),
        ("image_projector", lambda name, t: {"other": t}, "has no first layer"),
        ("image_projector", lambda name, t: {name: t, "other": t}, "unexpected other"),
    ],
)
def test_tensors_of_something_else_are_one_error(finished, stem, change, said):
    def spoil(state):
        name = next(n for n in state[stem] if n.endswith(("lora_A", "linear_1.weight")))
        state[stem] |= change(name, state[stem].pop(name))

    with pytest.raises(PhiSightError, match=said):
        layers.since_start(altered(finished, spoil))


def test_a_checkpoint_of_no_run_is_refused(finished):
    with pytest.raises(PhiSightError, match="config is missing; use the checkpoint of a run"):
        layers.since_start(dataclasses.replace(finished, config={}))
