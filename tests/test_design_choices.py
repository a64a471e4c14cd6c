"""The evidence for the recipe: what is compared with what, and the program once, small."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

import config as configs
from benchmarks import design_choices
from benchmarks.design_choices import (
    DEFAULT,
    MEASURES,
    VARIANTS,
    Setup,
    differences,
    markdown,
    seen,
    sweep_tables,
)
from errors import PhiSightError
from evaluation.run_figures import RunFigures
from reports.dots import BETTER, NEITHER, WORSE, colour_of
from sweeps.plan import planned

LOSS, EXACT, TIME = MEASURES[0], MEASURES[1], MEASURES[3]


def run(loss: float, exact: float, seconds: float = 2.0) -> RunFigures:
    records = [
        {"kind": "train", "step": 1, "timing": {"seconds": seconds, "tokens_per_second": 9.0}},
        {"kind": "evaluation", "step": 1, "validation_loss": loss},
    ]
    return RunFigures(Path("x"), records=records, evaluation={"held_out": exact})


SOME = {
    DEFAULT: {0: run(1.0, 80.0), 1: run(2.0, 70.0)},
    "pooled": {0: run(1.5, 80.0, 3.0), 1: run(2.25, 60.0, 1.0)},
}


def test_differences_are_taken_seed_by_seed():
    assert differences(SOME, "pooled", LOSS) == [0.5, 0.25]
    assert differences(SOME, "pooled", EXACT) == [0.0, -10.0]
    assert differences(SOME, "pooled", TIME) == [1.5, 0.5]
    lacking = {DEFAULT: {1: run(2.0, 70.0)}, "pooled": SOME["pooled"]}
    assert differences(lacking, "pooled", LOSS) == [0.25]


def test_only_what_all_seeds_agree_on_is_said_to_be_seen():
    assert seen(SOME, "pooled") == "worse in every seed: validation loss"
    better = {DEFAULT: SOME["pooled"], "pooled": SOME[DEFAULT]}
    assert seen(better, "pooled") == "better in every seed: validation loss"
    assert seen({n: {0: of[0]} for n, of in SOME.items()}, "pooled").startswith("no figure")


def test_a_table_has_a_row_for_each_variant():
    setups = {name: Setup(6, 10, 100, 5000, 64) for name in SOME}
    text = markdown(SOME, setups)
    row = next(line for line in text.splitlines() if line.startswith("| patch tokens"))
    assert "+0.3750 (+0.2500 to +0.5000)" in row and "-5.0 (-10.0 to +0.0)" in row
    assert "1.5000 (1.0000 to 2.0000)" in text  # the default's own


@pytest.mark.parametrize(
    ("values", "lower", "colour"),
    [
        ([-1.0, -2.0], True, BETTER), ([-1.0, -2.0], False, WORSE), ([1.0, 2.0], True, WORSE),
        ([1.0, -1.0], True, NEITHER), ([0.0, 0.0], True, NEITHER), ([0.0, -1.0], True, NEITHER),
    ],
)  # fmt: skip
def test_a_colour_tells_what_all_seeds_agree_on(values, lower, colour):
    assert colour_of(values, lower) == colour


def test_every_variant_is_a_run_that_can_be_and_changes_one_thing():
    setups = {variant.name: Setup(6, 10, 100, 5000, 64) for variant in VARIANTS}
    runs = planned(sweep_tables({}, setups, seeds=3), "here")
    assert len(runs) == 3 * len(VARIANTS)
    default = configs.default_config("tiny")
    for one in runs:
        config = configs.replace(default, **one.fields)
        changed = {n for n in configs.FIELDS if getattr(config, n) != getattr(default, n)}
        variant = next(v for v in VARIANTS if v.name == one.choices["variant"])
        assert changed - {"seed", "row_tokens"} == set(variant.fields) - {"row_tokens"}


def test_the_program_once_and_again(tmp_path, capsys):
    arguments = [
        "--only", "pooled", "--seeds", "1", "--steps", "2", "--pictures", "30", "--held-out", "2",
        "--jobs", "2", "--out", str(tmp_path),
    ]  # fmt: skip
    assert design_choices.main(arguments) == 0
    found = json.loads((tmp_path / "design_choices.json").read_text())
    assert set(found["runs"]) == {DEFAULT, "pooled"}
    here, there = (found["runs"][name]["0"] for name in ("pooled", DEFAULT))
    assert found["differences"]["pooled"]["validation_loss"] == [
        here["validation_loss"] - there["validation_loss"]
    ]
    setups = found["setups"]
    assert setups["pooled"]["conversations"] == setups[DEFAULT]["conversations"]
    assert setups["pooled"]["features"] < setups[DEFAULT]["features"]
    text = (tmp_path / "design_choices.md").read_text()
    assert text in capsys.readouterr().out
    with Image.open(tmp_path / "design_choices.png") as image:
        image.load()
    assert design_choices.main(arguments) == 0
    assert capsys.readouterr().out.count("finished before") == 2


def test_a_variant_that_is_not_there():
    with pytest.raises(PhiSightError, match="--only glasses: choose from default, pooled"):
        design_choices.main(["--only", "glasses"])
