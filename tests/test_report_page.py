"""The report in a real browser: on a wide screen and a phone, in the light and in the dark."""

from __future__ import annotations

import io
import json
import os
from pathlib import Path
from typing import Any

import pages
import pytest
import runs
from PIL import Image
from reported import alike, evaluation
from test_report import HOSTILE, RECORDS, SHARES

import evaluate
from data.pictures import PictureFolders
from errors import PhiSightError
from evaluation import report

WIDTHS = {"a wide screen": 1280, "a phone": 390}


class Reader:
    """A report as it is seen, and everything that must not happen with it."""

    def __init__(self, browser: Any, path: Path, width: int = 1280, scheme: str = "light") -> None:
        self.faults: list[str] = []
        size = {"width": width, "height": 844}
        self.context = browser.new_context(viewport=size, color_scheme=scheme)
        self.page = self.context.new_page()
        self.page.on("console", lambda message: self.faults.append(message.text))
        self.page.on("pageerror", lambda error: self.faults.append(str(error)))
        self.page.on("dialog", lambda dialog: self.faults.append(f"dialog: {dialog.message}"))
        self.page.on("request", self._is_inside)
        self.address = path.as_uri()
        self.page.goto(self.address)

    def _is_inside(self, request: Any) -> None:
        if request.url != self.address and not request.url.startswith("data:"):
            self.faults.append(f"asked for {request.url}")

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, *_: object) -> None:
        self.context.close()
        assert self.faults == [], self.faults

    def texts(self, selector: str) -> list[str]:
        return self.page.locator(selector).all_inner_texts()

    def too_wide(self) -> list[str]:
        """Elements that reach beyond the window and are in nothing that scrolls or cuts off."""
        return self.page.evaluate(
            """() => [...document.querySelectorAll('body *')].filter(one =>
                one.getBoundingClientRect().right > window.innerWidth + 1
                && !one.closest('.scroll')).map(one => one.outerHTML.slice(0, 120))"""
        )


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> Path:
    """What the command writes about a run of the tests."""
    path = tmp_path_factory.mktemp("report") / "report.html"
    arguments = ["--run", str(runs.finished_run()), "--report", str(path)]
    assert evaluate.main([*arguments, "--limit", "25", "--max-new-tokens", "24"]) == 0
    return path


@pytest.fixture(scope="module")
def hostile(tmp_path_factory) -> Path:
    """Long words and markup wherever a text stands, and a picture whose name is markup."""
    folder = tmp_path_factory.mktemp("hostile")
    name = "<b>picture onerror=alert(1).png"
    (folder / name).write_bytes(pages.pictures(1)[0].read_bytes())
    said = HOSTILE + "W" * 300
    made = evaluation(
        "world",
        alike("world", f"no {said}", f"yes {said}", kind=said, text=said, image=name),
        run=said,
        weights_digest=said,
        instruction=said,
    )
    path = folder / "report.html"
    report.write_report(path, report.report_page(made, SHARES, RECORDS, PictureFolders([folder])))
    return path


@pytest.mark.parametrize("width", WIDTHS.values(), ids=WIDTHS)
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("which", ["written", "hostile"])
def test_nothing_overflows_and_nothing_is_asked_for(browser, request, which, width, scheme):
    with Reader(browser, request.getfixturevalue(which), width, scheme) as reader:
        assert reader.page.evaluate("document.documentElement.scrollWidth") == width
        assert reader.too_wide() == []
        ground = reader.page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert (sum(map(int, ground[4:-1].split(", "))) > 3 * 128) is (scheme == "light")


def test_the_page_has_all_its_parts(browser, written):
    with Reader(browser, written) as reader:
        assert reader.texts("h2") == [
            "Does the answer come from the picture?",
            "All figures",
            "By kind of question",
            "How much attention goes to the picture?",
            "What was said for what was right",
            "Pictures it got wrong",
            "How it was trained",
            "How this was measured",
        ]
        shown = ["right", "swapped", "blank", "noised", "novel_pairs"]
        assert reader.texts("#alignment .name") == shown
        assert reader.texts("#figures thead th") == ["figure", *shown]
        assert len(reader.texts("#alignment .gaps li")) == 3
        assert reader.texts("#kinds tbody tr") and reader.texts("#confusions .kind")
        layers = runs.assistant().model.language_model.config.num_hidden_layers
        assert reader.page.locator("#attention rect").count() == layers
        assert reader.page.locator("#training svg").count() == 4
        assert reader.page.locator("#training polyline").count() > 4
        digest = runs.assistant().provenance["weights_digest"]
        assert digest[: report.LETTERS] in reader.texts("dl.facts")[0]


