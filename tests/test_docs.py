"""The commands in the documentation work as they are written.

Every command of a fenced `sh` or `console` block is run in a folder that looks like the project's
after `make demo`, with a tiny run in place of the demo's, and trainings are cut to a few steps; or
it stands in NOT_RUN with the reason, and then its flags are read by the command's own parser.
"""

from __future__ import annotations

import argparse
import io
import os
import re
import runpy
import shlex
import shutil
import signal
import subprocess
import sys
import urllib.request
import wave
from collections.abc import Iterator
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path

import pytest
import runs

import paths

ROOT = runs.ROOT
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *ROOT.glob("docs/*.md")])
COMMANDS = ("sh", "console")  # what stands in a block: commands, or commands after "$ " and output
OUTPUT = ("text", "json", "jsonl", "toml")  # blocks without commands

WHOLE_SET_UP = "sets up and runs everything"
MINUTES = "takes minutes"
FULL_SIZE = "needs a download, a GPU or files of full size"
EXPORTS = "tests/test_export.py runs it on a run that was trained"
NEEDS_LLAMA = "needs llama-cpp-python; tests/test_export_gguf.py runs it where that is installed"
DOCKER = "needs Docker; tests/test_container.py and tools/try_container.py do without"
CLUSTER = "tests/test_cluster.py does it on one machine"
HUB = "speaks with the hub; tests/test_hub_runs.py runs it against one on this machine"
FETCH = "fetches gigabytes; tests/test_fetch.py fetches from a server on this machine"
IN_VOLUMES = (
    "docker run --rm --init -v phisight-runs:/phisight/runs -v phisight-cache:/phisight/cache"
)
OWN = "mine.json and pictures stand for the reader's own; tests/test_forms.py trains on such"
NOT_RUN = {
    "python train.py --run runs/of_the_hub --preset phi35 --data hf:owner/name": "asks the hub:"
    " tests/test_hub_sets.py trains so from a hub of its own",
    "python -m data.preflight --data mine.json --images pictures --tokenizer assets/tiny/phi3": OWN,
    "python train.py --run runs/both --data mine.json --images pictures --data captioned:0.5"
    " --images captioned": OWN,
    "make demo": WHOLE_SET_UP,
    "make test": WHOLE_SET_UP,
    "make lint": WHOLE_SET_UP,
    "make bench": WHOLE_SET_UP,
    "python infer.py --batch /dev/stdin --out /dev/stdout < questions.jsonl": "reads the process's"
    " own input: tests/test_batch.py runs it as a process",
    "python -m tools.demo": "trains for minutes; it is `make demo`",
    "python -m pytest tests/test_sampler.py": "is a part of this suite",
    "python -m benchmarks.page": MINUTES,
    "python -m benchmarks.page --json --repeats 9": MINUTES,
    "python -m pytest tests/test_texts.py tests/test_structure.py": "is a part of this suite",
    "python -m pytest tests/test_machines.py tests/test_devices.py": "is a part of this suite",
    "python -m pytest tests/test_app_batch.py tests/test_batch_routes.py": "is in this suite",
    "python -m pytest tests/test_app_views.py": "is a part of this suite",
    "PHISIGHT_APP_RUN=runs/tiny PHISIGHT_APP_PICTURES=docs/app"
    " python -m pytest tests/test_app_views.py": "writes docs/app",
    "PHISIGHT_REPORT=runs/report.html PHISIGHT_REPORT_PICTURE=docs/evaluation.png"
    " python -m pytest tests/test_report_page.py -k test_its_picture": "writes docs/evaluation.png",
    "python train.py --preset phi35 --data llava_instruct_150k.json --images train2017": FULL_SIZE,
    "python train.py --preset phi35 --base Qwen/Qwen3-0.6B --vision"
    " google/siglip2-base-patch16-224 --projector resampler --run runs/qwen3-siglip2"
    " --data llava_instruct_150k.json --images train2017": FULL_SIZE,
    "python -m data.preflight --data llava_instruct_150k.json --images train2017"
    " --tokenizer PHI35": FULL_SIZE,
    "python -m data.fetch llava-instruct-150k --images train2017 --fraction 0.05": FETCH,
    "python -m data.fetch llava-instruct-150k --images train2017": FETCH,
    "cd train2017 && sha256sum --check --quiet SHA256SUMS": FETCH,
    "python train.py --preset phi35 --data llava_instruct_150k.json --images train2017"
    " --data-fraction 0.05": FULL_SIZE,
    "torchrun --nproc-per-node 2 -- train.py": "tests/test_ranks.py trains on several processes",
    "python train.py --run runs/whole --max-steps 60 --save-steps 10 --log-steps 10"
    " --evaluate-steps 0": "tests/test_torture.py kills runs and compares them",
    "timeout -s KILL 25 python train.py --run runs/killed --max-steps 60 --save-steps 10"
    " --log-steps 10 --evaluate-steps 0": "tests/test_torture.py kills runs and compares them",
    "python train.py --run runs/killed --resume": "goes on from the one before",
    "python checkpoints.py diff runs/whole runs/killed": "goes on from the one before",
    "python train.py --run runs/b --resume --allow-changes --lora-dropout 0.1": "its runs were"
    " made to differ; tests/test_train.py resumes with changes",
    "python checkpoints.py diff runs/a runs/b": "goes on from the one before",
    "python train.py --status runs/watched": "shows a run that was training:"
    " tests/test_status.py has such ones",
    "python tools/torture_resume.py --kills 40": MINUTES,
    "python export.py --merge --out runs/merged": EXPORTS,
    "python export.py --llava runs/llava": EXPORTS,
    "python export.py --llava runs/apart --unmerged": "tests/test_pipelines.py runs it",
    "python export.py --llava runs/llava-that-sees --require-alignment 40": "the run of these tests"
    " has learnt too little; tests/test_alignment.py refuses one",
    "python export.py --requantize --out runs/four-bit": EXPORTS,
    "python export.py --requantize --run runs/four-bits --out runs/four-bits-alone": EXPORTS,
    "python export.py --prune 0.1 --out runs/pruned": EXPORTS,
    "python export.py --gguf runs/gguf": NEEDS_LLAMA,
    "python export.py --gguf runs/gguf --quantize q8_0"
    " --llama-python ../llama/bin/python": NEEDS_LLAMA,
    "python -m tools.llama_cpp ../llama": MINUTES,
    "python export.py --space runs/space": "tests/test_space.py runs it on a run that was trained",
    "hf upload --repo-type space owner/name runs/space": "sends files to the hub",
    "python -m tools.try_space runs/space": MINUTES,
    "python export.py --import-seed seed --out runs/seed": EXPORTS,
    "hf auth login": "asks for a token",
    "python export.py --push owner/name --yes": HUB,
    'python infer.py --run hf:owner/name --image picture.png --prompt "Describe the picture."': HUB,
    "python checkpoints.py verify hf:owner/name@v1": HUB,
    "python train.py --run runs/next --start-from hf:owner/name": HUB,
    "PHISIGHT_API_KEY=secret python serve.py --host 0.0.0.0": "other machines could reach it;"
    " tests/test_serve_process.py starts it",
    "python serve.py --app": "tests/test_serve_process.py starts it",
    "python -m tools.build_tiny": MINUTES,
    "python -m tools.build_tiny --only whisper": MINUTES,
    "python -m tools.build_whisper --measure": MINUTES,
    "python -m benchmarks.vs_peft_trainer": MINUTES,
    "python -m benchmarks.vs_peft_trainer --parity": "tests/test_trainer_parity.py runs it",
    "python -m benchmarks.vs_peft_trainer --shapes tiny --repeats 3": MINUTES,
    "python -m benchmarks.decode --quick --json": "takes a minute: tests/test_decode_benchmark.py"
    " makes its object at a small size",
    "python -m benchmarks.decode --llama-python ../llama/bin/python --smollm2 ../real": MINUTES,
    "python -m venv ../llama": "compiles llama.cpp in the next line",
    "../llama/bin/pip install llama-cpp-python gguf": "compiles llama.cpp, which takes minutes",
    "python -m benchmarks.members": MINUTES,
    "python -m benchmarks.members --base qwen3 --encoder siglip": "tests/test_members.py does some",
    "python -m benchmarks.cold_start": "measures; tests/test_commands.py holds what is imported",
    "python -m benchmarks.clip --vision FOLDER": "FOLDER stands for a CLIP's",
    "python -m benchmarks.train_step --layers 2": MINUTES,
    "python -m tools.same_answers": MINUTES,
    "python -m benchmarks.assistant": MINUTES,
    "python -m benchmarks.serve_load": MINUTES,
    "python -m benchmarks.mixed_load": MINUTES,
    "python -m benchmarks.full_shape": MINUTES,
    "python -m benchmarks.golden": "tests/test_golden.py runs it",
    "python -m benchmarks.golden --update": "writes benchmarks/golden.json",
    "python benchmarks/run.py --quick": MINUTES,
    "python benchmarks/run.py --only decode,first_token --turns 40": MINUTES,
    "python benchmarks/run.py --json /tmp/figures.json": MINUTES,
    "python benchmarks/run.py --compare /tmp/figures.json": "reads what the one before wrote;"
    " tests/test_benchmark_suite.py compares",
    "python benchmarks/run.py --update --repeat 3": MINUTES,
    "python -m benchmarks.ears": MINUTES,
    "python -m benchmarks.noise": MINUTES,
    "python -m benchmarks.design_choices --picture docs/design_choices.png": "takes half an hour:"
    " tests/test_design_choices.py runs it small",
    "torchrun --nnodes 2 --nproc-per-node 1 --rdzv-backend c10d --rdzv-endpoint first-machine:29500"
    " --rdzv-id mine --max-restarts 3 --shutdown-timeout 300 -- train.py --run runs/mine"
    " --resume-if-any": CLUSTER,
    "export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1": CLUSTER,
    "sbatch tools/slurm/phisight.sbatch --run runs/mine --preset phi35"
    " --data llava_instruct_150k.json --images train2017": CLUSTER,
    "python -m tools.two_agents": "tests/test_cluster.py runs it short",
    "docker build --tag phisight .": DOCKER,
    "docker run --rm --init phisight": DOCKER,
    f"{IN_VOLUMES} phisight": DOCKER,
    f"{IN_VOLUMES} phisight python train.py --status runs/tiny": DOCKER,
    f"{IN_VOLUMES} -p 127.0.0.1:7860:7860 -e PHISIGHT_API_KEY=secret phisight python app.py"
    " --host 0.0.0.0": DOCKER,
    f"{IN_VOLUMES} -p 127.0.0.1:8000:8000 -e PHISIGHT_API_KEY=secret phisight python serve.py"
    " --host 0.0.0.0": DOCKER,
    "docker build --build-arg TORCH=cuda --tag phisight:cuda .": DOCKER,
    "docker run --rm --init --gpus all phisight:cuda": DOCKER,
    "docker build --build-arg PACKAGES=espeak-ng --tag phisight:spoken .": DOCKER,
    "python -m tools.try_container --build-arg=TORCH=cuda": MINUTES,
    "python sweep.py sweep.toml --list": "tests/test_sweep_plan.py reads the page's own file",
    "python sweep.py sweep.toml --jobs 2 --evaluate": "tests/test_sweep.py runs one as processes",
}
SERVERS = ("app.py", "serve.py")
STEPS = 4  # of a training of a page, at most


