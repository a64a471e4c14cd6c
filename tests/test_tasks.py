"""Tasks from end to end: figures against references, and evaluations that are killed and go on."""

from __future__ import annotations

import itertools
import json
import math
import os
import resource
import signal
from pathlib import Path

import pytest
import runs
import sklearn.metrics
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import alone
import evaluate
from config import replace
from data.chat import render
from data.world.forms import forms_beside
from errors import PhiSightError
from evaluation import meter
from evaluation.runner import Settings, evaluated, store_of
from evaluation.task import Answered, Asked
from evaluation.tasks import TASKS
from evaluation.tasks.pope import is_neither, says_no

POPE, LOSS = TASKS["pope"], TASKS["loss"]


def answer(capsys, *arguments: object) -> dict:
    """What `evaluate.py --json` prints about the finished run."""
    run = ["--run", str(runs.finished_run())]
    capsys.readouterr()
    assert evaluate.main([*run, *map(str, arguments), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def refusal(*arguments: object) -> str:
    with pytest.raises(PhiSightError) as caught:
        evaluate.main(["--run", str(runs.finished_run()), *map(str, arguments)])
    assert "\n" not in str(caught.value)
    return str(caught.value)


# -- POPE -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "no", "neither"),
    [
        ("No", True, False),
        ("no.", True, False),
        ("Yes, there is no doubt", True, False),  # POPE's script looks for a word that says no
        ("There is not", True, False),
        ("NO", False, True),  # as it is written: no case is folded
        ("Yes. No.", False, False),  # the first sentence alone
        ("A dog", False, True),
        ("", False, True),
        ("yes", False, False),
        ("No, it is not.", True, False),
        ("none", False, True),
    ],
)
def test_yes_and_no_are_read_as_pope_reads_them(text, no, neither):
    assert (says_no(text), is_neither(text)) == (no, neither)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(["yes", "no"]), st.booleans()), min_size=1, max_size=30))
def test_popes_figures_are_those_of_sklearn(pairs):
    given_answers = []
    for number, (label, said_yes) in enumerate(pairs):
        asked = Asked(str(number), f"{number % 7}.png", "?", (label,))
        text = "Yes, it is." if said_yes else "No."
        given_answers.append(Answered(asked, "right", text, POPE.scored(asked, text)))
    wanted, said = [label == "yes" for label, _ in pairs], [yes for _, yes in pairs]
    reference = sklearn.metrics.precision_recall_fscore_support(
        wanted, said, average="binary", pos_label=True, zero_division=0
    )
    found = POPE.figures(given_answers)
    assert [found[name].value / 100 for name in ("precision", "recall", "f1")] == pytest.approx(
        list(reference[:3])
    )
    accuracy = sklearn.metrics.accuracy_score(wanted, said)
    assert found["accuracy"].value / 100 == pytest.approx(accuracy)
    assert found["yes_share"].value / 100 == pytest.approx(sum(said) / len(said))
    for one in found.values():
        assert 0 <= one.low <= one.high <= 100 and one.count == len(pairs)


def test_pope_as_json(capsys):
    found = answer(capsys, "--task", "pope", "--conditions", "right,blank")
    names = {"accuracy", "precision", "recall", "f1", "yes_share"}
    assert names < found.keys() and names < found["intervals"].keys()
    made = forms_beside(runs.world() / "images")
    assert found["questions"] == len((made / "pope_random.json").read_text().splitlines())
    assert found["conditions"].keys() == {"right", "blank"}
    for name, (low, high) in found["intervals"].items():
        assert 0 <= low <= found[name] <= high <= 100


REAL = runs.ROOT.parent / "shared/real/pope/coco_pope_random.json"


