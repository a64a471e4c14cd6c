"""A sweep's file: which runs it stands for, and what is wrong with it."""

import itertools
import re
import string
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from errors import PhiSightError
from reports.markdown import cell
from sweeps.plan import PlannedRun, planned, read_sweep


def plan(sweep: dict, run: dict | None = None) -> list[PlannedRun]:
    return planned({"run": run or {}, "sweep": sweep}, "here")


def test_a_run_for_every_combination_and_the_last_list_goes_fastest():
    runs = plan({"seed": [0, 1], "learning_rate": [1e-3, 3e-3]}, {"max_steps": 7})
    assert [run.name for run in runs] == [
        "seed=0,learning_rate=0.001",
        "seed=0,learning_rate=0.003",
        "seed=1,learning_rate=0.001",
        "seed=1,learning_rate=0.003",
    ]
    assert runs[1].fields == {"max_steps": 7, "seed": 0, "learning_rate": 3e-3}
    assert runs[1].choices == {"seed": "0", "learning_rate": "0.003"}
    assert all(run.preset == "tiny" for run in runs)


def test_fields_that_are_chosen_together():
    tables = [{"name": "a b", "lora_rank": 4, "lora_alpha": 4}, {"lora_rank": 8}]
    runs = plan({"adapter": tables, "pack": [True, False]}, {"preset": "phi35"})
    assert [run.name for run in runs] == [
        "adapter=a-b,pack=true", "adapter=a-b,pack=false",
        "adapter=1,pack=true", "adapter=1,pack=false",
    ]  # fmt: skip
    assert runs[0].fields == {"lora_rank": 4, "lora_alpha": 4.0, "pack": True}
    assert runs[2].fields == {"lora_rank": 8, "pack": True} and runs[2].preset == "phi35"


def test_a_list_of_lists_for_a_field_that_is_a_list():
    runs = plan({"lora_targets": [["o_proj", "down_proj"], ["qkv_proj"]]})
    assert [run.fields["lora_targets"] for run in runs] == [("o_proj", "down_proj"), ("qkv_proj",)]
    assert runs[0].name == "lora_targets=o_proj+down_proj"


AXES = {
    "seed": st.integers(0, 99),
    "learning_rate": st.floats(1e-6, 1.0),
    "schedule": st.sampled_from(["linear", "cosine", "constant"]),
    "lora_rank": st.integers(1, 64),
    "start_from": st.text(st.characters(codec="utf-8"), min_size=1, max_size=80),
}
lists = st.fixed_dictionaries(
    {},
    optional={n: st.lists(v, min_size=1, max_size=3, unique_by=str) for n, v in AXES.items()},
).filter(bool)


@settings(deadline=None)
@given(lists)
def test_every_combination_once_under_a_name_that_a_folder_can_have(sweep):
    runs = plan(sweep)
    names = [run.name for run in runs]
    assert len(set(names)) == len(names)
    assert all(re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._+=,-]{0,99}", name) for name in names)
    made = [tuple(run.fields[name] for name in sweep) for run in runs]
    assert made == list(itertools.product(*sweep.values()))


