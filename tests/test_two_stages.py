"""LLaVA's two stages: the projector alone, then the projector and the adapter from there."""

import json
import shutil
from pathlib import Path

import pytest
import runs
import torch
from rollbacks import log_of
from safetensors.torch import load_file, save_file

import checkpoints
import config_values
from errors import PhiSightError
from model.build import assemble, model_state

FIRST = runs.SHORT | {"train_lora": "false", "max_steps": 3}


@pytest.fixture(scope="module")
def first_stage(tmp_path_factory) -> Path:
    """A finished run that trained the projector alone. Tests only read it."""
    run = tmp_path_factory.mktemp("stages") / "first"
    runs.start(run, **FIRST)
    return run


def second(run: Path, source: Path, *more: str, **fields: object) -> int:
    return runs.start(run, *more, **(runs.SHORT | {"start_from": source} | fields))


def test_the_first_stage_trains_the_projector_alone(first_stage, capsys):
    checkpoint = checkpoints.resolve(first_stage)
    config = config_values.from_dict(checkpoint.config["config"], "here")
    assert not config.train_lora
    fresh = assemble(config).model
    assert {name.split(".")[0] for name, _ in fresh.trainable()} == {"projector"}
    for name, tensor in checkpoint.state["lora_weights"].items():
        if name.endswith("lora_B"):
            assert not tensor.any()
        if name.endswith("lora_A"):
            assert torch.equal(tensor, fresh.language_model.get_parameter(name))
    projector = checkpoint.state["image_projector"]
    assert all(
        not torch.equal(tensor, fresh.projector.state_dict()[name])
        for name, tensor in projector.items()
    )
    moments = {name for name in checkpoint.state["optimizer"] if name != "step"}
    assert moments == {
        f"projector.{name}.{moment}" for name in projector for moment in ("exp_avg", "exp_avg_sq")
    }


def test_the_first_stage_can_be_stopped_and_gone_on_with(first_stage, tmp_path, capsys):
    runs.start(tmp_path / "run", "--stop-at-step=1", **FIRST)
    said = capsys.readouterr().out
    assert "FROZEN   lora" in said and "warning" not in said
    runs.resume(tmp_path / "run")
    assert checkpoints.diff(first_stage, tmp_path / "run").identical


def without_pictures(folder: Path, kept: int = 0) -> Path:
    """The small world, in which only every so many-th conversation keeps its picture."""
    records = json.loads((runs.world() / "train.json").read_text())
    for number, record in enumerate(records):
        if kept and number % kept == 0:
            continue
        record.pop("image")
        for turn in record["conversations"]:
            turn["value"] = turn["value"].replace("<image>", "").strip()
    path = folder / "mixed.json"
    path.write_text(json.dumps(records))
    return path


def test_the_first_stage_passes_over_rows_without_a_picture(tmp_path):
    """Such a row has a loss that no trained weight takes part in: its gradient is zero."""
    fields = FIRST | {
        "data": without_pictures(tmp_path, kept=5),
        "row_tokens": 0,
        "max_steps": 12,
        "log_steps": 1,
        "data_fraction": 1.0,
        "validation_fraction": 0.2,
    }
    runs.start(tmp_path / "whole", **fields)
    norms = [line.get("gradient_norm") for line in log_of(tmp_path / "whole") if "loss" in line]
    assert 0.0 in norms and any(norms)
    runs.start(tmp_path / "run", "--stop-at-step=5", **fields)
    runs.resume(tmp_path / "run")
    assert checkpoints.diff(tmp_path / "whole", tmp_path / "run").identical


def test_data_without_any_picture_train_no_projector(tmp_path, capsys):
    runs.start(tmp_path / "run", **FIRST | {"data": without_pictures(tmp_path)})
    warning = "no conversation that is trained on has a picture; --no-train-projector"
    assert warning in capsys.readouterr().out


def test_the_second_stage_begins_with_the_weights_of_the_first(first_stage, tmp_path, capsys):
    second(tmp_path / "run", first_stage, "--stop-at-step=1")
    assert f"weights of {first_stage} at step 3 (all steps done)" in capsys.readouterr().out
    first, run = checkpoints.resolve(first_stage), checkpoints.resolve(tmp_path / "run")
    # The first rate of a warm-up is 0: after one step the weights are still those of the start.
    assert checkpoints.weights_digest(run.state) == checkpoints.weights_digest(first.state)
    assert run.config["started_from"] == {
        "step": 3,
        "weights_digest": checkpoints.weights_digest(first.state),
        "finished": "all steps done",
    }
    assert any("lora" in name for name in run.state["optimizer"])


