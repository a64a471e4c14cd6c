"""A config as a TOML file: `--print-config` writes one, `--config` reads it back exactly, and
whatever else is in such a file is refused in one line."""

from __future__ import annotations

import tempfile
import tomllib
from pathlib import Path

import pytest
import runs
from hypothesis import example, given
from hypothesis import strategies as st
from test_config import CONFIGS, FIELDS, GOOD, config_of

import checkpoints
import config as configs
import config_values
import train
from errors import PhiSightError
from training import options
from training.config_file import FILE_LIMIT, read_config_file, to_toml

CONTROLS = "\x00\x07\b\t\n\r\x1b\x7f\x85\u2028 \U0001f600"
ANY_TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)  # quotes, NUL, all of it


def reread(text: str) -> configs.Config:
    """The config of a command line that gives this file and nothing else."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "run.toml"
        path.write_bytes(text.encode())
        return config_of("--config", str(path))


# -- there and back -------------------------------------------------------------------------------


@given(CONFIGS, ANY_TEXT, ANY_TEXT, st.floats(5e-324, 1e308), st.integers(0, 10**15))
@example(
    GOOD, 'a "quoted" \\ back\\slash\\', "\x00\x07\b\t\n\r\x1b\x7f\x85\u2028 \U0001f600", 1e-08, 8
)
@example(GOOD, "''' \"\"\" # [table]", "\\u0041 \\x41 é", 1e22, 0)
def test_any_valid_config_comes_back_from_its_file(config, data, target, rate, whole):
    config = configs.replace(
        config,
        data=data,
        images=target,
        lora_targets=(target, data),
        learning_rate=rate,
        weight_decay=float(whole),
    )
    text = to_toml(config)
    assert reread(text) == config
    assert tomllib.loads(text).keys() == {field.name for field in FIELDS}


def test_a_whole_number_will_do_for_a_float():
    config = reread("lora_alpha = 8\nlearning_rate = 1e-08\n")
    assert type(config.lora_alpha) is float and config.lora_alpha == 8
    assert config.learning_rate == 1e-8


def test_a_name_that_is_not_unicode_is_refused():
    with pytest.raises(PhiSightError, match=r"--images \['a.+udcff'\]: .*rename"):
        to_toml(configs.replace(GOOD, images="a\udcff"))


# -- preset, then file, then flags ----------------------------------------------------------------


def test_the_file_wins_over_the_preset_and_flags_over_the_file(tmp_path):
    path = tmp_path / "run.toml"
    path.write_text("seed = 5\nepochs = 3\n")
    config = config_of("--preset", "phi35", "--config", str(path), "--seed", "6")
    assert config == configs.replace(configs.default_config("phi35"), seed=6, epochs=3)
    path.write_text('preset = "phi35"\nseed = 5\n')
    assert config_of("--config", str(path)) == configs.replace(
        configs.default_config("phi35"), seed=5
    )
    assert config_of("--config", str(path), "--preset=tiny") == configs.replace(GOOD, seed=5)


# -- what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"batchsize = 3", "'batchsize' is not a config field; did you mean batch_size?"),
        (b"qqqqqqqq = 3", "'qqqqqqqq' is not a config field; train.py --print-config"),
        (b"[optimiser]\nseed = 1", "'optimiser' is not a config field"),
        (b"batch_size = 'many'", "config field batch_size is 'many'; expected a whole number"),
        (b"batch_size = 1.5", "config field batch_size is 1.5; expected a whole number"),
        (b"batch_size = true", "config field batch_size is True; expected a whole number"),
        (b"learning_rate = '1'", "config field learning_rate is '1'; expected a number"),
        (b"strict = 1", "config field strict is 1; expected true or false"),
        (b"run = 3", "config field run is 3; expected a text"),
        (b"run = 2026-01-01", "config field run is datetime.date"),
        (b"lora_targets = 'qkv_proj'", "lora_targets is 'qkv_proj'; expected a list of texts"),
        (b"lora_targets = [1]", "lora_targets is [1]; expected a list of texts"),
        (b"[seed]\na = 1", "config field seed is {'a': 1}; expected a whole number"),
        (b"lora_rank = 0\nseed = -1", "--lora-rank must be at least 1, not 0; --seed must be"),
        (b"lora_targets = []", "--lora-targets must be at least one layer name"),
        (b"schedule = 'step'", "--schedule must be one of linear, cosine, constant"),
        (b"lora_alpha = nan", "--lora-alpha must be a positive number, not nan"),
        (b"preset = 'huge'", 'preset is \'huge\'; give "phi35" or "tiny"'),
        (b"preset = ['tiny']", "preset is ['tiny']; give"),
        (b"seed = ", "not valid TOML: Invalid value (at end of document); write lines such as"),
        (b"seed = 1\nseed = 2\n", "not valid TOML: Cannot overwrite a value (at line 2, column 9)"),
        (b"\xff\xfe", "not valid TOML: 'utf-8' codec"),
        (b"run = '\x00'", "not valid TOML: "),
        (b"seed = " + b"9" * 5000, "not valid TOML: Exceeds the limit"),
        (b"lora_alpha = 1" + b"0" * 400, "config field lora_alpha is 1"),
        (b"strict = 0x" + b"f" * 5000, "config field strict is a value too long to be shown"),
        (b"run = " + b"[" * 100_000, "not valid TOML: "),
        (b"#" * (FILE_LIMIT + 1), "larger than 1048576 bytes"),
    ],
)
def test_a_bad_file_is_one_line_with_file_key_and_remedy(content, said, tmp_path):
    path = tmp_path / "run.toml"
    path.write_bytes(content)
    with pytest.raises(PhiSightError) as error:
        read_config_file(str(path))
    message = str(error.value)
    assert message.startswith(f"--config {path}: ") and said in message
    assert "\n" not in message and len(message) < len(str(path)) + 250


def test_a_file_that_is_not_there_is_named(tmp_path):
    for path in (tmp_path / "gone.toml", tmp_path):
        with pytest.raises(PhiSightError, match=f"--config {path}: .*; name a TOML file"):
            config_of("--config", str(path))


# -- the command ----------------------------------------------------------------------------------


def printed(capsys, *arguments: str) -> str:
    capsys.readouterr()
    assert train.main(["--print-config", *arguments]) == 0
    return capsys.readouterr().out


def test_the_printed_config_reproduces_a_run(tmp_path, capsys):
    whole, run, file = tmp_path / "whole", tmp_path / "run", tmp_path / "run.toml"
    fields = runs.SHORT | {"max_steps": 2}
    file.write_text(printed(capsys, *runs.flags(whole, **fields)))
    assert not whole.exists(), "printing starts nothing"
    runs.start(whole, **fields)
    assert train.main(["--config", str(file), "--run", str(run)]) == 0
    assert checkpoints.diff(whole, run).identical


def test_with_resume_it_is_the_config_that_the_resume_would_use(tmp_path, capsys):
    run = runs.copy_of(runs.stopped_run(), tmp_path)
    before = runs.contents(run)
    resuming = ["--resume", "--run", str(run), "--save-steps", "7"]
    saved = config_values.from_dict(checkpoints.resolve(run).config["config"], "here")
    expected = configs.replace(saved, run=str(run), save_steps=7)
    assert reread(printed(capsys, *resuming)) == expected
    assert reread(printed(capsys, *resuming, "--resume-if-any")) == expected
    assert runs.contents(run) == before

    file = tmp_path / "run.toml"
    file.write_text("learning_rate = 0.5\n")
    with pytest.raises(PhiSightError, match="would not be exact.*config.learning_rate"):
        runs.resume(run, "--config", str(file))
    file.write_text(printed(capsys, *resuming))
    assert train.main(["--resume", "--config", str(file)]) == 0
    assert checkpoints.resolve(run).trainer_state["finished"]


def test_without_a_checkpoint_there_is_nothing_to_resume(tmp_path):
    with pytest.raises(PhiSightError, match="no checkpoint in"):
        train.main(["--print-config", "--resume", "--run", str(tmp_path / "none")])
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    ("flag", "value", "reason"),
    [
        ("--run", "a\udcff", "has bytes that are not UTF-8; rename it"),
        ("--images", "\udcff/b", "has bytes that are not UTF-8; rename it"),
        ("--run", "a" * 300, "is longer than a path can be"),
    ],
)
def test_a_path_that_no_checkpoint_could_name_is_told_before_anything_is_loaded(
    flag, value, reason
):
    with pytest.raises(PhiSightError, match=reason) as caught:
        options.parse([flag, value])
    assert str(caught.value).startswith(flag) and str(caught.value).isprintable()
