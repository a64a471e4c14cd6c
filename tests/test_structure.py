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

import conftest
import pytest

ROOT = Path(__file__).resolve().parent.parent
# A room imports only itself and rooms before it. What is not listed here is in no room.
ORDER = (
    "threads",
    "errors",
    "system",
    "alone",
    "paths",
    "fields",
    "presets",
    "command_line",
    "config",
    "config_values",
    "files",
    "hub",
    "hub_runs",
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
TEXTS = {path: (ROOT / path).read_text() for path in FILES}
TREES = {path: ast.parse(text, str(path)) for path, text in TEXTS.items()}


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
                or path.parts[:2] == ("model", "families")  # a family names how it is spoken to
                and name.startswith("data.chat_forms")
            )
        ):
            wrong.append(f"{path} imports {name}: the batch is all that model knows of data")
        elif room == "lora" and target not in LORA_KNOWS:
            wrong.append(
                f"{path} imports {target}: lora knows torch, bitsandbytes, tensors and ops"
            )
    return wrong


def test_the_longest_files_of_the_tests_are_there():
    assert len(set(conftest.LONG)) == len(conftest.LONG)
    assert {Path(f"tests/{name}.py") for name in conftest.LONG} <= set(FILES)


def none_of(found: list[str]) -> None:
    """Fail with every line of what was found: pytest alone would show the first."""
    assert not found, "\n".join(found)


def test_every_room_has_its_place_in_the_reading_order():
    assert ROOMS - set(OUTSIDE) - set(ORDER) == set(), "these rooms are not in ORDER"
    assert set(ORDER) | set(OUTSIDE) == ROOMS, "ORDER names rooms that do not exist"
    assert len(set(ORDER)) == len(ORDER)


def test_imports_run_one_way():
    none_of([wrong for path, tree in TREES.items() for wrong in wrong_arrows(path, tree)])


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
        loads = getattr(node.func, "attr", "") == "load"
        called = ast.unparse(node.func) if words or loads else ""

        def says(name: str, value: object) -> bool:
            return isinstance(words.get(name), ast.Constant) and words[name].value is value

        if says("strict", False):
            yield f"line {node.lineno}: {called}(strict=False)"
        if says("trust_remote_code", True) or says("allow_pickle", True):
            yield f"line {node.lineno}: {called} would run code from a file"
        if called == "torch.load" and not says("weights_only", True):
            yield f"line {node.lineno}: torch.load without weights_only=True"


def test_nothing_forbidden_is_used():
    found = [
        f"{path}: {fault}"
        for path, tree in TREES.items()
        for fault in faults(tree, tests=room_of(path) in OUTSIDE)
    ]
    none_of(found)


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


def acts_on_import(path: Path, node: ast.stmt) -> bool:
    """Whether a statement at the top of a module does more than to define something."""
    definition = isinstance(
        node,
        ast.Import
        | ast.ImportFrom
        | ast.FunctionDef
        | ast.AsyncFunctionDef
        | ast.ClassDef
        | ast.Assign
        | ast.AnnAssign,
    )
    docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    main = isinstance(node, ast.If) and ast.unparse(node.test) == "__name__ == '__main__'"
    only_for_types = (
        isinstance(node, ast.If)
        and ast.unparse(node.test) == "TYPE_CHECKING"
        and all(isinstance(inner, ast.Import | ast.ImportFrom) for inner in node.body)
    )
    where_there_is_one = (  # a module that some systems lack, and which is None there
        isinstance(node, ast.Try)
        and all(isinstance(inner, ast.Import) for inner in node.body)
        and [ast.unparse(part.type) for part in node.handlers if part.type] == ["ImportError"]
        and all(ast.unparse(inner).endswith(" = None") for inner in node.handlers[0].body)
        and not (node.orelse or node.finalbody)
    )
    told_there = (
        isinstance(node, ast.Expr)
        and isinstance(node.value, ast.Call)
        and (str(path), ast.unparse(node.value.func)) in AT_IMPORT
    )
    return not (
        definition or docstring or main or only_for_types or where_there_is_one or told_there
    )


def test_importing_a_module_does_nothing():
    """At the top of a module stand definitions only; work begins in a function."""
    found = [
        f"{path}: line {node.lineno}"
        for path, tree in TREES.items()
        if room_of(path) not in OUTSIDE
        for node in tree.body
        if acts_on_import(path, node)
    ]
    none_of(found)


@pytest.mark.parametrize(
    "line",
    [
        "print()",
        "if True:\n    a = 1",
        "if TYPE_CHECKING:\n    a = 1",
        "for a in b:\n    pass",
        "try:\n    import a\nexcept ImportError:\n    a = 1",
        "try:\n    import a\nexcept ImportError:\n    a = None\nelse:\n    a()",
    ],
)
def test_a_line_that_acts_on_import_is_found(line):
    assert acts_on_import(Path("errors.py"), ast.parse(line).body[0])


def test_lines_are_short():
    found = [
        f"{path}: line {number}"
        for path, text in TEXTS.items()
        for number, line in enumerate(text.split("\n"), 1)
        if len(line) > 100
    ]
    none_of(found)