def test_the_second_stage_goes_on_when_the_first_is_gone(first_stage, tmp_path):
    source = shutil.copytree(first_stage, tmp_path / "first")
    second(tmp_path / "whole", source)
    second(tmp_path / "run", source, "--stop-at-step=1")
    shutil.rmtree(source)
    with pytest.raises(PhiSightError, match="config.start_from"):
        runs.resume(tmp_path / "run", "--start-from", str(first_stage))
    runs.resume(tmp_path / "run")
    assert checkpoints.diff(tmp_path / "whole", tmp_path / "run").identical


def test_a_run_from_nothing_says_so():
    assert checkpoints.resolve(runs.stopped_run()).config["started_from"] is None


OTHER_ADAPTERS = [
    ({"lora_alpha": 8.0}, "here --lora-rank 16 --lora-alpha 8.0 "),
    ({"lora_rank": 4}, "here --lora-rank 4 --lora-alpha 16.0 "),
    ({"lora_targets": "qkv_proj,o_proj"}, "--lora-targets o_proj,qkv_proj)"),
]


@pytest.mark.parametrize("fields", [fields for fields, _ in OTHER_ADAPTERS])
def test_an_adapter_that_was_not_trained_gives_way_to_another(first_stage, tmp_path, fields):
    run = tmp_path / "run"
    second(run, first_stage, "--stop-at-step=1", **fields)
    begun, first = checkpoints.resolve(run), checkpoints.resolve(first_stage)
    config = config_values.from_dict(begun.config["config"], "here")
    fresh = model_state(assemble(config).model)["lora_weights"]
    # The first rate of a warm-up is 0: after one step the weights are still those of the start.
    assert begun.state["lora_weights"].keys() == fresh.keys()
    assert all(torch.equal(t, fresh[name]) for name, t in begun.state["lora_weights"].items())
    for name, tensor in first.state["image_projector"].items():
        assert torch.equal(tensor, begun.state["image_projector"][name])
    runs.resume(run)
    second(tmp_path / "whole", first_stage, **fields)
    assert checkpoints.diff(tmp_path / "whole", run).identical


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        (
            {"feature_pooling": 2},
            "another way to read pictures (--vision-features patches --vision-layer",
        ),
        ({"quantization": "none"}, "another --quantization"),
        ({"start_from": "runs/no-such-run"}, "no-such-run"),
    ],
)
def test_weights_of_another_model_are_refused(first_stage, tmp_path, fields, said):
    refused(tmp_path / "run", first_stage, fields, said)


@pytest.mark.parametrize(("fields", "said"), OTHER_ADAPTERS)
def test_a_trained_adapter_of_another_shape_is_refused(tmp_path, fields, said):
    refused(tmp_path / "run", runs.finished_run(), fields, said)
    # What it was trained with is told as it can be typed.
    theirs = (
        "--lora-rank 16 --lora-alpha 16.0 --lora-targets down_proj,gate_up_proj,o_proj,qkv_proj"
    )
    refused(tmp_path / "run", runs.finished_run(), fields, f"another adapter ({theirs}, here")


def refused(run: Path, source: Path, fields: dict, said: str) -> None:
    with pytest.raises(PhiSightError) as caught:
        second(run, source, **fields)
    assert said in str(caught.value) and "\n" not in str(caught.value)
    assert not run.exists()


def test_another_base_is_refused(first_stage, tmp_path):
    base = shutil.copytree(runs.BASE, tmp_path / "base")
    tensors = load_file(base / "model.safetensors")
    tensors["model.norm.weight"][0] += 1
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    with pytest.raises(PhiSightError, match="was trained with another base"):
        second(tmp_path / "run", first_stage, base=base)


def test_a_run_does_not_begin_with_itself(first_stage, tmp_path):
    run = runs.copy_of(first_stage, tmp_path)
    before = runs.contents(run)
    for source in (run, checkpoints.resolve(run).path):
        with pytest.raises(PhiSightError, match="lies in --run"):
            second(run, source, "--overwrite")
    assert {name: data for name, data in runs.contents(run).items() if "lock" not in name} == {
        name: data for name, data in before.items() if "lock" not in name
    }