# A module that another test has imported is run again under the name __main__.
pytestmark = pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")


@dataclass(frozen=True)
class Command:
    """One command line of a page."""

    page: Path
    line: int
    text: str

    @property
    def words(self) -> list[str]:
        return shlex.split(self.text)

    def python(self) -> list[str] | None:
        """What stands after `python`, such as ["-m", "data.world", "--hard"]; None for other
        programs. Settings of the environment, `timeout` and `torchrun` are left out."""
        words = [word for word in self.words if not re.fullmatch(r"[A-Z_]+=.*", word)]
        if words[0] == "torchrun":
            return words[words.index("--") + 1 :]
        if words[0] == "timeout":
            words = words[words.index("python") :]
        if "<" in words:
            words = words[: words.index("<")]
        return words[1:] if words[0] == "python" else None


def blocks(page: Path) -> Iterator[tuple[int, str, list[str]]]:
    """Number of the first line, language and lines of every fenced block."""
    language, start, lines = None, 0, []
    for number, line in enumerate(page.read_text().splitlines(), 1):
        if not line.startswith("```"):
            lines.append(line)
        elif language is None:
            language, start, lines = line.removeprefix("```").strip(), number + 1, []
        else:
            yield start, language, lines
            language = None
    assert language is None, f"{page}: a block without its end"