def test_a_module_begins_with_what_it_is_for():
    none_of([str(path) for path in FILES if TEXTS[path] and not ast.get_docstring(TREES[path])])


LIMITED = [path for path in FILES if room_of(path) != "tests"]


def test_a_file_is_read_at_one_sitting():
    lines = {str(path): len(TEXTS[path].splitlines()) for path in LIMITED}
    limits = {path: COMMAND_LINES.get(path.removesuffix(".py"), FILE_LINES) for path in lines}
    assert {path: count for path, count in lines.items() if count > limits[path]} == {}


def long_functions(tree: ast.AST) -> list[str]:
    """Functions and methods of more lines than fit on a screen, decorators left out."""
    return [
        f"{node.name}: {node.end_lineno - node.lineno + 1} lines"
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and node.end_lineno - node.lineno + 1 > FUNCTION_LINES
    ]


def test_a_function_fits_on_a_screen():
    none_of([f"{path}: {long}" for path in LIMITED for long in long_functions(TREES[path])])


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
        if isinstance(node, ast.Attribute)
        and node.attr == "path"
        and ast.unparse(node) == "sys.path"
    ]


def test_the_path_of_imports_is_left_alone():
    """Rooms are found from the project's folder, or by the path that `make` sets in .venv."""
    found = {str(path): changes_of_the_path(TREES[path]) for path in LIMITED}
    assert {path: lines for path, lines in found.items() if lines} == {}


def test_a_change_of_the_path_is_found():
    assert changes_of_the_path(ast.parse("import sys\nsys.path.insert(0, '..')")) == [2]


# -- the page's scripts ---------------------------------------------------------------------------

STATIC = ROOT / "web/static"
SCRIPTS = sorted(path.relative_to(ROOT) for path in STATIC.rglob("*.js"))
SHOWN = sorted(path.relative_to(ROOT) for path in STATIC.rglob("*") if path.is_file())
SCRIPT_LINES, SCRIPT_COLUMNS = 350, 160
# The one place where HTML that the server has made of an answer becomes elements.
TAKES_HTML = Path("web/static/chat/markup.js")
MAKES_HTML = re.compile(
    r"innerHTML|outerHTML|insertAdjacentHTML|setHTML|document\.write|createContextualFragment"
    r"|DOMParser|srcdoc|\beval\(|new Function|javascript:"
)
NAMES_A_HOST = re.compile(r"""[\"'`(](?:https?:|wss?:)?//[a-z0-9.-]+""", re.IGNORECASE)
NAMESPACES = ("http://www.w3.org/2000/svg", "http://www.w3.org/1999/xhtml")  # names, never asked


def test_a_script_is_read_at_one_sitting_and_says_what_it_is_for():
    for path in SCRIPTS:
        lines = (ROOT / path).read_text().splitlines()
        assert len(lines) <= SCRIPT_LINES, path
        assert [n for n, line in enumerate(lines, 1) if len(line) > SCRIPT_COLUMNS] == [], path
        assert lines[0].startswith("//"), f"{path}: a script begins with what it is for"


def test_html_is_made_in_one_place():
    makers = [path for path in SCRIPTS if MAKES_HTML.search((ROOT / path).read_text())]
    assert makers == [TAKES_HTML]


def test_the_page_names_no_other_host():
    """Nor are there files of other kinds, which nobody has looked at."""
    for path in SHOWN:
        assert path.suffix in (".js", ".css"), path
        text = (ROOT / path).read_text()
        for name in NAMESPACES:
            text = text.replace(name, "")
        assert NAMES_A_HOST.findall(text) == [], path


@pytest.mark.parametrize(
    "line",
    [
        "element.innerHTML = text",
        'element.insertAdjacentHTML("beforeend", x)',
        "new DOMParser()",
        "eval(x)",
    ],
)
def test_a_line_that_makes_html_is_found(line):
    assert MAKES_HTML.search(line)


@pytest.mark.parametrize(
    "line", ['import("https://x.org/a.js")', "url(//x.org/a.woff2)", "`wss://x.org`"]
)
def test_a_line_that_names_a_host_is_found(line):
    assert NAMES_A_HOST.search(line)


def test_a_room_imports_what_is_there():
    """A script that is not there is found by the browser alone, when the room is opened."""
    for path in SCRIPTS:
        text = (ROOT / path).read_text()
        for name in re.findall(r"""(?:from|import)\s*\(?\s*["'](\.{1,2}/[^"']+)["']""", text):
            assert ((ROOT / path).parent / name).is_file(), (path, name)


def scripts_of(path: Path) -> set[Path]:
    """The scripts that one imports at once, and theirs."""
    found, waiting = set(), [path]
    while waiting:
        one = waiting.pop()
        if one in found:
            continue
        found.add(one)
        for name in re.findall(r"""from\s+["'](\.{1,2}/[^"']+)["']""", (ROOT / one).read_text()):
            waiting.append(Path(os.path.normpath(one.parent / name)))
    return found


def test_the_first_room_loads_no_other_rooms():
    rooms = {path.parts[2] for path in scripts_of(Path("web/static/main.js"))}
    assert rooms <= {"main.js", "core", "chat", "voice"}
