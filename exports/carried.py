"""The files of this project that a command needs to run elsewhere, found from its imports."""

from __future__ import annotations

import ast
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

# A module that is named in a text, such as that of a program that is started: "workers.child".
_NAMED = re.compile(r"[a-z_][a-z0-9_]*(?:\.[a-z_][a-z0-9_]*)+", re.ASCII)


def carried_files(project: Path, command: str) -> list[Path]:
    """What has to lie in a folder for `python command` to run there, relative to `project`: the
    modules that it imports, at once or later, theirs, and the other files of their rooms, such as
    style sheets. Packages that are installed are not looked into."""
    waiting, modules = [Path(command)], set()
    while waiting:
        path = waiting.pop()
        if path in modules:
            continue
        modules.add(path)
        tree = ast.parse((project / path).read_bytes(), str(path))
        for name in imports_of(tree):
            waiting += files_of(project, name)
        for name in texts_of(tree):
            waiting += files_of(project, name, whole=True)
    rooms = {path.parent for path in modules} - {Path()}
    beside = {
        path.relative_to(project)
        for room in rooms
        for path in (project / room).iterdir()
        if path.is_file() and path.suffix not in (".py", ".pyc") and not path.name.startswith(".")
    }
    return sorted(modules | beside)


def imports_of(tree: ast.AST) -> Iterator[str]:
    """The dotted name of every import of a module, in functions too; `from a import b` is "a.b"."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def texts_of(tree: ast.AST) -> Iterator[str]:
    """The texts of a module that have the form of a dotted name."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            if _NAMED.fullmatch(node.value):
                yield node.value


def files_of(project: Path, name: str, whole: bool = False) -> list[Path]:
    """The files below `project` that an import of a dotted name runs: its packages' and its own;
    none for a name that is not the project's. The last part may name something in a module, but
    for `whole` names of modules."""
    found = []
    parts = name.split(".")
    for end in range(1, len(parts) + 1):
        path = Path(*parts[:end])
        files = [
            file
            for file in (path.with_suffix(".py"), path / "__init__.py")
            if (project / file).is_file()
        ]
        if not files and whole:
            return []
        found += files[:1]
    return found


def carry(project: Path, files: list[Path], folder: Path) -> None:
    """Copy files into `folder`, under the names that they have in `project`. Raises `OSError`."""
    for path in files:
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(project / path, folder / path)
