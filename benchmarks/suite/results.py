"""The committed results: benchmarks/results.json, by the kind of machine."""

from __future__ import annotations

import dataclasses
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.processes import ROOT
from benchmarks.suite.table import MEASURES, Measure
from benchmarks.suite.verdict import Found, band_of
from documents import COUNT, FINITE, POSITIVE, TEXT, json_bytes, problems, read_json
from errors import PhiSightError
from files import write_whole

FILE = ROOT / "benchmarks/results.json"
MEASURE = {"ratio": POSITIVE, "ours": POSITIVE, "reference": POSITIVE}
MACHINE = {"date": TEXT, "processor": TEXT, "cores": COUNT, "load": FINITE, "versions": {"*": TEXT}}
SHOULD = {"classes": {"*": {**MACHINE, "measures": {"*": {**MEASURE, "band": POSITIVE}}}}}
REPORT = {
    "class": TEXT,
    "machine": MACHINE,
    "measures": {
        "*": {**MEASURE, "spread": FINITE, "turns": COUNT, "seconds": FINITE, "runs": COUNT}
    },
}
FILE_BYTES = 1 << 20


def class_of(machine: Mapping[str, Any], threads: int) -> str:
    """Machines of one class have the same kernels; what differs beyond that, both sides have."""
    instructions = " ".join(machine["instructions"]) or "no vector instructions that are used"
    return f"{platform.machine()}, {instructions}, threads: {threads}"


def read_checked(path: Path, should: Any, remedy: str) -> dict[str, Any]:
    """A JSON object of this form. Raises `PhiSightError` with the first thing that is not so."""
    try:
        content = read_json(path, FILE_BYTES)
        for problem in problems(content, should):
            raise PhiSightError(problem)
    except OSError as error:
        raise PhiSightError(f"{path}: {error.strerror}; {remedy}") from None
    except PhiSightError as error:
        raise PhiSightError(f"{path}: {error}; {remedy}") from None
    return content


def read_results(path: Path) -> dict[str, Any]:
    """All classes; none where there is no such file yet."""
    if not path.exists():
        return {"classes": {}}
    return read_checked(path, SHOULD, "put back the committed one, or remove it and --update")


def committed_of(
    results: Mapping[str, Any], machine_class: str
) -> tuple[dict[str, float], dict[str, Measure]]:
    """Measure -> committed ratio of a class, nothing where it has none; and all measures, with the
    bands that are committed for it."""
    committed = results["classes"].get(machine_class, {"measures": {}})["measures"]
    bands = {
        name: max(MEASURES[name].band, one["band"])
        for name, one in committed.items()
        if name in MEASURES
    }
    measures = {
        name: dataclasses.replace(one, band=bands.get(name, one.band))
        for name, one in MEASURES.items()
    }
    return {name: one["ratio"] for name, one in committed.items()}, measures


def update(
    path: Path, machine_class: str, machine: Mapping[str, Any], measured: Mapping[str, Found]
) -> None:
    """Commit these figures for their class; its other measures stay, those that the suite does not
    have any more go."""
    results = read_results(path)
    before = results["classes"].get(machine_class, {"measures": {}})["measures"]
    kept = {name: one for name, one in before.items() if name in MEASURES}
    now = {}
    for name, one in measured.items():
        band = band_of(MEASURES[name], one, kept[name]["band"] if name in kept else None)
        figures = {**one.to_json(), "band": band}
        now[name] = {"date": machine["date"], **{k: rounded(v) for k, v in figures.items()}}
    both = kept | now
    results["classes"][machine_class] = {
        **{name: machine[name] for name in MACHINE},
        "measures": {name: both[name] for name in MEASURES if name in both},
    }
    write_json(path, results)


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Whole or not at all. Raises `PhiSightError`: an uncaught error would end with the code of
    something that became worse."""
    try:
        write_whole(path, json_bytes(path.name, content))
    except OSError as error:
        raise PhiSightError(
            f"{path}: {error.strerror}; name a file in a folder that can be written to"
        ) from error


def rounded(figure: float) -> float:
    """Five digits that count."""
    return float(f"{figure:.5g}") if isinstance(figure, float) else figure