def commands_of(page: Path) -> list[Command]:
    found = []
    for start, language, lines in blocks(page):
        for number, line in enumerate(lines, start):
            if language == "sh":
                text = line
            elif language == "console" and line.startswith("$ "):
                text = line.removeprefix("$ ")
            else:
                continue
            if text := re.sub(r"(^|\s+)#.*", "", text).strip():
                found.append(Command(page, number, text))
    return found


ALL = [command for page in PAGES for command in commands_of(page)]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_block_says_what_it_is(page):
    assert {language for _, language, _ in blocks(page)} <= {*COMMANDS, *OUTPUT}


def test_every_command_that_is_not_run_is_in_the_pages():
    assert set(NOT_RUN) <= {command.text for command in ALL}


# -- the folder that commands are run in ----------------------------------------------------------


@pytest.fixture(scope="module")
def material(tmp_path_factory) -> Path:
    """What the pages name beside the runs: assets, a small world, questions, a recording."""
    folder = tmp_path_factory.mktemp("project")
    for name in ("assets", "recipes", "tests", "train.py"):
        (folder / name).symlink_to(ROOT / name)
    (folder / "cache").mkdir()
    shutil.copytree(runs.world(), folder / "cache/world")
    (folder / "questions.jsonl").write_text('{"prompt": "What is a star?"}\n')
    recording = runs.finished_run().parent / "question.wav"
    speak(recording)
    (folder / "question.wav").symlink_to(recording)
    return folder


