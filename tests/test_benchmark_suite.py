"""benchmarks/run.py: what is worse than committed is told and fails, and what is not does not."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import runs
from hypothesis import given
from hypothesis import strategies as st

from benchmarks import run
from benchmarks.processes import waiting
from benchmarks.suite import results, turns
from benchmarks.suite.material import Material
from benchmarks.suite.table import GROUPS, HIGHER, LOWER, MEASURES, OURS, REFERENCE, Group
from benchmarks.suite.turns import Taken, take
from benchmarks.suite.verdict import (
    BETTER,
    NEW,
    SAME,
    WORSE,
    found,
    notes,
    repeated,
    table,
    verdict,
)
from errors import PhiSightError

MACHINE = {"date": "2026-01-02", "processor": "A", "cores": 2, "load": 0.1, "versions": {},
           "instructions": ["avx2"]}  # fmt: skip
CLASS = results.class_of(MACHINE, 1)
each_measure = pytest.mark.parametrize("measure", MEASURES.values(), ids=list(MEASURES))
ratios = st.floats(1e-3, 1e3)
bands = st.floats(0.01, 2)
directions = st.sampled_from([HIGHER, LOWER])


def of(direction, band):
    return dataclasses.replace(MEASURES["decode"], better=direction, band=band)


# -- verdicts --------------------------------------------------------------------------------------


@given(ratios, bands, directions, st.floats(-0.999, 0.999))
def test_within_the_band_nothing_is_told(committed, band, direction, part):
    ratio = committed * (1 + band) ** part
    assert verdict(of(direction, band), ratio, committed) == SAME


@given(ratios, bands, directions, st.floats(1.001, 20))
def test_past_the_band_the_direction_decides(committed, band, direction, times):
    more, less = committed * (1 + band) ** times, committed / (1 + band) ** times
    good, bad = (more, less) if direction == HIGHER else (less, more)
    assert verdict(of(direction, band), good, committed) == BETTER
    assert verdict(of(direction, band), bad, committed) == WORSE


@given(ratios, ratios, bands)
def test_the_other_direction_is_the_other_verdict(ratio, committed, band):
    """Seconds and their inverse, a rate, are judged alike."""
    higher = verdict(of(HIGHER, band), ratio, committed)
    assert verdict(of(LOWER, band), 1 / ratio, 1 / committed) in (higher, SAME)
    if abs(abs(math.log(ratio / committed)) - math.log1p(band)) > 1e-9:
        assert verdict(of(LOWER, band), 1 / ratio, 1 / committed) == higher


@each_measure
def test_what_is_not_committed_is_told(measure):
    assert verdict(measure, 1.0, None) == NEW


def test_a_name_on_one_side_only_is_told():
    told = notes({"decode": 1.0}, {"decode": 1.0, "gone": 2.0}, ["decode", "resume"])
    assert told == [
        "gone: committed, but the suite has no such measure: --update",
        "resume: was asked for and not measured",
    ]


def test_a_ratio_is_the_median_of_those_of_each_turn():
    """A machine that is ten times slower for a turn slows both sides of it."""
    one = found([2.0, 20.0, 3.0], [1.0, 10.0, 1.0], seconds=4.0)
    assert (one.ours, one.reference, one.ratio, one.turns) == (3.0, 1.0, 2.0, 3)
    assert one.spread == 0.0  # two of the three are 2, the third is 3
    assert "2.000" in table({"decode": one}, {"decode": 1.9}) and NEW in table({"decode": one}, {})


# -- the table of measures -------------------------------------------------------------------------


@each_measure
def test_a_measure_says_what_it_is(measure):
    assert measure.group in GROUPS and measure.better in (HIGHER, LOWER)
    assert 0 < measure.band < 1 and measure.what and measure.unit and measure.reference
    assert any(one.quick for one in MEASURES.values())


def test_every_measure_of_the_issue_is_there():
    assert set(MEASURES) == {
        "training", "saving_stall", "resume", "pictures", "first_token", "decode", "quality",
        "cold_start",
    }  # fmt: skip


# -- turns -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def material(tmp_path_factory) -> Material:
    """A smaller world than the suite's, alone."""
    folder = tmp_path_factory.mktemp("material")
    (folder / "world").symlink_to(runs.world())
    return Material(folder, 1)


