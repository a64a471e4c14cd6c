"""The files of `recipes/`: what they say is what the presets are, and each can be trained with."""

from __future__ import annotations

from pathlib import Path

import pytest
import runs

import config as configs
import config_values
from presets import PRESETS
from training.config_file import read_config_file, toml_of
from training.options import RunOptions, parse
from training.start import check_demands

FOLDER = runs.ROOT / "recipes"
RECIPES = sorted(FOLDER.glob("*.toml"))
each_recipe = pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)


def given(path: Path) -> dict:
    """What a file sets, beside the preset that it begins with."""
    return {name: value for name, value in toml_of(str(path), "").items() if name != "preset"}


def test_every_preset_has_a_file():
    assert set(PRESETS) <= {path.stem for path in RECIPES}


@pytest.mark.parametrize("preset", PRESETS)
def test_the_file_of_a_preset_says_what_the_preset_is(preset, tmp_path, monkeypatch):
    path = FOLDER / f"{preset}.toml"
    assert toml_of(str(path), "")["preset"] == preset
    assert PRESETS[preset].keys() <= given(path).keys()
    for folder in (runs.ROOT, tmp_path):  # its paths are the project's, wherever one is
        monkeypatch.chdir(folder)
        assert parse(["--config", str(path)])[0] == configs.default_config(preset)


def test_another_value_in_the_file_of_a_preset_is_found(tmp_path):
    text = (FOLDER / "tiny.toml").read_text().replace("save_steps = 100", "save_steps = 101")
    (tmp_path / "tiny.toml").write_text(text)
    changed, _ = parse(["--config", str(tmp_path / "tiny.toml")])
    assert changed != configs.default_config("tiny")


@each_recipe
def test_a_recipe_can_be_trained_with(path):
    config, _ = parse(["--config", str(path)])
    check_demands(config, None, RunOptions(given=read_config_file(str(path))))
    own = [p.stem for p in RECIPES if parse(["--config", str(p)])[0].run == config.run]
    assert own == [path.stem], "two recipes in one folder of a run"


@each_recipe
def test_a_recipe_changes_something_and_says_how_it_is_used(path):
    text = path.read_text()
    assert f"python train.py --config recipes/{path.name}" in text
    preset = toml_of(str(path), "")["preset"]
    if path.stem not in PRESETS:
        usual = config_values.plain(configs.default_config(preset))
        same = {n for n, value in given(path).items() if value == usual[n]}
        # What the preset has already may be said where the choice is the point of the recipe.
        assert same <= {"batch_size", "accumulation", "compute_type"}