def speak(path: Path) -> None:
    """A question spoken by espeak-ng, where it is installed."""
    if shutil.which("espeak-ng"):
        text = "What is the colour of the star?"
        subprocess.run(["espeak-ng", "-v", "en-us", "-w", str(path), text], check=True, timeout=60)
        return
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(16000)
        file.writeframes(bytes(32000))


@pytest.fixture
def project(material, monkeypatch) -> Path:
    """`material` as the current folder, with the finished run as runs/tiny and no other run."""
    shutil.rmtree(material / "runs", ignore_errors=True)
    shutil.copytree(runs.finished_run(), material / "runs/tiny")
    monkeypatch.chdir(material)
    monkeypatch.setattr(paths, "PROJECT", material)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(os, "cpu_count", lambda: 1)  # one thread, as in the suite's other runs
    return material


def run(python: list[str]) -> int:
    """`python ...` in this process: its exit code."""
    target, arguments = python[0], python[1:]
    if target == "-m":
        target, arguments = arguments[0], arguments[1:]
    sys.argv = [target, *arguments]
    with pytest.raises(SystemExit) as ended:
        if target.endswith(".py"):
            runpy.run_path(str(ROOT / target), run_name="__main__")
        else:
            runpy.run_module(target, run_name="__main__")
    return ended.value.code or 0


def shortened(words: list[str]) -> list[str]:
    """A training of a page, as it is written but for its length: a command that works for
    STEPS steps works for hundreds."""
    if words[0] != "train.py" or {"--resume", "--status", "--config"} & set(words):
        return words
    if "--max-steps" not in words:
        return [*words, f"--max-steps={STEPS}"]
    at = words.index("--max-steps") + 1
    return [*words[:at], str(min(int(words[at]), STEPS)), *words[at + 1 :]]


def run_command(command: Command) -> None:
    words = command.python()
    assert words, f"{command.page.name}:{command.line}: {command.text}: run it, or say why not"
    printed = io.StringIO()
    file = None
    if ">" in words:
        words, file = words[: words.index(">")], words[words.index(">") + 1]
    with redirect_stdout(printed):
        code = run(shortened(words))
    if file:
        Path(file).write_text(printed.getvalue())
    where = f"{command.page.name}:{command.line}: {command.text}"
    assert code == 0, f"{where}: exit code {code}: {printed.getvalue()}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_commands_of_a_page_work_in_their_order(page, project, monkeypatch, capfd):
    for name, kept in (("argv", sys.argv), ("stdin", io.StringIO("What is a star?\n"))):
        monkeypatch.setattr(sys, name, kept)
    for command in commands_of(page):
        if command.text in NOT_RUN or needs_espeak(command):
            continue
        if (command.python() or [""])[0] in SERVERS:
            serve_and_stop(command, project)
        else:
            run_command(command)
            capfd.readouterr()