@pytest.mark.skipif(not REAL.is_file(), reason="the real POPE file is not here")
def test_the_real_file_of_pope_with_pictures_and_without(tmp_path, capsys):
    message = refusal("--task", "pope", "--data", REAL)
    assert "500 pictures cannot be used" in message and "--images" in message
    names = {one.image for one in POPE.questions([REAL], 0)}
    for number, name in enumerate(sorted(names)):  # stand-ins: another colour each
        Image.new("RGB", (24, 24), (number // 2, number % 2, 90)).save(tmp_path / name)
    found = answer(capsys, "--task", "pope", "--data", REAL, "--images", tmp_path,
                   "--features", tmp_path / "features", "--limit", 120,
                   "--max-new-tokens", 2)  # fmt: skip
    assert found["questions"] == 120 and found["recall"] >= 0


# -- every task -----------------------------------------------------------------------------------


@pytest.mark.parametrize("task", ["vqa", "world", "loss"])
def test_every_task_runs_without_any_file(task, capsys):
    found = answer(capsys, "--task", task, "--max-new-tokens", 4)
    assert found["questions"] > 0 and found["intervals"]
    assert found["weights_digest"]


def test_captions(capsys):
    pytest.importorskip("sacrebleu")
    found = answer(capsys, "--task", "caption", "--max-new-tokens", 24)
    assert {"bleu_4", "rouge_l", "cider"} < found.keys()


def test_a_table_has_every_condition_and_kind(capsys):
    run = ["--run", str(runs.finished_run()), "--task", "vqa", "--conditions", "right,swapped"]
    capsys.readouterr()
    assert evaluate.main([*run, "--limit", "12", "--max-new-tokens", "3"]) == 0
    table = capsys.readouterr().out
    head, *rows, alignment = table.splitlines()
    assert alignment.startswith("alignment: ") and alignment.endswith("and a swapped one")
    assert head.split("  ")[0] == "vqa, 95 % intervals"
    assert "right picture" in head and "swapped picture" in head
    assert len({len(row) for row in (head, *rows)}) == 1
    assert any(row.startswith("  accuracy, yes/no") for row in rows)


def test_every_task_says_what_it_is_for():
    for name, task in TASKS.items():
        assert task.about and task.form and task.main, name


def test_a_run_without_questions_is_told_what_measures_it():
    config = replace(runs.assistant().config, held_out_questions="")
    with pytest.raises(PhiSightError, match="the run has none; .*--task loss"):
        TASKS["world"].default_data(config, Path("images"))


def test_flags_that_do_not_go_together_are_refused(tmp_path):
    assert "is not one of them" in refusal("--conditions", "wrong")
    assert "--limit" in refusal("--limit", "-1")
    assert "belong to --task world" in refusal("--task", "pope", "--held-out-questions", "a")
    assert "leave it out" in refusal("--task", "loss", "--instruction", "Be brief.")
    assert "--max-new-tokens" in refusal("--max-new-tokens", "0")
    assert "no picture world" in refusal("--task", "vqa", "--images", tmp_path / "images")


def test_an_instruction_is_asked_and_counts_as_another_setting(tmp_path, capsys):
    out = tmp_path / "a.jsonl"
    common = ("--task", "pope", "--limit", 4, "--max-new-tokens", 2, "--out", out)
    answer(capsys, *common)
    assert "instruction is ''" in refusal(*common, "--instruction", "Answer yes or no.")


# -- the loss -------------------------------------------------------------------------------------


def test_the_loss_is_the_meters_and_a_mean_over_tokens(tmp_path):
    assistant = runs.assistant()
    store = store_of(assistant, str(runs.shared() / "features"))
    data = runs.world() / "train.json"
    asked = LOSS.questions([data], 15)
    images = runs.world() / "images"
    found = evaluated(assistant, LOSS, asked, images, store, Settings("loss", ("right",), 1))
    samples = [render(one.messages, assistant.parts.chat_format) for one in asked]
    longest = max(len(sample.input_ids) for sample in samples)
    batches = meter.packed_batches(
        samples,
        2 * longest,
        store.features_of,
        assistant.parts.chat_format.padding_id,
        assistant.parts.chat_format.image_id,
        store.shape,
        torch.device("cpu"),
    )
    expected = meter.validation_loss(assistant.model, batches)
    figures = LOSS.figures(found.answered["right"])
    assert figures["loss"].value == pytest.approx(expected, rel=1e-4)
    assert figures["perplexity"].value == pytest.approx(math.exp(expected), rel=1e-3)
    assert figures["perplexity"].low == pytest.approx(math.exp(figures["loss"].low))
    for one, sample in zip(found.answered["right"], samples, strict=True):
        assert one.scores["tokens"] == sum(sample.supervised)
    # One alone: what it gives does not depend on what it is packed with.
    alone_again = evaluated(
        assistant, LOSS, asked[3:4], images, store, Settings("loss", ("right",), 1)
    )
    of_one = alone_again.answered["right"][0].scores["loss"]
    assert of_one == pytest.approx(found.answered["right"][3].scores["loss"], rel=1e-3)


def test_the_loss_without_a_file_is_the_one_of_the_log(capsys):
    found = answer(capsys, "--task", "loss")
    log = (runs.finished_run() / "metrics.jsonl").read_text().splitlines()
    last = [r for r in map(json.loads, log) if r["kind"] == "evaluation"][-1]
    assert last["step"] == runs.newest_step(runs.finished_run())
    assert found["loss"] == pytest.approx(last["validation_loss"], rel=1e-3)


# -- killed and resumed ---------------------------------------------------------------------------


def whole(out: Path, task: str, limit: int = 20) -> dict:
    """An evaluation within this process; its figures."""
    assistant = runs.assistant()
    store = store_of(assistant, str(runs.shared() / "features"))
    made = forms_beside(runs.world() / "images")
    data = {"pope": made / "pope_adversarial.json", "loss": runs.world() / "train.json"}[task]
    found = evaluated(
        assistant,
        TASKS[task],
        TASKS[task].questions([data], limit),
        runs.world() / "images",
        store,
        Settings(task, ("right", "blank"), 3, out=out),
    )
    return {name: TASKS[task].figures(given) for name, given in found.answered.items()}


@pytest.mark.parametrize("task", ["pope", "loss"])
def test_an_evaluation_killed_anywhere_goes_on_to_the_same_figures(task, tmp_path, monkeypatch):
    monkeypatch.setattr("evaluation.runner.BATCH", 5)
    monkeypatch.setattr("evaluation.meter.ROWS", 2)
    out = tmp_path / "answers.jsonl"
    expected = whole(out, task)
    data = out.read_bytes()
    header, *records = map(json.loads, data.splitlines())
    assert header["task"] == task and header["conditions"] == ["right", "blank"]
    assert len(records) == len({(r["condition"], r["id"]) for r in records})
    ends = list(itertools.accumulate(len(line) for line in data.splitlines(keepends=True)))
    for length in (0, ends[0] - 1, ends[0], ends[3] + 7, len(data) - 1):
        out.write_bytes(data[:length])
        assert whole(out, task) == expected
        assert sorted(out.read_bytes().splitlines()) == sorted(data.splitlines())
    out.write_bytes(data + b'{"id": "a half')
    assert whole(out, task) == expected and out.read_bytes() == data


def test_what_is_answered_is_not_asked_again(tmp_path, monkeypatch):
    out = tmp_path / "answers.jsonl"
    expected = whole(out, "pope")

    def never(*arguments):
        raise AssertionError("asked again")

    monkeypatch.setattr("evaluation.questions.Engine", never)
    assert whole(out, "pope") == expected


def test_a_file_of_something_else_is_refused_and_left_as_it_is(tmp_path):
    out = tmp_path / "answers.jsonl"
    whole(out, "pope")
    good = out.read_bytes()
    header, _, rest = good.partition(b"\n")
    other = json.loads(header)
    cases = {
        "weights_digest is": json.dumps(other | {"weights_digest": "0"}).encode() + b"\n" + rest,
        "step is": json.dumps(other | {"step": 12345}).encode() + b"\n" + rest,
        "not written by this command": b'{"prompt": "a"}\n',
        "was not written": header + b"\n" + b'{"id": 1}\n',
        "written by": b"a text",
    }
    for message, content in cases.items():
        out.write_bytes(content)
        with pytest.raises(PhiSightError, match=f"{message}.*give another --out"):
            whole(out, "pope")
        assert out.read_bytes() == content
    out.write_bytes(good)
    with pytest.raises(PhiSightError, match="questions is 12 there and 8 now"):
        whole(out, "pope", limit=8)
    with alone.opened_alone(out), pytest.raises(PhiSightError, match="another process writes it"):
        whole(out, "pope")
    moved = json.dumps(other | {"run": "elsewhere"}).encode() + b"\n" + rest
    out.write_bytes(moved)
    whole(out, "pope")  # the same weights, in another folder


def test_a_folder_that_is_not_there_is_told(tmp_path):
    with pytest.raises(PhiSightError, match="No such file.*give another --out"):
        whole(tmp_path / "none/answers.jsonl", "pope")
    assert "a folder that is there" in refusal("--out", tmp_path / "none/answers.jsonl")


def test_files_that_cannot_be_written_are_told_before_anything_is_asked(tmp_path):
    data = tmp_path / "questions.jsonl"
    for flag in ("--out", "--report"):
        assert "File name too long" in refusal(flag, tmp_path / ("a" * 300))
        assert "named by another flag too" in refusal("--data", data, flag, data)
        assert "a folder that is there" in refusal(flag, tmp_path)
    same = tmp_path / "one"
    assert "named by another flag too" in refusal("--out", same, "--report", same)


def test_a_pipe_is_refused_and_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(PhiSightError, match="pipe: is not a regular file; give another --out"):
        whole(tmp_path / "pipe", "pope")


@pytest.mark.parametrize("room", [0, 100, 2500])
def test_a_full_disk_is_told_and_gone_on_from(room, tmp_path):
    out = tmp_path / "answers.jsonl"
    expected = whole(tmp_path / "whole.jsonl", "pope")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    former = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))
    try:
        with pytest.raises(PhiSightError, match="make room and run again, it goes on there"):
            whole(out, "pope")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, former)
    assert out.stat().st_size == room
    assert whole(out, "pope") == expected