def test_the_sides_take_turns_and_the_first_is_not_counted(material, monkeypatch):
    order = []

    def side(name):
        return lambda material: lambda: order.append(name) or {"rate": float(len(order))}

    monkeypatch.setattr(turns, "importlib", type("", (), {"import_module": lambda name: MODULE}))
    MODULE = type("", (), {"ours": side("ours"), "reference": side("reference")})
    taken = Taken(Group("x", "x.ours", "x.reference", 2, in_processes=False))
    take(taken, material)
    assert order == ["ours", "reference"] * 3  # the first of each warms up
    assert taken.given == {OURS: [{"rate": 3.0}, {"rate": 5.0}],
                           REFERENCE: [{"rate": 4.0}, {"rate": 6.0}]}  # fmt: skip
    take(taken, material, 1)  # a second try is added
    assert [len(given) for given in taken.given.values()] == [3, 3]


def test_sides_that_do_other_work_are_told():
    taken = Taken(GROUPS["pictures"])
    taken.given[OURS].append({"norm": 1.0})
    taken.given[REFERENCE].append({"norm": 1.1})
    with pytest.raises(PhiSightError, match="pictures: norm is 1 on our side and 1.1 on the"):
        taken.check()


def test_pictures_are_measured_by_two_processes_that_wait(material):
    """The real thing, one turn of each side: CLIP's features are those of transformers."""
    taken = Taken(GROUPS["pictures"])
    take(taken, material, 1)
    one = taken.of(MEASURES["pictures"])
    assert one.ours > 0 and one.reference > 0 and one.turns == 1


def test_a_side_that_fails_says_why(material):
    asked = {"side": "nothing.ours", "folder": str(material.folder), "threads": 1}
    with (
        waiting("benchmarks.suite.sides", asked, 1) as turn,
        pytest.raises(PhiSightError, match="No module named 'benchmarks.suite.nothing'"),
    ):
        turn()


# -- a measure that is worse is measured again -----------------------------------------------------


@pytest.mark.parametrize(("second", "expected"), [(1.0, 0.75), (0.5, 0.5)])
def test_what_is_worse_is_measured_again_with_the_turns_of_both(monkeypatch, second, expected):
    rates = iter([0.5, second])

    def take_one(taken, material, turns):
        taken.given[OURS].append({"pictures_per_second": next(rates)})
        taken.given[REFERENCE].append({"pictures_per_second": 1.0})

    monkeypatch.setattr(run, "take", take_one)
    monkeypatch.setattr(run, "in_a_process", lambda *_: {})
    measured = run.measure(["pictures"], {"pictures": 1.0}, MEASURES, 1, None)
    assert measured["pictures"].ratio == expected and next(rates, None) is None


# -- the command -----------------------------------------------------------------------------------


def measured(ratio):
    return {name: found([ratio], [1.0], 1.0) for name in MEASURES}


