"""Every command from a folder that is not the project's: the presets' and a run's own paths are
found in the project, what is typed is relative to where it is typed, and what fails leaves nothing.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import runs
from hypothesis import given
from hypothesis import strategies as st
from test_config import config_of

import app
import checkpoints
import config as configs
import config_values
import evaluate
import export
import infer
import paths
import serve
import train
from data import preflight
from errors import PhiSightError
from fields import as_texts
from training.config_file import to_toml

OWN = ("base", "vision", "speech", "data", "images", "run", "features")


@pytest.fixture
def elsewhere(tmp_path, monkeypatch) -> Path:
    """The current folder, which holds the world's files under relative names."""
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


# -- paths ----------------------------------------------------------------------------------------


def test_in_the_projects_folder_no_path_is_changed():
    assert paths.is_current_folder()
    for path in ("", "a/b", "/a", "../x", "assets/tiny/phi3", str(runs.BASE)):
        assert paths.located(path) == path and paths.recorded(path) == path
    assert paths.command("train.py") == "python train.py"
    assert paths.command("-m data.world") == "python -m data.world"


def test_from_elsewhere_a_presets_paths_are_the_projects(elsewhere):
    config, plain = config_of(), configs.Config(**configs.PRESETS["tiny"])
    for name in OWN:
        placed = tuple(str(runs.ROOT / path) for path in as_texts(getattr(plain, name)))
        assert as_texts(getattr(config, name)) == placed
    assert config.base_cache == ""
    assert config_values.to_dict(config) == config_values.plain(plain), (
        "a checkpoint holds what it always did"
    )
    assert config_values.from_dict(config_values.plain(plain), "here") == config
    full = config_of("--preset=phi35")
    assert full.base == "microsoft/Phi-3.5-mini-instruct" and full.speech == "base"
    assert full.base_cache == str(runs.ROOT / "cache/bases") and full.data == ()


def test_what_is_typed_is_relative_to_where_it_is_typed(elsewhere):
    (elsewhere / "my base").mkdir()
    config = config_of("--data=x.json", "--run=out", "--base=my base", "--vision=org/clip")
    assert (config.data, config.run) == (("x.json",), "out")
    written = config_values.to_dict(config)
    assert written["data"] == [str(elsewhere / "x.json")]
    assert written["run"] == str(elsewhere / "out")
    assert written["base"] == str(elsewhere / "my base")
    assert written["vision"] == "org/clip", "a name of the hub stays a name"
    inside = config_of(f"--data={runs.ROOT / 'cache/mine.json'}")
    assert config_values.to_dict(inside)["data"] == ["cache/mine.json"], "the project may be moved"


PLAIN = st.lists(st.text("abc é_-", min_size=1, max_size=5), min_size=1, max_size=4)


@given(PLAIN.map("/".join))
def test_a_path_in_a_checkpoint_means_one_place_from_everywhere(path):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(paths, "PROJECT", Path("/nowhere/the project"))
        located = paths.located(path)
        assert located == f"/nowhere/the project/{path}" and paths.recorded(located) == path
        assert paths.recorded(f"/{path}") == f"/{path}" == paths.located(f"/{path}")


def test_a_config_file_of_the_project_means_the_same_elsewhere(tmp_path, monkeypatch):
    file = tmp_path / "run.toml"
    file.write_text(to_toml(config_of("--seed=3")))
    monkeypatch.chdir(tmp_path)
    config = config_of("--config=run.toml")
    assert config == config_of("--seed=3") and config.base == str(runs.BASE)
    file.write_text(to_toml(config))
    monkeypatch.chdir(runs.ROOT)
    again = config_of(f"--config={file}")
    assert again.base == str(runs.BASE) and again.seed == 3


# -- the commands ---------------------------------------------------------------------------------


def own_flags() -> list[str]:
    """The recipe without what the tiny preset has of its own, and its files by relative names."""
    links = {"train.json": "train.json", "images": "images", "q.jsonl": "held_out.jsonl"}
    for name, target in links.items():
        Path(name).symlink_to(runs.world() / target)
    left_out = ("base", "vision")
    fields = {n: v for n, v in (runs.RECIPE | runs.SHORT).items() if n not in left_out}
    named = {"data": "train.json", "images": "images", "held_out_questions": "q.jsonl"}
    fields |= named | {"novel_pair_questions": "", "run": "out/run", "features": "features"}
    return [f"--{name.replace('_', '-')}={value}" for name, value in fields.items()]


