"""One run on several machines: agents of torchrun that find each other and start their processes
again, and the script for Slurm, with stand-ins for Slurm's own programs."""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import subprocess
from pathlib import Path

import pytest
import runs

import checkpoints
from errors import PhiSightError
from tools import two_agents
from tools.torture.findings import last_logged

STEPS = 8
SCRIPT = runs.ROOT / "tools/slurm/phisight.sbatch"


@pytest.fixture(scope="module")
def agents(tmp_path_factory) -> tuple[Path, dict]:
    """What the command leaves in its folder, and what it prints: an unbroken run of two agents, and
    one whose rank 0 was killed and started again by its agent."""
    out = tmp_path_factory.mktemp("agents") / "out"
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        code = two_agents.main(
            ["--ways=elastic", "--ranks=0", f"--steps={STEPS}", "--pictures=12", f"--out={out}",
             "--json"]
        )  # fmt: skip
    assert code == 0, printed.getvalue()
    return out, json.loads(printed.getvalue())


def test_agents_start_a_killed_process_again_and_the_run_ends_identical(agents):
    out, printed = agents
    (run,) = printed["runs"]
    assert printed["identical"] == 1 and run["problems"] == []
    assert (run["way"], run["rank"], run["saved"]) == ("elastic", 0, 4) and run["step"] >= 5
    said = (out / "elastic-0.log").read_text()
    assert said.count("resumed at step 4 of 8") == 1, said
    assert "resumed" not in (out / "unbroken.log").read_text()
    found = checkpoints.diff(out / "unbroken", out / "elastic-0")
    assert found.identical and found.owners["rng"] == 12  # six of each process


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--ways=magic"], "--ways magic: is not one of by-hand, elastic"),
        (["--ranks=2"], "--ranks 2: is not one of 0, 1"),
        (["--steps=3"], "--steps 3: must be at least 8"),
    ],
)
def test_flags_that_cannot_be_used_are_refused(flags, words, tmp_path):
    with pytest.raises(PhiSightError, match=words):
        two_agents.main([*flags, f"--out={tmp_path / 'out'}"])
    assert not (tmp_path / "out").exists()


def test_a_folder_of_other_things_is_left_alone(tmp_path):
    (tmp_path / "mine").write_text("")
    with pytest.raises(PhiSightError, match="holds other things"):
        two_agents.main([f"--out={tmp_path}"])
    assert (tmp_path / "mine").exists()


# -- Slurm ----------------------------------------------------------------------------------------

# Each stand-in does what the script needs of the program of its name. srun starts the processes of
# both machines here, and its code is the highest of theirs; a code given in SRUN_CODE is returned
# instead, when its processes would have been signalled if SRUN_WAITS is set.
STAND_INS = {
    "srun": """
echo "$@" >> "$CALLS/srun"
if [ -n "${SRUN_CODE:-}" ]; then
  for _ in $(seq 600); do
    if [ -z "${SRUN_WAITS:-}" ] || [ -e "$CALLS/scancel" ]; then break; fi
    sleep 0.05
  done
  exit "$SRUN_CODE"
fi
while [ "${1#--}" != "$1" ]; do shift; done
pids=()
for rank in 0 1; do
  SLURM_PROCID=$rank SLURM_LOCALID=0 "$@" & pids+=($!)
done
echo "${pids[@]}" > "$CALLS/pids.new" && mv "$CALLS/pids.new" "$CALLS/pids"
code=0
for pid in "${pids[@]}"; do wait "$pid" || code=$((code > $? ? code : $?)); done
exit $code
""",
    "scancel": """
echo "$@" >> "$CALLS/scancel"
[ ! -e "$CALLS/pids" ] || kill -s "${1#--signal=}" $(cat "$CALLS/pids")
""",
    "scontrol": """
[ "$1 $2" = "show hostnames" ] && { printf '127.0.0.1\\n127.0.0.2\\n'; exit; }
echo "$@" >> "$CALLS/scontrol"
""",
}


