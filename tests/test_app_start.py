"""app.py as a process: the page is there before the model, and everything ends in order."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import psutil
import pytest
import runs

# What takes seconds to load; the page does without.
HEAVY = ("torch", "transformers", "whisper", "datasets", "matplotlib", "scipy", "sklearn")
LOADS = """
import sys
from web.app import build_site, web_application
from web.model import Model
model = Model(source=sys.argv[2])
application = web_application(build_site(model, conversations=sys.argv[1], runs=None))
from fastapi.testclient import TestClient
client = TestClient(application)
picture = client.get("/app/start").json()["examples"][0]["picture"]
for path in ("/", "/app/start", "/app/texts/en", f"/app/{picture}"):
    assert client.get(path).status_code == 200, path
print(*sorted(name for name in sys.modules if name in sys.argv[3:]))
"""


def program(code: str, *arguments: object, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        cwd=runs.ROOT,
        env=runs.environment() | environment,
        capture_output=True,
        text=True,
    )


def test_the_page_is_made_without_torch(tmp_path):
    done = program(LOADS, tmp_path / "conversations", runs.finished_run(), *HEAVY)
    assert (done.returncode, done.stdout.strip()) == (0, ""), done.stdout + done.stderr


# -- a process ------------------------------------------------------------------------------------


@dataclass
class Started:
    process: subprocess.Popen
    url: str
    temporary: Path

    def state(self) -> dict:
        return httpx.get(f"{self.url}/app/start", timeout=60).json()["model"]

    def end(self, *signals: signal.Signals) -> tuple[str, str]:
        """Send it signals and wait; returns what it said."""
        children = psutil.Process(self.process.pid).children(recursive=True)
        for one in signals:
            self.process.send_signal(one)
        said = self.process.communicate(timeout=60)
        _, alive = psutil.wait_procs(children, timeout=20)
        assert alive == [] and list(self.temporary.iterdir()) == []
        return said


@contextlib.contextmanager
def app(tmp_path: Path, *flags: str, slow: float = 0.0, **environment: str) -> Iterator[Started]:
    """`python app.py` until the block is left; `slow`: seconds that loading torch takes longer."""
    temporary, beside = tmp_path / "temporary", tmp_path / "beside"
    temporary.mkdir()
    beside.mkdir()
    (beside / "sitecustomize.py").write_text(SLOW if slow else "")
    process = subprocess.Popen(
        [sys.executable, "app.py", "--port=0", f"--conversations={tmp_path / 'c'}", *flags],
        cwd=runs.ROOT,
        env=runs.environment()
        | {"TMPDIR": str(temporary), "GRADIO_TEMP_DIR": "", "SLOW": str(slow)}
        | {"PYTHONPATH": str(beside)}
        | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        line = process.stdout.readline()
        assert "http://" in line, line + "".join(process.communicate(timeout=60))
        url = "http://" + line.partition("http://")[2].split()[0].rstrip(";")
        yield Started(process, url, temporary)
    finally:
        process.kill()
        process.communicate()


# Whatever loads torch waits first, as on a machine whose disk is slow. Not in `find_spec`: whoever
# imports anything waits for that.
SLOW = """
import os, sys, time
from importlib.machinery import PathFinder
class Late:
    def find_spec(self, name, path=None, target=None):
        if name != "torch":
            return None
        spec = PathFinder.find_spec(name, path)
        load = spec.loader.exec_module
        def late(module):
            time.sleep(float(os.environ["SLOW"]))
            load(module)
        spec.loader.exec_module = late
        return spec
