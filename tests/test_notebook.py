"""The notebook, its cells run in their order in a real kernel, on a short training: the kernel and
the training are killed where the notebook does that, and a new kernel goes on."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
import runs
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, DeadKernelError

import checkpoints
from tools.try_container import copy_into

NOTEBOOK = runs.ROOT / "notebooks/phisight_colab.ipynb"
STEPS = 8


def read() -> nbformat.NotebookNode:
    return nbformat.read(NOTEBOOK, as_version=4)


def tags_of(cell: nbformat.NotebookNode) -> list[str]:
    return cell.metadata.get("tags", [])


def test_it_is_a_notebook_without_what_a_run_left_in_it():
    notebook = read()
    nbformat.validate(notebook)
    assert len({cell.id for cell in notebook.cells}) == len(notebook.cells)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            assert cell.outputs == [] and cell.execution_count is None
    assert not re.search(r"/(home|root|work|tmp|Users)/", NOTEBOOK.read_text())


def test_its_set_up_comes_first_and_the_kill_after_it():
    tags = [tags_of(cell) for cell in read().cells if cell.cell_type == "code"]
    assert tags == [["parameters", "setup"], ["setup"], ["setup"], ["killed"], *[[]] * 4]


@pytest.fixture(scope="module")
def repository(tmp_path_factory) -> Path:
    """What the notebook clones: this checkout as it is now."""
    folder = tmp_path_factory.mktemp("repository")
    copy_into(folder, runs.ROOT, [".", "."])
    identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
    for words in (["init", "-q"], ["add", "-A"], [*identity, "commit", "-qm", "as it is"]):
        subprocess.run(["git", *words], cwd=folder, check=True)
    return folder


class Runtime:
    """A kernel in a folder, which runs cells until it is stopped or dead."""

    def __init__(self, notebook: nbformat.NotebookNode, folder: Path) -> None:
        self.client = NotebookClient(
            notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": folder}}
        )
        self.client.create_kernel_manager()
        self.client.start_new_kernel()
        self.client.start_new_kernel_client()

    def run(self, cell: nbformat.NotebookNode) -> str:
        """What the cell prints. A program of it that fails is an error of the cell."""
        self.client.execute_cell(cell, 0)
        said = "".join(output.get("text", "") for output in cell.outputs)
        check = nbformat.v4.new_code_cell("assert not globals().get('_exit_code'), _exit_code")
        try:
            self.client.execute_cell(check, 0)
        except Exception:
            pytest.fail(said)
        return said

    def stop(self) -> None:
        self.client._cleanup_kernel()


def test_an_address_that_was_not_given_is_asked_for(tmp_path):
    notebook = read()
    parameters, set_up = (cell for cell in notebook.cells[:4] if cell.cell_type == "code")
    runtime = Runtime(notebook, tmp_path)
    try:
        runtime.run(parameters)
        with pytest.raises(CellExecutionError, match="REPOSITORY is empty; give it"):
            runtime.client.execute_cell(set_up, 0)
    finally:
        runtime.stop()


def test_its_cells_train_lose_the_runtime_go_on_ask_and_export(repository, tmp_path, monkeypatch):
    for name, value in (runs.environment() | {"GIT_CONFIG_GLOBAL": os.devnull}).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    notebook = read()
    short = f"STEPS, SAVE_STEPS, PICTURES, CHECKED = {STEPS}, 2, 40, 2"
    notebook.cells[2].source += f"\n{short}\nREPOSITORY = {str(repository)!r}"
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    set_up = [cell for cell in cells if "setup" in tags_of(cell)]
    rest = [cell for cell in cells if not tags_of(cell)]
    (killed,) = [cell for cell in cells if "killed" in tags_of(cell)]

    runtime = Runtime(notebook, tmp_path)
    for cell in set_up:
        runtime.run(cell)
    with pytest.raises(DeadKernelError):
        runtime.run(killed)
    run = tmp_path / "kept/run"
    assert 2 <= runs.newest_step(run) < STEPS

    runtime = Runtime(notebook, tmp_path)
    try:
        for cell in set_up:
            runtime.run(cell)
        resumed, compared, asked, exported = (runtime.run(cell) for cell in rest)
    finally:
        runtime.stop()
    assert f"of {STEPS}" in resumed and "resumed at step" in resumed and "finished" in resumed
    assert "identical: " in compared
    found = checkpoints.diff(tmp_path / "kept/whole", run)
    assert found.identical and found.parted is None, found
    assert asked.strip() and (tmp_path / "kept/llava/config.json").is_file(), exported
