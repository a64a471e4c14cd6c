"""Runs side by side: what differs, means over seeds, curves, and runs that are damaged."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import pytest
import runs
from PIL import Image

import checkpoints
import config as configs
import evaluate
from errors import PhiSightError
from evaluation.compare import page_of, read_runs
from evaluation.comparison import differing_fields, notes_of, settings_of, tables_of
from evaluation.run_figures import EVALUATION, RunFigures, read_run
from reports.log import METRICS, read_metrics
from reports.overlay import Curves, draw_overlay, overlaid_panels

GOOD = configs.default_config("tiny")


def made(name: str, loss: float = 1.0, step: int = 10, **fields: object) -> RunFigures:
    records = [
        {"kind": "train", "step": step, "loss": 2 * loss,
         "timing": {"seconds": 2.0, "tokens_per_second": 100.0}},
        {"kind": "evaluation", "step": step, "validation_loss": loss,
         "alignment": {"right": 70.0, "swapped": 30.0}},
    ]  # fmt: skip
    config = configs.replace(GOOD, **fields)
    return RunFigures(Path(name), config, step, step, "all steps done", records)


def test_other_weights_in_one_place_are_a_setting_of_their_own():
    first, second = made("a"), made("b", seed=1)
    same = dataclasses.replace(second, weights=first.weights)
    other = dataclasses.replace(second, weights={"base": "1" * 64, "vision": ""})
    assert differing_fields([first, same]) == ["seed"] and len(settings_of([first, same])) == 1
    assert differing_fields([first, other]) == ["seed", "base_fingerprint"]
    assert len(settings_of([first, other])) == 2
    elsewhere = dataclasses.replace(other, config=configs.replace(GOOD, base="elsewhere"))
    assert differing_fields([first, elsewhere]) == ["base"]  # said by the place alone


# -- one run --------------------------------------------------------------------------------------


def test_the_figures_of_a_run_are_those_of_its_log():
    found = read_run(runs.finished_run())
    log = read_metrics(runs.finished_run() / METRICS)
    evaluations = [record for record in log if record["kind"] == "evaluation"]
    windows = [record for record in log if record["kind"] == "train"]
    figures, shown = found.figures, evaluations[-1]["alignment"]
    assert figures["validation_loss"] == evaluations[-1]["validation_loss"]
    assert figures["lowest_validation_loss"] == min(r["validation_loss"] for r in evaluations)
    assert figures["alignment"] == shown["right"] - shown["swapped"]
    assert figures["loss"] == windows[-1]["loss"]
    assert figures["seconds"] == pytest.approx(sum(r["timing"]["seconds"] for r in windows))
    assert figures["held_out"] is None and found.notes == ()
    assert found.step == checkpoints.resolve(runs.finished_run()).step
    assert found.fields["lora_dropout"] == runs.RECIPE["lora_dropout"]


def test_an_evaluation_of_the_newest_checkpoint_is_part_of_it(tmp_path):
    run = runs.copy_of(runs.finished_run(), tmp_path)
    step = read_run(run).step
    told = {"checkpoint": f"x/checkpoint-{step:06d}", "held_out": 80.5, "alignment": 50.5}
    (run / EVALUATION).write_text(json.dumps(told))
    assert read_run(run).figures["held_out"] == 80.5
    assert read_run(run).figures["held_out_alignment"] == 50.5
    for text, said in (
        (json.dumps(told | {"checkpoint": "x/checkpoint-000001"}), "is of checkpoint-000001"),
        (json.dumps(told | {"held_out": "many"}), "cannot be read: held_out is 'many'"),
        ("{", "cannot be read"),
    ):
        (run / EVALUATION).write_text(text)
        found = read_run(run)
        assert found.figures["held_out"] is None and said in found.notes[0]


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda run: (run / METRICS).unlink(), f"has no {METRICS}"),
        (lambda run: (run / METRICS).write_bytes(b""), "has no record yet"),
        (lambda run: cut_log(run, b"not json\n"), "is damaged, what comes before is shown"),
        (lambda run: change_log(run), "does not follow from the lines before it"),
        (lambda run: newest_file(run, "config.json").write_text("{}"), "config is missing"),
        (lambda run: newest_file(run, "trainer_state.json").write_text("["), "cannot be read"),
    ],
)
def test_what_is_damaged_is_told_and_the_rest_is_shown(damage, said, tmp_path):
    run = runs.copy_of(runs.finished_run(), tmp_path)
    damage(run)
    found = read_run(run)
    assert any(said in note for note in found.notes), found.notes
    assert all("\n" not in note for note in found.notes)
    tables = tables_of([found, read_run(runs.finished_run())])
    assert len(tables[0].rows) == 2
    page_of([found], b"")


def newest_file(run: Path, name: str) -> Path:
    return checkpoints.checkpoints_in(run)[-1] / name


def cut_log(run: Path, end: bytes) -> None:
    lines = (run / METRICS).read_bytes().splitlines(keepends=True)
    (run / METRICS).write_bytes(b"".join(lines[:3]) + end)


def change_log(run: Path) -> None:
    text = (run / METRICS).read_text()
    (run / METRICS).write_text(text.replace('"loss":', '"loss":1', 1))


def test_an_unfinished_run_says_so():
    found = read_run(runs.stopped_run())
    assert found.state == "stopped at 1 of 2"
    assert "is not finished: it stands at step 1 of 2" in found.notes


def test_what_is_no_run_is_refused(tmp_path):
    with pytest.raises(PhiSightError, match="holds no run"):
        read_run(tmp_path)
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for name, said in ((tmp_path / "loop", "loop: holds no run"), ("a" * 300, "name too long")):
        with pytest.raises(PhiSightError, match=said):
            read_runs([str(name)])


# -- several --------------------------------------------------------------------------------------


def test_only_what_differs_is_shown_and_where_things_lie_is_no_difference():
    some = [
        made("a", learning_rate=1e-3, features="x", save_steps=3),
        made("b", learning_rate=3e-3, features="y", save_steps=4),
    ]
    assert differing_fields(some) == ["learning_rate"]
    tables = {table.title: table for table in tables_of(some)}
    settings = tables["Settings that differ"]
    assert settings.heads == ["run", "learning_rate"]
    assert settings.rows == [["a", "0.001"], ["b", "0.003"]]
    assert "Settings that differ" not in [t.title for t in tables_of([made("a"), made("b")])]


def test_seeds_of_a_setting_are_one_row_with_mean_and_range():
    some = [
        made("a", 1.0, seed=0), made("b", 2.0, seed=1), made("c", 6.0, seed=2),
        made("d", 5.0, lora_rank=4, seed=0),
    ]  # fmt: skip
    first, second = settings_of(some)
    assert [run.name for run in first.runs] == ["a", "b", "c"]
    assert first.label == "lora_rank=16" and second.label == "d"
    assert first.mean("validation_loss") == 3.0
    table = tables_of(some)[-1]
    cell = table.rows[0][table.heads.index("validation loss")]
    assert cell == "3.0000 (1.0000 to 6.0000)"
    assert table.rows[1][table.heads.index("validation loss")] == "5.0000"


def test_runs_of_one_name_are_told_apart_and_other_lengths_are_told_of():
    some = [made("x/run"), made("y/run", step=30)]
    assert [row[0] for row in tables_of(some)[0].rows] == ["x/run", "y/run"]
    assert any("different lengths, 10 to 30 steps" in note for note in notes_of(some))
    assert notes_of([made("a"), made("b")]) == []


def test_each_log_has_a_curve_in_each_panel_and_a_setting_one_colour():
    logs = [[made(name).records for name in "ab"], [made("c").records], [[]]]
    panels = overlaid_panels([Curves(str(i), of) for i, of in enumerate(logs)])
    for panel in panels:
        colours = [one.colour for one in panel.series]
        assert len(colours) == 3 and colours[0] == colours[1] != colours[2]
    assert [one.points for one in panels[3].series] == [[(10.0, 40.0)]] * 3
    assert panels[0].series[0].points == [(10.0, 2.0)]


def test_a_picture_has_a_line_of_names_for_every_three_runs(tmp_path):
    for count in (0, 1, 3, 4):
        some = [Curves("a long name " * 20, [made("a").records])] * count
        draw_overlay(some, tmp_path / "out.png")
        with Image.open(tmp_path / "out.png") as image:
            assert image.size == (1200, 832 + 24 * -(-count // 3))


# -- as it is typed -------------------------------------------------------------------------------


def test_the_command_writes_tables_a_picture_and_a_page(tmp_path, capsys):
    named = [str(runs.finished_run()), str(runs.stopped_run()), f"{runs.stopped_run()}/"]
    assert evaluate.main(["compare", *named, "--out", str(tmp_path / "out")]) == 0
    said = capsys.readouterr().out
    assert "What came of each run" in said and "note: stopped: is not finished" in said
    assert said.count("\nstopped ") == 2  # of figures and of settings: named twice, shown once
    page = (tmp_path / "out/comparison.html").read_text()
    assert re.findall(r'(?:src|href)="(?!data:)', page) == [] and "data:image/png;base64," in page
    assert evaluate.main(["compare", *named, "--out", str(tmp_path / "out"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [run["name"] for run in found["runs"]] == ["finished", "stopped"]
    assert found["runs"][1]["fields"]["max_steps"] == 2


def test_text_of_a_run_does_nothing_in_the_page():
    page = page_of(
        [made("<script>alert(1)</script>", start_from="<img src=x onerror=alert(1)>")], b""
    )
    assert "<script>" not in page and "<img src=x" not in page


def test_a_run_that_is_not_there_is_one_line(tmp_path):
    done = runs.command("evaluate.py", "compare", tmp_path / "gone")
    assert "holds no run" in runs.assert_one_line_error(done)


def test_a_run_that_is_named_twice_is_read_once():
    run = runs.stopped_run()
    assert len(read_runs([str(run), str(run), f"{run}/."])) == 1