sys.meta_path.insert(0, Late())
"""


def test_the_page_is_there_while_the_model_loads_and_then_answers(tmp_path):
    run = f"--run={runs.finished_run()}"
    with app(tmp_path, run, slow=3.0) as started:
        assert "text/html" in httpx.get(started.url, timeout=60).headers["content-type"]
        loading = started.state()
        assert loading["state"] == "loading" and "step" not in loading
        deadline = time.monotonic() + 120
        while (now := started.state())["state"] == "loading":
            assert time.monotonic() < deadline
            time.sleep(0.1)
        assert now["state"] == "ready" and now["error"] == "" and now["step"] > 0
        output, errors = started.end(signal.SIGTERM)
    assert (started.process.returncode, output) == (0, "")
    assert "Traceback" not in errors, errors


@pytest.mark.parametrize("ended", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_while_it_loads_ends_it_in_order(tmp_path, ended):
    with app(tmp_path, f"--run={runs.finished_run()}", slow=600.0) as started:
        assert started.state()["state"] == "loading"
        output, errors = started.end(ended)
    assert (started.process.returncode, output, errors) == (0, "", "")


def test_a_second_signal_while_it_loads_ends_it_too(tmp_path):
    with app(tmp_path, f"--run={runs.finished_run()}", slow=600.0) as started:
        assert started.state()["state"] == "loading"
        output, errors = started.end(signal.SIGINT, signal.SIGINT)
    assert (started.process.returncode, output) == (0, "") and "Traceback" not in errors


def test_a_model_that_cannot_be_loaded_ends_it_with_one_line(tmp_path):
    with app(tmp_path, "--run=docs") as started:
        output, errors = started.process.communicate(timeout=120)
    assert started.process.returncode == 2 and output == ""
    lines = errors.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: ") and "docs" in lines[0], errors
    assert list(started.temporary.iterdir()) == []


@pytest.mark.parametrize("flags", [["--run=nowhere"], ["--port=70000"], ["--host=0.0.0.0"]])
def test_what_is_wrong_is_told_before_anything_is_loaded(tmp_path, flags):
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "app.py", f"--run={runs.finished_run()}", *flags],
        cwd=runs.ROOT,
        env=runs.environment() | {"PHISIGHT_API_KEY": ""} | {"TMPDIR": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    said = [line for line in done.stderr.splitlines() if not line.startswith("import time:")]
    assert done.returncode == 2 and len(said) == 1 and said[0].startswith("error: ")
    assert not any(line.split("|")[-1].strip() == "torch" for line in done.stderr.splitlines())
    assert list(tmp_path.iterdir()) == []


# -- Gradio, imported without its stubs -----------------------------------------------------------

IMPORTS = """
import sys
from web.gradio_import import import_gradio
before = list(sys.meta_path)
import_gradio()
import gradio
assert sys.meta_path == before
print(gradio.__file__, gradio.Blocks is not None)
"""


def test_importing_gradio_changes_nothing_where_it_lies(tmp_path):
    """On a copy whose stubs are gone: a usual import would write them."""
    import gradio

    theirs = Path(gradio.__file__).parent
    packages = tmp_path / "packages"
    copy = shutil.copytree(theirs, packages / "gradio", ignore=ignored, symlinks=True)
    before = stamps(packages)
    environment = {"PYTHONPATH": str(packages), "PYTHONDONTWRITEBYTECODE": "1"}
    done = program(IMPORTS, **environment)
    assert done.stdout.startswith(str(copy)), done.stdout + done.stderr
    assert stamps(packages) == before
    usual = program("import gradio", **environment)
    assert usual.returncode == 0
    assert stamps(packages) != before, "Gradio writes no stubs any more: gradio_import can go"


def ignored(folder: str, names: list[str]) -> set[str]:
    """What an import does not need: the page's files, and stubs."""
    left = {name for name in names if name.endswith(".pyi") or name == "__pycache__"}
    if Path(folder).name == "templates":
        left |= {"node", "frontend"} & set(names)
    return left | ({"test_data", "_frontend_code", "media_assets"} & set(names))


def stamps(folder: Path) -> dict[str, tuple[int, int]]:
    return {
        str(path): (path.stat().st_size, path.stat().st_mtime_ns)
        for path in folder.rglob("*")
        if path.is_file()
    }


@pytest.mark.parametrize("source", ["", "def create_or_modify_pyi(): pass", "x = 1"])
def test_another_gradio_without_that_function_is_imported_as_it_is(tmp_path, source):
    package = tmp_path / "gradio"
    package.mkdir()
    (package / "__init__.py").write_text("import gradio.component_meta as meta\nBlocks = meta\n")
    (package / "component_meta.py").write_text(source)
    done = program(IMPORTS, PYTHONPATH=str(tmp_path))
    assert (done.returncode, done.stdout.strip()) == (0, f"{package / '__init__.py'} True")
    (package / "__init__.py").write_text("Blocks = 1\n")
    (package / "component_meta.py").unlink()
    assert program(IMPORTS, PYTHONPATH=str(tmp_path)).returncode == 0


def test_nothing_is_looked_up_when_the_page_starts(tmp_path):
    code = (
        """
import sys
def hook(event, arguments):
    if event in ("socket.getaddrinfo", "socket.connect"):
        raise SystemExit(f"{event} {arguments}")
sys.addaudithook(hook)
"""
        + LOADS
    )
    done = program(code, tmp_path / "conversations", runs.finished_run(), os.devnull)
    assert done.returncode == 0, done.stderr
