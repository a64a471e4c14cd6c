"""The files of this project that a command needs to run elsewhere, found from its imports."""

from __future__ import annotations

import ast
import re
import shutil
from collections.abc import Collection, Iterator
from pathlib import Path

# What a room needs beside its modules, and nothing else: people keep data and notes beside code,
# and tell nobody of them.
BESIDE = ("static/**/*.css", "static/**/*.js", "texts/*.json")
# A module that is named in a text, such as that of a program that is started: "workers.child".
_NAMED = re.compile(r"[a-z_][a-z0-9_]*(?:\.[a-z_][a-z0-9_]*)+", re.ASCII)


def carried_files(project: Path, command: str, without: Collection[str] = ()) -> list[Path]:
    """What has to lie in a folder for `python command` to run there, relative to `project`: the
    modules that it imports, at once or later, theirs, and the page and the texts of their rooms.
    Packages that are installed are not looked into; nor are the folders of `without`, such as
    "web/training", which are left out."""
    waiting, modules = [Path(command)], set()
    while waiting:
        path = waiting.pop()
        if path in modules or path.parent.as_posix() in without:
            continue
        modules.add(path)
        tree = ast.parse((project / path).read_bytes(), str(path))
        for name, is_import in names_in(tree):
            waiting += files_of(project, name, whole=not is_import)
    rooms = {path.parts[0] for path in modules if len(path.parts) > 1}
    beside = {
        path.relative_to(project)
        for room in rooms
        for pattern in BESIDE
        for path in (project / room).glob(pattern)
        if path.is_file() and not path.is_symlink()
    }
    return sorted(modules | beside)


def names_in(tree: ast.AST) -> Iterator[tuple[str, bool]]:
    """(dotted name, True) of every import of a module, in functions too, where `from a import b` is
    "a.b"; and (text, False) of every text in it that has the form of a dotted name."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, True) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from ((f"{node.module}.{alias.name}", True) for alias in node.names)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            if _NAMED.fullmatch(node.value):
                yield node.value, False


def files_of(project: Path, name: str, whole: bool = False) -> list[Path]:
    """The files below `project` that an import of a dotted name runs: its packages' and its own;
    none for a name that is not the project's. The last part may name something in a module, but
    for `whole` names of modules."""
    found: list[Path] = []
    parts = name.split(".")
    for end in range(1, len(parts) + 1):
        path = Path(*parts[:end])
        files = [path.with_suffix(".py"), path / "__init__.py"]
        there = [file for file in files if (project / file).is_file()]
        if whole and end == len(parts) and not there:
            return []
        found += there[:1]
    return found


def carry(project: Path, files: list[Path], folder: Path) -> None:
    """Copy files into `folder`, under the names that they have in `project`. Raises `OSError`."""
    for path in files:
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(project / path, folder / path)