@pytest.mark.parametrize(
    ("tables", "said"),
    [
        ({"sweep": {"sead": [0]}}, "here: [sweep]: 'sead' is not a config field"),
        ({"sweep": {"sead": 0}}, "'sead' is not a config field; did you mean seed?"),
        ({"run": {"epoch": 1}, "sweep": {"seed": [0]}}, "did you mean epochs?"),
        ({"swep": {"seed": [0]}}, "'swep' is not a table of a sweep; did you mean [sweep]?"),
        ({"sweep": 3}, "sweep is 3; write a table [sweep]"),
        ({"run": {"max_steps": 3}}, "[sweep] has no list"),
        ({"sweep": {"seed": []}}, "seed is []; write a list of values"),
        ({"sweep": {"seed": 3}}, "seed is 3; write a list of values"),
        ({"sweep": {"seed": [0, 0]}}, "seed has '0' twice"),
        ({"sweep": {"seed": [0, "one"]}}, "config field seed is 'one'; expected a whole number"),
        ({"sweep": {"seed": [-1]}}, "--seed must be from 0 to 4294967295, not -1"),
        ({"sweep": {"run": ["a"]}}, "run is given by the sweep"),
        ({"run": {"run": "a"}, "sweep": {"seed": [0]}}, "run is given by the sweep"),
        ({"run": {"seed": 1}, "sweep": {"seed": [0]}}, "seed is in [run] and in seed of [sweep]"),
        ({"sweep": {"seed": [0], "b": [{"seed": 1}]}}, "seed is in seed of [sweep] and in b of"),
        ({"sweep": {"seed": [{"seed": 1}]}}, "'seed' holds tables; give such a list a short name"),
        ({"sweep": {"a b": [{"seed": 1}]}}, "'a b' holds tables"),
        ({"sweep": {"b": [{"seed": 1}, 3]}}, "b mixes tables and values"),
        ({"sweep": {"b": [{"name": 1, "seed": 1}]}}, "b: name is 1; write a text"),
        ({"sweep": {"b": [{"name": "x", "sed": 1}]}}, "'sed' is not a config field; did you mean"),
        ({"sweep": {"preset": ["tiny"]}}, "'preset' is not a config field"),
        ({"run": {"preset": "large"}, "sweep": {"seed": [0]}}, 'give "phi35" or "tiny"'),
        ({"sweep": {"seed": [*range(40)], "epochs": [*range(1, 40)]}}, "makes 1,560 runs"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said_in_one_line(tables, said):
    with pytest.raises(PhiSightError) as caught:
        planned(tables, "here")
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_no_runs_folder_is_a_file_of_another_run():
    first, second, third = planned({"sweep": {"data": ["a", "a.toml", "a.log"]}}, "here")
    assert [first.name, second.name, third.name] == ["data=a", "run-0001", "run-0002"]


def test_a_long_list_is_refused_at_once():
    with pytest.raises(PhiSightError, match="makes 100,000 runs"):
        planned({"sweep": {"seed": [*range(10**5)]}}, "here")


def test_a_file_is_read(tmp_path):
    file = tmp_path / "sweep.toml"
    file.write_text('[run]\nmax_steps = 3\n[sweep]\nseed = [0]\nb = [{name = "x", epochs = 2}]\n')
    [run] = read_sweep(str(file))
    assert run.fields == {"max_steps": 3, "seed": 0, "epochs": 2}
    for text in ("[sweep", "seed = [0]\n\x00", "a = " + "[" * 5000):
        file.write_text(text)
        with pytest.raises(PhiSightError, match="not valid TOML"):
            read_sweep(str(file))
    with pytest.raises(PhiSightError, match="gone.toml: No such file"):
        read_sweep("gone.toml")


def test_the_file_in_the_documentation_is_a_sweep(tmp_path):
    page = (Path(__file__).resolve().parent.parent / "docs/training.md").read_text()
    [block] = [part for part in re.findall(r"```toml\n(.*?)```", page, re.S) if "[sweep]" in part]
    (tmp_path / "sweep.toml").write_text(block)
    runs = read_sweep(str(tmp_path / "sweep.toml"))
    assert len(runs) == 12 and "seed=0,learning_rate=0.001,adapter=small" in page
    assert runs[0].name == "seed=0,learning_rate=0.001,adapter=small"


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=8,
)
keys = st.sampled_from(["run", "sweep", "seed", "preset", "name", "lora_targets", "b"]) | st.text()


@settings(deadline=None, max_examples=300)
@given(st.dictionaries(keys, st.dictionaries(keys, values, max_size=3) | values, max_size=3))
def test_whatever_a_file_holds_it_is_runs_or_an_error(tables):
    try:
        runs = planned(tables, "here")
    except PhiSightError:
        return
    assert runs


def test_a_cell_of_a_summary_shows_numbers_as_they_are_and_nothing_else():
    for plain in ("0.0614 (0.0614 to 0.0697)", "9,300", "-", "955 of 955", "-1.5"):
        assert cell(plain) == plain
    assert cell("learning_rate=0.001,seed=0") == "`learning_rate=0.001,seed=0`"
    for hostile in ("1. list", "a | b", "<b>", "[x](y)", "1|2", "`code`", "- 1", "# 1"):
        marks = re.sub(r"\\[^\w\s]", "", cell(hostile))
        assert not set(marks) & set(string.punctuation)
