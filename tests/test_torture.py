"""The torture tool: real runs that are killed for real end like one that never was, its kinds of
kills come in fair shares, and it sees what a kill must never leave behind."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import threading
from collections import Counter
from pathlib import Path

import pytest
import runs
import torch

import checkpoints
from errors import PhiSightError
from evaluation import meter
from tools import torture_resume as torture
from tools.torture.deal import MISSES, Deal, Recipe, draw_aim, left
from tools.torture.findings import differences, look_at
from tools.torture.kills import KINDS, PLACES, Aim, set_trap
from tools.torture_resume import MARKER, Run
from training.optimizer import AdamW
from training.progress import Progress

SHORT = ("--steps=12", "--pictures=24")


# -- for real -------------------------------------------------------------------------------------


def test_killed_runs_end_identical(tmp_path):
    kinds = ["random", "save", "rename", "prune", "evaluation", "features", "best"]
    done = subprocess.run(
        [
            sys.executable,
            "tools/torture_resume.py",
            f"--kills={len(kinds)}",
            *SHORT,
            "--json",
            f"--kinds={','.join(kinds)}",
            f"--out={tmp_path / 'out'}",
        ],
        cwd=runs.ROOT,
        env=runs.environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["kills"] == result["identical"] == len(kinds) and result["runs"] >= 1
    assert result["by_kind"] == {kind: {"kills": 1, "identical": 1} for kind in kinds}
    assert done.stderr.count(": killed, ") == len(kinds)
    assert not list((tmp_path / "out").glob("killed-*")), "what ended identical is cleared away"


def test_a_process_that_fails_stops_it_with_its_output(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torture.Torture, "_flags", lambda self: ["--bathc-size=2"])
    with pytest.raises(PhiSightError, match="ended with 2; its output is above"):
        torture.main(["--out", str(tmp_path / "out"), *SHORT])
    assert "did you mean --batch-size?" in capsys.readouterr().err


# -- the traps ------------------------------------------------------------------------------------


def save(run: Path, step: int, **more: int) -> None:
    state = {stem: {"a": torch.full((2,), float(step))} for stem in checkpoints.OWNERS}
    checkpoints.save(run, step, state, {"rank": 1}, {"step": step, **more})


def step() -> None:
    """What the loop does before it saves for the first time."""
    AdamW([("a", torch.nn.Parameter(torch.ones(1)))]).step(0.1)


def killed(aim: str, *acts) -> bool:
    """Whether a process with that trap died in it while it did all of `acts`, in a thread."""

    def work() -> None:
        for act in acts:
            act()

    child = os.fork()
    if child == 0:
        set_trap(Aim.parse(aim))
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
        os._exit(0)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code in (0, -signal.SIGKILL)
    return code != 0


@pytest.mark.parametrize(
    "aim, newest, left_over",
    [
        ("save/fsync:1", 1, 7),
        ("save/tensors:3", 1, 5),
        ("verify/start:1", 1, 7),
        ("verify/middle:2", 1, 7),
        ("verify/end:1", 1, 7),
        ("rename/before:1", 1, 7),
        ("rename/after:1", 2, None),
        ("rename/before:2", 2, None),
        ("rename/after:2", 2, 7),
        ("prune/before:1", 2, 7),
        ("prune/middle:3", 2, 4),
        ("prune/after:1", 2, None),
    ],
)
def test_a_trap_in_a_save_leaves_what_a_kill_there_leaves(aim, newest, left_over, tmp_path):
    """`left_over`: files in the folder that is being written or removed; None: there is none."""
    save(tmp_path, 1)
    assert killed(aim, step, lambda: save(tmp_path, 2))
    assert checkpoints.find_newest(tmp_path)[0].path.name == f"checkpoint-{newest:06d}"
    others = [
        path
        for path in tmp_path.iterdir()
        if path.is_dir() and path not in checkpoints.checkpoints_in(tmp_path)
    ]
    assert [len(list(folder.iterdir())) for folder in others] == (
        [] if left_over is None else [left_over]
    )


@pytest.mark.parametrize(
    "aim", ["save/fsync:1", "verify/start:1", "rename/after:1", "prune/after:1"]
)
def test_what_comes_before_the_first_step_is_no_save(aim, tmp_path):
    assert not killed(aim, lambda: save(tmp_path, 1), lambda: save(tmp_path, 2))
    assert killed(aim, step, lambda: save(tmp_path, 3))


def find_best() -> None:
    """What the loop does after an evaluation that found a new best."""
    Progress(step=2).add_validation_loss(1.0, 0, keep_best=True)


@pytest.mark.parametrize(
    "aim, best, steps",
    [
        ("best/found:1", 1, [1]),
        ("best/fsync:1", 1, [1]),
        ("best/before-rename:1", 1, [1]),
        ("best/after-rename:1", 2, [1, 2]),
        ("best/before-removal:1", 2, [2]),
        ("best/removal:3", 2, [2]),
    ],
)
def test_a_kill_while_a_new_best_is_kept_leaves_one_of_the_two(aim, best, steps, tmp_path):
    save(tmp_path, 1, best_step=1)
    assert not killed(aim, step, lambda: save(tmp_path / "other", 1))
    assert killed(aim, step, find_best, lambda: save(tmp_path, 2, best_step=2))
    assert checkpoints.resolve(tmp_path / "best").step == best
    assert [int(path.name[-6:]) for path in checkpoints.checkpoints_in(tmp_path)] == steps
    save(tmp_path, 3, best_step=best)
    kept = [int(path.name[-6:]) for path in checkpoints.checkpoints_in(tmp_path)]
    assert kept == [best, 3] and checkpoints.resolve(tmp_path / "best").step == best


@pytest.mark.parametrize("aim", ["verify/start:4", "rename/before:9", "prune/before:3"])
def test_a_call_that_never_comes_kills_nobody(aim, tmp_path):
    assert not killed(aim, step, *[lambda n=n: save(tmp_path, n) for n in (1, 2, 3)])


def test_calls_count_only_inside_the_function_that_they_are_meant_in(tmp_path):
    save(tmp_path, 1)
    path = tmp_path / "checkpoint-000001"
    assert not killed("resume/load:1", lambda: checkpoints.verify(path))
    assert killed("resume/load:1", lambda: checkpoints.load_newest(tmp_path))
    assert not killed(
        "evaluation/middle:1", lambda: meter.packed_batch([], None, 0, 1, (1, 1), None)
    )


def test_every_place_names_a_function_that_is_there():
    for kind, places in PLACES.items():
        for name in places:
            assert not killed(f"{kind}/{name}:1")


# -- which kill is next ---------------------------------------------------------------------------


def test_each_kind_gets_its_fair_share_in_a_mixed_order():
    deal, order = Deal(3 * len(KINDS), KINDS, seed=4), []
    while kind := deal.take(KINDS):
        deal.hit(kind)
        order.append(kind)
    assert Counter(order) == deal.kills == dict.fromkeys(KINDS, 3) and not deal.open
    size = len(KINDS)
    rounds = [tuple(order[start : start + size]) for start in range(0, len(order), size)]
    assert len(set(rounds)) == 3

    def first(seed: int) -> list[str]:
        other = Deal(size, KINDS, seed)
        return [other.take(KINDS) for _ in KINDS]

    assert first(4) == list(rounds[0]) != first(5)


def test_a_kind_that_cannot_strike_yet_waits_for_its_turn():
    deal = Deal(4, ["resume", "save"], seed=0)
    for _ in range(2):
        assert deal.take(["save"]) == "save"
        deal.hit("save")
    assert [deal.take(["resume", "save"]) for _ in range(3)] == ["resume", "resume", None]


def test_a_kill_that_did_not_happen_is_made_up_for():
    deal = Deal(1, ["save"], seed=0)
    for _ in range(MISSES - 1):
        assert deal.take(["save"]) == "save" and not deal.open
        deal.missed("save")
        assert deal.open
    deal.take(["save"])
    with pytest.raises(PhiSightError, match="kind save: .* in a row"):
        deal.missed("save")


def test_no_more_kills_are_given_out_than_are_wanted():
    deal = Deal(2, KINDS, seed=0)
    assert deal.take([]) is None and deal.open
    assert None not in (deal.take(KINDS), deal.take(KINDS)) and deal.take(KINDS) is None


@pytest.mark.parametrize(
    "kind, newest, expected",
    [
        ("step", None, 24),
        ("step", 20, 4),
        ("save", None, 6),
        ("save", 20, 1),
        ("rename", 21, 1),
        ("verify", 3, 6),
        ("prune", None, 5),
        ("prune", 20, 1),
        ("evaluation", None, 4),
        ("evaluation", 16, 2),
        ("best", None, 1),
        ("best", 23, 1),
        ("resume", None, 0),
        ("resume", 4, 1),
        ("features", 4, 1),
        ("random", None, 1),
        *((kind, 24, 0) for kind in KINDS),
    ],
)
def test_what_a_run_still_has_before_it(kind, newest, expected):
    recipe = Recipe(steps=24)
    assert (recipe.save_steps, recipe.evaluate_steps) == (4, 6)
    assert left(kind, recipe, newest) == expected


def test_aims_are_drawn_from_all_places_within_what_is_left():
    generator = random.Random(0)
    for kind, places in PLACES.items():
        aims = [draw for _ in range(200) if (draw := draw_aim(kind, 3, generator))]
        assert {aim.place for aim in aims} == set(places)
        for name, place in places.items():
            numbers = [aim.number for aim in aims if aim.place == name]
            assert min(numbers) >= 1 and place.calls < max(numbers) <= 3 * place.calls
        assert all(Aim.parse(str(aim)) == aim for aim in aims)
    assert draw_aim("random", 1, generator) == Aim("random")


# -- what it sees ---------------------------------------------------------------------------------


def test_what_a_kill_must_never_leave_behind_is_seen(tmp_path):
    problems: list[str] = []
    assert look_at(tmp_path / "none", None, problems) is None and problems == []
    save(tmp_path, 4)
    assert look_at(tmp_path, None, problems, save_steps=4) == 4 and problems == []
    assert look_at(tmp_path, 8, problems) == 4
    assert "step 8 was saved, the newest checkpoint is of step 4" in problems.pop()
    save(tmp_path, 5)
    newer = checkpoints.save(tmp_path, 6, {stem: {} for stem in checkpoints.OWNERS}, {}, {}, keep=2)
    for damaged, newest in ((newer, 5), (tmp_path / "checkpoint-000005", 6)):
        good = (damaged / "config.json").read_text()
        (damaged / "config.json").write_text("{")
        assert look_at(tmp_path, 5, problems, save_steps=4) == newest
        assert f"{damaged}: left damaged, config.json" in problems.pop() and problems == []
        (damaged / "config.json").write_text(good)
    checkpoints.remove_all(tmp_path)
    assert look_at(tmp_path, 5, problems, save_steps=4) is None
    assert "no checkpoint in" in problems.pop()
    (tmp_path / "metrics.jsonl").write_text('{"step":8}\n')
    assert look_at(tmp_path, None, problems, save_steps=4) is None and problems == []
    (tmp_path / "metrics.jsonl").write_text('{"step":8}\n{"step":9}\n')
    assert look_at(tmp_path, None, problems, save_steps=4) is None and problems


def test_a_run_that_ended_otherwise_is_seen(tmp_path):
    records = [{"step": 1, "loss": 2.0, "timing": {"seconds": 1}}, {"step": 2, "loss": 1.0}]
    for name in ("whole", "same", "other", "short"):
        save(tmp_path / name, 2)
        lines = [json.dumps(record) + "\n" for record in records]
        (tmp_path / name / "metrics.jsonl").write_text("".join(lines))
    later = records[0] | {"timing": {"seconds": 9}}
    (tmp_path / "same/metrics.jsonl").write_text(f"{json.dumps(later)}\n{lines[1]}")
    assert differences(tmp_path / "whole", tmp_path / "same") == []
    changed = records[1] | {"loss": 1.5}
    (tmp_path / "other/metrics.jsonl").write_text(f"{lines[0]}{json.dumps(changed)}\n")
    (problem,) = differences(tmp_path / "whole", tmp_path / "other")
    assert "record 2" in problem and "1.5" in problem
    (tmp_path / "short/metrics.jsonl").write_text(lines[0])
    (problem,) = differences(tmp_path / "whole", tmp_path / "short")
    assert "1 records, not 2" in problem
    save(tmp_path / "same", 3)
    (problem,) = differences(tmp_path / "whole", tmp_path / "same")
    assert problem.startswith("different: ")
    checkpoints.remove_all(tmp_path / "same")
    for name, best in (("whole", 1), ("same", 1), ("other", 2)):
        checkpoints.remove_all(tmp_path / name)
        (tmp_path / name / "metrics.jsonl").write_text("")
        for number in (1, 2, 3):
            save(tmp_path / name, number, best_step=min(best, number))
    assert differences(tmp_path / "whole", tmp_path / "same") == []
    assert "best_step: 1 against 2" in differences(tmp_path / "whole", tmp_path / "other")[0]
    save(tmp_path / "same", 2, best_step=1)
    (problem,) = differences(tmp_path / "whole", tmp_path / "same")
    assert "checkpoint-000002" in problem and problem.startswith("checkpoints: ")
    checkpoints.remove_all(tmp_path / "same")
    assert "no checkpoint" in differences(tmp_path / "whole", tmp_path / "same")[0]


def test_every_kill_of_a_run_counts_as_the_run_ended(capsys):
    done = [
        Run(Path("a"), ["save", "step", "save"]),
        Run(Path("b"), ["save"], ["differs"]),
        Run(Path("c")),
    ]
    result = torture.summarise(done, ("save", "step", "prune"), 12.34)
    assert result == {
        "kills": 4,
        "identical": 3,
        "runs": 3,
        "seconds": 12.3,
        "by_kind": {
            "save": {"kills": 3, "identical": 2},
            "step": {"kills": 1, "identical": 1},
            "prune": {"kills": 0, "identical": 0},
        },
    }
    torture.print_table(result)
    assert "3 of 4 kills, in 3 runs" in capsys.readouterr().out


# -- the command ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--kils", "3"], "--kils: no such flag; did you mean --kills?"),
        (["--kills", "0"], "--kills 0: must be at least 1"),
        (["--kinds", "save,lightning"], "'lightning' is none of random, step"),
        (["--child", "save/nowhere:1"], "--child save/nowhere:1: not KIND/PLACE:NUMBER"),
        (["--child", "save/fsync:0"], "not KIND/PLACE:NUMBER"),
        (["stray"], "stray"),
    ],
)
def test_what_was_typed_wrong_is_named(arguments, words):
    with pytest.raises(PhiSightError) as error:
        torture.main(arguments)
    assert words in str(error.value)


def test_a_folder_with_other_things_is_left_alone(tmp_path):
    (tmp_path / "whole").mkdir()
    with pytest.raises(PhiSightError, match="holds other things; give a new folder with --out"):
        torture.main(["--out", str(tmp_path)])
    assert [path.name for path in tmp_path.iterdir()] == ["whole"]
    assert not (tmp_path / MARKER).exists()
