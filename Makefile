# Every command sets up what it needs in .venv; nothing is installed outside this folder.
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check

.PHONY: demo test lint bench clean

demo: .venv/demo.stamp
	$(BIN)/python -m tools.demo

test: .venv/test.stamp
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n logical --maxprocesses 4 \
	--dist loadfile --no-loadscope-reorder

lint: .venv/test.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Not in CI: times of a machine that does other work fail by chance. The golden outputs are.
bench: .venv/test.stamp
	$(BIN)/python -m benchmarks.golden
	$(BIN)/python benchmarks/run.py

.venv/bin/python:
	$(PYTHON) -m venv .venv

# Makes the rooms importable for scripts that lie in a folder, such as tools/torture_resume.py.
# The path is relative to .venv, so that the folder can be moved, and a git worktree that links
# to this .venv imports its own files.
.venv/path.stamp: | .venv/bin/python
	$(BIN)/python -c 'import os, sysconfig; site = sysconfig.get_path("purelib"); \
	open(os.path.join(site, "phisight.pth"), "w").write(os.path.relpath(".", site) + "\n")'
	touch $@

.venv/demo.stamp: requirements.txt | .venv/path.stamp
	$(PIP) -r requirements.txt
	touch $@

.venv/test.stamp: requirements-test.txt requirements-extras.txt requirements.txt | .venv/path.stamp
	$(PIP) -r requirements-test.txt
	touch $@ .venv/demo.stamp

clean:
	rm -rf .venv runs cache
