"""Members combine: some cells of base x encoder x projector, in which each member comes at least
once, taken the whole way that `python -m benchmarks.members` takes all of them."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import runs

import train
from benchmarks import cells, members
from benchmarks.cells import Cell, Grid, all_cells
from config import default_config, replace
from errors import PhiSightError
from model.vision import vision_of
from tools.small.bases import BASES

SOME = members.chosen(all_cells(), len(BASES))


@pytest.fixture(scope="module")
def grid(tmp_path_factory) -> Grid:
    made = Grid(tmp_path_factory.mktemp("grid"))
    made.prepare(SOME)
    return made


def test_each_member_comes_at_least_once():
    for of_all, of_some in zip(
        zip(*map(members.members, all_cells()), strict=True),
        zip(*map(members.members, SOME), strict=True),
        strict=True,
    ):
        assert set(of_some) == set(of_all)
    pairs = {(cell.encoder, cell.projector) for cell in SOME}
    assert len(pairs) == len(SOME), "an encoder comes with other projectors too"


@pytest.mark.parametrize("cell", SOME, ids=str)
def test_a_cell_is_killed_resumed_merged_and_asked(cell, grid):
    outcome = grid.outcome(cell)
    assert outcome.problems == []
    assert 0 < outcome.resumed_from < int(outcome.killed.rpartition(":")[2])
    assert len(outcome.loss) == 2 and outcome.picture_tokens in (4, 16)


def test_a_cell_that_was_done_is_not_done_again(grid, monkeypatch):
    known = grid.outcome(SOME[0])
    monkeypatch.setattr(grid, "_train", None)
    assert grid.outcome(SOME[0]) == known
    table = members.markdown([known])
    assert table.splitlines()[-1].startswith(f"| {SOME[0].base} | {SOME[0].encoder} |")


def test_a_cell_that_fails_says_why_and_is_done_again(grid, monkeypatch, capsys):
    cell = SOME[1]
    flags = Grid.flags
    monkeypatch.setattr(Grid, "flags", lambda self, cell: [*flags(self, cell), "--bathc-size=2"])
    shutil.rmtree(grid.out / "cells", ignore_errors=True)
    outcome = grid.outcome(cell)
    [problem] = outcome.problems
    assert problem.startswith("whole: ended with 2, not 0: error: ")
    assert problem.endswith("did you mean --batch-size?")
    assert members.finish(grid.out, [outcome], 1.0) == 1
    assert capsys.readouterr().out == "0 of 1 cells are right; 1 s\n"
    assert "failed: whole: ended with 2" in (grid.out / "members.md").read_text()
    assert not (
        grid.out / "cells" / f"{cell.base}.{cell.encoder}.{cell.projector}/outcome.json"
    ).exists()


def test_runs_that_differ_are_found(grid, monkeypatch):
    """The run that is killed draws other dropout than the one that is not."""
    begun = Grid._in

    def otherwise(self, folder, function, *arguments):
        if function is cells.train_with_trap:
            aim, flags = arguments
            arguments = (aim, [*flags, "--seed=1"])
        return begun(self, folder, function, *arguments)

    monkeypatch.setattr(Grid, "_in", otherwise)
    monkeypatch.setattr(Grid, "_export", lambda *arguments: None)
    outcome = grid.outcome(SOME[2])
    assert outcome.problems[0].startswith("different: ")


def test_the_page_says_how_large_each_member_is():
    """Within a tenth, or ten lines."""
    rows = [row.split(" | ") for row in members.sizes().splitlines()[2:]]
    told = {
        row.rpartition(" | ")[0]: int(row.rpartition(" | ")[2].rstrip(" |"))
        for row in (runs.ROOT / "docs/members.md").read_text().splitlines()
        if row.startswith(tuple(f"| {kind} | " for kind in members.ROOMS))
    }
    found = {f"{kind} | {file}": int(lines.rstrip(" |")) for kind, file, lines in rows}
    assert told.keys() == found.keys()
    assert [
        (file, lines, told[file])
        for file, lines in found.items()
        if abs(lines - told[file]) > max(10, lines // 10)
    ] == []


# -- what belongs together ------------------------------------------------------------------------


def test_each_encoder_has_features_of_its_own(grid):
    specs = {
        name: vision_of(replace(default_config("tiny"), vision=str(grid.out / "encoders" / name)))
        for name in cells.ENCODERS
    }
    assert {spec.shape for spec in specs.values()} == {(16, 32)}, "they are alike but for the kind"
    assert len({spec.key for spec in specs.values()}) == len(specs)


@pytest.fixture(scope="module")
def stopped(grid) -> Path:
    """A run of a first cell that stopped after its first step. Tests only copy it."""
    cell = Cell("qwen3", "siglip", "mlp")
    run = grid.out / "stopped"
    assert train.main([*grid.flags(cell), f"--run={run}", "--stop-at-step=1"]) == 0
    return run


@pytest.mark.parametrize(
    ("flag", "room", "name", "told"),
    [
        ("--projector", "", "linear", r"config\.projector.*mlp.*linear"),
        ("--vision", "encoders", "dinov2", "encoders/siglip.*encoders/dinov2"),
        ("--base", "bases", "qwen2.5", "bases/qwen3.*bases/qwen2.5"),
    ],
)
def test_a_run_is_not_gone_on_with_on_another_member(
    flag, room, name, told, grid, stopped, tmp_path
):
    run = runs.copy_of(stopped, tmp_path)
    other = grid.out / room / name if room else name
    with pytest.raises(PhiSightError, match=told) as error:
        train.main(["--resume", f"--run={run}", f"{flag}={other}"])
    assert "\n" not in str(error.value)
