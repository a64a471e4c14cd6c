"""Try the Dockerfile without Docker: its steps, in their order, in a temporary folder.

    python -m tools.try_container [--build-arg=TORCH=cuda] [-- COMMAND ...]

The build context is what git knows, less .dockerignore. From USER on, every COPY, ENV, WORKDIR and
RUN is done with the Python of this machine, in a folder that stands for the image's; then the
command runs there, CMD's or the one given. What stands before USER is root's: it is printed, and
not done. Takes minutes, most of them pip's.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath

import config as configs
import paths
from errors import PhiSightError, run_main

FOLDER = "/phisight"  # where the image has the project


@dataclass(frozen=True)
class Step:
    """One instruction of a Dockerfile, such as RUN, and what stands behind it."""

    instruction: str
    text: str

    @property
    def words(self) -> list[str]:
        """Of the JSON form, or of the plain one without its flags."""
        if self.text.startswith("["):
            return json.loads(self.text)
        return [word for word in self.text.split() if not word.startswith("--")]


def read_steps(text: str) -> list[Step]:
    """The instructions of a Dockerfile in their order.

    Raises:
        PhiSightError: a here-document, which this does not read.
    """
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    steps = []
    for whole in "\n".join(lines).replace("\\\n", " ").splitlines():
        instruction, _, rest = whole.strip().partition(" ")
        if "<<" in rest:
            raise PhiSightError(f"{instruction} {rest}: is a here-document; write it in lines")
        if instruction:
            steps.append(Step(instruction.upper(), " ".join(rest.split())))
    return steps


def is_ignored(path: str, patterns: Sequence[str]) -> bool:
    """Whether .dockerignore leaves a file out: it, or a folder that it is in, has a pattern's
    name; `**/` before a name stands for any folder."""
    one = PurePosixPath(path)
    for candidate in (one, *one.parents[:-1]):
        for pattern in patterns:
            if pattern.startswith("**/"):
                if fnmatchcase(candidate.name, pattern.removeprefix("**/")):
                    return True
            elif len(PurePosixPath(pattern).parts) == len(candidate.parts) and fnmatchcase(
                str(candidate), pattern
            ):
                return True
    return False


def context_files(project: Path) -> list[str]:
    """What `COPY . .` has of the project: the files that git knows or would take, less those of
    .dockerignore."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"],
        cwd=project,
        capture_output=True,
        text=True,
        check=False,
    )
    if listed.returncode:
        raise PhiSightError(f"{project}: is not a git checkout, whose files are the build context")
    lines = (project / ".dockerignore").read_text(encoding="utf-8").splitlines()
    patterns = [line for line in lines if line and not line.startswith("#")]
    return sorted(
        name
        for name in set(listed.stdout.split("\0"))
        if name and (project / name).is_file() and not is_ignored(name, patterns)
    )


def copy_into(folder: Path, project: Path, words: Sequence[str]) -> None:
    """`COPY words[:-1] words[-1]`, for files of the top level and for the whole context."""
    target, known = folder / words[-1], context_files(project)
    for source in words[:-1]:
        names = known if source == "." else [source]
        if not set(names) <= set(known):
            raise PhiSightError(f"COPY {source}: is not in the build context; see .dockerignore")
        for name in names:
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(project / name, target / name)


def assignments(step: Step) -> dict[str, str]:
    """NAME=VALUE of an ENV or ARG; an ARG without a value has none."""
    found = {}
    for word in step.text.split():
        name, _, value = word.partition("=")
        found[name] = value.strip('"')
    return found


class Build:
    """The state of a build without Docker: a folder for the image's, and its environment."""

    def __init__(self, folder: Path, project: Path, arguments: dict[str, str]) -> None:
        self.folder, self.project, self.arguments = folder, project, dict(arguments)
        self.environment = dict(os.environ)
        self.is_root, self.command = True, list[str]()

    def here(self, text: str) -> str:
        """A text of the Dockerfile with the folder that stands for the image's."""
        return text.replace(FOLDER, str(self.folder))

    def take(self, step: Step) -> None:
        """Do one step, or tell that it is root's. Raises PhiSightError where it fails."""
        if step.instruction == "ARG":
            self.arguments = assignments(step) | self.arguments
        elif step.instruction == "USER":
            self.is_root = False
        elif step.instruction == "ENV":
            for name, value in assignments(step).items():
                value = self.here(value).replace(f"${name}", self.environment.get(name, ""))
                self.environment[name] = value
        elif step.instruction == "COPY":
            copy_into(self.folder, self.project, step.words)
        elif step.instruction == "CMD":
            self.command = step.words
        elif step.instruction == "RUN" and not self.is_root:
            self.run(["sh", "-c", self.here(step.text)], step.text)
        elif step.instruction == "RUN":
            print(f"          not done, as it is root's: RUN {step.text}", flush=True)

    def run(self, command: Sequence[str], told_as: str) -> None:
        """A process in the folder. Raises PhiSightError where it fails."""
        environment = self.environment | self.arguments
        program = shutil.which(command[0], path=environment["PATH"])
        done = subprocess.run(
            [program or command[0], *command[1:]], cwd=self.folder, env=environment, check=False
        )
        if done.returncode:
            raise PhiSightError(f"{told_as}: ended with code {done.returncode}; see above")


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = configs.Parser(prog="try_container.py", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--build-arg", action="append", default=[], metavar="NAME=VALUE", help="as docker build has"
    )
    parser.add_argument("command", nargs="*", help="instead of the Dockerfile's CMD, after --")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Exit code 0; a step or command that fails is an error."""
    options = parse(arguments)
    given = dict(text.partition("=")[::2] for text in options.build_arg)
    steps = read_steps((paths.PROJECT / "Dockerfile").read_text(encoding="utf-8"))
    known = {name for s in steps if s.instruction == "ARG" for name in assignments(s)}
    if unknown := sorted(set(given) - known):
        raise PhiSightError(f"--build-arg {unknown[0]}: the Dockerfile has no such ARG; leave it")
    with tempfile.TemporaryDirectory(prefix="phisight-container-") as temporary:
        build, began = Build(Path(temporary), paths.PROJECT, given), time.perf_counter()

        def tell(what: str) -> None:
            print(f"{time.perf_counter() - began:6.1f} s  {what}", flush=True)

        for step in steps:
            build.take(step)
            tell(f"{step.instruction} {step.text}")
        command = options.command or build.command
        build.run(command, " ".join(command))
        tell(f"the command ended: {' '.join(command)}")
    return 0


if __name__ == "__main__":
    run_main(main)