def command(*arguments):
    done = subprocess.run(
        [sys.executable, runs.ROOT / "benchmarks/run.py", *map(str, arguments)],
        cwd="/", capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    return done.returncode, done.stdout, done.stderr


@pytest.fixture
def committed(tmp_path) -> Path:
    path = tmp_path / "results.json"
    results.update(path, CLASS, MACHINE, measured(2.0))
    return path


def report(tmp_path, ratio, **other) -> Path:
    path = tmp_path / "report.json"
    content = run.report_of(measured(2.0) | {"decode": found([ratio], [1.0], 1.0)}, MACHINE,
                            CLASS, 1.0)  # fmt: skip
    path.write_text(json.dumps(content | other))
    return path


def test_a_regression_is_marked_and_fails(tmp_path, committed):
    """As a program by its path, from another folder."""
    code, said, _ = command("--compare", report(tmp_path, 1.0), "--results", committed)
    assert code == 1
    [line] = [line for line in said.splitlines() if line.startswith("decode")]
    assert line.endswith(WORSE) and "1.000" in line and "2.000" in line
    assert said.splitlines()[-1] == "worse than committed by more than their bands: decode"


@pytest.mark.parametrize(("ratio", "says"), [(2.0, SAME), (4.0, BETTER)])
def test_without_a_regression_it_ends_well(tmp_path, committed, ratio, says, capsys):
    given = ["--compare", str(report(tmp_path, ratio)), "--results", str(committed)]
    assert run.main(given) == 0
    assert f"  {says}" in capsys.readouterr().out


def test_what_an_earlier_run_gave_can_be_committed(tmp_path, committed):
    given = ["--compare", str(report(tmp_path, 1.0)), "--results", str(committed)]
    assert run.main(given) == 1
    assert run.main([*given, "--update"]) == 0
    assert run.main(given) == 0


def test_the_band_is_three_deviations_of_repeated_runs(committed):
    """And stays when one run is committed later."""
    each = [{"decode": found([ratio], [1.0], 1.0)} for ratio in (2.0, 2.2, 1.5)]
    results.update(committed, CLASS, MACHINE, repeated(each))
    ratio, measures = results.committed_of(results.read_results(committed), CLASS)
    assert ratio["decode"] == 2.0 and measures["decode"].band == pytest.approx(0.3)
    assert measures["pictures"].band == MEASURES["pictures"].band
    results.update(committed, CLASS, MACHINE, {"decode": found([3.0], [1.0], 1.0)})
    ratio, measures = results.committed_of(results.read_results(committed), CLASS)
    assert ratio["decode"] == 3.0 and measures["decode"].band == pytest.approx(0.3)
    results.update(committed, CLASS, MACHINE, repeated([each[0]] * 3))
    assert results.committed_of(results.read_results(committed), CLASS)[1] == MEASURES


def test_another_kind_of_machine_has_nothing_to_compare_with(tmp_path, committed, capsys):
    path = report(tmp_path, 1.0, **{"class": "another"})
    assert run.main(["--compare", str(path), "--results", str(committed)]) == 0
    assert capsys.readouterr().out.count(NEW) == len(MEASURES)


def test_an_update_keeps_other_measures_and_other_machines(tmp_path, committed):
    content = json.loads(committed.read_text())
    content["classes"]["another"] = copy.deepcopy(content["classes"][CLASS])
    content["classes"][CLASS]["measures"]["gone"] = content["classes"]["another"]["measures"][
        "decode"
    ]
    committed.write_text(json.dumps(content))
    results.update(committed, CLASS, MACHINE, {"decode": found([3.0], [1.0], 1.0)})
    after = results.read_results(committed)
    assert after["classes"]["another"] == content["classes"]["another"]
    expected = dict.fromkeys(MEASURES, 2.0) | {"decode": 3.0}
    assert results.committed_of(after, CLASS)[0] == expected


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda text: text[:-5], "not JSON"),
        (lambda text: "{}", "classes is missing"),
        (lambda text: text.replace('"ratio": 2.0', '"ratio": -1'), "ratio is -1, not a number ab"),
        (lambda text: text.replace('"cores": 2,', ""), "cores is missing"),
    ],
)
def test_damaged_results_are_told_in_a_line(tmp_path, committed, change, reason):
    committed.write_text(change(committed.read_text()))
    with pytest.raises(PhiSightError, match=f"results.json: .*{reason}.*; put back"):
        run.main(["--compare", str(report(tmp_path, 1.0)), "--results", str(committed)])


@pytest.mark.parametrize(
    "given", [["--only", "speed"], ["--threads", "0"], ["--turns", "0"], ["--compare", "/none"]]
)
def test_what_cannot_be_measured_is_told(given):
    with pytest.raises(PhiSightError, match="|".join(("no such measure", "must be", "No such"))):
        run.main(given)


@pytest.mark.parametrize(
    "given",
    [
        ["--json", "/nowhere/figures.json", "--only", "quality"],
        ["--update", "--results", "/nowhere/results.json", "--only", "quality"],
        ["--json", "FOLDER"],
        ["--json", "FOLDER/taken"],
    ],
)
def test_a_file_that_cannot_be_written_is_no_regression(given, tmp_path, committed):
    """Such as the code 1 that a traceback ends with would say."""
    (tmp_path / "taken").mkdir()
    given = [one.replace("FOLDER", str(tmp_path)) for one in given]
    measured = [] if "--only" in given else ["--compare", report(tmp_path, 2.0)]
    code, _, errors = command(*measured, "--results", committed, *given)
    assert code == 2 and len(errors.splitlines()) == 1 and errors.startswith("error: /"), errors


def test_figures_of_a_later_version_are_read_too(tmp_path, committed, capsys):
    path = report(tmp_path, 2.0)
    content = json.loads(path.read_text())
    for one in content["measures"].values():
        one["power"] = 3.0
    path.write_text(json.dumps(content))
    assert run.main(["--compare", str(path), "--results", str(committed)]) == 0


def test_the_committed_results_are_of_this_suite():
    content = results.read_results(results.FILE)
    assert content["classes"]
    for one in content["classes"].values():
        assert set(one["measures"]) <= set(MEASURES)
