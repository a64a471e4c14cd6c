"""Build llama-cpp-python with its reading of CLIP mended, into an environment of its own.

    python -m tools.llama_cpp ../llama

Takes the source package of the newest llama-cpp-python from the package index, mends the one line
that puts CLIP's class token behind the patches (issue 25814 of ggml-org/llama.cpp), where it is
there, and builds it: 5 to 40 minutes. `export.py --gguf` and the tests that ask llama.cpp then find
it by --llama-python ../llama/bin/python, or by PHISIGHT_LLAMA_PYTHON in the environment.
"""

from __future__ import annotations

import subprocess
import sys
import tarfile
import tempfile
import venv
from pathlib import Path

import config as configs
from errors import PhiSightError, run_main

PACKAGE = "llama-cpp-python"
GRAPH = "vendor/llama.cpp/tools/mtmd/models/llava.cpp"
WRONG = "ggml_concat(ctx0, inp, model.class_embedding, 1)"
RIGHT = "ggml_concat(ctx0, model.class_embedding, inp, 1)"


def mended(source: str) -> str:
    """The C++ of llama.cpp's LLaVA with the class token in front of the patches. Raises
    `PhiSightError` for one that says neither this nor that."""
    if source.count(WRONG) == 1:
        return source.replace(WRONG, RIGHT)
    if RIGHT in source:
        return source
    raise PhiSightError(
        f"{PACKAGE}: its {GRAPH} is not as this tool knows it; see whether issue 25814 of"
        " ggml-org/llama.cpp is solved there, and install it with pip"
    )


def run(command: list[str]) -> None:
    """Run a command, its output shown. Raises `PhiSightError` if it fails."""
    if code := subprocess.run(command, check=False).returncode:
        raise PhiSightError(
            f"{' '.join(command[:4])}: ended with {code}; see above what is missing, such as cmake"
            " or a C++ compiler"
        )


def build(folder: Path) -> Path:
    """The environment at `folder`, which must not be there; returns its interpreter."""
    if folder.exists():
        raise PhiSightError(f"{folder}: is there already; remove it or name another folder")
    with tempfile.TemporaryDirectory(prefix="phisight-llama-") as name:
        work = Path(name)
        pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
        run([*pip, "download", "--no-deps", "--no-binary", PACKAGE, "--dest", name, PACKAGE])
        [archive] = work.glob("llama_cpp_python-*.tar.gz")
        with tarfile.open(archive) as file:
            file.extractall(work, filter="data")
        [source] = (path for path in work.iterdir() if path.is_dir())
        graph = source / GRAPH
        graph.write_text(mended(graph.read_text(encoding="utf-8")), encoding="utf-8", newline="\n")
        venv.create(folder, with_pip=True)
        python = folder / "bin" / "python"
        run([str(python), "-m", "pip", "--disable-pip-version-check", "install", str(source)])
    return python


def main(arguments: list[str] | None = None) -> int:
    parser = configs.Parser(prog="tools.llama_cpp", description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="of the environment, which must not be there")
    python = build(parser.parse_args(arguments).folder)
    print(f"built; export PHISIGHT_LLAMA_PYTHON={python.absolute()}")
    return 0


if __name__ == "__main__":
    run_main(main)
