"""The house: imports run one way, and what must not be in it is not."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from itertools import takewhile
from pathlib import Path

import threads

import pytest

ROOT = Path(__file__).resolve().parent.parent
# A room imports only itself and rooms before it. What is not listed here is in no room.
ORDER = (
    "threads",
    "errors",
    "alone",
    "paths",
    "fields",
    "presets",
    "command_line",
    "config",
    "files",
    "hub",
    "documents",
    "space",
    "workers",
    "tensors",
    "stored",
    "torch_files",
    "manifest",
    "archive",
    "data",
    "ops",
    "lora",
    "model",
    "reports",
    "checkpoint_state",
    "packing",
    "checkpoints",
    "assistant",
    "evaluation",
    "training",
    "sweeps",
    "speech",
    "terminal",
    "exports",
    "api",
    "web",
    "train",
    "sweep",
    "infer",
    "evaluate",
    "export",
    "app",
    "serve",
)
OUTSIDE = ("tests", "tools", "benchmarks")  # may import everything, and nobody imports them
COMMANDS = ("train", "sweep", "infer", "evaluate", "export", "app", "serve")  # nothing imports them
FILE_LINES, FUNCTION_LINES = 450, 60  # at most, outside tests
COMMAND_LINES = dict.fromkeys(COMMANDS, 150) | {"train": 250}
README_LINES = 170
LORA_KNOWS = {"torch", "bitsandbytes", "errors", "tensors", "ops", "lora"}
FORBIDDEN_MODULES = {"pickle", "cloudpickle", "dill", "joblib", "shelve", "marshal"}
# The only things that happen on an import, and where: see the comments there.
AT_IMPORT = {
    ("lora/__init__.py", "_import_bitsandbytes"),
    ("threads.py", "_let_waiting_threads_sleep"),
}


def project_files() -> list[Path]:
    """Every Python file that git knows or would take, relative to the root."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "*.py"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    if listed.returncode:  # no git here, as in an archive
        skipped = {".venv", "runs", "cache"}
        found = (path.relative_to(ROOT) for path in ROOT.rglob("*.py"))
        return sorted(path for path in found if not skipped & set(path.parts))
    return sorted(
        path
        for path in map(Path, listed.stdout.split("\n"))
        if path.name and (ROOT / path).is_file()
    )


FILES = project_files()
TREES = {path: ast.parse((ROOT / path).read_text(), str(path)) for path in FILES}
each_file = pytest.mark.parametrize("path", FILES, ids=str)


def room_of(path: Path) -> str:
    return path.parts[0].removesuffix(".py")


ROOMS = {room_of(path) for path in FILES}


