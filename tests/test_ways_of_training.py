"""What a run may do otherwise than by default: learn all text, leave its projector as it is or give
it dropout, give each conversation a row of its own. All of it is part of the run, and resumed to
the bit."""

from collections import Counter
from pathlib import Path

import pytest
import runs
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import checkpoints
import config as configs
import config_values
from data.chat import all_learnt, render
from data.dataset import Message, Part
from data.features import FeatureStore
from data.prepare import TrainingData, prepare
from data.sampler import plan
from errors import PhiSightError
from model.build import assemble
from reports.log import read_metrics
from training.options import parse
from training.progress import Progress
from training.rows import Rows, note_packing

SHORT = runs.SHORT | {"max_steps": 3, "log_steps": 1, "evaluate_steps": 3}
WAYS = {
    "supervise": "all",
    "train_projector": "false",
    "projector_dropout": "0.3",
    "pack": "false",
}
OTHERWISE = {
    "supervise": "answers",
    "train_projector": "true",
    "projector_dropout": "0",
    "pack": "true",
}


def prepared(run: Path, **fields: object) -> tuple[TrainingData, object]:
    """What a run of the small world trains on, and how it renders."""
    config, _ = parse(runs.flags(run, **fields))
    parts = assemble(config)
    store = FeatureStore(config.features, parts.vision.key, parts.vision.shape)

    def tower():
        raise AssertionError("the features are there already")

    runs.finished_run()  # has computed them
    data = prepare(config, parts.chat_format, store, tower, positions=4096)
    return data, parts.chat_format


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> dict[str, Path]:
    """A run of each way that was never stopped. Tests only read them."""
    made = {}
    for name, value in WAYS.items():
        made[name] = tmp_path_factory.mktemp("ways") / name
        runs.start(made[name], **(SHORT | {name: value}))
    return made


# -- all of it ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", WAYS)
def test_a_run_that_was_stopped_ends_as_one_that_was_not(name, whole, tmp_path):
    runs.start(tmp_path / "run", "--stop-at-step=2", **(SHORT | {name: WAYS[name]}))
    runs.resume(tmp_path / "run")
    assert checkpoints.diff(whole[name], tmp_path / "run").identical


@pytest.mark.parametrize("name", WAYS)
def test_a_resume_that_would_do_otherwise_is_refused(name, tmp_path):
    runs.start(tmp_path / "run", "--stop-at-step=2", **(SHORT | {name: WAYS[name]}))
    with pytest.raises(PhiSightError, match=rf"not be exact.*config\.{name}:"):
        runs.resume(tmp_path / "run", f"--{name.replace('_', '-')}={OTHERWISE[name]}")


def test_checkpoints_from_before_these_fields_are_of_the_defaults():
    saved = config_values.to_dict(configs.default_config())
    expected = {
        "supervise": "answers",
        "train_projector": True,
        "projector_dropout": 0.0,
        "pack": True,
    }
    assert {name: saved.pop(name) for name in WAYS} == expected
    read = config_values.from_dict(saved, "an old checkpoint")
    assert {name: getattr(read, name) for name in WAYS} == expected


# -- labels ---------------------------------------------------------------------------------------


def test_all_text_behind_the_first_token_is_learnt_and_no_picture(tmp_path):
    answers, chat_format = prepared(tmp_path / "run")
    everything, _ = prepared(tmp_path / "run", supervise="all")
    assert len(everything.train) == len(answers.train) > 0
    for sample, usual in zip(everything.train, answers.train):
        assert (sample.input_ids, sample.images) == (usual.input_ids, usual.images)
        for place, (token, learnt) in enumerate(zip(sample.input_ids, sample.supervised)):
            assert learnt == (place > 0 and token != chat_format.image_id)
        assert sum(sample.supervised) > sum(usual.supervised)
    assert everything.fingerprint != answers.fingerprint


def test_the_validation_loss_is_over_answers_either_way(tmp_path):
    answers, _ = prepared(tmp_path / "run")
    everything, _ = prepared(tmp_path / "run", supervise="all")
    assert everything.validation == answers.validation
    assert everything.first_exchanges == answers.first_exchanges


def test_a_system_message_is_learnt_too(tmp_path):
    _, chat_format = prepared(tmp_path / "run")
    messages = [
        Message("system", (Part("text", "Be brief."),)),
        Message("user", (Part("image", "a.png"), Part("text", "What is it?"))),
        Message("assistant", (Part("text", "red"),)),
    ]
    sample = all_learnt(render(messages, chat_format), chat_format)
    pictures = sample.input_ids.count(chat_format.image_id)
    assert pictures == chat_format.tokens_per_image
    assert sample.supervised.count(False) == 1 + pictures and not sample.supervised[0]