def test_a_loss_that_is_not_finite_is_kept_and_is_null_in_json(tmp_path, capsys, monkeypatch):
    def diverged(assistant, batch, samples):
        return [{"loss": math.nan if n else math.inf, "tokens": 1.0} for n, _ in enumerate(samples)]

    monkeypatch.setattr("evaluation.runner.losses", diverged)
    out = tmp_path / "answers.jsonl"
    common = ("--task", "loss", "--limit", 4, "--out", out)
    first = answer(capsys, *common)
    assert first["loss"] is None and first["intervals"]["perplexity"] == [None, None]
    monkeypatch.setattr("evaluation.runner.losses", None)  # nothing is asked again
    assert answer(capsys, *common) | {"seconds": 0} == first | {"seconds": 0}


def test_swapped_pictures_need_two(tmp_path):
    one = {"question_id": 1, "image": "held_out_000000.png", "text": "Is it red?", "label": "yes"}
    data = tmp_path / "questions.jsonl"
    data.write_text("".join(json.dumps(one | {"question_id": n}) + "\n" for n in range(3)))
    assert "swapped needs two different pictures" in refusal("--data", data)


def test_questions_that_are_only_reported_have_no_total_and_no_interval(tmp_path, capsys):
    lines = (runs.world() / "held_out.jsonl").read_text().splitlines()[:12]
    data = tmp_path / "questions.jsonl"
    data.write_text("".join(json.dumps(json.loads(x) | {"kind": "two_step"}) + "\n" for x in lines))
    found = answer(capsys, "--data", data, "--max-new-tokens", 2)
    assert found["questions"] == 0 and found["intervals"] == {} and "alignment" not in found
