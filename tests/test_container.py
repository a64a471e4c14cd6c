"""The Dockerfile: what a linter says of it, that it does what `make demo` does, and what is in the
image. Docker itself is not needed; `tools/try_container.py` does the steps for real."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import runs

from errors import PhiSightError
from tools.try_container import (
    Step,
    assignments,
    context_files,
    copy_into,
    is_ignored,
    main,
    read_steps,
)

DOCKERFILE = runs.ROOT / "Dockerfile"
STEPS = read_steps(DOCKERFILE.read_text())


def of(instruction: str) -> list[Step]:
    return [step for step in STEPS if step.instruction == instruction]


def linted(path: Path) -> subprocess.CompletedProcess:
    command = [Path(sys.executable).with_name("hadolint"), "--no-color", path]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_a_linter_finds_nothing_in_the_dockerfile(tmp_path):
    done = linted(DOCKERFILE)
    assert done.returncode == 0, done.stdout
    worse = tmp_path / "Dockerfile"
    worse.write_text(re.sub("FROM .*", "FROM python:latest", DOCKERFILE.read_text()))
    assert "DL3007" in linted(worse).stdout, "or it is not asked"


def test_the_base_image_is_pinned_and_has_a_python_that_the_project_takes():
    (base,) = of("FROM")
    version = re.fullmatch(r"python:(\d+)\.(\d+)\.\d+-slim-[a-z]+", base.text)
    assert version, base.text
    needed = tomllib.loads((runs.ROOT / "pyproject.toml").read_text())["project"]["requires-python"]
    major, minor = needed.removeprefix(">=").split(".")
    assert (int(version[1]), int(version[2])) >= (int(major), int(minor))


def test_it_does_what_make_demo_does(tmp_path):
    """It installs by the Makefile's own rule, from the files copied until then, and its command is
    the last one of the rule."""
    dry = ["make", "--dry-run", "--always-make"]
    demo = subprocess.run([*dry, "demo"], cwd=runs.ROOT, capture_output=True, text=True, check=True)
    (command,) = of("CMD")
    assert demo.stdout.splitlines()[-1] == ".venv/bin/" + " ".join(command.words)
    assert "/phisight/.venv/bin" in assignments(of("ENV")[0])["PATH"]

    install = next(step for step in of("RUN") if "make " in step.text and "apt" not in step.text)
    for step in STEPS[: STEPS.index(install)]:
        if step.instruction == "COPY":
            copy_into(tmp_path, runs.ROOT, step.words)
    target = install.text.rpartition("make ")[2]
    made = subprocess.run([*dry, target], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert made.returncode == 0, made.stderr
    assert made.stdout and made.stdout in demo.stdout
    assert len(list(tmp_path.iterdir())) == 2, "other files would make the layer anew"


@pytest.mark.parametrize(
    "torch, code, index",
    [("cpu", 0, "https://download.pytorch.org/whl/cpu"), ("cuda", 0, ""), ("rocm", 2, "")],
)
def test_an_argument_chooses_the_wheels_of_torch(torch, code, index, tmp_path):
    (tmp_path / "make").write_text('#!/bin/sh\necho "$1 $PIP_EXTRA_INDEX_URL"\n')
    (tmp_path / "make").chmod(0o755)
    install = next(step for step in of("RUN") if "PIP_EXTRA_INDEX_URL" in step.text)
    done = subprocess.run(
        ["/bin/sh", "-c", install.text],
        env={"PATH": f"{tmp_path}:/usr/bin:/bin", "TORCH": torch},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == code
    assert done.stdout == (f".venv/demo.stamp {index}\n" if code == 0 else "")
    assert {"TORCH": "cpu"} in [assignments(step) for step in of("ARG")]


def test_the_image_has_all_that_the_commands_need_and_nothing_that_was_made_here(tmp_path):
    copy_into(tmp_path, runs.ROOT, [".", "."])
    commands = "tools.demo, train, infer, evaluate, export, serve, app, sweep, checkpoints"
    done = subprocess.run(
        [sys.executable, "-c", f"import {commands}; print(train.__file__)"],
        cwd=tmp_path,
        env=runs.environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.strip() == str(tmp_path / "train.py"), done.stderr
    assert (tmp_path / "assets/tiny/phi3").is_dir() and (tmp_path / "web/static").is_dir()
    top = {path.name for path in tmp_path.iterdir()}
    assert not top & {".git", ".venv", "runs", "cache", "tests", "docs"}
    ignored = (runs.ROOT / ".gitignore").read_text().split()
    patterns = (runs.ROOT / ".dockerignore").read_text().splitlines()
    for name in ignored:
        assert {name.rstrip("/"), "**/" + name.rstrip("/")} & set(patterns), name


def test_what_is_exposed_are_the_ports_of_the_servers():
    (ports,) = of("EXPOSE")
    for command, port in zip(("app.py", "serve.py"), ports.words, strict=True):
        assert f"add_door_flags(parser, port={port})" in (runs.ROOT / command).read_text()


@pytest.mark.parametrize(
    "path, ignored",
    [
        ("docs/app.md", True),
        ("docs/app/chat.png", True),
        ("data/docs/page.md", False),
        ("data/__pycache__/x.pyc", True),
        ("a.pyc", True),
        ("cache.py", False),
        ("cache/world/train.json", True),
    ],
)
def test_what_dockerignore_leaves_out(path, ignored):
    assert is_ignored(path, ["docs", "cache", "**/__pycache__", "**/*.pyc"]) is ignored


def test_steps_are_read_over_several_lines_and_comments():
    text = '# a\nRUN one \\\n  # why\n && two\nCMD ["a", "b c"]\n\nCOPY --chown=1:1 x y ./\n'
    steps = read_steps(text)
    assert [step.instruction for step in steps] == ["RUN", "CMD", "COPY"]
    assert steps[0].text == "one && two"
    assert steps[1].words == ["a", "b c"] and steps[2].words == ["x", "y", "./"]
    with pytest.raises(PhiSightError, match="here-document"):
        read_steps("RUN <<END\nls\nEND\n")


def test_an_argument_that_the_dockerfile_does_not_have_is_refused():
    with pytest.raises(PhiSightError, match="--build-arg TORHC: the Dockerfile has no such ARG"):
        main(["--build-arg", "TORHC=cpu"])


def test_context_is_what_git_knows():
    files = context_files(runs.ROOT)
    assert {"train.py", "Makefile", "requirements.txt", "LICENSE"} <= set(files)
    assert not [name for name in files if name.startswith(("runs/", "cache/", ".venv", "tests/"))]


def test_the_page_names_the_volumes_and_arguments_of_the_dockerfile():
    page = (runs.ROOT / "docs/containers.md").read_text()
    assert set(re.findall(r"-v phisight-\w+:(\S+)", page)) == set(of("VOLUME")[0].words)
    arguments = {name for step in of("ARG") for name in assignments(step)}
    assert set(re.findall(r"--build-arg[ =](\w+)=", page)) == arguments