def imports_of(tree: ast.AST) -> Iterator[str]:
    """The dotted name of every import, in functions too; `from a import b` gives "a.b"."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def wrong_arrows(path: Path, tree: ast.AST) -> list[str]:
    """The imports of one file that run against the reading order."""
    room = room_of(path)
    wrong = []
    for name in imports_of(tree):
        target = name.split(".")[0]
        if room in OUTSIDE or target == room or target not in (*ROOMS, *ORDER):
            continue
        if target in (*OUTSIDE, *COMMANDS):
            wrong.append(f"{path} imports {target}, which nothing may import")
        elif ORDER.index(target) > ORDER.index(room):
            wrong.append(f"{path} imports {target}, which comes after {room}")
        elif room == "data" and target in ("model", "lora"):
            wrong.append(f"{path} imports {target}: data knows nothing of models")
        elif (
            room == "model"
            and target == "data"
            and not (
                name.startswith("data.collate")
                or path in (Path("model/build.py"), Path("model/base.py"))
                and name.startswith("data.chat")
            )
        ):
            wrong.append(f"{path} imports {name}: the batch is all that model knows of data")
        elif room == "lora" and target not in LORA_KNOWS:
            wrong.append(
                f"{path} imports {target}: lora knows torch, bitsandbytes, tensors and ops"
            )
    return wrong


def test_every_room_has_its_place_in_the_reading_order():
    assert ROOMS - set(OUTSIDE) - set(ORDER) == set(), "these rooms are not in ORDER"
    assert set(ORDER) | set(OUTSIDE) == ROOMS, "ORDER names rooms that do not exist"
    assert len(set(ORDER)) == len(ORDER)


@each_file
def test_imports_run_one_way(path):
    assert wrong_arrows(path, TREES[path]) == []


@pytest.mark.parametrize(
    ("path", "line"),
    [
        ("errors.py", "import config"),
        ("data/chat.py", "from model.vlm import owner_of"),
        ("model/vlm.py", "from data.chat import render"),
        ("model/build.py", "from data.dataset import Message"),
        ("infer.py", "import train"),
        ("evaluate.py", "from train import chunks"),
        ("reports/log.py", "import checkpoints"),
        ("lora/layer.py", "from config import Config"),
        ("evaluation/meter.py", "from tools import demo"),
        ("train.py", "def f():\n    import infer"),
        ("evaluate.py", "import app"),
        ("evaluation/meter.py", "from exports.folder import new_folder"),
        ("serve.py", "import export"),
        ("app.py", "import serve"),
        ("api/api.py", "import app"),
    ],
)
def test_an_arrow_that_runs_the_wrong_way_is_found(path, line):
    assert len(wrong_arrows(Path(path), ast.parse(line))) == 1


@pytest.mark.parametrize("command", [*COMMANDS, "checkpoints"])
def test_a_command_says_how_threads_wait_before_it_loads_torch(command):
    first = next(
        name
        for name in imports_of(ast.parse((ROOT / f"{command}.py").read_text()))
        if name.split(".")[0] not in sys.stdlib_module_names
    )
    assert first == "threads"


@pytest.mark.parametrize("given", [{}, {"OMP_WAIT_POLICY": "active"}, {"GOMP_SPINCOUNT": "7"}])
def test_how_threads_wait_is_what_the_person_set(given, monkeypatch):
    for setting in threads.SETTINGS:
        monkeypatch.delenv(setting, raising=False)
    for setting, value in given.items():
        monkeypatch.setenv(setting, value)
    threads._let_waiting_threads_sleep()
    found = {name: os.environ[name] for name in threads.SETTINGS if name in os.environ}
    assert found == (given or {"GOMP_SPINCOUNT": "1000"})


def test_lora_knows_torch_bitsandbytes_tensors_and_ops_only():
    for path, tree in TREES.items():
        if room_of(path) == "lora":
            known = {name.split(".")[0] for name in imports_of(tree)} - sys.stdlib_module_names
            assert known <= LORA_KNOWS, path


def faults(tree: ast.AST, tests: bool = False) -> Iterator[str]:
    """What no file of the project may hold."""
    for name in imports_of(tree):
        if name.split(".")[0] in FORBIDDEN_MODULES:
            yield f"imports {name}"
        if name.startswith("transformers") and "Trainer" in name and not tests:
            yield f"imports {name}"
        if name.split(".")[0] == "peft" and not tests:  # tests compare with it
            yield f"imports {name}"
    for node in ast.walk(tree):
        if isinstance(node, ast.ExceptHandler) and node.type is None:
            yield f"line {node.lineno}: a bare except"
        if not isinstance(node, ast.Call):
            continue
        words = {word.arg: word.value for word in node.keywords}
        called = ast.unparse(node.func)

        def says(name: str, value: object) -> bool:
            return isinstance(words.get(name), ast.Constant) and words[name].value is value

        if says("strict", False):
            yield f"line {node.lineno}: {called}(strict=False)"
        if says("trust_remote_code", True) or says("allow_pickle", True):
            yield f"line {node.lineno}: {called} would run code from a file"
        if called == "torch.load" and not says("weights_only", True):
            yield f"line {node.lineno}: torch.load without weights_only=True"


@each_file
def test_nothing_forbidden_is_used(path):
    assert list(faults(TREES[path], tests=room_of(path) in OUTSIDE)) == []


@pytest.mark.parametrize(
    "line",
    [
        "import pickle",
        "from pickle import loads",
        "import peft",
        "from transformers import Trainer",
        "try:\n    f()\nexcept:\n    pass",
        "model.load_state_dict(state, strict=False)",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "numpy.load(path, allow_pickle=True)",
        "Model.from_pretrained(name, trust_remote_code=True)",
    ],
)
def test_what_is_forbidden_is_found(line):
    assert len(list(faults(ast.parse(line)))) == 1


@each_file
def test_importing_a_module_does_nothing(path):
    """At the top of a module stand definitions only; work begins in a function."""
    if room_of(path) in OUTSIDE:
        return
    allowed = (
        ast.Import,
        ast.ImportFrom,
        ast.FunctionDef,
        ast.AsyncFunctionDef,
        ast.ClassDef,
        ast.Assign,
        ast.AnnAssign,
    )
    for node in TREES[path].body:
        docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        main = isinstance(node, ast.If) and ast.unparse(node.test) == "__name__ == '__main__'"
        only_for_types = (
            isinstance(node, ast.If)
            and ast.unparse(node.test) == "TYPE_CHECKING"
            and all(isinstance(inner, (ast.Import, ast.ImportFrom)) for inner in node.body)
        )
        told_there = (
            isinstance(node, ast.Expr)
            and isinstance(node.value, ast.Call)
            and (str(path), ast.unparse(node.value.func)) in AT_IMPORT
        )
        assert isinstance(node, allowed) or docstring or main or only_for_types or told_there, (
            f"{path}: line {node.lineno}"
        )


@each_file
def test_lines_are_short_and_say_what_they_are_for(path):
    lines = (ROOT / path).read_text().split("\n")
    assert [n for n, line in enumerate(lines, 1) if len(line) > 100] == []
    if lines != [""]:
        assert ast.get_docstring(TREES[path]), "a module begins with what it is for"


limited_file = pytest.mark.parametrize(
    "path", [path for path in FILES if room_of(path) != "tests"], ids=str
)


@limited_file
def test_a_file_is_read_at_one_sitting(path):
    lines = len((ROOT / path).read_text().splitlines())
    assert lines <= COMMAND_LINES.get(str(path).removesuffix(".py"), FILE_LINES)


def long_functions(tree: ast.AST) -> list[str]:
    """Functions and methods of more lines than fit on a screen, decorators left out."""
    return [
        f"{node.name}: {node.end_lineno - node.lineno + 1} lines"
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and node.end_lineno - node.lineno + 1 > FUNCTION_LINES
    ]


@limited_file
def test_a_function_fits_on_a_screen(path):
    assert long_functions(TREES[path]) == []


def test_a_function_that_is_too_long_is_found():
    body = "    pass\n" * FUNCTION_LINES
    assert len(long_functions(ast.parse(f"class A:\n  def f(self):\n{body}"))) == 1
    assert long_functions(ast.parse(f"def f():\n{body}".removesuffix("    pass\n"))) == []


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= README_LINES


def names_of_the_map() -> list[str]:
    """The files and rooms in the README's map, each as often as it has a place there."""
    page = (ROOT / "README.md").read_text().partition("## Where things are")[2]
    return [
        name
        for line in page.split("```")[1].splitlines()[1:]
        for name in takewhile(lambda word: word.endswith((".py", "/")), line.split())
    ]


