"""One run on several processes: real ones, started by torchrun."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import runs
import torch
from safetensors import safe_open

import checkpoints
import train
from data import features
from errors import PhiSightError
from model.vision import VisionTower, read_vision_spec
from reports.log import read_metrics
from training.evaluating import evaluated
from training.ranks import Ranks, joined
from training.run import prepare_run
from training.start import starting_point

ROOT = Path(__file__).resolve().parent.parent
FIELDS = runs.SHORT | {
    "data_fraction": 1.0,
    "batch_size": 3,
    "max_steps": 6,
    "save_steps": 2,
    "log_steps": 1,
    "evaluate_steps": 3,
    "projector_dropout": 0.1,
}
FEW_TEXT_ONLY = 6  # conversations without a picture among those with one


def torchrun(
    processes: int,
    *arguments: object,
    script: Path | str = "train.py",
) -> subprocess.CompletedProcess:
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        f"--nproc-per-node={processes}",
        "--standalone",
        "--",
        str(script),
        *map(str, arguments),
    ]
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
    )
    try:
        said, errors = process.communicate(timeout=240)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # torchrun's processes too
        raise
    return subprocess.CompletedProcess(command, process.returncode, said, errors)


@pytest.fixture(scope="module")
def fields(tmp_path_factory) -> dict:
    """The run's config; some of its data has no picture, so that a rank's rows may have none."""
    records = json.loads((runs.world() / "train.json").read_text())
    for record in records[: 3 * FEW_TEXT_ONLY : 3]:
        del record["image"]
        for turn in record["conversations"]:
            turn["value"] = turn["value"].replace("<image>\n", "").replace("\n<image>", "")
    data = tmp_path_factory.mktemp("mixed") / "train.json"
    data.write_text(json.dumps(records))
    return FIELDS | {"data": data}


@pytest.fixture(scope="module")
def alone(fields, tmp_path_factory) -> Path:
    """The run on one process."""
    run = tmp_path_factory.mktemp("alone") / "run"
    runs.start(run, **fields)
    return run


def assert_the_same_but_for_rounding(one: Path, other: Path) -> None:
    first, second = (read_metrics(run / "metrics.jsonl") for run in (one, other))
    assert [(r["kind"], r["step"]) for r in first] == [(r["kind"], r["step"]) for r in second]
    for a, b in zip(first, second):
        if a["kind"] == "train":
            assert a["loss"] == pytest.approx(b["loss"], abs=1e-5)
            for key in ("row", "epoch", "lr", "tokens", "supervised_tokens", "padding_share"):
                assert a[key] == b[key]
        elif a["kind"] == "evaluation":
            assert a["validation_loss"] == pytest.approx(b["validation_loss"], abs=1e-5)


TRAINING_WITH_SMALL_SHARDS = """
import functools
import train
from data import features
from errors import run_main

features.SHARD_PICTURES = 8
features.FeatureStore.add = functools.partialmethod(features.FeatureStore.add, batch_size=4)
run_main(train.main)
"""
FILLING = """
import os, signal, sys
from pathlib import Path
from data import features
from errors import run_main
from model.vision import VisionTower, read_vision_spec
from training.ranks import joined

features.SHARD_PICTURES = 4
batches = 0

def main():
    clip, folder, images, victim = sys.argv[1:]
    spec = read_vision_spec(clip)
    tower = VisionTower(spec)

    def extract(pictures):
        global batches
        batches += 1
        if os.environ.get("RANK", "0") == victim and batches == 4:
            os.kill(os.getpid(), signal.SIGKILL)
        return tower(pictures)

    with joined("cpu") as ranks:
        store = features.FeatureStore(folder, spec.key, spec.shape)
        names = sorted(path.name for path in Path(images).iterdir())
        store.add(names, Path(images), lambda: extract, batch_size=2, team=ranks)

if __name__ == "__main__":
    run_main(main)