def test_pictures_are_seen(browser, written):
    with Reader(browser, written) as reader:
        pictures = reader.page.locator("#wrong img")
        assert 0 < pictures.count() <= 24  # such a short training gets some wrong
        widths = pictures.evaluate_all("all => all.map(one => one.naturalWidth)")
        assert min(widths) > 0


def test_a_table_of_confusions_opens_and_closes(browser, written):
    with Reader(browser, written) as reader:
        first = reader.page.locator("#confusions details").first
        assert first.locator("table").is_visible()
        first.locator("summary").click()
        assert not first.locator("table").is_visible()


def test_markup_in_answers_is_text(browser, hostile):
    with Reader(browser, hostile) as reader:
        assert "<script>alert(1)</script>" in reader.texts("#wrong .said")[0]
        assert "{{ 7*7 }} &amp;" in reader.texts("#wrong .said")[0]
        assert reader.page.locator("script, b:not(#alignment b), [onerror]").count() == 0
        assert reader.page.locator("#wrong img").first.get_attribute("alt").startswith("<b>")
        assert reader.page.locator("#wrong img").first.evaluate("one => one.naturalWidth") > 0


# -- the command ----------------------------------------------------------------------------------


def test_a_report_says_what_the_table_says(capsys, tmp_path, browser):
    run, path = str(runs.finished_run()), tmp_path / "report.html"
    arguments = ["--run", run, "--limit", "20", "--max-new-tokens", "8", "--json"]
    assert evaluate.main([*arguments, "--report", str(path)]) == 0
    found = json.loads(capsys.readouterr().out)
    assert "noised" in found  # a report asks under all conditions
    with Reader(browser, path) as reader:
        values = reader.texts("#alignment .value b")
    conditions = ["held_out", "swapped", "blank", "noised", "novel_pairs"]
    assert values == [f"{found[name]:.1f}" for name in conditions]


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--conditions", "swapped,blank"], "needs the right picture"),
        (["--conditions", "right,louder"], "'louder' is not one of them"),
    ],
)
def test_a_report_that_cannot_be_made_is_refused_first(tmp_path, more, said):
    path = tmp_path / "report.html"
    with pytest.raises(PhiSightError, match=said):
        evaluate.main(["--run", "absent", "--report", str(path), *more])
    assert not path.exists()


def test_a_report_without_a_place_is_refused_before_the_run_is_read(tmp_path):
    with pytest.raises(PhiSightError, match="name a file in a folder that is there"):
        evaluate.main(["--run", "absent", "--report", str(tmp_path / "absent" / "report.html")])


# -- a picture of it ------------------------------------------------------------------------------

LEFT_OUT = "#figures, #kinds, #training, #how { display: none }"  # tables that need no picture


def test_its_picture(browser, written, tmp_path):
    """Also writes the picture of the docs: an evaluation of the demo's run, and where to put it.

    python evaluate.py --report runs/report.html
    PHISIGHT_REPORT=runs/report.html PHISIGHT_REPORT_PICTURE=docs/evaluation.png \\
        python -m pytest tests/test_report_page.py -k test_its_picture
    """
    source = Path(os.environ.get("PHISIGHT_REPORT", written)).resolve()
    path = Path(os.environ.get("PHISIGHT_REPORT_PICTURE", tmp_path / "evaluation.png"))
    with Reader(browser, source, 1080) as reader:
        reader.page.add_style_tag(content=LEFT_OUT)
        height = reader.page.evaluate("document.documentElement.scrollHeight")
        clip = {"x": 0, "y": 0, "width": 1080, "height": min(height, 2060)}
        shot = reader.page.screenshot(full_page=True, clip=clip)
    picture = Image.open(io.BytesIO(shot)).convert("RGB")
    picture.quantize(256, dither=Image.Dither.NONE).save(path, optimize=True)
    assert path.stat().st_size < 400_000