def needs_espeak(command: Command) -> bool:
    return "--audio" in command.words and shutil.which("espeak-ng") is None


def serve_and_stop(command: Command, folder: Path) -> None:
    """On a free port, until it answers; then Ctrl-C."""
    script, *flags = command.python() or []
    here = (
        "import paths, runpy, sys; paths.PROJECT = paths.Path.cwd(); del sys.argv[0];"
        " runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", here, str(ROOT / script), *flags, "--port", "0"],
        cwd=folder,
        env=runs.environment() | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        announced = next((line for line in process.stdout if "http://" in line), "")
        address = re.search(r"http://127\.0\.0\.1:\d+", announced)
        assert address, f"{command.text} ended: {process.wait(timeout=60)}"
        page = "/health" if script == "serve.py" else "/"
        with urllib.request.urlopen(address[0] + page, timeout=60) as response:
            assert response.status == 200
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=60) == 0, process.communicate()
    finally:
        process.kill()
        process.communicate()


# -- commands that are not run --------------------------------------------------------------------


class Parsed(BaseException):
    """The command's own parser took the flags."""


PARSED = [command for command in ALL if command.text in NOT_RUN and command.python()]


@pytest.mark.parametrize("command", PARSED, ids=lambda command: command.text)
def test_the_flags_of_a_command_that_is_not_run_are_known(command, project, monkeypatch):
    words = command.python()
    if words[:2] == ["-m", "pytest"]:
        assert all((ROOT / word).is_file() for word in words if word.startswith("tests/"))
        return
    if words == ["-m", "tools.demo"]:
        assert (ROOT / "tools/demo.py").is_file()  # it takes no flags
        return
    whole = argparse.ArgumentParser.parse_args

    def parse_args(self, *arguments, **settings):
        whole(self, *arguments, **settings)
        raise Parsed

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_args)
    monkeypatch.setattr(sys, "argv", sys.argv)
    with pytest.raises(Parsed):
        run(words)


def test_make_knows_the_targets_of_the_pages():
    targets = [command.words[1] for command in ALL if command.words[0] == "make"]
    assert targets
    done = subprocess.run(["make", "-n", *targets], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# -- the path that make sets ----------------------------------------------------------------------


def test_a_script_in_a_folder_finds_the_rooms_of_its_own_copy(tmp_path):
    """`make` puts the project's folder on the path, relative to .venv: a second copy that links to
    the same .venv, as a git worktree may, imports its own files."""
    first, second = tmp_path / "first", tmp_path / "second"
    for folder in (first, second):
        (folder / "tools").mkdir(parents=True)
        shutil.copy(ROOT / "Makefile", folder)
        (folder / "checkpoints.py").write_text("")
        (folder / "tools/script.py").write_text("import checkpoints\nprint(checkpoints.__file__)\n")
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    created = [sys.executable, "-m", "venv", "--without-pip", str(first / ".venv")]
    subprocess.run(created, check=True, timeout=120)
    (second / ".venv").symlink_to(first / ".venv")
    subprocess.run(
        ["make", ".venv/path.stamp"], cwd=first, check=True, env=environment, capture_output=True
    )
    for folder in (first, second):
        printed = subprocess.run(
            [folder / ".venv/bin/python", folder / "tools/script.py"],
            cwd=tmp_path,
            env=environment,
            check=True,
            capture_output=True,
            text=True,
        ).stdout
        assert printed.strip() == str(folder / "checkpoints.py")


# -- the page of faults ---------------------------------------------------------------------------


def named_tests() -> list[tuple[str, str]]:
    """(file, name of a test or "") of all that docs/faults.md names, in its short form."""
    named, file = [], ""
    for line in (ROOT / "docs/faults.md").read_text().splitlines():
        for own, test in re.findall(r"`(test_\w+\.py)?(?:::(test_\w+))?`", line):
            file = own or file
            if own or test:
                named.append((file, test))
    return named


def test_the_tests_that_the_page_of_faults_names_are_there():
    assert len(named_tests()) > 50
    for file, test in named_tests():
        assert f"def {test}" in (ROOT / "tests" / file).read_text(), (file, test)