class Slurm:
    """Starts the script as Slurm would, on two machines that are this one."""

    def __init__(self, folder: Path) -> None:
        self.calls, programs = folder / "calls", folder / "programs"
        self.calls.mkdir()
        programs.mkdir()
        for name, text in STAND_INS.items():
            (programs / name).write_text(f"#!/usr/bin/env bash\n{text}")
            (programs / name).chmod(0o755)
        self.environment = runs.environment() | {
            "PATH": f"{programs}:{os.environ['PATH']}",
            "CALLS": str(self.calls),
            "SLURM_JOB_ID": str(41_000 + os.getpid() % 1000),  # from which the script has a port
            "SLURM_JOB_NODELIST": "machine[1-2]",
            "SLURM_NTASKS": "2",
            "SLURM_CPUS_PER_TASK": "1",
        }

    def start(self, *arguments: str, **more: str) -> subprocess.Popen:
        for path in self.calls.iterdir():
            path.unlink()
        return subprocess.Popen(
            ["bash", str(SCRIPT), *arguments],
            cwd=runs.ROOT,
            env=self.environment | more,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def called(self, name: str) -> str:
        path = self.calls / name
        return path.read_text() if path.exists() else ""


@pytest.fixture
def slurm(tmp_path) -> Slurm:
    return Slurm(tmp_path)


def finish(job: subprocess.Popen) -> tuple[int, str]:
    """The exit code of a job and what it has said."""
    said, _ = job.communicate(timeout=240)
    return job.returncode, said


def test_the_script_is_bash_and_its_settings_are_what_its_page_tells_of():
    assert subprocess.run(["bash", "-n", SCRIPT], check=False).returncode == 0
    settings = [line for line in SCRIPT.read_text().splitlines() if line.startswith("#SBATCH")]
    page = (runs.ROOT / "docs/cluster.md").read_text()
    for setting in ("--signal=B:USR1@300", "--requeue"):
        assert f"#SBATCH {setting}" in settings and f"`{setting}`" in page


def test_the_script_outside_a_job_says_how_it_is_started():
    environment = {name: value for name, value in os.environ.items() if "SLURM" not in name}
    done = subprocess.run(
        ["bash", SCRIPT], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert "start this script by sbatch" in done.stderr and "docs/cluster.md" in done.stderr


def test_a_job_whose_time_is_over_saves_comes_back_and_ends_identical(agents, slurm, tmp_path):
    out, _ = agents
    run = tmp_path / "run"
    flags = two_agents.flags(out, run, STEPS)
    job = slurm.start(*flags)
    runs.wait_until(lambda: last_logged(run) >= 3, job)
    job.send_signal(signal.SIGUSR1)
    code, said = finish(job)
    assert code == 0 and "--resume" in said, said
    assert slurm.called("scontrol") == f"requeue {slurm.environment['SLURM_JOB_ID']}\n"
    assert 3 <= runs.newest_step(run) < STEPS

    code, said = finish(slurm.start(*flags))
    assert code == 0 and "resumed at step" in said, said
    assert slurm.called("scontrol") == "" and slurm.called("scancel") == ""
    found = checkpoints.diff(out / "unbroken", run)
    assert found.identical and found.parted is None, found


@pytest.mark.parametrize(
    "signalled, code, comes_back",
    [
        (True, 0, True),
        (True, 143, True),  # before the first step
        (True, 2, False),  # an error, which would come again
        (True, 137, False),
        (False, 0, False),  # finished
        (False, 2, False),
    ],
)
def test_a_job_comes_back_only_where_that_helps(signalled, code, comes_back, slurm):
    job = slurm.start(SRUN_CODE=str(code), SRUN_WAITS="1" * signalled)
    if signalled:
        runs.wait_until(lambda: slurm.called("srun") != "", job)
        job.send_signal(signal.SIGUSR1)
    ended, said = finish(job)
    assert ended == code, said
    assert bool(slurm.called("scontrol")) == comes_back
    assert slurm.called("scancel").startswith("--signal=TERM ") == signalled