def test_a_run_from_elsewhere_is_trained_asked_measured_and_exported(
    elsewhere, tmp_path, monkeypatch, capsys
):
    assert train.main([*own_flags(), "--stop-at-step=1"]) == 0
    assert "stopped at step 1" in (said := capsys.readouterr().out)
    assert f"go on with: python {runs.ROOT}/train.py --resume --run out/run" in said
    saved = checkpoints.resolve("out/run").config["config"]
    assert saved["base"] == "assets/tiny/phi3" and saved["speech"].startswith("assets/")
    assert saved["data"] == [str(elsewhere / "train.json")]
    third = tmp_path / "third"
    third.mkdir()
    for folder in (third, runs.ROOT):
        monkeypatch.chdir(folder)
        run = str(elsewhere / "out/run")
        assert infer.main([f"--run={run}", "--prompt=What?", "--max-new-tokens=2"]) == 0
        assert train.main(["--resume", f"--run={run}", "--stop-at-step=2"]) == 0
    assert not any(third.iterdir())
    monkeypatch.chdir(third)
    assert evaluate.main([f"--run={run}", "--max-new-tokens=2"]) == 0
    assert export.main([f"--run={run}", "--peft=adapter"]) == 0
    assert sorted(path.name for path in third.iterdir()) == ["adapter"]
    assert checkpoints.main(["verify", run]) == 0


def test_preflight_reads_the_projects_tokenizer(elsewhere, capsys):
    (elsewhere / "mine.json").write_text((runs.world() / "train.json").read_text())
    assert preflight.main(["--data=mine.json", "--workers=0"]) == 0
    assert "conversations" in capsys.readouterr().out


def test_defaults_of_flags_lie_in_the_project(elsewhere):
    assert app.parse([]).conversations == str(runs.ROOT / "cache/conversations")
    assert app.parse([]).runs == str(runs.ROOT / "runs")
    assert serve.parse([]).run == infer.parse(["--chat"]).run == str(runs.ROOT / "runs/tiny")
    assert infer.parse(["--chat", "--run=runs/tiny"]).run == "runs/tiny"


@pytest.mark.parametrize(
    ("main", "arguments", "said"),
    [
        (train.main, ["--run=runs/a", "--data=gone.json"], "gone.json: no such file"),
        (train.main, ["--run=a/b/c/d", "--base=./gone"], "./gone: there is no such folder"),
        (train.main, ["--resume", "--run=runs/tiny"], "no checkpoint in runs/tiny; start one with"),
        (train.main, ["--run=a/b", "--start-from=c/d", "--data=x"], "no checkpoint in c/d"),
        (train.main, ["--run=a/b", "--early-stopping=1", "--evaluate-steps=0"], "evaluations"),
        (infer.main, ["--run=runs/tiny", "--prompt=What?"], "no checkpoint in runs/tiny"),
        (evaluate.main, ["--run=runs/tiny/best"], "no checkpoint in runs/tiny"),
        (export.main, ["--run=runs/tiny", "--merge", "--out=a/b"], "no checkpoint in runs/tiny"),
        (export.main, ["--import-peft=gone", "--out=a/b"], "adapter_config.json: is missing"),
        (serve.main, ["--run=runs/tiny", "--port=0"], "no checkpoint in runs/tiny"),
        (app.main, ["--run=runs/tiny", "--port=0"], "--run runs/tiny: no such folder"),
        (checkpoints.main, ["show", "runs/tiny"], "no checkpoint in runs/tiny"),
        (checkpoints.main, ["verify", "runs/tiny"], "runs/tiny: no such folder"),
        (preflight.main, ["--data=gone.json"], "gone.json: no such file"),
    ],
)
def test_a_command_that_fails_leaves_nothing(elsewhere, main, arguments, said):
    with pytest.raises(PhiSightError) as error:
        main(arguments)
    assert said in str(error.value)
    assert not any(elsewhere.iterdir())


def test_what_was_there_before_a_failure_stays(elsewhere):
    (elsewhere / "runs").mkdir()
    with pytest.raises(PhiSightError):
        train.main(["--run=runs/a/b", "--data=gone.json"])
    assert [path.name for path in elsewhere.rglob("*")] == ["runs"]


def test_the_remedies_name_commands_that_are_found_from_here(elsewhere):
    assert paths.command("train.py") == f"python {runs.ROOT}/train.py"
    assert paths.command("-m data.world") == f"cd {runs.ROOT} && python -m data.world"


def test_an_export_from_elsewhere_names_the_base_as_it_lies(elsewhere):
    assert export.main([f"--run={runs.finished_run()}", "--peft=adapter"]) == 0
    config = json.loads(Path("adapter/adapter_config.json").read_text())
    assert Path(config["base_model_name_or_path"]).is_dir()