@pytest.mark.parametrize("name", ["supervise", "pack"])
def test_a_step_counts_what_it_learns(name, whole):
    """Of the first step, against a count over the conversations of its rows."""
    data, _ = prepared(whole[name], **(SHORT | {name: WAYS[name]}))
    config, _ = parse(runs.flags(whole[name], **(SHORT | {name: WAYS[name]})))
    rows = Rows(config, data.train.lengths)
    samples = [data.train[i] for n in rows.of_step(0, 0) for i in rows.of_epoch(0)[n]]
    record = read_metrics(whole[name] / "metrics.jsonl")[0]
    assert record["supervised_tokens"] == sum(sum(sample.supervised) for sample in samples)
    assert record["tokens"] == sum(len(sample.input_ids) for sample in samples)
    places = rows.row_tokens * config.batch_size
    assert record["padding_share"] == pytest.approx(1 - record["tokens"] / places)


# -- the projector --------------------------------------------------------------------------------


def test_a_frozen_projector_stays_as_it_was_drawn_and_has_no_moments(whole, capsys):
    checkpoint = checkpoints.resolve(whole["train_projector"])
    config = config_values.from_dict(checkpoint.config["config"], "here")
    fresh = assemble(config).model
    assert {name.rpartition(".")[2] for name, _ in fresh.trainable()} == {"lora_A", "lora_B"}
    projector = checkpoint.state["image_projector"]
    assert projector.keys() == fresh.projector.state_dict().keys() and projector
    for name, tensor in fresh.projector.state_dict().items():
        assert torch.equal(tensor, projector[name])
    assert not any("projector" in name for name in checkpoint.state["optimizer"])
    lora = checkpoint.state["lora_weights"]
    assert all(tensor.any() for name, tensor in lora.items() if name.endswith("lora_B"))


def test_a_frozen_projector_is_announced_without_a_warning(tmp_path, capsys):
    runs.start(tmp_path / "run", "--stop-at-step=1", **(SHORT | {"train_projector": "false"}))
    said = capsys.readouterr().out
    assert "FROZEN   projector" in said and "TRAINED  lora" in said and "warning" not in said


def test_a_frozen_projector_is_that_of_the_run_it_started_from(tmp_path):
    fields = SHORT | {"train_projector": "false", "start_from": runs.finished_run()}
    runs.start(tmp_path / "run", **fields)
    source, run = checkpoints.resolve(runs.finished_run()), checkpoints.resolve(tmp_path / "run")
    for name, tensor in source.state["image_projector"].items():
        assert torch.equal(tensor, run.state["image_projector"][name])


@pytest.mark.parametrize("recomputing", ["none", "products", "layers"])
def test_what_is_computed_again_gives_a_frozen_projector_the_same_run(recomputing, whole, tmp_path):
    fields = SHORT | {"train_projector": "false", "gradient_checkpointing": recomputing}
    runs.start(tmp_path / "run", **fields)
    digests = {
        checkpoints.weights_digest(checkpoints.resolve(run).state)
        for run in (whole["train_projector"], tmp_path / "run")
    }
    assert len(digests) == 1


def test_a_run_that_would_train_nothing_is_refused(tmp_path):
    with pytest.raises(PhiSightError, match="nothing would be trained"):
        runs.start(tmp_path / "run", "--no-train-lora", "--no-train-projector")
    assert not (tmp_path / "run").exists()


# -- rows -----------------------------------------------------------------------------------------


@given(st.lists(st.integers(1, 60), max_size=60), st.integers(0, 5), st.integers(0, 3))
def test_without_packing_each_conversation_has_its_row(lengths, seed, epoch):
    rows = plan(seed, epoch, lengths, 0)
    assert all(len(row) == 1 for row in rows)
    assert sorted(index for [index] in rows) == list(range(len(lengths)))


@settings(deadline=None)
@given(st.lists(st.integers(1, 60), min_size=1, max_size=60))
def test_rows_are_as_long_as_the_longest_conversation_packed_or_not(lengths):
    packed = Rows(configs.replace(configs.default_config(), row_tokens=0), lengths)
    alone = Rows(configs.replace(configs.default_config(), row_tokens=0, pack=False), lengths)
    assert packed.row_tokens == alone.row_tokens == max(lengths)
    seen = [Counter(i for row in rows.of_epoch(0) for i in row) for rows in (packed, alone)]
    assert seen[0] == seen[1]
    assert len(alone.of_epoch(0)) == len(lengths) >= len(packed.of_epoch(0))


def test_an_epoch_that_is_packed_otherwise_half_way_sees_everything_once(tmp_path):
    lengths = [5, 9, 3, 7, 7, 4, 6, 8, 2, 5]
    packed = configs.replace(configs.default_config(), row_tokens=20)
    alone = configs.replace(packed, pack=False)
    for first, then in ((packed, alone), (alone, packed)):
        progress = Progress(row=2)
        before = Rows(first, lengths).of_epoch(0)
        note_packing(progress, first, then, lengths)
        after = Rows(then, lengths, progress.repacked).of_epoch(0)
        assert after[:2] == before[:2]
        assert sorted(i for row in after for i in row) == list(range(len(lengths)))