"""


def features_in(folder: Path) -> dict[str, dict[str, object]]:
    """Shard -> what is in it; the store has one folder. What a process that was ended was still
    writing is no shard."""
    found = {}
    for path in sorted(folder.glob("*-float16/shard-*.safetensors")):
        with safe_open(path, framework="pt") as shard:
            values = {name: shard.get_tensor(name).numpy().tobytes() for name in shard.keys()}
            found[path.name] = values | shard.metadata()
    return found


def as_evaluated_alone(run: Path) -> dict[str, object]:
    """What one process measures of the newest weights of a run."""
    config, options = train.parse(["--resume", f"--run={run}"])
    config, checkpoint = starting_point(config, options, Ranks())
    return evaluated(prepare_run(config, checkpoint, options, Ranks()))


def test_two_processes_do_what_one_does_and_resume_to_the_bit(alone, fields, tmp_path):
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    script = tmp_path / "small_shards.py"
    script.write_text(TRAINING_WITH_SMALL_SHARDS)
    fields = fields | {"features": tmp_path / "two"}
    done = torchrun(2, *runs.flags(whole, **fields), script=script)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "in each of 2 processes" in done.stdout
    assert done.stderr.count("picture features to compute") == 1
    assert len(features_in(tmp_path / "two")) > 2
    assert_the_same_but_for_rounding(alone, whole)
    last = read_metrics(whole / "metrics.jsonl")[-1]
    assert (last["kind"], last["step"]) == ("evaluation", 6)
    figures = as_evaluated_alone(whole)
    assert {name: last[name] for name in figures} == figures  # to the bit
    assert set(figures) == {"validation_loss", "alignment"} and len(figures["alignment"]) == 3
    others = {entry["owner"] for entry in checkpoints.diff(alone, whole).differences}
    assert "lora" in others  # or the comparison compares nothing

    assert torchrun(2, *runs.flags(stopped, **fields), "--stop-at-step=3").returncode == 0
    resumed = torchrun(2, "--resume", f"--run={stopped}")
    assert resumed.returncode == 0, resumed.stdout + resumed.stderr
    found = checkpoints.diff(whole, stopped)
    assert found.identical and found.parted is None, found
    assert found.owners["rng"] == 12  # six of each process


def test_a_run_may_go_on_with_more_or_fewer_processes(alone, fields, tmp_path):
    run = tmp_path / "run"
    runs.start(run, "--stop-at-step=2", **fields)
    more = torchrun(4, "--resume", f"--run={run}", "--stop-at-step=4")
    assert more.returncode == 0, more.stdout + more.stderr
    assert "saved on 1 processes, resumed on 4: same samples" in more.stdout
    assert f"torchrun --nproc-per-node 4 -- train.py --resume --run {run}" in more.stdout
    assert runs.resume(run) == 0
    assert_the_same_but_for_rounding(alone, run)


def test_a_kill_while_four_fill_a_store_loses_a_shard_of_each(tmp_path, monkeypatch):
    script, images = tmp_path / "filling.py", runs.world() / "images"
    script.write_text(FILLING)
    done = torchrun(4, runs.VISION, tmp_path / "killed", images, "2", script=script)
    assert done.returncode != 0
    left = features_in(tmp_path / "killed")

    monkeypatch.setattr(features, "SHARD_PICTURES", 4)
    torch.set_num_threads(1)  # as in the processes
    spec = read_vision_spec(str(runs.VISION))
    names = sorted(path.name for path in images.iterdir())
    for folder in ("whole", "killed"):
        store = features.FeatureStore(tmp_path / folder, spec.key, spec.shape)
        store.add(names, images, lambda: VisionTower(spec), batch_size=2)
    expected = features_in(tmp_path / "whole")
    assert "shard-00002.safetensors" in left and "shard-00006.safetensors" not in left
    assert left.items() <= expected.items() and len(expected) > 8
    assert features_in(tmp_path / "killed") == expected
    assert not list((tmp_path / "killed").rglob("*.partial-*"))


@pytest.mark.parametrize(
    "how, words",
    [
        ("os.kill(os.getpid(), signal.SIGKILL)", "another process of the run is gone"),
        ("raise PhiSightError('step: the disk of this machine is gone; mend it')", "disk of this"),
    ],
)
def test_a_rank_that_dies_brings_the_others_down(how, words, fields, tmp_path):
    script = tmp_path / "dying.py"
    script.write_text(f"""
import os, signal, sys
import train
from errors import PhiSightError, run_main
from training.optimizer import AdamW

step = AdamW.step

def dying_step(self, rate):
    if os.environ["RANK"] == "1" and self.step_count == 2:
        {how}
    step(self, rate)

AdamW.step = dying_step
run_main(train.main)
""")
    clock = time.monotonic()
    done = torchrun(2, *runs.flags(tmp_path / "run", **fields), script=script)
    assert done.returncode != 0 and words in done.stderr
    # Start included; a hang would last until PATIENCE, which is hours.
    assert time.monotonic() - clock < 120
    assert runs.newest_step(tmp_path / "run") == 2


def test_restarts_that_would_wait_for_the_processes_before_them_are_refused(monkeypatch):
    settings = {"WORLD_SIZE": 2, "TORCHELASTIC_USE_AGENT_STORE": True, "MAX_RESTARTS": 3}
    for name, value in settings.items():
        monkeypatch.setenv(name.replace("MAX", "TORCHELASTIC_MAX"), str(value))
    with pytest.raises(PhiSightError, match="TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1"):
        with joined("cpu"):
            pass
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "False")
    monkeypatch.setenv("RANK", "none")  # it goes on to the next thing that is wrong
    with pytest.raises(PhiSightError, match="did not find each other"):
        with joined("cpu"):
            pass


def test_without_torchrun_nothing_is_exchanged():
    ranks, parameter = Ranks(), torch.nn.Parameter(torch.ones(2))
    assert ranks.is_first and ranks.share_of([1, 2, 3]) == [1, 2, 3]
    assert ranks.any_of(True, False) == [True, False] and ranks.sum_numbers(0.1) == [0.1]
    ranks.sum_gradients([parameter])
    assert parameter.grad is None and ranks.from_first(lambda: "x") == "x"


def test_shares_cover_the_rows_once():
    rows = list(range(7))
    for size in (1, 2, 4, 9):
        shares = [Ranks(rank, size).share_of(rows) for rank in range(size)]
        assert sorted(sum(shares, [])) == rows