def test_the_map_names_every_room_once():
    """Two lines of one room are what a merge of two changes leaves."""
    names = names_of_the_map()
    assert sorted(names) == sorted(set(names))
    rooms = {room + ("/" if (ROOT / room).is_dir() else ".py") for room in ORDER}
    assert rooms <= set(names), rooms - set(names)


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md"])
def test_a_table_has_one_row_for_one_thing(page):
    rows = [line.split("|") for line in (ROOT / page).read_text().splitlines() if line[:1] == "|"]
    pages = Counter(name for row in rows for name in re.findall(r"\]\(([^)]*)\)", row[-2]))
    begins = Counter(re.sub(r" of `.*", "", row[1]).strip() for row in rows)
    assert [name for name, count in (pages + begins).items() if count > 1 and name != "---"] == []


def changes_of_the_path(tree: ast.AST) -> list[int]:
    """Lines that change where Python looks for modules."""
    return [
        node.lineno
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and ast.unparse(node) == "sys.path"
    ]


@limited_file
def test_the_path_of_imports_is_left_alone(path):
    """Rooms are found from the project's folder, or by the path that `make` sets in .venv."""
    assert changes_of_the_path(TREES[path]) == []


def test_a_change_of_the_path_is_found():
    assert changes_of_the_path(ast.parse("import sys\nsys.path.insert(0, '..')")) == [2]
