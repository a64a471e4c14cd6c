"""benchmarks/page.py at a size of nothing: it finds what it measures in the page as it is."""

from pathlib import Path

import pytest
import runs

from benchmarks import page
from errors import PhiSightError


def test_it_measures_every_figure_of_the_page():
    pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if not Path(page.CHROMIUM).exists():
        pytest.skip(f"{page.CHROMIUM} is not there: apt-get install chromium")
    found = page.measure(str(runs.finished_run()), repeats=1, turns=4, warm_up=False)
    figures = ("ready_seconds", "page_seconds", "model_seconds", "key_ms", "late_key_ms")
    assert all(found[name]["median"] > 0 for name in figures)
    assert found["ready_seconds"]["median"] < found["model_seconds"]["median"]
    assert len(page.table(found).splitlines()) == 1 + len(figures)


def test_an_app_that_does_not_start_and_a_browser_that_is_not_there_are_told(tmp_path):
    with pytest.raises(PhiSightError, match="did not start"):
        with page.app(str(tmp_path / "none"), tmp_path):
            pass
    pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with pytest.raises(PhiSightError, match="is not there"):
        page.measure("runs/tiny", 1, 1, str(tmp_path / "chromium"))
